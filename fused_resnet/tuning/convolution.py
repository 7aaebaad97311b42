"""One convolution: its candidates checked against the reference, timed, and the fastest kept."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Mapping, Optional

import torch

from fused_resnet.choosing import Selection, timing, winners, winners_file
from fused_resnet.choosing.candidates import candidates
from fused_resnet.choosing.checking import Checked, Subject, checked
from fused_resnet.choosing.decide import measured_entry, winner_of
from fused_resnet.choosing.timing import Fed, Stats
from fused_resnet.machine.errors import one_line
from fused_resnet.measuring import Row, environment
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.tuning.journal import Journal

_MOST_ROUNDS = 1000


class DeviceFailed(RuntimeError):
    """A candidate has left the GPU unusable for this process. It is in the journal: the next run leaves it out."""


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
        subject = Subject(problem, device)
    except torch.OutOfMemoryError as error:
        return _row(problem, device, found[0], {one: {"why": one_line(error)} for one in found}, {}, skipped)
    why_not_compiled = {} if compiled is None else compiled.result()
    calls: dict[Selection, Fed] = {}
    outcomes: dict[Selection, dict] = {}
    for candidate in found:
        why = why_not_compiled.get(candidate.config)
        outcome = {"why": why} if why else journal.outcome(str(problem), str(candidate))
        if outcome is None or "why" not in outcome:
            one = _checked(subject, candidate, journal, outcome)
            outcome = one.outcome
            if one.planned is not None and one.call is not None:
                calls[candidate] = subject.fed(one.planned, one.call)
        outcomes[candidate] = outcome
    with torch.no_grad():
        stats = timing.in_network_order(
            {problem: calls}, device=device, rounds=rounds or _MOST_ROUNDS, budget_s=seconds
        )[problem]
    return _row(problem, device, found[0], outcomes, stats, skipped)


def _checked(subject: Subject, candidate: Selection, journal: Journal, known: Optional[dict]) -> Checked:
    """`checking.checked`, with the journal told. known: of an earlier run that was interrupted."""
    place = (str(subject.problem), str(candidate))
    if known is None:
        journal.begin(*place)
    try:
        one = checked(subject, candidate, known)
    except KeyboardInterrupt:
        journal.interrupt(*place)
        raise
    if known is None or "why" in one.outcome:
        journal.end(*place, one.outcome)
    if "why" in one.outcome:
        _check_device(subject.device, subject.problem, candidate)
    return one


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


def _row(
    problem: ConvProblem,
    device: str,
    default: Selection,
    outcomes: Mapping[Selection, dict[str, Any]],
    stats: Mapping[Selection, Stats],
    skipped: dict[str, str],
) -> Row:
    in_nhwc = {one: times for one, times in stats.items() if not one.reads_row_space}
    winner, winner_in_nhwc = (winner_of(default, found) if found else None for found in (stats, in_nhwc))
    described = {one: {"backend": one.backend.name, "config": one.config and one.config._asdict()} for one in outcomes}
    by_name = {str(one): outcome for one, outcome in outcomes.items()}
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
            if "why" not in outcome and winners.why_wrong(outcome) is not None
        ],
        "failed": [{**described[one], **outcome} for one, outcome in outcomes.items() if "why" in outcome],
        "skipped": skipped,
        "clocks": {} if device == "cpu" else environment.gpu_state(),
        "entry": measured_entry(default, stats, by_name, "").as_json() if stats else None,
        "checks": by_name,
    }


def entry_of(row: Row, run: str) -> winners_file.Entry:
    """What is kept of a row's times."""
    entry = winners_file.Entry.from_json(row["entry"])
    in_nhwc = entry.in_nhwc and entry.in_nhwc._replace(run=run)
    return entry._replace(run=run, in_nhwc=in_nhwc)
