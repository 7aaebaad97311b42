"""Which backend and config computes each of a plan's convolutions: what was right and fastest on this very machine.

What the user's cache and the shipped files know is not measured again. Of the rest every candidate is checked against
the reference (`checking`), and the right ones are timed as a network runs them (`timing.in_network_order`). What was
found is kept, also of those that are wrong, which are never chosen.

| device | where it is checked | where it is timed | how long |
| --- | --- | --- | --- |
| CPU | backends that never were on this machine: in a child process | here | 10 rounds, or up to 30 in 3 s |
| GPU | in a child process | there | 60 s, the largest share of the roofline first; the next freeze goes on |
| GPU, a fused model's first calls | there | there | 60 s of a process in all |

Checks are outside that time. While one process measures, others that want to wait for what it finds.
FUSED_RESNET_TUNE=0 turns all this off; so does FUSED_RESNET_TUNED=0, with which nothing measured counts.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, Union

import torch

from fused_resnet.choosing import process, timing, winners
from fused_resnet.choosing.candidates import candidates, default_config
from fused_resnet.choosing.cases import folded_operands, random_operands
from fused_resnet.choosing.checking import Subject, checked
from fused_resnet.choosing.choice import Selection, fixed_order, select
from fused_resnet.choosing.planned import Planned, planned_call
from fused_resnet.choosing.timing import Fed, Progress, Stats, silent
from fused_resnet.choosing.winners_file import Entry, Measured, Table
from fused_resnet.machine import cuda_graphs, files
from fused_resnet.machine.locks import new_lock
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem

CLOSE = 1.1  # times the best: the second best is tried in its place in a captured plan
MARGIN = 0.03  # by which a winner must beat what the fixed order takes, or noise would decide between equals
ROUNDS, LEAST_ROUNDS, CPU_SECONDS, GPU_SECONDS = 30, 10, 3.0, 60.0
_SECONDS_FOR_ONE = 1.0  # of timing, on a GPU
_MOST_CONFIGS = 3  # of a backend, on a GPU: the likeliest
_HEAD_START_S = 5.0  # of the first process of a group
_WAIT_S = 180.0  # for another process that measures

Tune = Union[str, bool, float]


class Tuning(NamedTuple):
    """What may be measured for a plan: as `freeze` takes it, or "check", which times nothing. progress: is told which
    fraction is done, and what is being done."""

    tune: Tune = False
    progress: Progress = silent


MEASURE, NOTHING = Tuning("auto"), Tuning()
Outcomes = dict[ConvProblem, dict[str, dict[str, Any]]]

log = logging.getLogger("fused_resnet")
_measuring = new_lock()
_measuring_thread: Optional[int] = None


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    global _measuring_thread
    _measuring_thread = threading.get_ident()
    try:
        yield
    finally:
        _measuring_thread = None


def is_measuring_here() -> bool:
    """Whether this thread measures already: a callback of `progress` that freezes."""
    return _measuring_thread == threading.get_ident()


@contextlib.contextmanager
def measuring_alone(unknown: Callable[[], Sequence[Any]], device: str) -> Iterator[None]:
    """As the only one that measures on this machine, if the others end in time. unknown: what is left to find out."""
    with _measuring, _noted(), _alone(unknown, device):
        yield


def check_tune(caller: str, tune: Tune) -> None:
    """Raises ValueError for what is neither "auto", False, nor a number of seconds."""
    is_seconds = isinstance(tune, (int, float)) and not isinstance(tune, bool) and 0 < tune < math.inf
    if not (tune == "auto" or tune is False or is_seconds):
        raise ValueError(f'{caller}: tune must be "auto", False or a number of seconds above 0, got {tune!r}.')


def is_on() -> bool:
    """Whether anything may be measured now: the environment allows it, and nothing is watching what torch does."""
    is_allowed = os.environ.get("FUSED_RESNET_TUNE") != "0" and winners.are_used() and not winners.are_ignored()
    is_watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
    )
    if is_allowed and not is_watched and torch._C._len_torch_function_stack() > 0:
        files.report_once("Nothing is measured under a torch function mode, such as torch.set_default_device sets.")
        return False
    return is_allowed and not is_watched


def decide(problems: Sequence[ConvProblem], device: torch.device, tuning: Tuning = MEASURE) -> None:
    """Find out, and keep, what `select` should say of these problems of one plan. Does nothing where all is known."""
    tune, progress = tuning
    if tune is False or not is_on() or winners.device_id(device.type) is None:
        return
    if tune == "check":
        return _check_choices(problems, device)
    if is_measuring_here() or not _unknown(problems):
        return
    with measuring_alone(lambda: _unknown(problems), device.type):
        wanted = _unknown(problems)  # another thread or process may have found out meanwhile
        if not wanted:
            return
        begun = time.monotonic()
        log.info("measuring %d convolutions on %s, once for this machine", len(wanted), device)
        seconds = None if isinstance(tune, str) else float(tune)
        if device.type == "cpu":
            _decide_on_cpu(wanted, seconds, progress)
        else:
            _decide_on_gpu(wanted, str(device), GPU_SECONDS if seconds is None else seconds, progress)
        progress(1.0, "done")
        left = len(_unknown(wanted))
        log.info("measured in %.1f s%s", time.monotonic() - begun, f"; {left} are left for the next time" * bool(left))


_asked_at_calls: set[ConvProblem] = set()
_seconds_for_calls = GPU_SECONDS


def leave_to_rules(problems: Sequence[ConvProblem]) -> None:
    """What is not known of these by now is not measured at their first call either."""
    _asked_at_calls.update(problems)


def decide_at_call(problem: ConvProblem, device: torch.device) -> None:
    """Decide at the first eager call of a problem on a GPU that no plan holds: a fused model's.

    GPU_SECONDS in all in a process, child's start included; `warm_up` measures the rest, and all of a model at once.
    Nothing is done while a CUDA graph is captured, nor where bits must not depend on a measurement.
    """
    global _seconds_for_calls
    if problem in _asked_at_calls or not problem.N or not is_on() or cuda_graphs.is_captured(device):
        return
    if torch.are_deterministic_algorithms_enabled():
        return
    _asked_at_calls.add(problem)
    if _seconds_for_calls <= 0:
        files.report_once(
            "No more convolutions are measured at their first call in this process; "
            "fused_resnet.warm_up(model, x) measures all of a model."
        )
        return
    begun = time.monotonic()
    decide([problem], device, Tuning(_seconds_for_calls))
    _seconds_for_calls -= time.monotonic() - begun


def _check_choices(problems: Sequence[ConvProblem], device: torch.device) -> None:
    """For a shape that a served model has not seen: check what `select` says, until it is right. Times nothing."""
    tried: set[tuple[ConvProblem, str]] = set()  # each once, also where what was found cannot be kept
    wanted = [problem for problem in dict.fromkeys(problems) if winners.lookup(problem) is None]
    while True:
        chosen = {problem: select(problem, in_plan=True) for problem in wanted}
        todo = {problem: [one] for problem, one in chosen.items() if winners.outcome(problem, str(one)) is None}
        todo = {problem: some for problem, some in todo.items() if (problem, str(some[0])) not in tried}
        if not todo:
            return
        tried.update((problem, str(some[0])) for problem, some in todo.items())
        _keep_checks(_checked(todo, str(device)), device.type)


def _unknown(problems: Sequence[ConvProblem]) -> list[ConvProblem]:
    """Those of which some candidate's time, or at least that it is wrong, is not known."""
    return [problem for problem in dict.fromkeys(problems) if problem.N and not _is_known(problem)]


def _is_known(problem: ConvProblem) -> bool:
    if problem.device == "cuda":
        if winners.lookup(problem) is not None:  # of a batch near this one
            return True
    entry = winners.entry_of(problem)
    timed = set() if entry is None else set(entry.candidates)
    found, _ = candidates(problem)
    outcomes = {one: winners.outcome(problem, str(one)) for one in found}
    if entry is None and any(outcome is None or winners.why_wrong(outcome) is None for outcome in outcomes.values()):
        return False
    return all(
        one.backend.name in timed or outcome is not None and winners.why_wrong(outcome) is not None
        for one, outcome in outcomes.items()
    )


@contextlib.contextmanager
def _alone(unknown: Callable[[], Sequence[Any]], device: str) -> Iterator[None]:
    """The only process that measures on this machine, if the others end in time: then they have what it finds.

    Of a group of processes that torch.distributed or torchrun has started, the first has a head start.
    """
    path = winners.user_folder() / f"measuring_{device}"
    until = time.monotonic() + (0.0 if _is_first() else _HEAD_START_S)
    while time.monotonic() < until and not _is_held(path) and unknown():
        time.sleep(0.05)
        winners.forget()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(files.locked(path, _WAIT_S))
            winners.forget()
        yield


def _is_first() -> bool:
    """Whether this is the first process of its group on this machine, or of none."""
    if rank := os.environ.get("LOCAL_RANK"):
        return rank == "0"
    return not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )


def _is_held(path: Path) -> bool:
    try:
        with files.locked(path, 0.0):
            return False
    except OSError:
        return True


def _decide_on_cpu(wanted: Sequence[ConvProblem], seconds: Optional[float], progress: Progress) -> None:
    found = {problem: candidates(problem)[0] for problem in wanted}
    outcomes = _checked(found, "cpu", lambda fraction, text: progress(fraction / 2, text))
    _keep_checks(outcomes, "cpu")
    right = {
        problem: [one for one in some if winners.why_wrong(outcomes[problem][str(one)]) is None]
        for problem, some in found.items()
    }
    limits: dict[str, Any] = dict(rounds=ROUNDS, least_rounds=LEAST_ROUNDS, budget_s=CPU_SECONDS)
    if seconds is not None:
        limits = dict(rounds=100 * ROUNDS, budget_s=seconds)
    with torch.no_grad():
        calls = calls_of(right)
        times = timing.in_network_order(
            calls, **limits, progress=lambda fraction, text: progress((1 + fraction) / 2, text)
        )
    _keep_times({problem: stats for problem, stats in times.items() if stats}, outcomes, "cpu")


def _checked(found: Mapping[ConvProblem, Sequence[Selection]], device: str, progress: Progress = silent) -> Outcomes:
    """What came of checking each candidate: what is known, what a child process says, the rest checked here."""
    outcomes: Outcomes = {problem: {} for problem in found}
    for problem, some in found.items():
        for one in some:
            if (known := winners.outcome(problem, str(one))) is not None:
                outcomes[problem][str(one)] = known
    kind = torch.device(device).type
    jobs = {problem: _job(problem, some, outcomes[problem], kind) for problem, some in found.items()}
    jobs = {problem: job for problem, job in jobs.items() if job.names}
    if jobs and (passed := _checked_elsewhere(jobs, device, outcomes, progress)):
        winners.keep(Table.empty(str(winners.device_id(kind)))._replace(trusted=winners.trust(passed, kind)))
    for done, (problem, some) in enumerate(found.items()):
        subject: Optional[Subject] = None
        for one in some:
            if str(one) not in outcomes[problem]:
                progress(done / len(found), f"checking {one} on {problem}")
                subject = subject or Subject(problem, device)
                outcomes[problem][str(one)] = checked(subject, one).outcome
    return outcomes


def not_wrong(problem: ConvProblem) -> list[Selection]:
    """The candidates that nothing is said against, checked or not."""
    return [one for one in candidates(problem)[0] if winners.why_wrong(winners.outcome(problem, str(one))) is None]


def try_new(problems: Sequence[ConvProblem], progress: Progress = silent) -> bool:
    """Run each candidate of these once whose backend is new on this machine. In a process of its own it cannot end this
    one. Keeps what does not run, and returns whether anything does not."""
    jobs = {problem: _job(problem, not_wrong(problem), {}, "cpu")._replace(is_trial=True) for problem in problems}
    jobs = {problem: job for problem, job in jobs.items() if job.names}
    outcomes: Outcomes = {problem: {} for problem in jobs}
    if jobs and (passed := _checked_elsewhere(jobs, "cpu", outcomes, lambda fraction, text: progress(0.0, text))):
        winners.keep(Table.empty(str(winners.device_id("cpu")))._replace(trusted=winners.trust(passed, "cpu")))
    wrong = {problem: {name: one for name, one in some.items() if one} for problem, some in outcomes.items()}
    _keep_checks(wrong, "cpu")
    return any(wrong.values())


def _job(problem: ConvProblem, some: Sequence[Selection], known: Mapping[str, Any], kind: str) -> process.Job:
    """The candidates that are to be checked in a process of their own: of backends that never were on this machine."""
    new = [one for one in some if not winners.is_trusted(one.backend.name, kind) and process.can_know(one.backend)]
    return process.Job(str(problem), [str(one) for one in new if str(one) not in known], {})


def _checked_elsewhere(
    jobs: Mapping[ConvProblem, process.Job], device: str, outcomes: Outcomes, progress: Progress
) -> set[str]:
    """Fill in what a child process finds. Returns the backends of which no candidate has ended it."""
    problems = list(jobs)
    passed, failed = {_backend_of(name) for job in jobs.values() for name in job.names}, set()
    try:
        for event in process.run(list(jobs.values()), device):
            problem = problems[event.job]
            progress(event.job / len(jobs), f"checking {event.name} on {problem}")
            if event.outcome is not None:
                outcomes[problem][event.name] = event.outcome
            if event.has_ended or event.outcome is None:
                failed.add(_backend_of(event.name))
    except process.NoChild as error:
        files.report_once(f"No process can be started to try kernels in, so they are tried in this one ({error}).")
        return set()
    return passed - failed


def _backend_of(name: str) -> str:
    return name.partition(" ")[0]


def calls_of(right: Mapping[ConvProblem, Sequence[Selection]]) -> dict[ConvProblem, dict[Selection, Fed]]:
    """The calls of these candidates, which take their input from the same memory."""
    memory = _Memory(list(right))
    calls = {}
    for problem, some in right.items():
        operands = _operands_of(problem)
        calls[problem] = {one: memory.fed(planned_call(problem, one, operands, in_place=True), problem) for one in some}
    return calls


def _operands_of(problem: ConvProblem) -> ConvOperands:
    """Random ones, whose input is one window: `_Memory` has another."""
    (H, W), p = ((size - 1) * step + 1 for size, step in zip((problem.R, problem.S), problem.dilation)), problem
    live = random_operands(p._replace(N=1, H=H, W=W, stride=(1, 1), padding=(0, 0)), "cpu")
    return live if p.has_bn else folded_operands(live, has_bias=p.has_bias)


class _Memory:
    """Where all calls find their input, and values to write there: as much as the largest problem of a dtype needs."""

    def __init__(self, problems: Sequence[ConvProblem]) -> None:
        self._tensors = {}
        for dtype in {problem.dtype for problem in problems}:
            alike = [problem for problem in problems if problem.dtype == dtype]
            x = max(p.N * p.C * p.H * p.W for p in alike)
            residual = max(math.prod(p.output_shape) * p.has_residual for p in alike)
            generator = torch.Generator().manual_seed(0)  # the process's own is the caller's
            values = torch.randn(max(x, residual), generator=generator).to(dtype)
            self._tensors[dtype] = (values, torch.empty(x, dtype=dtype), torch.empty(residual, dtype=dtype))

    def fed(self, planned: Planned, problem: ConvProblem) -> Fed:
        p, (values, x, residual) = problem, self._tensors[problem.dtype]
        shape = (p.N, p.C, p.H, p.W)
        planned = planned._replace(x=_view(x, shape))
        given, added = _view(values, shape), None
        if p.has_residual:
            planned = planned._replace(residual=_view(residual, p.output_shape))
            added = _view(values, p.output_shape)
        return Fed(lambda: planned.take(given, added), planned.call)


def _view(flat: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """The first elements as a channels_last tensor."""
    N, C, H, W = shape
    return flat[: N * C * H * W].view(N, H, W, C).permute(0, 3, 1, 2)


def _decide_on_gpu(wanted: Sequence[ConvProblem], device: str, seconds: float, progress: Progress) -> None:
    """All in a child process. What it has found is kept problem by problem, and the next call goes on from there."""
    wanted = sorted(wanted, key=lambda problem: -_least_us(problem))
    found = {problem: candidates(problem, most=_MOST_CONFIGS)[0] for problem in wanted}
    outcomes: Outcomes = {problem: {} for problem in wanted}
    jobs, failed = [], set()
    for problem, some in found.items():
        known = {str(one): winners.outcome(problem, str(one)) for one in some}
        outcomes[problem] = {name: outcome for name, outcome in known.items() if outcome is not None}
        jobs.append(process.Job(str(problem), list(known), outcomes[problem]))
    try:
        deadline = time.monotonic() + seconds
        for event in process.run(jobs, device, seconds=_SECONDS_FOR_ONE, deadline=deadline):
            problem = wanted[event.job]
            progress(event.job / len(jobs), f"measuring {problem}")
            if event.times is not None:
                by_name = {str(one): one for one in found[problem]}
                times = {by_name[name]: stats for name, stats in event.times.items()}
                _keep_checks({problem: outcomes[problem]}, "cuda")
                _keep_times({problem: times}, outcomes, "cuda")
            elif event.outcome is not None:
                outcomes[problem][event.name] = event.outcome
                if event.has_ended:
                    failed.add(_backend_of(event.name))
                    _keep_checks({problem: outcomes[problem]}, "cuda")
    except process.NoChild as error:
        files.report_once(f"No process can be started to measure kernels in, so nothing is measured ({error}).")
        return
    passed = {_backend_of(name) for by_name in outcomes.values() for name in by_name} - failed
    winners.keep(Table.empty(str(winners.device_id("cuda")))._replace(trusted=winners.trust(passed, "cuda")))


def _least_us(problem: ConvProblem) -> float:
    """What it should take at least, to tell large ones from small ones: an H200's rates for 16 bits (`conv.cost`)."""
    return max(problem.bytes_moved / 4.3e6, problem.flops / 790e6)


def _keep_checks(outcomes: Outcomes, kind: str) -> None:
    """In the user's file; what says something of the moment alone, for this process."""
    name = str(winners.device_id(kind))
    for is_passing, keep in ((False, winners.keep), (True, winners.keep_here)):
        checks: dict[str, dict[str, dict]] = {}
        for problem, found in outcomes.items():
            some = {name: one for name, one in found.items() if one.get("is_passing", False) == is_passing}
            checks.update(winners.checks_of(problem, some) if some else {})
        if checks:
            keep(Table.empty(name)._replace(checks=checks))


def _keep_times(times: Mapping[ConvProblem, Mapping[Selection, Stats]], outcomes: Outcomes, kind: str) -> None:
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    table = Table.empty(str(winners.device_id(kind)))
    table.runs[run] = {"date": run, "threads": torch.get_num_threads(), "kernels": winners.kernel_digests()}
    for problem, stats in times.items():
        entry = measured_entry(fixed(problem), stats, outcomes[problem], run)
        table.entries.setdefault(winners.key(problem), {})[problem.N] = entry
    if table.entries:
        winners.keep(table)


def rivals(problems: Sequence[ConvProblem]) -> list[tuple[ConvProblem, Selection]]:
    """The second best of each problem that was measured here, where it is close and not yet tried in a captured plan.
    Those whose time is longest come first."""
    found: list[tuple[float, ConvProblem, Selection]] = []
    for problem in dict.fromkeys(problems) if is_on() else ():
        entry = winners.entry_of(problem)
        if entry is None or entry.is_swapped:
            continue
        times = {name: one.time_us for name, one in entry.candidates.items()}
        own = times.pop(entry.winner)
        second = min(times, key=times.__getitem__, default=None)
        if second is not None and times[second] <= CLOSE * own:
            found.append((own, problem, select(problem, second, in_plan=True)))
    return [(problem, selection) for _, problem, selection in sorted(found, key=lambda one: -one[0])]


def fixed(problem: ConvProblem) -> Selection:
    """What a plan runs unmeasured, by the name under which it is measured."""
    backend = fixed_order(problem, in_plan=True).backend
    return Selection(backend, default_config(problem, backend))


def measured_entry(
    default: Selection, stats: Mapping[Selection, Stats], outcomes: Mapping[str, dict[str, Any]], run: str
) -> Entry:
    """What is kept of the times of right candidates: the best config of each backend and, where any reads row space,
    the same without those."""
    entry = _entry_among(default, stats, outcomes, run)
    in_nhwc = {one: times for one, times in stats.items() if not one.reads_row_space}
    if not in_nhwc or len(in_nhwc) == len(stats):
        return entry
    return entry._replace(in_nhwc=_entry_among(default, in_nhwc, outcomes, run))


def _entry_among(
    default: Selection, stats: Mapping[Selection, Stats], outcomes: Mapping[str, dict[str, Any]], run: str
) -> Entry:
    winner, best = winner_of(default, stats), {}
    for one in (*sorted(stats, key=lambda one: -stats[one].median_us), winner):
        config = None if one.config is None else one.config._asdict()
        best[one.backend.name] = Measured(config, stats[one].median_us, outcomes[str(one)]["error_ratio"])
    return Entry(winner.backend.name, default.backend.name, run, best)


def winner_of(default: Selection, stats: Mapping[Selection, Stats]) -> Selection:
    """The fastest, but the default unless it is beaten by MARGIN in the median and in the least time."""
    best = min(stats, key=lambda one: stats[one].median_us)
    if default not in stats:
        return best
    own, other = stats[default], stats[best]
    is_clear = all(ours < (1 - MARGIN) * theirs for ours, theirs in zip(other[:2], own[:2]))
    return best if is_clear else default
