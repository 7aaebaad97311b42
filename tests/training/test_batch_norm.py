"""Blocks in training mode: bn_act behind a convolution where that is faster, PyTorch's layers elsewhere."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import functional
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from fused_resnet.testing.networks import allowed, error
from tests.support import networks, real_data
from tests.support.fused import DoubledNorm, kernels_for_small_maps

BLOCKS = (BasicBlock, Bottleneck)
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


@pytest.fixture
def kernels(monkeypatch):
    """Also of small maps."""
    kernels_for_small_maps(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """The activations of bn_act's calls, and whether something is added before; in order."""
    found, stock = [], functional.bn_act

    def call(*args, **kwargs):
        found.append((kwargs["activation"], kwargs["residual"] is not None))
        return stock(*args, **kwargs)

    monkeypatch.setattr(functional, "bn_act", call)
    return found


def twins(block=BasicBlock, **options):
    """(plain, fused) in training mode, with the same parameters."""
    plain = networks.single(block, **options).train()
    return plain, fused_resnet.fuse(copy.deepcopy(plain), strict=True)


def image(dtype=torch.float32, layout="NHWC", shape=(4, 16, 9, 7)):
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def step(model, x, grad=None):
    """The output and all gradients, by name."""
    own = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = model(own)
    y.backward(torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype) if grad is None else grad)
    return {"y": y.detach(), "x": own.grad, **{name: p.grad for name, p in model.named_parameters()}}


def as_good_as_plain(model, plain, x, context=torch.no_grad, worst=0.2):
    """Outputs and gradients, each held against fp64. worst: what no error may reach, or the test would tell nothing."""
    exact = step(copy.deepcopy(plain).double(), x.double())
    with context():
        expected, actual = step(copy.deepcopy(plain), x), step(model, x)
    for name, one in exact.items():
        assert actual[name].dtype == expected[name].dtype and actual[name].stride() == expected[name].stride(), name
        # as many roundings to bf16 as plain, or fewer: half as much again is allowed
        is_wide = x.dtype == expected["y"].dtype == torch.float32
        most = allowed(expected[name], one) if is_wide else 1.5 * error(expected[name], one)
        assert error(actual[name], one) <= most < worst, name


# ---------------------------------------------------------------------------------------------- what is computed how


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients(block, layout, stride, kernels, calls):
    plain, fused = twins(block, stride=stride)
    as_good_as_plain(fused, plain, image(layout=layout), torch.enable_grad)
    inner = [("relu", False)] * (len(fused.stage_names) - 1)
    assert calls == [*inner, *[("none", False)] * (plain.downsample is not None), ("relu", True)]


@pytest.mark.parametrize("block", BLOCKS)
def test_autocast(block, kernels, calls):
    plain, fused = twins(block)
    as_good_as_plain(fused, plain, image(), lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(calls) == len(fused.fused_convs())


def test_a_model_in_bf16(kernels, calls):
    plain = networks.single(Bottleneck).train().bfloat16()
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    as_good_as_plain(fused, plain, image(torch.bfloat16), torch.enable_grad)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "activation, calls_expected", ((nn.ReLU, 1), (nn.ReLU6, 1), (None, 1), (nn.SiLU, 0), (nn.GELU, 0))
)
@pytest.mark.parametrize("residual", (False, True))
def test_conv_bn_act_module(activation, calls_expected, residual, kernels, calls):
    options = {"inplace": None} if activation is nn.GELU else {}
    module = networks.randomize(ConvBNAct(16, 8, activation_layer=activation, **options)).train()
    layers = copy.deepcopy(nn.Sequential(*module))
    x, addend = image(), torch.randn(4, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    y = module(x, addend if residual else None)
    expected = layers[1](layers[0](x)) + (addend if residual else 0)
    torch.testing.assert_close(y, layers[2](expected) if activation else expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == calls_expected


@pytest.mark.full
def test_what_fuse_makes_of_other_peoples_models(kernels, calls):
    """torchvision's blocks and stem; timm's blocks, which are rewritten."""
    tv = real_data.torchvision().models.resnet18(num_classes=4)
    timm = pytest.importorskip("timm").create_model("resnet26d", num_classes=4)
    for model, norms in ((tv, 20), (timm, 30)):  # that follow a convolution in the same forward
        fused = fused_resnet.fuse(copy.deepcopy(model.train()))
        calls.clear()
        x = torch.randn(4, 3, 48, 48)
        actual, expected = step(fused, x), step(model, x)
        assert len(calls) == norms
        for name, one in expected.items():
            assert error(actual[name], one.double()) < 1e-3, name  # thirty layers, two orders of summation


def test_auto_takes_it_where_maps_are_large(calls):
    kernels_for_small_maps_exist = pytest.MonkeyPatch()
    with kernels_for_small_maps_exist.context() as patch:
        kernels_for_small_maps(patch)  # or skips

    def count(shape, dtype=torch.float32, backend="auto", layout="NHWC"):
        module = ConvBNAct(16, 16, 1).to(dtype)
        module.backend = backend
        calls.clear()
        with torch.no_grad():
            module(image(dtype, layout, shape))
        return len(calls)

    large = (8, 16, 96, 96)
    assert count(large) == count(large, torch.bfloat16) == count(large, layout="NCHW") == 1
    assert count((8, 16, 64, 64)) == count(large, torch.float16) == count(large, torch.float64) == 0
    assert count(large, backend="eager") == 0 and count(large, backend="cpu_pass") == 1
    assert count((2048, 32, 4, 4)[:1] + (16, 8, 8), layout="NCHW") == 0  # small planes


# ------------------------------------------------------------------------------------------------ running statistics

NORMS = {
    "as ever": {}, "cumulative": dict(momentum=None), "no momentum": dict(momentum=0.0), "an integer": dict(momentum=1),
    "no affine map": dict(affine=False), "another eps": dict(eps=0.3, momentum=0.7),
}  # fmt: skip


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gradients", (True, False))
def test_running_statistics_are_torchs(options, dtype, gradients, kernels, calls):
    plain = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU()).to(dtype)
    fused = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    for _ in range(3):
        x = image(dtype)
        with torch.set_grad_enabled(gradients):
            y, expected = fused(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=2**-6 if dtype == torch.bfloat16 else 1e-4, atol=2e-2)
    assert len(calls) == 3
    for (name, actual), wanted in zip(fused.named_buffers(), plain.buffers()):
        if name.endswith("tracked"):
            assert torch.equal(actual, wanted) and wanted == 3
        # statistics that were added up in another order; three roundings to bf16
        rtol, atol = (2**-6, 2**-12) if dtype == torch.bfloat16 else (1e-5, 1e-6)
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


def test_statistics_that_are_not_tracked_any_more(kernels, calls):
    plain, fused = twins()
    x = image()
    for model in (plain, fused):
        model.bn1.track_running_stats, model.bn2.num_batches_tracked = False, None
        model(x)
    torch.testing.assert_close(fused.bn2.running_var, plain.bn2.running_var)
    assert len(calls) == 3 and torch.equal(fused.bn1.running_mean, plain.bn1.running_mean)
    assert torch.equal(fused.bn1.num_batches_tracked, plain.bn1.num_batches_tracked)


def test_update_bn_of_averaged_weights(kernels, calls):
    plain = networks.small(Bottleneck)
    models = [plain, fused_resnet.fuse(copy.deepcopy(plain))]
    data = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    for model in models:
        update_bn(data, average := AveragedModel(model))
        model.load_state_dict(average.module.state_dict())
    assert calls
    for (name, one), other in zip(models[0].named_buffers(), models[1].buffers()):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------- what is observed as ever


def _subclass(block):
    class Doubled(nn.BatchNorm2d):
        pass

    block.bn1.__class__ = Doubled


SEEN = {
    "hook on a norm": lambda block: block.bn1.register_forward_hook(lambda module, args, y: 2 * y),
    "hook on a convolution": lambda block: block.conv2.register_full_backward_hook(lambda *_: None),
    "a replaced forward": lambda block: setattr(block.bn2, "forward", lambda x: 3 * x),
    "a parametrization": lambda block: parametrizations.weight_norm(block.conv2),
    "a norm of another class": lambda block: setattr(block, "bn2", nn.GroupNorm(2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_what_may_be_seen_runs_stock_code(change, kernels, calls):
    plain, fused = twins()
    for block in (plain, fused):
        change(block)
    x = image()
    assert torch.equal(fused(x), plain(x)) and not calls


_FIRST, _LAST = [("relu", False), ("none", False)], [("relu", True)]


@pytest.mark.parametrize("make, expected", (
    (nn.SyncBatchNorm, _FIRST),
    (lambda channels: type("Own", (nn.BatchNorm2d,), {})(channels), _FIRST + _LAST),  # with the same forward
    (DoubledNorm, []),  # no norm that is known, so the block runs as it is
))  # fmt: skip
def test_other_norms_are_called(make, expected, kernels, calls):
    plain, fused = twins()
    for block in (plain, fused):
        block.bn2 = make(8).train()
    if isinstance(plain.bn2, nn.SyncBatchNorm):  # on a CPU it needs a process group
        for block in (plain, fused):
            block.bn2.eval()
    x = image()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert calls == expected


@pytest.mark.parametrize("shape", ((1, 16, 1, 1), (1, 16, 2, 2), (16, 9, 7)))
def test_what_torch_refuses(shape, kernels):
    errors = []
    for block in twins():
        with pytest.raises((ValueError, RuntimeError)) as error:
            block(torch.randn(shape))
        errors.append((type(error.value), str(error.value), int(block.bn1.num_batches_tracked)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ("running_mean", "weight"))
def test_vectors_of_another_length_are_torchs_error(name, kernels):
    for block in twins():
        own = getattr(block.bn1, name)
        setattr(block.bn1, name, own[:3] if name == "running_mean" else nn.Parameter(own.data[:3]))
        with pytest.raises(RuntimeError, match="should contain 8 elements|must contain|Expected weight|8"):
            block(image())


def test_eval_mode_is_as_before(kernels, calls):
    plain, fused = (block.eval() for block in twins())
    x = image()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not calls


def test_two_runs_are_equal_to_the_last_bit(kernels):
    model = fused_resnet.fuse(networks.small(Bottleneck).train())
    x = torch.randn(4, 3, 16, 16)
    first, second = (step(copy.deepcopy(model), x) for _ in range(2))
    assert all(torch.equal(one, second[name]) for name, one in first.items())


# --------------------------------------------------------------------------------------------------- ways of training


def sgd(model, count=4, ema=None, scaler=None, after=None, optimizer=None):
    """A few SGD steps; the batches come from the seed."""
    generator = torch.Generator().manual_seed(1)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    for i in range(count):
        model.train()
        x, y = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (1e9 if scaler is not None and i == 1 else 1)
        if scaler is None:
            loss.backward(), optimizer.step()
        else:
            scaler.scale(loss).backward(), scaler.step(optimizer), scaler.update()
        if ema is not None:
            ema.update_parameters(model)
        if after is not None:
            after(i, model)
    return model.eval()


def equal_after_training(model, plain):
    """Up to what different rounding grows to in some steps."""
    for (name, p), q in zip(plain.state_dict().items(), model.state_dict().values()):
        assert error(q, p.double()) < 3e-5 if p.is_floating_point() else torch.equal(p, q), name


@pytest.mark.parametrize("block", BLOCKS)
def test_steps_of_sgd(block, kernels, calls):
    plain = networks.small(block)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    equal_after_training(sgd(model), sgd(plain))
    assert len(calls) == 4 * sum(isinstance(one, nn.BatchNorm2d) for one in plain.modules())


def test_a_gradient_scaler_skips_what_overflows(kernels):
    plain = networks.small()
    models = [plain, fused_resnet.fuse(copy.deepcopy(plain))]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=100) for _ in models]
    for model, scaler in zip(models, scalers):
        sgd(model, 6, scaler=scaler)
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**100
    equal_after_training(*models[::-1])


def test_averages_and_copies_in_the_middle(kernels):
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    averages = [AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for one in (plain, model)]
    for one, average in zip((plain, model), averages):
        sgd(one, ema=average)
    equal_after_training(averages[1].module, averages[0].module)
    assert type(averages[1].module.layer1[0]) is type(model.layer1[0])


def test_fused_and_unfused_in_the_middle_of_a_run(kernels, calls):
    """Parameters, state and what the optimiser keeps of them stay what they are."""
    plain, model = networks.small(), None
    model = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    parameters, keys = list(map(id, model.parameters())), list(model.state_dict())

    def toggle(i, model):
        kept = [state["momentum_buffer"] for state in optimizer.state.values()]
        (fused_resnet.unfuse if i % 2 else fused_resnet.fuse)(model)
        assert list(map(id, model.parameters())) == parameters and list(model.state_dict()) == keys
        assert all(state["momentum_buffer"] is one for state, one in zip(optimizer.state.values(), kept))

    sgd(model, 6, after=toggle, optimizer=optimizer)
    assert len(calls) == 3 * sum(isinstance(one, nn.BatchNorm2d) for one in plain.modules())
    equal_after_training(model, sgd(plain, 6))


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpoints(use_reentrant, kernels):
    found = []
    plain = networks.small(Bottleneck).train()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    for one, is_checkpointed in ((plain, False), (model, False), (model, True)):

        def forward(x, one=one, is_checkpointed=is_checkpointed):
            x = one.relu(one.bn1(one.conv1(x)))
            for block in (*one.layer1, *one.layer2, *one.layer3):
                x = checkpoint(block, x, use_reentrant=use_reentrant) if is_checkpointed else block(x)
            return x

        torch.manual_seed(0)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        one.zero_grad()
        forward(x).square().mean().backward()
        found.append([x.grad, *(p.grad.clone() for name, p in one.named_parameters() if "fc" not in name)])
    for expected, fused, again in zip(*found):
        torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert torch.equal(again, fused)


def test_a_block_that_is_used_twice(kernels):
    plain, fused = twins(BasicBlock, stride=1, channels=16)
    as_good_as_plain(nn.Sequential(fused, fused), nn.Sequential(plain, plain), image(), torch.enable_grad)
    assert int(fused.bn1.num_batches_tracked) == 2


def test_frozen_parameters_get_no_gradient(kernels):
    plain, fused = twins(Bottleneck)
    frozen = ("bn1.weight", "conv2.weight", "bn3.bias")
    for block, name in itertools.product((plain, fused), frozen):
        block.get_parameter(name).requires_grad_(False)
    x = image()
    expected, actual = step(plain, x), step(fused, x)
    for name, one in expected.items():
        assert (one is None) == (actual[name] is None) == (name in frozen), name
        if one is not None:
            torch.testing.assert_close(actual[name], one, rtol=1e-3, atol=1e-3 * one.abs().max().item(), msg=name)


def test_gradients_of_gradients(kernels):
    found = []
    x = image().requires_grad_()
    for block in twins():
        (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), [x, *block.parameters()])])
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_compiled_block_is_one_graph_with_the_operator(dynamic, kernels):
    plain, fused = twins(Bottleneck)
    graphs = []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True, dynamic=dynamic)
    for N in (4, 6) if dynamic else (4, 4):
        torch.manual_seed(N)
        expected, actual = step(plain, x := image(shape=(N, 16, 9, 7))), step(nn.Sequential(compiled), x)
        for (name, one), other in zip(expected.items(), actual.values()):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * one.abs().max().item(), msg=name)
    assert len(graphs) == 1 and graphs[0].count("fused_resnet.bn_act.default") == 4
    for one, other in zip(plain.buffers(), fused.buffers()):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_compiled_block_of_small_maps_is_left_to_the_compiler():
    _, fused = twins()
    targets = []

    def backend(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(fused, backend=backend, fullgraph=True)(image())
    assert not any("bn_act" in one for one in targets) and any("batch_norm" in one for one in targets)


@pytest.mark.parametrize("transform", (
    lambda model, x: torch.func.jvp(model, (x,), (torch.cos(x),)),
    lambda model, x: (torch.func.vmap(model)(x[None]),),
))  # fmt: skip
def test_transforms_call_the_layers(transform, kernels, calls):
    found = []
    x = image()
    for model in twins():
        for child in model.modules():
            child.track_running_stats = False
        found.append(transform(model, x))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_double_precision_is_torchs(kernels, calls):
    plain, fused = (block.double() for block in twins())
    x = image(torch.float64)
    for one, other in itertools.zip_longest(step(plain, x).values(), step(fused, x).values()):
        assert torch.equal(one, other)
    assert not calls
