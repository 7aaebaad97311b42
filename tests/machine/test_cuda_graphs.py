"""Capturing CUDA graphs."""

import gc
from unittest import mock

import pytest
import torch

from fused_resnet.machine import cuda_graphs


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch):
    """A CUDA graph that is freed meanwhile would end the capture, and so would another thread's capture."""
    seen = []

    def call():
        seen.append((gc.isenabled(), cuda_graphs._CAPTURING.locked()))
        if len(seen) == 8:
            raise RuntimeError("it cannot be captured")

    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        fake = mock.MagicMock()
        fake.return_value.__exit__.return_value = False
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda_graphs.captured(call)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        cuda_graphs.captured(call)
    assert seen == [*[(True, False)] * 3, (False, True)] * 2  # three calls to warm up
    assert gc.isenabled() and not cuda_graphs._CAPTURING.locked()
