"""What a run executed."""

from __future__ import annotations

from typing import NamedTuple


class Counts(NamedTuple):
    """Sums over all blocks that ran, as PtxCounts in csrc/ptx/interface.h. An instruction counts once a warp.

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
