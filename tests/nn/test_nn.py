"""The blocks: fused and plain compute the same in every mode, and a fused one steps aside where it must."""

import copy
import itertools
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations

import fused_resnet
from fused_resnet import functional
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct, FusedBasicBlock, FusedBottleneck, conv_bn_act
from fused_resnet.nn.norms import norm_of
from tests.support import networks, real_data

FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


@pytest.fixture
def fused_calls(monkeypatch):
    """The problems for which a module called the fused operators, in order."""
    calls = []
    for name in ("conv_bn_act", "add_relu"):
        function = getattr(functional, name)

        def call(*args, _function=function, _name=name, **kwargs):
            calls.append((_name, kwargs.get("activation"), kwargs.get("residual") is not None))
            return _function(*args, **kwargs)

        monkeypatch.setattr(functional, name, call)
    return calls


def twins(block=BasicBlock, **options):
    """(plain, fused) with the same parameters."""
    plain = networks.single(block, **options)
    fused = copy.deepcopy(plain)
    fused.__class__ = FUSED[type(plain)]
    return plain, fused


def close(actual, expected):
    # another order of fp32 sums of at most a few hundred terms, and normalisation by another formula
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("block, convolutions", ((BasicBlock, 3), (Bottleneck, 4)))
@pytest.mark.parametrize("stride", (1, 2))
def test_eval_is_one_call_per_convolution(block, convolutions, stride, fused_calls):
    plain, fused = twins(block, stride=stride)
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        close(fused(x), plain(x))
    projected = plain.downsample is not None
    expected = [("conv_bn_act", "relu", False)] * (convolutions - 2) + [("conv_bn_act", "none", False)] * projected
    assert fused_calls == [*expected, ("conv_bn_act", "relu", True)]


@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
def test_training_steps_are_the_plain_ones(block, fused_calls):
    plain, fused = (model.train() for model in twins(block))
    x = torch.randn(4, 16, 9, 7)
    for model in (plain, fused):
        model(x).square().mean().backward()
    assert fused_calls == [("add_relu", None, False)]
    for p, q in zip(plain.parameters(), fused.parameters()):
        close(q.grad, p.grad)
    for (name, b), c in zip(plain.named_buffers(), fused.buffers()):
        assert torch.equal(b, c), name


@pytest.mark.parametrize("frozen", ("bn1", "bn2", "both"))
def test_half_frozen_norms(frozen, fused_calls):
    """Fine-tuning: some norms in eval mode inside a model in training mode; gradients reach everything trainable."""
    plain, fused = (model.train() for model in twins())
    x = torch.randn(4, 16, 9, 7, requires_grad=True)
    gradients = []
    for model in (plain, fused):
        for name in ("bn1", "bn2"):
            if frozen in (name, "both"):
                getattr(model, name).eval()
        (gradient,) = torch.autograd.grad(model(x).square().mean(), x, retain_graph=True)
        model(x).square().mean().backward()
        gradients.append(gradient)
    assert any(name == "conv_bn_act" for name, *_ in fused_calls)
    close(gradients[1], gradients[0])
    for p, q in zip(plain.parameters(), fused.parameters()):
        close(q.grad, p.grad)
    for b, c in zip(plain.buffers(), fused.buffers()):
        close(c, b)


def test_eval_mode_gradients(fused_calls):
    plain, fused = twins()
    x = torch.randn(2, 16, 6, 5)
    for model in (plain, fused):
        model(x).square().mean().backward()
    assert len(fused_calls) == 3
    for p, q in zip(plain.parameters(), fused.parameters()):
        close(q.grad, p.grad)


class Then(nn.Sequential):
    """A shortcut that goes on with what a function makes of it."""

    def __init__(self, shortcut, function):
        super().__init__(shortcut)
        self.function = function

    def forward(self, x):
        return self.function(super().forward(x))


SHORTCUTS = {
    "broadcasts": lambda y: y.mean((2, 3), keepdim=True),
    "wider": torch.Tensor.double,
    "narrower": torch.Tensor.bfloat16,
    "too large": lambda y: y.repeat(2, 1, 1, 1),
}


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_what_a_shortcut_may_be_added(shortcut, training):
    """`+=` keeps the shape and the dtype of what it adds to."""
    plain, fused = (block.train(training) for block in twins())
    for block in (plain, fused):
        block.downsample = Then(block.downsample, SHORTCUTS[shortcut])
    x = torch.randn(2, 16, 9, 7)
    if shortcut == "too large":
        for block in (plain, fused):
            with pytest.raises(RuntimeError, match="must match the size|doesn't match the broadcast shape"):
                block(x)
        return
    actual, expected = fused(x), plain(x)
    assert actual.dtype == expected.dtype == torch.float32
    close(actual, expected)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
def test_a_shortcut_may_write_to_its_input(block, training):
    """The main path has read it by then."""
    plain, fused = (module.train(training) for module in twins(block))
    for module in (plain, fused):
        module.downsample = nn.Sequential(nn.ReLU(inplace=True), module.downsample)
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        close(fused(x.clone()), plain(x.clone()))


@pytest.mark.parametrize("residual", (3, 0.5))
def test_a_number_may_be_added(residual):
    conv, bn, x = nn.Conv2d(4, 8, 3), networks.randomize(nn.BatchNorm2d(8)).eval(), torch.randn(1, 4, 5, 5)
    close(conv_bn_act(x, conv, bn, "relu", residual), (bn(conv(x)) + residual).relu())


def test_weights_never_go_stale():
    plain, fused = twins()
    x = torch.randn(1, 16, 6, 5)
    with torch.no_grad():
        fused(x)
        for model in (plain, fused):
            model.conv1.weight.mul_(2)
            model.bn2.running_mean.add_(1)
            model.bn1.eps = 0.1
        close(fused(x), plain(x))


def taken_out(bn, name):
    """A plain tensor in the place of a parameter or buffer, as in a replica and after pruning."""
    value = getattr(bn, name).detach()
    delattr(bn, name)
    setattr(bn, name, value)


CHANGED_NORMS = {
    "nothing": lambda bn: None,
    "new parameter": lambda bn: setattr(bn, "weight", nn.Parameter(torch.rand(8))),
    "new statistics": lambda bn: setattr(bn, "running_mean", torch.rand(8)),
    "no bias": lambda bn: setattr(bn, "bias", None),
    "a tensor for the weight": lambda bn: taken_out(bn, "weight"),
    "a tensor for the variance": lambda bn: taken_out(bn, "running_var"),
    "a parameter for the mean": lambda bn: setattr(bn, "running_mean", nn.Parameter(torch.rand(8))),
    "a buffer for the weight": lambda bn: bn.register_buffer("weight", bn._parameters.pop("weight").detach()),
    "hidden by an attribute": lambda bn: bn.__dict__.update(weight=torch.rand(8)),
    "eps": lambda bn: setattr(bn, "eps", 0.5),
    "training": lambda bn: bn.train(),
    "eps of the class": lambda bn: delattr(bn, "eps"),
}


@pytest.mark.parametrize("change", CHANGED_NORMS.values(), ids=CHANGED_NORMS)
def test_a_norm_is_read_as_it_is_now(change, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "eps", 0.25, raising=False)
    bn = nn.BatchNorm2d(8).eval()
    norm_of(bn)
    change(bn)
    norm = norm_of(bn)
    for name in ("weight", "bias", "running_mean", "running_var", "eps", "training"):
        assert getattr(norm, name) is getattr(bn, name), name


def test_pruned_widths_and_convolution_biases(fused_calls):
    """The widths are those of the convolutions, and a bias before the norm is part of the sum."""
    plain = networks.single()
    plain.conv1, plain.bn1 = nn.Conv2d(16, 5, 3, 2, 1), nn.BatchNorm2d(5, eps=1e-3)
    plain.conv2 = nn.Conv2d(5, 8, 3, 1, 1)
    networks.randomize(plain)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedBasicBlock
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        close(fused(x), plain(x))
    assert len(fused_calls) == 3


@pytest.mark.parametrize(
    "options", (dict(dilation=2, stride=1), dict(groups=4, base_width=32), dict(stride_in_1x1=True)), ids=str
)
def test_bottleneck_options(options, fused_calls):
    plain, fused = twins(Bottleneck, **options)
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        close(fused(x), plain(x))
    assert len(fused_calls) == 4


@pytest.mark.parametrize("activation", (nn.ReLU6, nn.SiLU))
def test_the_activation_is_the_blocks_own(activation):
    """A replaced activation is computed, not taken for ReLU."""
    plain, fused = twins()
    plain.relu, fused.relu = activation(), activation()
    x = 4 * torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        close(fused(x), plain(x))


# ------------------------------------------------------------------------------------------------------ stepping aside


def _replace_conv(block):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    block.conv1.__class__ = Doubled


def _patch(name):
    def change(block):
        child = block.get_submodule(name)
        forward = child.forward
        child.forward = lambda x: 2 * forward(x)

    return change


def _parametrize(block):
    parametrizations.weight_norm(block.conv2)
    block.conv2.parametrizations.weight.original0.data.mul_(2)


def _old_weight_norm(block):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.conv1)
    block.conv1.weight_g.data.mul_(2)


def _group_norm(block):
    block.bn2 = nn.GroupNorm(2, 8)


def _no_statistics(block):
    block.bn1 = nn.BatchNorm2d(8, track_running_stats=False)


def _reflect(block):
    block.conv1.padding_mode = "reflect"
    block.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _prelu(block):
    block.relu = nn.PReLU()


def _hooked(name):
    def change(block):
        block.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)

    return change


def _circular(name):
    def change(block):
        conv = block.get_submodule(name)
        pad = (conv.padding[1],) * 2 + (conv.padding[0],) * 2
        conv._conv_forward = lambda x, weight, bias: F.conv2d(
            F.pad(x, pad, mode="circular"), weight, bias, conv.stride, 0, conv.dilation, conv.groups
        )

    return change


STEPPING_ASIDE = {
    "replaced conv": _replace_conv, "patched conv": _patch("conv1"), "patched bn": _patch("bn2"),
    "patched relu": _patch("relu"), "parametrized": _parametrize, "old weight_norm": _old_weight_norm,
    "group norm": _group_norm, "no statistics": _no_statistics, "padding mode": _reflect, "prelu": _prelu,
    "hook on conv": _hooked("conv2"), "hook on bn": _hooked("bn1"), "hook on relu": _hooked("relu"),
    "hook on projection": _hooked("downsample"), "hook in projection": _hooked("downsample.0"),
    "patched projection": _patch("downsample"), "patched conv in projection": _patch("downsample.0"),
    "circular padding": _circular("conv2"),
}  # fmt: skip


@pytest.mark.parametrize("change", STEPPING_ASIDE.values(), ids=STEPPING_ASIDE)
def test_a_changed_child_is_called(change):
    """Whatever is done to a child after fusing has the effect it has on the plain block."""
    plain, fused = twins()
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        before = plain(x)
        for block in (plain, fused):
            change(block)
        assert not torch.allclose(plain(x), before, rtol=1e-3), "the change must matter for this test to mean anything"
        close(fused(x), plain(x))


def test_hooks_fire_exactly_once():
    _, fused = twins(Bottleneck)
    seen = []
    for name, module in fused.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        fused(torch.randn(1, 16, 5, 5))
    leaves = [name for name, module in fused.named_modules() if name != "relu"]
    assert sorted(seen) == sorted([*leaves, *["relu"] * 3])


def test_global_hooks_see_every_child():
    plain, fused = twins()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            fused(torch.randn(1, 16, 5, 5))
    finally:
        handle.remove()
    assert sorted(seen) == sorted(
        ["Conv2d"] * 3 + ["BatchNorm2d"] * 3 + ["ReLU"] * 2 + ["Sequential", "FusedBasicBlock"]
    )


def test_removing_a_hook_fuses_again(fused_calls):
    _, fused = twins()
    handle = fused.conv1.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        fused(torch.randn(1, 16, 5, 5))
        # the projection has no hook and stays fused only if the whole block is
        assert fused_calls == []
        handle.remove()
        fused(torch.randn(1, 16, 5, 5))
    assert len(fused_calls) == 3


def test_backend_is_passed_on():
    _, fused = twins()
    fused.backend = "cudnn"
    with pytest.raises(RuntimeError, match="backend 'cudnn' cannot run this: it runs on NVIDIA GPUs"):
        fused(torch.randn(1, 16, 5, 5))


# ------------------------------------------------------------------------------------- torch.func and forward-mode AD


def _jvp(model, x):
    return torch.func.jvp(model, (x,), (torch.cos(x),))


def _dual(model, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.cos(x)))))


def _jvp_of_the_parameters(model, x):
    parameters = dict(model.named_parameters())
    tangents = {name: torch.cos(p) for name, p in parameters.items()}
    return torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (parameters,), (tangents,))


def _grad_of_the_parameters(model, x):
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
    return tuple(torch.func.grad(loss)(dict(model.named_parameters()), x).values())


def _per_sample_gradients(model, x):
    loss = lambda p, x: torch.func.functional_call(model, p, (x[None],)).square().sum()  # noqa: E731
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)
    return tuple(gradients.values())


def _jacrev(model, x):
    return (torch.func.jacrev(lambda x: model(x).sum((2, 3)))(x),)


def _hessian(model, x):
    return (torch.func.hessian(lambda v: model(x * v[:, None, None, None]).square().sum())(torch.ones(3)),)


def _ensemble(model, x):
    models = [copy.deepcopy(model), copy.deepcopy(model)]
    with torch.no_grad():
        models[1].conv1.weight.mul_(2)
        models[1].bn1.running_var.mul_(3)
    state = torch.func.stack_module_state(models)
    return (torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(*state),)


TRANSFORMS = (
    _jvp, _dual, _jvp_of_the_parameters, _grad_of_the_parameters, _per_sample_gradients, _jacrev, _hessian, _ensemble,
)  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_an_eval_block(transform):
    plain, fused = twins()
    x = torch.randn(3, 16, 6, 5)
    for actual, expected in zip(transform(fused, x), transform(plain, x)):
        assert expected.abs().max() > 0
        close(actual, expected)


def test_transforms_of_a_training_block():
    """The norms run as they are, here without updating their statistics, which no transform allows."""
    results = []
    x = torch.randn(3, 16, 6, 5)
    for model in (block.train() for block in twins()):
        for child in model.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.track_running_stats = False
        results.append(_jvp(model, x) + _grad_of_the_parameters(model, x))
    for expected, actual in zip(*results):
        close(actual, expected)


# ----------------------------------------------------------------------------------------------------------- ConvBNAct


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("norm", (nn.BatchNorm2d, None, lambda channels: nn.GroupNorm(2, channels)))
@pytest.mark.parametrize("activation", (nn.ReLU, nn.ReLU6, nn.SiLU, None, nn.GELU, nn.Identity))
def test_conv_bn_act_module(residual, training, norm, activation):
    options = {} if activation in (nn.ReLU, nn.ReLU6, nn.SiLU, None) else {"inplace": None}
    module = ConvBNAct(6, 8, 3, 2, norm_layer=norm, activation_layer=activation, **options)
    networks.randomize(module).train(training)
    layers = dict(zip(("conv", *(["bn"] if norm else []), *(["act"] if activation else [])), copy.deepcopy(module)))
    x, addend = torch.randn(3, 6, 9, 7), torch.randn(3, 8, 5, 4) if residual else torch.zeros(())
    expected = layers["conv"](x)
    expected = layers["bn"](expected) if norm else expected
    expected = expected + addend
    expected = layers["act"](expected) if activation else expected
    close(module(x, addend if residual else None), expected)
    assert module(x).shape == (3, 8, 5, 4)


def test_conv_bn_act_module_is_one_call(fused_calls):
    module = networks.randomize(ConvBNAct(6, 8))
    module(torch.randn(1, 6, 4, 4))
    module(torch.randn(1, 6, 4, 4), torch.randn(1, 8, 4, 4))
    assert fused_calls == [("conv_bn_act", "relu", False), ("conv_bn_act", "relu", True)]
    module[2].register_forward_hook(lambda *_: None)
    module(torch.randn(1, 6, 4, 4))
    assert len(fused_calls) == 2


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("norm", (nn.BatchNorm2d, None))
@pytest.mark.parametrize(
    "addend",
    (torch.randn(1, 8, 1, 1), torch.randn(8, 1, 1), torch.randn(2, 3, 8, 5, 4), torch.randn(3, 8, 5, 4).double()),
    ids=lambda addend: str((*addend.shape, addend.dtype)),
)
def test_conv_bn_act_module_adds_what_torch_adds(addend, norm, training):
    module = networks.randomize(ConvBNAct(6, 8, 3, 2, norm_layer=norm)).train(training)
    x = torch.randn(3, 6, 9, 7)
    expected = nn.Sequential(*list(copy.deepcopy(module))[:-1])(x) + addend
    actual = module(x, addend)
    assert actual.dtype == expected.dtype
    close(actual, expected.relu())


def test_conv_bn_act_module_takes_an_unbatched_image_where_torch_does():
    module, x = ConvBNAct(6, 8, norm_layer=None), torch.randn(6, 9, 7)
    close(module(x), module(x[None])[0])
    close(module(x, torch.ones(8, 9, 7)), module(x[None], torch.ones(1, 8, 9, 7))[0])
    for training in (False, True):
        with pytest.raises(ValueError, match="expected 4D input"):
            ConvBNAct(6, 8).train(training)(x)


def test_conv_bn_act_module_has_torchvisions_keys_and_defaults():
    assert list(ConvBNAct(3, 4).state_dict()) == [
        "0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"
    ]  # fmt: skip
    module = ConvBNAct(3, 4, 5, dilation=2, norm_layer=None)
    assert module[0].padding == (4, 4) and module[0].bias is not None and ConvBNAct(3, 4)[0].bias is None
    assert module[1].inplace and not ConvBNAct(3, 4, inplace=False)[2].inplace


@pytest.mark.parametrize("make", (lambda: twins(Bottleneck)[1], lambda: networks.randomize(ConvBNAct(16, 8))))
def test_copies_and_pickles(make):
    module = make()
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(copied) is type(module)
            assert torch.equal(copied(x), module(x))


# ------------------------------------------------------------------------------------- the layout that plain would give


def laid_out(shape, layout):
    """A random tensor in one of the layouts that a convolution meets."""
    N, C, H, W = shape
    return {
        "NCHW": lambda: torch.randn(shape),
        "channels_last": lambda: torch.empty(shape, memory_format=torch.channels_last).normal_(),
        "neither": lambda: torch.randn(W, C, H, N).permute(3, 1, 2, 0),
        "every other channel": lambda: torch.randn(N, 2 * C, H, W)[:, ::2],
        "some channels, channels_last": lambda: laid_out((N, 2 * C, H, W), "channels_last")[:, :C],
        "expanded": lambda: torch.randn(N, 1, H, W).expand(shape),
        # of one image strides say NCHW and the memory is channels_last
        "image from numpy": lambda: torch.randn(H, W, C).permute(2, 0, 1)[None].expand(N, C, H, W),
    }[layout]()


LAYOUTS = (
    "NCHW", "channels_last", "neither", "every other channel", "some channels, channels_last", "expanded",
    "image from numpy",
)  # fmt: skip
# x, and the arguments of a convolution
WINDOWS = {
    "3x3": ((2, 8, 6, 5), (8, 16, 3)), "1x1": ((2, 8, 6, 5), (8, 16, 1)), "one image": ((1, 8, 6, 5), (8, 16, 3)),
    "groups": ((2, 8, 6, 5), (8, 16, 3, 2, 1, 1, 2)), "depthwise": ((2, 8, 6, 5), (8, 8, 3, 1, 1, 1, 8)),
    "one channel in": ((2, 1, 6, 5), (1, 16, 3)), "one channel out": ((2, 8, 6, 5), (8, 1, 3)),
    "one channel": ((2, 1, 6, 5), (1, 1, 1)), "one pixel": ((2, 8, 1, 1), (8, 16, 1)),
    "one pixel out": ((2, 8, 3, 3), (8, 16, 3)), "one row out": ((2, 8, 3, 6), (8, 16, 3)),
    "one column out": ((2, 8, 6, 3), (8, 16, 3)), "empty batch": ((0, 8, 6, 5), (8, 16, 3)),
    "empty batch of the same shape": ((0, 8, 6, 5), (8, 8, 3, 1, 1)),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def one_by_one(x, conv, bn, act, residual, sum):
    """conv_bn_act as a plain forward writes it."""
    out = conv(x) if bn is None else bn(conv(x))
    if residual is not None:
        out = {"out + residual": operator.add, "out += residual": operator.iadd}.get(
            sum, lambda out, residual: operator.iadd(residual, out)
        )(out, residual)
    return out if act is None else F.relu(out) if act == "relu" else act(out)


@pytest.mark.parametrize("dtype", (*DTYPES, "autocast"))
@pytest.mark.parametrize("window", WINDOWS)
def test_strides_are_those_of_the_plain_forward(window, dtype, fused_calls):
    shape, arguments = WINDOWS[window]
    acts = (nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.SiLU(), "relu", None)
    sums = [("out + residual", None), *itertools.product(("out + residual", "out += residual"), LAYOUTS[:2])]
    sums += [("residual += out", layout) for layout in LAYOUTS[:2]]
    count = 0
    for layout, weight_layout, has_norm in itertools.product(LAYOUTS, LAYOUTS[:2], (True, False)):
        conv = nn.Conv2d(*arguments).to(DTYPES.get(dtype))
        conv.weight.data = laid_out(conv.weight.shape, weight_layout).to(DTYPES.get(dtype))
        bn = networks.randomize(nn.BatchNorm2d(arguments[1])).to(DTYPES.get(dtype)) if has_norm else None
        x = laid_out(shape, layout).to(DTYPES.get(dtype))
        for act, (sum, residual_layout) in itertools.product(acts, sums):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                out = conv(x)
                residual = residual_layout and laid_out(out.shape, residual_layout).to(out.dtype)
                actual = conv_bn_act(x, conv, bn, act, residual, sum=sum)
                expected = one_by_one(x, conv, bn, act, None if residual is None else residual.clone(), sum)
            what = (layout, weight_layout, has_norm, act, sum, residual_layout)
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
            is_odd_sum = sum == "out + residual" and residual is not None and residual.stride() != out.stride()
            assert all(
                ours == plain or is_odd_sum and size == 1
                for ours, plain, size in zip(actual.stride(), expected.stride(), out.shape)
            ), what
            count += len(x) > 0 and not (dtype == "autocast" and 0 in x.stride())
    assert len(fused_calls) == count, "these are fused"


@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("weights", LAYOUTS[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_keeps_the_layout(layout, weights, training, block):
    for stride in (1, 2):
        plain, fused = twins(block, stride=stride)
        x = laid_out((2, 16, 9, 7), layout)
        for module in (plain, fused):
            module.train(training)
            if weights == "channels_last":
                module.to(memory_format=torch.channels_last)
        with torch.no_grad():
            actual, expected = fused(x), plain(x)
            assert actual.stride() == expected.stride()
            close(actual, expected)


@pytest.mark.parametrize("sum", ("out + residual", "out += residual", "residual += out"))
@pytest.mark.parametrize("layout, other", (LAYOUTS[:2], LAYOUTS[1::-1]))
def test_a_sum_in_training_keeps_the_layout(layout, other, sum, fused_calls):
    conv, bn, x = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), laid_out((2, 8, 6, 5), layout)
    residual = laid_out((2, 16, 4, 3), other)
    expected = one_by_one(x, conv, copy.deepcopy(bn), nn.ReLU(), residual.clone(), sum)
    actual = conv_bn_act(x, conv, bn, nn.ReLU(), residual, sum=sum)
    assert actual.stride() == expected.stride() and fused_calls == [("add_relu", None, False)]
    close(actual, expected)


class Viewed(nn.Module):
    """A forward that reads its activations' memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 3 * 3, 4)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.conv(x))))
        return self.fc(x.view(x.size(0), -1)), torch.as_strided(x, (2, 4, 9), (72, 18, 2))


@pytest.mark.parametrize("training", (False, True))
def test_a_view_after_a_fused_module(training):
    plain = networks.randomize(Viewed())
    fused = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for actual, expected in zip(fused.train(training)(x), plain.train(training)(x)):
            close(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_no_pass_over_memory_is_spent_on_the_layout(layout):
    """In a network whose weights and input agree there are no more of ATen's copies than in the plain one."""
    plain = networks.small()
    plain.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    fused = fused_resnet.fuse(copy.deepcopy(plain), backend="eager", strict=True)
    x = laid_out((2, 3, 16, 16), layout)
    counts = []
    for model in (plain, fused):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            model(x)
        names = [event.name for event in profiled.events()]
        counts.append((names.count("aten::batch_norm"), names.count("aten::copy_")))
    assert counts[0] == counts[1] and counts[0][0] == 12


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("form", ("compiled", "exported"))
def test_a_compiled_block_keeps_the_layout(layout, form):
    plain, fused = twins()
    x = laid_out((2, 16, 9, 7), layout)
    torch._dynamo.reset()
    with torch.no_grad():
        if form == "compiled":
            model = torch.compile(fused, backend="aot_eager", fullgraph=True)
        else:
            model = torch.export.export(fused, (x,)).module()
        actual, expected = model(x), plain(x)
    assert actual.stride() == expected.stride()
    close(actual, expected)


# ------------------------------------------------------------------------------------------ what plain takes or refuses


def outcome(function):
    """What a call gives, or the type of the error it raises."""
    try:
        return function()
    except Exception as error:
        return type(error)


def same_outcome(actual, expected, what):
    if isinstance(expected, type):
        assert actual is expected, what
        return
    assert not isinstance(actual, type), (what, actual)
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride()), what
    rounding = 2.0**-6 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * 4, msg=lambda text: f"{what}: {text}")


def _frozen_norm(channels):
    return networks.randomize(real_data.torchvision().ops.FrozenBatchNorm2d(channels))


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("norm", (nn.BatchNorm2d, _frozen_norm, None))
def test_mixed_dtypes_are_taken_or_refused_as_plain_does(norm, autocast, fused_calls):
    """x, the weight, its bias, the norm's affine map and its statistics, a residual: each in four dtypes."""
    refused = 0
    x, weight, bias, residual = (
        torch.randn(2, 4, 5, 5),
        torch.randn(8, 4, 3, 3),
        torch.randn(8),
        torch.randn(2, 8, 3, 3),
    )
    of_norm = [(kind, kind) for kind in DTYPES.values()] + [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ]
    for dtypes in itertools.product(DTYPES.values(), repeat=3):
        for affine, statistics in of_norm if norm else of_norm[:1]:
            conv = nn.Conv2d(4, 8, 3)
            conv.weight.data, conv.bias.data = weight.to(dtypes[1]), bias.to(dtypes[2])
            bn = norm and norm(8).eval()
            if bn is not None:
                bn.weight.data, bn.bias.data = bn.weight.data.to(affine), bn.bias.data.to(affine)
                bn.running_mean, bn.running_var = bn.running_mean.to(statistics), bn.running_var.to(statistics)
            for addend, sum in (
                (None, "out + residual"),
                (dtypes[0], "out + residual"),
                (statistics, "out += residual"),
            ):
                arguments = x.to(dtypes[0]), conv, bn, nn.ReLU(), None if addend is None else residual.to(addend)
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    expected = outcome(lambda: one_by_one(*arguments, sum))  # noqa: B023
                    actual = outcome(lambda: conv_bn_act(*arguments, sum=sum))  # noqa: B023
                same_outcome(actual, expected, (*dtypes, affine, statistics, addend, sum))
                refused += isinstance(expected, type)
    assert refused and fused_calls


def _set_data(path, function):
    def change(block):
        module, _, name = path.rpartition(".")
        tensor = getattr(block.get_submodule(module), name)
        setattr(block.get_submodule(module), name, function(tensor))

    return change


def _as_parameter(function):
    return lambda tensor: nn.Parameter(function(tensor.data), requires_grad=False)


ODD = {
    "half statistics": _set_data("bn1.running_mean", torch.Tensor.half),
    "norm in bf16": lambda block: block.bn1.bfloat16(),
    "norm in fp64": lambda block: block.bn2.double(),
    "convolution in fp64": lambda block: block.conv1.double(),
    "projection in bf16": lambda block: block.downsample.bfloat16(),
    "too few statistics": _set_data("bn1.running_var", lambda t: t[:3]),
    "too few gammas": _set_data("bn1.weight", _as_parameter(lambda t: t[:3])),
    "statistics of another shape": _set_data("bn1.running_mean", lambda t: t[None]),
    "statistics with a gradient": _set_data("bn1.running_mean", lambda t: t.requires_grad_()),
    "variance with a gradient": _set_data("bn2.running_var", lambda t: t.requires_grad_()),
    "no gamma": lambda block: setattr(block.bn1, "weight", None),
    "no beta": lambda block: setattr(block.bn1, "bias", None),
    "an integer stride": lambda block: setattr(block.conv2, "stride", 1),
    "three strides": lambda block: setattr(block.conv2, "stride", (1, 1, 1)),
    "a negative padding": lambda block: setattr(block.conv2, "padding", (-1, 0)),
    "no stride": lambda block: setattr(block.conv2, "stride", (0, 0)),
    "a fractional padding": lambda block: setattr(block.conv2, "padding", (1.0, 1.0)),
    "an integer eps": lambda block: setattr(block.bn1, "eps", 1),
    "a weight of 3 dimensions": _set_data("conv1.weight", _as_parameter(lambda t: t[..., 0])),
    "a weight of other channels": _set_data("conv1.weight", _as_parameter(lambda t: t[:, :3])),
    "no output channels": _set_data("conv2.weight", _as_parameter(lambda t: t[:0])),
    "a projection that broadcasts": _set_data("downsample.0.weight", _as_parameter(lambda t: t[:1])),
    "a shortcut of another shape": lambda block: setattr(block, "downsample", nn.Conv2d(16, 8, 3)),
    "nothing": lambda block: None,
}  # fmt: skip
INPUTS = {
    "as ever": torch.randn(2, 16, 9, 7), "unbatched": torch.randn(16, 9, 7), "flat": torch.randn(2, 16),
    "volume": torch.randn(1, 2, 16, 9, 7), "few channels": torch.randn(2, 5, 9, 7), "empty": torch.randn(0, 16, 9, 7),
    "no rows": torch.randn(2, 16, 0, 7), "one pixel": torch.randn(2, 16, 1, 1), "integers": torch.ones(
        2, 16, 9, 7, dtype=torch.long), "fp64": torch.randn(2, 16, 9, 7).double(),
    "bf16": torch.randn(2, 16, 9, 7).bfloat16(), "complex": torch.randn(2, 16, 9, 7, dtype=torch.cfloat),
    "None": None, "a number": 1.0, "a list": [torch.randn(16, 9, 7)], "meta": torch.randn(2, 16, 9, 7, device="meta"),
    "sparse": torch.randn(2, 16, 9, 7).to_sparse(), "a gradient": torch.randn(2, 16, 9, 7, requires_grad=True),
}  # fmt: skip


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_odd_parameters_and_inputs_are_taken_or_refused_as_plain_does(change):
    for training, gradients in ((False, True), (False, False), (True, True)):
        for name, x in INPUTS.items():
            blocks = twins()
            results = []
            for block in blocks:
                block.train(training)
                change(block)
                with torch.set_grad_enabled(gradients):
                    results.append(outcome(lambda: block(x)))  # noqa: B023
            if getattr(x, "is_meta", False) or getattr(results[0], "is_meta", False):
                results = [
                    result if isinstance(result, type) else torch.empty_like(result, device="cpu").zero_()
                    for result in results
                ]
            same_outcome(*reversed(results), (name, training, gradients))
