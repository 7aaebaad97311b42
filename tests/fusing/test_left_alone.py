"""What fuse leaves alone: changed blocks, names of its own, patched classes. It says why."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fused_resnet
from fused_resnet.fusing import convert
from fused_resnet.fusing.rewriting import Rewritten
from fused_resnet.nn import BasicBlock, ConvBNAct, FusedBasicBlock, FusedBlock
from tests.support import networks
from tests.support.fused import DoubledNorm, Rewritable, as_good_as_plain, fused_blocks
from tests.support.snapshots import snapshot, unchanged


class FrozenBatchNorm2d(nn.Module):
    """Detection's norm: the statistics and the affine map as buffers."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _wrapped(block):
    forward = block.forward

    @functools.wraps(forward)
    def twice(x):
        return 2 * forward(x)

    block.forward = twice


def _weight_norm(block):
    parametrizations.weight_norm(block.conv2)


def _old_weight_norm(block):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.conv1)


def _set(name, make):
    return lambda block: setattr(block, name, make())


LEFT_ALONE = {
    "forward of the instance": (_wrapped, "the forward of BasicBlock was replaced"),
    "frozen norm": (_set("bn1", lambda: FrozenBatchNorm2d(8)), "the norm is FrozenBatchNorm2d"),
    "group norm": (_set("bn2", lambda: nn.GroupNorm(4, 8)), "the norm is GroupNorm, not nn.BatchNorm2d"),
    "no statistics": (
        _set("bn1", lambda: nn.BatchNorm2d(8, track_running_stats=False)), "keeps no running statistics"),
    "norm with its own forward": (_set("bn1", lambda: DoubledNorm(8)), "the norm is DoubledNorm, not nn.BatchNorm2d"),
    "another activation": (_set("relu", nn.PReLU), "the activation is PReLU"),
    "another convolution": (
        _set("conv1", lambda: DoubledConv(16, 8, 3, 1, 1)), "the convolution is DoubledConv, not nn.Conv2d"),
    "padding mode": (
        _set("conv1", lambda: nn.Conv2d(16, 8, 3, 1, 1, padding_mode="reflect")), "padding_mode='reflect'"),
    "padding same": (_set("conv1", lambda: nn.Conv2d(16, 8, 3, padding="same")), "padding='same'"),
    "hook": (lambda block: block.conv2.register_forward_hook(lambda *_: None), "Conv2d has hooks"),
    "pre-hook": (lambda block: block.bn1.register_forward_pre_hook(lambda *_: None), "BatchNorm2d has hooks"),
    "backward hook": (lambda block: block.relu.register_full_backward_hook(lambda *_: None), "ReLU has hooks"),
    "parametrization": (_weight_norm, "the convolution is ParametrizedConv2d"),
    "old weight_norm": (_old_weight_norm, "Conv2d has hooks"),
    "forward of a child": (lambda block: setattr(block.bn2, "forward", lambda x: x), "forward of BatchNorm2d was"),
    "missing child": (lambda block: delattr(block, "relu"), "it has no relu"),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_a_changed_block_is_left_alone(change, reason, caplog):
    model = networks.small()
    change(model.layer1[0])
    with caplog.at_level(logging.INFO, "fused_resnet"):
        fused_resnet.fuse(model)
    assert len(fused_blocks(model)) == 3 and not isinstance(model.layer1[0], FusedBlock)
    # three blocks, the stem, and the projection of the block that is left alone: ten convolutions
    assert "fused 5 modules (10 convolutions), left 1 alone" in caplog.text
    assert "layer1.0: " in caplog.text and reason in caplog.text
    fused_resnet.unfuse(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="strict=True and some blocks cannot be fused:\n  layer1.0: ") as error:
        fused_resnet.fuse(model, strict=True)
    assert reason in str(error.value)
    unchanged(model, before)


# --------------------------------------------------------------------------------- names of ours, and pickles of theirs


class OfAPlainClass(Rewritable):
    plain_class = "plain"


class CountsItsOwn(Rewritable):
    def fused_convs(self):
        return 3


class OfOneBackend(ConvBNAct):
    backend = "eager"

    def __init__(self):
        super().__init__(3, 4)


def _with(name, make=BasicBlock):
    module = make(8, 8) if make is BasicBlock else make()
    setattr(module, name, "the user's")
    return module


NAMED_LIKE_OURS = {
    "block with a backend": (lambda: _with("backend"), "backend"),
    "block with a plain class": (lambda: _with("plain_class"), "plain_class"),
    "block with a value like ours": (lambda: _with("_fused_resnet"), "_fused_resnet"),
    "any module with a backend": (lambda: _with("backend", Rewritable), "backend"),
    "any module with a value like ours": (lambda: _with("_fused_resnet", Rewritable), "_fused_resnet"),
    "ConvBNAct with a backend of its class": (OfOneBackend, "backend"),
    "class with a plain class": (OfAPlainClass, "plain_class"),
    "class with a method": (CountsItsOwn, "fused_convs"),
}


@pytest.mark.parametrize("make, name", NAMED_LIKE_OURS.values(), ids=NAMED_LIKE_OURS)
def test_attributes_named_like_ours_stay_the_users(make, name):
    model = nn.Sequential(networks.randomize(make()))
    own, value, before = getattr(model[0], name), dict(model[0].__dict__).get(name), snapshot(model)
    fused_resnet.fuse(model, backend="eager")
    unchanged(model, before)
    ((where, reason),) = convert.left_alone(model)
    assert where == "0" and f"its attribute {name} has a name" in reason
    fused_resnet.unfuse(model)
    unchanged(model, before)
    assert getattr(model[0], name) == own and model[0].__dict__.get(name) == value


class BlockOfOneBackend(FusedBasicBlock):
    backend = "eager"


def test_a_fused_block_whose_class_has_a_backend_keeps_it():
    model = fused_resnet.fuse(nn.Sequential(BlockOfOneBackend(8, 8)), backend="triton")
    assert model[0].backend == "eager" and "_fused_resnet" not in model[0].__dict__
    assert [(name, "attribute backend" in reason) for name, reason in convert.left_alone(model)] == [("0", True)]


class RemadeByItsConstructor(Rewritable):
    def __reduce__(self):
        return type(self), (), self.__getstate__()


def test_a_module_with_its_own_way_to_be_pickled_is_left_alone():
    model = nn.Sequential(networks.randomize(RemadeByItsConstructor()))
    fused_resnet.fuse(model)
    assert type(model[0]) is RemadeByItsConstructor
    ((_, reason),) = convert.left_alone(model)
    assert reason == "RemadeByItsConstructor has its own way to be pickled"
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


# ---------------------------------------------------------------------------------- classes that are not what they seem


def _doubled(forward):
    @functools.wraps(forward)
    def patched(self, x):
        return 2 * forward(self, x)

    return patched


def _same_attributes(forward):
    @functools.wraps(forward)
    def patched(self, x):
        """Half of the branch, as in stochastic depth at test time: only a constant differs from the stock forward."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(0.5 * out + identity)

    return patched


@pytest.mark.parametrize("patch", (_doubled, _same_attributes))
@pytest.mark.parametrize("whose", ("ours", "torchvision-like"))
def test_a_patched_class_is_left_alone(patch, whose, tmp_path, monkeypatch):
    block = BasicBlock if whose == "ours" else networks.torchvision_like(tmp_path, monkeypatch).BasicBlock
    model = networks.small(block)
    monkeypatch.setattr(block, "forward", patch(block.forward))
    with pytest.raises(ValueError, match="layer1.0: the forward of BasicBlock was replaced"):
        fused_resnet.fuse(model, strict=True)
    assert not fused_blocks(fused_resnet.fuse(model))


def test_a_class_of_the_same_name_elsewhere_is_no_known_block(tmp_path, monkeypatch):
    """It is what its forward says, like any other module."""
    block = networks.torchvision_like(tmp_path, monkeypatch).BasicBlock
    monkeypatch.setattr(block, "__module__", "timm.models.resnet")
    plain = networks.small(block)
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert not fused_blocks(model) and isinstance(model.layer1[0], Rewritten) and isinstance(model.layer1[0], block)
    as_good_as_plain(model, plain, torch.randn(4, 3, 16, 16))


class Subclass(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_is_what_its_own_forward_says():
    plain = networks.small()
    plain.layer1[0].__class__ = Subclass
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert len(fused_blocks(model)) == 3 and isinstance(model.layer1[0], Rewritten)
    as_good_as_plain(model, plain, torch.randn(4, 3, 16, 16))
    assert type(fused_resnet.unfuse(model).layer1[0]) is Subclass


def test_exported_models_are_left_alone_with_the_reason():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), torch.randn(1, 3, 9, 9)
    exported = torch.export.export(model, (x,)).module()
    reason = "its convolutions are functions: fuse what it was exported from, or freeze it"
    assert convert.left_alone(exported) == [("the model", reason)]
    with pytest.raises(ValueError, match=reason):
        fused_resnet.fuse(exported, strict=True)
    assert not convert.left_alone(torch.export.export(fused_resnet.fuse(model), (x,)).module())
