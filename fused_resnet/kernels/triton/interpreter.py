"""Triton's interpreter, with bfloat16 as a GPU computes it. Nothing here runs on a GPU.

The interpreter keeps bfloat16 in numpy as its 16 bits. Triton 3.7.1 then multiplies those bits as integers in
`tl.dot`, and cuts fp32 off to bfloat16 where the GPU rounds to nearest even. Both are put right for one launch.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import triton.language as tl


@contextlib.contextmanager
def gpu_arithmetic():
    """Inside, interpreted kernels have `tl.dot` on bfloat16 values and round-to-nearest-even conversions to it.

    Infinities and NaN come without numpy's warnings.
    """
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    stock_cast, stock_dot = builder.cast_impl, builder.create_dot

    def cast(src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bits(src.data), tl.bfloat16)
        return stock_cast(src, dst_type)

    def dot(a, b, *rest):
        return stock_dot(_widen(a), _widen(b), *rest)

    def _widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_from_bits(handle.data), tl.float32)

    builder.cast_impl, builder.create_dot = cast, dot
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        del builder.cast_impl, builder.create_dot  # the class's own show again


def _to_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
