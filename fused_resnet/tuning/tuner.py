"""The process behind `fused-resnet tune`: for each convolution, every candidate checked, timed, the fastest kept.

A candidate is a backend with one of its configs. For each convolution:

1. What cannot win by arithmetic is dropped.
2. What remains is compiled ahead, and held against the reference. A wrong one is recorded and never chosen.
3. The right ones are timed in turn (`timing.in_network_order`), on CUDA by replaying a graph.
4. The fastest is written to the file.

The time is that of the launches in a plan, with x where the kernel reads it (`choosing.planned`). Some kernels
read x from row space, where a plan cannot always keep it. So the fastest of the other kernels is written too. The
backend of the fixed order is always a candidate, and keeps its place unless another one beats it by MARGIN. A journal
keeps every check and row, so that a process that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Optional, Sequence

import torch

from fused_resnet import backends, measuring
from fused_resnet.choosing import winners, winners_file
from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.choosing.winners_file import Table
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import cost
from fused_resnet.kernels.triton.precompile import Precompiler
from fused_resnet.kernels.triton.runtime import triton_version
from fused_resnet.machine import files
from fused_resnet.machine.errors import one_line
from fused_resnet.measuring import Row
from fused_resnet.measuring.environment import environment as environment_of
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.tuning.convolution import entry_of, tune_one
from fused_resnet.tuning.journal import Journal

_KEPT_APART = ("environment", "entry", "checks")  # of a row in the journal
_SECONDS = (0.3, 3.0)  # of timing for one convolution: at least, and where no budget says otherwise at most


def problems_of(
    networks: Mapping[str, tuple[Any, Sequence[int]]],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: str,
    *,
    live_bn: bool = False,
) -> list[ConvProblem]:
    """The distinct convolutions of these models, those first that take most of their model's time by arithmetic.

    networks: (model, image shape) by name. live_bn: as `fuse` runs them, not folded as in a frozen plan.
    """
    shares: dict[ConvProblem, float] = {}
    for model, shape in networks.values():
        for dtype in dtypes:
            for batch in batches:
                counted = measuring.convs_of(model, shape, batch, dtype, device)
                total = sum(problem.flops * count for problem, count in counted)
                for problem, count in counted:
                    if live_bn:
                        problem = problem._replace(has_bn=True, has_bias=False)
                    shares[problem] = max(shares.get(problem, 0.0), problem.flops * count / total)
    return sorted(shares, key=lambda problem: -shares[problem])


def journal_of(device: str) -> Journal:
    """The journal of a kind of device in the user's folder, for these threads, versions and kernel sources."""
    identity = {
        "device": winners.device_id(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "triton": triton_version(),
        "kernels": winners.kernel_digests(),
    }
    return Journal(journal_path(device), identity)


def journal_path(device: str) -> Path:
    """Its file: there from the first candidate on, and to be carried where tuning goes on on another machine."""
    name = winners_file.file_name(str(winners.device_id(device))).removesuffix(".json")
    return winners.user_folder() / f"{name}.journal.jsonl"


def tune(
    problems: Sequence[ConvProblem],
    *,
    device: str,
    folder: Path,
    budget_s: Optional[float] = None,
    rounds: Optional[int] = None,
    again: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure these convolutions and merge the winners into the device's file in `folder`.

    What the journal has is merged too, and not measured again unless `again`. budget_s: seconds after which no
    convolution is begun. Returns {"rows", "remaining", "file"}; "file" is None where it could not be written, which is
    reported once. Raises ValueError without a problem or where GPUs of different kinds are visible, and DeviceFailed.
    """
    name = winners.device_id(torch.device(device).type)
    if not problems or name is None:
        raise ValueError("tune: " + ("there is no convolution." if name else "GPUs of different kinds are visible."))
    journal = journal_of(torch.device(device).type)
    if again:
        journal.start_anew()
    environment = {**environment_of(device), "kernels": winners.kernel_digests()}
    rows: list[Row] = []
    path: Optional[Path] = None
    started, fresh = time.monotonic(), 0
    waiting = [problem for problem in problems if journal.row(str(problem)) is None]
    with _compiling(waiting) as compiled:
        for index, problem in enumerate(problems):
            row = journal.row(str(problem))
            elapsed = time.monotonic() - started
            if row is None and budget_s is not None and elapsed >= budget_s:
                continue
            if row is None:
                left = len(waiting) - fresh
                progress(index / len(problems), f"{problem}{_time_left(elapsed, fresh, left, budget_s)}")
                seconds = _seconds(budget_s, elapsed, left)
                row = tune_one(problem, device, journal, compiled.get(problem), seconds, rounds)
                row["environment"] = environment  # of the process that measured, also when another goes on from here
                journal.finish(str(problem), row)
                fresh += 1
            rows.append({key: value for key, value in row.items() if key not in _KEPT_APART})
            path = _kept(Path(folder), name, problem, row) or path
            if device != "cpu":
                torch.cuda.empty_cache()  # the graphs' memory, which nothing else is given
    progress(1.0, "done")
    measured = {row["problem"] for row in rows}
    return {
        "rows": rows,
        "remaining": [str(problem) for problem in problems if str(problem) not in measured],
        "file": None if path is None else path.name,
    }


def _kept(folder: Path, name: str, problem: ConvProblem, row: Row) -> Optional[Path]:
    run = row["environment"]["date"]
    table = Table(name, {}, {run: row["environment"]}, winners.checks_of(problem, row["checks"]), {})
    if row["entry"] is not None:
        table.entries[winners.key(problem)] = {problem.N: entry_of(row, run)}
    try:
        return winners.merge(folder, table)
    except OSError as error:
        files.report_once(f"{folder} cannot be written, so nothing that is measured is kept ({one_line(error)}).")
        return None


def _seconds(budget_s: Optional[float], elapsed: float, left: int) -> float:
    """How long to time the next convolution: half of its share, since compiling and checking take the other half."""
    least, most = _SECONDS
    return most if budget_s is None else min(most, max(least, 0.5 * (budget_s - elapsed) / left))


def _time_left(elapsed: float, done: int, left: int, budget_s: Optional[float]) -> str:
    if not done:
        return ""
    seconds = elapsed / done * left
    if budget_s is not None:
        seconds = min(seconds, budget_s - elapsed)
    return f", {left} to go, about {max(1, round(seconds / 60))} min left"


@contextlib.contextmanager
def _compiling(problems: Sequence[ConvProblem]) -> Iterator[dict[ConvProblem, Future]]:
    """Triton's candidates of all these problems, being compiled in the background; nothing without a GPU."""
    triton = backends.known("conv_bn_act")["triton"]
    wanted = [p for p in problems if p.device == "cuda" and not runtime.INTERPRETED and triton.why_not(p) is None]
    if not wanted:
        yield {}
        return
    device = torch.device("cuda", torch.cuda.current_device())
    arch, num_sms = runtime.arch(device), runtime.num_sms(device)
    with Precompiler(arch) as precompiler:
        yield {problem: precompiler.submit(problem, cost.promising(problem, arch, num_sms)) for problem in wanted}
