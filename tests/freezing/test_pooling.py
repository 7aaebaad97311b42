"""freeze on GPUs: max-pooling without indices, and with the bias and activation of the convolution before it.

In Triton's interpreter on a CPU, where plans else have a kernel of their own for it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.backends import record
from fused_resnet.freezing import pooling
from fused_resnet.freezing.modules import FrozenMaxPool
from fused_resnet.kernels.triton import max_pool, runtime
from tests.support import networks
from tests.support.plans import convolutions, frozen_equals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MISSING = runtime.why_not(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"Triton kernels: {_MISSING}")
X = (2, 3, 17, 14)


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(pooling, "_BY_TRITON", ("cpu", "cuda"))


def frozen_pools(model, backend="eager", **options):
    """[(whether the bias moved, the activation that did)] of the poolings without indices; the plan is right."""
    model, x = model.eval().to(DEVICE), torch.randn(X, device=DEVICE)
    frozen = fused_resnet.freeze(model, x, backend=backend, **options)
    exact, plan = networks.in_fp64(model, x), frozen.plan(x)
    assert networks.error(frozen(x), exact) < (1e-6 if not options and DEVICE == "cpu" else 2e-2)
    pools = [module for module in plan.modules() if isinstance(module, FrozenMaxPool)]
    pools = [pool for pool in pools if pool.kernel is max_pool.launch]
    assert all(pool.problem.has_bias is (pool.bias is not None) for pool in pools)
    return [(pool.problem.has_bias, pool.problem.activation) for pool in pools]


def stem(activation=None, pool=None, bias=False, norm=True):
    conv, act = nn.Conv2d(3, 8, 3, 2, 1, bias=bias), nn.ReLU() if activation is None else activation
    pool = nn.MaxPool2d(3, 2, 1) if pool is None else pool
    layers = [conv, *([nn.BatchNorm2d(8)] if norm else []), act, pool, nn.Conv2d(8, 4, 1)]
    return networks.randomize(nn.Sequential(*layers))


@pytest.mark.parametrize("model, expected, left", (
    (stem(), [(True, "relu")], "none"),
    (stem(nn.ReLU6()), [(True, "relu6")], "none"),
    (stem(nn.Identity()), [(True, "none")], "none"),
    (stem(norm=False, bias=True), [(True, "relu")], "none"),
    (stem(norm=False), [(False, "relu")], "none"),
    (stem(pool=nn.MaxPool2d((2, 3), (1, 2), (0, 1))), [(True, "relu")], "none"),
    (stem(nn.SiLU()), [(False, "none")], "silu"),  # not monotone
    (stem(pool=nn.MaxPool2d(3, 2, 1, ceil_mode=True)), [], "relu"),
    (stem(pool=nn.MaxPool2d(2, 1, dilation=2)), [], "relu"),
    (stem(pool=nn.AvgPool2d(2)), [], "relu"),
), ids=range(10))  # fmt: skip
def test_which_stems_pool_first(model, expected, left):
    """left: the activation that stays with the convolution."""
    assert frozen_pools(model) == expected
    x = torch.randn(X, device=DEVICE)
    first, last = convolutions(fused_resnet.freeze(model, x, backend="eager"), x)
    assert (first.problem.activation, last.problem.activation) == (left, "none")
    assert (first.bias is not None) is first.problem.has_bias is (left != "none")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_in_16_bits(dtype):
    assert frozen_pools(stem(), dtype=dtype) == [(True, "relu")]


def test_a_kernel_that_has_bias_and_activation_keeps_them():
    assert frozen_pools(stem(), backend="triton") == [(False, "none")]


def test_a_resnet():
    model, x = models.create("resnet18").eval().to(DEVICE), torch.randn(1, 3, 32, 32, device=DEVICE)
    first, *rest = convolutions(fused_resnet.freeze(model, x, backend="eager"), x)
    assert (first.bias, first.problem.has_bias, first.problem.activation) == (None, False, "none")
    assert str(first.problem).endswith("plain none") and all("bias" in str(conv.problem) for conv in rest[:2])


class Stem(nn.Module):
    def __init__(self, change="nothing"):
        super().__init__()
        self.change = change
        self.conv, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, 1, return_indices=change == "indices")

    def forward(self, x):
        y = self.conv(x)
        if self.change == "a sum":
            y = y + self.other(x)
        y = y.relu()
        if self.change == "a function":
            return F.max_pool2d(y, 3, 2, 1)
        if self.change == "an operation between":
            y = y * 2
        pooled = self.pool(y)
        if self.change == "two poolings":
            return pooled, self.pool(-y)
        if self.change == "indices":
            return pooled[0]
        return (pooled, y) if self.change == "returned too" else pooled


@pytest.mark.parametrize("change, expected", (
    ("nothing", [(True, "relu")]), ("a function", [(True, "relu")]),
    ("a sum", [(False, "none")]), ("an operation between", []),
))  # fmt: skip
def test_what_lies_between(change, expected):
    assert frozen_pools(Stem(change)) == expected


@pytest.mark.parametrize("change", ("two poolings", "returned too", "indices"))
def test_what_is_read_besides_is_left_alone(change):
    model, x = Stem(change).eval().to(DEVICE), torch.randn(X, device=DEVICE)
    frozen = fused_resnet.freeze(model, x, backend="eager")
    frozen_equals(model, x, backend="eager")
    assert [conv.problem.activation for conv in convolutions(frozen, x)] == ["relu"]
    pools = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenMaxPool)]
    assert not any(pool.kernel is max_pool.launch for pool in pools)


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_a_bias_that_is_not_finite_stays(value):
    """max(-inf + inf, 1 + inf) is NaN, max(-inf, 1) + inf is not."""
    model, x = stem(norm=False, bias=True).eval().to(DEVICE), torch.randn(X, device=DEVICE)
    nn.init.constant_(model[0].bias, value)
    first, _ = convolutions(fused_resnet.freeze(model, x, backend="eager"), x)
    assert first.bias is not None and first.problem.activation == "relu"


def test_what_the_kernel_cannot_do_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(max_pool, "why_not", lambda problem: "no")
    assert frozen_pools(stem()) == []
    assert frozen_pools(stem(), backend="triton") == []


def test_a_backend_that_needs_the_activation_keeps_it(monkeypatch):
    eager = record.REGISTRY["conv_bn_act"]["eager"]
    picky = eager._replace(why_not=lambda problem: "no" if problem.activation == "none" and problem.C == 3 else None)
    monkeypatch.setitem(record.REGISTRY["conv_bn_act"], "eager", picky)
    assert frozen_pools(stem()) == [(False, "none")]
