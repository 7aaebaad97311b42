"""What the tests of fused models share: small modules, pairs of models, and comparisons."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.fusing import convert
from fused_resnet.nn import Bottleneck, FusedBlock
from tests.support import networks

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, ten layers, two orders of summation


class Rewritable(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def fused_blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def as_good_as_plain(model, plain, x):
    """Fused and plain round differently, so each is held against fp64. Sums in another order are up to 2.2 times worse
    or better (seen); a mistake is a thousand times worse."""
    exact = networks.in_fp64(plain, x)
    with torch.no_grad():
        allowed = networks.allowed(plain(x), exact)
        assert networks.error(model(x), exact) <= allowed < 1e-4


def pair(block=Bottleneck):
    """A plain model, the same one fused, and an input."""
    plain = networks.small(block)
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    assert len(convert.fused_convs(fused)) >= 11  # else the tests would compare a model with itself
    return plain, fused, torch.randn(2, 3, 20, 20)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def fused_calls(graph):
    return [node.target._opname for node in graph.nodes if getattr(node.target, "namespace", "") == "fused_resnet"]


def kernels_for_small_maps(monkeypatch):
    """bn_act's kernels also of maps that are too small to gain. Skips where there are none."""
    from fused_resnet.backends import bn_act
    from fused_resnet.kernels import compiled

    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    monkeypatch.setattr(bn_act, "_LEAST_VALUES", 1)
    monkeypatch.setattr(bn_act, "_LEAST_PLANE", 1)
