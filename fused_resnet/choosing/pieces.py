"""Whether a piece of a plan runs as one region or as the separate nodes that it consists of: checked and measured here.

What is found is kept like a convolution's candidates (`winners`), under the piece's text: "blocked" stands for the
region, "separate" for the nodes. Weights and inputs are random, so that it says nothing of one model's values.

A region is compared with fp64, on an ordinary and an extreme image. It may be `SLACK` times as wrong as the separate
nodes are, each of which has been checked by itself. Both round to the same dtype, in another order and at other places.
Errors of equal size and random sign differ by less than twice, and a network adds up many of them.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import time
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import backends
from fused_resnet.backends import blocked
from fused_resnet.choosing import timing, winners
from fused_resnet.choosing.cases import finite, in_order, order_of
from fused_resnet.choosing.choice import Selection
from fused_resnet.choosing.decide import MARGIN, Tuning, is_measuring_here, is_on, measuring_alone
from fused_resnet.choosing.planned import bound
from fused_resnet.choosing.timing import Fed, Stats
from fused_resnet.choosing.winners_file import Entry, Measured, Table
from fused_resnet.machine.errors import is_out_of_memory, one_line
from fused_resnet.operators import reference
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions import kernels
from fused_resnet.regions.fragment import (
    ConvStep,
    Fragment,
    PoolStep,
    Step,
    by_winograd,
    compile_fragment,
    pack,
    segments,
    stems,
)
from fused_resnet.regions.program import CompiledRegion

REGION, SEPARATE = blocked.BACKEND.name, "separate"
RULE = "rules: nothing was measured, and AMX multiplies blocks"
SLACK = 4.0  # times the separate nodes' error
ROUNDS, LEAST_ROUNDS, SECONDS = 20, 5, 2.0
_BY_RULE = ("amx_bf16",)  # micro-kernels that make a region faster than what else there is, as a rule
_EXACT = {torch.float32: 4 * torch.finfo(torch.float32).eps, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}

log = logging.getLogger("fused_resnet")


class Separate(NamedTuple):
    """How a plan runs a convolution that is in no region."""

    selection: Selection
    in_place: bool


class Piece(NamedTuple):
    """A fragment of a plan, how its convolutions run separately, and the places of its steps in the plan."""

    fragment: Fragment
    separate: tuple[Optional[Separate], ...]  # of each step, None of poolings
    places: tuple[int, ...]

    @property
    def problem(self) -> RegionProblem:
        """As `winners` keeps it: also by who computes the convolutions separately, since that is what it beat."""
        rivals = ((one.selection, one.in_place) for one in self.separate if one is not None)
        texts = [
            f"{selection} {in_place} {winners.kernel_digest(selection.backend.name)}" for selection, in_place in rivals
        ]
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        return RegionProblem(self.fragment.shapes[0][0], f"{self.fragment.text} {digest}", self.fragment.dtype, "cpu")

    def part(self, begin: int, end: int) -> Piece:
        """The steps from begin to end as a piece of their own."""
        f, first = self.fragment, len(self.fragment.shapes)
        within, shapes = range(first + begin, first + end), f.value_shapes
        reads = dict.fromkeys(value for step in f.steps[begin:end] for value in step.reads if value not in within)
        read_later = {value for step in f.steps[end:] for value in step.reads} | set(f.outputs)
        renamed = {value: number for number, value in enumerate([*reads, *within])}
        steps = tuple(_renamed(step, renamed) for step in f.steps[begin:end])
        outputs = tuple(renamed[value] for value in within if value in read_later)
        fragment = Fragment(tuple(shapes[value] for value in reads), steps, outputs, f.dtype)
        return Piece(fragment, self.separate[begin:end], self.places[begin:end])


def _renamed(step: Step, renamed: Mapping[int, int]) -> Step:
    if not isinstance(step, ConvStep):
        return step._replace(x=renamed[step.x])
    return step._replace(x=renamed[step.x], residual=None if step.residual is None else renamed[step.residual])


class RegionProblem(NamedTuple):
    """A piece under which measurements are kept, as a convolution is by its problem."""

    N: int
    text: str
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> str:
        return "region"

    def __str__(self) -> str:
        return f"{self.N}x{self.text}"


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


def why_wrong(piece: Piece) -> Optional[str]:
    return winners.why_wrong(winners.outcome(piece.problem, REGION))


def why_region(piece: Piece) -> Optional[str]:
    """Why this runs as a region, as part of a sentence; None where it does not."""
    if why_wrong(piece) is not None:
        return None
    winner = winners.lookup(piece.problem)
    if winner is None:
        kernel = kernels.fastest(piece.fragment.dtype)
        return RULE if kernel is not None and kernel.name in _BY_RULE else None
    if winner.backend != REGION:
        return None
    times = times_of(piece)
    against = "" if times is None else f": {times.region:.0f} us, {times.separate:.0f} us as separate nodes"
    return f"{winner.source}{against}"


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
        if why_region(piece) is not None and winners.outcome(piece.problem, REGION) is None:
            with torch.no_grad():
                _keep_check(piece, checked(piece, material))


def _measure(pieces: Sequence[Piece], seconds: float, progress: timing.Progress) -> None:
    material, groups, outcomes = Material(), dict[RegionProblem, dict[str, Fed]](), {}
    for piece in pieces:
        progress(1.0, f"checking a {piece.problem}")  # the convolutions' own measuring has told of the way there
        known = winners.outcome(piece.problem, REGION)
        outcome = outcomes[piece.problem] = known or checked(piece, material)
        if known is None:
            _keep_check(piece, outcome)
        if winners.why_wrong(outcome) is None:
            groups[piece.problem] = _fed(piece, material)
    limits: dict[str, Any] = dict(rounds=ROUNDS, least_rounds=LEAST_ROUNDS, budget_s=seconds)
    times = timing.in_network_order(groups, **limits, progress=lambda fraction, text: progress(1.0, text))
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    table = Table.empty(str(winners.device_id("cpu")))
    table.runs[run] = {"date": run, "threads": torch.get_num_threads(), "kernels": winners.kernel_digests()}
    for problem, stats in times.items():
        errors = {REGION: outcomes[problem]["error_ratio"], SEPARATE: 0.0}
        best = {name: Measured(None, one.median_us, errors[name]) for name, one in stats.items()}
        entry = Entry(_winner(stats), SEPARATE, run, best)
        table.entries.setdefault(winners.key(problem), {})[problem.N] = entry
    if table.entries:
        winners.keep(table)


def _winner(stats: Mapping[str, Stats]) -> str:
    if len(stats) < 2:
        return next(iter(stats))
    ours, theirs = stats[REGION], stats[SEPARATE]
    is_clear = all(one < (1 - MARGIN) * other for one, other in zip(ours[:2], theirs[:2]))
    return REGION if is_clear else SEPARATE


def _keep_check(piece: Piece, outcome: dict[str, Any]) -> None:
    keep = winners.keep_here if outcome.get("is_passing") else winners.keep
    table = Table.empty(str(winners.device_id("cpu")))
    keep(table._replace(checks=winners.checks_of(piece.problem, {REGION: outcome})))


# --------------------------------------------------------------------------------------------- what is run, and on what


class Material:
    """Random weights and biases of a plan's convolutions by their place there, and the same packed: each once."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, ConvProblem], tuple[Tensor, Optional[Tensor]]] = {}
        self._packed: dict[Any, Tensor] = {}

    def of(self, piece: Piece) -> dict[int, tuple[Tensor, Optional[Tensor]]]:
        """(weight, bias) by step."""
        found = {}
        for step, (place, one) in enumerate(zip(piece.places, piece.fragment.steps)):
            if isinstance(one, ConvStep):
                p, key = one.problem, (place, one.problem)
                if key not in self._weights:
                    generator = torch.Generator().manual_seed(place)
                    weight = torch.randn(p.K, p.C, p.R, p.S, generator=generator) * math.sqrt(2 / p.reduction)
                    bias = torch.empty(p.K).uniform_(-0.5, 0.5, generator=generator) if p.has_bias else None
                    weight = weight.to(p.dtype, memory_format=torch.channels_last)
                    self._weights[key] = weight, None if bias is None else bias.to(p.dtype)  # as `affine.fold` has them
                found[step] = self._weights[key]
        return found

    def region(self, piece: Piece) -> CompiledRegion:
        of = self.of(piece)
        packed, points, read_by_rows = {}, by_winograd(piece.fragment), stems(piece.fragment).values()
        for step, parts in segments(piece.fragment).items():
            key = (REGION, step in points, step in read_by_rows, *(piece.places[part] for part in parts))
            if key not in self._packed:
                self._packed[key] = pack(piece.fragment, step, [of[part][0] for part in parts])
            packed[step] = self._packed[key]
        return compile_fragment(piece.fragment, packed, {step: bias for step, (_, bias) in of.items()})

    def separate(self, piece: Piece) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """The nodes as a plan calls them one by one."""
        of, calls = self.of(piece), []
        for step, (one, how) in enumerate(zip(piece.fragment.steps, piece.separate)):
            if isinstance(one, ConvStep) and how is not None:
                p, selection = one.problem, how.selection
                key = (str(selection), piece.places[step], p)
                if key not in self._packed:
                    self._packed[key] = selection.backend.plan.pack(p, of[step][0], selection.config)
                calls.append(bound(p, selection, self._packed[key], of[step][1], in_place=how.in_place))
            elif isinstance(one, ConvStep):
                calls.append(linear(*of[step], one.problem.N))
            elif isinstance(one, PoolStep):
                calls.append(_pooling(piece.fragment, step))
            else:
                calls.append(lambda x: x)
        return _in_a_row(piece.fragment, calls)


def _in_a_row(fragment: Fragment, calls: Sequence[Callable[..., Tensor]]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """All steps one after another. What is not read any more is dropped, as in a plan."""
    first = len(fragment.shapes)
    last_read = {value: place for place, step in enumerate(fragment.steps) for value in step.reads}
    dropped: dict[int, list[int]] = {}
    for value, place in last_read.items():
        if value not in fragment.outputs:
            dropped.setdefault(place, []).append(value)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        values = dict(enumerate(inputs))
        for place, (step, call) in enumerate(zip(fragment.steps, calls)):
            values[first + place] = call(*(values[value] for value in step.reads))
            for value in dropped.get(place, ()):
                del values[value]
        return [values[value] for value in fragment.outputs]

    return run


def linear(weight: Tensor, bias: Optional[Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """As a plan calls a linear layer (`freezing.modules.FrozenLinear`), from and to maps of one pixel."""
    matrix = weight.flatten(1)
    if backends.onednn_missing(weight.dtype) is not None:
        return lambda x: F.linear(x.flatten(1), matrix, bias)[..., None, None]
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, batch)
    call = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: call(x.flatten(1), packed, bias, "none", [], "")[..., None, None]


def _pooling(fragment: Fragment, place: int) -> Callable[[Tensor], Tensor]:
    """A plan's max-poolings write no indices (`freezing.pooling`), its others are torch's."""
    step, dtype = fragment.steps[place], fragment.dtype
    assert isinstance(step, PoolStep)
    if step.kind == "average":
        return _pooling_of_torch(step)
    shape, window = fragment.value_shapes[len(fragment.shapes) + place], (step.window, step.stride, step.padding)
    pool = torch.ops.fused_resnet.cpu_max_pool2d.default

    def run(x: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        pool(x, *window, out)
        return out

    return run


def _pooling_of_torch(step: PoolStep) -> Callable[[Tensor], Tensor]:
    window, stride, padding, counts = step.window, step.stride, step.padding, step.counts_padding
    if step.kind == "max":
        return lambda x: F.max_pool2d(x, window, stride, padding)
    return lambda x: F.avg_pool2d(x, window, stride, padding, count_include_pad=counts)


def _images(fragment: Fragment) -> list[Tensor]:
    """Two images of each input: an ordinary one, and one of any size from channel to channel, with many zeros."""
    generator, found = torch.Generator().manual_seed(0), []
    for _, C, H, W in fragment.shapes:
        values = torch.randn(2, C, H, W, generator=generator)
        exponents = torch.empty(C, 1, 1).uniform_(-4.0, 4.0, generator=generator)
        values[1] *= 10**exponents * (torch.randn(C, H, W, generator=generator) > -0.5)
        found.append(values.to(fragment.dtype))
    return found


def _fed(piece: Piece, material: Material) -> dict[str, Fed]:
    order = torch.zeros(piece.problem.N, dtype=torch.long)
    given = [in_order(images, order) for images in _images(piece.fragment)]
    inputs = [torch.empty_like(images) for images in given]
    region, separate = material.region(piece), material.separate(piece)
    workspace, kernel = region.empty_workspace(), kernels.fastest_name(piece.fragment.dtype)

    def feed() -> None:
        for x, images in zip(inputs, given):
            x.copy_(images)

    return {SEPARATE: Fed(feed, lambda: separate(inputs)), REGION: Fed(feed, lambda: region(inputs, workspace, kernel))}


# ------------------------------------------------------------------------------------------------- whether it is right


def checked(piece: Piece, material: Optional[Material] = None) -> dict[str, Any]:
    """The outcome of a check, as `checking.Checked` has it: of how wrong the region is, or why it could not be run."""
    try:
        return {"error_ratio": finite(_worst_of_two(piece, material or Material()))}
    except Exception as error:
        passes = {"is_passing": True} if isinstance(error, _NoYardstick) or is_out_of_memory(error) else {}
        return {"why": one_line(error), **passes}


class _NoYardstick(Exception):
    """The separate nodes do not run, or their result is no number: that says nothing of the region."""


def _worst_of_two(piece: Piece, material: Material) -> float:
    """Every image of a batch, twice, with the images in the other order the second time.

    Before each time the workspace and the outputs hold NaN. The region may write into none of its inputs.
    """
    f, images = piece.fragment, _images(piece.fragment)
    exact = _exact(piece, material, images)
    region, separate = material.region(piece), material.separate(piece)
    workspace, first, worst = region.empty_workspace(), order_of(piece.problem.N), 0.0
    for order in (first, 1 - first):
        inputs = [in_order(one, order) for one in images]
        allowed = _errors_of_nodes(separate, [x.clone() for x in inputs], exact, order)
        kept = [x.clone() for x in inputs]
        outputs = [torch.full_like(y[:1], torch.nan, dtype=f.dtype).repeat(len(order), 1, 1, 1) for y in exact]
        outputs = [y.contiguous(memory_format=torch.channels_last) for y in outputs]
        tensors = (region.program, inputs, region.weights, region.biases)
        torch.ops.fused_resnet.cpu_region(*tensors, kernels.fastest_name(f.dtype), workspace.fill_(0xFF), outputs)
        if not all(map(torch.equal, inputs, kept)):
            raise ValueError("it writes into its input")
        for output, expected, most in zip(outputs, exact, allowed):
            for ours, theirs in zip(_errors(output, expected, order), most):
                for one, other in zip(ours, theirs):
                    ratio = one / (SLACK * max(other, _EXACT[f.dtype]))
                    worst = max(worst, math.inf if math.isnan(ratio) else ratio)
    return worst


def _errors_of_nodes(
    separate: Callable[[Sequence[Tensor]], list[Tensor]], inputs: list[Tensor], exact: list[Tensor], order: Tensor
) -> list[list[tuple[float, float]]]:
    try:
        found = [_errors(*pair, order) for pair in zip(separate(inputs), exact)]
    except Exception as error:
        raise _NoYardstick(f"its separate nodes do not run: {one_line(error)}") from error
    if not all(math.isfinite(value) for errors in found for pair in errors for value in pair):
        raise _NoYardstick("its separate nodes give no numbers")
    return found


def _exact(piece: Piece, material: Material, images: Sequence[Tensor]) -> list[Tensor]:
    """The fragment's outputs for two images in fp64."""
    f, of = piece.fragment, material.of(piece)
    calls: list[Callable[..., Tensor]] = []
    for place, step in enumerate(f.steps):
        if isinstance(step, ConvStep):
            calls.append(_convolution_in_fp64(step.problem._replace(N=2), *of[place]))
        elif isinstance(step, PoolStep):
            calls.append(_pooling_of_torch(step))
        else:
            calls.append(lambda x: x)
    return _in_a_row(f, calls)([x.double() for x in images])


def _convolution_in_fp64(problem: ConvProblem, weight: Tensor, bias: Optional[Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return reference.conv_bn_act(problem, ConvOperands(x, weight, bias=bias, residual=residual))

    return run


def _errors(actual: Tensor, exact: Tensor, order: Tensor) -> list[tuple[float, float]]:
    """By image: the worst element relative to the largest, and the norm of the error relative to the result's."""
    found = []
    for image, k in zip(actual, order.tolist()):
        error, scale = (image.double() - exact[k]).abs(), exact[k].abs()
        largest, norm = scale.max().item() or 1.0, scale.square().sum().sqrt().item() or 1.0
        found.append((error.max().item() / largest, error.square().sum().sqrt().item() / norm))
    return found
