"""Regions that are taken before their convolutions are measured: only where nothing else could be as fast."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.choosing import decide, material, outright, pieces, process, timing, winners
from fused_resnet.choosing.pieces import REGION
from fused_resnet.choosing.timing import Stats
from fused_resnet.freezing.modules import FrozenConv, FrozenRegion
from fused_resnet.kernels import compiled
from fused_resnet.nn import Bottleneck
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions import kernels
from tests.support import networks
from tests.support.plans import equal_outputs

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

X = (2, 3, 16, 16)
CONV_US = 10.0  # of the fastest candidate of each convolution: six in the first stage, three in the two others


@pytest.fixture
def measuring(tuned_files, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    monkeypatch.setattr(process, "run", no_child)
    monkeypatch.setattr(pieces, "_BY_RULE", (kernels.fastest_name(torch.float32),))


def no_child(*args, **options):
    raise process.NoChild("no")
    yield


@pytest.fixture
def clock(monkeypatch):
    """Says what regions take, the whole first; lists what is timed."""

    class Clock:
        def __init__(self):
            self.regions, self.timed, self.candidates = (), [], {}

        def time(self, groups, **options):
            self.timed += groups
            self.candidates.update((group, set(map(str, calls))) for group, calls in groups.items())
            left, found = list(self.regions), {}
            for group, calls in groups.items():
                times = {one: CONV_US + place for place, one in enumerate(calls)}
                if not isinstance(group, ConvProblem):
                    times = {REGION: left.pop(0) if left else 1.0, **{one: 2.0 for one in calls if one != REGION}}
                found[group] = {one: Stats(t, t, t, t, 9) for one, t in times.items()}
            return found

    clock = Clock()
    monkeypatch.setattr(timing, "in_network_order", clock.time)
    return clock


def frozen_network(**options):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x, **options)
    equal_outputs(frozen(x), networks.in_fp64(model, x))
    return [module for module in frozen.plan(x).modules() if isinstance(module, (FrozenConv, FrozenRegion))]


def is_measured(region):
    return any(winners.entry_of(conv.problem) is not None for conv in region.convolutions)


def test_what_is_clearly_faster_is_taken_and_remembered(measuring, clock, monkeypatch):
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    (region,) = frozen_network()
    assert "100 us, separate nodes 120 us at least" in region.why and "tuned here" in region.why
    assert not is_measured(region) and winners.outcome(winners_problem(region), REGION)["error_ratio"] < 1
    winners.forget()  # from the file
    for module, name in ((outright, "_timed"), (decide, "_decide_on_cpu"), (pieces, "_measure")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("it was measured again"))
    assert frozen_network()[0].why == region.why
    assert frozen_network(tune=False)[0].why == region.why


def winners_problem(region):
    return piece_of(region).region


def piece_of(region):
    return outright.Piece(region.fragment, tuple(range(len(region.fragment.steps))))


NOT_CLEAR = {
    "it wins by less": (109.0, 50.0, 25.0, 25.0),
    "it is slower": (150.0, 50.0, 25.0, 25.0),
    "a stage loses, and a mixture may win": (100.0, 50.0, 45.0, 15.0),
}


@pytest.mark.parametrize("case", NOT_CLEAR)
def test_else_all_is_measured(measuring, clock, case):
    clock.regions = NOT_CLEAR[case]
    frozen_network()
    problems = [one for one in clock.timed if isinstance(one, ConvProblem)]
    assert all(winners.entry_of(one) is not None for one in problems)
    clock.timed.clear()
    frozen_network()
    assert not clock.timed


def test_a_stage_that_loses_less_than_the_whole_gains_changes_nothing(measuring, clock):
    clock.regions = (90.0, 50.0, 32.0, 25.0)
    (region,) = frozen_network()
    assert isinstance(region, FrozenRegion) and not is_measured(region)


def test_a_wrong_region_is_not_taken(measuring, clock, monkeypatch):
    right = material.compile_fragment

    def wrong(*arguments):
        made = right(*arguments)
        return made._replace(biases=[torch.zeros_like(bias) for bias in made.biases])

    monkeypatch.setattr(material, "compile_fragment", wrong)
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    assert all(isinstance(module, FrozenConv) for module in frozen_network())


def test_what_is_wrong_by_itself_is_not_counted(measuring, clock):
    """A candidate that was found wrong is not run at all, be it the fastest."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval(), torch.randn(X)
    (region,) = (m for m in fused_resnet.freeze(model, x).plan(x).modules() if isinstance(m, FrozenRegion))
    problem = region.convolutions[0].problem
    first = decide.not_wrong(problem)[0]
    checks = winners.checks_of(problem, {str(first): {"why": "it ended the process (SIGSEGV)"}})
    winners.keep(winners.Table.empty(str(winners.device_id("cpu")))._replace(checks=checks))
    assert first not in decide.not_wrong(problem)


def test_who_gives_seconds_has_all_measured(measuring, clock, monkeypatch):
    """Also where it was taken outright before; and afterwards what was measured counts, whoever asks."""
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    (region,) = frozen_network()
    assert not is_measured(region)
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    frozen_network(tune=60)
    assert all(winners.entry_of(conv.problem) is not None for conv in region.convolutions)
    winners.forget()
    clock.timed.clear()
    for tune in (60, "auto"):
        assert frozen_network(tune=tune)
        assert not clock.timed and outright.why_region(piece_of(region)) is None


def test_what_was_not_checked_has_no_error(measuring, clock):
    clock.regions = (150.0, 50.0, 25.0, 25.0)
    frozen_network()
    (problem,) = [one for one in clock.timed[:50] if getattr(one, "op", "") == "region"][:1]
    assert {name: one.error_ratio for name, one in winners.entry_of(problem).candidates.items()} == {
        REGION: None, pieces.SEPARATE: None,
    }  # fmt: skip


@pytest.fixture
def crashing(monkeypatch):
    """Give it a backend, which then ends the child on the first problem. It lists what is tried."""

    def let(backend):
        def run(jobs, device):
            for index, job in enumerate(jobs):
                assert job.is_trial
                for name in job.names:
                    ends = name == backend and index == 0 and not tried
                    outcome = {"why": "it ended the process (SIGSEGV)"} if ends else {}
                    yield process.Event(index, name, outcome, has_ended=ends)
            tried.extend(jobs)

        tried = []
        monkeypatch.setattr(process, "run", run)
        return tried

    return let


def test_a_new_backend_is_tried_in_a_process_of_its_own(measuring, clock, crashing):
    """Where it ends that, it is not run here, and it is tried again another time."""
    tried, clock.regions = crashing("direct"), (100.0, 50.0, 25.0, 25.0)
    (region,) = frozen_network()
    first, *others = dict.fromkeys(conv.problem for conv in region.convolutions)
    assert [job.problem for job in tried] == [str(one) for one in (first, *others)]
    assert winners.outcome(first, "direct")["why"].startswith("it ended the process")
    assert "direct" not in clock.candidates[first] and all("direct" in clock.candidates[one] for one in others)
    assert winners.is_trusted("eager", "cpu") and not winners.is_trusted("direct", "cpu")


def test_a_kernel_of_regions_that_ends_the_process_leaves_its_convolution_out(measuring, clock, crashing):
    crashing("blocked")
    region, conv = sorted(frozen_network(), key=lambda module: isinstance(module, FrozenConv))
    assert isinstance(conv, FrozenConv) and winners.outcome(conv.problem, "blocked")["why"]
    assert len(region.convolutions) == 11
    timed, _ = len(clock.timed), frozen_network()
    assert len(clock.timed) == timed


def test_it_depends_on_every_backend(measuring, clock, monkeypatch):
    """Another one might be faster than all that were counted."""
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    frozen_network()
    digests = winners.kernel_digest
    monkeypatch.setattr(winners, "kernel_digest", lambda name: "new" if name == "direct" else digests(name))
    winners.forget()
    clock.timed.clear()
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    frozen_network()
    assert clock.timed


def test_a_new_shape_is_checked_and_not_timed(measuring, clock):
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    model, x = networks.small(Bottleneck), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    clock.timed.clear()
    other = torch.randn(4, *X[1:])
    equal_outputs(frozen(other), networks.in_fp64(model, other))
    (region,) = (module for module in frozen.plan(other).modules() if isinstance(module, FrozenRegion))
    assert not clock.timed and winners.outcome(winners_problem(region), REGION) is not None


def test_progress_never_goes_back(measuring, clock):
    told = []
    clock.regions = (100.0, 50.0, 25.0, 25.0)
    frozen_network(progress=lambda fraction, text: told.append(fraction))
    assert told and told == sorted(told)
