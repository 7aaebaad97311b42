"""Whatever is a batch norm is fused and folded as one; another norm is named."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import fused_resnet
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.fusing import convert
from tests.support import networks
from tests.support.fused import DoubledNorm, as_good_as_plain


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
