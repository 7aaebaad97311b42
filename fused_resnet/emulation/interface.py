"""The C interface of fused_resnet/_ptx.so as Python calls it: csrc/ptx/interface.h and conv_launch.h, and a digest.

setup.py reads this file by its path, so it imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import hashlib
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, NamedTuple

# ---------------------------------------------------------------------------------------- names, by their place in here

# ptx::OperandKind in csrc/ptx/program.h
OPERAND_KINDS = ("none", "register", "predicate", "immediate", "special", "sink", "label", "memory")
NONE, REGISTER, PREDICATE, IMMEDIATE, SPECIAL, SINK, LABEL, MEMORY = range(len(OPERAND_KINDS))
# ptx::SpecialRegister, there too
SPECIAL_REGISTERS = (
    "tid.x tid.y tid.z ntid.x ntid.y ntid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z laneid warpid "
    "lanemask_lt lanemask_le lanemask_gt lanemask_ge lanemask_eq clock smid "
    "cluster_ctaid.x cluster_ctaid.y cluster_ctaid.z cluster_nctaid.x cluster_nctaid.y cluster_nctaid.z "
    "cluster_ctarank cluster_nctarank clusterid.x clusterid.y clusterid.z nclusterid.x nclusterid.y nclusterid.z "
    "dynamic_smem_size total_smem_size nwarpid zero"
).split()
# ptx::Type in csrc/ptx/values.h, as far as tensor maps need it
TYPE_NAMES = (
    "pred b8 u8 s8 e4m3 e5m2 b16 u16 s16 f16 bf16 e4m3x2 e5m2x2 b32 u32 s32 f32 tf32 f16x2 bf16x2 b64 u64 s64 f64 b128"
).split()
# PtxOptions
LANDINGS = ("late", "early", "random")
SCHEDULES = ("random", "in_turn", "greedy", "backwards")

SHARED_BASE = 1024  # where shared memory begins, csrc/ptx/machine/memories.h


class Counts(NamedTuple):
    """What a run executed: sums over all blocks that ran, as PtxCounts. An instruction counts once a warp.

    Sectors have 32 bytes. A wavefront is one pass of at most 128 bytes through shared memory's 32
    banks. The ideal is how many there would be without bank conflicts.
    """

    warp_instructions: int = 0
    thread_instructions: int = 0
    integer: int = 0
    floating: int = 0
    half: int = 0
    conversion: int = 0
    special: int = 0
    move: int = 0
    compare: int = 0
    control: int = 0
    exchange: int = 0
    global_loads: int = 0
    global_stores: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    local_accesses: int = 0
    parameter_loads: int = 0
    atomics: int = 0
    matrix_loads: int = 0
    matrix_stores: int = 0
    cp_async: int = 0
    bulk_copies: int = 0
    mma: int = 0
    wgmma: int = 0
    tensor_multiply_adds: int = 0
    barriers: int = 0
    mbarrier_operations: int = 0
    fences: int = 0
    waits: int = 0
    global_load_sectors: int = 0
    global_store_sectors: int = 0
    distinct_load_sectors: int = 0
    distinct_store_sectors: int = 0
    shared_load_wavefronts: int = 0
    shared_load_ideal: int = 0
    shared_store_wavefronts: int = 0
    shared_store_ideal: int = 0
    bulk_bytes: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(self, other)))


# ----------------------------------------------------------------------------------------------------------- structures


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


class PtxConv(ctypes.Structure):
    _fields_ = [
        ("sizes", c_int64 * 14), ("x", c_void_p), ("weight", c_void_p), ("residual", c_void_p), ("out", c_void_p),
        ("vectors", c_void_p * 5), ("vector_dtypes", c_int32 * 5), ("element_bytes", c_int32), ("eps", c_float),
        ("activation", c_int32), ("tile", c_int32), ("splits", c_int32), ("partials", c_void_p),
        ("capability", c_int32), ("smem_per_block", c_int32), ("num_sms", c_int32), ("residual_scale", c_float),
        ("low", c_float), ("high", c_float), ("residual_sign", c_uint32),
    ]  # fmt: skip


class PtxConvLaunch(ctypes.Structure):
    _fields_ = [
        ("blocks", c_int64), ("sum_blocks", c_int64), ("threads", c_int32), ("sum_threads", c_int32),
        ("shared_bytes", c_int32), ("cluster", c_int32), ("copy_bytes", c_int32), ("width", c_int32),
        ("argument_bytes", c_int32), ("arguments", c_uint8 * 512), ("num_maps", c_int32), ("maps", PtxTensorMap * 4),
    ]  # fmt: skip


class PtxTile(ctypes.Structure):
    _fields_ = [
        (name, c_int32) for name in ("block_m", "block_n", "stages", "cluster", "threads", "shared_bytes")
    ]  # fmt: skip


STRUCTURES = (
    PtxOperand, PtxRegion, PtxTensorMap, PtxLaunch, PtxOptions, PtxCounts, PtxOutcome, PtxConv, PtxConvLaunch, PtxTile,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ functions

# name: result, arguments
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ptx_program": (c_void_p, c_int32, c_int32, c_int32),
    "ptx_free": (None, c_void_p),
    "ptx_add": (
        c_char_p, c_void_p, c_char_p, c_int32, c_int32, POINTER(PtxOperand), POINTER(c_int32), c_int32, c_int32,
        c_char_p, c_int32,
    ),
    "ptx_launch": (
        c_int32, POINTER(PtxLaunch), c_int32, POINTER(PtxRegion), c_int32, POINTER(PtxOptions), POINTER(PtxOutcome),
        c_char_p, c_int32,
    ),
    "ptx_conv_launch": (c_char_p, POINTER(PtxConv), POINTER(PtxConvLaunch)),
    "ptx_tile": (c_int32, c_int32, c_int32, POINTER(PtxTile)),
}  # fmt: skip


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def digest() -> str:
    """Identifies all of the above: a library is compiled with it, and only one that has the same is called."""
    names = [OPERAND_KINDS, SPECIAL_REGISTERS, TYPE_NAMES, LANDINGS, SCHEDULES, SHARED_BASE]
    structures = [(each.__name__, [(field[0], field[1].__name__) for field in each._fields_]) for each in STRUCTURES]
    functions = [(name, [kind and kind.__name__ for kind in kinds]) for name, kinds in FUNCTIONS.items()]
    return hashlib.sha256(repr([names, structures, functions]).encode()).hexdigest()[:16]
