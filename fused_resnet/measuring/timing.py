"""Measuring: interleaved timings, this machine's roofline, a record of the environment. Microseconds per call."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, TypeVar, Union

import torch

from fused_resnet.freezing.plan import capturing
from fused_resnet.kernels.triton import cache_read, runtime
from fused_resnet.kernels.triton.conv.launch import allows_tf32
from fused_resnet.machine.devices import cpu_flags, cpu_name, device_name
from fused_resnet.machine.files import write_json
from fused_resnet.operators.problem import AddReluProblem, ConvProblem

__all__ = [
    "MIN_ROUNDS", "Progress", "Roofline", "Stats", "Variants", "captured", "device_name", "environment", "gpu_state",
    "interleaved", "roofline", "silent", "triton_version", "write_json",
]  # fmt: skip

MIN_ROUNDS = 3

Name = TypeVar("Name")
Variants = dict[str, Callable[[], Any]]
# progress(fraction done, what is being done)
Progress = Callable[[float, str], None]


def silent(fraction: float, text: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ timing


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


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The callable as one CUDA graph: a replay costs a single launch. It returns what the capture returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # tuning and lazy initialisation must not happen during capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(), torch.cuda.graph(graph):
        out = call()

    def replay(kept: Any = call) -> Any:  # the graph works in memory that `call` owns
        graph.replay()
        return out

    return replay


class Roofline(NamedTuple):
    """What this machine reaches in copying a buffer too large for its caches, and in one large matrix product.

    On CUDA also in reading a buffer that stays in L2 (None elsewhere, and without Triton).
    """

    bytes_per_s: float
    flops_per_s: float
    l2_bytes_per_s: Optional[float] = None

    def time_us(self, problem: Union[ConvProblem, AddReluProblem]) -> float:
        """The least time for a problem whose data starts and ends in main memory."""
        flops = problem.flops if isinstance(problem, ConvProblem) else 0
        return 1e6 * max(problem.bytes_moved / self.bytes_per_s, flops / self.flops_per_s)

    def as_dict(self) -> dict[str, Optional[float]]:
        """GB/s and TFLOP/s, for a record."""
        l2 = self.l2_bytes_per_s
        return {
            "gb_per_s": self.bytes_per_s / 1e9,
            "tflops": self.flops_per_s / 1e12,
            "l2_gb_per_s": None if l2 is None else l2 / 1e9,
        }


def roofline(device: str, dtype: torch.dtype) -> Roofline:
    """Measured now, best of several; about two seconds. Caches can beat it: small problems may exceed 100 %."""
    on_cuda = torch.device(device).type == "cuda"
    source = torch.randn(2**28 if on_cuda else 2**25, device=device)
    n = 8192 if on_cuda else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls: Variants = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    l2_bytes = 0
    if on_cuda and runtime.why_not("cuda", torch.float32) is None and not runtime.INTERPRETED:
        cached = source[: 2**22]  # 16 MiB
        sums = torch.empty(8 * torch.cuda.get_device_properties(device).multi_processor_count, device=device)
        l2_bytes = cache_read.bytes_read(cached, sums)
        calls["l2 read"] = lambda: cache_read.launch(cached, sums)
    best = interleaved(calls, device=device, rounds=20, budget_s=2)
    copied = 2 * source.numel() * source.element_size()
    return Roofline(
        copied / best["copy"].min_us * 1e6,
        2 * n**3 / best["matmul"].min_us * 1e6,
        l2_bytes / best["l2 read"].min_us * 1e6 if l2_bytes else None,
    )


# ------------------------------------------------------------------------------------------------------- environment


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on: processor, GPU and clocks, versions, threads, date, commit. No host name, no path."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "gpu": None,
        **_commit(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "allow_tf32": allows_tf32(),
            **gpu_state(),
        }
    return record


def triton_version() -> Optional[str]:
    return runtime.triton.__version__ if runtime.IMPORT_ERROR is None else None


def gpu_state() -> dict[str, Any]:
    """Driver, clocks in MHz and power in W as nvidia-smi reports them; empty where it cannot be asked."""
    fields = {"driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw"}
    query = f"--query-gpu={','.join(fields.values())}"
    out = _output("nvidia-smi", f"--id={torch.cuda.current_device()}", query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in out.splitlines()[0].split(",")] if out else []
    return dict(zip(fields, values))


def _commit() -> dict[str, Any]:
    """The commit of the code that is measured, and whether its tree has other changes.

    Changed records do not count: the one being written is always changed.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": commit or None, "dirty": bool(changes)}


def _output(*command: str) -> str:
    """What a program prints, or nothing when it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
