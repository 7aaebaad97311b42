"""cvt of the emulator, against exact fractions, Python's integers and values by hand."""

import math
from fractions import Fraction
from math import inf, isinf, isnan

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.syntax import PtxError
from tests.support.exact import FORMATS, draw, is_finite, rounded, same, value_of
from tests.support.lanes import lanes
from tests.support.ptx import kernel_text

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
CODES = {"f16": "u2", "bf16": "u2", "f32": "u4", "f64": "u8", "tf32": "u4"}


def integer_type(ptx_type):
    return numpy.dtype({"u": "u", "s": "i"}[ptx_type[0]] + str(int(ptx_type[1:]) // 8))


def limits(ptx_type):
    kind = numpy.iinfo(integer_type(ptx_type))
    return int(kind.min), int(kind.max)


def integers(ptx_type, count=64):
    low, high = limits(ptx_type)
    special = [0, 1, low, high, high // 2, high // 2 + 1, 200 if high >= 200 else 100, low // 3]
    generator = numpy.random.default_rng(1)
    drawn = generator.integers(low, high, count, endpoint=True, dtype=integer_type(ptx_type))
    return numpy.array(
        special + list(drawn >> generator.integers(0, int(ptx_type[1:]), count).astype(drawn.dtype)), drawn.dtype
    )


def wrapped(value, ptx_type):
    low, high = limits(ptx_type)
    return (value - low) % (high - low + 1) + low


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_between_integers(source, to):
    values = integers(source)
    got = lanes(f"cvt.{to}.{source} $d, $a;", values, out=integer_type(to))
    assert got.tolist() == [wrapped(int(v), to) for v in values]
    low, high = limits(to)
    saturated = lanes(f"cvt.sat.{to}.{source} $d, $a;", values, out=integer_type(to))
    assert saturated.tolist() == [min(max(int(v), low), high) for v in values]


def test_a_narrow_result_fills_a_wide_register_by_its_sign():
    values = numpy.array([200, 127, -1, 0x1FF], numpy.int32)
    assert lanes("cvt.s8.s32 $d, $a;", values, out=numpy.int32).tolist() == [-56, 127, -1, -1]
    assert lanes("cvt.u8.s32 $d, $a;", values, out=numpy.int32).tolist() == [200, 127, 255, 255]
    assert lanes("cvt.s16.s32 $d, $a;", values << 8, out=numpy.int64).tolist() == [-14336, 32512, -256, -256]
    assert lanes("cvt.rzi.s8.f32 $d, $a;", numpy.array([-3.7], numpy.float32), out=numpy.int32).tolist() == [-3]


ROUNDED_TO_INTEGER = {
    "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip


def floats(kind, count=96):
    generator = numpy.random.default_rng(2)
    width = FORMATS[kind][2]
    codes = draw(generator, kind, count)
    near = numpy.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 128, -128.5, 255.5, 256, 32767.5, -2.7, 3.3, 65504], numpy.float64
    )
    if kind == "bf16":
        more = (near.astype(numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)
    else:
        more = near.astype({16: "f2", 32: "f4", 64: "f8"}[width]).view(CODES[kind])
    return numpy.concatenate([codes, more])


@pytest.mark.parametrize("mode", ROUNDED_TO_INTEGER)
@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_to_integers_clamps(source, to, mode):
    values = floats(source)
    got = lanes(f"cvt.{mode}.{to}.{source} $d, $a;", values, out=integer_type(to))
    low, high = limits(to)
    for code, result in zip(values, got.tolist()):
        value = value_of(code, source)
        if isinstance(value, float) and isnan(value):
            wanted = 0 if source != "f64" and "64" not in to else (low or high // 2 + 1)
        elif isinstance(value, float) and isinf(value):
            wanted = high if value > 0 else low
        else:
            wanted = min(max(ROUNDED_TO_INTEGER[mode](Fraction(value)), low), high)
        assert result == wanted, (hex(int(code)), value)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("source", ["s8", "u16", "s32", "u32", "s64", "u64"])
def test_from_integers_is_rounded_once(source, to, mode):
    values = integers(source, 200)
    got = lanes(f"cvt.{mode}.{to}.{source} $d, $a;", values, out=numpy.dtype(CODES[to]))
    for value, code in zip(values, got):
        assert same(value_of(code, to), rounded(Fraction(int(value)), to, mode)), (int(value), hex(int(code)))


def expected(value, to, mode, saturate=False):
    if not is_finite(value):
        if isnan(value) or not saturate:
            return value
        return math.copysign(1, value) * float(value_of({"f16": 0x7BFF, "bf16": 0x7F7F}[to], to))
    if value == 0:
        return value
    result = rounded(Fraction(value), to, mode, saturate)
    return result if result != 0 else (Fraction(0) if value > 0 else -0.0)


NARROWER = [
    ("f16", "f32"),
    ("bf16", "f32"),
    ("f16", "f64"),
    ("bf16", "f64"),
    ("f32", "f64"),
    ("bf16", "f16"),
    ("f16", "bf16"),
]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to, source", NARROWER)
def test_to_narrower_floats_is_rounded_once(to, source, mode):
    values = floats(source, 300)
    got = lanes(f"cvt.{mode}.{to}.{source} $d, $a;", values, out=numpy.dtype(CODES[to]))
    for code, result in zip(values, got):
        assert same(value_of(result, to), expected(value_of(code, source), to, mode)), (
            hex(int(code)),
            hex(int(result)),
        )


@pytest.mark.parametrize(
    "to, source", [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16"), ("f64", "bf16")]
)
def test_to_wider_floats_is_exact(to, source):
    values = floats(source, 300)
    got = lanes(f"cvt.{to}.{source} $d, $a;", values, out=numpy.dtype(CODES[to]))
    assert all(same(value_of(result, to), value_of(code, source)) for code, result in zip(values, got))


def test_which_nan_a_half_becomes_is_not_said():
    nans = numpy.full(32, 0x7FC0, numpy.uint16)
    results = [lanes("cvt.f32.bf16 $d, $a;", nans, out=numpy.float32, seed=seed) for seed in (1, 2)]
    assert numpy.isnan(results).all()
    assert results[0].view(numpy.uint32).tolist() != results[1].view(numpy.uint32).tolist()


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode):
    values = floats("f32", 300)
    ties = numpy.array([0x3F801000, 0x3F803000, 0xBF801000, 0x3F800FFF, 0x7F7FF000, 0x00001000], numpy.uint32)
    values = numpy.concatenate([values, ties])
    got = lanes(f"cvt.{mode}.tf32.f32 $d, $a;", values, out=numpy.uint32)
    assert (got & 0x1FFF == 0)[~numpy.isnan(values.view(numpy.float32))].all()
    for code, result in zip(values, got):
        wanted = expected(value_of(code, "f32"), "tf32", mode)
        assert same(value_of(int(result) >> 13, "tf32"), wanted), (hex(int(code)), hex(int(result)))


def quantised(value, kind, relu):
    """What .satfinite makes of a value: NaN stays, all else becomes finite."""
    if isinstance(value, float) and isnan(value):
        return value
    if relu and (value < 0 or (isinstance(value, float) and value == 0)):
        return Fraction(0)
    if isinstance(value, float) and isinf(value):
        return math.copysign(1, value) * {"e4m3": 448, "e5m2": 57344}[kind]
    result = rounded(Fraction(value), kind, saturate=True) if value != 0 else value
    return result if result != 0 or value == 0 else (Fraction(0) if value > 0 else -0.0)


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("source", ["f32", "f16x2"])
def test_pairs_of_8_bits(source, kind, relu):
    element = source[:3]
    a, b = floats(element, 256), floats(element, 256)[::-1].copy()
    small = draw(numpy.random.default_rng(3), kind, len(a))  # their own values, and halfway between them
    own = numpy.array([float(v) if is_finite(v := value_of(c, kind)) else 0.0 for c in small])
    middle = ((own + numpy.roll(own, 1)) / 2).astype({"f32": "f4", "f16": "f2"}[element]).view(CODES[element])
    a, b = numpy.concatenate([a, middle]), numpy.concatenate([b, middle[::-1]])
    if source == "f32":
        got = lanes(f"cvt.rn.satfinite{relu}.{kind}x2.f32 $d, $a, $b;", a, b, out=numpy.uint16)
    else:
        packed = a.astype(numpy.uint32) << 16 | b
        got = lanes(f"cvt.rn.satfinite{relu}.{kind}x2.f16x2 $d, $a;", packed, out=numpy.uint16)
    for k, result in enumerate(got.tolist()):
        for source_code, code in ((a[k], result >> 8), (b[k], result & 255)):
            wanted = quantised(value_of(source_code, element), kind, bool(relu))
            assert same(value_of(code, kind), wanted), (hex(int(source_code)), hex(code))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_all_codes_of_8_bits_become_halves_exactly(kind):
    codes = numpy.arange(256, dtype=numpy.uint16) << 8 | numpy.arange(256, dtype=numpy.uint16)[::-1]
    got = lanes(f"cvt.rn.f16x2.{kind}x2 $d, $a;", codes, out=numpy.uint32)
    for code, result in zip(codes.tolist(), got.tolist()):
        assert same(value_of(result >> 16, "f16"), value_of(code >> 8, kind))
        assert same(value_of(result & 0xFFFF, "f16"), value_of(code & 255, kind))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_of_16_bits(kind):
    a = floats("f32", 200)
    b = a[::-1].copy()
    for mode in ("rn", "rz"):
        got = lanes(f"cvt.{mode}.{kind}x2.f32 $d, $a, $b;", a, b, out=numpy.uint32)
        for high, low, result in zip(a, b, got.tolist()):
            assert same(value_of(result >> 16, kind), expected(value_of(high, "f32"), kind, mode))
            assert same(value_of(result & 0xFFFF, kind), expected(value_of(low, "f32"), kind, mode))


@pytest.mark.parametrize(
    "text, value, wanted",
    [
        ("cvt.rn.relu.f16.f32 $d, $a;", -1.0, 0x0000),
        ("cvt.rn.relu.f16.f32 $d, $a;", math.nan, 0x7FFF),
        ("cvt.rn.satfinite.f16.f32 $d, $a;", 1e6, 0x7BFF),
        ("cvt.rn.satfinite.f16.f32 $d, $a;", -inf, 0xFBFF),
        ("cvt.rz.satfinite.relu.bf16.f32 $d, $a;", inf, 0x7F7F),
        ("cvt.rn.sat.f16.f32 $d, $a;", 1.5, 0x3C00),
        ("cvt.rn.sat.f16.f32 $d, $a;", math.nan, 0x0000),
        ("cvt.rn.ftz.f16.f32 $d, $a;", -1e-40, 0x8000),
        ("cvt.rn.bf16.f32 $d, $a;", math.nan, 0x7FFF),
    ],
)
def test_clamps_by_hand(text, value, wanted):
    assert lanes(text, numpy.array([value], numpy.float32), out=numpy.uint16)[0] == wanted


@pytest.mark.parametrize(
    "text, value, wanted",
    [
        ("cvt.rni.f32.f32 $d, $a;", 2.5, 2.0), ("cvt.rni.f32.f32 $d, $a;", -0.4, -0.0),
        ("cvt.rpi.f32.f32 $d, $a;", 2.1, 3.0),
        ("cvt.rmi.f32.f32 $d, $a;", -2.1, -3.0), ("cvt.rzi.f32.f32 $d, $a;", -2.9, -2.0),
        ("cvt.sat.f32.f32 $d, $a;", 3.0, 1.0),
        ("cvt.sat.f32.f32 $d, $a;", -3.0, 0.0), ("cvt.sat.f32.f32 $d, $a;", math.nan, 0.0),
        ("cvt.ftz.f32.f32 $d, $a;", -1e-40, -0.0), ("cvt.rzi.f32.f32 $d, $a;", 1e30, 1e30),
    ],
)  # fmt: skip
def test_f32_to_itself(text, value, wanted):
    got = lanes(text, numpy.array([value], numpy.float32), out=numpy.float32)
    assert got.view(numpy.uint32)[0] == numpy.array([wanted], numpy.float32).view(numpy.uint32)[0]


REFUSED = """
  cvt.f16.f32 %h0, %f0; cvt.rn.f32.f16 %f0, %h0; cvt.s32.f32 %r0, %f0; cvt.rn.s32.f32 %r0, %f0;
  cvt.f32.s32 %f0, %r0; cvt.rni.f16.f32 %h0, %f0; cvt.rn.u32.s32 %r0, %r1; cvt.rni.f32.s32 %f0, %r0;
  cvt.tf32.f32 %r0, %f0; cvt.rna.f16.f32 %h0, %f0; cvt.rna.relu.tf32.f32 %r0, %f0;
  cvt.rn.e4m3x2.f32 %h0, %f0, %f1; cvt.rz.satfinite.e4m3x2.f32 %h0, %f0, %f1;
  cvt.rn.satfinite.e4m3x2.f32 %h0, %f0; cvt.rn.f16x2.f32 %r0, %f0; cvt.rm.f16x2.f32 %r0, %f0, %f1;
  cvt.rn.satfinite.f16x2.e4m3x2 %r0, %h0; cvt.f16x2.e4m3x2 %r0, %h0; cvt.b32.s32 %r0, %r1; cvt.u32 %r0, %r1;
  cvt.u32.s32.s32 %r0, %r1; cvt.rn.satfinite.s32.f32 %r0, %f0; cvt.ftz.s32.s64 %r0, %d0;
  cvt.rn.relu.f16.f64 %h0, %fd0; cvt.rn.sat.bf16.f32 %h0, %f0; cvt.rzi.f64.f32 %fd0, %f0;
  cvt.rn.satfinite.f16x2.f16x2 %r0, %r1; cvt.rn.f32.f32 %f0, %f1; cvt.u32.s32 %r0, %r1, %r2;
"""


@pytest.mark.parametrize("instruction", REFUSED.strip().rstrip(";").split(";"))
def test_what_the_isa_does_not_have_is_refused(instruction):
    with pytest.raises(PtxError, match=instruction.split()[0].replace(".", r"\.")):
        Kernel(kernel_text(instruction + ";\n ret;"))
