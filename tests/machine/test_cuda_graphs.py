"""Capturing CUDA graphs."""

import gc
import threading

import pytest
import torch

from fused_resnet.machine import cuda_graphs
from tests.support.cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def is_free() -> bool:
    """Whether another thread may capture."""
    found = []

    def ask():
        found.append(cuda_graphs._CAPTURING.acquire(blocking=False))
        if found[0]:
            cuda_graphs._CAPTURING.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


def test_nothing_is_collected_while_a_graph_is_captured(cuda):
    """A CUDA graph that is freed meanwhile would end the capture, and so would another thread's capture."""
    seen = []

    def call():
        seen.append((gc.isenabled(), is_free()))
        if len(seen) == 8:
            raise RuntimeError("it cannot be captured")

    cuda_graphs.captured(call)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        cuda_graphs.captured(call)
    assert seen == [*[(True, False)] * 3, (False, False)] * 2  # three calls to warm up
    assert gc.isenabled() and is_free()


@pytest.mark.parametrize("fails", (False, True))
def test_a_graph_has_workspaces_of_its_own(cuda, fails):
    """Those of the warm-up are dropped before the capture, so that it makes some. They are dropped after it, too."""

    def call():
        cuda.calls.append("call")
        if fails and cuda.calls.count("call") == 4:
            raise RuntimeError("it cannot be captured")

    if fails:
        with pytest.raises(RuntimeError, match="cannot be captured"):
            cuda_graphs.capture(call)
    else:
        cuda_graphs.capture(call)
    stream = "stream 0"
    assert cuda.calls == [
        f"new {stream}", f"{stream} waits for current stream", "call", "call", "call",
        f"current stream waits for {stream}", "workspaces cleared",
        f"capture begins on {stream}", "call", "capture ends", "workspaces cleared",
    ]  # fmt: skip
    assert cuda.options["capture_error_mode"] == "thread_local" and cuda.options["pool"] is None


@pytest.mark.parametrize("before", (False, True))
def test_cudnn_takes_the_fastest_inside_and_what_it_took_outside(cuda, before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen = []

    def call():
        seen.append(torch.backends.cudnn.benchmark)
        if len(seen) == 4:
            raise RuntimeError("it cannot be captured")

    with pytest.raises(RuntimeError, match="cannot be captured"):
        cuda_graphs.capture(call)
    assert seen == [True] * 4 and torch.backends.cudnn.benchmark is before
    with cuda_graphs.best_algorithms(), cuda_graphs.capturing():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is before


def test_whether_a_graph_is_being_captured_is_asked_of_cuda_alone(cuda):
    """torch.cuda's own question raises in builds without CUDA."""
    for cuda.is_capturing in (False, True):
        assert cuda_graphs.is_captured(torch.device("cuda", 0)) is cuda.is_capturing
        assert not cuda_graphs.is_captured(torch.device("cpu"))
