"""The two best of a convolution against each other inside a captured plan: which are tried, what is taken and kept."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.choosing import pieces, timing, winners
from fused_resnet.freezing import placing
from fused_resnet.freezing import plan as plans
from fused_resnet.freezing.swapping import swapped
from tests.support.plans import convolutions, needs_onednn
from tests.support.tuned_files import entry, problem

FIRST, SECOND, FAR = (problem(2, C=C) for C in (16, 32, 48))


class Fake:
    """A captured plan that takes `us` to replay."""

    def __init__(self, us, overrides):
        self.us, self.overrides = us, overrides

    def __call__(self, x):
        return self.us


@pytest.fixture
def replays(monkeypatch):
    """Times are what the fakes say."""

    def interleaved(calls, **options):
        assert options["rounds"] > 3
        return {name: timing.Stats(*(float(call()),) * 4, 9) for name, call in calls.items()}

    monkeypatch.setattr(timing, "interleaved", interleaved)


@pytest.fixture
def tuned(tuned_files, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    asked = []  # all is known; and with what may be measured each plan is made
    monkeypatch.setattr(placing, "decide", lambda problems, device, tuning: asked.append(tuning.tune))
    tuned_files.asked = asked
    return tuned_files


@pytest.fixture
def measured(tuned):
    """Two problems whose second best are close, and one whose is not. SECOND takes longest."""
    for one, own, other in ((FIRST, 10.0, 10.9), (SECOND, 20.0, 21.0), (FAR, 90.0, 100.0)):
        found = entry("eager", eager=(None, own), onednn=(None, other))
        tuned.add(tuned.user, one, found)


@needs_onednn
def test_what_is_faster_in_place_is_taken_and_kept(measured, replays):
    made = []

    def make(overrides):
        made.append(dict(overrides))
        return Fake(100.0 - 5 * (SECOND in overrides) + 5 * (FIRST in overrides), overrides)

    best = swapped(Fake(100.0, {}), make, [FIRST, SECOND, FAR, FIRST], torch.zeros(1))
    assert best.us == 95.0 and {one: s.backend.name for one, s in best.overrides.items()} == {SECOND: "onednn"}
    assert [list(overrides) for overrides in made] == [[SECOND], [SECOND, FIRST]]
    kept = {one: winners.entry_of(one) for one in (FIRST, SECOND, FAR)}
    assert {one: found.winner for one, found in kept.items()} == {FIRST: "eager", SECOND: "onednn", FAR: "eager"}
    assert [found.is_swapped for found in kept.values()] == [True, True, False]
    assert swapped(best, make, [FIRST, SECOND, FAR], torch.zeros(1)) is best and len(made) == 2  # not tried again


@needs_onednn
def test_a_gain_within_noise_changes_nothing(measured, replays):
    plan = Fake(100.0, {})
    assert swapped(plan, lambda overrides: Fake(99.8, overrides), [FIRST, SECOND], torch.zeros(1)) is plan
    assert winners.entry_of(SECOND).winner == "eager" and winners.entry_of(SECOND).is_swapped


@needs_onednn
def test_what_time_does_not_allow_is_tried_the_next_time(measured, replays):
    plan = Fake(100.0, {})
    assert swapped(plan, lambda overrides: Fake(1.0, overrides), [FIRST], torch.zeros(1), seconds=0.0) is plan
    assert not winners.entry_of(FIRST).is_swapped


@needs_onednn
@pytest.mark.parametrize("variable", ("FUSED_RESNET_TUNE", "FUSED_RESNET_TUNED"))
def test_nothing_is_tried_where_nothing_may_be_measured(measured, monkeypatch, variable):
    monkeypatch.setenv(variable, "0")
    winners.forget()
    plan = Fake(100.0, {})
    assert swapped(plan, pytest.fail, [FIRST, SECOND], torch.zeros(1)) is plan
    winners.forget()


@needs_onednn
def test_a_captured_plan_is_made_anew_with_the_second_best(tuned, monkeypatch):
    """As on a GPU; the plan of the second best is said to be twice as fast. No region, which a GPU has none of."""
    monkeypatch.setattr(pieces, "why_region", lambda piece: None)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval(), torch.randn(2, 3, 9, 9)
    (first, second) = (conv.problem for conv in convolutions(fused_resnet.freeze(model, x), x))
    tuned.add(tuned.user, first, entry("eager", eager=(None, 10.0), onednn=(None, 10.5)))
    tuned.add(tuned.user, second, entry("eager", eager=(None, 10.0), onednn=(None, 20.0)))
    monkeypatch.setattr(plans.Plan, "is_graphed", True)
    fast, slow = (timing.Stats(us, us, us, us, 9) for us in (10.0, 20.0))
    monkeypatch.setattr(timing, "interleaved", lambda calls, **options: {"own": slow, "other": fast})
    frozen = fused_resnet.freeze(model, x)
    assert [conv.backend.name for conv in convolutions(frozen, x)] == ["onednn", "eager"]
    assert tuned.asked[-2:] == ["auto", False]  # what time has not allowed is not measured for each swap
    torch.testing.assert_close(frozen(x), model(x))
    assert winners.entry_of(first).winner == "onednn"
    forced = fused_resnet.freeze(model, x, tune=False)
    assert [conv.backend.name for conv in convolutions(forced, x)] == ["onednn", "eager"]
