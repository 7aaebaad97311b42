"""How many threads compute, and on which cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch's operators run in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_to(count: int) -> None:
    """This process, with all that it starts from now on, computes in `count` threads on as many cores.

    Call it before anything computes: threads stay where they were started, and OpenVINO looks at the cores once.
    """
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if count > len(allowed):
            raise ValueError(f"{count} threads need as many processors, and this process may use {len(allowed)}")
        os.sched_setaffinity(0, apart(allowed)[:count])
    torch.set_num_threads(count)


def apart(processors: Sequence[int], topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """The processors, one of each core before the others that share it."""
    first, others, seen = [], [], set[str]()
    for processor in processors:
        try:
            core = (topology / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            core = str(processor)
        (others if core in seen else first).append(processor)
        seen.add(core)
    return first + others
