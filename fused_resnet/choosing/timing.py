"""Interleaved timings. Microseconds per call."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, TypeVar

import torch

from fused_resnet.machine.cuda_graphs import captured

MIN_ROUNDS = 3
LAST_HOPES = {1: 4.0, 4: 1.3}  # after the second and the fifth round: times the least time of the fastest

Name = TypeVar("Name")
Group = TypeVar("Group")
Variants = dict[str, Callable[[], Any]]
# progress(fraction done, what is being done)
Progress = Callable[[float, str], None]


def silent(fraction: float, text: str) -> None:
    pass


def never_back(progress: Progress) -> Progress:
    """The same for what is done in several parts, of which each tells from its own beginning."""
    most = 0.0

    def told(fraction: float, text: str) -> None:
        nonlocal most
        most = max(most, fraction)
        progress(most, text)

    return told


class Stats(NamedTuple):
    """Microseconds per call: median, least, 10th and 90th percentile, and over how many calls."""

    median_us: float
    min_us: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, times_us: Sequence[float]) -> "Stats":
        ordered = sorted(times_us)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[0], ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
        )


def interleaved(
    variants: Mapping[Name, Callable[[], Any]],
    *,
    device: str = "cpu",
    rounds: Optional[int] = None,
    budget_s: Optional[float] = None,
    warmup: int = 2,
    graphs: bool = False,
    pause_s: float = 0.0,
    repeats: int = 0,
    progress: Progress = silent,
) -> dict[Name, Stats]:
    """Time callables round-robin, so that a drift of clocks or a busy neighbour meets all of them alike.

    Each is called `warmup` times. Then come rounds, each starting one variant later than the last. They end when
    `rounds` are done or, after at least MIN_ROUNDS, `budget_s` seconds have passed. At least one of the two
    must be given.
    CPU: wall time around each call. CUDA: events around each call, after the L2 cache was overwritten; that write also
    gives the launches a head start. graphs=True captures each callable as a CUDA graph and replays it, so that only
    device time counts. pause_s: nothing is done for so long before each call. Threads of one library may spin for a
    while after its call, on the cores that the next call wants. repeats: so often each is called before its timed
    call, which then finds its weights where a server's calls leave them. Else the others have driven them out.

    Raises ValueError without variants, without a limit, or for a limit that is not positive.
    """
    if not variants:
        raise ValueError("interleaved: there is nothing to time.")
    if rounds is None and budget_s is None:
        raise ValueError("interleaved: give rounds, budget_s or both.")
    if (rounds is not None and rounds < 1) or (budget_s is not None and budget_s <= 0):
        raise ValueError(f"interleaved: limits must be positive, got rounds={rounds}, budget_s={budget_s}.")
    on_cuda = torch.device(device).type == "cuda"
    calls = {name: captured(call) if on_cuda and graphs else call for name, call in variants.items()}
    measure = _cuda_clock(device) if on_cuda else _wall_clock
    for call in calls.values():
        for _ in range(warmup):
            call()
    if on_cuda:
        torch.cuda.synchronize(device)

    times: dict[Name, list[float]] = {name: [] for name in calls}
    names, started, done = list(calls), time.monotonic(), 0
    while rounds is None or done < rounds:
        elapsed = time.monotonic() - started
        if budget_s is not None and done >= MIN_ROUNDS and elapsed >= budget_s:
            break
        parts = [done / rounds if rounds else 0.0, min(1.0, elapsed / budget_s) if budget_s else 0.0]
        progress(max(parts), f"round {done + 1}")
        first = done % len(names)
        for name in names[first:] + names[:first]:
            if pause_s:
                time.sleep(pause_s)
            for _ in range(repeats):
                calls[name]()
            times[name].append(measure(calls[name]))
        done += 1
    progress(1.0, "done")
    return {name: Stats.of(samples) for name, samples in times.items()}


class Fed(NamedTuple):
    """A call and what writes its input, as the layers before it do in a network. Only the call is timed."""

    feed: Callable[[], Any]
    call: Callable[[], Any]


def in_network_order(
    groups: Mapping[Group, Mapping[Name, Fed]],
    *,
    device: str = "cpu",
    rounds: int = 30,
    least_rounds: int = MIN_ROUNDS,
    budget_s: float = math.inf,
    progress: Progress = silent,
) -> dict[Group, dict[Name, Stats]]:
    """Time what stands for one another, group by group, in rounds over all groups: as a network calls its layers.

    How caches are treated, and why that predicts a network: a call's input has just been written, so it is as hot as a
    layer leaves it to the next. Its weights were last used a round ago. Since then all other groups' have been, and 64
    MiB of other memory. So they are as cold as from one image to the next.

    Each is called once before. After the second and fifth round a group goes on with those within LAST_HOPES of its
    fastest. There are at most `rounds`, and after `least_rounds` none is begun later than `budget_s` seconds.
    """
    on_cuda = torch.device(device).type == "cuda"
    measure, sweep = (_events if on_cuda else _wall_clock), _sweeper(device)
    left = {group: list(calls) for group, calls in groups.items()}
    times: dict[Group, dict[Name, list[float]]] = {
        group: {name: [] for name in calls} for group, calls in groups.items()
    }
    for calls in groups.values():
        for feed, call in calls.values():
            feed()
            call()
    started = time.monotonic()
    for done in range(rounds):
        elapsed = time.monotonic() - started
        if done >= least_rounds and elapsed >= budget_s:
            break
        progress(max(done / rounds, min(1.0, elapsed / budget_s)), f"round {done + 1}")
        sweep()
        for group, names in left.items():
            first = done % len(names) if names else 0
            for name in names[first:] + names[:first]:
                feed, call = groups[group][name]
                feed()
                times[group][name].append(measure(call))
        if done in LAST_HOPES:
            left = {group: _within(LAST_HOPES[done], times[group]) for group in left}
    progress(1.0, "done")
    return {
        group: {name: Stats.of(samples) for name, samples in found.items() if samples} for group, found in times.items()
    }


def _within(factor: float, times: Mapping[Name, Sequence[float]]) -> list[Name]:
    least = min((min(samples) for samples in times.values()), default=0.0)
    return [name for name, samples in times.items() if min(samples) <= factor * least]


def _wall_clock(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def _sweeper(device: str) -> Callable[[], Any]:
    """What leaves nothing of earlier rounds in the caches."""
    if torch.device(device).type == "cpu":
        scratch = torch.zeros(2**24)
    else:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        scratch = torch.zeros(max(l2_bytes, 2**24), device=device)
    return lambda: scratch.add_(1.0)  # reads too: writing alone may pass the caches by


def _events(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _cuda_clock(device: str) -> Callable[[Callable[[], Any]], float]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(4 * l2_bytes, 2**26), dtype=torch.int8, device=device)

    def measure(call: Callable[[], Any]) -> float:
        scratch.zero_()
        return _events(call)

    return measure
