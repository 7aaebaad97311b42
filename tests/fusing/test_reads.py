"""When the original forward runs: what it read has changed since, or it is called otherwise."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.fusing.convert import fused_convs
from tests.support import networks
from tests.support.units import (
    Unit,
    functional_activation,
    identity_between,
    modules_only,
    optional_argument,
    residual_of_both_kinds,
    rewritten,
    run,
    same,
    through_a_method_and_a_list,
    through_a_nested_list,
    unit,
)


def scaled(self, x):
    return self.stem(x) * 2 if self.scale > 1 else self.stem(x)


def tapped(self, x):
    return self.stem(x) * len(self.taps)


def reads_of_children(self, x):
    assert self.dropout.p < 1 and self.conv.stride == (1, 1)
    out = self.stem(x)
    return out if self.bn.training else out * self.bn2.eps * 1000


def reads_of_a_grandchild(self, x):
    return self.stem(x) if self.nested[0][0].min_val < 0 else self.stem(x) * 2


def calls_a_forward(self, x):
    return self.act(self.bn(self.conv2.forward(self.stem(x))))


def _set(name, attribute, value):
    return lambda module: setattr(module.get_submodule(name), attribute, value)


def _scale(module):
    module.scale = 2.0


def _tap(module):
    module.taps.append("b")


def _skip(module):
    module.skip = nn.Hardtanh()


def _stage(module):
    module.stages.append(nn.Tanh())


def _nested(module):
    module.nested[0].append(nn.Tanh())


def _replace_stage(module):
    module.stages[0] = nn.Tanh()


def _patch_class(module):
    plain = getattr(module, "plain_class", type(module))
    plain.forward = lambda self, x: 3 * self.stem(x)


def _patch_instance(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def _method(module):
    module.stem = lambda x: x


def _identity(module):
    module.drop = nn.Hardtanh()


def _hook(name):
    return lambda module: module.get_submodule(name).register_forward_hook(lambda _, args, out: 2 * out)


def _replace(name, make):
    return lambda module: setattr(module, name, make())


def _pooled(module):
    module.conv = nn.Sequential(nn.AvgPool2d(3, 1, 1), module.conv)


CHANGES = (
    (reads_of_children, _set("bn2", "eps", 0.5)), (reads_of_children, lambda module: module.bn.train()),
    (reads_of_a_grandchild, _set("nested.0.0", "min_val", 0)), (calls_a_forward, _set("conv2", "padding", (1, 1))),
    (scaled, _scale), (tapped, _tap), (residual_of_both_kinds, _skip), (through_a_method_and_a_list, _stage),
    (through_a_method_and_a_list, _replace_stage), (through_a_nested_list, _nested),
    (modules_only, _patch_class), (modules_only, _patch_instance),
    (functional_activation, _hook("bn")), (scaled, _method), (identity_between, _identity),
    (identity_between, _hook("drop")), (modules_only, _hook("conv")), (modules_only, _hook("act")),
    (modules_only, _replace("act", nn.Tanh)), (modules_only, _pooled),
    (residual_of_both_kinds, _replace("bn2", lambda: nn.InstanceNorm2d(6))),
    (residual_of_both_kinds, _replace("conv2", lambda: nn.LazyConv2d(6, 1))),
)  # fmt: skip


@pytest.mark.parametrize("forward, change", CHANGES)
def test_what_changes_after_fusing_has_its_effect(forward, change):
    first, second = unit(forward), unit(forward)  # of a class each
    second.load_state_dict(first.state_dict())
    plain, model = first, fused_resnet.fuse(second)
    x = torch.randn(2, 6, 5, 7)
    before = run(plain, x)
    same(run(model, x), before)
    for module in (plain, model):
        torch.manual_seed(0)
        change(module)
        torch.manual_seed(0)
        run(module, x)  # a lazy module draws its weights now
    changed = run(plain, x)
    assert changed.shape != before.shape or not torch.allclose(changed, before, rtol=1e-3), "the change must matter"
    same(run(model, x), run(plain, x))


def test_a_replaced_forward_of_a_parent_is_run():
    class Parent(Unit):
        def forward(self, x):
            return self.stem(x)

    class Child(Parent):
        def forward(self, x):
            return super().forward(x)

    model, x = fused_resnet.fuse(networks.randomize(Child())), torch.randn(1, 6, 4, 4)
    before = run(model, x)
    assert fused_convs(model) == ["conv"]
    Parent.forward = lambda self, x: 3 * self.stem(x)
    same(run(model, x), 3 * before)


def through_two_convolutions(self, x):
    return self.act(self.bn(self.conv(x))) + self.conv2(x)


def through_two_parameters(self, x):
    return self.stem(x) * self.gain1 + self.gain2


def through_a_list(self, x):
    for stage in self.stages:
        x = stage(x)
    return self.stem(x)


TIED = (
    (through_two_convolutions, "conv", "conv2", lambda: nn.Conv2d(6, 6, 3, padding=1, bias=False)),
    (through_two_parameters, "gain1", "gain2", lambda: nn.Parameter(torch.rand(()))),
    (through_a_list, "stages.0", "stages.1", lambda: nn.Conv2d(6, 6, 1)),
)


@pytest.mark.parametrize("forward, first, second, make", TIED)
def test_what_was_one_and_becomes_two(forward, first, second, make):
    """Or the other way round: a graph has one name for what was the same module or tensor."""
    plain = unit(forward)

    def put(module, name, value):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, value)

    one, other = make(), make()
    put(plain, first, one)
    put(plain, second, one)
    apart = copy.deepcopy(plain)
    put(apart, second, other)
    x, tied, untied = torch.randn(2, 6, 5, 7), rewritten(plain), rewritten(apart)
    assert fused_convs(tied) == fused_convs(untied) == ["conv"]
    same(run(tied, x), run(plain, x))
    assert not torch.allclose(run(plain, x), run(apart, x)), "the change must matter"
    put(tied, second, other)
    same(run(tied, x), run(apart, x))
    put(untied, second, untied.get_submodule(first) if "." in first else getattr(untied, first))
    same(run(untied, x), run(plain, x))


def test_other_calls_run_the_original():
    plain = unit(optional_argument)
    model, x = rewritten(plain), torch.randn(1, 6, 4, 4)
    same(run(model, x, 3.0), run(plain, x, 3.0))
    same(run(model, x, scale=2.0), run(plain, x, scale=2.0))
    with torch.no_grad():
        same(model(x=x), plain(x=x))
    with pytest.raises(TypeError):
        model([x])
