"""Capturing CUDA graphs, one at a time in a process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, Callable

import torch

from fused_resnet.machine.locks import new_lock

_CAPTURING = new_lock()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """One thread at a time, which is what CUDA allows, and without garbage collection: a CUDA graph that is freed while
    another is captured ends that capture (pytorch PR 161037), and torch.cuda.graph no longer collects beforehand."""
    with _CAPTURING:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The callable as one CUDA graph: a replay costs a single launch. It returns what the capture returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # tuning and lazy initialisation must not happen during capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(), torch.cuda.graph(graph):
        out = call()

    def replay(kept: Any = call) -> Any:  # the graph works in memory that `call` owns
        graph.replay()
        return out

    return replay
