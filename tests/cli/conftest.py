"""For every test of the command line: its threads end with it, and no roofline is measured."""

import pytest
import torch

from fused_resnet.measuring import rooflines


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
    monkeypatch.setattr(rooflines, "roofline", lambda device, dtype: rooflines.Roofline(1e10, 1e11))
