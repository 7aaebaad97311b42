"""Norms in front of convolutions: pre-activation networks of ours, timm's and other people's, trained and frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import functional
from fused_resnet.freezing.modules import FrozenNorm
from fused_resnet.fusing import convert
from fused_resnet.measuring.training import saved_bytes
from fused_resnet.models.cifar import CifarPreActResNet, PadShortcut
from fused_resnet.nn import PreActBasicBlock, PreActBottleneck, bn_act, conv1x1
from tests.support import networks, real_data
from tests.support.fused import kernels_for_small_maps
from tests.training.test_batch_norm import LAYOUTS, as_good_as_plain, equal_after_training, image, sgd, step

BLOCKS = (PreActBasicBlock, PreActBottleneck)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Also of small maps."""
    kernels_for_small_maps(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """Calls of functional.bn_act, in order: the activation, and whether it is in training mode."""
    found, stock = [], functional.bn_act

    def call(*args, **kwargs):
        found.append((kwargs["activation"], kwargs["training"]))
        return stock(*args, **kwargs)

    monkeypatch.setattr(functional, "bn_act", call)
    return found


def blocks(block, stride):
    """Three: behind the activation, with a projection or a padding, with the identity."""
    width = 8 * block.expansion
    shortcut = conv1x1(width, width, stride) if stride > 1 else None
    pads = PadShortcut(1, (width - 16) // 2, (width - 16) // 2) if width > 16 else nn.Conv2d(16, width, 1, bias=False)
    return networks.randomize(
        nn.Sequential(
            block(16, 8, 1, pads, activated_shortcut=True),
            block(width, 8, stride, shortcut, activated_shortcut=stride > 1),
            block(width, 8),
        )
    ).train()


def twins(block, stride=2):
    plain = blocks(block, stride)
    return plain, fused_resnet.fuse(copy.deepcopy(plain), strict=True)


@pytest.mark.parametrize("recomputes", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients(block, stride, layout, recomputes, calls):
    plain, fused = twins(block, stride)
    with fused_resnet.recompute_inputs(recomputes):
        as_good_as_plain(fused, plain, image(layout=layout), torch.enable_grad)
    assert calls == [("relu", True)] * 3 * (2 if block is PreActBasicBlock else 3)


@pytest.mark.parametrize("dtype, first", ((torch.bfloat16, 1), (torch.float32, 0)), ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_autocast(block, dtype, first, calls):
    """A norm of a map in fp32 runs as it is: PyTorch's gives fp32, and bn_act would cast."""
    plain, fused = (model[2] for model in twins(block))
    x = image(dtype, shape=(8, 8 * block.expansion, 18, 14))
    as_good_as_plain(fused, plain, x, lambda: torch.autocast("cpu", torch.bfloat16), worst=0.5)
    assert len(calls) == block.expansion // 4 + 1 + first


@pytest.mark.parametrize("block", BLOCKS)
def test_eval_mode_and_frozen_statistics(block, calls):
    """Gradients through norms in eval mode, as in fine-tuning."""
    plain, fused = (model.eval() for model in twins(block))
    as_good_as_plain(fused, plain, image(), torch.enable_grad)
    assert calls == [("relu", False)] * 3  # the others are folded into the convolution in front of them


@pytest.mark.parametrize("block", BLOCKS)
def test_no_activation_is_kept(block):
    plain, fused = twins(block, 1)
    x = image().requires_grad_()
    with fused_resnet.recompute_inputs():
        kept = [saved_bytes(model, lambda: model(x)).activations for model in (plain, fused)]  # noqa: B023
    assert kept[1] < 0.57 * kept[0]  # a map for each norm, and masks, where there were two


@pytest.mark.parametrize("option, block", (("A", PreActBasicBlock), ("B", PreActBasicBlock), (None, PreActBottleneck)))
def test_networks_train_fused_and_unfused_in_turn(option, block, calls):
    torch.manual_seed(0)
    plain = CifarPreActResNet(1, block=block, option=option)
    model = copy.deepcopy(plain)
    parameters = list(map(id, model.parameters()))

    def toggle(i, model):
        (fused_resnet.unfuse if i % 2 else fused_resnet.fuse)(model)
        assert list(map(id, model.parameters())) == parameters

    sgd(model, 4, after=toggle)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert len(calls) == 2 * norms
    equal_after_training(model, sgd(plain, 4))


SEEN = {
    "a hook on the first norm": lambda block: block.bn1.register_forward_hook(lambda module, args, y: 2 * y),
    "a hook on a convolution": lambda block: block.conv2.register_forward_hook(lambda module, args, y: 2 * y),
    "another norm": lambda block: setattr(block, "bn1", nn.GroupNorm(4, 16)),
    "a replaced forward": lambda block: setattr(block.bn1, "forward", lambda x: 3 * x),
    "another activation": lambda block: setattr(block, "relu", nn.GELU()),
}  # fmt: skip


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("training", (True, False))
def test_children_that_were_changed_are_called(change, training):
    plain, fused = (model.train(training) for model in twins(PreActBasicBlock))
    for model in (plain, fused):
        change(model[0])
    x = image()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)


def test_nn_bn_act_takes_what_the_layers_take(calls):
    bn, act = networks.randomize(nn.BatchNorm2d(16)), nn.ReLU()
    x = image()
    for norm in (bn, copy.deepcopy(bn).train()):
        torch.testing.assert_close(bn_act(x, norm, act), act(copy.deepcopy(norm)(x)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bn_act(x, norm, "silu"), F.silu(copy.deepcopy(norm)(x)), rtol=1e-4, atol=1e-5)
    assert calls == [("relu", False), ("relu", True)]
    with pytest.raises(ValueError, match="expected 4D input"):
        bn_act(x[0], bn, act)
    assert bn_act(x[:0], bn, act).shape == (0, 16, 9, 7)


# --------------------------------------------------------------------------------------------- other people's networks


class Unknown(nn.Module):
    """Pre-activation as many write it, which nobody has registered."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += x
        return out


def test_unknown_blocks_are_rewritten(calls):
    plain = networks.randomize(nn.Sequential(Unknown(), Unknown())).train()
    fused = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert convert.fused_convs(fused) == ["0.conv1", "1.conv1"]
    as_good_as_plain(fused, plain, image(), torch.enable_grad)
    assert calls == [("relu", True)] * 4
    x = image().requires_grad_()
    with fused_resnet.recompute_inputs():
        kept = [saved_bytes(model, lambda: model(x)).activations for model in (plain, fused)]  # noqa: B023
    assert kept[1] < 0.57 * kept[0]


def timms(**options):
    real_data.torchvision()  # which timm imports
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    from timm.layers import BatchNormAct2d, create_conv2d

    kinds = dict(conv_layer=create_conv2d, norm_layer=BatchNormAct2d) | options
    return resnetv2.ResNetV2([1, 1], channels=(32, 64), stem_chs=8, num_classes=5, **kinds)


@pytest.mark.parametrize("options, convs", (({}, 6), (dict(avg_down=True), 6), (dict(bottle_ratio=0.5), 6)))
def test_timms_resnetv2(options, convs, calls):
    """Its norms activate by themselves, and keep statistics as nn.BatchNorm2d does."""
    plain = timms(**options).train()
    fused = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert len(convert.fused_convs(fused)) == convs
    x = torch.randn(4, 3, 48, 48)
    actual, expected = step(fused, x), step(plain, x)
    assert calls == [("relu", True)] * 6
    for name, one in expected.items():
        assert networks.error(actual[name], one.double()) < 1e-4, name
    for (name, one), other in zip(plain.named_buffers(), fused.buffers()):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)


def test_timms_stochastic_depth_draws_as_ever(calls):
    plain = timms(drop_path_rate=0.5).train()
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 48, 48)
    found = []
    for model in (plain, fused):
        torch.manual_seed(3)
        found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert calls


def test_weight_standardised_ones_are_declined_with_the_reason():
    real_data.torchvision()
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnetv2_50x1_bit")
    reasons = {left.name: left.reason for left in convert.left_alone(model)}
    wanted = "its convolutions are StdConv2d, not nn.Conv2d, and its norms GroupNormAct"
    assert reasons["stages.0.blocks.0"] == wanted and len(reasons) >= 16
    assert fused_resnet.fuse(model) is model and not convert.fused_convs(model)
    with torch.device("meta"):
        model = timm.create_model("resnetv2_50d_gn")
    reasons = {left.name: left.reason for left in convert.left_alone(model)}
    assert reasons["stages.0.blocks.0"] == "the norm is GroupNormAct, not nn.BatchNorm2d"


# ------------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("make, norms", (
    (lambda: CifarPreActResNet(1), 3), (lambda: CifarPreActResNet(1, block=PreActBottleneck), 3), (timms, 3),
))  # fmt: skip
def test_frozen(make, norms, dtype):
    """Norms of sums are a pass each, all others are folded."""
    model = networks.randomize(make())
    x = torch.randn(2, 3, 32, 32)
    exact = networks.in_fp64(model, x)
    frozen = fused_resnet.freeze(model, x, dtype=dtype, tune=False)
    modules = [module for module in frozen.plan(x).modules() if type(module) is FrozenNorm]
    assert len(modules) == norms and {module.activation for module in modules} == {"relu"}
    assert not any("BatchNorm" in type(module).__name__ for module in frozen.plan(x).modules())
    with torch.inference_mode():
        plain = model(x) if dtype == torch.float32 else copy.deepcopy(model).bfloat16()(x.bfloat16()).float()
        most = networks.allowed(plain, exact, winograd=networks.has_winograd(frozen.plan(x)))
        assert networks.error(frozen(x), exact) <= most < 0.1
    rows = fused_resnet.explain(frozen, x).rows
    named = {name for name, module in model.named_modules() if type(module) is nn.Conv2d and "head" not in name}
    assert named <= {row.name for row in rows}


def test_frozen_by_eager_calls_the_layers():
    model, x = networks.randomize(CifarPreActResNet(1)), torch.randn(2, 3, 32, 32)
    plan = fused_resnet.freeze(model, x, backend="eager", tune=False).plan(x)
    assert not [module for module in plan.modules() if type(module) is FrozenNorm]
