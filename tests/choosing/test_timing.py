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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_interleaved_on_cuda_sees_the_longer_kernel(graphs):
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 8192))
    stats = timing.interleaved(
        {"small": lambda: small @ small, "large": lambda: large @ large}, device="cuda", rounds=5, graphs=graphs
    )
    assert stats["large"].median_us > 5 * stats["small"].median_us > 0
