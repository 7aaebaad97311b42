"""Plans whose convolutions run in regions: right by every kernel, and chosen only where they may be."""

import copy
import pickle
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.choosing import decide, material, outright, pieces, region_checks, winners
from fused_resnet.choosing.decide import Tuning
from fused_resnet.choosing.material import Material
from fused_resnet.choosing.pieces import REGION, SEPARATE, Times
from fused_resnet.choosing.winners_file import Entry, Measured, Table
from fused_resnet.freezing.modules import FrozenConv, FrozenMaxPool, FrozenRegion
from fused_resnet.kernels import compiled
from fused_resnet.measuring.rooflines import Roofline
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.regions import fragment, kernels
from fused_resnet.regions.layout import DTYPES
from tests.support import networks
from tests.support.plans import Traced, equal_outputs

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

RUNNING = [kernel for kernel in kernels.table() if not kernel.why_not and kernel.dtype in DTYPES]
FP32 = next(kernel for kernel in RUNNING if kernel.dtype == torch.float32)
X = (2, 3, 16, 16)


def use(monkeypatch, kernel):
    """Regions of the kernel's dtype are computed by it, and formed by rules."""
    fastest = kernels.fastest
    monkeypatch.setattr(kernels, "fastest", lambda dtype: kernel if dtype == kernel.dtype else fastest(dtype))
    monkeypatch.setattr(pieces, "_BY_RULE", (kernel.name,))


@pytest.fixture(params=RUNNING, ids=lambda kernel: kernel.name)
def kernel(request, monkeypatch):
    use(monkeypatch, request.param)
    return request.param


@pytest.fixture
def by_rule(monkeypatch):
    use(monkeypatch, FP32)


def regions(frozen, x):
    return [module for module in frozen.plan(x).modules() if isinstance(module, FrozenRegion)]


def separate(frozen, x):
    return [module for module in frozen.plan(x).modules() if isinstance(module, (FrozenConv, FrozenMaxPool))]


def stem_and_pools():
    layers = [nn.Conv2d(3, 20, 7, 2, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers += [nn.Conv2d(20, 33, 3, padding=2, dilation=2), nn.ReLU6(), nn.AvgPool2d(2, 1), nn.Conv2d(33, 5, 1)]
    return networks.randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)))


class SiluBlock(nn.Module):
    """A residual block whose activations are SiLU, as YOLO's and RegNet's."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.act, self.shortcut = nn.SiLU(inplace=True), nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


def silu():
    layers = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(), nn.MaxPool2d(3, 2, 1)]
    layers += [SiluBlock(32, 32, 1), SiluBlock(32, 40, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4)]
    return networks.randomize(nn.Sequential(*layers))


def groups():
    layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.Conv2d(64, 96, 1), nn.ReLU(), nn.Conv2d(96, 192, 3, 2, 1, groups=3), nn.ReLU6()]
    return networks.randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 4)))


NETWORKS = {
    "basic": lambda: networks.small(BasicBlock),
    "bottleneck": lambda: networks.small(Bottleneck),
    "stem and poolings": stem_and_pools,
    "silu": silu,
    "groups": groups,
    "gates": lambda: networks.randomize(networks.Gated()),
    "copies": lambda: networks.randomize(networks.Copies()),
}


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 3, 17, 13)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_network(kernel, name, shape):
    model, x = NETWORKS[name](), torch.randn(shape)
    frozen, exact = fused_resnet.freeze(model, x, dtype=kernel.dtype), networks.in_fp64(model, x)
    with torch.no_grad():
        plain = copy.deepcopy(model).to(kernel.dtype)(x.to(kernel.dtype))
    (region,) = regions(frozen, x)
    assert not separate(frozen, x) and region.micro_kernel == kernel.name
    assert len(region.convolutions) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    for _ in range(2):
        assert networks.error(frozen(x), exact) <= networks.allowed(plain, exact)
        for workspace in region.workspaces:
            workspace.fill_(0xFF)  # NaN: nothing of an earlier call is read


def test_an_empty_batch_runs_in_none(by_rule):
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(X))
    empty = torch.randn(0, *X[1:])
    assert frozen(empty).shape == (0, 10) and not regions(frozen, empty)


# -------------------------------------------------------------------------------------------------- what is in a region


class Maps(nn.Module):
    """Convolutions and what a forward does with their maps. x: (N, 4, H, W)."""

    def __init__(self, forward):
        super().__init__()
        self.convs, self.run = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)), forward
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.run(self, x, *self.convs)


def returned(self, x, a, b, c, d):
    y = a(x).relu()
    z = b(y).relu()
    return z, y, torch.relu(c(z) + y)


def read_later(self, x, a, b, c, d):
    """The residual is read once more, so no sum replaces it."""
    y = a(x).relu()
    z = torch.relu(c(b(y).relu()) + y)
    return z + d(y)


def residual_is_the_input(self, x, a, b, c, d):
    return torch.relu(b(torch.relu(a(x) + x)) + x)


def its_own_residual(self, x, a, b, c, d):
    y = a(x).relu()
    return torch.relu(b(y) + y), torch.relu(c(y) + d(y))


def projection_read_twice(self, x, a, b, c, d):
    y, projected = a(x).relu(), b(x)
    return torch.relu(c(y) + projected), torch.relu(d(y) + projected)


def projection_with_activation(self, x, a, b, c, d):
    y, projected = a(x).relu(), b(x).relu()
    return torch.relu(c(y) + projected) + d(y)


def projection_of_what_is_replaced(self, x, a, b, c, d):
    """b reads y, over which no sum may be written before."""
    y = a(x).relu()
    projected = b(y)
    z = torch.relu(c(y) + y)
    return torch.relu(d(z) + projected)


def between_others(self, x, a, b, c, d):
    y = self.pool(b(a(x).relu()).relu())
    return d(c(torch.cat([y, y], 2)).relu())


@pytest.mark.parametrize(
    "forward, expected",
    [
        (returned, [3]), (read_later, [4]), (residual_is_the_input, [2]), (its_own_residual, [4]),
        (projection_read_twice, [4]), (projection_with_activation, [4]), (projection_of_what_is_replaced, [4]),
        (between_others, [2, 2]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_maps(by_rule, forward, expected):
    """expected: the convolutions of each region."""
    model, x = Maps(forward).eval(), torch.randn(2, 4, 9, 10)
    frozen, exact = fused_resnet.freeze(model, x), networks.in_fp64(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == expected
    first = frozen(x)
    frozen(torch.randn_like(x))  # which leaves the first outputs alone
    equal_outputs(first, exact)


def test_a_projection_is_a_segment_of_the_last_convolution(by_rule):
    """And the sums of the blocks without one are in place: the workspace holds few maps."""
    model, x = networks.single(Bottleneck, channels=16), torch.randn(2, 16, 8, 8)
    (region,) = regions(fused_resnet.freeze(model, x), x)
    assert len(region.compiled.weights) == 3 and list(fragment.projections(region.fragment)) == [3]


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.MaxPool2d(3, 1, 1, ceil_mode=True), nn.MaxPool2d(3, 1, dilation=2),
    nn.AvgPool2d(2, 1, divisor_override=3), nn.AdaptiveAvgPool2d(5), nn.Sigmoid(),
], ids=str)  # fmt: skip
def test_what_ends_a_run(by_rule, layer):
    ends = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2)]
    model, x = nn.Sequential(ends[0], layer, ends[1]).eval(), torch.randn(2, 4, 9, 10)
    frozen = fused_resnet.freeze(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == [2, 2]
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def upsampled(scale):
    return lambda self, x, a, b, c, d: d(c(F.interpolate(b(a(x).relu()).relu(), scale_factor=scale)).relu())


COPIED = {  # forward: the convolutions of each region
    "sliced": (lambda self, x, a, b, c, d: d(c(b(a(x)).relu()[:, :, ::3])), [4]),
    "sliced from the second pixel on": (lambda self, x, a, b, c, d: d(c(b(a(x)).relu()[:, :, 1::3])), [2, 2]),
    "twice as large": (upsampled(2), [4]),
    "three times as large": (upsampled(3.0), [2, 2]),
    "nearly twice as large": (upsampled((2, 2.1)), [2, 2]),
    "framed": (lambda self, x, a, b, c, d: d(c(F.pad(b(a(x)).relu(), (1, 1, 0, 0)))), [2, 2]),
    "written in place": (lambda self, x, a, b, c, d: d(c(b(a(x))[:, :, ::2].sigmoid_())), [2, 2]),
    "at the end": (lambda self, x, a, b, c, d: torch.cat([x, b(a(x))], 1), [2]),
}


@pytest.mark.parametrize("name", COPIED)
def test_which_copies_are_in_a_region(by_rule, name):
    forward, expected = COPIED[name]
    model, x = Maps(forward).eval(), torch.randn(2, 4, 9, 10)
    frozen, exact = fused_resnet.freeze(model, x), networks.in_fp64(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == expected
    equal_outputs(frozen(x), exact)


def test_a_network_of_option_a_is_one_region(by_rule):
    model, x = networks.randomize(models.cifar.resnet20()), torch.randn(2, 3, 16, 16)
    frozen = fused_resnet.freeze(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == [19]
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def test_a_result_that_nobody_reads(by_rule):
    """It is in no region, whose last step has an output."""

    def unread(self, x, a, b, c, d):
        y = b(a(x).relu()).relu()
        c(y)
        return y

    model, x = Maps(unread).eval(), torch.randn(2, 4, 9, 10)
    frozen = fused_resnet.freeze(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == [2]
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def test_one_convolution_is_no_region(by_rule):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    assert not regions(frozen, x)
    fused_resnet.freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval(), x, backend="eager")


# ----------------------------------------------------------------------------------------------------- calls and memory


def test_threads_call_one_plan(by_rule):
    model = networks.small()
    images = [torch.randn(X) for _ in range(4)]
    frozen = fused_resnet.freeze(model, images[0])
    expected, found = [frozen(x) for x in images], [[] for _ in images]

    def call(index):
        for _ in range(20):
            found[index].append(frozen(images[index]))

    workers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(len(some) == 20 and all(torch.equal(y, right) for y in some) for some, right in zip(found, expected))
    (region,) = regions(frozen, images[0])
    assert 1 <= len(region.workspaces) <= 4


def test_a_call_allocates_its_outputs_alone(by_rule):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    (region,) = regions(frozen, x)
    run, inputs = region.bound(), torch.randn(region.fragment.shapes[0]).contiguous(memory_format=torch.channels_last)
    run(inputs)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        out = run(inputs)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert allocated == out.nbytes


@pytest.mark.parametrize(
    "made", [copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))], ids=("copy", "file")
)
def test_copies(by_rule, made):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    other = made(frozen)
    assert regions(other, x) and torch.equal(other(x), frozen(x))


def test_weights_are_in_memory_once(by_rule):
    model, shapes = networks.small(), [X, (1, 3, 20, 12), (3, 3, 16, 16)]
    frozen = fused_resnet.freeze(model, torch.randn(X))
    for shape in shapes:
        assert torch.equal(frozen(torch.ones(shape))[0], frozen(torch.ones(shape))[-1])
    plans = [regions(frozen, torch.ones(shape)) for shape in shapes]
    places = [[weight.data_ptr() for weight in region.compiled.weights] for (region,) in plans]
    assert places[0] == places[1] == places[2]
    assert not any(isinstance(module, FrozenConv) for plan in frozen.plans() for module in plan.modules())


def test_another_shape_takes_the_regions_and_the_weights_of_the_first(by_rule, monkeypatch):
    """Where rules alone would take none, and where they would compute another convolution by Winograd."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU()).eval()
    frozen = fused_resnet.freeze(model, torch.randn(2, 32, 16, 16))
    monkeypatch.setattr(pieces, "_BY_RULE", ())
    small = torch.randn(1, 32, 3, 3)
    (first,), (second,) = (regions(frozen, x) for x in (torch.randn(2, 32, 16, 16), small))
    assert second.why == pieces.SHARED and [conv.by_winograd for conv in second.convolutions] == [True, False]
    assert [w.data_ptr() for w in first.compiled.weights] == [w.data_ptr() for w in second.compiled.weights]
    equal_outputs(frozen(small), networks.in_fp64(model, small))
    assert not regions(fused_resnet.freeze(model, small), small)


class Classifier(nn.Module):
    """Two convolutions, a pooled map, and what a forward makes of its vectors."""

    def __init__(self, forward, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 40, 3, 2, 1), nn.ReLU(), nn.Conv2d(40, 33, 1), nn.AdaptiveAvgPool2d(1))
        self.flatten, self.linear, self.run = nn.Flatten(), nn.Linear(33, 70, bias=bias), forward

    def forward(self, x):
        return self.run(self, self.body(x))


# and how many nodes of the plan compute beside the region
CLASSIFIERS = {
    "torch.flatten": (lambda self, y: self.linear(torch.flatten(y, 1)), 0),
    "a module": (lambda self, y: self.linear(self.flatten(y)), 0),
    "reshape": (lambda self, y: self.linear(y.reshape(-1, 33)), 0),
    "its vectors are returned": (lambda self, y: (self.linear(y.flatten(1)), y.flatten(1), y), 0),
    "two layers": (lambda self, y: self.linear(self.linear(y.flatten(1))[:, :33]), 1),
    "of another dimension": (lambda self, y: self.linear(y[:, :, 0, 0]), 1),
    "the vectors alone": (lambda self, y: y.flatten(1), 0),
}


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_ends_the_region(kernel, name, has_bias):
    forward, beside = CLASSIFIERS[name]
    model, x = Classifier(forward, has_bias), torch.randn(X)
    frozen, exact = fused_resnet.freeze(model, x, dtype=kernel.dtype), networks.in_fp64(model, x)
    with torch.no_grad():
        plain = copy.deepcopy(model).to(kernel.dtype)(x.to(kernel.dtype))
    (region,) = regions(frozen, x)
    nodes = [node for node in frozen.plan(x).graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    others = [node for node in nodes if node.target != "region" and "getitem" not in str(node.target)]
    assert len(others) == beside or name in ("two layers", "of another dimension") and others
    for ours, theirs, expected in zip(
        *(one if isinstance(one, tuple) else (one,) for one in (frozen(x), plain, exact))
    ):
        assert ours.shape == expected.shape and networks.error(ours, expected) <= networks.allowed(theirs, expected)


def of_an_outer_map(self, x):
    """The vectors are those of the input, which no region makes."""
    features = self.pool(x).flatten(1)
    y = self.convs[0](x)
    return self.linear(features), self.convs[1](y)


def vectors_of_a_sum(self, x):
    """The sum must not replace what is read as vectors afterwards."""
    pooled = self.pool(self.convs[0](x))
    features = pooled.flatten(1)
    y = self.convs[2](torch.relu(self.convs[1](pooled))) + pooled
    return y, self.linear(features)


@pytest.mark.parametrize("forward", [of_an_outer_map, vectors_of_a_sum])
def test_vectors_that_are_read_elsewhere(kernel, forward):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
            self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

        def forward(self, x):
            return forward(self, x)

    model, x = Model().eval(), torch.randn(2, 4, 6, 5)
    frozen, exact = fused_resnet.freeze(model, x, dtype=kernel.dtype), networks.in_fp64(model, x)
    with torch.no_grad():
        plain = copy.deepcopy(model).to(kernel.dtype)(x.to(kernel.dtype))
    assert regions(frozen, x) or forward is of_an_outer_map
    for ours, theirs, expected in zip(frozen(x), plain, exact):
        assert networks.error(ours, expected) <= networks.allowed(theirs, expected)


def test_a_map_that_is_too_wide_for_a_window_is_pooled_outside(by_rule):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(1, 3, 2, 1100)
    frozen = fused_resnet.freeze(model, x)
    (region,) = regions(frozen, x)
    assert len(region.fragment.steps) == 2
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def test_a_region_reads_the_plan_s_input_as_it_is(kernel):
    """Any layout and either dtype: the same bytes as from what `taken` would have made of it."""
    model = networks.small()
    x = torch.randn(X)
    frozen = fused_resnet.freeze(model, x, dtype=kernel.dtype)
    assert frozen.taken(x) is x
    expected = frozen(x)
    wide = torch.randn(2, 3, 16, 32)
    wide[..., ::2] = x
    for one in (
        x.to(memory_format=torch.channels_last),
        wide[..., ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(frozen(one), expected)
    narrow = x.bfloat16()
    of_narrow = fused_resnet.freeze(copy.deepcopy(model).bfloat16(), narrow, dtype=kernel.dtype)
    assert of_narrow.taken(narrow) is narrow and of_narrow(narrow).dtype == torch.bfloat16


@pytest.mark.parametrize("in_order", [True, False], ids=["replaces its residual", "the residual is read later"])
def test_winograd_within_a_region(by_rule, monkeypatch, in_order):
    """Where it is the selection, and nothing reads the residual afterwards."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            y = self.a(x).relu()
            z = torch.relu(self.b(y) + y) if not in_order else torch.relu(self.b(self.a(y)) + y)
            return z if in_order else z + y

    model, x = Block(), torch.randn(2, 32, 16, 16)
    frozen = fused_resnet.freeze(model, x)
    (region,) = regions(frozen, x)
    steps = [step for step in region.fragment.steps if isinstance(step, fragment.ConvStep)]
    assert all(step.by_winograd for step in steps)
    places = fragment.by_winograd(region.fragment)
    assert len(places) == len(steps) - (not in_order)
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def test_winograd_takes_no_segment_and_is_none(by_rule):
    """A 3x3 convolution whose result is but a residual stays a step of its own, as does one with such a residual."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(32, 32, size, padding=size // 2) for size in (3, 1, 3, 1, 3))

        def forward(self, x):
            a, b, c, d, e = self.convs
            y = torch.relu(b(x.relu()) + a(x))
            return torch.relu(c(y) + d(y)) + e(y)

    model, x = Block(), torch.randn(2, 32, 16, 16)
    frozen = fused_resnet.freeze(model, x)
    (region,) = regions(frozen, x)
    steps = region.fragment.steps
    assert sum(isinstance(step, fragment.ConvStep) and step.by_winograd for step in steps) == 3
    assert not fragment.projections(region.fragment) and len(fragment.segments(region.fragment)) == 5
    equal_outputs(frozen(x), networks.in_fp64(model, x))


# ----------------------------------------------------------------------------------------------------------- the choice


def offered(monkeypatch, model, x, **options):
    """The pieces that a plan for x could run as regions: the whole of each run, its stages, what was joined."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(pieces, "decide", lambda some, tuning: found.extend(some))
        fused_resnet.freeze(model, x, **options)
    return found


def test_rules_take_amx_alone(monkeypatch):
    for kernel in RUNNING:
        with monkeypatch.context() as patched:
            by_rule = pieces._BY_RULE
            use(patched, kernel)
            patched.setattr(pieces, "_BY_RULE", by_rule)
            x = torch.randn(X)
            found = regions(fused_resnet.freeze(networks.small(), x, dtype=kernel.dtype), x)
            assert len(found) == (kernel.name == "amx_bf16")


def test_a_backend_by_name_runs_in_none(by_rule):
    x = torch.randn(X)
    for backend in ("eager", "blocked"):
        frozen = fused_resnet.freeze(networks.small(), x, backend=backend)
        assert not regions(frozen, x) and len(separate(frozen, x)) == 12


def test_stages_end_where_maps_of_another_size_begin(monkeypatch):
    """A stem and its pooling are one of their own. A map that is read on, beside another, keeps its readers with it."""
    monkeypatch.setattr(pieces, "_BY_RULE", ())
    count = lambda model, x: [len(piece.fragment.steps) for piece in offered(monkeypatch, model, x)]  # noqa: E731
    assert count(stem_and_pools(), torch.randn(X)) == [8, 2, 2, 4]
    assert count(networks.small(Bottleneck), torch.randn(X)) == [16, 8, 4, 4]
    assert count(Maps(residual_is_the_input).eval(), torch.randn(2, 4, 9, 10)) == [2]


# times of the whole network, and of its three stages, as (region, separate); the convolutions of the regions then
CHOICES = {
    "the whole": (((60, 100), [(20, 30), (30, 40), (20, 30)]), [12]),
    "the whole, though a stage is not": (((60, 100), [(20, 30), (50, 40), (20, 30)]), [12]),
    "the stages around one": (((95, 100), [(10, 30), (50, 40), (20, 30)]), [6, 3]),
    "two that were joined": (((95, 100), [(10, 30), (10, 40), (40, 30)]), [9]),
    "none": (((105, 100), [(40, 30), (50, 40), (35, 30)]), []),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_is_measured_decides(tuned_files, monkeypatch, case):
    (whole, stages), expected = CHOICES[case]
    model, x = networks.small(), torch.randn(X)
    monkeypatch.setattr(pieces, "_BY_RULE", ())
    alternatives = offered(monkeypatch, model, x)
    assert [len(piece.fragment.convolutions) for piece in alternatives] == [12, 6, 3, 3]
    times = {piece.problem: one for piece, one in zip(alternatives, (whole, *stages))}

    def measured(some, tuning):
        table = Table.empty(str(winners.device_id("cpu")))
        table.runs["now"] = {"kernels": winners.kernel_digests()}
        for piece in some:
            ours, theirs = times.get(piece.problem, (1, 2))
            found = {REGION: Measured(None, ours, 0.5), SEPARATE: Measured(None, theirs, 0.0)}
            entry = Entry(REGION if ours < theirs else SEPARATE, SEPARATE, "now", found)
            table.entries.setdefault(winners.key(piece.problem), {})[piece.problem.N] = entry
        winners.keep(table)

    monkeypatch.setattr(pieces, "decide", measured)
    frozen = fused_resnet.freeze(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == expected
    equal_outputs(frozen(x), networks.in_fp64(model, x))


@pytest.fixture(params=[dtype for dtype in DTYPES if kernels.fastest(dtype) is not None], ids=str)
def piece(request, tuned_files, monkeypatch):
    """One stage that may be measured."""
    monkeypatch.delenv("FUSED_RESNET_TUNE", raising=False)
    model = networks.single(Bottleneck, channels=8)
    whole, *_ = offered(monkeypatch, model, torch.randn(2, 16, 7, 9), tune=False, dtype=request.param)
    return whole


def measure(*some):
    pieces.decide(some, Tuning(0.01))


def test_it_is_measured_once(piece, monkeypatch):
    assert pieces.times_of(piece) is None and pieces.why_wrong(piece) is None
    measure(piece)
    times = pieces.times_of(piece)
    assert isinstance(times, Times) and min(times[:2]) > 0, winners.outcome(piece.region, REGION)
    assert 0 < winners.outcome(piece.region, REGION)["error_ratio"] < 1
    winners.forget()  # from the file
    monkeypatch.setattr(pieces, "_measure", lambda *arguments: pytest.fail("it was measured again"))
    measure(piece)
    assert pieces.times_of(piece) == times
    with monkeypatch.context() as patched:
        patched.setattr(pieces, "_measure", lambda wanted, *rest: found.extend(wanted))
        found = []
        patched.setattr(winners, "kernel_digest", lambda name: f"another {name}")
        patched.setattr(winners, "_is_current", lambda name, measured: name != REGION)
        winners.forget()
        measure(piece)
    winners.forget()
    assert found == [piece]


def test_nothing_is_measured_where_that_is_off(piece, monkeypatch):
    monkeypatch.setattr(pieces, "_measure", lambda *arguments: pytest.fail("it was measured"))
    pieces.decide([piece], Tuning(False))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    pieces.decide([piece], Tuning("auto"))


WRONG = {
    "a bias is left out": lambda made: made.biases[1].zero_(),
    "weights in another order": lambda made: made.weights[1].copy_(made.weights[1].flip(1)),
    "one output channel": lambda made: made.weights[-1][0, :, 0, 0].zero_(),
    "a halo that nobody writes": lambda made: made.program.copy_(_without_zero_halo(made.program)),
}


def _without_zero_halo(program):
    """Zeros go into the halo of the first buffer instead, which needs none."""
    integers, buffers = program.tolist(), program[2].item()
    place = 3 + 7 * buffers
    sizes = {0: 7, 1: 4, 4: 11, 5: 11, 6: 9, 10: 9}
    while place < len(integers):
        kind = integers[place]
        if kind == 2:
            integers[place + 1] = 0
        place += sizes.get(kind, 2 if kind == 2 else 8 + 11 * integers[min(place + 7, len(integers) - 1)])
    return torch.tensor(integers)


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_region_is_found_and_never_chosen(piece, monkeypatch, how):
    right = material.compile_fragment

    def wrong(*arguments):
        made = right(*arguments)
        made = made._replace(weights=[w.clone() for w in made.weights], biases=[b.clone() for b in made.biases])
        WRONG[how](made)
        return made

    monkeypatch.setattr(pieces, "_BY_RULE", ("amx_bf16", FP32.name))
    assert pieces.why_region(piece) == pieces.RULE
    monkeypatch.setattr(material, "compile_fragment", wrong)
    measure(piece)
    assert "its error is" in (pieces.why_wrong(piece) or "") or "no number" in pieces.why_wrong(piece)
    assert pieces.times_of(piece) is None and pieces.why_region(piece) is None
    monkeypatch.setattr(material, "compile_fragment", right)
    monkeypatch.setattr(pieces, "_measure", lambda *arguments: pytest.fail("what is wrong was measured again"))
    measure(piece)
    assert pieces.why_region(piece) is None


def test_what_does_not_run_is_not_chosen_by_this_process(piece, monkeypatch):
    """The next one tries again: too little memory, or whatever it was, may be over."""

    def refuse(*arguments):
        raise RuntimeError("no such step")

    with monkeypatch.context() as patched:
        patched.setattr(material, "compile_fragment", refuse)
        measure(piece)
    assert pieces.why_wrong(piece) == "RuntimeError: no such step" and pieces.why_region(piece) is None
    winners._SESSION.clear()
    winners.forget()
    assert pieces.why_wrong(piece) is None
    measure(piece)
    assert pieces.times_of(piece) is not None


def test_what_is_wrong_with_the_nodes_is_not_kept_of_the_region(piece, monkeypatch):
    """Nor is anything chosen in this process: there is nothing to compare it with."""
    nan = torch.full((2, *piece.fragment.value_shapes[-1][1:]), torch.nan)
    for effect, sentence in (([RuntimeError("no")], "RuntimeError: no"), ([[nan]], "no numbers")):
        call = mock.Mock(side_effect=effect)
        monkeypatch.setattr(Material, "in_fp32", lambda self, piece, call=call: call)
        outcome = region_checks.checked(piece, Material())
        assert sentence in outcome["why"] and outcome["is_passing"]


def test_the_yardstick_is_the_nodes_in_the_dtype_of_the_fragment(piece):
    """Not what a library makes of them: in fp64 with each result rounded, the errors are of the same size."""
    images = material.images_of(piece.fragment)
    exact = Material().in_fp64(piece)([x.double() for x in images])
    found = Material().in_fp32(piece)(images)
    eps = torch.finfo(piece.fragment.dtype).eps
    for ours, right in zip(found, exact):
        assert ours.dtype == piece.fragment.dtype and ours.shape == right.shape
        assert 0 < networks.error(ours, right) < 32 * eps


def test_a_new_shape_is_checked_alone(piece, monkeypatch):
    monkeypatch.setattr(pieces, "_BY_RULE", ("amx_bf16", FP32.name))
    monkeypatch.setattr(pieces, "_measure", lambda *arguments: pytest.fail("it was measured"))
    pieces.decide([piece], Tuning("check"))
    assert winners.outcome(piece.region, REGION) is not None and pieces.times_of(piece) is None
    assert pieces.why_region(piece) == pieces.RULE


def test_a_convolution_that_is_wrong_in_blocks_is_in_no_region(tuned_files, by_rule):
    model, x = networks.small(), torch.randn(X)
    convs = regions(fused_resnet.freeze(model, x), x)[0].convolutions
    problem = convs[0].problem
    checks = winners.checks_of(problem, {"blocked": {"error_ratio": 3.0}})
    winners.keep(Table.empty(str(winners.device_id("cpu")))._replace(checks=checks))
    frozen = fused_resnet.freeze(model, x)
    assert [len(region.convolutions) for region in regions(frozen, x)] == [11]
    assert [conv.problem for conv in separate(frozen, x)] == [problem]


def test_a_frozen_model_measures_and_remembers(tuned_files, monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_TUNE", raising=False)
    model, x = networks.single(BasicBlock, stride=1, channels=16), torch.randn(2, 16, 8, 8)
    fused_resnet.freeze(model, x, tune=0.05)
    for module, name in ((pieces, "_measure"), (outright, "_timed"), (decide, "_checked")):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("it was measured again"))
    frozen = fused_resnet.freeze(model, x, tune=0.05)
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def test_traced_forwards_are_left_as_they_are(by_rule):
    """A region's outputs are memory of their own: what is written later does not reach them."""
    model = Traced(lambda self, x: (lambda y: (y, self.conv(y).add_(1)))(self.conv(self.conv(x)))).eval()
    x = torch.randn(2, 4, 8, 8)
    equal_outputs(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x))


def test_explain_shows_them(by_rule):
    """A row for each convolution, and a line for the call, with its share of the time."""
    model, x = networks.small(Bottleneck), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    explanation = fused_resnet.explain(frozen, x, measure=True)
    (region,), names = explanation.regions, {name for name, _ in model.named_modules()}
    assert len(explanation.rows) == region.convolutions == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert all(
        row.name in names and row.backend == "blocked" and "one call" not in row.source for row in explanation.rows
    )
    assert {row.source for row in explanation.rows} == {
        f"by {FP32.name} in a region of {region.convolutions} convolutions ({pieces.RULE})"
    }
    assert {row.region for row in explanation.rows} == {region.name}
    assert sum(row.time_us for row in explanation.rows) == pytest.approx(region.time_us)
    assert region.bytes_converted == 4 * (2 * 3 * 16 * 16 + 2 * 64 * 4 * 4)
    text = str(explanation)
    assert f"{region.convolutions} convolutions as one call by {FP32.name}" in text and "converted at its seams" in text
    (record,), totals = explanation.as_dict()["regions"], explanation.totals
    assert record["share"] == 1 and record["least_us"] == totals["least_us"] > 0
    assert (
        totals["bytes_moved"]
        == totals["bytes_least"]
        == region.bytes_moved
        < sum(row.bytes_moved for row in explanation.rows)
    )
    (line,) = (line for line in text.splitlines() if line.startswith("region "))
    cells = f"{region.bytes_moved / 1e6:.2f} 0.005 {region.least_us:.0f} 100.0 % {region.time_us:.0f} - -"
    assert " ".join(line.split()).endswith(cells)
    assert f"{100 * region.least_us / region.time_us:.0f} % of the roofline" in text


def test_explain_tells_what_a_region_computes_by_winograd(by_rule):
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1)).eval()
    x = torch.randn(2, 32, 16, 16)
    explanation = fused_resnet.explain(fused_resnet.freeze(model, x), x, roofline=Roofline(1e10, 1e11))
    assert [row.source.partition(" in a region")[0] for row in explanation.rows] == ["by Winograd", f"by {FP32.name}"]
    assert f"by {FP32.name}, 1 of them by Winograd" in str(explanation)


def test_a_plan_made_in_inference_mode_serves_outside(by_rule):
    """And the other way round: its workspace is written in both."""
    model, x = networks.small(), torch.randn(1, 3, 12, 12)
    frozen = fused_resnet.freeze(model, torch.randn(X))
    with torch.inference_mode():
        inside = frozen(x)
        frozen(torch.randn(X))
    outside = frozen(x)
    with torch.no_grad():
        assert torch.equal(frozen(x), outside)
    assert torch.equal(inside, outside) and not outside.is_inference()
    equal_outputs(outside, networks.in_fp64(model, x))


@pytest.mark.parametrize("stride", ([], ()))
def test_averages_with_atens_default_stride(stride):
    model = Traced(lambda m, x: F.avg_pool2d(m.conv(x), 2, stride)).eval()
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
