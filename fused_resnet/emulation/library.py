"""fused_resnet/_ptx.so, loaded at first use, and the structures of csrc/ptx/interface.h."""

from __future__ import annotations

import ctypes
import functools
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from fused_resnet.emulation.counts import Counts

PATH = Path(__file__).parent.parent / "_ptx.so"


class PtxOperand(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("index", c_int32), ("value", c_int64)]


class PtxRegion(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("size", c_uint64), ("writable", c_int32), ("name", c_char_p)]


class PtxTensorMap(ctypes.Structure):
    _fields_ = [
        ("magic", c_uint64), ("address", c_uint64), ("sizes", c_uint64 * 5), ("strides", c_uint64 * 4),
        ("lower", c_int16 * 3), ("upper", c_int16 * 3), ("box", c_uint16 * 5), ("pixels", c_uint16),
        ("channels", c_uint16), ("element_strides", c_uint8 * 5), ("rank", c_uint8), ("element_type", c_uint8),
        ("swizzle", c_uint8), ("is_im2col", c_uint8), ("nan_fill", c_uint8),
    ]  # fmt: skip


class PtxLaunch(ctypes.Structure):
    _fields_ = [
        ("program", c_void_p), ("grid", c_uint32 * 3), ("block", c_uint32 * 3), ("cluster", c_uint32 * 3),
        ("shared_bytes", c_uint32), ("registers", c_uint32), ("parameters", POINTER(c_uint8)),
        ("parameter_bytes", c_uint32), ("blocks", POINTER(c_uint32)), ("num_blocks", c_int32),
    ]  # fmt: skip


class PtxOptions(ctypes.Structure):
    _fields_ = [
        ("landing", c_int32), ("schedule", c_int32), ("seed", c_uint64), ("max_steps", c_uint64),
        ("races", c_int32), ("rounding", c_int32), ("overlap", c_int32),
    ]  # fmt: skip


class PtxCounts(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in Counts._fields]


class PtxOutcome(ctypes.Structure):
    _fields_ = [("counts", PtxCounts), ("seconds", c_double), ("num_reports", c_int32), ("faulted", c_int32)]


# The order of ptx::Type in csrc/ptx/values.h, as far as tensor maps need it.
TYPE_NAMES = (
    "pred b8 u8 s8 e4m3 e5m2 b16 u16 s16 f16 bf16 e4m3x2 e5m2x2 b32 u32 s32 f32 tf32 f16x2 bf16x2 b64 u64 s64 f64 b128"
).split()


def why_missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if PATH.exists():
        return None
    return (
        f"the PTX emulator is not built: {PATH} does not exist. "
        "Install from a checkout with a C++17 compiler: pip install --no-build-isolation -e ."
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Raises ImportError, which says what to do, where the library was not built or is another version's."""
    if reason := why_missing():
        raise ImportError(reason)
    try:
        lib = ctypes.CDLL(str(PATH))
        return _declared(lib)
    except (OSError, AttributeError) as error:
        raise ImportError(f"the PTX emulator cannot be loaded: {error}. Build {PATH} again.") from error


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.ptx_program.argtypes, lib.ptx_program.restype = [c_int32, c_int32, c_int32], c_void_p
    lib.ptx_free.argtypes, lib.ptx_free.restype = [c_void_p], None
    lib.ptx_add.argtypes = [
        c_void_p, c_char_p, c_int32, c_int32, POINTER(PtxOperand), POINTER(c_int32), c_int32,
        c_int32, c_char_p, c_int32,
    ]  # fmt: skip
    lib.ptx_add.restype = c_char_p
    lib.ptx_launch.argtypes = [
        POINTER(PtxLaunch), c_int32, POINTER(PtxRegion), c_int32, POINTER(PtxOptions), POINTER(PtxOutcome),
        c_char_p, c_int32,
    ]  # fmt: skip
    lib.ptx_launch.restype = c_int32
    return lib
