"""freeze: the same answers in every dtype, of every network."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import models, testing
from fused_resnet.kernels.triton import runtime
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from tests.support import networks
from tests.support.plans import X, as_good_as_plain, convolutions, full, needs_bf16, needs_onednn, problems_of


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)), ids=str)
@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
@pytest.mark.parametrize("shape", (X, (1, 3, 17, 13), (3, 3, 4, 4)), ids=str)
def test_values(block, dtype, shape):
    """Down to maps of one pixel (4x4 inputs), whose strides are ambiguous."""
    model = networks.small(block)
    x = torch.randn(shape)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    as_good_as_plain(frozen, model, x)
    assert frozen(x).dtype == x.dtype and frozen.dtype == dtype


def test_fp16_and_fp64():
    model, x = networks.small(), torch.randn(X)
    as_good_as_plain(fused_resnet.freeze(model, x, dtype=torch.float16), model, x)
    # rounded once, at the output
    assert networks.error(fused_resnet.freeze(model, x, dtype=torch.float64)(x), networks.in_fp64(model, x)) < 2**-24


@needs_onednn
@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)), ids=str)
@pytest.mark.parametrize(
    "create",
    (lambda: models.resnet18(num_classes=10), lambda: models.cifar.resnet20(option="A"),
     lambda: models.cifar.resnet20(option="B"), pytest.param(lambda: models.resnet50(num_classes=10), marks=full),
     pytest.param(lambda: models.resnext50_32x4d(num_classes=10), marks=full)),
    ids=("resnet18", "resnet20-A", "resnet20-B", "resnet50", "resnext50"),
)  # fmt: skip
def test_models(create, dtype):
    """Every convolution is one call with everything up to its ReLU; images so small that maps end at 1x1."""
    model, x = networks.randomize(create()), torch.randn(2, 3, 33, 32)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    fused = [conv.backend.name for conv in convolutions(frozen, x)]
    assert len(problems_of(frozen, x)) == count and set(fused) <= {"onednn", "winograd", "grouped", "direct"}
    assert not any(isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) for module in frozen.plan(x).modules())
    as_good_as_plain(frozen, model, x)


@pytest.mark.parametrize("backend", ("eager", "triton"))
def test_forced_backends(backend):
    if backend == "triton" and (reason := runtime.why_not("cpu", torch.float32)):
        pytest.skip(reason)
    model, x = networks.small(), torch.randn(1, 3, 8, 8)
    frozen = fused_resnet.freeze(model, x, backend=backend)
    assert {conv.backend.name for conv in convolutions(frozen, x)} == {backend}
    as_good_as_plain(frozen, model, x)


def test_fused_models_freeze_like_plain_ones():
    model, x = networks.small(), torch.randn(X)
    expected = fused_resnet.freeze(model, x)(x)
    frozen = fused_resnet.freeze(fused_resnet.fuse(model), x)
    assert torch.equal(frozen(x), expected)
    assert len(convolutions(frozen, x)) == 12


def test_conv_bn_act_modules():
    model = networks.randomize(nn.Sequential(ConvBNAct(3, 8), ConvBNAct(8, 8, activation_layer=nn.SiLU)))
    x = torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    assert [conv.problem.activation for conv in convolutions(frozen, x)] == ["relu", "silu"]
    as_good_as_plain(frozen, model, x)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_input_layouts(layout):
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(X))
    x = testing.laid_out(torch.randn(X), layout)
    before = x.clone()
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-5
    assert torch.equal(x, before)
    channels = torch.randn(2, 6, 16, 16).to(memory_format=torch.channels_last)[:, ::2]
    assert networks.error(frozen(channels), networks.in_fp64(model, channels)) < 1e-5


def test_empty_batch():
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(X))
    assert frozen(torch.randn(0, 3, 16, 16)).shape == (0, 10)


def test_unbatched_input():
    """Where the model takes (C, H, W), so does the plan."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(3, 8, 8)
    assert networks.error(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x)) < 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_norms_that_stay_take_the_plans_dtype(dtype):
    """Pre-activation: a norm before its convolution cannot be folded."""
    model = networks.randomize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))).half()
    x = torch.randn(X, dtype=torch.float16)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-3  # the output is rounded to fp16


def test_other_outputs():
    """Dictionaries, tuples and feature maps from the middle come back as they are, in the input's dtype."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = networks.small()

        def forward(self, x):
            a = self.net.relu(self.net.bn1(self.net.conv1(x)))
            b = self.net.layer1(a)
            return {"a": a, "deep": (b, self.net.layer2(b)), "best": b.flatten(1).argmax(1)}

    model, x = Features().eval(), torch.randn(X)
    out, expected = fused_resnet.freeze(model, x, dtype=torch.float64)(x), model(x)
    assert list(out) == ["a", "deep", "best"] and torch.equal(out["best"], expected["best"])
    for actual, wanted in zip((out["a"], *out["deep"]), (expected["a"], *expected["deep"])):
        assert actual.dtype == torch.float32 and networks.error(actual, wanted.double()) < 1e-5
