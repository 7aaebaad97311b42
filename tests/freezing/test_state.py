"""freeze: forwards that keep something, and copies of models."""

import array
import contextlib
import copy
import functools
import logging
import operator
import pickle
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
from torch.nn.utils import prune

import fused_resnet
from fused_resnet import BackendError
from tests.support import networks
from tests.support.plans import (
    Traced,
    X,
    as_good_as_plain,
    convolutions,
    equal_outputs,
    frozen_equals,
    remember,
    unchanged,
)

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


def sums_up(m, x):
    total = torch.zeros(1)
    total += x.mean()
    return total


def fills_in(m, x):
    scale = torch.ones(4, 1, 1)
    scale[1] = x.mean()
    return scale


def written_between(m, x):
    scale = torch.ones(4, 1, 1)
    once = x * scale
    scale.add_(1)
    return once + x * scale


@pytest.mark.parametrize("write", (sums_up, fills_in, written_between))
def test_tensors_that_the_forward_makes_are_new_in_each_call(write):
    model, x = Keeps(write).eval(), torch.randn(2, 4, 5, 5)
    frozen = fused_resnet.freeze(model, x)
    for image in (x, -x, x):
        equal_outputs(frozen(image), networks.in_fp64(model, image))


def ddp(model):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def with_a_compiled_stage(model):
    model.layer2 = torch.compile(model.layer2, backend="eager")
    return model


def compiled_in_place(model):
    model.layer2.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a compiled stage": with_a_compiled_stage,
    "compiled twice": lambda model: torch.compile(with_a_compiled_stage(model), backend="eager"),
    "compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": ddp,
    "compiled DistributedDataParallel": lambda model: torch.compile(ddp(model), backend="eager"),
}


@pytest.fixture
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_frozen_like_what_is_in_them(wrap, no_process_group):
    plain, x = networks.small(), torch.randn(X)
    model, expected = wrap(copy.deepcopy(plain)).eval(), fused_resnet.freeze(plain, x)(x)
    frozen = fused_resnet.freeze(model, x)
    assert torch.equal(frozen(x), expected) and frozen.unfreeze() is model
    assert len(convolutions(frozen, x)) == 12
    parts = fused_resnet.freeze(Each(model).eval(), [x])
    assert list(parts.parts) == ["model"] and torch.equal(parts.parts["model"](x), expected)
    bn = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    bn.train()
    with pytest.raises(RuntimeError, match="bn1 is in training mode"):
        fused_resnet.freeze(model, x)


def test_a_wrapper_with_hooks_is_refused():
    model, x = torch.compile(networks.small(), backend="eager"), torch.randn(X)
    model.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="freeze: the model has forward hooks, which a plan would drop"):
        fused_resnet.freeze(model, x)


class Tagged(torch.Tensor):
    """A subclass of which only torch functions know what it does."""


def with_weight(change):
    def make():
        model = networks.small()
        with torch.no_grad():
            model.fc.weight = nn.Parameter(change(model.fc.weight.detach()), requires_grad=False)
        return model

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def quantized(by_torch_fx):
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    x = torch.randn(X)
    if by_torch_fx:
        prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return quantize_fx.convert_fx(prepared)
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    prepared(x)
    return quantization.convert(prepared)


CONVERTED = {
    "int8": (lambda: quantized(False), "the model is quantized already .*Freeze the float model"),
    "int8 by torch.fx": (lambda: quantized(True), "the model is quantized already .*Freeze the float model"),
    "a quantized tensor": (
        with_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "fc.weight .* dtype qint8, .* dense"),
    "a subclass": (with_weight(lambda w: w.as_subclass(Tagged)), "fc.weight is a Tagged"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)).eval(), "0.weight has no values yet. Call the model once"),
    "sparse": (with_weight(lambda w: w.to_sparse_csr()), "fc.weight is a Parameter of layout sparse_csr"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, message", CONVERTED.values(), ids=CONVERTED)
def test_models_of_other_numbers_are_refused(make, message):
    with pytest.raises(TypeError, match=f"freeze: {message}"):
        fused_resnet.freeze(make(), torch.randn(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", (None, torch.float64, torch.bfloat16))
def test_a_linear_that_quantizes_its_input_serves_in_a_plan(dtype):
    from torch.ao.quantization import quantize_dynamic

    model, x = networks.small(), torch.randn(X)
    model = quantize_dynamic(model, {nn.Linear})
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    with torch.no_grad():
        assert networks.error(frozen(x), model(x).double()) < 0.01  # inputs that differ by rounding may be int8s apart


def test_a_sparse_operand_is_no_weight():
    model, x = Traced(lambda m, x: torch.sparse.mm(m.mix, m.conv(x).flatten(1).t())).eval(), torch.randn(2, 4, 6, 7)
    model.register_buffer("mix", torch.randn(3, 4 * 6 * 7).relu().to_sparse())
    with torch.no_grad():
        torch.testing.assert_close(fused_resnet.freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


class TwoBranches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSED = {
    "wrong channels": (lambda m: fused_resnet.freeze(m, torch.randn(2, 4, 16, 16)), ValueError, "cannot take an input"),
    "wrong rank": (lambda m: fused_resnet.freeze(m, torch.randn(2, 3)), ValueError, r"input of shape \(2, 3\)"),
    "integers": (lambda m: fused_resnet.freeze(m, torch.ones(X).int()), TypeError, "floating-point tensor .* int32"),
    "not a tensor": (lambda m: fused_resnet.freeze(m, [1.0]), TypeError, "example_input must be .*list"),
    "not a module": (lambda m: fused_resnet.freeze(torch.relu, torch.ones(X)), TypeError, "expected an nn.Module"),
    "dtype": (lambda m: fused_resnet.freeze(m, torch.ones(X), dtype=torch.int8), TypeError, "dtype must be float32"),
    "unknown backend": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), backend="tpu"), BackendError, "unknown backend 'tpu'; known"),
    "forced backend": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), backend="cudnn"), BackendError, "'cudnn' cannot run this"),
    "forced dtype": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), dtype=torch.float64, backend="onednn"), BackendError,
        "'onednn' cannot run this: float64 is not supported"),
    "example on another device": (
        lambda m: fused_resnet.freeze(m, torch.ones(X, device="meta")), (TypeError, ValueError), "meta"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_and_the_model_unchanged(call, error, message):
    model, x = networks.small(), torch.randn(X)
    model.fc.register_forward_hook(lambda *_: None)
    before, expected = remember(model), model(x)
    with pytest.raises(error, match=message):
        call(model)
    unchanged(model, before, x, expected)


def test_untraceable_models_are_refused():
    with pytest.raises(
        ValueError, match="torch.fx cannot trace TwoBranches: .*Freeze the part that is a plain network"
    ):
        fused_resnet.freeze(TwoBranches().eval(), torch.ones(X))


def test_the_model_is_unchanged_by_success_and_comes_back():
    model, x = networks.small(), torch.randn(X)
    before, expected = remember(model), model(x)
    frozen = fused_resnet.freeze(model, x, dtype=torch.float64)
    frozen(x)
    unchanged(model, before, x, expected)
    assert frozen.unfreeze() is model


def test_calls_that_do_not_fit_are_refused():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    with pytest.raises(TypeError, match="frozen for float32 inputs on cpu, got float64 on cpu"):
        frozen(torch.randn(X).double())
    with pytest.raises(TypeError, match="frozen for float32 inputs on cpu, got float32 on meta"):
        frozen(torch.randn(X, device="meta"))
    with pytest.raises(TypeError, match="got list"):
        frozen([1])
    with pytest.raises(ValueError, match=r"cannot take an input of shape \(2, 5, 16, 16\)"):
        frozen(torch.randn(2, 5, 16, 16))
    x = torch.randn(X, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients: use fused_resnet.fuse"):
        frozen(x)
    with torch.no_grad():
        assert not frozen(x).requires_grad


def test_a_frozen_model_stays_as_it_is():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    assert frozen.eval() is frozen and not frozen.training
    for call in (frozen.train, frozen.half, lambda: frozen.to(torch.float64)):
        with pytest.raises(RuntimeError, match="a frozen model cannot be .*frozen.unfreeze"):
            call()


UNMOVED = {
    "to(device)": lambda m: m.to("cpu"),
    "to(dtype)": lambda m: m.to(torch.float32),
    "to(tensor)": lambda m: m.to(torch.ones(1)),
    "to(memory_format)": lambda m: m.to(memory_format=torch.channels_last),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float32),
    "apply": lambda m: m.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d) else None),
    "share_memory": lambda m: m.share_memory(),
    "eval": lambda m: m.eval(),
    "train(False)": lambda m: m.train(False),
    "requires_grad_(False)": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad() or m,
}
MOVED = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device)": lambda m: m.to("meta"),
    "type": lambda m: m.type(torch.float64),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "to_empty, where it is": lambda m: m.to_empty(device="cpu"),
    "cuda": lambda m: m.cuda() if not torch.cuda.is_available() else m.to("meta"),
    "train": lambda m: m.train(),
}


@pytest.fixture(params=("whole", "parts"))
def frozen_and_example(request):
    """A frozen model and what it takes."""
    if request.param == "whole":
        return fused_resnet.freeze(networks.small(), torch.randn(X)), torch.randn(X)
    images = [torch.randn(X)]
    return fused_resnet.freeze(Each(networks.small()).eval(), images), images


class Each(nn.Module):
    """A list of images in, which torch.fx does not trace."""

    def __init__(self, model):
        super().__init__()
        self.model, self.classifier = model, nn.Linear(10, 4)

    def forward(self, images):
        return torch.cat([self.classifier(self.model(image)) for image in images])


@pytest.mark.parametrize("call", UNMOVED.values(), ids=UNMOVED)
def test_what_would_not_change_a_frozen_model_does_nothing(frozen_and_example, call):
    frozen, x = frozen_and_example
    around, expected = nn.Sequential(frozen, nn.Linear(10, 10)).eval(), frozen(x)
    assert call(frozen) is frozen and call(around) is around and around[0] is frozen
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("call", MOVED.values(), ids=MOVED)
def test_what_would_change_a_frozen_model_is_refused(frozen_and_example, call):
    frozen, x = frozen_and_example
    around, expected = nn.Sequential(frozen, nn.Linear(10, 10)).eval(), frozen(x)
    for module in (frozen, around):
        with pytest.raises(RuntimeError, match="a frozen model cannot be .*frozen.unfreeze"):
            call(module)
    assert torch.equal(frozen(x), expected) and {p.dtype for p in around[1].parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("in_parts", (False, True))
def test_a_model_frozen_in_another_dtype_is_in_that_of_its_inputs(dtype, in_parts):
    """What it takes and returns decides: in the dtype of its arithmetic, the next call would fail."""
    model, x = (Each(networks.small()).eval(), [torch.randn(X)]) if in_parts else (networks.small(), torch.randn(X))
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    around, expected = nn.Sequential(frozen, nn.LazyLinear(10)).eval(), frozen(x)
    around(x)
    for call in UNMOVED.values():
        assert call(frozen) is frozen and call(around) is around
    for other in (torch.bfloat16, torch.float16, torch.float64):
        for module in (frozen, around):
            with pytest.raises(RuntimeError, match="cannot be moved or converted.* is in float32 on cpu"):
                module.to(other)
    assert around[1].weight.dtype == torch.float32 and torch.equal(frozen(x), expected)
    assert in_parts or frozen.dtype == dtype


def test_hooks_of_leaves_are_kept_and_those_of_containers_refused():
    model, x, seen = networks.small(), torch.randn(X), []
    handle = model.layer1[0].conv1.register_forward_hook(
        lambda module, args, out: seen.append(tuple(out.shape)) or 2 * out
    )
    frozen = fused_resnet.freeze(model, x)
    seen.clear()
    as_good_as_plain(frozen, model, x)
    seen.clear()
    frozen(x)
    assert seen == [(2, 8, 16, 16)]
    handle.remove()
    for module, name in ((model.layer1[0], "layer1.0"), (model, "the model")):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: None)
            with pytest.raises(ValueError, match=f"freeze: {name} has forward hooks, which a plan would drop"):
                fused_resnet.freeze(model, x)
            handle.remove()


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))), ids=("copy", "pickle")
)
def test_copies_and_pickles(copied):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    again = copied(frozen)
    assert torch.equal(again(x), frozen(x)) and again.dtype == torch.float32
    assert torch.equal(again(x[:1]), frozen(x[:1])) and isinstance(again.unfreeze(), networks.Network)


def test_parametrized_and_replaced_modules_are_called():
    model, x = networks.small(), torch.randn(X)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.layer2[0].bn1 = nn.GroupNorm(4, 12)
    model.layer3[0].relu = nn.SiLU()
    model.layer1[1].bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    as_good_as_plain(fused_resnet.freeze(model.eval(), x), model, x)


COMPUTED = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "pruned twice": lambda conv: [prune.random_unstructured(conv, "weight", 0.3) for _ in range(2)],
    "weight_norm, old": pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    "spectral_norm, old": nn.utils.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("grad_mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed_from_others(compute, grad_mode):
    """In grad mode such a weight has a history, which deepcopy refuses. The model's own stays as it was, trainable."""
    model, x = networks.small(), torch.randn(X)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs[:3]:
        compute(conv)
    images = [x]
    parts = Each(model).eval()
    model(x)
    before, hooks = remember(model), [len(conv._forward_pre_hooks) for conv in convs]
    with torch.no_grad():
        expected, of_parts = model(x), parts(images)
    with grad_mode():
        frozen, in_parts = fused_resnet.freeze(model, x), fused_resnet.freeze(parts, images)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_parts(images), of_parts, rtol=1e-4, atol=1e-5)
    assert list(in_parts.parts) == ["model"]
    unchanged(model, before, x, expected)
    assert [len(conv._forward_pre_hooks) for conv in convs] == hooks
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in convs[0].parameters())
    if hooks[0]:  # a hook's weight is folded like any other
        assert len(convolutions(frozen, x)) == len(convs)


def test_a_hook_beside_the_one_that_computes_the_weight_is_kept():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(X)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)


def test_tensors_with_a_history_are_copied():
    """As an attribute, as a buffer and in a list."""
    weight = torch.ones(4, 1, 1, requires_grad=True)
    model = Traced(lambda m, x: m.conv(x) * m.scale + m.shift * m.others[0]).eval()
    model.scale, model.others = 2 * weight, [3 * weight]
    model.register_buffer("shift", 4 * weight)
    x = torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.scale.requires_grad and model.shift.requires_grad
