"""Inputs of the golden kernels, by seed. Only bytes are kept, so no library's types are needed."""

from __future__ import annotations

import hashlib

import numpy

Segment = tuple[str, int]  # a kind of values, and how many words of 32 bits
# Zeros, ones, the largest, the smallest normal, subnormals, infinities, NaN and halves to be rounded
_EDGES = (
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x807FFFFF, 0x00000001,
    0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000, 0x477FE000,
    0x477FF000, 0x33000000, 0x43E00000, 0x43E80000,
)  # fmt: skip
_EXPONENTS = 6  # factors of products spread over so many powers of two to both sides of 1


def drawn(name: str, segments: tuple[Segment, ...]) -> numpy.ndarray:
    """The input of the kernel of this name, as bytes.

    It is the same on every machine: numpy keeps RandomState as it is, and no function of a C library takes part.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    random = numpy.random.RandomState(seed)
    return numpy.concatenate([_segment(random, kind, words).view(numpy.uint8) for kind, words in segments])


def _segment(random: numpy.random.RandomState, kind: str, words: int) -> numpy.ndarray:
    bits = random.randint(0, 2**32, words, dtype=numpy.uint32)
    if kind == "bits":
        return bits
    if kind in ("e4m3", "e5m2"):  # what is no NaN and no infinity
        return bits & numpy.uint32(0xF7F7F7F7 if kind == "e4m3" else 0xBFBFBFBF)
    count = words * (2 if kind in ("f16", "bf16") else 1)
    values = numpy.ldexp(2 * random.random_sample(count) - 1, random.randint(-_EXPONENTS, _EXPONENTS + 1, count))
    if kind == "f16":
        return values.astype(numpy.float16).view(numpy.uint32)
    single = values.astype(numpy.float32).view(numpy.uint32)
    if kind == "bf16":
        return (single >> 16).astype(numpy.uint16).view(numpy.uint32)
    if kind == "edges":  # a third each: edges, any bits, numbers of everyday sizes
        where = numpy.arange(words) % 3
        edges = numpy.array(_EDGES, numpy.uint32)[random.randint(0, len(_EDGES), words)]
        return numpy.choose(where, [edges, bits, single]).astype(numpy.uint32)
    if kind not in ("f32", "tf32"):
        raise ValueError(f"unknown kind of values {kind!r}")
    return single
