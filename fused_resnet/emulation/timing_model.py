"""How long a kernel should take on a GPU, from what its blocks execute. A prediction: nothing here was measured.

    time = launch + fill + the longest of what its parts keep busy

Each part runs at its published peak and overlaps perfectly with the others, so a real kernel takes longer.
docs/timing-model.md says what is modelled and what is not.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

from fused_resnet.emulation.interface import Counts

# A guess, the one of kernels/triton/conv/cost.py: what a launch costs besides its work.
LAUNCH_US = 2.0
_SECTOR_BYTES, _WARP = 32, 32
# CUDA C++ programming guide, technical specifications and hardware multithreading: the same from sm_80 to sm_90.
_REGISTERS, _REGISTER_UNIT, _SCHEDULERS = 65536, 256, 4
_RESERVED_SHARED_BYTES, _SHARED_UNIT = 1024, 128
# What a cycle of a multiprocessor gives: a warp instruction a scheduler (guide, 5.2.3), 32 banks of 4 bytes (guide,
# shared memory), results of the special functions, of conversions, of shuffles and of integers (CUDA C++ Best
# Practices Guide 13, table 5).
_ISSUED, _SHARED_BYTES, _SPECIAL, _CONVERTED, _SHUFFLED, _INTEGERS = 4, 128, 16, 16, 32, 64
# From L2 into one multiprocessor. An assumption: no source gives it.
_L2_BYTES_PER_SM = 64


class Gpu(NamedTuple):
    """Rates of one GPU. A multiply-add counts once; `mma` and `wgmma` are of 2-byte elements added up in fp32."""

    name: str
    arch: int
    num_sms: int
    clock_mhz: float
    mma: float  # multiply-adds of a multiprocessor a cycle
    wgmma: Optional[float]
    fp32: int  # results of a multiprocessor a cycle
    memory_gb_per_s: float
    l2_gb_per_s: float
    memory_latency: int  # cycles
    shared_kib: int  # of a multiprocessor
    max_warps: int
    max_blocks: int


# The limits of a multiprocessor: whitepapers. fp32: Best Practices Guide 13, table 5. Latencies, rounded: arXiv
# 2402.13499, table IV (A100 PCIe 466.3, H800 PCIe 478.8); arXiv 2501.12084, table 3 (RTX 4090 571).
GPUS = {
    gpu.name: gpu
    for gpu in (
        # A100 whitepaper: 312 TFLOP/s = 108 x 1.41 GHz x 2 x 1024; L2 5120 bytes a cycle. Data sheet, 80 GB: 2039 GB/s
        Gpu("a100", 80, 108, 1410, 1024, None, 64, 2039, 7219, 470, 164, 64, 32),
        # L40S data sheet: 362 TFLOP/s = 142 x 2.52 GHz x 2 x 506, 864 GB/s. L2 and latency: as the RTX 4090's, an
        # assumption
        Gpu("l40s", 89, 142, 2520, 512, None, 128, 864, 5000, 570, 100, 48, 24),
        # Ada whitepaper: 165.2 TFLOP/s = 128 x 2.52 GHz x 2 x 256, 1008 GB/s. L2: 4.9 TB/s measured with cp.async
        # (smallscientist1/cuda_microbenchmark), rounded
        Gpu("rtx4090", 89, 128, 2520, 256, None, 128, 1008, 5000, 570, 100, 48, 24),
        # H100 whitepaper and data sheet (SXM): 989 TFLOP/s = 132 x 1.83 GHz x 2 x 2048, 3350 GB/s. mma.sync reaches
        # 62.9 % of that on an H800 (arXiv 2501.12084, 6.2). L2: 5.5 TB/s, Chips and Cheese, 2023, of a PCIe card
        Gpu("h100", 90, 132, 1830, 1288, 2048, 128, 3350, 5500, 480, 228, 64, 32),
        # H200 data sheet: 4800 GB/s, the rest as an H100
        Gpu("h200", 90, 132, 1830, 1288, 2048, 128, 4800, 5500, 480, 228, 64, 32),
    )
}


class Shape(NamedTuple):
    """How a kernel is launched, and what its compiler gave it. shared_bytes: static and dynamic, of a block."""

    blocks: int
    threads: int
    registers: int
    shared_bytes: int


class Prediction(NamedTuple):
    """us: all together. bound: the name of the longest of `parts`, which has microseconds by resource.

    resident: blocks that a multiprocessor holds at once. waves: how often it is filled with them.
    """

    us: float
    bound: str
    parts: dict[str, float]
    resident: int
    waves: int


def resident_blocks(gpu: Gpu, shape: Shape) -> int:
    """How many blocks fit on a multiprocessor, as CUDA's occupancy calculator has it; 0 where not even one does."""
    warps = -(-shape.threads // _WARP)
    by_warps = min(gpu.max_warps // warps, gpu.max_blocks)
    registers = _up(max(shape.registers, 1) * _WARP, _REGISTER_UNIT)
    warps_with_registers = _REGISTERS // registers // _SCHEDULERS * _SCHEDULERS
    shared = _up(shape.shared_bytes + _RESERVED_SHARED_BYTES, _SHARED_UNIT)
    return min(by_warps, warps_with_registers // warps, gpu.shared_kib * 1024 // shared)


def predict(
    gpu: Gpu,
    counts: Counts,
    sampled: int,
    shape: Shape,
    *,
    element_bytes: int = 2,
    memory_bytes: Optional[float] = None,
) -> Prediction:
    """The time of a launch of which `sampled` blocks were counted; the others are taken to be like them.

    element_bytes: of what the tensor cores multiply. memory_bytes: what must come from memory and go there. By default
    the distinct sectors, which are all only if every block was counted.
    """
    resident = resident_blocks(gpu, shape)
    if resident == 0:
        raise ValueError(f"timing model: a block of {shape} does not fit on an {gpu.name}'s multiprocessor")
    each = Counts._make(count / sampled for count in counts)
    on_busiest = -(-shape.blocks // gpu.num_sms)
    waves = -(-on_busiest // resident)
    cycles = {name: on_busiest * cost for name, cost in _cycles(gpu, each, element_bytes).items()}
    cycles["latency"] = _latency(gpu, each, shape, on_busiest, min(resident, on_busiest))
    parts = {name: cost / gpu.clock_mhz for name, cost in cycles.items()}
    if memory_bytes is None:
        memory_bytes = (counts.distinct_load_sectors + counts.distinct_store_sectors) * _SECTOR_BYTES
    parts["memory"] = memory_bytes / gpu.memory_gb_per_s / 1e3
    parts["L2"] = max(_l2_bytes(each) * shape.blocks / gpu.l2_gb_per_s / 1e3, parts.pop("L2 of one SM"))
    bound = max(parts, key=parts.__getitem__)
    fill = gpu.memory_latency / gpu.clock_mhz * (waves if resident == 1 else 1)
    return Prediction(LAUNCH_US + fill + parts[bound], bound, parts, resident, waves)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _l2_bytes(each: Counts) -> float:
    return (each.global_load_sectors + each.global_store_sectors) * _SECTOR_BYTES


def _cycles(gpu: Gpu, each: Counts, element_bytes: int) -> dict[str, float]:
    """Cycles for which a block keeps each part of a multiprocessor busy."""
    lanes = {
        "fp32": (each.floating + each.half) / gpu.fp32,
        "integer": (each.integer + each.compare) / _INTEGERS,
        "special": each.special / _SPECIAL + each.conversion / _CONVERTED,
        "shuffle": each.exchange / _SHUFFLED,
    }
    return {
        **{name: _WARP * share for name, share in lanes.items()},
        "issue": each.warp_instructions / _ISSUED,
        "tensor": each.tensor_multiply_adds / _tensor_rate(gpu, each, element_bytes),
        "shared": each.shared_load_wavefronts
        + each.shared_store_wavefronts
        + (each.bulk_bytes + wgmma_bytes(each, element_bytes)) / _SHARED_BYTES,
        "L2 of one SM": _l2_bytes(each) / _L2_BYTES_PER_SM,
    }


def _tensor_rate(gpu: Gpu, each: Counts, element_bytes: int) -> float:
    rate = gpu.wgmma if each.wgmma and gpu.wgmma else gpu.mma
    return rate * 2 / element_bytes


def wgmma_bytes(counts: Counts, element_bytes: int) -> float:
    """What wgmma reads of shared memory: per warpgroup and instruction A (64 rows of 32 bytes) and B (n of them).

    Both once, as if the four tensor cores shared B: with n = 64 that takes as long as the products do at their peak.
    """
    if not counts.wgmma:
        return 0.0
    row = 32  # bytes: k elements, whatever their type
    return counts.wgmma / 4 * 64 * row + counts.tensor_multiply_adds / (64 * row / element_bytes) * row


def _latency(gpu: Gpu, each: Counts, shape: Shape, blocks: int, resident: int) -> float:
    """Little's law: what is on its way fits into the shared memory of the resident blocks.

    For kernels with asynchronous copies only: nothing says how many loads into registers are under way at once.
    """
    if not (each.cp_async or each.bulk_copies) or not shape.shared_bytes:
        return 0.0
    rounds = math.ceil(each.global_load_sectors * _SECTOR_BYTES / shape.shared_bytes)
    return gpu.memory_latency * rounds * blocks / resident
