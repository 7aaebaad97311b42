"""The process behind `fused-resnet tune`: for each convolution, every candidate checked, timed, the fastest kept.

A candidate is a backend with one of its configs. For each convolution:

1. What cannot win by arithmetic is dropped.
2. What remains is compiled ahead, and held against the reference. A wrong one is recorded and never chosen.
3. The right ones are timed in turn from cold caches, on CUDA by replaying a graph.
4. The fastest is written to the file.

The time is that of the launches in a plan, with x where the kernel reads it (`bench.planned_call`). Some kernels read x
from row space, where a plan cannot always keep it. So the fastest of the other kernels is written too. The backend of
the fixed order is always a candidate, and keeps its place unless another one beats it by MARGIN. A journal keeps every
check and row, so that a process that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch

from fused_resnet import backends, measuring
from fused_resnet.backends import winners, winners_file
from fused_resnet.kernels import compiled as libraries
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import configs as conv_configs
from fused_resnet.kernels.triton.precompile import Precompiler
from fused_resnet.machine import files
from fused_resnet.measuring import timing
from fused_resnet.measuring.timing import Progress, silent
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.tuning.journal import Journal

MARGIN = 0.03  # by which a winner must beat what the fixed order takes, or noise would decide between equals
_HOPELESS = 3.0  # times the least estimate: above it a config is not measured
_MOST_CONFIGS = 12  # of one backend, by estimate
_FINALISTS = 4  # of one backend, after a few rounds each
_SCREENING_ROUNDS = 5
_SECONDS = (0.3, 3.0)  # of timing for one convolution: at least, and where no budget says otherwise at most

Row = dict[str, Any]


class DeviceFailed(RuntimeError):
    """A candidate has left the GPU unusable for this process. It is in the journal: the next run leaves it out."""


class Candidate(NamedTuple):
    """A backend and one of its configs, None for a default that is the same inside plans and outside."""

    backend: backends.Backend
    config: Optional[Any]

    @property
    def reads_row_space(self) -> bool:
        return self.backend.reads_row_space(self.config)

    def __str__(self) -> str:
        if self.config is None:
            return self.backend.name
        return f"{self.backend.name} {' '.join(f'{key}={value}' for key, value in self.config._asdict().items())}"


def candidates(problem: ConvProblem) -> tuple[list[Candidate], dict[str, str]]:
    """(what is worth measuring, the fixed order's choice first; why the other backends cannot run the problem)."""
    first = backends.fixed_order(problem, in_plan=True).backend
    found = {Candidate(first, _default(problem, first)): None}
    skipped = measuring.why_not_timed(problem)
    for name, backend in backends.known(problem.op).items():
        if name not in skipped:
            configs = [_default(problem, backend), *promising(problem, backend)]
            found.update(dict.fromkeys(Candidate(backend, config) for config in configs))
    return list(found), skipped


def _default(problem: ConvProblem, backend: backends.Backend) -> Optional[Any]:
    return None if backend.default_config is None else backend.default_config(problem)


def promising(problem: ConvProblem, backend: backends.Backend) -> list[Any]:
    """The configs of a backend that may win, the likeliest first where it estimates them."""
    configs = list(backend.configs(problem)) if backend.configs else []
    if backend.estimated_us is None:
        return configs
    return _likeliest({config: backend.estimated_us(problem, config) for config in configs})


def promising_on(problem: ConvProblem, arch: int) -> list[Any]:
    """Triton's configs that may win on an architecture, which need not be here."""
    configs = conv_configs.configs(problem, arch)
    return _likeliest({config: conv_configs.estimated_us(problem, config, arch) for config in configs})


def _likeliest(estimates: dict[Any, float]) -> list[Any]:
    limit = _HOPELESS * min(estimates.values(), default=0.0)
    return [config for config in sorted(estimates, key=estimates.__getitem__) if estimates[config] <= limit][
        :_MOST_CONFIGS
    ]


# ---------------------------------------------------------------------------------------------------------- problems


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
        convs = measuring.convs_of(model, shape, 1, torch.float32, device)
        for dtype in dtypes:
            for batch in batches:
                counted = [(one.problem._replace(N=batch, dtype=dtype), one.repeats) for one in convs]
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
        "triton": timing.triton_version(),
        "kernels": libraries.kernel_digests(),
    }
    return Journal(journal_path(device), identity)


def journal_path(device: str) -> Path:
    """Its file: there from the first candidate on, and to be carried where tuning goes on on another machine."""
    name = winners_file.file_name(str(winners.device_id(device))).removesuffix(".json")
    return winners.user_folder() / f"{name}.journal.jsonl"


# ------------------------------------------------------------------------------------------------------ one convolution


class _Subject:
    """One convolution with its operands, and what its candidates are held against."""

    def __init__(self, problem: ConvProblem, device: str) -> None:
        self.problem, live = problem, measuring.random_operands(problem, device)
        self.operands: ConvOperands = live if problem.has_bn else measuring.folded_operands(live)
        self.images, self.case = measuring.compared_case(problem, self.operands)

    def call(self, candidate: Candidate) -> Callable[[], torch.Tensor]:
        """The candidate as a frozen plan runs it, or with live BN as the operator does."""
        selection = backends.Selection(*candidate)
        if self.problem.has_bn:
            return functools.partial(selection.run, self.problem, self.operands)
        return measuring.planned_call(self.problem, selection, self.operands)

    def error_ratio(self, candidate: Candidate, call: Callable[[], torch.Tensor]) -> float:
        return measuring.error_ratio(measuring.Prepared(call, self.images, self.case, candidate.backend.name))


def _tune_one(
    problem: ConvProblem,
    device: str,
    journal: Journal,
    compiled: Optional[Future],
    seconds: float,
    rounds: Optional[int],
) -> Row:
    found, skipped = candidates(problem)
    try:
        subject = _Subject(problem, device)
    except torch.OutOfMemoryError as error:
        return _row(problem, device, found[0], {one: {"why": files.one_line(error)} for one in found}, {}, skipped)
    why_not_compiled = {} if compiled is None else compiled.result()
    calls: dict[Candidate, Callable[[], torch.Tensor]] = {}
    outcomes: dict[Candidate, dict] = {}
    with torch.no_grad():
        for candidate in found:
            why = why_not_compiled.get(candidate.config)
            outcome = {"why": why} if why else journal.outcome(str(problem), str(candidate))
            if outcome is None or "why" not in outcome:
                outcome, call = _checked(subject, candidate, device, journal, outcome)
                if call is not None:
                    calls[candidate] = call
            outcomes[candidate] = outcome
        stats = _timed(calls, found[0], device, seconds, rounds) if calls else {}
    return _row(problem, device, found[0], outcomes, stats, skipped)


def _timed(
    calls: dict[Candidate, Callable[[], torch.Tensor]],
    default: Candidate,
    device: str,
    seconds: float,
    rounds: Optional[int],
) -> dict[Candidate, timing.Stats]:
    """In turn, from cold caches; where there are many, after a few rounds only the likeliest."""
    measure = functools.partial(timing.interleaved, device=device, cold=True)
    if len(calls) > _FINALISTS + 1:
        calls = _fastest(calls, measure(calls, rounds=_SCREENING_ROUNDS), default)
    return measure(calls, budget_s=seconds, rounds=rounds)


def _checked(
    subject: _Subject, candidate: Candidate, device: str, journal: Journal, known: Optional[dict]
) -> tuple[dict, Optional[Callable[[], torch.Tensor]]]:
    """(what came of the check, the call if it may be timed). known: of an earlier run that was interrupted."""
    place = (str(subject.problem), str(candidate))
    if known is None:
        journal.begin(*place)
    try:
        call = subject.call(candidate)
        outcome = _compared(subject, candidate, call) if known is None else known
        if device != "cpu" and _is_right(outcome):
            call = timing.captured(call)  # as a frozen plan replays it; what cannot be captured fails here
            if known is None:
                outcome = _compared(subject, candidate, call)
    except KeyboardInterrupt:
        journal.interrupt(*place)
        raise
    except Exception as error:  # whatever a kernel, a compiler or a library raises: it costs this candidate alone
        outcome, call = {"why": files.one_line(error)}, None
        journal.end(*place, outcome)
        _check_device(device, subject.problem, candidate)
        return outcome, None
    if known is None:
        journal.end(*place, outcome)
    return outcome, call if _is_right(outcome) else None


def _compared(subject: _Subject, candidate: Candidate, call: Callable[[], torch.Tensor]) -> dict[str, Any]:
    ratio = subject.error_ratio(candidate, call)
    return {"error_ratio": ratio if math.isfinite(ratio) else None}


def _is_right(outcome: dict) -> bool:
    return outcome["error_ratio"] is not None and outcome["error_ratio"] <= 1


def _check_device(device: str, problem: ConvProblem, candidate: Candidate) -> None:
    if device == "cpu":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceFailed(
            f"{candidate} on {problem} has left the GPU unusable for this process ({files.one_line(error)}). It is "
            f"recorded and will not be tried again: give the same command once more to go on."
        ) from error


def _fastest(calls: dict, stats: dict[Candidate, timing.Stats], default: Candidate) -> dict:
    """What to time for longer: the default, and the fastest few of each backend in the screening.

    Those that read row space are counted apart from those that do not.
    """
    kept = {default} & calls.keys()
    alike: dict[tuple[str, bool], list[Candidate]] = {}
    for candidate in sorted(calls, key=lambda one: stats[one].min_us):
        mates = alike.setdefault((candidate.backend.name, candidate.reads_row_space), [])
        if len(mates) < _FINALISTS:
            mates.append(candidate)
            kept.add(candidate)
    return {candidate: call for candidate, call in calls.items() if candidate in kept}


def _row(
    problem: ConvProblem,
    device: str,
    default: Candidate,
    outcomes: dict[Candidate, dict],
    stats: dict[Candidate, timing.Stats],
    skipped: dict[str, str],
) -> Row:
    in_nhwc = {one: times for one, times in stats.items() if not one.reads_row_space}
    winner, winner_in_nhwc = (_winner(default, found) if found else None for found in (stats, in_nhwc))
    described = {one: {"backend": one.backend.name, "config": one.config and one.config._asdict()} for one in outcomes}
    return {
        "problem": str(problem),
        "default": described[default],
        "winner": winner and described[winner],
        "winner_in_nhwc": winner_in_nhwc and described[winner_in_nhwc],
        "speedup": stats[default].median_us / stats[winner].median_us if winner and default in stats else None,
        "timed": [
            {**described[one], **times._asdict(), **outcomes[one], "reads_row_space": one.reads_row_space}
            for one, times in stats.items()
        ],
        "wrong": [
            {**described[one], **outcome}
            for one, outcome in outcomes.items()
            if "why" not in outcome and not _is_right(outcome)
        ],
        "failed": [{**described[one], **outcome} for one, outcome in outcomes.items() if "why" in outcome],
        "skipped": skipped,
        "clocks": {} if device == "cpu" else timing.gpu_state(),
    }


def _winner(default: Candidate, stats: dict[Candidate, timing.Stats]) -> Candidate:
    """The fastest, but the default unless it is beaten by MARGIN in the median and in the least time."""
    best = min(stats, key=lambda one: stats[one].median_us)
    if default not in stats:
        return best
    own, other = stats[default], stats[best]
    is_clear = all(ours < (1 - MARGIN) * theirs for ours, theirs in zip(other[:2], own[:2]))
    return best if is_clear else default


def entry_of(row: Row, run: str) -> winners_file.Entry:
    """What is kept of a row: the best config of each backend that is right, and where any reads row space, the same
    without those."""
    entry = _entry_among(row["timed"], row["winner"], row["default"]["backend"], run)
    in_nhwc = [one for one in row["timed"] if not one.get("reads_row_space")]
    if not in_nhwc or len(in_nhwc) == len(row["timed"]):
        return entry
    return entry._replace(in_nhwc=_entry_among(in_nhwc, row["winner_in_nhwc"], entry.default, run))


def _entry_among(timed: Sequence[dict], winner: dict, default: str, run: str) -> winners_file.Entry:
    best: dict[str, winners_file.Measured] = {}
    for one in timed:
        measured = winners_file.Measured(one["config"], one["median_us"], one["error_ratio"])
        if one["backend"] not in best or measured.time_us < best[one["backend"]].time_us:
            best[one["backend"]] = measured
    kept = next(one for one in timed if {key: one[key] for key in ("backend", "config")} == winner)
    best[winner["backend"]] = winners_file.Measured(kept["config"], kept["median_us"], kept["error_ratio"])
    return winners_file.Entry(winner["backend"], default, run, best)


# -------------------------------------------------------------------------------------------------------------- tune


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
    environment = {**timing.environment(device), "kernels": libraries.kernel_digests()}
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
                row = _tune_one(problem, device, journal, compiled.get(problem), seconds, rounds)
                row["environment"] = environment  # of the process that measured, also when another goes on from here
                journal.finish(str(problem), row)
                fresh += 1
            rows.append({key: value for key, value in row.items() if key != "environment"})
            path = _kept(Path(folder), name, problem, row) if row["winner"] else path
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
    try:
        entries = {winners.key(problem): {problem.N: entry_of(row, run)}}
        return winners.add(folder, name, entries, run, row["environment"])
    except OSError as error:
        files.report_once(f"{folder} cannot be written, so nothing that is measured is kept ({files.one_line(error)}).")
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
    arch = runtime.arch(torch.device("cuda", torch.cuda.current_device()))
    with Precompiler(arch) as precompiler:
        yield {problem: precompiler.submit(problem, promising(problem, triton)) for problem in wanted}
