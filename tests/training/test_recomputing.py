"""Convolutions that compute their input again: the same gradients, fewer bytes, and what may not be computed again."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import functional, models, training
from fused_resnet.measuring.training import saved_bytes
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.training import recomputing
from tests.support import networks, real_data
from tests.support.fused import kernels_for_small_maps


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Also of small maps, and with what is tested here."""
    kernels_for_small_maps(monkeypatch)
    with fused_resnet.recompute_inputs():
        yield


@pytest.fixture
def again(monkeypatch):
    """The shapes of what is computed again, in order."""
    found, stock = [], recomputing._output_again

    def output_again(node):
        y = stock(node)
        found.append(tuple(y.shape))
        return y

    monkeypatch.setattr(recomputing, "_output_again", output_again)
    return found


def stages():
    """Two stages of bottlenecks, as in a ResNet: (N, 16, H, W) -> (N, 32, H/2, W/2)."""
    widths = ((16, 8, 1), (32, 8, 1), (32, 8, 1), (32, 16, 2), (64, 16, 1))
    return networks.randomize(nn.Sequential(*(networks.residual_block(Bottleneck, *each) for each in widths))).train()


def image(shape=(4, 16, 9, 7)):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def gradients(model, x, times=1):
    model.zero_grad()
    own = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(own)
    for i in range(times):
        y.backward(torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype), retain_graph=i + 1 < times)
    return [y.detach(), own.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("context", ("fp32", "autocast"))
@pytest.mark.parametrize("times", (1, 2))
def test_gradients_are_the_same_to_the_last_bit(context, times, again, monkeypatch):
    model, x = fused_resnet.fuse(stages()), image()
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        found = gradients(copy.deepcopy(model), x, times)
        assert len(again) >= 14 * times
        with monkeypatch.context() as patch:
            patch.setattr(training, "convolution", lambda conv, x: conv(x))
            kept = gradients(copy.deepcopy(model), x, times)
    assert all(torch.equal(one, other) for one, other in zip(found, kept))


def test_nothing_is_computed_more_than_twice(again, monkeypatch):
    """Twelve inputs of convolutions, of two blocks' outputs twice; each of the 16 maps by one call of the kernel."""
    runs = []
    stock = recomputing.choosing.select
    monkeypatch.setattr(recomputing.choosing, "select", lambda *args: runs.append(args[0].output_shape) or stock(*args))
    model = fused_resnet.fuse(stages())
    y = model(image())
    runs.clear()
    y.sum().backward()
    recomputed = 5 * 2 + 4 + 2  # in each block, blocks' outputs that another one reads, and two projections
    assert len([one for one in runs]) >= recomputed
    assert len(again) < 3 * recomputed


def test_what_is_computed_again_is_freed(monkeypatch):
    model = fused_resnet.fuse(stages())
    held = []
    stock = recomputing._output_again
    monkeypatch.setattr(recomputing, "_output_again", lambda node: held.append(weakref.ref(y := stock(node))) or y)
    model(image()).sum().backward()
    gc.collect()
    assert held and not [one for one in held if one() is not None]


def test_a_written_map_is_kept(again):
    conv, x = nn.Conv2d(8, 8, 1, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    found = []
    for convolve in (lambda y: conv(y), lambda y: training.convolution(conv, y)):
        for write in (lambda y: y, lambda y: y.mul_(2), _written_unseen, torch.Tensor.detach):
            conv.zero_grad()
            y = write(functional.bn_act(x, training=True))
            convolve(y).square().sum().backward()
            found.append(conv.weight.grad.clone())
    assert all(torch.equal(*pair) for pair in zip(found[:4], found[4:])) and len(again) == 1


def _written_unseen(y):
    with torch.no_grad():
        y.mul_(3)
    return y


def test_a_map_may_be_written_afterwards(again):
    """Which PyTorch's convolution, that has kept it, refuses in the backward."""
    conv, x = nn.Conv2d(8, 8, 1, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(conv(functional.bn_act(x, training=True)).sum(), conv.weight)
    y = functional.bn_act(x, training=True)
    z = training.convolution(conv, y)
    y.detach().zero_()
    assert torch.equal(*torch.autograd.grad(z.sum(), conv.weight), *expected) and len(again) == 1


@pytest.mark.parametrize("change", (
    lambda conv: setattr(conv, "bias", nn.Parameter(torch.zeros(8))),
    lambda conv: conv.weight.requires_grad_(False),
    lambda conv: setattr(conv, "stride", 1),
))  # fmt: skip
def test_what_keeps_its_input(change, again):
    conv, x = nn.Conv2d(8, 8, 3, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    change(conv)
    y = functional.bn_act(x, training=True)
    try:
        expected = conv(y)
    except Exception as error:
        with pytest.raises(type(error)):
            training.convolution(conv, y)
        return
    assert torch.equal(training.convolution(conv, y), expected)
    training.convolution(conv, y).sum().backward()
    assert not again


@pytest.mark.parametrize("where", ("all", "first", "last"))
def test_checkpoints_beside_blocks(where, again):
    model, x = fused_resnet.fuse(stages()), image()
    inside = {"all": (0, 1, 2, 3, 4), "first": (0, 1), "last": (3, 4)}[where]

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for i, block in enumerate(self):
                x = checkpoint(block, x, use_reentrant=False) if i in inside else block(x)
            return x

    found, expected = gradients(Checkpointed(*copy.deepcopy(model)), x), gradients(copy.deepcopy(model), x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_saved_tensors_may_be_packed():
    """As where they are kept elsewhere."""
    model, x = fused_resnet.fuse(stages()), image()
    expected = gradients(copy.deepcopy(model), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        found = gradients(model, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_gradients_of_gradients():
    found = []
    x = image().requires_grad_()
    plain = stages().double()
    x = x.double().detach().requires_grad_()
    for model in (plain, fused_resnet.fuse(copy.deepcopy(plain))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.batch_norm, "_is_faster", lambda *args: True)  # in fp64, by ATen
            first = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), [x, *model.parameters()])
        found.append([*first, *second])
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())


def test_the_switch(again):
    """Off, every input is kept; on, until the end of the context, or for good."""
    fused_resnet.recompute_inputs(False)
    model, x = fused_resnet.fuse(stages()), image()
    kept = gradients(copy.deepcopy(model), x)
    assert not again
    with fused_resnet.recompute_inputs(True):
        with fused_resnet.recompute_inputs(False):
            gradients(copy.deepcopy(model), x)
        assert not again
        found = gradients(copy.deepcopy(model), x)
    assert len(again) >= 14 and all(torch.equal(one, other) for one, other in zip(found, kept))
    again.clear()
    y = model(x).sum()
    with fused_resnet.recompute_inputs(True):  # which is about forwards
        y.backward()
    assert not again
    fused_resnet.recompute_inputs()
    gradients(copy.deepcopy(model), x)
    assert again
    with pytest.raises(TypeError, match="expected True or False, got 'on'"):
        fused_resnet.recompute_inputs("on")


def test_it_is_off_at_first():
    code = "from fused_resnet.training import recomputing; assert recomputing._is_wanted is False"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------------------------------------------- saved bytes


def test_saved_bytes_by_hand():
    linear, x = nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    saved = saved_bytes(linear, lambda: linear(x).relu().mul(x[:, :1]))
    assert saved == (4 * 6 * 5, 4 * (3 * 6 + 3 * 5))


@pytest.mark.parametrize("dtype, most", ((torch.float32, 0.62), (torch.bfloat16, 0.64)), ids=str)
def test_a_step_of_resnet50_keeps_fewer_bytes(dtype, most):
    """The shares are those of 224 px: all maps are as many times smaller."""
    plain = models.create("resnet50").train().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found = []
    for model in (plain, fused_resnet.fuse(copy.deepcopy(plain))):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(saved_bytes(model, lambda: model(x).sum()).activations)  # noqa: B023
    assert found[1] <= most * found[0]


def test_blocks_without_projections_keep_their_outputs():
    plain = networks.randomize(
        nn.Sequential(*(networks.residual_block(BasicBlock, 16, 16, 1) for _ in range(3)))
    ).train()
    x = image().requires_grad_()
    found = [saved_bytes(model, lambda: model(x)).activations  # noqa: B023
             for model in (plain, fused_resnet.fuse(copy.deepcopy(plain)))]  # fmt: skip
    assert found[1] < 0.85 * found[0]


@pytest.mark.parametrize("name", ("FrozenBatchNorm2d", "BatchNorm2d"))
def test_frozen_norms_keep_no_activations(name):
    """As in detection backbones: weights are trained, norms are constant. Kept are inputs of convolutions, and the
    stem's map and indices for its pooling."""
    tv = real_data.torchvision()
    norm = tv.ops.misc.FrozenBatchNorm2d if name == "FrozenBatchNorm2d" else nn.BatchNorm2d
    plain = tv.models.resnet18(norm_layer=norm, num_classes=5).to(memory_format=torch.channels_last)
    plain.train(norm is not nn.BatchNorm2d)
    fused, x = fused_resnet.fuse(copy.deepcopy(plain)), image((2, 3, 64, 64))
    inputs: dict[int, int] = {}
    alive = []

    def note(module, args):
        inputs[args[0].data_ptr()] = args[0].nbytes
        alive.append(args[0])

    handles = [one.register_forward_pre_hook(note) for one in plain.modules() if isinstance(one, nn.Conv2d)]
    y = plain(x)
    for handle in handles:
        handle.remove()
    of_pooling = 2 * 64 * (32 * 32 * 4 + 16 * 16 * 8)
    kept = saved_bytes(fused, lambda: fused(x)).activations
    assert kept <= 1.05 * (sum(inputs.values()) + of_pooling)
    if norm is nn.BatchNorm2d:
        assert kept < 0.6 * saved_bytes(plain, lambda: plain(x)).activations
    expected, actual = (torch.autograd.grad(one.square().sum(), list(model.parameters()))
                        for one, model in ((y, plain), (fused(x), fused)))  # fmt: skip
    for one, other in zip(expected, actual):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * one.abs().max().item())
