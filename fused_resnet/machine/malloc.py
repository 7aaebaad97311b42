"""The memory that frozen CPU plans work in: kept by the process from call to call.

oneDNN's fused convolutions allocate their own results through torch, so a plan cannot hand them buffers. What it can
do is see that the C library keeps the pages. By default glibc returns freed blocks of more than 32 MiB to the system
at once, and the top of its heap now and then. Each call then faults the pages in again.

ResNet-50 in fp32 at batch 32 (AMD EPYC with AVX-512, one thread, 2026-11):

| malloc | time an image | page faults a call |
| --- | --- | --- |
| by default | 83.1 ms | 110,000 |
| keeps the memory | 76.0 ms | none |
"""

from __future__ import annotations

import ctypes
import os

from fused_resnet.machine.locks import new_lock

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 2**20  # mallopt takes an int
_lock = new_lock()
_kept = {"largest": 32 * 2**20, "peak": 64 * 2**20}  # glibc's own upper limits


def keep(largest: int, peak: int) -> bool:
    """Let malloc keep blocks of up to `largest` bytes and `peak` bytes of freed memory, for the whole process.

    Never less than an earlier call asked for. Does nothing, and returns False, without glibc, where the environment
    sets malloc's thresholds (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES), and where glibc's own
    limits suffice.
    """
    if not _is_ours_to_set():
        return False
    with _lock:
        wanted = {"largest": min(largest + 2**20, _MOST), "peak": min(2 * peak, _MOST)}
        if all(_kept[name] >= value for name, value in wanted.items()):
            return False
        _kept.update({name: max(_kept[name], value) for name, value in wanted.items()})
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, _kept["largest"]) and mallopt(_M_TRIM_THRESHOLD, _kept["peak"]))


def _is_ours_to_set() -> bool:
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        is_glibc = False
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    is_set = any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return is_glibc and not is_set
