"""Capturing CUDA graphs, one at a time in a process, with the algorithms and the workspaces that replays want."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, Callable

import torch

from fused_resnet.machine.locks import new_rlock

_CAPTURING = new_rlock()


@contextlib.contextmanager
def best_algorithms() -> Iterator[None]:
    """Inside, cuDNN times its algorithms when a convolution is new, and takes the fastest instead of the likeliest.

    The flag is the process's, so other threads that meet a new convolution meanwhile time theirs too. Threads that
    might put it back in another order than they set it hold `capturing`.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """One thread at a time, which is what CUDA allows, and with the best algorithms.

    What is run first in here belongs to it: cuDNN keeps the algorithm that a thread's first call of a convolution took,
    timed or not. And where it times, torch frees cached memory, which must not happen while another thread captures.
    """
    with _CAPTURING, best_algorithms():
        yield


def capture(call: Callable[[], Any], stream: Any = None, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(the callable as a CUDA graph, what it returned in the capture: the memory that replays write).

    stream, pool: on which it is captured, and where its memory lies; by default a graph has memory of its own.
    """
    with capturing():
        stream = stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # tuning, compilation and lazy initialisation must not happen during capture
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _without_collection(), _own_workspaces():
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                out = call()
    return graph, out


def is_captured(device: torch.device) -> bool:
    """Whether what this thread launches on a device goes into a graph that somebody is capturing."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The callable as one CUDA graph: a replay costs a single launch. It returns what the capture returned."""
    graph, out = capture(call)

    def replay(kept: Any = call) -> Any:  # the graph works in memory that `call` owns
        graph.replay()
        return out

    return replay


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """A CUDA graph that is freed while another is captured ends that capture (pytorch PR 161037), and torch.cuda.graph
    no longer collects garbage beforehand."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS's workspaces of a graph that is captured inside lie in the graph's own memory, and nobody else has them.

    torch keeps a workspace for each (handle, stream), and its streams come from a pool of 32. Two graphs whose streams
    are the same would work in the same workspace, also when they are replayed at once. Those of the calls before are
    dropped, so that the capture makes its own. They are dropped afterwards too, before the stream comes up again.
    torch.compile captures its graphs so, too (cudagraph_trees.py of Inductor).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
