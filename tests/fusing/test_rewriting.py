"""Rewritten forwards: what is fused in a module that nobody knows, what is refused, and when the original runs."""

import collections
import contextlib
import copy
import cProfile
import functools
import gc
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet.fusing import adapters
from fused_resnet.fusing.convert import fused_convs
from fused_resnet.fusing.rewriting import Rewritten
from fused_resnet.nn import conv_bn_act
from tests.support import networks

ALTERNATING = itertools.cycle((True, False))
FEATURES, NESTED, SEEN, LATEST = [], {"of": [[]]}, set(), collections.deque(maxlen=3)


class Config:
    scale = 2.0


class Stats:
    total, kept = 0, []

    def __init__(self):
        self.calls, self.outputs = 0, []

    def add(self, out):
        self.outputs.append(out)


STATS = Stats()


def outside():
    """What forwards could write beside their modules, and which objects these are."""
    nested = NESTED["of"]
    containers = (FEATURES, NESTED, nested, nested[0], SEEN, LATEST, STATS.outputs, Unit.history, Stats.kept)
    contents = [list(container) for container in containers]
    return contents, [id(container) for container in containers], STATS.calls, Stats.total, Unit.total


class Gain:
    """Callable, and its answer may change."""

    value = 2.0

    def __call__(self):
        return self.value


class Unit(nn.Module):
    """The children that the forwards below use. x: (N, 6, H, W)."""

    total, history = 0, []

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = (
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, eps=1e-3)
        self.drop, self.pool, self.stages = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.ModuleList([nn.Hardtanh()])
        self.writer, self.dropout = Writer(), nn.Dropout2d(0.5)
        self.nested = nn.ModuleList([nn.ModuleList([nn.Hardtanh()])])
        self.skip = None
        self.scale, self.taps, self.config, self.kept = 1.0, ["a"], Config(), None
        self.gain, self.memory = Gain(), {"last": []}
        self.gain_of, self.partial = self.gain.__call__, functools.partial(self.gain)

    def stem(self, x):
        return self.act(self.bn(self.conv(x)))


class Writer(nn.Module):
    calls = 0

    def forward(self, x):
        return x.mul_(3)


def unit(forward, **changes):
    """A module with this forward, in eval mode."""
    cls = type("UnitUnderTest", (Unit,), {"forward": forward})
    made = networks.randomize(cls())
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def rewritten(module):
    return fused_resnet.fuse(copy.deepcopy(module))


def same(actual, expected):
    # sums in another order, and a norm by another formula: 1e-6 was seen
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def run(module, x, *args, **kwargs):
    with torch.no_grad():
        return module(x.clone(), *args, **kwargs)


# -------------------------------------------------------------------------------------------------------- what is fused


def modules_only(self, x):
    return self.act(self.bn(self.conv(x)))


def functional_activation(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


def identity_between(self, x):
    return self.act(self.drop(self.bn(self.conv(x))))


def dropout_between(self, x):
    return self.act(self.dropout(self.bn(self.conv(x))))


def residual_of_both_kinds(self, x):
    out = self.bn2(self.conv2(self.stem(x)))
    out += x if self.skip is None else self.skip(x)
    return self.act(out)


def residual_without_activation(self, x):
    return x + self.bn2(self.conv2(self.stem(x)))


def through_a_method_and_a_list(self, x):
    out = self.stem(x)
    for stage in self.stages:
        out = stage(out)
    return self.bn2(self.conv2(out))


def one_convolution_twice(self, x):
    return self.act(self.bn(self.conv(self.stem(x))))


def through_a_nested_list(self, x):
    out = self.stem(x)
    for stages in self.nested:
        for stage in stages:
            out = stage(out)
    return out


def several_outputs(self, x):
    out = self.stem(x)
    return collections.OrderedDict(first=x, second=[out, self.bn2(self.conv2(out))])


def broadcast_sum(self, x):
    return self.act(self.bn2(self.conv2(self.pool(x))) + x)


def two_heads_of_one_convolution(self, x):
    out = self.conv(x)
    return self.act(self.bn(out)) + self.act(self.bn2(self.conv2(out)))


def optional_argument(self, x, scale=None):
    out = self.stem(x)
    return out if scale is None else out * scale


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


# ------------------------------------------------------------------------------------------------------ what is refused


def asks_for_the_class(self, x):
    return self.stem(x) if isinstance(x, torch.Tensor) else self.stem(x[0])


def asks_for_the_type_of_a_value(self, x):
    return self.stem(x) if type(x) is torch.Tensor else self.conv(x)


def asks_for_its_type(self, x):
    return self.stem(x) if type(self).__name__ == "UnitUnderTest" else self.conv(x)


def asks_for_its_class(self, x):
    return self.stem(x) if self.__class__.__name__ == "UnitUnderTest" else self.conv(x)


def asks_for_types_in_a_list(self, x):
    return [self.stem(x) if kind is nn.ReLU else x for kind in [type(child) for child in self.children()]]


def counts_in_its_class(self, x):
    Unit.total += 1
    return self.stem(x)


def adds_to_its_class(self, x):
    Unit.latest = 1
    return self.stem(x)


def appends_to_its_class(self, x):
    Unit.history.append(self.stem(x))
    return Unit.history[-1]


def counts_globally(self, x):
    global ALTERNATING
    ALTERNATING = ALTERNATING
    return self.stem(x)


def asks_for_autocast(self, x):
    return self.conv(x) if torch.is_autocast_enabled("cpu") else self.stem(x)


def asks_for_inference_mode(self, x):
    return self.conv(x) if torch.is_inference_mode_enabled() else self.stem(x)


def asks_for_the_gradient_mode(self, x):
    return self.conv(x) if torch.is_grad_enabled() else self.stem(x)


def asks_whether_it_is_traced(self, x):
    return self.conv(x) if torch.jit.is_tracing() else self.stem(x)


def asks_whether_it_is_compiled(self, x):
    return self.conv(x) if torch.compiler.is_compiling() else self.stem(x)


def asks_for_the_default_dtype(self, x):
    return self.stem(x).to(torch.get_default_dtype())


def recomputes(self, x):
    return checkpoint(self.stem, x, use_reentrant=False)


def turns_gradients_off(self, x):
    with torch.no_grad():
        return self.stem(x)


def turns_gradients_on(self, x):
    with torch.enable_grad():
        return self.stem(x)


def leaves_autocast(self, x):
    with torch.autocast("cpu", enabled=True):
        return self.stem(x)


def keeps_a_tensor(self, x):
    self.kept = self.stem(x)
    return self.kept


def appends_to_an_attribute(self, x):
    self.taps.append(self.stem(x))
    return self.taps[-1]


def looks_at_values(self, x):
    return self.stem(x) if x.sum() > 0 else self.conv(x)


def looks_at_the_shape(self, x):
    return self.stem(x) if x.shape[-1] > 3 else self.conv(x)


def does_not_repeat_itself(self, x):
    return self.stem(x) if next(ALTERNATING) else 2 * self.stem(x)


def reads_an_object(self, x):
    return self.stem(x) * self.config.scale


def draws_a_number(self, x):
    return self.stem(x) if random.random() < 2 else self.conv(x)


def draws_a_tensor(self, x):
    return self.stem(x) if torch.rand(1).item() < 2 else self.conv(x)


def draws_from_numpy(self, x):
    return self.stem(x) if np.random.rand() < 2 else self.conv(x)


def looks_at_a_buffer(self, x):
    return self.stem(x) if self.bn.num_batches_tracked > 0 else self.conv(x)


def looks_at_an_item(self, x):
    return self.stem(x) if self.bn.num_batches_tracked.item() > 0 else self.conv(x)


def calls_an_object(self, x):
    return self.stem(x) * self.gain()


def calls_a_method_of_an_object(self, x):
    return self.stem(x) * self.gain_of()


def calls_a_partial(self, x):
    return self.stem(x) * self.partial()


def writes_a_child(self, x):
    self.bn.seen = True
    return self.stem(x)


def counts_in_a_child(self, x):
    self.writer.calls += 1
    return self.stem(x)


def writes_a_nested_container(self, x):
    self.memory["last"].append(self.stem(x))
    return self.memory["last"][-1]


def adds_a_module(self, x):
    self.stages.append(self.act)
    return self.stem(x)


def hides_its_write(self, x):
    with contextlib.suppress(Exception):
        self.kept = 1
    return self.stem(x)


def swallows_a_branch(self, x):
    out = self.stem(x)
    with contextlib.suppress(Exception):
        if out.sum() > 0:
            return out * 3
    return out


def swallows_a_loop(self, x):
    with contextlib.suppress(Exception):
        return sum(self.stem(row) for row in x)
    return self.stem(x)


def swallows(question):
    def forward(self, x):
        out = self.stem(x)
        try:
            return out * question(out)
        except Exception:
            return out

    return forward


swallows_a_float = swallows(lambda out: float(out.sum()))
swallows_an_int = swallows(lambda out: int(out.sum()))
swallows_a_length = swallows(lambda out: len(out))
swallows_the_length_of_a_shape = swallows(lambda out: len(out.shape))
swallows_keys = swallows(lambda out: 2 if dict(**out) else 1)
swallows_a_class = swallows(lambda out: 2 if isinstance(out, torch.Tensor) else 1)
swallows_the_class_of_a_shape = swallows(lambda out: 2 if isinstance(out.shape, tuple) else 1)
swallows_a_tensor = swallows(lambda out: torch.full((1,), 2.0))
swallows_an_array = swallows(lambda out: float(np.asarray(out).sum()))
swallows_no_array = swallows(torch.from_numpy)
swallows_a_size = swallows(lambda out: torch.arange(out.shape[0]).sum())
swallows_a_strange_module = swallows(lambda out: STRANGE(out))
STRANGE = nn.Hardtanh()


def appends_to_a_global(self, x):
    FEATURES.append(self.stem(x))
    return FEATURES[-1]


def appends_deep_in_a_global(self, x):
    NESTED["of"][0].append(1)
    return self.stem(x)


def adds_to_a_global_set(self, x):
    SEEN.add("call")
    return self.stem(x)


def appends_to_a_global_deque(self, x):
    LATEST.append(1)
    return self.stem(x)


def counts_in_a_global_object(self, x):
    STATS.calls += 1
    return self.stem(x)


def calls_a_global_object(self, x):
    STATS.add(1)
    return self.stem(x)


def counts_in_another_class(self, x):
    Stats.total += 1
    return self.stem(x)


def appends_to_another_class(self, x):
    Stats.kept.append(1)
    return self.stem(x)


def _keep(out):
    FEATURES.append(1)
    return out


def appends_in_a_helper(self, x):
    return _keep(self.stem(x))


def _is_tensor(*values):
    return type(values[0]) is torch.Tensor


def asks_in_a_helper(self, x):
    return self.stem(x) if _is_tensor(x) else self.conv(x)


def asks_for_determinism(self, x):
    return self.conv(x) if torch.are_deterministic_algorithms_enabled() else self.stem(x)


def takes_two(self, x, y):
    return self.stem(x) + y


def takes_any_number(self, *x):
    return self.stem(x[0])


def nothing_follows(self, x):
    return self.conv(x).sigmoid() + self.bn(x)


REFUSED = {
    asks_for_the_class: "asks for the class of a value", asks_for_the_type_of_a_value: "asks for the class of a value",
    asks_for_its_type: "class of a value or a module", asks_for_its_class: "class of a value or a module",
    asks_for_types_in_a_list: "class of a value or a module", counts_in_its_class: "writes total, an attribute of",
    adds_to_its_class: "writes latest, an attribute of", appends_to_its_class: "writes history, an attribute of",
    counts_globally: "writes the global variable ALTERNATING", asks_for_autocast: r"asks torch is_autocast_enabled\(\)",
    asks_for_inference_mode: "asks torch is_inference_mode", asks_for_the_gradient_mode: "does not do the same each",
    asks_whether_it_is_traced: "asks torch is_tracing", asks_whether_it_is_compiled: "asks torch is_compiling",
    asks_for_the_default_dtype: "asks torch get_default_dtype", recomputes: "recomputes its activations",
    turns_gradients_off: "changes the gradient mode",
    turns_gradients_on: "changes the gradient mode", leaves_autocast: "changes the gradient mode or autocast",
    keeps_a_tensor: "writes its attribute kept", appends_to_an_attribute: "writes its attribute taps",
    looks_at_values: "torch.fx cannot trace its forward", looks_at_the_shape: "torch.fx cannot trace its forward",
    does_not_repeat_itself: "does not do the same each time", reads_an_object: "reads its attribute config, a Config",
    draws_a_number: "draws random numbers", draws_a_tensor: "draws random numbers",
    draws_from_numpy: "draws random numbers", looks_at_a_buffer: "torch.fx cannot trace its forward",
    looks_at_an_item: "torch.fx cannot trace its forward", calls_an_object: "reads its attribute gain, a Gain",
    calls_a_method_of_an_object: "reads its attribute gain_of, a method",
    calls_a_partial: "reads its attribute partial, a partial", writes_a_child: "writes its attribute bn.seen",
    counts_in_a_child: "writes its attribute writer.calls", hides_its_write: "writes its attribute kept",
    writes_a_nested_container: "writes its attribute memory", adds_a_module: "writes its attribute stages._modules",
    takes_two: "does not take exactly one tensor", takes_any_number: "does not take exactly one tensor",
    nothing_follows: "followed by a BN or an activation",
    swallows_a_branch: "torch.fx cannot trace its forward: TraceError", swallows_a_loop: "TraceError",
    swallows_a_float: "looks at a value", swallows_an_int: "looks at a value", swallows_a_length: "looks at a value",
    swallows_the_length_of_a_shape: "looks at a value", swallows_keys: "torch.fx cannot trace its forward: TraceError",
    swallows_a_class: "asks for the class of a value", swallows_the_class_of_a_shape: "asks for the class of a value",
    swallows_a_tensor: "makes a tensor", swallows_a_size: "asks for the class of a value",
    swallows_an_array: "looks at a value", swallows_no_array: r"fails in torch's from_numpy\(\)",
    swallows_a_strange_module: "torch.fx cannot trace its forward: NameError",
    appends_to_a_global: "writes FEATURES, outside", appends_deep_in_a_global: "writes NESTED, outside",
    adds_to_a_global_set: "writes SEEN, outside", appends_to_a_global_deque: "writes LATEST, outside",
    counts_in_a_global_object: "writes STATS, outside", calls_a_global_object: "writes STATS, outside",
    counts_in_another_class: "writes total, an attribute of a class",
    appends_to_another_class: "writes kept, an attribute of a class", appends_in_a_helper: "writes FEATURES, outside",
    asks_in_a_helper: "class of a value or a module", asks_for_determinism: "asks torch are_deterministic_algorithms",
}  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED)
def test_what_is_refused_is_as_before(forward):
    module = unit(forward)
    before, around = [dict(child.__dict__) for child in module.modules()], outside()
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(ValueError, match=f"the model: .*{REFUSED[forward]}"):
        fused_resnet.fuse(module, strict=True)
    assert type(fused_resnet.fuse(module)).__name__ == "UnitUnderTest" and not fused_convs(module)
    assert generators == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    after = [dict(child.__dict__) for child in module.modules()]
    after[0].pop("backend", None)
    assert after == before and outside() == around
    assert module.taps == ["a"] and module.memory == {"last": []} and len(module.stages) == 1
    assert not hasattr(Unit, "latest")


@pytest.mark.parametrize("is_helper", (False, True))
def test_a_nonlocal_variable_is_not_counted(is_helper):
    calls = 0

    def count():
        nonlocal calls
        calls += 1

    def forward(self, x):
        nonlocal calls
        calls += 1
        return self.stem(x)

    def calls_a_helper(self, x):
        count()
        return self.stem(x)

    with pytest.raises(ValueError, match="writes the nonlocal variable calls"):
        fused_resnet.fuse(unit(calls_a_helper if is_helper else forward), strict=True)
    assert calls == 0


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


def test_freezing_leaves_the_model_as_it_was():
    def forward(self, x):
        self.kept = self.stem(x)
        self.taps.append(self.kept)
        self.writer.calls += 1
        self.bn2.num_batches_tracked.add_(1)
        return self.kept

    module = unit(forward)
    before = [dict(child.__dict__) for child in module.modules()]
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute taps"):
        fused_resnet.freeze(module, torch.randn(1, 6, 4, 4))
    assert [dict(child.__dict__) for child in module.modules()] == before
    assert module.taps == ["a"] and module.bn2.num_batches_tracked == 0


def test_a_forward_of_the_instance_is_refused():
    module = unit(modules_only)
    module.forward = lambda x: x
    with pytest.raises(ValueError, match="the forward of UnitUnderTest was replaced"):
        fused_resnet.fuse(module, strict=True)


# -------------------------------------------------------------------------------------------- when the original runs


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


def test_other_calls_run_the_original():
    plain = unit(optional_argument)
    model, x = rewritten(plain), torch.randn(1, 6, 4, 4)
    same(run(model, x, 3.0), run(plain, x, 3.0))
    same(run(model, x, scale=2.0), run(plain, x, scale=2.0))
    with torch.no_grad():
        same(model(x=x), plain(x=x))
    with pytest.raises(TypeError):
        model([x])


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
    program = model._fused.programs[False]
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


# ------------------------------------------------------------------------------------------------------------- adapters


class ListUnit(nn.Module):
    """Takes a list, which no trace covers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.twice = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), False

    def forward(self, xs):
        if not isinstance(xs, list):
            raise TypeError("a list")
        out = self.relu(self.bn(self.conv(torch.cat(xs, 1))))
        return out * 2 if self.twice else out


@pytest.fixture
def registered():
    reads = "isinstance list TypeError relu bn conv torch cat twice"

    @adapters.register(f"{__name__}.ListUnit", reads=reads, convs="conv")
    def list_unit(unit, xs):
        if unit.twice:
            return NotImplemented
        return conv_bn_act(torch.cat(xs, 1), unit.conv, unit.bn, unit.relu, backend=unit.backend)

    yield list_unit
    del adapters._ADAPTERS[f"{__name__}.ListUnit"]


def test_an_adapter_computes_and_steps_aside(registered):
    plain = networks.randomize(ListUnit())
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True, backend="eager")
    assert isinstance(model, adapters.Adapted) and fused_convs(model) == ["conv"] and model.backend == "eager"
    xs = [torch.randn(1, 2, 4, 4), torch.randn(1, 4, 4, 4)]
    with torch.no_grad():
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fused_resnet.fuse(model)):
            assert type(copied) is type(model)
            same(copied(xs), plain(xs))
        for module in (model, plain):
            module.twice = True
        same(model(xs), plain(xs))
        for module in (model, plain):
            module.twice = False
            module.bn.register_forward_hook(lambda _, args, out: -out)
        same(model(xs), plain(xs))
    assert type(fused_resnet.unfuse(model)) is ListUnit


def test_without_an_adapter_it_is_left_alone():
    with pytest.raises(ValueError, match="the model: its forward asks for the class of a value"):
        fused_resnet.fuse(ListUnit().eval(), strict=True)


def test_an_adapter_is_not_for_a_patched_forward(registered, monkeypatch):
    stock = ListUnit.forward
    monkeypatch.setattr(ListUnit, "forward", lambda self, xs: -stock(self, xs))
    with pytest.raises(ValueError, match="the forward of ListUnit was replaced"):
        fused_resnet.fuse(ListUnit().eval(), strict=True)
    model = ListUnit().eval()
    assert type(fused_resnet.fuse(model)) is ListUnit


def test_an_adapter_is_not_for_a_block_that_has_a_name_of_ours_or_pickles_itself(registered, monkeypatch):
    block = ListUnit().eval()
    block.backend = "the user's"
    with pytest.raises(ValueError, match="its attribute backend has a name that fused modules use"):
        fused_resnet.fuse(block, strict=True)
    assert type(fused_resnet.unfuse(fused_resnet.fuse(block))) is ListUnit and block.backend == "the user's"
    monkeypatch.setattr(ListUnit, "__reduce__", lambda self: (ListUnit, ()), raising=False)
    with pytest.raises(ValueError, match="ListUnit has its own way to be pickled"):
        fused_resnet.fuse(ListUnit().eval(), strict=True)


def test_a_subclass_has_no_adapter(registered):
    class Doubled(ListUnit):
        def forward(self, xs):
            return 2 * super().forward(xs)

    with pytest.raises(ValueError, match="asks for the class of a value"):
        fused_resnet.fuse(Doubled().eval(), strict=True)
