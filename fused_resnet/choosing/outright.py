"""Whether a run of convolutions is so much faster as a region that none of them need be measured by itself.

The region of the whole run is held against the least that its convolutions might take separately. That is the sum of
the least time of the fastest candidate of each, whoever that is. It counts too little, in the region's disfavour:

- Candidates are not checked, so a wrong one counts, too.
- Of a few rounds the best one counts.
- Poolings, linear layers and what Python does between two calls count nothing.

So where the region is faster, `freeze` could not have found a plan without regions that is as fast.

A mixture of regions and convolutions might be faster still: where one stage of the run loses to its convolutions. Then,
and wherever the region does not win by `CLEAR`, all is measured as if this had not been tried (`decide`, `pieces`).

What was found is kept as a piece's times are: "separate" stands for the sum, and wins where all is to be measured.
Who gives seconds to measure with has asked for that, whatever wins here.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any, Mapping, NamedTuple, Optional, Sequence, Union

import torch

from fused_resnet.choosing import decide, pieces, timing, winners
from fused_resnet.choosing.material import Material
from fused_resnet.choosing.piece import Piece, RegionProblem
from fused_resnet.choosing.pieces import REGION, SEPARATE, calls_of, keep, times_of
from fused_resnet.choosing.region_checks import check, why_wrong
from fused_resnet.choosing.timing import Fed, Stats
from fused_resnet.operators.problem import ConvProblem

CLEAR = 0.1  # of the sum, by which the region must be faster
ROUNDS, LEAST_ROUNDS, SECONDS = 8, 3, 1.0
Found = Mapping[Union[ConvProblem, RegionProblem], Mapping[Any, Stats]]

log = logging.getLogger("fused_resnet")


class Whole(NamedTuple):
    """A run of a plan, and its stages. None of them says how it runs separately."""

    piece: Piece
    stages: tuple[Piece, ...]


def why_region(piece: Piece) -> Optional[str]:
    """Why a run is a region whatever computes its convolutions, as part of a sentence; None where that is not known."""
    winner = winners.lookup(piece.problem)
    if winner is None or winner.backend != REGION or why_wrong(piece) is not None:
        return None
    times = times_of(piece)
    against = "" if times is None else f": {times.region:.0f} us, separate nodes {times.separate:.0f} us at least"
    return f"{winner.source}{against}"


def find_out(wholes: Sequence[Whole], tuning: decide.Tuning, *, is_tried: bool = False) -> bool:
    """Find out, and keep, what `why_region` should say of these. Does nothing where all is known.

    is_tried: all their candidates have been run (`decide.try_new`). Returns True, and has measured nothing, where some
    do not run here. That is known then, and the runs of the plan may be others.
    """
    tune, progress = tuning
    if tune is False or not decide.is_on() or winners.device_id("cpu") is None or decide.is_measuring_here():
        return False
    if tune == "check":
        pieces.decide([whole.piece for whole in wholes], tuning)
        return False
    unknown = functools.partial(_unknown, wholes, wants_all=not isinstance(tune, str))
    if not unknown():
        return False
    with decide.measuring_alone(unknown, "cpu"):
        wanted = unknown()  # another thread or process may have found out meanwhile
        problems = list(dict.fromkeys(problem for one in wanted for problem in one.piece.fragment.convolutions))
        if not problems:
            return False
        if not is_tried and decide.try_new(problems, progress):
            return True
        begun = time.monotonic()
        seconds = SECONDS if isinstance(tune, str) else min(SECONDS, float(tune))
        log.info("measuring %d runs of convolutions as regions, once for this machine", len(wanted))
        material = Material()
        with torch.no_grad():
            found = _timed(wanted, problems, material, seconds, progress)
        for whole in wanted:
            _judge(whole, found, material, tuning)
        log.info("measured in %.1f s", time.monotonic() - begun)
    return False


def _unknown(wholes: Sequence[Whole], wants_all: bool) -> list[Whole]:
    """Those of which nothing is known; with wants_all also those that are taken without measuring the rest."""
    by_problem = {one.piece.problem: one for one in wholes}
    found = []
    for one in by_problem.values():
        times = times_of(one.piece)
        if why_wrong(one.piece) is None and (times is None or wants_all and times.is_region_faster):
            found.append(one)
    return found


def _timed(
    wholes: Sequence[Whole],
    problems: Sequence[ConvProblem],
    material: Material,
    seconds: float,
    progress: timing.Progress,
) -> Found:
    separate = decide.calls_of({problem: decide.not_wrong(problem) for problem in problems})
    calls: dict[Any, Mapping[Any, Fed]] = {**separate}
    for whole in wholes:
        for piece in (whole.piece, *whole.stages):
            calls[piece.problem] = calls_of(piece, material)
    limits: dict[str, Any] = dict(rounds=ROUNDS, least_rounds=LEAST_ROUNDS, budget_s=seconds)
    return timing.in_network_order(calls, **limits, progress=lambda fraction, text: progress(0.0, text))


def _judge(whole: Whole, found: Found, material: Material, tuning: decide.Tuning) -> None:
    ours = found[whole.piece.problem][REGION].min_us
    separate, stages = _least_us(whole.piece, found), []
    for stage in whole.stages:
        stages.append((found[stage.problem][REGION].min_us, _least_us(stage, found)))
    is_clear = isinstance(tuning.tune, str) and ours < (1 - CLEAR) * separate
    is_clear &= all(region < least for region, least in stages) or ours <= sum(map(min, stages))
    outcome: Mapping[str, Any] = winners.outcome(whole.piece.region, REGION) or {}
    if is_clear:  # else the check is left to those that it may still be right for
        tuning.progress(0.0, f"checking a {whole.piece.problem}")
        outcome = check(whole.piece, material)
        if winners.why_wrong(outcome) is not None:
            return
    winner = REGION if is_clear else SEPARATE
    keep({whole.piece.problem: ({REGION: ours, SEPARATE: separate}, winner, outcome)})


def _least_us(piece: Piece, found: Found) -> float:
    """What its convolutions take at least by themselves."""
    times = (found[problem].values() for problem in piece.fragment.convolutions)
    return sum(min((one.min_us for one in stats), default=0.0) for stats in times)
