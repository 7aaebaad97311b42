"""Rewritten forwards: what is fused in a module that nobody knows, and that it stays a module."""

import collections
import copy
import cProfile
import gc
import pickle

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.fusing.convert import fused_convs
from fused_resnet.fusing.rewriting import Rewritten
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


def dropout_between(self, x):
    return self.act(self.dropout(self.bn(self.conv(x))))


def residual_without_activation(self, x):
    return x + self.bn2(self.conv2(self.stem(x)))


def one_convolution_twice(self, x):
    return self.act(self.bn(self.conv(self.stem(x))))


def several_outputs(self, x):
    out = self.stem(x)
    return collections.OrderedDict(first=x, second=[out, self.bn2(self.conv2(out))])


def broadcast_sum(self, x):
    return self.act(self.bn2(self.conv2(self.pool(x))) + x)


def two_heads_of_one_convolution(self, x):
    out = self.conv(x)
    return self.act(self.bn(out)) + self.act(self.bn2(self.conv2(out)))


def asks_what_is_always_so(self, x):
    return -self.conv(x) if torch.jit.is_scripting() or not isinstance(self, Unit) else self.stem(x)


FUSED = {
    modules_only: ["conv"], functional_activation: ["conv"], identity_between: ["conv"], dropout_between: ["conv"],
    residual_of_both_kinds: ["conv", "conv2"], residual_without_activation: ["conv", "conv2"],
    through_a_method_and_a_list: ["conv", "conv2"], several_outputs: ["conv", "conv2"],
    one_convolution_twice: ["conv"], through_a_nested_list: ["conv"], broadcast_sum: ["conv2"],
    two_heads_of_one_convolution: ["conv2"], optional_argument: ["conv"], asks_what_is_always_so: ["conv"],
}  # fmt: skip


@pytest.mark.parametrize("forward", FUSED)
@pytest.mark.parametrize("training", (False, True))
def test_what_is_fused_is_right(forward, training):
    plain = unit(forward)
    model = rewritten(plain).train(training)
    plain.train(training)
    assert isinstance(model, Rewritten) and isinstance(model, type(plain)) and fused_convs(model) == FUSED[forward]
    x, results = torch.randn(2, 6, 5, 7), []
    for module in (model, plain):
        torch.manual_seed(0)
        results.append(run(module, x))
    actual, expected = results
    assert type(actual) is type(expected)
    same(actual, expected)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


@pytest.mark.parametrize("training", (False, True))
def test_gradients(training):
    plain = unit(residual_of_both_kinds).train(training)
    model = rewritten(plain)
    x = torch.randn(3, 6, 5, 7)
    for module in (plain, model):
        module(x).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            same(q.grad, p.grad)


def test_a_residual_is_part_of_the_call(monkeypatch):
    calls = []
    function = fused_resnet.functional.conv_bn_act
    monkeypatch.setattr(
        fused_resnet.functional,
        "conv_bn_act",
        lambda *args, **kw: calls.append((kw["activation"], kw["residual"] is not None)) or function(*args, **kw),
    )
    run(rewritten(unit(residual_of_both_kinds)), torch.randn(1, 6, 4, 4))
    assert calls == [("relu", False), ("relu", True)]
    calls.clear()
    run(rewritten(unit(broadcast_sum)), torch.randn(1, 6, 4, 4))
    assert calls == [], "a sum that broadcasts is no residual"


def written_by_a_child(self, x):
    out = self.bn(self.conv(x))
    self.writer(x)
    return self.act(out) + x


def residual_written_before_the_activation(self, x):
    skip = x * 2
    out = self.bn(self.conv(x)) + skip
    skip.mul_(5)
    return self.act(out) + skip


def written_before_the_sum(self, x):
    out = self.bn(self.conv(x))
    skip = self.writer(x)
    return self.act(out + skip)


@pytest.mark.parametrize(
    "forward", (written_by_a_child, residual_written_before_the_activation, written_before_the_sum)
)
def test_no_convolution_moves_past_a_write_to_what_it_reads(forward):
    plain = unit(forward)
    model = rewritten(plain)
    assert fused_convs(model) == ["conv"]
    x = torch.randn(2, 6, 5, 7)
    same(run(model, x), run(plain, x))


def written_by_a_convolution(self, x):
    out = self.bn(self.conv(x))
    return self.act(out + self.conv2(x))


def test_a_convolution_with_an_arithmetic_of_its_own_may_write():
    plain = unit(written_by_a_convolution)
    plain.conv2._conv_forward = lambda x, weight, bias: x.mul_(3)
    model = rewritten(plain)
    assert fused_convs(model) == ["conv"]
    x = torch.randn(2, 6, 5, 7)
    same(run(model, x), run(plain, x))


def norm_called_again_before_the_activation(self, x):
    out = self.bn(self.conv(x))
    return self.bn(self.conv2(x)), self.act(out)


def test_a_norm_is_called_in_the_order_of_the_forward():
    """Its running statistics are those of the plain module, of which the last call counts most."""
    plain = unit(norm_called_again_before_the_activation).train()
    fused, x = rewritten(plain), torch.randn(2, 6, 8, 8)
    for actual, expected in zip(run(fused, x), run(plain, x)):
        same(actual, expected)
    assert type(fused).__mro__[1] is Rewritten
    same(fused.bn.running_mean, plain.bn.running_mean)
    same(fused.bn.running_var, plain.bn.running_var)


# ----------------------------------------------------------------------------------------------------- beside the calls


def collects_garbage(self, x):
    gc.collect()
    return self.stem(x)


def test_a_callback_of_the_garbage_collector_is_not_the_forwards():
    elsewhere = {"__name__": "elsewhere", "runs": 0}
    exec("def callback(phase, info):\n    global runs\n    runs += 1", elsewhere)
    gc.callbacks.append(elsewhere["callback"])
    try:
        assert fused_convs(fused_resnet.fuse(unit(collects_garbage))) == ["conv"] and elsewhere["runs"]
    finally:
        gc.callbacks.remove(elsewhere["callback"])


def test_a_running_profile_goes_on():
    def after_fusing():
        pass

    profile = cProfile.Profile()
    profile.enable()
    try:
        assert fused_convs(fused_resnet.fuse(unit(modules_only))) == ["conv"]
        after_fusing()
    finally:
        profile.disable()
    assert "after_fusing" in {getattr(entry.code, "co_name", "") for entry in profile.getstats()}


def counts_a_buffer(self, x):
    self.bn2.num_batches_tracked.add_(1)
    return self.stem(x) * self.bn2.num_batches_tracked


def test_a_buffer_is_part_of_the_graph():
    plain = unit(counts_a_buffer)
    model, x = rewritten(plain), torch.randn(1, 6, 4, 4)
    assert fused_convs(model) == ["conv"] and model.bn2.num_batches_tracked == 0
    for calls in (1, 2):
        same(run(model, x), run(plain, x))
        assert model.bn2.num_batches_tracked == calls


# ------------------------------------------------------------------------------------------------- sums and activations


def augmented_sum(self, x):
    out = self.bn(self.conv(x))
    out += x.to(self.dtype)
    return self.act(out)


def plain_sum(self, x):
    return self.act(self.bn(self.conv(x)) + x.to(self.dtype))


def sum_into_the_earlier(self, x):
    out = self.bn(self.conv(x))
    shortcut = self.bn2(self.conv2(x))
    out += shortcut
    return self.act(out)


def sum_into_the_earlier_and_larger(self, x):
    out = self.bn(self.conv(x))
    shortcut = self.bn2(self.conv2(self.pool(x)))
    out += shortcut
    return self.act(out)


@pytest.mark.parametrize("forward", (augmented_sum, plain_sum, sum_into_the_earlier, sum_into_the_earlier_and_larger))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("training", (False, True))
def test_a_sum_has_the_dtype_of_the_forward(forward, dtype, autocast, training):
    plain = unit(forward, dtype=dtype).train(training)
    model, x = rewritten(plain), torch.randn(2, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = run(model, x), run(plain, x)
    assert "conv" in fused_convs(model) and actual.dtype == expected.dtype
    tolerance = 1e-5 if actual.dtype == dtype == torch.float32 and not autocast else 0.05  # bf16: an ULP of the terms
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def activation_written_into(self, x):
    out = self.written(self.bn(self.conv(x)))
    out += x
    return out


@pytest.mark.parametrize("activation", (nn.ReLU6, nn.SiLU))
@pytest.mark.parametrize("training", (False, True))
def test_an_activation_may_be_written_into(activation, training):
    plain = unit(activation_written_into, written=activation()).train(training)
    model, x = rewritten(plain), 10 * torch.randn(2, 6, 5, 7)
    assert fused_convs(model) == ["conv"]
    gradients = []
    for module in (plain, model):
        module(x.clone()).square().mean().backward()
        gradients.append([p.grad for p in (*module.conv.parameters(), *module.bn.parameters())])
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------- a fused module is a module


@pytest.mark.parametrize("kind", (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))))
def test_copies_and_pickles(kind):
    plain = networks.randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    model = fused_resnet.fuse(copy.deepcopy(plain), backend="eager")
    copied, x = kind(model), torch.randn(1, 3, 5, 5)
    assert type(copied) is type(model) and copied.backend == "eager" and fused_convs(copied) == ["0"]
    assert torch.equal(run(copied, x), run(model, x))
    assert type(fused_resnet.unfuse(copied)) is nn.Sequential and isinstance(model, Rewritten)
    assert copied.__dict__.keys() == plain.__dict__.keys()
    assert list(model.state_dict()) == list(plain.state_dict())


def test_slices_of_a_fused_sequential():
    plain = networks.randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(1, 3, 5, 5)
    same(run(model[:2], x), run(plain[:2], x))
    same(run(model, x), run(plain, x))


def test_hooks_of_the_module_fire_once_and_unfuse_keeps_them():
    model, seen = unit(modules_only), []
    model.register_forward_hook(lambda *_: seen.append("fused"))
    fused_resnet.fuse(model)
    run(model, torch.randn(1, 6, 4, 4))
    run(fused_resnet.unfuse(model), torch.randn(1, 6, 4, 4))
    assert seen == ["fused"] * 2


def test_fusing_again_changes_the_backend_and_sees_a_new_structure():
    model = fused_resnet.fuse(unit(through_a_method_and_a_list))
    model.stages.append(nn.Tanh())
    fused_resnet.fuse(model, backend="eager")
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    assert model.backend == "eager" and isinstance(model, Rewritten)
    x = torch.randn(1, 6, 4, 4)
    program = model._fused_resnet.programs[False]
    assert program.holds(model, (x,)), "the program is of the new structure"
    same(run(model, x), run(plain, x))


def test_compile_in_one_graph():
    torch._dynamo.reset()
    plain = unit(residual_of_both_kinds)
    model = rewritten(plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 5, 7)
    same(run(compiled, x), run(plain, x))
    for module in (model, plain):
        module.skip = nn.Hardtanh()
    same(run(compiled, x), run(plain, x))
    torch._dynamo.reset()


def test_functional_call():
    plain, other = unit(residual_of_both_kinds), unit(residual_of_both_kinds)
    x = torch.randn(2, 6, 5, 7)
    with torch.no_grad():
        same(torch.func.functional_call(rewritten(plain), dict(other.state_dict()), (x,)), other(x))


def test_a_fused_module_freezes_like_the_plain_one():
    plain = unit(residual_of_both_kinds)
    x = torch.randn(2, 6, 5, 7)
    same(fused_resnet.freeze(rewritten(plain), x)(x), run(plain, x))
