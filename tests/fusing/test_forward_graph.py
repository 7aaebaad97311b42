"""Forwards that are refused since a graph would not be all that they do, and are left as they were."""

import collections
import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet.fusing.convert import fused_convs
from tests.support.units import Unit, modules_only, unit

ALTERNATING = itertools.cycle((True, False))
FEATURES, NESTED, SEEN, LATEST = [], {"of": [[]]}, set(), collections.deque(maxlen=3)


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


def test_a_forward_of_the_instance_is_refused():
    module = unit(modules_only)
    module.forward = lambda x: x
    with pytest.raises(ValueError, match="the forward of UnitUnderTest was replaced"):
        fused_resnet.fuse(module, strict=True)
