"""fuse and unfuse: what is fused, what is left alone and why, and that only the forward of a model changes."""

import abc
import copy
import functools
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_resnet
from fused_resnet import models
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.fusing import adapters, convert
from fused_resnet.fusing.rewriting import Rewritten
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct, FusedBasicBlock, FusedBlock, FusedBottleneck, conv_bn_act
from fused_resnet.nn.fused import plain_class_of
from tests.support import networks, real_data


def fused_blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


class Rewritable(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def snapshot(model):
    """Everything about a model that a conversion might disturb."""
    state = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    modules = {
        name: (id(module), type(module), module.training, set(module.__dict__), list(module._modules))
        for name, module in model.named_modules()
    }
    return state, modules


def unchanged(model, before):
    (state, modules), (old_state, old_modules) = snapshot(model), before
    assert list(state) == list(old_state)
    for key, (pointer, value) in state.items():
        assert pointer == old_state[key][0] and torch.equal(value, old_state[key][1]), key
    assert modules == old_modules


def as_good_as_plain(model, plain, x):
    """Fused and plain round differently, so each is held against fp64. Sums in another order are up to 2.2 times worse
    or better (seen); a mistake is a thousand times worse."""
    exact = networks.in_fp64(plain, x)
    with torch.no_grad():
        allowed = networks.allowed(plain(x), exact)
        assert networks.error(model(x), exact) <= allowed < 1e-4


# --------------------------------------------------------------------------------------------------------- what fuses


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


# ------------------------------------------------------------------------------------------------- what is left alone


class Subclass(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


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


class DoubledNorm(nn.BatchNorm2d):
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
    "block with a value like ours": (lambda: _with("_fused"), "_fused"),
    "any module with a backend": (lambda: _with("backend", Rewritable), "backend"),
    "any module with a value like ours": (lambda: _with("_fused", Rewritable), "_fused"),
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


# -------------------------------------------------------------------------------------- what else is a batch norm


class SubclassOfNorm(nn.BatchNorm2d):
    pass


class NormOfAnything(nn.modules.batchnorm._BatchNorm):
    """As mmcv turns a SyncBatchNorm back into a norm."""

    def _check_input_dim(self, input):
        return


def lazy_norm(channels):
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, channels, 2, 2))
    return model[0]


class NormInTheForward(nn.Module):
    """relu(batch_norm(conv(x)) + x), by functions. norm: how batch_norm is called."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm
        self.gamma, self.beta = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(4) - 0.5)
        self.register_buffer("mean", torch.rand(4) - 0.5)
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x):
        return F.relu(self.norm(self, self.conv(x)) + x)


def by_function(self, x):
    return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training, 0.1, 1e-3)


def by_keywords(self, x):
    return F.batch_norm(x, running_var=self.var, running_mean=self.mean, weight=self.gamma)


def by_torch(self, x):
    return torch.batch_norm(x, self.gamma, self.beta, self.mean, self.var, self.training, 0.1, 1e-3, False)


def by_the_batch(self, x):
    return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, True)


def without_statistics(self, x):
    return F.batch_norm(x, None, None, self.gamma, self.beta, True)


def by_computed_vectors(self, x):
    return F.batch_norm(x, self.mean, self.var, self.gamma.abs() + 1e-3, self.beta, False)


def run(model, x):
    with torch.no_grad():
        return model(x)


NORM_MODULES = {
    "subclass": SubclassOfNorm, "mmcv's": NormOfAnything, "synchronised": nn.SyncBatchNorm, "lazy": lazy_norm,
    "without affine": functools.partial(nn.BatchNorm2d, affine=False),
    "of a cumulative average": functools.partial(SubclassOfNorm, momentum=None, eps=1e-2),
}  # fmt: skip
NORMS = {
    **{name: lambda make=make: nn.Sequential(nn.Conv2d(4, 4, 3), make(4), nn.ReLU()) for name, make in
       NORM_MODULES.items()},
    **{norm.__name__: functools.partial(NormInTheForward, norm) for norm in (by_function, by_keywords, by_torch)},
}  # fmt: skip


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_whatever_is_a_batch_norm_is_one(make):
    plain, x = networks.randomize(make()), torch.randn(2, 4, 6, 5)
    if isinstance(plain, nn.Sequential) and not isinstance(plain[1], nn.BatchNorm2d):
        plain[1].running_var.uniform_(0.5, 1.5), plain[1].running_mean.normal_()
    frozen, model = fused_resnet.freeze(plain, x), fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    (conv,) = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]
    assert (conv.problem.activation, conv.problem.has_residual) == ("relu", isinstance(plain, NormInTheForward))
    # nothing but the convolution is left
    assert [n.op for n in frozen.plan(x).graph.nodes] == ["placeholder", "call_module", "output"]
    assert len(convert.fused_convs(model)) == 1 and not convert.left_alone(model)
    as_good_as_plain(model, plain, x)
    as_good_as_plain(frozen, plain, x)
    with torch.no_grad():
        for network in (plain, model):  # read live
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.mul_(1.25) if tensor.is_floating_point() else None
    as_good_as_plain(model, plain, x)
    with pytest.raises(fused_resnet.BackendError, match="cannot run blocks with live BN"):
        fused_resnet.fuse(copy.deepcopy(plain), backend="onednn")


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_whatever_is_a_batch_norm_trains_as_it_did(make):
    plain, x = make().train(), torch.randn(3, 4, 6, 5)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    for network in (plain, model):
        network(x).square().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-4, msg=key) if p.grad is not None else None
    for p, q in zip(plain.buffers(), model.buffers()):
        assert torch.equal(p, q)


class RunningNorm(nn.Module):
    """A norm of somebody's own: unknown, but it looks like one."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.full((channels,), 0.7))

    def forward(self, x):
        return (x - self.running_mean[:, None, None]) * self.running_var[:, None, None]


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def parametrized_norm():
    return parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", Tripled())


class CheckingNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        input.mul_(2)


def _called_otherwise(norm):
    norm.register_forward_hook(lambda module, args, out: out + 1)
    return norm


UNFOLDED = {
    "own forward": (lambda: DoubledNorm(4), "the norm is DoubledNorm, not nn.BatchNorm2d"),
    "somebody's": (lambda: RunningNorm(4), "the norm is RunningNorm, not nn.BatchNorm2d"),
    "parametrized": (parametrized_norm, "the norm is ParametrizedBatchNorm2d, not nn.BatchNorm2d"),
    "own check": (lambda: CheckingNorm(4), "the norm is CheckingNorm, not nn.BatchNorm2d"),
    "no statistics": (lambda: SubclassOfNorm(4, track_running_stats=False), "the SubclassOfNorm keeps no running"),
    "hooks": (lambda: _called_otherwise(SubclassOfNorm(4)), "SubclassOfNorm has hooks"),
    **{norm.__name__: (functools.partial(NormInTheForward, norm), "its batch_norm uses the batch's statistics, or")
       for norm in (by_the_batch, without_statistics, by_computed_vectors)},
}  # fmt: skip


@pytest.mark.parametrize("make, reason", UNFOLDED.values(), ids=UNFOLDED)
def test_a_norm_that_is_not_folded_is_named(make, reason):
    norm = make()
    layers = [norm] if isinstance(norm, NormInTheForward) else [nn.Conv2d(4, 4, 3), norm]
    known = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    plain, x = networks.randomize(nn.Sequential(nn.Sequential(*layers), *known)), torch.randn(2, 4, 6, 5)
    expected = run(plain, x.clone())
    model = fused_resnet.fuse(copy.deepcopy(plain))
    torch.testing.assert_close(run(model, x.clone()), expected)
    ((where, why),) = convert.left_alone(model)
    assert where in ("0", "0.0") and why.startswith(reason)
    with pytest.raises(ValueError, match=f"{where}: {reason}"):
        fused_resnet.fuse(plain, strict=True)
    if getattr(norm, "norm", None) is by_the_batch:  # which updates the running statistics
        with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute"):
            fused_resnet.freeze(plain, x)
        return
    torch.testing.assert_close(run(fused_resnet.freeze(plain, x), x.clone()), expected)


def test_a_convolution_without_its_norm_is_named_beside_others_that_have_theirs():
    layers = nn.Conv2d(4, 4, 3), RunningNorm(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    model = fused_resnet.fuse(nn.Sequential(nn.Sequential(*layers)).eval())
    assert convert.fused_convs(model) == ["0.2"]
    assert convert.left_alone(model) == [("0.0", "the norm is RunningNorm, not nn.BatchNorm2d")]


def test_a_vector_may_be_written_before_the_activation():
    def norm(self, x):
        out = by_function(self, x)
        self.mean.add_(1)
        return out

    def forward(self, x):
        out = F.relu(self.norm(self, self.conv(x)))
        return out + self.mean[:, None, None]

    cls = type("Written", (NormInTheForward,), {"forward": forward})
    plain, x = cls(norm).eval(), torch.randn(2, 4, 6, 5)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert convert.fused_convs(model) == ["conv"]
    for _ in range(2):
        torch.testing.assert_close(run(model, x), run(plain, x))


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


def test_a_subclass_is_what_its_own_forward_says():
    plain = networks.small()
    plain.layer1[0].__class__ = Subclass
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert len(fused_blocks(model)) == 3 and isinstance(model.layer1[0], Rewritten)
    as_good_as_plain(model, plain, torch.randn(4, 3, 16, 16))
    assert type(fused_resnet.unfuse(model).layer1[0]) is Subclass


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match="strict=True and some blocks cannot be fused:\n  no convolution was found"):
        fused_resnet.fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), strict=True)


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


# ------------------------------------------------------------------------------------------------------- odd modules


class RefusesAttributes(Rewritable):
    """Frozen once it is made."""

    def __init__(self):
        super().__init__()
        self.eval()
        object.__setattr__(self, "is_made", True)

    def __setattr__(self, name, value):
        if self.__dict__.get("is_made"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


class KeepsAttributesInItsDictionary(Rewritable):
    def __setattr__(self, name, value):
        self.__dict__[name] = value


class RefusesDeletion(Rewritable):
    def __delattr__(self, name):
        raise AttributeError(name)


class WithSlots(Rewritable):
    __slots__ = ("one", "another")


class AnswersWithKeyErrors(Rewritable):
    def __getattr__(self, name):
        if name.isdigit():
            return super().__getattr__(name)
        raise KeyError(name)


class WithATrainingProperty(Rewritable):
    training = property(lambda self: False, lambda self, value: None)


class WithAMetaclass(Rewritable, metaclass=abc.ABCMeta):
    pass


class _Unasked(type):
    def __instancecheck__(cls, value):
        raise RuntimeError("isinstance")

    def __subclasscheck__(cls, value):
        raise RuntimeError("issubclass")


class NobodyAsksForItsClass(Rewritable, metaclass=_Unasked):
    pass


class RaisesOnEverything(Rewritable):
    """What Python asks of an object now and then."""

    def _raise(self, *_):
        raise RuntimeError("asked")

    __bool__ = __len__ = __repr__ = __eq__ = _raise
    __hash__ = nn.Module.__hash__


FUSED_THOUGH_ODD = (
    RefusesAttributes, KeepsAttributesInItsDictionary, RefusesDeletion, WithSlots, AnswersWithKeyErrors,
    WithATrainingProperty, WithAMetaclass, NobodyAsksForItsClass, RaisesOnEverything,
)  # fmt: skip


@pytest.mark.parametrize("kind", FUSED_THOUGH_ODD)
def test_odd_modules_are_fused(kind):
    """Past whatever they do when an attribute is set."""
    module = kind()
    model, x = nn.Sequential(module), torch.randn(2, 3, 6, 6)
    for inner in (*module.children(), *([] if kind is WithATrainingProperty else [module])):
        inner.__dict__["training"] = False
    before, expected = snapshot(model), model(x)
    assert convert.left_alone(model) == []
    unchanged(model, before)
    fused_resnet.fuse(model, backend="eager", strict=True)
    assert issubclass(type(module), Rewritten) and module.__dict__["_fused"].backend == "eager"
    assert convert.fused_convs(model) == ["0.0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    fused_resnet.unfuse(model)
    unchanged(model, before)


class NoSubclass(Rewritable):
    def __init_subclass__(cls):
        raise RuntimeError("it is final")


class NoFusedSubclass(Rewritable):
    def __init_subclass__(cls):
        if cls.__name__.startswith("Fused"):
            raise RuntimeError("no subclass of this name")


class _Final(type):
    def __new__(meta, name, bases, contents):
        if name.startswith("Fused"):
            raise TypeError("it is final")
        return super().__new__(meta, name, bases, contents)


class NoSubclassByMetaclass(Rewritable, metaclass=_Final):
    pass


class _Unhashable(type):
    __hash__ = None


class OfAnUnhashableClass(Rewritable, metaclass=_Unhashable):
    pass


class WithAClassOfItsOwn(Rewritable):
    __class__ = property(lambda self: nn.Linear)


class RefusesAList(Rewritable):
    def __dir__(self):
        raise RuntimeError("not this")


class WithABackendProperty(Rewritable):
    @property
    def backend(self):
        raise RuntimeError("not this")


class CountsPastItsOwnSetattr(Rewritable):
    def __init__(self):
        super().__init__()
        object.__setattr__(self, "count", 1000)

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "count" else super().__setattr__(name, value)

    def forward(self, x):
        self.count = self.count + 1000
        return super().forward(x)


class CountsPastSetattr(CountsPastItsOwnSetattr):
    def forward(self, x):
        object.__setattr__(self, "count", self.count + 1000)
        return Rewritable.forward(self, x)


class SetsWhatItHas(CountsPastItsOwnSetattr):
    def forward(self, x):
        self.count = True
        return Rewritable.forward(self, x)


LEFT_ALONE_AS_ODD = (
    (NoSubclass, "torch.fx cannot trace its forward: RuntimeError: it is final"),
    (NoFusedSubclass, "its class cannot be replaced: RuntimeError: no subclass of this name"),
    (NoSubclassByMetaclass, "its class cannot be replaced: TypeError: it is final"),
    (OfAnUnhashableClass, "torch.fx cannot trace its forward: TypeError: unhashable type: '_Unhashable'"),
    (WithAClassOfItsOwn, "it cannot be looked at: AttributeError: "),
    (RefusesAList, "it cannot be looked at: RuntimeError: not this"),
    (WithABackendProperty, "its attribute backend has a name that fused modules use for something else"),
    (CountsPastItsOwnSetattr, "its forward writes its attribute count"),
    (CountsPastSetattr, "its forward writes its attribute count"),
    (SetsWhatItHas, "its forward writes its attribute count"),
)


@pytest.mark.parametrize("kind, why", LEFT_ALONE_AS_ODD)
def test_odd_modules_are_left_alone_with_a_reason(kind, why):
    model = nn.Sequential(ConvBNAct(3, 3), kind(), BasicBlock(4, 4)).eval()
    before, values = snapshot(model), dict(model[1].__dict__)
    ((name, reason),) = convert.left_alone(model)
    assert name == "1" and reason.startswith(why)
    fused_resnet.fuse(model)
    assert type(model[1]) is kind and model[1].__dict__ == values
    assert convert.fused_convs(model) == ["0.0", "2.conv1", "2.conv2"]
    with pytest.raises(ValueError, match="strict=True and some blocks cannot be fused:\n  1: "):
        fused_resnet.fuse(model, strict=True)
    fused_resnet.unfuse(model)
    unchanged(model, before)


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


# --------------------------------------------------------------------------------------------- a fused model is a model


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


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.fixture
def fresh_dynamo():
    """Dynamo's counters, empty: its `reset` leaves them as an earlier test of this process made them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def operator_names(graph):
    return [
        node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "fused_resnet"
    ]


@pytest.mark.parametrize("training", (False, True))
def test_compile_keeps_the_operators_in_one_graph(training, fresh_dynamo):
    from torch._dynamo.testing import CompileCounterWithBackend

    plain = networks.small().train() if training else networks.randomize(models.resnet18(num_classes=10))
    model = fused_resnet.fuse(copy.deepcopy(plain))
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 48, 48)
        with torch.set_grad_enabled(training):
            actual, expected = compiled(x), plain(x)
        assert networks.error(actual, expected.double()) < 1e-4
    # ResNet-18: a stem, 8 blocks of two convolutions, 3 projections; in training one addition for each of the 4 blocks
    expected_names = ["add_relu"] * 4 if training else ["conv_bn_act"] * 20
    assert [operator_names(graph) for graph in backend.graphs] == [expected_names]
    assert backend.frame_count == 1 and not fresh_dynamo["graph_break"] and not fresh_dynamo["recompiles"]
    if training:
        actual.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters()):
            assert networks.error(q.grad, p.grad.double()) < 1e-3, name


@pytest.mark.full
def test_inductor_on_a_network(fresh_dynamo):
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        as_good_as_plain(compiled, plain, torch.randn(4, 3, 16, 16))
    assert not fresh_dynamo["graph_break"] and not fresh_dynamo["recompiles"]


def test_inductor_on_one_block(fresh_dynamo):
    """Strides of the fake outputs are those of the real ones where Inductor relies on them."""
    plain = networks.single()
    compiled = torch.compile(fused_resnet.fuse(copy.deepcopy(plain)), fullgraph=True)
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    actual, expected = compiled(x), plain(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual_grad, expected_grad = (torch.autograd.grad(out.square().sum(), x)[0] for out in (actual, expected))
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_exported_models_are_left_alone_with_the_reason():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), torch.randn(1, 3, 9, 9)
    exported = torch.export.export(model, (x,)).module()
    reason = "its convolutions are functions: fuse what it was exported from, or freeze it"
    assert convert.left_alone(exported) == [("the model", reason)]
    with pytest.raises(ValueError, match=reason):
        fused_resnet.fuse(exported, strict=True)
    assert not convert.left_alone(torch.export.export(fused_resnet.fuse(model), (x,)).module())


def test_export_keeps_the_operators(tmp_path):
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 16, 16)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert operator_names(program.graph_module) == ["conv_bn_act"] * (1 + 4 * 2 + 3)
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))


# -------------------------------------------------------------------------------------------------------- torch.fx


TRACED = {
    "basic block": lambda: BasicBlock(8, 8, 2, nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))),
    "bottleneck": lambda: Bottleneck(32, 8),
    "ConvBNAct": lambda: ConvBNAct(8, 8),
    "rewritten": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "network": lambda: networks.small(),
}


@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("tracer", (torch.fx.Tracer, quantize_fx.QuantizationTracer))
def test_a_trace_of_what_is_fused_is_that_of_the_plain(make, tracer):
    model = make().eval()
    arguments = ([], []) if tracer is quantize_fx.QuantizationTracer else ()
    plain = str(tracer(*arguments).trace(model))
    fused = tracer(*arguments).trace(fused_resnet.fuse(model, strict=True))
    assert str(fused) == plain
    assert not [node for node in fused.nodes if node.op != "output" and not node.users]


def test_a_trace_of_an_adapted_block_is_that_of_the_plain():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.act(self.bn(self.conv(x)))

    @adapters.register(f"{Layer.__module__}.{Layer.__qualname__}", reads="act bn conv", convs="conv")
    def layer(block, x):
        return conv_bn_act(x, block.conv, block.bn, block.act, backend=block.backend)

    try:
        model = Layer().eval()
        plain = str(torch.fx.symbolic_trace(model).graph)
        assert isinstance(fused_resnet.fuse(model), adapters.Adapted)
        assert str(torch.fx.symbolic_trace(model).graph) == plain
    finally:
        del adapters._ADAPTERS[f"{Layer.__module__}.{Layer.__qualname__}"]


# ---------------------------------------------------------------------------------------------------- quantization


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.act = nn.Conv2d(8, 8, 3), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.act(self.second(x)))


@pytest.mark.parametrize("fused_first", (True, False))
@pytest.mark.parametrize("train", (True, False))
def test_eager_quantization_goes_on_after_fuse(fused_first, train):
    """Observers, swaps by class and int8 kernels as without fuse; before and after torch's own fusing."""
    torch.manual_seed(0)
    model, x = networks.randomize(Quantizable()), torch.randn(4, 3, 12, 12)
    groups = [["conv", "bn", "relu"], ["second", "act"]]

    def quantized(model, fuse):
        if not fused_first:
            model = fuse(model)
        if train:
            model.train().qconfig = quantization.get_default_qat_qconfig("x86")
            quantization.fuse_modules_qat(model, groups, inplace=True)
        else:
            model.eval().qconfig = quantization.get_default_qconfig("x86")
            quantization.fuse_modules(model, groups, inplace=True)
        if fused_first:
            model = fuse(model)
        prepare = quantization.prepare_qat if train else quantization.prepare
        model = fuse(prepare(model))
        with torch.no_grad():
            model(x)
        return quantization.convert(model.eval())

    with torch.no_grad():
        expected = quantized(copy.deepcopy(model), lambda model: model)(x)
        got = quantized(copy.deepcopy(model), fused_resnet.fuse)(x)
    assert torch.equal(got, expected)


def test_modules_of_quantization_are_named_and_left_alone():
    model = Quantizable().eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.fuse_modules(model, [["conv", "bn", "relu"], ["second", "act"]], inplace=True)
    before = snapshot(model)
    fused_resnet.fuse(model)
    unchanged(model, before)
    found = dict(convert.left_alone(model))
    assert set(found) == {"conv", "second"}
    assert all("quantization knows a ConvReLU2d of torch.ao" in why for why in found.values())
