"""Floating-point arithmetic of the emulator, against exact fractions, IEEE 754 and values by hand."""

import math
from fractions import Fraction

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.syntax import PtxError
from tests.support.exact import draw, is_finite, root, rounded, same, value_of
from tests.support.lanes import lanes
from tests.support.ptx import kernel_text

NAN = float("nan")


def exactly(operation, sources, mode):
    """The result of IEEE 754 on Fractions and special floats, before rounding; None where it is special."""
    if not all(is_finite(x) for x in sources):
        return None
    fractions = [Fraction(x) for x in sources]
    if operation == "add":
        return fractions[0] + fractions[1]
    if operation == "sub":
        return fractions[0] - fractions[1]
    if operation == "mul":
        return fractions[0] * fractions[1]
    if operation == "fma":
        return fractions[0] * fractions[1] + fractions[2]
    if operation in ("div", "rcp"):
        numerator = Fraction(1) if operation == "rcp" else fractions[0]
        return numerator / fractions[-1] if fractions[-1] else None
    return root(fractions[0]) if fractions[0] >= 0 else None


NATIVE = {
    "add": lambda x: x[0] + x[1], "sub": lambda x: x[0] - x[1], "mul": lambda x: x[0] * x[1],
    "fma": lambda x: x[0] * x[1] + x[2], "div": lambda x: x[0] / x[1], "rcp": lambda x: 1 / x[0],
    "sqrt": lambda x: numpy.sqrt(x[0]),
}  # fmt: skip


def wanted_value(operation, sources, kind, mode):
    """Exact and rounded once where all is finite and not zero, else what IEEE 754 says of special values, by numpy."""
    exact = exactly(operation, sources, mode)
    if exact:
        result = rounded(exact, kind, mode)
        return result if result != 0 else (-0.0 if exact < 0 else Fraction(0))
    with numpy.errstate(all="ignore"):
        special = float(NATIVE[operation]([numpy.float64(float(x)) for x in sources]))
    if exact == 0 and mode == "rm" and special == 0:  # x - x is -0 when rounding down
        terms = [float(x) for x in sources]
        if operation == "fma":
            terms = [math.copysign(1, terms[0]) * math.copysign(1, terms[1]), terms[2]]
        if operation == "sub":
            terms[1] = -terms[1] if terms[1] else math.copysign(1, -math.copysign(1, terms[1])) * 0.0
        if operation in ("add", "sub", "fma") and math.copysign(1, terms[0]) != math.copysign(1, terms[1]):
            return -0.0
    return Fraction(0) if special == 0 and math.copysign(1, special) > 0 else special


def check(text, operation, kind, mode, count=160, seed=11):
    arity = {"fma": 3, "rcp": 1, "sqrt": 1}.get(operation, 2)
    generator = numpy.random.default_rng(seed)
    sources = [draw(generator, kind, count) for _ in range(arity)]
    for k in range(1, arity):
        generator.shuffle(sources[k])
        sources[k][20:30] = sources[0][20:30]  # x - x, x / x
    got = lanes(text, *sources, out=sources[0].dtype)
    for k in range(count):
        values = [value_of(source[k], kind) for source in sources]
        wanted = wanted_value(operation, values, kind, mode)
        assert same(value_of(got[k], kind), wanted), (text, [hex(int(s[k])) for s in sources], hex(int(got[k])), wanted)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma", "div", "rcp", "sqrt"])
def test_f32_is_rounded_once(operation, mode):
    sources = {"fma": "$a, $b, $c", "rcp": "$a", "sqrt": "$a"}.get(operation, "$a, $b")
    check(f"{operation}.{mode}.f32 $d, {sources};", operation, "f32", mode)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("operation", ["add", "mul", "fma", "div", "rcp", "sqrt"])
def test_f64_is_rounded_once(operation, mode):
    sources = {"fma": "$a, $b, $c", "rcp": "$a", "sqrt": "$a"}.get(operation, "$a, $b")
    check(f"{operation}.{mode}.f64 $d, {sources};", operation, "f64", mode, count=64)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_halves_are_rounded_once(operation, kind):
    sources = "$a, $b, $c" if operation == "fma" else "$a, $b"
    check(f"{operation}.rn.{kind} $d, {sources};", operation, kind, "rn", count=400)


def test_fma_of_halves_where_two_roundings_differ():
    # 0x1.004p0 * 0x1.004p0 = 0x1.008010p0; 2^-24 less than a tie once 0x1p-11 is there
    a = numpy.array([0x3C01, 0x3C01], numpy.uint16)
    b = numpy.array([0x3C01, 0x0C01], numpy.uint16)
    c = numpy.array([0x8001, 0x7BFF], numpy.uint16)
    got = lanes("fma.rn.f16 $d, $a, $b, $c;", a, b, c, out=numpy.uint16)
    for k in range(2):
        exact = value_of(a[k], "f16") * value_of(b[k], "f16") + value_of(c[k], "f16")
        assert value_of(got[k], "f16") == rounded(exact, "f16")


@pytest.mark.parametrize("pair, kind", [("f16x2", "f16"), ("bf16x2", "bf16")])
def test_pairs_are_two_halves(pair, kind):
    generator = numpy.random.default_rng(12)
    a, b, c = (draw(generator, kind, 128) for _ in range(3))
    for operation, letters in (("add", "$a, $b"), ("fma.rn", "$a, $b, $c"), ("min", "$a, $b"), ("neg", "$a")):
        alone = lanes(f"{operation}.{kind} $d, {letters};", a, b, c, out=numpy.uint16)
        both = lanes(f"{operation}.{pair} $d, {letters};", *(x.view(numpy.uint32) for x in (a, b, c)), out=numpy.uint32)
        assert both.view(numpy.uint16).tolist() == alone.tolist(), operation


SMALL, NEXT_TO_TINY = 1e-40, 1.5 * 2.0**-126


@pytest.mark.parametrize(
    "text, a, b, wanted",
    [
        ("add.ftz.f32 $d, $a, $b;", SMALL, 0, 0.0),
        ("add.ftz.f32 $d, $a, $b;", -SMALL, -0.0, -0.0),
        ("sub.ftz.f32 $d, $a, $b;", NEXT_TO_TINY, 2.0**-126, 0.0),
        ("mul.ftz.f32 $d, $a, $b;", -(2.0**-100), 2.0**-30, -0.0),
        ("mul.f32 $d, $a, $b;", -(2.0**-100), 2.0**-30, -(2.0**-130)),
        ("fma.rn.ftz.f32 $d, $a, $b, $a;", SMALL, 1, 0.0),
        ("div.rn.ftz.f32 $d, $a, $b;", SMALL, SMALL, NAN),
        ("div.full.f32 $d, $a, $b;", 1.0, 3.0, numpy.float32(1) / numpy.float32(3)),
        ("div.approx.f32 $d, $a, $b;", 1.0, 2.0**127, 0.0),
        ("div.approx.f32 $d, $a, $b;", -math.inf, 2.0**127, NAN),
        ("div.approx.f32 $d, $a, $b;", 6.0, 3.0, 2.0),
        ("add.sat.f32 $d, $a, $b;", 0.75, 0.5, 1.0),
        ("add.sat.f32 $d, $a, $b;", -3.0, 0.5, 0.0),
        ("mul.sat.f32 $d, $a, $b;", math.inf, 0.0, 0.0),
        ("fma.rn.sat.f32 $d, $a, $b, $b;", 0.5, 0.25, 0.375),
        ("min.f32 $d, $a, $b;", NAN, 2.0, 2.0),
        ("min.f32 $d, $a, $b;", 0.0, -0.0, -0.0),
        ("max.f32 $d, $a, $b;", -0.0, 0.0, 0.0),
        ("max.NaN.f32 $d, $a, $b;", NAN, 2.0, NAN),
        ("max.ftz.f32 $d, $a, $b;", -1.0, SMALL, 0.0),
        ("min.xorsign.abs.f32 $d, $a, $b;", -3.0, 2.0, -2.0),
        ("min.xorsign.abs.f32 $d, $a, $b;", -3.0, -2.0, 2.0),
        ("abs.ftz.f32 $d, $a;", -SMALL, 0, 0.0),
        ("abs.f32 $d, $a;", -2.5, 0, 2.5),
        ("neg.f32 $d, $a;", 0.0, 0, -0.0),
        ("neg.ftz.f32 $d, $a;", SMALL, 0, -0.0),
        ("copysign.f32 $d, $a, $b;", -1.0, 3.0, -3.0),
        ("sqrt.rn.f32 $d, $a;", -0.0, 0, -0.0),
        ("sqrt.approx.f32 $d, $a;", -1.0, 0, NAN),
        ("rsqrt.approx.f32 $d, $a;", SMALL, 0, numpy.float32(1 / math.sqrt(numpy.float32(SMALL)))),
        ("rsqrt.approx.ftz.f32 $d, $a;", SMALL, 0, math.inf),
        ("rsqrt.approx.f32 $d, $a;", -0.0, 0, -math.inf),
        ("rcp.approx.ftz.f32 $d, $a;", -SMALL, 0, -math.inf),
        ("ex2.approx.f32 $d, $a;", -140.0, 0, 2.0**-140),
        ("ex2.approx.ftz.f32 $d, $a;", -140.0, 0, 0.0),
        ("ex2.approx.ftz.f32 $d, $a;", 0.5, 0, numpy.float32(math.sqrt(2))),
        ("ex2.approx.ftz.f32 $d, $a;", -math.inf, 0, 0.0),
        ("lg2.approx.f32 $d, $a;", 2.0**-149, 0, -149.0),
        ("lg2.approx.ftz.f32 $d, $a;", 2.0**-149, 0, -math.inf),
        ("lg2.approx.f32 $d, $a;", -1.0, 0, NAN),
        ("sin.approx.f32 $d, $a;", math.inf, 0, NAN),
        ("sin.approx.f32 $d, $a;", -0.0, 0, -0.0),
        ("cos.approx.f32 $d, $a;", 1.0, 0, numpy.float32(math.cos(1))),
        ("tanh.approx.f32 $d, $a;", 0.5, 0, numpy.float32(math.tanh(0.5))),
        ("tanh.approx.f32 $d, $a;", -math.inf, 0, -1.0),
    ],
)  # fmt: skip
def test_f32_by_hand(text, a, b, wanted):
    a, b, wanted = (numpy.array([x], numpy.float32) for x in (a, b, wanted))
    got = lanes(text, a, b, out=numpy.float32)
    bits = got.view(numpy.uint32)[0]
    assert bits == (0x7FFFFFFF if numpy.isnan(wanted[0]) else wanted.view(numpy.uint32)[0])


@pytest.mark.parametrize(
    "text, sources, wanted",
    [
        ("fma.rn.relu.f16 $d, $a, $b, $c;", (0x3C00, 0xBC00, 0x0000), 0x0000),
        ("fma.rn.relu.f16 $d, $a, $b, $c;", (0x7E00, 0xBC00, 0x0000), 0x7FFF),
        ("fma.rn.relu.bf16 $d, $a, $b, $c;", (0x3F80, 0xBF80, 0xBF80), 0x0000),
        ("fma.rn.sat.f16 $d, $a, $b, $c;", (0x4000, 0x4000, 0x0000), 0x3C00),
        ("add.ftz.f16 $d, $a, $b;", (0x8001, 0x8002, 0), 0x8000),
        ("add.sat.f16 $d, $a, $b;", (0x7E00, 0x3C00, 0), 0x0000),
        ("max.f16 $d, $a, $b;", (0x7E01, 0x3C00, 0), 0x3C00),
        ("max.NaN.bf16 $d, $a, $b;", (0x7FC1, 0x3F80, 0), 0x7FFF),
        ("min.f16 $d, $a, $b;", (0x8000, 0x0000, 0), 0x8000),
        ("min.xorsign.abs.f16 $d, $a, $b;", (0xC200, 0x4000, 0), 0xC000),
        ("neg.f16 $d, $a;", (0x3C00, 0, 0), 0xBC00),
        ("abs.bf16 $d, $a;", (0xBF80, 0, 0), 0x3F80),
        ("mul.f16 $d, $a, $b;", (0x7BFF, 0x7BFF, 0), 0x7C00),
        ("ex2.approx.f16 $d, $a;", (0x4000, 0, 0), 0x4400),
        ("ex2.approx.ftz.bf16 $d, $a;", (0xC302, 0, 0), 0x0000),
        ("tanh.approx.bf16 $d, $a;", (0x7F80, 0, 0), 0x3F80),
    ],
)  # fmt: skip
def test_halves_by_hand(text, sources, wanted):
    got = lanes(text, *(numpy.array([x], numpy.uint16) for x in sources), out=numpy.uint16)
    assert got.tolist() == [wanted]


def test_gross_f64_approximations_have_20_bits():
    a = numpy.array([3.0, 2.0**-1030, -0.0], numpy.float64)
    got = lanes("rcp.approx.ftz.f64 $d, $a;", a, out=numpy.float64)
    assert abs(got[0] * 3 - 1) < 2**-20 and got[1:].tolist() == [math.inf, -math.inf]
    assert got.view(numpy.uint64)[0] & 0xFFFFFFFF == 0
    assert lanes("rsqrt.approx.f64 $d, $a;", a[:1], out=numpy.float64)[0] == pytest.approx(3**-0.5, rel=2**-52)


REFUSED = """
  add.f32 %p0, %f1, %f2; add.rna.f32 %f0, %f1, %f2; add.relu.f32 %f0, %f1, %f2; fma.f32 %f0, %f1, %f2, %f3;
  fma.rn.sat.bf16 %h0, %h1, %h2, %h3; fma.rn.sat.f64 %fd0, %fd1, %fd2, %fd3; fma.rz.f16 %h0, %h1, %h2, %h3;
  div.f32 %f0, %f1, %f2; div.rn.f16 %h0, %h1, %h2; sqrt.f32 %f0, %f1; ex2.f32 %f0, %f1;
  ex2.approx.f64 %fd0, %fd1; sin.approx.f64 %fd0, %fd1; min.NaN.f64 %fd0, %fd1, %fd2; tanh.f32 %f0, %f1;
  copysign.f16 %h0, %h1, %h2;
"""


@pytest.mark.parametrize("instruction", REFUSED.strip().rstrip(";").split(";"))
def test_what_the_isa_does_not_have_is_refused(instruction):
    name = instruction.split()[0]
    with pytest.raises(PtxError, match=name.replace(".", r"\.")):
        Kernel(kernel_text(instruction + ";\n ret;"))
