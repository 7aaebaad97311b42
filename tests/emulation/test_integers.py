"""Integers and bits in the emulator, against Python's integers and values by hand."""

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.syntax import PtxError
from tests.support.lanes import lanes
from tests.support.ptx import kernel_text

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def numpy_type(ptx_type):
    return numpy.dtype({"u": "u", "s": "i", "b": "u", "f": "f"}[ptx_type[0]] + str(int(ptx_type[1:]) // 8))


def wrapped(value, ptx_type):
    width = int(ptx_type[1:])
    value %= 2**width
    return value - 2**width if ptx_type[0] == "s" and value >= 2 ** (width - 1) else value


def integer_cases(ptx_type, seed):
    kind = numpy.iinfo(numpy_type(ptx_type))
    generator = numpy.random.default_rng(seed)
    special = [0, 1, kind.max, kind.min, kind.max - 1, kind.max // 2 + 1, 7, (kind.min + 1) if kind.min else 3]
    drawn = generator.integers(kind.min, kind.max, 64, endpoint=True, dtype=kind.dtype)
    pairs = [(a, b) for a in special for b in special]
    return (
        numpy.array([a for a, _ in pairs] + list(drawn), kind.dtype),
        numpy.array([b for _, b in pairs] + list(drawn[::-1]), kind.dtype),
    )


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


TWO_SOURCES = {
    "add": lambda a, b, t: a + b,
    "sub": lambda a, b, t: a - b,
    "mul.lo": lambda a, b, t: a * b,
    "mul.hi": lambda a, b, t: (a * b) >> int(t[1:]),
    "min": lambda a, b, t: min(a, b),
    "max": lambda a, b, t: max(a, b),
}


@pytest.mark.parametrize("ptx_type", INTEGERS)
@pytest.mark.parametrize("name", TWO_SOURCES)
def test_integer_operations(name, ptx_type):
    a, b = integer_cases(ptx_type, 1)
    got = lanes(f"{name}.{ptx_type} $d, $a, $b;", a, b, out=numpy_type(ptx_type))
    wanted = [wrapped(TWO_SOURCES[name](int(x), int(y), ptx_type), ptx_type) for x, y in zip(a, b)]
    assert got.tolist() == wanted


@pytest.mark.parametrize("ptx_type", INTEGERS)
def test_division_truncates(ptx_type):
    a, b = integer_cases(ptx_type, 2)
    a, b = a[b != 0], b[b != 0]
    quotient = lanes(f"div.{ptx_type} $d, $a, $b;", a, b, out=numpy_type(ptx_type))
    rest = lanes(f"rem.{ptx_type} $d, $a, $b;", a, b, out=numpy_type(ptx_type))
    wanted = [truncated(int(x), int(y)) for x, y in zip(a, b)]
    assert quotient.tolist() == [wrapped(q, ptx_type) for q in wanted]
    assert rest.tolist() == [wrapped(int(x) - q * int(y), ptx_type) for x, y, q in zip(a, b, wanted)]


def test_division_by_zero_gives_anything():
    a = numpy.arange(1, 33, dtype=numpy.uint32)
    seen = [lanes("div.u32 $d, $a, $b;", a, 0 * a, out=numpy.uint32, seed=seed).tolist() for seed in range(3)]
    assert seen[0] != seen[1] != seen[2]
    assert lanes("rem.s32 $d, $a, $b;", a, 0 * a, out=numpy.uint32).tolist() != a.tolist()


@pytest.mark.parametrize("ptx_type, wide", [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_wide_products(ptx_type, wide):
    a, b = integer_cases(ptx_type, 3)
    c = numpy.resize(integer_cases(wide, 4)[0], len(a))
    product = lanes(f"mul.wide.{ptx_type} $d, $a, $b;", a, b, out=numpy_type(wide))
    total = lanes(f"mad.wide.{ptx_type} $d, $a, $b, $c;", a, b, c, out=numpy_type(wide))
    assert product.tolist() == [int(x) * int(y) for x, y in zip(a, b)]
    assert total.tolist() == [wrapped(int(x) * int(y) + int(z), wide) for x, y, z in zip(a, b, c)]


@pytest.mark.parametrize("ptx_type", INTEGERS)
@pytest.mark.parametrize("part", ["lo", "hi"])
def test_products_with_addend(part, ptx_type):
    a, b = integer_cases(ptx_type, 5)
    got = lanes(f"mad.{part}.{ptx_type} $d, $a, $b, $c;", a, b, a, out=numpy_type(ptx_type))
    shift = int(ptx_type[1:]) if part == "hi" else 0
    assert got.tolist() == [wrapped((int(x) * int(y) >> shift) + int(x), ptx_type) for x, y in zip(a, b)]


S32 = (numpy.array([2**31 - 1, -(2**31), 5, -7, 0], numpy.int32), numpy.array([1, -1, -8, 3, 0], numpy.int32))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("add.sat.s32 $d, $a, $b;", [2**31 - 1, -(2**31), -3, -4, 0]),
        ("sub.sat.s32 $d, $a, $b;", [2**31 - 2, -(2**31) + 1, 13, -10, 0]),
        ("sub.sat.s32 $d, $b, $a;", [-(2**31) + 2, 2**31 - 1, -13, 10, 0]),
        ("mad.hi.sat.s32 $d, $a, $a, $a;", [2**31 - 1, -(2**30), 5, -7, 0]),
        ("abs.s32 $d, $a;", [2**31 - 1, -(2**31), 5, 7, 0]),
        ("neg.s32 $d, $a;", [-(2**31) + 1, -(2**31), -5, 7, 0]),
        ("sad.s32 $d, $a, $b, $b;", [2**31 - 1, 2**31 - 2, 5, 13, 0]),
        ("max.relu.s32 $d, $a, $b;", [2**31 - 1, 0, 5, 3, 0]),
        ("min.relu.s32 $d, $a, $b;", [1, 0, 0, 0, 0]),
        ("mul24.lo.s32 $d, $a, $b;", [-1, 0, -40, -21, 0]),
        ("mul24.hi.s32 $d, $a, $b;", [-1, 0, -1, -1, 0]),
        ("mad24.lo.s32 $d, $a, $b, $b;", [0, -1, -48, -18, 0]),
    ],
)
def test_integers_by_hand(text, wanted):
    assert lanes(text, *S32, out=numpy.int32).tolist() == wanted


def test_pairs_of_16_bits():
    a = numpy.array([0x7FFF0001, 0x8000FFFF], numpy.uint32)
    b = numpy.array([0x0001FFFF, 0x00010001], numpy.uint32)
    assert lanes("add.u16x2 $d, $a, $b;", a, b, out=numpy.uint32).tolist() == [0x80000000, 0x80010000]
    assert lanes("min.s16x2 $d, $a, $b;", a, b, out=numpy.uint32).tolist() == [0x0001FFFF, 0x8000FFFF]
    assert lanes("min.u16x2 $d, $a, $b;", a, b, out=numpy.uint32).tolist() == [0x00010001, 0x00010001]
    assert lanes("max.relu.s16x2 $d, $a, $b;", a, b, out=numpy.uint32).tolist() == [0x7FFF0001, 0x00010001]


def test_carries():
    generator = numpy.random.default_rng(6)
    a, b = (generator.integers(0, 2**64, 64, dtype=numpy.uint64) | 0xF0000000 for _ in range(2))
    split = "mov.b64 {%r1, %r2}, $a; mov.b64 {%r3, %r4}, $b;"
    total = lanes(
        f"{split} add.cc.u32 %r5, %r1, %r3; addc.cc.u32 %r6, %r2, %r4; addc.u32 $e, 0, 0; mov.b64 $d, {{%r5, %r6}};",
        a, b, out=(numpy.uint64, numpy.uint32),
    )  # fmt: skip
    sums = [int(x) + int(y) for x, y in zip(a, b)]
    assert total[0].tolist() == [s % 2**64 for s in sums] and total[1].tolist() == [s >> 64 for s in sums]
    difference = lanes(
        f"{split} sub.cc.u32 %r5, %r1, %r3; subc.cc.u32 %r6, %r2, %r4; subc.u32 $e, 0, 0; mov.b64 $d, {{%r5, %r6}};",
        a, b, out=(numpy.uint64, numpy.uint32),
    )  # fmt: skip
    assert difference[0].tolist() == [(int(x) - int(y)) % 2**64 for x, y in zip(a, b)]
    assert difference[1].tolist() == [2**32 - 1 if x < y else 0 for x, y in zip(a, b)]


def test_carries_of_a_128_bit_product():
    a = numpy.array([2**64 - 1, 2**63, 12345678901234567890, 3], numpy.uint64)
    text = """mov.b64 {%r1, %r2}, $a; mov.b64 {%r3, %r4}, $b;
      mul.lo.u32 %r5, %r1, %r3; mul.hi.u32 %r6, %r1, %r3;
      mad.lo.cc.u32 %r6, %r1, %r4, %r6; madc.hi.u32 %r7, %r1, %r4, 0;
      mad.lo.cc.u32 %r6, %r2, %r3, %r6; madc.hi.cc.u32 %r7, %r2, %r3, %r7; addc.u32 %r8, 0, 0;
      mad.lo.cc.u32 %r7, %r2, %r4, %r7; madc.hi.u32 %r8, %r2, %r4, %r8;
      mov.b64 $d, {%r5, %r6}; mov.b64 $e, {%r7, %r8};"""
    low, high = lanes(text, a, a[::-1].copy(), out=(numpy.uint64, numpy.uint64))
    products = [int(x) * int(y) for x, y in zip(a, a[::-1])]
    assert low.tolist() == [p % 2**64 for p in products] and high.tolist() == [p >> 64 for p in products]


BITS = numpy.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x00F0_0F00], numpy.uint32)
AMOUNTS = numpy.array([0, 1, 31, 32, 33, 0xFFFFFFFF], numpy.uint32)


SHIFTS = [("shl", f"b{n}") for n in (16, 32, 64)] + [("shr", f"{k}{n}") for k in "bus" for n in (16, 32, 64)]


@pytest.mark.parametrize("name, ptx_type", SHIFTS)
def test_shifts_beyond_the_width(name, ptx_type):
    width = int(ptx_type[1:])
    values = integer_cases(ptx_type.replace("b", "u"), 7)[0][:48].astype(numpy_type(ptx_type))
    amounts = numpy.resize(numpy.array([0, 1, width - 1, width, width + 1, 2**32 - 1], numpy.uint32), 48)
    got = lanes(f"{name}.{ptx_type} $d, $a, $b;", values, amounts, out=numpy_type(ptx_type))
    if name == "shl":
        wanted = [(int(v) << min(int(n), width)) % 2**width for v, n in zip(values, amounts)]
    else:
        wanted = [int(v) >> min(int(n), width) for v, n in zip(values, amounts)]
    assert got.tolist() == wanted


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shifts(direction, mode):
    high = BITS[::-1].copy()
    got = lanes(f"shf.{direction}.{mode}.b32 $d, $a, $b, $c;", BITS, high, AMOUNTS, out=numpy.uint32)
    wanted = []
    for low, top, amount in zip(BITS.tolist(), high.tolist(), AMOUNTS.tolist()):
        n = min(amount, 32) if mode == "clamp" else amount % 32
        both = top << 32 | low
        wanted.append((both << n) >> 32 & 0xFFFFFFFF if direction == "l" else both >> n & 0xFFFFFFFF)
    assert got.tolist() == wanted


@pytest.mark.parametrize("ptx_type", ["u32", "s32", "u64", "s64"])
def test_bit_fields(ptx_type):
    width = int(ptx_type[1:])
    cases = [(p, n) for p in (0, 1, 5, width - 1, width, 200, 256) for n in (0, 1, 7, width - 1, width, 255, 257)]
    values = numpy.resize(integer_cases(ptx_type, 8)[0][64:], len(cases))
    positions, lengths = (numpy.array(each, numpy.uint32) for each in zip(*cases))
    got = lanes(f"bfe.{ptx_type} $d, $a, $b, $c;", values, positions, lengths, out=numpy_type(ptx_type))
    wanted = []
    for value, position, length in zip(values.tolist(), positions.tolist(), lengths.tolist()):
        position, length = position % 256, length % 256  # bit by bit, as the ISA's pseudo-code does
        sign = 0
        if ptx_type[0] == "s" and length:
            sign = value >> min(position + length - 1, width - 1) & 1
        bits = [value >> (position + i) & 1 if i < length and position + i < width else sign for i in range(width)]
        wanted.append(wrapped(sum(bit << i for i, bit in enumerate(bits)), ptx_type))
    assert got.tolist() == wanted


@pytest.mark.parametrize("width", [32, 64])
def test_bit_field_insertion(width):
    cases = [(p, n) for p in (0, 3, width - 1, width, 300) for n in (0, 1, 9, width, 255, 260)]
    a, b = (numpy.resize(each[64:], len(cases)) for each in integer_cases(f"u{width}", 9))
    positions, lengths = (numpy.array(each, numpy.uint32) for each in zip(*cases))
    got = lanes(f"bfi.b{width} $d, $a, $b, $c, $f;", a, b, positions, lengths, out=a.dtype)
    wanted = []
    for field, into, position, length in zip(a.tolist(), b.tolist(), positions.tolist(), lengths.tolist()):
        for i in range(length % 256):
            if position % 256 + i < width:
                into = into & ~(1 << position % 256 + i) | (field >> i & 1) << position % 256 + i
        wanted.append(into)
    assert got.tolist() == wanted


def test_byte_permutations():
    a = numpy.array([0x33221100] * 4, numpy.uint32)
    b = numpy.array([0xF7E6D5C4] * 4, numpy.uint32)
    selectors = numpy.array([0x3210, 0x7654, 0xC840, 0xFB07], numpy.uint32)
    got = lanes("prmt.b32 $d, $a, $b, $c;", a, b, selectors, out=numpy.uint32)
    assert got.tolist() == [0x33221100, 0xF7E6D5C4, 0xFF00C400, 0xFF0000F7]
    modes = {
        "f4e": 0xC4332211,
        "b4e": 0xE6F70011,
        "rc8": 0x11111111,
        "ecl": 0x33221111,
        "ecr": 0x11111100,
        "rc16": 0x33223322,
    }
    one = numpy.array([1], numpy.uint32)
    for mode, wanted in modes.items():
        assert lanes(f"prmt.b32.{mode} $d, $a, $b, $c;", a[:1], b[:1], one, out=numpy.uint32)[0] == wanted, mode


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xCA, 0xE8, 0x01])
def test_any_function_of_three_bits(table):
    a, b, c = BITS, BITS[::-1].copy(), numpy.roll(BITS, 2)
    got = lanes(f"lop3.b32 $d, $a, $b, $c, {table};", a, b, c, out=numpy.uint32)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist()):
        for i in range(32):
            row = (x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1
            assert result >> i & 1 == table >> row & 1


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("popc.b32 $d, $a;", [0, 1, 1, 32, 13, 8]),
        ("clz.b32 $d, $a;", [32, 31, 0, 0, 3, 8]),
        ("brev.b32 $d, $a;", [0, 0x80000000, 1, 0xFFFFFFFF, 0x1E6A2C48, 0x00F0_0F00]),
        ("bfind.u32 $d, $a;", [0xFFFFFFFF, 0, 31, 31, 28, 23]),
        ("bfind.s32 $d, $a;", [0xFFFFFFFF, 0, 30, 0xFFFFFFFF, 28, 23]),
        ("bfind.shiftamt.u32 $d, $a;", [0xFFFFFFFF, 31, 0, 0, 3, 8]),
        ("not.b32 $d, $a;", [0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0, 0xEDCBA987, 0xFF0F_F0FF]),
        ("cnot.b32 $d, $a;", [1, 0, 0, 0, 0, 0]),
        ("and.b32 $d, $a, 0x0ff0;", [0, 0, 0, 0x0FF0, 0x0670, 0x0F00]),
        ("or.b32 $d, $a, 0x0ff0;", [0x0FF0, 0x0FF1, 0x80000FF0, 0xFFFFFFFF, 0x12345FF8, 0x00F00FF0]),
        ("xor.b32 $d, $a, -1;", [0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0, 0xEDCBA987, 0xFF0F_F0FF]),
        ("fns.b32 $d, $a, 0, 1;", [0xFFFFFFFF, 0, 31, 0, 3, 8]),
        ("fns.b32 $d, $a, 31, -2;", [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 30, 25, 22]),
    ],
)
def test_bits_by_hand(text, wanted):
    assert lanes(text, BITS, out=numpy.uint32).tolist() == wanted


def test_counts_of_64_bits():
    values = numpy.array([0, 1, 2**63, 2**64 - 1, 0x0F00000000], numpy.uint64)
    assert lanes("popc.b64 $d, $a;", values, out=numpy.uint32).tolist() == [0, 1, 1, 64, 4]
    assert lanes("clz.b64 $d, $a;", values, out=numpy.uint32).tolist() == [64, 63, 0, 0, 28]
    assert lanes("brev.b64 $d, $a;", values, out=numpy.uint64).tolist() == [0, 2**63, 1, 2**64 - 1, 0xF0000000]


@pytest.mark.parametrize("second", ["u32", "s32"])
@pytest.mark.parametrize("first", ["u32", "s32"])
def test_dot_products_of_bytes(first, second):
    generator = numpy.random.default_rng(10)
    a, b, c = (generator.integers(0, 2**32, 32, dtype=numpy.uint32) for _ in range(3))

    def pick(words, ptx_type, size):
        return words.view(("i" if ptx_type[0] == "s" else "u") + str(size)).reshape(len(words), -1).astype(numpy.int64)

    four = (pick(a, first, 1) * pick(b, second, 1)).sum(1) + c
    assert (
        lanes(f"dp4a.{first}.{second} $d, $a, $b, $c;", a, b, c, out=numpy.uint32).tolist() == (four % 2**32).tolist()
    )
    for half, where in (("lo", slice(0, 2)), ("hi", slice(2, 4))):
        two = (pick(a, first, 2) * pick(b, second, 1)[:, where]).sum(1) + c
        got = lanes(f"dp2a.{half}.{first}.{second} $d, $a, $b, $c;", a, b, c, out=numpy.uint32)
        assert got.tolist() == (two % 2**32).tolist()


REFUSED = """
  add.b32 %r0, %r1, %r2; add.sat.u32 %r0, %r1, %r2; add.s32 %r0, %r1; add.s32 %r0, %r1, %r2, %r3;
  add.s32 %r0, {%r1, %r2}, %r3; mul.s32 %r0, %r1, %r2; mul.wide.s64 %d0, %d1, %d2; mad.s32 %r0, %r1, %r2, %r3;
  shl.s32 %r0, %r1, %r2; shr.f32 %f0, %f1, %r2; shf.l.b32 %r0, %r1, %r2, %r3; shf.l.clamp.b64 %d0, %d1, %d2, %r3;
  lop3.b32 %r0, %r1, %r2, %r3, 256; lop3.b32 %r0, %r1, %r2, %r3, %r4; prmt.b64 %d0, %d1, %d2, %r3;
  popc.u32 %r0, %r1; bfe.b32 %r0, %r1, %r2, %r3; dp4a.u32 %r0, %r1, %r2, %r3; and.u32 %r0, %r1, %r2;
  not.f32 %f0, %f1; abs.u32 %r0, %r1; neg.b16 %h0, %h1; min.NaN.s32 %r0, %r1, %r2; addd.s32 %r0, %r1, %r2;
"""


@pytest.mark.parametrize("instruction", REFUSED.strip().rstrip(";").split(";"))
def test_what_the_isa_does_not_have_is_refused(instruction):
    name = instruction.split()[0]
    with pytest.raises(PtxError, match=name.replace(".", r"\.")):
        Kernel(kernel_text(instruction + ";\n ret;"))
