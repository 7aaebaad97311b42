"""Tensors of torch and arrays of numpy as memory: where they lie, how far they go."""

from __future__ import annotations

from typing import Any

import numpy

from fused_resnet.emulation.syntax import TYPE_BYTES

__all__ = ["TYPE_BYTES", "address", "is_array", "num_bytes", "type_name", "why_not"]

_TYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "s64", "int32": "s32",
    "int16": "s16", "int8": "s8", "uint64": "u64", "uint32": "u32", "uint16": "u16", "uint8": "u8", "bool": "u8",
    "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2",
}  # fmt: skip


def is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "untyped_storage")


def is_array(value: Any) -> bool:
    return isinstance(value, numpy.ndarray) or is_tensor(value)


def address(value: Any) -> int:
    return value.data_ptr() if is_tensor(value) else value.ctypes.data


def num_bytes(value: Any) -> int:
    return value.numel() * value.element_size() if is_tensor(value) else value.nbytes


def type_name(value: Any) -> str:
    """PTX's name for the elements' type."""
    name = str(value.dtype).removeprefix("torch.")
    if name not in _TYPES:
        raise TypeError(f"arrays of {value.dtype} are not known to the emulator; known are {', '.join(_TYPES)}")
    return _TYPES[name]


def why_not(value: Any) -> str | None:
    """Why this is no memory a kernel can be given, or None. In whatever order, its elements leave no gap."""
    if is_tensor(value) and value.device.type != "cpu":
        return f"lies on {value.device}, not in the CPU's memory"
    if not is_tensor(value) and not value.flags.aligned:
        return "is not aligned to its elements"
    if is_tensor(value):
        strides = [(stride, size) for stride, size in zip(value.stride(), value.shape) if size != 1]
    else:
        strides = [(stride // value.itemsize, size) for stride, size in zip(value.strides, value.shape) if size != 1]
    dense = 1
    for stride, size in sorted(strides):
        if size == 0:
            return None
        if stride != dense:
            return f"has gaps or overlaps (shape {tuple(value.shape)}): pass an address, and the whole array in memory="
        dense *= size
    return None
