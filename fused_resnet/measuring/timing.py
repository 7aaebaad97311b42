"""Interleaved timings. Microseconds per call."""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, TypeVar

import torch

from fused_resnet.machine.cuda_graphs import captured

MIN_ROUNDS = 3

Name = TypeVar("Name")
Variants = dict[str, Callable[[], Any]]
# progress(fraction done, what is being done)
Progress = Callable[[float, str], None]


def silent(fraction: float, text: str) -> None:
    pass


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
    cold: bool = False,
    progress: Progress = silent,
) -> dict[Name, Stats]:
    """Time callables round-robin, so that a drift of clocks or a busy neighbour meets all of them alike.

    Each is called `warmup` times. Then come rounds, each starting one variant later than the last. They end when
    `rounds` are done or, after at least MIN_ROUNDS, `budget_s` seconds have passed. At least one of the two
    must be given.
    CPU: wall time around each call; cold=True empties the caches before it, as the layers between two calls of one
    do in a network. CUDA: events around each call, after the L2 cache was overwritten; that write also
    gives the launches a head start. graphs=True captures each callable as a CUDA graph and replays it, so that only
    device time counts.

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
    measure = _cuda_clock(device) if on_cuda else _cold_wall_clock() if cold else _wall_clock
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
            times[name].append(measure(calls[name]))
        done += 1
    progress(1.0, "done")
    return {name: Stats.of(samples) for name, samples in times.items()}


def _wall_clock(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def _cold_wall_clock() -> Callable[[Callable[[], Any]], float]:
    scratch = torch.zeros(2**24)  # 64 MiB

    def measure(call: Callable[[], Any]) -> float:
        scratch.add_(1.0)  # reads too: writing alone may pass the caches by
        return _wall_clock(call)

    return measure


def _cuda_clock(device: str) -> Callable[[Callable[[], Any]], float]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(4 * l2_bytes, 2**26), dtype=torch.int8, device=device)

    def measure(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return measure
