"""Triton's interpreter, with arithmetic as a GPU's. Nothing here runs on a GPU.

The interpreter keeps bfloat16 in numpy as its 16 bits. Triton 3.7.1 then multiplies those bits as integers in
`tl.dot`, and cuts fp32 off to bfloat16 where the GPU rounds to nearest even. It rounds `tl.fma` twice, and its maximum
and minimum of a number and NaN are NaN where the GPU's are the number. Its e4m3, kept as 8 bits, has the same faults as
bfloat16. All are put right for one launch.

It also spends more than half of its time in vain, which `_without_waste` spares it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import numpy as np
import torch
import triton.language as tl

from fused_resnet.operators import quantized


@contextlib.contextmanager
def gpu_arithmetic():
    """Inside, interpreted kernels have `tl.dot` on bfloat16 and e4m3 values and round-to-nearest-even conversions to
    them. Those to e4m3 saturate.

    `tl.fma` of fp32 rounds once, and `tl.maximum` and `tl.minimum` drop NaN unless told otherwise. Infinities and NaN
    come without numpy's warnings.
    """
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    stock_cast, stock_convert, stock_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast(src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bits(src.data), tl.bfloat16)
        return stock_cast(src, dst_type)

    def convert(src, dst_type, rounding):
        of, to = src.dtype.scalar, dst_type.scalar
        if (of, to) == (tl.float32, tl.float8e4nv):
            return TensorHandle(_to_float8(src.data), tl.float8e4nv)
        if (of, to) == (tl.float8e4nv, tl.float32):
            return TensorHandle(_from_float8(src.data), tl.float32)
        return stock_convert(src, dst_type, rounding)

    def dot(a, b, *rest):
        return stock_dot(_widen(a), _widen(b), *rest)

    def _widen(handle):
        if handle.dtype.scalar == tl.float8e4nv:
            return TensorHandle(_from_float8(handle.data), tl.float32)
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_from_bits(handle.data), tl.float32)

    def fma(x, y, z):
        factors = (torch.from_numpy(np.array(one.data, np.float32)) for one in (x, y, z))
        return TensorHandle(quantized.fma(*factors).numpy(), z.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot, builder.create_fma = cast, convert, dot, fma
    builder.create_maxnumf = lambda x, y: builder.binary_op(x, y, np.fmax)
    builder.create_minnumf = lambda x, y: builder.binary_op(x, y, np.fmin)
    try:
        with np.errstate(all="ignore"), _without_waste():
            yield
    finally:
        own = "cast_impl", "create_fp_to_fp", "create_dot", "create_fma", "create_maxnumf", "create_minnumf"
        for name in own:
            delattr(builder, name)  # the class's own shows again


@contextlib.contextmanager
def _without_waste():
    """For one launch. A call of a jit function replaces the language's functions only the first time.

    The interpreter computes whether integers overflow and asserts it in debug mode alone: elsewhere it need not
    compute it. It asks for numpy's dtypes again and again, each time by a new dictionary of them all.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    stock = interpreter._patch_lang, interpreter._get_np_dtype, builder.options
    np_dtypes: dict[str, np.dtype] = {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = stock[1](dtype)
        return np_dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = functools.cache(stock[0]), np_dtype
    builder.options = dataclasses.replace(stock[2], sanitize_overflow=stock[2].debug)
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter._get_np_dtype, builder.options = stock


def _to_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_float8(values: np.ndarray) -> np.ndarray:
    limited = torch.from_numpy(np.array(values, dtype=np.float32)).clamp(-448.0, 448.0)
    return limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _from_float8(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(bits, dtype=np.uint8)).view(torch.float8_e4m3fn).float().numpy()
