"""Whether a piece of a plan runs as one region or as the separate nodes that it consists of: checked and measured here.

What is found is kept like a convolution's candidates (`winners`), under the piece's text: "blocked" stands for the
region, "separate" for the nodes. Weights and inputs are random, so that it says nothing of one model's values.
"""

from __future__ import annotations

import datetime
import logging
import time
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch

from fused_resnet.choosing import timing, winners
from fused_resnet.choosing.cases import in_order
from fused_resnet.choosing.decide import MARGIN, Tuning, is_measuring_here, is_on, measuring_alone
from fused_resnet.choosing.material import Material, images_of
from fused_resnet.choosing.piece import Piece, RegionProblem
from fused_resnet.choosing.region_checks import REGION, check, why_wrong
from fused_resnet.choosing.timing import Fed, Stats
from fused_resnet.choosing.winners_file import Entry, Measured, Table
from fused_resnet.regions import kernels

SEPARATE = "separate"
RULE = "rules: nothing was measured, and AMX multiplies blocks"
SHARED = "rules: nothing was measured of this shape, and another plan of the model has the weights packed so"
ROUNDS, LEAST_ROUNDS, SECONDS = 20, 5, 2.0
_BY_RULE = ("amx_bf16",)  # micro-kernels that make a region faster than what else there is, as a rule

log = logging.getLogger("fused_resnet")


class Times(NamedTuple):
    """Microseconds of one call, as measured."""

    region: float
    separate: float
    is_region_faster: bool


def times_of(piece: Piece) -> Optional[Times]:
    """What was measured of exactly this piece, or None."""
    entry = winners.entry_of(piece.problem)
    if entry is None or not {REGION, SEPARATE} <= entry.candidates.keys():
        return None
    found = entry.candidates
    return Times(found[REGION].time_us, found[SEPARATE].time_us, entry.winner == REGION)


def why_region(piece: Piece) -> Optional[str]:
    """Why this runs as a region, as part of a sentence; None where it does not."""
    if why_wrong(piece) is not None:
        return None
    winner = winners.lookup(piece.problem)
    if winner is None:
        return RULE if is_by_rule(piece) else SHARED if all(piece.is_packed or (False,)) else None
    if winner.backend != REGION:
        return None
    times = times_of(piece)
    against = "" if times is None else f": {times.region:.0f} us, {times.separate:.0f} us as separate nodes"
    return f"{winner.source}{against}"


def is_by_rule(piece: Piece) -> bool:
    """Whether it is a region where nothing is measured."""
    return kernels.fastest_name(piece.fragment.dtype) in _BY_RULE


def decide(pieces: Sequence[Piece], tuning: Tuning) -> None:
    """Find out, and keep, what `why_region` should say of these pieces. Does nothing where all is known."""
    tune, progress = tuning
    if tune is False or not is_on() or winners.device_id("cpu") is None or is_measuring_here():
        return
    if tune == "check":
        return _check_choices(pieces)
    if not _unknown(pieces):
        return
    with measuring_alone(lambda: _unknown(pieces), "cpu"):
        wanted = _unknown(pieces)  # another thread or process may have found out meanwhile
        if not wanted:
            return
        begun = time.monotonic()
        seconds = SECONDS if isinstance(tune, str) else float(tune)
        log.info("measuring %d pieces as regions, once for this machine", len(wanted))
        with torch.no_grad():
            _measure(wanted, seconds, progress)
        log.info("measured in %.1f s", time.monotonic() - begun)


def _unknown(pieces: Sequence[Piece]) -> list[Piece]:
    by_problem = {piece.problem: piece for piece in pieces}
    return [piece for piece in by_problem.values() if why_wrong(piece) is None and times_of(piece) is None]


def _check_choices(pieces: Sequence[Piece]) -> None:
    """For a shape that a served model has not seen: whether the regions that it would get are right. Times nothing."""
    material = Material()
    for piece in pieces:
        if why_region(piece) is not None:
            check(piece, material)


def _measure(pieces: Sequence[Piece], seconds: float, progress: timing.Progress) -> None:
    material, groups, outcomes = Material(), dict[RegionProblem, dict[str, Fed]](), {}
    for piece in pieces:
        progress(1.0, f"checking a {piece.problem}")  # the convolutions' own measuring has told of the way there
        outcome = outcomes[piece.problem] = check(piece, material)
        if winners.why_wrong(outcome) is None:
            groups[piece.problem] = calls_of(piece, material)
    limits: dict[str, Any] = dict(rounds=ROUNDS, least_rounds=LEAST_ROUNDS, budget_s=seconds)
    times = timing.in_network_order(groups, **limits, progress=lambda fraction, text: progress(1.0, text))
    keep({
        problem: ({name: one.median_us for name, one in stats.items()}, _winner(stats), outcomes[problem])
        for problem, stats in times.items()
    })  # fmt: skip


def keep(found: Mapping[RegionProblem, tuple[dict[str, float], str, Mapping[str, Any]]]) -> None:
    """Keep (the times by name, who is taken, what came of the region's check) of each."""
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    table = Table.empty(str(winners.device_id("cpu")))
    table.runs[run] = {"date": run, "threads": torch.get_num_threads(), "kernels": winners.kernel_digests()}
    for problem, (times, winner, outcome) in found.items():
        errors = {REGION: outcome.get("error_ratio")}  # the separate nodes are checked one by one
        best = {name: Measured(None, time_us, errors.get(name)) for name, time_us in times.items()}
        table.entries.setdefault(winners.key(problem), {})[problem.N] = Entry(winner, SEPARATE, run, best)
    if table.entries:
        winners.keep(table)


def _winner(stats: Mapping[str, Stats]) -> str:
    if len(stats) < 2:
        return next(iter(stats))
    ours, theirs = stats[REGION], stats[SEPARATE]
    is_clear = all(one < (1 - MARGIN) * other for one, other in zip(ours[:2], theirs[:2]))
    return REGION if is_clear else SEPARATE


def calls_of(piece: Piece, material: Material) -> dict[str, Fed]:
    """The region, and the separate nodes if they are known, to be timed."""
    order = torch.zeros(piece.region.N, dtype=torch.long)
    given = [in_order(images, order) for images in images_of(piece.fragment)]
    inputs = [torch.empty_like(images) for images in given]
    region = material.region(piece)
    workspace, kernel = region.empty_workspace(), kernels.fastest_name(piece.fragment.dtype)

    def feed() -> None:
        for x, images in zip(inputs, given):
            x.copy_(images)

    calls = {REGION: Fed(feed, lambda: region(inputs, workspace, kernel))}
    if piece.separate is None:
        return calls
    separate = material.separate(piece)
    return {SEPARATE: Fed(feed, lambda: separate(inputs)), **calls}
