"""Two processes and one: SyncBatchNorm, DDP and fully_shard, of fused models on a CPU."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fused_resnet
from fused_resnet.backends import bn_act as backends
from fused_resnet.models.cifar import CifarPreActResNet
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from fused_resnet.testing.networks import error
from fused_resnet.training import across_processes
from tests.support import networks
from tests.support.processes import Processes


@pytest.fixture(scope="module")
def processes():
    with Processes() as both:
        yield both


def grads_of(y):
    return torch.cos(torch.arange(y[0].numel())).view_as(y[0]).to(y.dtype)


def step(model, x):
    """(y, x's gradient, the parameters' by name, the buffers). Each image gets the same gradient of its output."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.cos(torch.arange(y.shape[1:].numel())).view(y.shape[1:]).to(y.dtype).expand_as(y).contiguous())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return y.detach(), x.grad, gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}


class Small:
    """The kernels of bn_act also of small maps, as `kernels_for_small_maps`, in a process of its own."""

    def __enter__(self):
        self.before = backends._LEAST_VALUES, backends._LEAST_PLANE
        backends._LEAST_VALUES = backends._LEAST_PLANE = 1

    def __exit__(self, *error):
        backends._LEAST_VALUES, backends._LEAST_PLANE = self.before


def part_of(x, sizes, rank):
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]]


def synced_step(rank, model, x, sizes, own_kernels, autocast):
    """A step of this process's images, and how often the statistics of both were joined in it."""
    calls, stock = [], across_processes.Joined.statistics
    across_processes.Joined.statistics = lambda self, *args: calls.append(1) or stock(self, *args)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    fused_resnet.fuse(model, backend="auto" if own_kernels else "eager")
    try:
        with Small(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), fused_resnet.recompute_inputs():
            return *step(model, part_of(x, sizes, rank)), len(calls)
    finally:
        across_processes.Joined.statistics = stock


def joined(found):
    """What two processes found, as one of the whole batch would have it."""
    y, x = (torch.cat([one[i] for one in found if len(one[i])]) for i in (0, 1))
    assert found[0][4] == found[1][4]
    for name, buffer in found[0][3].items():
        assert torch.equal(buffer, found[1][3][name]), name
    return y, x, {name: one + found[1][2][name] for name, one in found[0][2].items()}, found[0][3]


def compare(actual, expected, exact, slack=4):
    for one, plain, right in zip(actual[:2], expected, exact):
        assert one.stride() == plain.stride() and one.dtype == plain.dtype
        assert error(one, right) <= slack * max(error(plain, right), 1e-7)
    for i in (2, 3):
        for name, right in exact[i].items():
            if not right.is_floating_point():
                assert torch.equal(actual[i][name], right), name
                continue
            assert error(actual[i][name], right) <= slack * max(error(expected[i][name], right), 1e-6), name


MODELS = {
    "BasicBlock": lambda: networks.small(BasicBlock),
    "Bottleneck": lambda: networks.small(Bottleneck),
    "preact": lambda: networks.randomize(CifarPreActResNet(1)),
}


@pytest.mark.parametrize("name, own_kernels, sizes", (
    ("BasicBlock", True, (4, 4)), ("Bottleneck", True, (5, 3)), ("Bottleneck", True, (0, 8)), ("preact", True, (7, 1)),
    ("Bottleneck", False, (7, 1)), ("BasicBlock", False, (0, 8)), ("preact", False, (5, 3)),
), ids=str)  # fmt: skip
def test_two_processes_are_the_whole_batch(name, own_kernels, sizes, processes):
    plain = MODELS[name]().train()
    x = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    exact, expected = step(copy.deepcopy(plain).double(), x.double()), step(copy.deepcopy(plain), x)
    found = processes.run(synced_step, plain, x, sizes, own_kernels, False)
    assert found[0][4] == norms
    compare(joined(found), expected, exact)


@pytest.mark.parametrize("sizes", ((4, 4), (6, 2)), ids=str)
def test_in_fp64_they_are_equal_to_the_last_digits(sizes, processes):
    plain, x = networks.small(BasicBlock).double().train(), torch.randn(8, 3, 16, 16, dtype=torch.float64)
    y, grad, gradients, buffers = joined(processes.run(synced_step, plain, x, sizes, False, False))
    expected = step(plain, x)
    for one, other in ((y, expected[0]), (grad, expected[1]), *((gradients[n], g) for n, g in expected[2].items())):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
    for name, buffer in expected[3].items():
        torch.testing.assert_close(buffers[name], buffer)


def test_under_autocast(processes):
    plain, x = networks.small(Bottleneck).train(), torch.randn(8, 3, 24, 24)
    exact = step(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(copy.deepcopy(plain), x)
    actual = joined(processes.run(synced_step, plain, x, (5, 3), True, True))
    compare(actual, expected, exact, slack=2)


def test_a_large_mean(processes):
    """Values of 1e4 + 1e-2 * randn, in parts whose means differ."""
    torch.manual_seed(0)
    plain = ConvBNAct(8, 8, 1)
    nn.init.dirac_(plain[0].weight)
    x = 1e4 + 1e-2 * torch.randn(8, 8, 12, 12) + 0.02 * torch.arange(8).view(8, 1, 1, 1)
    exact = step(copy.deepcopy(plain).double(), x.double())
    found = joined(processes.run(synced_step, plain, x, (5, 3), True, False))
    assert error(found[0], exact[0]) < 0.01  # x is a multiple of 0.001, and so is the mean
    torch.testing.assert_close(
        found[3]["1.running_var"].double(), exact[3]["1.running_var"].double(), rtol=0.01, atol=0
    )


OPTIONS = {
    "cumulative": dict(momentum=None), "not affine": dict(affine=False), "momentum": dict(momentum=0.7, eps=0.1),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_norm(options, processes):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, **options), nn.ReLU()).train()
    x = torch.randn(8, 3, 10, 10)
    exact, expected = step(copy.deepcopy(plain).double(), x.double()), step(copy.deepcopy(plain), x)
    compare(joined(processes.run(synced_step, plain, x, (3, 5), True, False)), expected, exact)


def one_value(rank):
    bn = nn.SyncBatchNorm(4).train()
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1 in all processes"):
        fused_resnet.nn.bn_act(torch.randn(1 - rank, 4, 1, 1), bn)
    x = torch.randn(1, 4, 1, 1, requires_grad=True)  # of two values
    y = fused_resnet.nn.bn_act(x, bn)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        first.sum().backward()
    return y.isfinite().all().item()


def test_one_value_and_gradients_of_gradients(processes):
    assert processes.run(one_value) == [True, True]


def without_processes(rank, x):
    """A group of one process, whose statistics are its own."""
    alone = [dist.new_group([one]) for one in range(2)][rank]
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    module = copy.deepcopy(plain)
    module[1] = nn.SyncBatchNorm(8, process_group=alone)
    fused_resnet.fuse(module)
    with Small():
        return error(module(x + rank), plain(x + rank).double())


def test_a_group_of_one_process(processes):
    assert max(processes.run(without_processes, torch.randn(4, 3, 10, 10))) < 1e-6


# -------------------------------------------------------------------------------------------------------- DDP and FSDP2


def trained(rank, model, x, labels, how, steps=3):
    """The state_dict after steps of SGD on this process's images."""
    with Small():
        model = run = fused_resnet.fuse(model.train())
        if how == "DDP":
            run = DistributedDataParallel(model)
        else:
            mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
            for block in (*model.layer1, *model.layer2, *model.layer3, model):
                fully_shard(block, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            own = slice(4 * rank, 4 * rank + 4)
            F.cross_entropy(run(x[own]), labels[own]).backward()
            optimizer.step()
        state = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def trained_alone(plain, x, labels, parts, steps=3):
    """What one process makes of the same images: the mean of the parts' losses, each part normalised by itself, and
    the statistics of the first."""
    optimizer = torch.optim.SGD(plain.train().parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for part, (images, answers) in enumerate(zip(x.chunk(parts), labels.chunk(parts))):
            kept = {name: buffer.clone() for name, buffer in plain.named_buffers()}
            (F.cross_entropy(plain(images), answers) / parts).backward()
            for name, buffer in plain.named_buffers() if part else ():
                buffer.copy_(kept[name])
        optimizer.step()
    return plain.state_dict()


@pytest.mark.parametrize(
    "name", ("BasicBlock", *(pytest.param(name, marks=pytest.mark.full) for name in [*MODELS][1:]))
)
@pytest.mark.parametrize("how", ("DDP", "FSDP2"))
def test_steps_of_two_processes_are_those_of_one(name, how, processes):
    """FSDP2 with SyncBatchNorm, which DDP refuses on a CPU. In fp64, so that no step amplifies what rounding made."""
    plain, x, labels = MODELS[name]().double(), torch.randn(8, 3, 16, 16).double(), torch.randint(10, (8,))
    shared = copy.deepcopy(plain) if how == "DDP" else nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    expected = trained_alone(plain, x, labels, 2 if how == "DDP" else 1)
    found = processes.run(trained, shared, x, labels, how)
    for name, one in expected.items():
        is_weight = name in dict(plain.named_parameters())
        assert torch.equal(found[0][name], found[1][name]) or how == "DDP" and not is_weight, name
        assert not one.is_floating_point() or error(found[0][name], one) < 1e-9, name
