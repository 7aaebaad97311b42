"""Training fused models, alone and in several processes: hooks, averages, frozen norms, other dtypes."""

import copy
import functools
import multiprocessing

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet.nn import BasicBlock, Bottleneck
from tests.support import networks
from tests.support.fused import assert_same, fused_blocks, pair


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


@pytest.mark.parametrize("mode", ("eval", "train"))
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(mode, use_reentrant):
    plain, fused, x = pair(BasicBlock)
    gradients = []
    for model in (plain, fused):
        model.train(mode == "train")
        own = x.clone().requires_grad_()
        out = model.relu(model.bn1(model.conv1(own)))
        for stage in (model.layer1, model.layer2, model.layer3):
            out = checkpoint(stage, out, use_reentrant=use_reentrant)
        out.square().mean().backward()
        gradients.append([own.grad, *(p.grad for name, p in model.named_parameters() if "fc" not in name)])
    for actual, expected in zip(*reversed(gradients)):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_pruning_and_parametrizing_a_child_is_seen():
    """The block runs that child, so masks and norms count; removing the mask fuses it again."""
    plain, fused, x = pair()
    for model in (plain, fused):
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
        parametrizations.weight_norm(model.layer2[0].conv2)
        with torch.no_grad():
            model.layer2[0].conv2.parametrizations.weight.original0 *= 1.5
    assert_same(fused(x), plain(x))
    for model in (plain, fused):
        prune.remove(model.layer1[0].conv1, "weight")
    assert_same(fused(x), plain(x))


def _train_step(model, x):
    model.train()
    model(x).square().mean().backward()


def _gradients(model):
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def _distributed(rank, size, kind, folder):
    """One of two processes: a fused model under DDP or FSDP2, trained and evaluated on its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = fused_resnet.fuse(networks.small(BasicBlock))
    x = torch.randn(4, 3, 20, 20).chunk(size)[rank]
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
        _train_step(model, x)
        gradients = _gradients(model)
    else:
        mesh = init_device_mesh("cpu", (size,))
        for stage in (model.layer1, model.layer2, model.layer3):
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
        _train_step(model, x)
        gradients = {name: grad.full_tensor() for name, grad in _gradients(model).items()}
    with torch.no_grad():
        out = model.eval()(x)
    if rank == 0:
        torch.save((gradients, out), f"{folder}/results")
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("kind", ("DDP", "FSDP"))
def test_two_processes_average_the_gradients(kind, tmp_path):
    """Against the plain model in one process: the mean of both halves' gradients (BN sees each half alone)."""
    processes = [
        multiprocessing.get_context("spawn").Process(target=_distributed, args=(rank, 2, kind, str(tmp_path)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    gradients, out = torch.load(tmp_path / "results")

    torch.manual_seed(0)
    plain = networks.small(BasicBlock)
    halves, outputs = [], []
    for half in torch.randn(4, 3, 20, 20).chunk(2):
        model = copy.deepcopy(plain)
        _train_step(model, half)
        halves.append(_gradients(model))
        outputs.append(model.eval()(half))
    assert_same(out, outputs[0])
    assert list(gradients) == list(halves[0])
    for name, actual in gradients.items():
        expected = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item(), msg=name)
