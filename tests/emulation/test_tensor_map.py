"""The limits of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col, each crossed by itself."""

import numpy
import pytest
import torch

from fused_resnet.emulation import TensorMap


def tiled(array=None, sizes=(64, 32), strides=(128,), box=(64, 8), **how):
    return TensorMap(torch.zeros(32, 64, dtype=torch.float16) if array is None else array, sizes, strides, box, **how)


def im2col(sizes=(16, 5, 6, 2), strides=(32, 160, 960), lower=(-1, -1), upper=(-1, -1), pixels=8, channels=16, **how):
    array = torch.zeros(2, 6, 5, 16, dtype=torch.float16)
    return TensorMap.im2col(array, sizes, strides, lower=lower, upper=upper, pixels=pixels, channels=channels, **how)


def test_a_tiled_map():
    array = torch.zeros(32, 64, dtype=torch.float16)
    tensor_map = tiled(array, swizzle=128)
    made = tensor_map.structure
    assert (made.rank, tensor_map.element_bytes, made.swizzle, made.is_im2col) == (2, 2, 128, 0)
    assert made.address == array.data_ptr()
    assert list(made.sizes)[:2] == [64, 32] and made.strides[0] == 128 and list(made.box)[:2] == [64, 8]
    assert list(made.element_strides)[:2] == [1, 1]


def test_an_im2col_map():
    made = im2col(swizzle=32).structure
    assert (made.rank, made.is_im2col, made.pixels, made.channels) == (4, 1, 8, 16)
    assert list(made.lower)[:2] == [-1, -1] and list(made.upper)[:2] == [-1, -1]


def test_numpy_arrays_and_other_types():
    array = numpy.zeros((32, 32), numpy.float32)
    assert TensorMap(array, (32, 32), (128,), (4, 2)).element_bytes == 4
    assert tiled(dtype="bf16").element_bytes == 2
    with pytest.raises(TypeError, match="complex64 are not known"):
        TensorMap(numpy.zeros(64, numpy.complex64), (64,), (), (16,))


@pytest.mark.parametrize("how, reason", (
    (dict(strides=(120,)), "multiples of 16 bytes"),
    (dict(strides=(2**40,)), "multiples of 16 bytes below"),
    (dict(strides=()), "one less than sizes"),
    (dict(sizes=(64, 0)), "1 to 2\\*\\*32 each"),
    (dict(sizes=(64, 33)), "at most the array's 4096"),
    (dict(sizes=(1,) * 6, strides=(16,) * 5, box=(8,) * 6), "1 to 5"),
    (dict(box=(64,)), "one a dimension"),
    (dict(box=(64, 257)), "1 to 256"),
    (dict(box=(0, 8)), "1 to 256"),
    (dict(box=(12, 8)), "a multiple of 16"),
    (dict(box=(64, 8), swizzle=64), "rows of the swizzle's span"),
    (dict(box=(16, 8), swizzle=64), "rows of the swizzle's span"),
    (dict(swizzle=16), "a span of"),
    (dict(element_strides=(1, 9)), "1 to 8"),
    (dict(element_strides=(1,)), "1 to 8, one a dimension"),
    (dict(element_strides=(2, 1)), "1 in the innermost dimension"),
    (dict(dtype="b128"), "1, 2, 4 or 8 bytes"),
    (dict(fill="ones"), "'zeros' or 'nan'"),
    (dict(fill="nan", dtype="s16"), "zeros"),
))  # fmt: skip
def test_limits_of_tiled_maps(how, reason):
    with pytest.raises(ValueError, match=f"wanted: .*{reason}"):
        tiled(**how)


def test_an_address_between_multiples_of_16_bytes():
    array = torch.zeros(33, 64, dtype=torch.float16).flatten()[4:]
    with pytest.raises(ValueError, match="a multiple of 16 bytes"):
        tiled(array)


@pytest.mark.parametrize("how, reason", (
    (dict(sizes=(16, 5), strides=(32,), lower=(), upper=()), "3 to 5 for im2col"),
    (dict(lower=(-129, 0)), "2 of -128 to 127"),
    (dict(upper=(0, 128)), "2 of -128 to 127"),
    (dict(lower=(0,)), "2 of -128 to 127"),
    (dict(pixels=1025), "1 to 1024"),
    (dict(channels=257), "1 to 256"),
    (dict(channels=4), "a multiple of 16"),
    (dict(swizzle=64), "rows of the swizzle's span"),
    (dict(lower=(4, 0)), "at least one position"),
    (dict(lower=(-1, 5)), "at least one position"),
))  # fmt: skip
def test_limits_of_im2col_maps(how, reason):
    with pytest.raises(ValueError, match=f"wanted: .*{reason}"):
        im2col(**how)


def test_corners_of_five_dimensions_have_five_bits():
    array = torch.zeros(2, 2, 2, 2, 16, dtype=torch.float16)
    how = dict(strides=(32, 64, 128, 256), pixels=4, channels=16, upper=(0, 0, 0))
    TensorMap.im2col(array, (16, 2, 2, 2, 2), lower=(-16, 0, 1), **how)
    with pytest.raises(ValueError, match="3 of -16 to 15"):
        TensorMap.im2col(array, (16, 2, 2, 2, 2), lower=(-17, 0, 0), **how)
