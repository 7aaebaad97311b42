"""fuse and unfuse: what is fused, with which backend and filter, and what a call that raises leaves."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import BackendError, models
from fused_resnet.fusing import convert
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct, FusedBasicBlock, FusedBottleneck
from fused_resnet.nn.fused import plain_class_of
from tests.support import networks, real_data
from tests.support.fused import Rewritable, as_good_as_plain, fused_blocks
from tests.support.snapshots import snapshot, unchanged


@pytest.mark.parametrize("block, fused_class", ((BasicBlock, FusedBasicBlock), (Bottleneck, FusedBottleneck)))
def test_our_blocks(block, fused_class):
    plain = networks.small(block)
    before = snapshot(plain)
    model = copy.deepcopy(plain)
    keys = list(model.state_dict())
    assert fused_resnet.fuse(model) is model
    assert {type(module) for module in networks.blocks_of(model)} == {fused_class}
    assert list(model.state_dict()) == keys and len(fused_blocks(model)) == 4
    as_good_as_plain(model, plain, torch.randn(4, 3, 16, 16))
    fused_resnet.unfuse(plain)
    unchanged(plain, before)


def test_fuse_and_unfuse_change_nothing_else():
    model = networks.small()
    before = snapshot(model)
    fused_resnet.unfuse(fused_resnet.fuse(model))
    unchanged(model, before)
    assert {type(module) for module in networks.blocks_of(model)} == {BasicBlock}


def test_fusing_twice_is_fusing_once():
    model = fused_resnet.fuse(networks.small())
    classes = [type(module) for module in model.modules()]
    fused_resnet.fuse(model, backend="eager")
    assert [type(module) for module in model.modules()] == classes
    assert {block.backend for block in fused_blocks(model)} == {"eager"}
    fused_resnet.unfuse(model)
    assert not fused_blocks(model)


@pytest.mark.parametrize("name", ("BasicBlock", "Bottleneck"))
def test_torchvision_like_blocks(name, tmp_path, monkeypatch):
    block = getattr(networks.torchvision_like(tmp_path, monkeypatch), name)
    plain = networks.small(block)
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert len(fused_blocks(model)) == 4
    as_good_as_plain(model, plain, torch.randn(4, 3, 16, 16))
    assert plain_class_of(copy.deepcopy(model).layer1[0]) is block
    fused_resnet.unfuse(model)
    assert type(model.layer1[0]) is block and not fused_blocks(model)


def test_a_block_that_may_not_be_bypassed_runs_the_forward_of_the_class_that_it_had(tmp_path, monkeypatch):
    block = networks.torchvision_like(tmp_path, monkeypatch).BasicBlock
    model, x = fused_resnet.fuse(networks.single(block)), torch.randn(1, 16, 5, 5)
    monkeypatch.setattr(block, "forward", lambda self, x: x)
    assert model(x) is not x
    model.conv1.register_forward_hook(lambda *_: None)
    assert model(x) is x


def test_the_real_torchvision():
    plain = networks.randomize(real_data.torchvision().models.resnet50(num_classes=10))
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert len(fused_blocks(model)) == 16
    as_good_as_plain(model, plain, torch.randn(1, 3, 64, 64))
    assert {type(module) for module in fused_resnet.unfuse(model).modules()} == {type(m) for m in plain.modules()}


def test_conv_bn_act_modules_are_given_the_backend():
    model = nn.Sequential(ConvBNAct(3, 8), ConvBNAct(8, 8))
    fused_resnet.fuse(model, backend="eager", strict=True)
    assert [module.backend for module in model] == ["eager"] * 2
    fused_resnet.unfuse(model)
    assert [module.backend for module in model] == ["auto"] * 2 and "backend" not in model[0].__dict__


def test_a_conv_bn_act_gets_its_own_backend_back():
    model = nn.Sequential(ConvBNAct(3, 8), ConvBNAct(8, 8))
    model[0].backend = "eager"
    before = snapshot(model)
    assert fused_resnet.unfuse(model)[0].backend == "eager", "what was not fused is not unfused"
    fused_resnet.fuse(fused_resnet.fuse(model, backend="triton"), backend="auto")
    assert model[0].backend == "auto"
    fused_resnet.unfuse(model)
    unchanged(model, before)
    assert model[0].backend == "eager"


@pytest.mark.parametrize("make", (networks.single, Rewritable, lambda: ConvBNAct(3, 4)))
def test_the_backend_of_what_is_fused_may_be_set(make):
    module = make().eval()
    before = snapshot(module)
    fused_resnet.fuse(module).backend = "eager"
    assert module.backend == copy.deepcopy(module).backend == "eager"
    fused_resnet.unfuse(module)
    unchanged(module, before)


def test_a_model_that_is_one_block():
    block = networks.single()
    assert type(fused_resnet.fuse(block)) is FusedBasicBlock
    assert type(fused_resnet.unfuse(block)) is BasicBlock


def test_pruned_inner_widths_and_dilation():
    pruned = networks.randomize(models.cifar.resnet20(option="B", inner_widths=(11, 8, 9, 22, 20, 32, 52, 56, 64)))
    dilated = networks.small(Bottleneck, dilation=2)
    for plain in (pruned, dilated):
        as_good_as_plain(fused_resnet.fuse(copy.deepcopy(plain), strict=True), plain, torch.randn(4, 3, 16, 16))


# -------------------------------------------------------------------------------------------------- what a filter keeps


def test_filter():
    model, seen = networks.small(), []

    def keep(module, name):
        seen.append(name)
        return name != "layer2.0"

    fused_resnet.fuse(model, filter_fn=keep, strict=True)
    assert type(model.layer2[0]) is BasicBlock and len(fused_blocks(model)) == 3
    assert seen == [name for name, _ in model.named_modules()]


def test_a_filter_does_not_unfuse():
    model = fused_resnet.fuse(networks.small())
    fused = convert.fused_convs(model)
    fused_resnet.fuse(model, backend="eager", filter_fn=lambda module, name: False)
    assert convert.fused_convs(model) == fused and {block.backend for block in fused_blocks(model)} == {"auto"}


def test_a_filter_keeps_a_downsample(monkeypatch):
    plain = networks.small(Bottleneck)
    model, forward, called = copy.deepcopy(plain), nn.Conv2d.forward, []
    everything = convert.fused_convs(fused_resnet.fuse(copy.deepcopy(plain)))
    before = snapshot(model)
    fused_resnet.fuse(model, filter_fn=lambda module, name: name != "layer2.0.downsample")
    assert isinstance(model.layer2[0], FusedBottleneck) and type(model.layer2[0].downsample) is nn.Sequential
    assert set(everything) - set(convert.fused_convs(model)) == {"layer2.0.downsample.0"}
    as_good_as_plain(model, plain, torch.randn(2, 3, 16, 16))
    monkeypatch.setattr(nn.Conv2d, "forward", lambda conv, x: called.append(conv) or forward(conv, x))
    model(torch.randn(2, 3, 16, 16))
    assert called == [model.layer2[0].downsample[0]]
    copied = copy.deepcopy(model)
    assert convert.fused_convs(copied) == convert.fused_convs(model)
    assert convert.fused_convs(fused_resnet.fuse(copied)) == everything, "fused again, without a filter"
    unchanged(fused_resnet.unfuse(model), before)


def test_a_filter_that_raises_leaves_the_model_as_it_was():
    model = networks.small()
    before = snapshot(model)

    def keep(module, name):
        if name == "layer3.0":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fused_resnet.fuse(model, filter_fn=keep)
    unchanged(model, before)


# --------------------------------------------------------------------------------------------------- a call that raises


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match="strict=True and some blocks cannot be fused:\n  no convolution was found"):
        fused_resnet.fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), strict=True)


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(ConvBNAct(3, 8), Rewritable(), BasicBlock(8, 8), Rewritable(), ConvBNAct(8, 8)).eval()
    model[0].backend = "eager"
    before, become, failed = snapshot(model), convert._become, []

    def fails_later(module, cls, fused):
        become(module, cls, fused)
        if module is model[3] and not failed:
            failed.append(True)
            raise MemoryError

    monkeypatch.setattr(convert, "_become", fails_later)
    with pytest.raises(MemoryError):
        fused_resnet.fuse(model)
    unchanged(model, before)
    assert model[0].backend == "eager"


def test_an_unknown_backend_leaves_the_model_as_it_was():
    model = networks.small()
    before = snapshot(model)
    with pytest.raises(fused_resnet.BackendError, match="unknown backend 'cudn'"):
        fused_resnet.fuse(model, backend="cudn")
    unchanged(model, before)


@pytest.mark.parametrize("backend", ("onednn", "cudnn"))
def test_a_backend_that_takes_no_live_norm_leaves_the_model_as_it_was(backend):
    model = nn.Sequential(networks.small(), ConvBNAct(3, 8))
    before = snapshot(model)
    with pytest.raises(fused_resnet.BackendError, match=f"'{backend}' .*needs folded BN: use fused_resnet.freeze"):
        fused_resnet.fuse(model, backend=backend)
    unchanged(model, before)
    without_norm = fused_resnet.fuse(ConvBNAct(3, 8, norm_layer=None), backend=backend)
    assert without_norm.backend == backend


def test_fuse_refuses():
    with pytest.raises(BackendError, match="fuse: unknown backend 'tpu'; known ones are auto, .*onednn"):
        fused_resnet.fuse(torch.nn.Identity(), backend="tpu")
    with pytest.raises(TypeError, match="fuse: expected an nn.Module, got Tensor"):
        fused_resnet.fuse(torch.ones(2))
