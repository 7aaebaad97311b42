"""Rounding by exact rational arithmetic: a second source for what floating-point instructions give."""

from fractions import Fraction
from math import floor, inf, isinf, isnan, isqrt, nan

import numpy

# bits of the significand, exponent of the smallest normal number, bits in all, whether it has infinities
FORMATS = {
    "f64": (53, -1022, 64, True), "f32": (24, -126, 32, True), "tf32": (11, -126, 19, True), "f16": (11, -14, 16, True),
    "bf16": (8, -126, 16, True), "e5m2": (3, -14, 8, True), "e4m3": (4, -6, 8, False),
}  # fmt: skip


def largest(kind):
    precision, smallest, _, has_infinity = FORMATS[kind]
    if not has_infinity:
        return Fraction(448)  # the last code but one of e4m3; the last is NaN
    return (2 - Fraction(1, 2 ** (precision - 1))) * Fraction(2) ** (1 - smallest)


def exponent(value):
    """floor(log2(|value|)) of a Fraction other than 0."""
    value = abs(value)
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if value >= Fraction(2) ** guess else guess - 1


def rounded(value, kind, mode="rn", saturate=False):
    """A Fraction rounded once: a Fraction again, or an infinity. mode: rn, rz, rm, rp or rna."""
    if value == 0:
        return value
    precision, smallest, _, has_infinity = FORMATS[kind]
    quantum = Fraction(2) ** (max(exponent(value), smallest) - precision + 1)
    steps, magnitude = value / quantum, abs(value) / quantum
    whole, rest = floor(magnitude), magnitude - floor(magnitude)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1), "rna": rest >= Fraction(1, 2),
        "rz": False, "rm": steps < 0 and rest > 0, "rp": steps > 0 and rest > 0,
    }[mode]  # fmt: skip
    result = (whole + up) * quantum
    if result > largest(kind):
        away = mode in ("rn", "rna") or mode == ("rp" if value > 0 else "rm")
        result = inf if has_infinity and away and not saturate else largest(kind)
    return result if value > 0 else -result


def root(value):
    """The square root of a Fraction, to far more bits than any format has; never a tie unless it is one."""
    scale = 2 ** (2 * 1200)
    scaled = value * scale
    whole = isqrt(floor(scaled))
    exact = whole * whole == scaled
    return Fraction(2 * whole + (not exact), 2 * 2**1200)


def value_of(code, kind):
    """A code's value: a Fraction, or a float where it is none (infinities, NaN, negative zero)."""
    precision, smallest, width, has_infinity = FORMATS[kind]
    code = int(code)
    fraction_bits = precision - 1
    sign = -1 if code >> (width - 1) & 1 else 1
    biased = code >> fraction_bits & (2 ** (width - 1 - fraction_bits) - 1)
    fraction = code & (2**fraction_bits - 1)
    top = 2 ** (width - 1 - fraction_bits) - 1
    if biased == top and has_infinity:
        return nan if fraction else sign * inf
    if not has_infinity and code & (2 ** (width - 1) - 1) == 2 ** (width - 1) - 1:
        return nan
    significand = fraction + (2**fraction_bits if biased else 0)
    if significand == 0:
        return Fraction(0) if sign > 0 else -0.0
    return sign * significand * Fraction(2) ** (max(biased, 1) - 1 + smallest - fraction_bits)


def same(got, wanted):
    """Whether two values are one; zeros of different signs are not."""
    if isinstance(got, float) and isnan(got):
        return isinstance(wanted, float) and isnan(wanted)
    if got == 0 and wanted == 0:
        return is_negative_zero(got) == is_negative_zero(wanted)
    return got == wanted


def is_negative_zero(value):
    return isinstance(value, float) and value == 0 and numpy.signbit(value)


def is_finite(value):
    return isinstance(value, Fraction) or not (isinf(value) or isnan(value))


def draw(generator, kind, count):
    """Codes of all sizes: as likely subnormal or huge as ordinary, with both zeros, infinities and a NaN among them."""
    precision, _, width, _ = FORMATS[kind]
    shift = 13 if kind == "tf32" else 0
    anything = generator.integers(0, 2**width, count, dtype=numpy.uint64)
    near_one = (2 ** (width - 2) - 2 ** (precision - 1)) + generator.integers(
        0, 2 ** (precision + 1), count, dtype=numpy.uint64
    )
    small = generator.integers(0, 2**precision, count, dtype=numpy.uint64)
    codes = numpy.choose(generator.integers(0, 3, count), [anything, near_one, small])
    codes |= generator.integers(0, 2, count, dtype=numpy.uint64) << numpy.uint64(width - 1)
    top = 2 ** (width - 1) - 2 ** (precision - 1)
    special = numpy.array([0, 2 ** (width - 1), top, top + 2 ** (width - 1), top + 1, 1, top - 1], dtype=numpy.uint64)
    codes[: len(special)] = special
    return (codes << numpy.uint64(shift)).astype({8: "u1", 16: "u2", 19: "u4", 32: "u4", 64: "u8"}[width])
