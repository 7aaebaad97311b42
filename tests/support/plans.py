"""What the tests of plans share."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backends
from fused_resnet.freezing.modules import FrozenConv, FrozenRegion
from tests.support import networks

X = (2, 3, 16, 16)
full = pytest.mark.full
needs_onednn = pytest.mark.skipif(
    backends.onednn_missing(torch.float32) is not None, reason=str(backends.onednn_missing(torch.float32))
)
needs_bf16 = pytest.mark.skipif(
    backends.onednn_missing(torch.bfloat16) is not None, reason=str(backends.onednn_missing(torch.bfloat16))
)


def convolutions(frozen, x):
    return [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]


def problems_of(frozen, x):
    """All that a plan has lowered, in regions too."""
    modules = list(frozen.plan(x).modules())
    within = [conv.problem for module in modules if isinstance(module, FrozenRegion) for conv in module.convolutions]
    return [module.problem for module in modules if isinstance(module, FrozenConv)] + within


def as_good_as_plain(frozen, model, x):
    """Folding rounds the weights instead of the activations, in another order: `networks.allowed`.

    The plain model computes without oneDNN, which is wrong in bf16 on some processors (`info` says where).
    """
    exact = networks.in_fp64(model, x)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        plain = copy.deepcopy(model).to(frozen.dtype)(x.to(frozen.dtype))
    allowed = networks.allowed(plain, exact, winograd=networks.has_winograd(frozen.plan(x)))
    with torch.no_grad():
        assert networks.error(frozen(x), exact) <= allowed < 0.1


def equal_outputs(actual, expected):
    actual, expected = (value if isinstance(value, tuple) else (value,) for value in (actual, expected))
    for index, (a, b) in enumerate(zip(actual, expected)):
        # fp32 against fp64 through a dozen layers; corrupted memory is wrong by about 1
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=0,
            atol=1e-4 * max(1.0, b.abs().max().item()),
            msg=lambda m, index=index: f"output {index}: {m}",
        )


class Traced(nn.Module):
    """A forward given as a function of (self, x), over a few modules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, other=None):
        return self.function(self, x) if other is None else self.pool(other)


class Each(nn.Module):
    """A list of images in, which torch.fx does not trace."""

    def __init__(self, model):
        super().__init__()
        self.model, self.classifier = model, nn.Linear(10, 4)

    def forward(self, images):
        return torch.cat([self.classifier(self.model(image)) for image in images])


def frozen_equals(model, x, **options):
    equal_outputs(fused_resnet.freeze(model.eval(), x, **options)(x), networks.in_fp64(model, x))
