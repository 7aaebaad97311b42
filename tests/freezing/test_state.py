"""freeze: forwards that keep something."""

import array
import contextlib
import copy
import functools
import logging
import operator
import random
import sys
import threading
import tracemalloc
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from tests.support.plans import frozen_equals
from tests.support.units import unit

COUNT, KEPT = 0, []


class Keeps(nn.Module):
    """A convolution, and something that `write` may write to before it."""

    calls = 0

    def __init__(self, write):
        super().__init__()
        self.write, self.conv, self.child = write, nn.Conv2d(4, 4, 1), nn.ReLU()
        self.register_buffer("n", torch.zeros(1))
        self.scale, self.child.calls = nn.Parameter(torch.ones(4, 1, 1)), 0
        self.k, self.seen, self.named, self.plain = 0, [], {}, torch.zeros(1)
        self.random, self.generator, self.numbers = random.Random(0), torch.Generator(), iter([1, 2, 3, 4])
        self.array = array.array("d", [0, 0])

    def forward(self, x):
        factor = self.write(self, x)
        return self.conv(x) if factor is None else self.conv(x) * factor


def adds_in_place(m, x):
    m.n += 1
    return m.n


def counts_globally(m, x):
    global COUNT
    COUNT += 1


def counts_around():
    calls = 0

    def count(m, x):
        nonlocal calls
        calls += 1

    return count


def note(x):
    CALLS[0] += 1


def note_in_an_attribute(x):
    note_in_an_attribute.calls += 1


def note_in_a_default(x, seen=[]):  # noqa: B006
    seen.append(1)


def note_by_keyword(x, *, seen=[]):  # noqa: B006
    seen.append(1)


def hands_on(x):
    [note(part) for part in (x,)]


@contextlib.contextmanager
def noting():
    note(None)
    yield


class Meter:
    """A plain object, whose methods count elsewhere."""

    total = 0
    named = property(lambda self: note(self))

    def __call__(self, x):
        Meter.total += 1

    def method(self, *args):
        note(None)

    @staticmethod
    def static(x):
        note(x)

    @classmethod
    def of_class(cls, x):
        cls.total += 1


def notes_around(m, x):
    with noting():
        pass


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def count(self):
        self.calls += 1


def counts_in_slots(m, x):
    SLOTTED.count()


def notes_inside(m, x):
    import tests_helpers

    tests_helpers.note(x)


def helpers():
    """Another module of the user's."""
    module = types.ModuleType("tests_helpers")
    exec("COUNT = 0\ndef note(x):\n    global COUNT\n    COUNT += 1\n", vars(module))
    return module


CALLS, METER, SLOTTED, HELPERS = [0], Meter(), Slotted(), helpers()
sys.modules["tests_helpers"] = HELPERS
note_in_an_attribute.calls = 0
NOTE, NOTE_PARTLY, NOTES = lambda x: note(x), functools.partial(hands_on), {"first": [note]}


def decorated(function):
    record = {"calls": 0}

    @functools.wraps(function)
    def wrapper(*args):
        record["calls"] += 1
        return function(*args)

    return wrapper


STATEFUL = {
    "n.add_": (lambda m, x: m.n.add_(1), "its attribute n"),
    "n +=": (adds_in_place, "its attribute n"),
    "n = n + 1": (lambda m, x: setattr(m, "n", m.n + 1), "its attribute n"),
    "n.add_(x)": (lambda m, x: m.n.add_(x.mean()), "its attribute n"),
    "n[0] = x": (lambda m, x: operator.setitem(m.n, 0, x.mean()), "its attribute n"),
    "n[0].add_(x)": (lambda m, x: [None, m.n[0].add_(x.mean())][0], "a view of a tensor"),
    "n = x": (lambda m, x: setattr(m, "n", x.mean()), "its attribute n"),
    "n.data": (lambda m, x: m.n.data.add_(1), "its attribute n"),
    "a tensor": (lambda m, x: m.plain.add_(1), "its attribute plain"),
    "a parameter": (lambda m, x: m.scale.mul_(0.5), "its attribute scale"),
    "a parameter's data": (lambda m, x: m.scale.data.mul_(0.5), "its attribute scale"),
    "an assigned parameter's data": (
        lambda m, x: setattr(m.scale, "data", 0.5 * m.scale.data), "the attribute data of a tensor"),
    "a power iteration": (lambda m, x: setattr(m, "n", (m.n * m.scale).mean((1, 2))), "its attribute n"),
    "a counter": (lambda m, x: setattr(m, "k", m.k + 1), "its attribute k"),
    "a new attribute": (lambda m, x: setattr(m, "last", x), "its attribute last"),
    "a list": (lambda m, x: m.seen.append(1), "its attribute seen"),
    "a list of features": (lambda m, x: m.seen.append(x), "its attribute seen"),
    "a dictionary": (lambda m, x: m.named.update(last=x), "its attribute named"),
    "of a child": (lambda m, x: setattr(m.child, "calls", m.child.calls + 1), "its attribute child.calls"),
    "of the class": (lambda m, x: setattr(type(m), "calls", m.calls + 1), "calls, an attribute of the class Keeps"),
    "a global": (counts_globally, "the global variable COUNT"),
    "a global list": (lambda m, x: KEPT.append(1), "the global variable KEPT"),
    "a variable around": (counts_around(), "the variable calls of a function around it"),
    "the first call": (
        lambda m, x: [1.0 if m.k else 2.0, setattr(m, "k", 1)][0], "its attribute k"),
    "a generator of Python's": (lambda m, x: m.random.random(), "its attribute random"),
    "a generator of torch's": (
        lambda m, x: torch.rand(1, generator=m.generator), "its attribute generator"),
    "an iterator": (lambda m, x: next(m.numbers), "its attribute numbers"),
    "an array": (lambda m, x: operator.setitem(m.array, 1, m.array[1] + 1), "its attribute array"),
    "a function's global": (lambda m, x: counts_globally(m, x), "the global variable COUNT"),
    "a function's list": (lambda m, x: note(x), "the global variable CALLS"),
    "a function's function": (lambda m, x: hands_on(x), "the global variable CALLS"),
    "a function's attribute": (
        lambda m, x: note_in_an_attribute(x), "calls, an attribute of the function note_in_an_attribute"),
    "a default argument": (
        lambda m, x: note_in_a_default(x), "a default argument of the function note_in_a_default"),
    "a keyword's default": (lambda m, x: note_by_keyword(x), "a default argument of the function note_by_keyword"),
    "a lambda": (lambda m, x: NOTE(x), "the global variable CALLS"),
    "a partial function": (lambda m, x: NOTE_PARTLY(x), "the global variable CALLS"),
    "a function in containers": (lambda m, x: NOTES["first"][0](x), "the global variable CALLS"),
    "a generator's function": (notes_around, "the global variable CALLS"),
    "without gradients": (torch.no_grad()(lambda m, x: note(x)), "the global variable CALLS"),
    "a decorator's dictionary": (
        decorated(lambda m, x: None), "the variable record of a function around it"),
    "another module": (lambda m, x: HELPERS.note(x), "the global variable COUNT"),
    "another module's variable": (
        lambda m, x: setattr(HELPERS, "COUNT", HELPERS.COUNT + 1), "the global variable COUNT"),
    "a module imported inside": (notes_inside, "the global variable COUNT"),
    "an object's method": (lambda m, x: METER.method(), "the global variable CALLS"),
    "an object's property": (lambda m, x: METER.named, "the global variable CALLS"),
    "an object's slots": (counts_in_slots, "the global variable SLOTTED"),
    "a bound method": (METER.method, "the global variable CALLS"),
    "an object that is called": (lambda m, x: METER(x), "total, an attribute of the class Meter"),
    "a static method": (lambda m, x: Meter.static(x), "the global variable CALLS"),
    "a class method": (lambda m, x: Meter.of_class(x), "total, an attribute of the class Meter"),
}  # fmt: skip


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("write, what", STATEFUL.values(), ids=STATEFUL)
def test_a_forward_that_keeps_state_is_refused(write, what, mode):
    x = torch.randn(2, 4, 5, 5)
    with mode():
        model = Keeps(write).eval()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=f"freeze: the forward writes (into )?{what}.* fused_resnet.fuse"):
            fused_resnet.freeze(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.k == 0 and not model.seen and not hasattr(model, "last")


CACHED = {
    "a constant": lambda m, x: setattr(m, "stride", 4),
    "made once": lambda m, x: m.named.setdefault("scale", torch.arange(4.0).view(4, 1, 1)),
    "made again": lambda m, x: setattr(m, "made", torch.arange(4.0).view(4, 1, 1)) or m.made,
    "written back": lambda m, x: setattr(m, "n", m.n.clone()),
    "the same value": lambda m, x: m.n.mul_(1) + 1,
}


def gathers_once(m, x):
    """The biases of LeViT's attention: a dictionary by device, of what is computed from parameters."""
    key = str(x.device)
    if key not in m.named:
        m.named[key] = m.scale[[3, 2, 1, 0]]
    return m.named[key]


def keeps_a_product(m, x):
    m.product = 2 * m.scale if m.k == 0 else m.product
    return m.product


def logs(m, x):
    LOG.warning("called")
    warnings.warn("called", UserWarning, stacklevel=1)


def warns_once(m, x):
    global HAS_WARNED
    if not HAS_WARNED:
        LOG.warning("once")
    HAS_WARNED = True


@functools.lru_cache(maxsize=None)
def scale_of(channels):
    return torch.arange(float(channels)).view(channels, 1, 1)


def remembered(channels):
    return SCALES.setdefault(channels, scale_of(channels))


def is_in_a_circle(x):
    return CIRCLE


LOG, HAS_WARNED, SCALES, CIRCLE = logging.getLogger("tests.plan"), False, {}, [is_in_a_circle]
CIRCLE += [CIRCLE, float("nan"), threading.Lock(), object()]
DEEP, MANY = [], [{} for _ in range(2**15)]
for _ in range(10_000):
    DEEP = [DEEP]
CACHED |= {
    "a log": logs,
    "a warning": warns_once,
    "a cached function": lambda m, x: scale_of(4),
    "a dictionary of a function's": lambda m, x: remembered(4),
    "a circle": lambda m, x: [is_in_a_circle(x), None][1],
    "a deep list": lambda m, x: setattr(m, "k", bool(DEEP)),
    "many objects": lambda m, x: setattr(m, "k", len(MANY)),
    "not a number": lambda m, x: setattr(m, "k", float("nan")),
}
CACHED |= {"computed from a parameter": gathers_once, "a product of a parameter": keeps_a_product}


@pytest.mark.filterwarnings("ignore:called")
@pytest.mark.parametrize("write", CACHED.values(), ids=CACHED)
def test_a_cache_is_no_state(write):
    """What the second call leaves as the first one did."""
    frozen_equals(Keeps(write), torch.randn(2, 4, 5, 5))


def test_the_state_of_installed_packages_is_theirs_unless_the_model_is_of_one(monkeypatch):
    installed, x = helpers(), torch.randn(2, 4, 5, 5)
    installed.__name__ = "tests_installed"
    installed.__file__ = "lib/site-packages/tests_installed.py"
    monkeypatch.setitem(sys.modules, "tests_installed", installed)
    write = types.FunctionType((lambda m, x: note(x)).__code__, vars(installed))
    frozen_equals(Keeps(write), x)
    monkeypatch.setattr(Keeps, "__module__", "tests_installed")
    with pytest.raises(RuntimeError, match="freeze: the forward writes the global variable COUNT"):
        fused_resnet.freeze(Keeps(write).eval(), x)


class Asked:
    """Counts how often it is asked what it holds. A copy is itself."""

    def __init__(self):
        self.times = 0

    def __deepcopy__(self, memo):
        return self

    def __getstate__(self):
        self.times += 1
        return vars(self)

    def __getattr__(self, name):
        self.times += 1
        raise AttributeError(name)


def test_what_a_users_object_holds_is_seen_without_its_methods():
    model = Keeps(lambda m, x: None)
    model.asked = Asked()
    frozen_equals(model, torch.randn(2, 4, 5, 5))
    assert model.asked.times == 0
    model.write = lambda m, x: setattr(m.asked, "calls", vars(m.asked).get("calls", 0) + 1)
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute asked"):
        fused_resnet.freeze(model.eval(), torch.randn(2, 4, 5, 5))


def test_large_arrays_are_read_where_they_are():
    numpy, x = pytest.importorskip("numpy"), torch.randn(2, 4, 5, 5)
    model = Keeps(lambda m, x: None).eval()
    model.table = numpy.zeros((1024, 1024))
    tracemalloc.start()
    try:
        fused_resnet.freeze(model, x)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * model.table.nbytes  # a copy of the model has one of it
    finally:
        tracemalloc.stop()
    model.write = lambda m, x: operator.setitem(m.table.T[::2], (-1, 7), m.table[7, -2] + 1)
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute table"):
        fused_resnet.freeze(model, x)


def test_a_counter_behind_many_objects_or_beside_shared_ones_is_seen():
    model, x, shared = Keeps(lambda m, x: None).eval(), torch.randn(2, 4, 5, 5), None
    for _ in range(60):  # with 2**60 ways through it
        shared = types.SimpleNamespace(one=shared, other=shared)
    model.many, model.shared, model.count = [[i] for i in range(2**15)], shared, [[0]]
    frozen_equals(model, x)
    model.write = lambda m, x: m.count[0].append(1)
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute count"):
        fused_resnet.freeze(model, x)


def test_running_statistics_that_a_function_updates_are_state():
    """ATen writes them without counting it."""

    class Updates(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x):
            return F.batch_norm(self.conv(x), self.mean, self.var, training=True)

    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute"):
        fused_resnet.freeze(Updates().eval(), torch.randn(2, 4, 9, 9))


DRAWN = {
    "torch": lambda m, x: torch.randn(4, 1, 1),
    "Python": lambda m, x: random.random(),
    "numpy": lambda m, x: float(pytest.importorskip("numpy").random.rand()),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_random_numbers_that_a_graph_would_repeat_are_refused(draw):
    with pytest.raises(RuntimeError, match="freeze: the forward draws random numbers that depend on no input"):
        fused_resnet.freeze(Keeps(draw).eval(), torch.randn(2, 4, 5, 5))


def test_random_numbers_like_a_tensor_are_drawn_in_each_call():
    frozen = fused_resnet.freeze(Keeps(lambda m, x: torch.randn_like(x)).eval(), x := torch.randn(2, 4, 5, 5))
    assert not torch.equal(frozen(x), frozen(x))


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
