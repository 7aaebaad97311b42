"""How many threads compute, and on which cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

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
            raise ValueError(f"{count} threads need as many cores, and this process may use {len(allowed)}")
        os.sched_setaffinity(0, allowed[:count])
    torch.set_num_threads(count)
