"""The memory that frozen CPU plans work in: kept by the process from call to call, and in large pages.

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

import contextlib
import ctypes
import mmap
import os
import weakref
from typing import Optional

import torch
from torch import Tensor

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


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def _is_ours_to_set() -> bool:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    is_set = any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return _is_glibc() and not is_set


def trim() -> None:
    """Have malloc give what is free back to the system, as after much that was needed for a while. Only on glibc."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


class LargePages:
    """Memory in large pages, where Linux has them, for what a plan reads at every call: pieces of it, side by side.

    In pages of 4 KB the weights of ResNet-50 have more of them than a processor keeps translations of: in bf16 a call
    took a tenth longer (Xeon with AMX, one thread, 2026-11). What is not written yet takes no memory, nor what a piece
    has left that is not needed any more.
    """

    _PAGE, _LINE, _WORTH = 2**21, 64, 2**20

    def __init__(self, nbytes: int) -> None:
        """nbytes: for how much there is room before another piece of memory is asked for, as large again."""
        self._size, self._used, self._end = nbytes, 0, 0
        self._chunk: Optional[mmap.mmap] = None

    def empty(self, nbytes: int) -> Tensor:
        """A vector of bytes that begins at a multiple of 64."""
        if max(nbytes, self._size) < self._WORTH:  # a page for each of many small regions would be most of their memory
            return torch.empty(nbytes, dtype=torch.uint8)
        if self._chunk is None or self._used + nbytes > self._end:
            self._begin_chunk(max(nbytes, self._size))
        assert self._chunk is not None
        begin, self._used = self._used, self._used + self.room(nbytes)
        piece = memoryview(self._chunk)[begin : begin + nbytes]
        weakref.finalize(piece, _give_back, self._chunk, begin, begin + nbytes).atexit = False
        return torch.frombuffer(piece, dtype=torch.uint8)

    def copied(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    @classmethod
    def room(cls, nbytes: int) -> int:
        """What a piece of so many bytes takes."""
        return -(-nbytes // cls._LINE) * cls._LINE

    def _begin_chunk(self, nbytes: int) -> None:
        pages = mmap.mmap(-1, nbytes + self._PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # elsewhere than on Linux; a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        begin = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % self._PAGE
        self._chunk, self._used, self._end = pages, begin, begin + nbytes


def _give_back(pages: mmap.mmap, begin: int, end: int) -> None:
    """The pages that no other piece has a part of."""
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            pages.madvise(mmap.MADV_DONTNEED, first, last - first)
