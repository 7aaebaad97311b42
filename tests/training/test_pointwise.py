"""1x1 convolutions as matrix products: the convolution's outputs and gradients, their layouts, and where they are."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import training
from fused_resnet.nn import Bottleneck, PreActBottleneck
from fused_resnet.testing.networks import error
from fused_resnet.training import pointwise
from tests.support import networks
from tests.support.fused import kernels_for_small_maps


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    """As on a processor with AMX: a product is right on any."""
    monkeypatch.setattr(pointwise.onednn, "has_amx", lambda: True)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the maps whose convolution was a product."""
    found, stock = [], pointwise.convolution
    monkeypatch.setattr(pointwise, "convolution", lambda x, weight: found.append(x.shape) or stock(x, weight))
    return found


def image(shape=(3, 24, 5, 7), dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def step(conv, call, x, autocast):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call(x)
    y.backward(torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype))
    return y.detach(), x.grad, conv.weight.grad


@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("channels", ((24, 40), (1024, 16), (3, 65)), ids=str)
def test_outputs_and_gradients(channels, autocast, layout, products):
    conv = nn.Conv2d(*channels, 1, bias=False).to(memory_format=layout)
    conv = conv if autocast else conv.bfloat16()
    x = image((3, channels[0], 5, 7))
    exact = step(double := copy.deepcopy(conv).double(), double, x.double(), False)
    expected, actual = step(conv, conv, x, autocast), step(conv, lambda x: training.convolution(conv, x), x, autocast)
    assert len(products) == 1
    for one, other, right in zip(actual, expected, exact):
        assert one.dtype == other.dtype and one.stride() == other.stride() and one.shape == other.shape
        assert error(one, right) <= max(1.5 * error(other, right), 2**-8)


def pointwise_conv(**options):
    return nn.Conv2d(24, 8, options.pop("size", 1), **{"bias": False} | options)


KEPT = {
    "a stride": (pointwise_conv(stride=2), image()), "a window": (pointwise_conv(size=3), image()),
    "padding": (pointwise_conv(padding=1), image()), "a bias": (pointwise_conv(bias=True), image()),
    "groups": (pointwise_conv(groups=2), image()), "one channel": (nn.Conv2d(24, 1, 1, bias=False), image()),
    "one pixel": (pointwise_conv(), image((3, 24, 1, 1))), "fp32": (pointwise_conv(), image(dtype=torch.float32)),
    "NCHW": (pointwise_conv(), image().contiguous()), "no image": (pointwise_conv(), image((0, 24, 5, 7))),
    "a part": (pointwise_conv(), image((3, 24, 5, 14))[..., ::2]),
}  # fmt: skip


@pytest.mark.parametrize("conv, x", KEPT.values(), ids=KEPT)
def test_what_is_left_to_torch(conv, x, products):
    conv = conv.to(x.dtype)
    assert torch.equal(training.convolution(conv, x), conv(x)) and not products
    conv = nn.Conv2d(24, 8, 1, bias=False).bfloat16()
    with torch.no_grad():
        training.convolution(conv, image())
    with pytest.raises(RuntimeError):
        training.convolution(conv, image((3, 25, 5, 7)))
    assert not products
    training.convolution(conv, image())
    assert products


@pytest.mark.parametrize("recomputes", (False, True))
def test_a_block_and_two_runs(recomputes, products, monkeypatch):
    """Keeping inputs or not makes no difference, and two runs are equal to the last bit."""
    kernels_for_small_maps(monkeypatch)
    model = fused_resnet.fuse(networks.single(Bottleneck, stride=1).train().bfloat16())
    x = image((4, 16, 9, 7))
    found = []
    for once_more in (recomputes, False, recomputes):
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        model.zero_grad()
        with fused_resnet.recompute_inputs(once_more):
            model(own).square().sum().backward()
        found.append([own.grad, *(p.grad.clone() for p in model.parameters())])
    assert len(products) == 9
    for one, other, again in zip(*found):
        assert torch.equal(one, other) and torch.equal(one, again)


def test_gradients_of_gradients(products):
    conv, x = nn.Conv2d(24, 8, 1, bias=False).bfloat16(), image().requires_grad_()
    for call in (conv, lambda x: training.convolution(conv, x)):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), conv.weight)
        products.append(second)
    stock, _, ours = products
    torch.testing.assert_close(ours, stock, rtol=0.05, atol=0.02 * stock.abs().max().item())


def test_what_recomputes_may_be_written_in_place():
    """PreActBottleneck adds its shortcut in place to what a product gave."""
    blocks = nn.Sequential(PreActBottleneck(64, 16), PreActBottleneck(64, 16)).to(torch.bfloat16)
    model = fused_resnet.fuse(blocks.to(memory_format=torch.channels_last).train())
    x = torch.randn(32, 64, 56, 56, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with fused_resnet.recompute_inputs(enabled):
            model(x).float().square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for kept, again in zip(*found):
        torch.testing.assert_close(again, kept, rtol=0.05, atol=0.05 * kept.abs().max().item())
