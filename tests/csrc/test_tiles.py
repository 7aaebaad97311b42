"""AMX's tiles in C++ (csrc/cpu/blocked/tiles.h): TDPBF16PS by exact arithmetic, and the same bits by the instruction
where there is one."""

from fractions import Fraction

import numpy
import pytest

from tests.support import exact

checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")

NO_AMX = checks.why_no_amx()
SMALLEST = Fraction(2) ** -126  # normal number
needs_amx = pytest.mark.skipif(NO_AMX is not None, reason=str(NO_AMX))


def bf16(values):
    """The upper halves of these numbers in fp32: exact for what the tests draw."""
    return (numpy.asarray(values, numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)


def draw(generator, shape, spread=8):
    """bf16 of both signs and sizes that differ by up to 2^(2 * spread), so that the order of a sum shows."""
    values = generator.standard_normal(shape) * 2.0 ** generator.integers(-spread, spread, shape)
    return bf16(values)


def product(a, b, sums, rows=16, stride=64, is_emulated=True):
    """sums + a @ b, where row k of b has the pair (2k, 2k + 1) of each column."""
    return checks.tile_product(a, b, sums, rows, stride, is_emulated)


def value(code):
    """Denormals count as zero."""
    found = exact.value_of(code, "bf16")
    return Fraction(0) if isinstance(found, float) or abs(found) < SMALLEST else found


def once(number):
    """Rounded to fp32, denormals to zero."""
    result = exact.rounded(number, "f32")
    return Fraction(0) if abs(result) < SMALLEST else result


def exactly(a, b, total):
    """An element: the products of even and of odd k summed apart, each rounded once, then added to the accumulator."""
    even = odd = Fraction(0)
    for k in range(16):
        even = once(even + value(a[2 * k]) * value(b[k, 0]))
        odd = once(odd + value(a[2 * k + 1]) * value(b[k, 1]))
    return once(once(Fraction(float(total))) + once(even + odd))


@pytest.mark.parametrize("exponent", [0, -62, -66], ids=["ordinary", "sums near the smallest", "products below it"])
def test_the_emulated_product_is_exact(exponent):
    generator = numpy.random.default_rng(exponent + 100)
    scale = numpy.float32(2.0**exponent)
    a = bf16((draw(generator, (16, 32)).astype(numpy.uint32) << 16).view(numpy.float32) * scale)
    b = bf16((draw(generator, (16, 32)).astype(numpy.uint32) << 16).view(numpy.float32) * scale)
    sums = (generator.standard_normal((16, 16)) * float(scale) ** 2).astype(numpy.float32)
    found = product(a, b, sums)
    wanted = [[float(exactly(a[m], b[:, 2 * n : 2 * n + 2], sums[m, n])) for n in range(16)] for m in range(16)]
    assert numpy.array_equal(found, numpy.array(wanted, numpy.float32))
    assert numpy.count_nonzero(found) > 10
    # the order shows: one sum over all k gives other bits
    pairs = b.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    wide = [(x.astype(numpy.uint32) << 16).view(numpy.float32) for x in (a, pairs)]
    assert not numpy.array_equal(found, wide[0] @ wide[1] + sums)


def test_denormals_are_zeros():
    a, b = numpy.zeros((16, 32), numpy.uint16), numpy.zeros((16, 32), numpy.uint16)
    a[:, 0] = 0x007F  # the largest denormal
    b[0] = bf16(numpy.full(32, 2.0**100))
    sums = numpy.full((16, 16), 2.0**-130, numpy.float32)
    assert not product(a, b, sums).any()
    a[:, 0], b[0] = bf16([2.0**100])[0], 0x007F
    assert not product(a, b, sums).any()
    a[:, 0] = 0x0080  # the smallest normal number
    b[0] = bf16(numpy.full(32, 2.0))
    assert (product(a, b, sums) == numpy.float32(2.0**-125)).all()


def test_nan_and_infinity_stay_in_their_row_and_column():
    a, b = (draw(numpy.random.default_rng(7), (16, 32), 1) for _ in range(2))
    sums = numpy.zeros((16, 16), numpy.float32)
    right = product(a, b, sums)
    a[3, 5] = 0x7FC0
    found = product(a, b, sums)
    assert numpy.isnan(found[3]).all()
    assert numpy.array_equal(numpy.delete(found, 3, 0), numpy.delete(right, 3, 0))
    a[3, 5] = 0x7F80
    b[2] = bf16(numpy.ones(32))
    assert (product(a, b, sums)[3] == numpy.inf).all()


@pytest.mark.parametrize("rows", [1, 7, 14, 16])
def test_only_as_many_rows_as_a_tile_has(rows):
    generator = numpy.random.default_rng(rows)
    a, b = draw(generator, (32, 32)), draw(generator, (16, 32))
    sums = generator.standard_normal((16, 16)).astype(numpy.float32)
    found = product(a, b, sums, rows, stride=128)
    assert numpy.array_equal(found[:rows], product(a[::2].copy(), b, sums)[:rows])
    assert numpy.array_equal(found[rows:], sums[rows:])


@needs_amx
@pytest.mark.parametrize("rows", [1, 7, 14, 16])
def test_the_instructions_give_the_same_bits(rows):
    generator = numpy.random.default_rng(rows)
    for _ in range(200):
        a, b = draw(generator, (16, 32), 60), draw(generator, (16, 32), 60)
        sums = generator.standard_normal((16, 16)).astype(numpy.float32)
        for codes in (a, b):
            codes.flat[:4] = 0x7F80, 0xFF80, 0x0001, 0x8000
        found, wanted = (product(a, b, sums, rows, is_emulated=emulated) for emulated in (False, True))
        bits = [numpy.where(numpy.isnan(x), 0, x.view(numpy.uint32)) for x in (found, wanted)]
        assert numpy.array_equal(*bits) and numpy.array_equal(numpy.isnan(found), numpy.isnan(wanted))
