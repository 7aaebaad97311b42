"""A fused model is a model: hooks, training, averages, copies, other dtypes."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_resnet
from fused_resnet.nn import BasicBlock, Bottleneck
from tests.support import networks
from tests.support.fused import as_good_as_plain, fused_blocks


def test_hooks_before_and_after_fusing_fire_once():
    model, seen = networks.small(), []
    model.layer1[0].register_forward_hook(lambda *_: seen.append("before"))
    model.layer2[0].bn1.register_forward_hook(lambda *_: seen.append("left alone"))
    fused_resnet.fuse(model)
    model.layer1[0].register_forward_hook(lambda *_: seen.append("after"))
    model.layer3[0].conv1.register_forward_pre_hook(lambda *_: seen.append("child"))
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert seen == ["before", "after", "left alone", "child"]


def steps(model, count=4, ema=None):
    """A few SGD steps as in practice; the batches come from the seed."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(count):
        x, y = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(model)
    return model.eval()


def equal_after_training(model, plain):
    """The same up to what different rounding grows to in four steps: 3e-6 was seen, ten times that is allowed."""
    for (name, p), q in zip(plain.state_dict().items(), model.state_dict().values()):
        assert networks.error(q, p.double()) < 3e-5 if p.is_floating_point() else torch.equal(p, q), name
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert networks.error(model(x), plain(x).double()) < 3e-5


@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
def test_fuse_train_eval_equals_unfused(block):
    plain = networks.small(block)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    start = copy.deepcopy(plain.state_dict())
    steps(plain), steps(model)
    assert networks.error(plain.fc.weight, start["fc.weight"].double()) > 1e-2, "nothing was learnt"
    equal_after_training(model, plain)
    equal_after_training(fused_resnet.unfuse(model), plain)


def test_fine_tuning_with_frozen_norms():
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    for network in (plain, model):
        network.train = functools.partial(_train_without_norms, network)
        steps(network)
    equal_after_training(model, plain)


def _train_without_norms(network, mode=True):
    nn.Module.train(network, mode)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return network


def test_load_state_dict_after_fuse():
    model, other = fused_resnet.fuse(networks.small()), networks.small()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        model(x)
    model.load_state_dict(other.state_dict())
    as_good_as_plain(model, other, x)


def test_ema_after_fuse():
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    averages = [
        AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for network in (plain, model)
    ]
    for network, average in zip((plain, model), averages):
        steps(network, ema=average)
    assert len(fused_blocks(averages[1])) == 4
    equal_after_training(averages[1].eval(), averages[0].eval())
    assert networks.error(averages[1].module.fc.weight, model.fc.weight.double()) > 1e-4


def test_functional_call():
    model, other = fused_resnet.fuse(networks.small()), networks.small()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        actual = torch.func.functional_call(model, dict(other.state_dict()), (x,))
        assert networks.error(actual, other(x).double()) < 1e-5
        assert networks.error(model(x), other(x).double()) > 1e-2


def test_copies_and_pickles():
    model = fused_resnet.fuse(networks.small(), backend="eager")
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(fused_blocks(copied)) == 4 and copied.layer1[0].backend == "eager"
            assert torch.equal(copied(x), expected)
            fused_resnet.unfuse(copied)
            assert {type(module) for module in networks.blocks_of(copied)} == {BasicBlock}
    assert len(fused_blocks(model)) == 4


def test_bf16_and_channels_last_models():
    plain = networks.small().to(torch.bfloat16)
    model = fused_resnet.fuse(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    exact = networks.in_fp64(plain, x)
    with torch.no_grad():
        assert model(x).dtype == torch.bfloat16
        # the same number of roundings to bf16 as plain, in another order: half as much again is allowed
        assert networks.error(model(x), exact) <= 1.5 * networks.error(plain(x), exact)


def test_autocast():
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 16, 16)
    exact = networks.in_fp64(plain, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.bfloat16
        assert networks.error(model(x), exact) <= 1.5 * networks.error(plain(x), exact)
