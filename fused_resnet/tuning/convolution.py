"""One convolution: its candidates checked against the reference, timed, and the fastest kept."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import Any, Callable, Optional, Sequence

import torch

from fused_resnet import measuring
from fused_resnet.choosing import Selection, winners_file
from fused_resnet.machine import cuda_graphs
from fused_resnet.machine.errors import one_line
from fused_resnet.measuring import Row, cases, environment, timing
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.tuning.candidates import candidates
from fused_resnet.tuning.journal import Journal

MARGIN = 0.03  # by which a winner must beat what the fixed order takes, or noise would decide between equals

_FINALISTS = 4  # of one backend, after a few rounds each
_SCREENING_ROUNDS = 5


class DeviceFailed(RuntimeError):
    """A candidate has left the GPU unusable for this process. It is in the journal: the next run leaves it out."""


class _Subject:
    """One convolution with its operands, and what its candidates are held against."""

    def __init__(self, problem: ConvProblem, device: str) -> None:
        self.problem, live = problem, measuring.random_operands(problem, device)
        folded = measuring.folded_operands(live, has_bias=problem.has_bias)
        self.operands: ConvOperands = live if problem.has_bn else folded
        self.images, self.case = measuring.compared_case(problem, self.operands)

    def call(self, candidate: Selection) -> Callable[[], torch.Tensor]:
        """The candidate as a frozen plan runs it, or with live BN as the operator does."""
        if self.problem.has_bn:
            return functools.partial(candidate.run, self.problem, self.operands)
        return measuring.planned_call(self.problem, candidate, self.operands)

    def error_ratio(self, candidate: Selection, call: Callable[[], torch.Tensor]) -> float:
        return measuring.error_ratio(measuring.Prepared(call, self.images, self.case, candidate.backend.name))


def tune_one(
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
        return _row(problem, device, found[0], {one: {"why": one_line(error)} for one in found}, {}, skipped)
    why_not_compiled = {} if compiled is None else compiled.result()
    calls: dict[Selection, Callable[[], torch.Tensor]] = {}
    outcomes: dict[Selection, dict] = {}
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
    calls: dict[Selection, Callable[[], torch.Tensor]],
    default: Selection,
    device: str,
    seconds: float,
    rounds: Optional[int],
) -> dict[Selection, timing.Stats]:
    """In turn, from cold caches; where there are many, after a few rounds only the likeliest."""
    measure = functools.partial(timing.interleaved, device=device, cold=True)
    if len(calls) > _FINALISTS + 1:
        calls = _fastest(calls, measure(calls, rounds=_SCREENING_ROUNDS), default)
    return measure(calls, budget_s=seconds, rounds=rounds)


def _checked(
    subject: _Subject, candidate: Selection, device: str, journal: Journal, known: Optional[dict]
) -> tuple[dict, Optional[Callable[[], torch.Tensor]]]:
    """(what came of the check, the call if it may be timed). known: of an earlier run that was interrupted."""
    place = (str(subject.problem), str(candidate))
    if known is None:
        journal.begin(*place)
    try:
        call = subject.call(candidate)
        outcome = _compared(subject, candidate, call) if known is None else known
        if device != "cpu" and _is_right(outcome):
            call = cuda_graphs.captured(call)  # as a frozen plan replays it; what cannot be captured fails here
            if known is None:
                outcome = _compared(subject, candidate, call)
    except KeyboardInterrupt:
        journal.interrupt(*place)
        raise
    except Exception as error:  # whatever a kernel, a compiler or a library raises: it costs this candidate alone
        outcome, call = {"why": one_line(error)}, None
        journal.end(*place, outcome)
        _check_device(device, subject.problem, candidate)
        return outcome, None
    if known is None:
        journal.end(*place, outcome)
    return outcome, call if _is_right(outcome) else None


def _compared(subject: _Subject, candidate: Selection, call: Callable[[], torch.Tensor]) -> dict[str, Any]:
    ratio = subject.error_ratio(candidate, call)
    return {"error_ratio": cases.finite(ratio)}


def _is_right(outcome: dict) -> bool:
    return outcome["error_ratio"] is not None and outcome["error_ratio"] <= 1


def _check_device(device: str, problem: ConvProblem, candidate: Selection) -> None:
    if device == "cpu":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceFailed(
            f"{candidate} on {problem} has left the GPU unusable for this process ({one_line(error)}). It is "
            f"recorded and will not be tried again: give the same command once more to go on."
        ) from error


def _fastest(calls: dict, stats: dict[Selection, timing.Stats], default: Selection) -> dict:
    """What to time for longer: the default, and the fastest few of each backend in the screening.

    Those that read row space are counted apart from those that do not.
    """
    kept = {default} & calls.keys()
    alike: dict[tuple[str, bool], list[Selection]] = {}
    for candidate in sorted(calls, key=lambda one: stats[one].min_us):
        mates = alike.setdefault((candidate.backend.name, candidate.reads_row_space), [])
        if len(mates) < _FINALISTS:
            mates.append(candidate)
            kept.add(candidate)
    return {candidate: call for candidate, call in calls.items() if candidate in kept}


def _row(
    problem: ConvProblem,
    device: str,
    default: Selection,
    outcomes: dict[Selection, dict],
    stats: dict[Selection, timing.Stats],
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
        "clocks": {} if device == "cpu" else environment.gpu_state(),
    }


def _winner(default: Selection, stats: dict[Selection, timing.Stats]) -> Selection:
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
