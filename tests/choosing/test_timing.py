"""Timing with callables whose duration is known."""

import pytest
import torch

from fused_resnet.choosing import timing


class FakeClock:
    """perf_counter and monotonic in one; callables advance it."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 100.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now)

    def taking(self, name, *seconds):
        remaining = list(seconds)

        def call():
            self.calls.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def test_stats_of_known_times():
    stats = timing.Stats.of([float(us) for us in reversed(range(11))])
    assert stats == timing.Stats(median_us=5.0, min_us=0.0, p10=1.0, p90=9.0, samples=11)
    assert timing.Stats.of([7.0]) == timing.Stats(7.0, 7.0, 7.0, 7.0, 1)


def test_interleaved_measures_each_callable(clock):
    variants = {"fast": clock.taking("fast", 0.001), "slow": clock.taking("slow", 0.5, 0.004, 0.002, 0.003)}
    stats = timing.interleaved(variants, rounds=3, warmup=1)  # the first call, 0.5 s, is the warm-up
    assert stats["fast"].median_us == pytest.approx(1000)
    assert stats["slow"].median_us == pytest.approx(3000)
    assert (stats["slow"].min_us, stats["slow"].samples) == (pytest.approx(2000), 3)


def test_rounds_start_one_variant_later_each_time(clock):
    timing.interleaved({name: clock.taking(name, 0.001) for name in "abc"}, rounds=3, warmup=0)
    assert "".join(clock.calls) == "abc" + "bca" + "cab"


def test_budget_ends_the_rounds_after_the_least_number(clock):
    stats = timing.interleaved({"a": clock.taking("a", 1.0)}, budget_s=10, warmup=0)
    assert stats["a"].samples == 10
    stats = timing.interleaved({"a": clock.taking("a", 100.0)}, budget_s=1, warmup=0)
    assert stats["a"].samples == timing.MIN_ROUNDS


def test_rounds_are_a_ceiling_beside_a_budget(clock):
    assert timing.interleaved({"a": clock.taking("a", 1.0)}, budget_s=10, rounds=4, warmup=0)["a"].samples == 4


def test_progress_rises_to_one(clock):
    seen = []
    timing.interleaved({"a": clock.taking("a", 1.0)}, rounds=4, warmup=0, progress=lambda f, text: seen.append(f))
    assert seen == [0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "variants, limits, message",
    [
        ({}, {"rounds": 1}, "nothing to time"),
        ({"a": None}, {}, "rounds, budget_s or both"),
        ({"a": None}, {"rounds": 0}, "rounds=0"),
        ({"a": None}, {"budget_s": -1.0}, "budget_s=-1.0"),
    ],
)
def test_interleaved_refuses(variants, limits, message):
    with pytest.raises(ValueError, match=message):
        timing.interleaved(variants, **limits)


# --------------------------------------------------------------------------------------------------- in network order


def fed(clock, name, *seconds):
    """A call of known duration. Its input takes 7 s to write, and is named by the capital letter."""
    return timing.Fed(clock.taking(name.upper(), 7.0), clock.taking(name, *seconds))


@pytest.fixture
def swept(clock, monkeypatch):
    """A clock whose calls hold "|" where the caches are emptied."""
    monkeypatch.setattr(timing, "_sweeper", lambda device: clock.taking("|", 5.0))
    return clock


def test_a_round_goes_through_all_groups_as_a_network_through_its_layers(swept):
    groups = {group: {name: fed(swept, name, 0.001) for name in group} for group in ("ab", "xyz")}
    timing.in_network_order(groups, rounds=3)
    warm_up, *rounds = "".join(swept.calls).split("|")
    assert warm_up == "AaBb" + "XxYyZz"
    assert rounds == ["AaBb" + "XxYyZz", "BbAa" + "YyZzXx", "AaBb" + "ZzXxYy"]


def test_neither_the_input_nor_the_sweep_is_timed(swept):
    """Nor is the first call, which takes 50 s."""
    groups = {1: {"a": fed(swept, "a", 50.0, 0.002, 0.004, 0.003)}, 2: {"a": fed(swept, "b", 50.0, 0.001)}}
    stats = timing.in_network_order(groups, rounds=3)
    assert stats[1]["a"].median_us == pytest.approx(3000) and stats[1]["a"].min_us == pytest.approx(2000)
    assert stats[2]["a"].p90 == pytest.approx(1000)


def test_the_slow_are_dropped_after_the_second_and_the_fifth_round(swept):
    """Within their group alone: "d" is slower than all. What was measured of them until then is kept."""
    seconds = dict(a=1.0, b=4.1, c=1.35, e=1.25)
    groups = {
        "many": {name: fed(swept, name, took) for name, took in seconds.items()},
        "one": {"d": fed(swept, "d", 9)},
    }
    stats = timing.in_network_order(groups, rounds=6)
    assert {name: one.samples for name, one in stats["many"].items()} == dict(a=6, b=2, c=5, e=6)
    assert stats["one"]["d"].samples == 6
    assert stats["many"]["b"].median_us == pytest.approx(4.1e6)


def test_one_slow_call_drops_nobody_who_was_fast_before(swept):
    """The least time counts: a disturbed round is not held against a candidate."""
    for seconds in ((1.0, 1.1, 9.0, 9.0, 9.0, 9.0, 1.1), (9.0, 9.0, 1.1, 1.1, 1.1, 1.1, 1.1)):
        groups = {1: {"a": fed(swept, "a", 1.0), "b": fed(swept, "b", *seconds)}}
        assert timing.in_network_order(groups, rounds=6)[1]["b"].samples == 6


def test_the_budget_counts_all_that_a_round_takes_and_leaves_the_least_rounds(swept):
    def rounds_within(**limits):
        return timing.in_network_order({1: {"a": fed(swept, "a", 8.0)}}, **limits)[1]["a"].samples  # 20 s a round

    assert rounds_within(budget_s=100.0) == 5
    assert rounds_within(budget_s=101.0) == 6
    assert rounds_within(budget_s=100.0, rounds=4) == 4
    assert rounds_within(budget_s=1.0) == timing.MIN_ROUNDS
    assert rounds_within(budget_s=1.0, least_rounds=7) == 7
    assert rounds_within() == 30


def test_progress_in_network_order_rises_to_one(swept):
    seen = []
    groups = {1: {"a": fed(swept, "a", 8.0)}}
    timing.in_network_order(groups, rounds=5, progress=lambda fraction, text: seen.append((fraction, text)))
    assert seen == [*((n / 5, f"round {n + 1}") for n in range(5)), (1.0, "done")]
    seen.clear()
    timing.in_network_order(groups, budget_s=80.0, progress=lambda fraction, text: seen.append(fraction))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_group_without_calls_has_no_times(swept):
    """All of its candidates were wrong."""
    assert timing.in_network_order({1: {}, 2: {"a": fed(swept, "a", 1.0)}}, rounds=1)[1] == {}
    assert timing.in_network_order({}) == {}


def test_in_network_order_for_real():
    x = torch.zeros(4)
    small, large = (torch.randn(n, n) for n in (8, 512))
    calls = {
        "small": timing.Fed(lambda: x.add_(1), lambda: small @ small),
        "large": timing.Fed(int, lambda: large @ large),
    }
    stats = timing.in_network_order({1: calls}, rounds=3)[1]
    assert 0 < stats["small"].min_us < stats["large"].min_us and x.tolist() == [4.0] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_interleaved_on_cuda_sees_the_longer_kernel(graphs):
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 8192))
    stats = timing.interleaved(
        {"small": lambda: small @ small, "large": lambda: large @ large}, device="cuda", rounds=5, graphs=graphs
    )
    assert stats["large"].median_us > 5 * stats["small"].median_us > 0


def test_what_is_repeated_is_timed_the_last_time():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = timing.interleaved(variants, rounds=2, warmup=0, repeats=1)
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert all(stats.samples == 2 for stats in found.values())
