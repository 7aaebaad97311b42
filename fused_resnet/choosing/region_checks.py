"""Whether a region computes its fragment right on this very machine.

It is compared with fp64, on an ordinary and an extreme image. It may be `SLACK` times as wrong as its nodes are when
they are computed one by one as they should be (`Material.in_fp32`). Both round to the same dtype, in another order and
at other places. Errors of equal size and random sign differ by less than twice, and a network adds up many of them. In
fp32 sums err most, and a matrix product adds up blocks of some hundred terms where a kernel adds up thousands, one by
one. The error of a sum grows with the root of its length: four times more.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from fused_resnet.backends import blocked
from fused_resnet.choosing import winners
from fused_resnet.choosing.cases import finite, in_order, order_of
from fused_resnet.choosing.material import Material, images_of
from fused_resnet.choosing.piece import Piece, RegionProblem
from fused_resnet.choosing.winners_file import Table
from fused_resnet.machine.errors import one_line
from fused_resnet.regions import kernels

REGION = blocked.BACKEND.name  # as whose candidate it is kept
SLACK = {torch.bfloat16: 4.0, torch.float32: 16.0}  # times the nodes' error
_EXACT = {torch.float32: 4 * torch.finfo(torch.float32).eps, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}


def why_wrong(piece: Piece) -> Optional[str]:
    return winners.why_wrong(winners.outcome(piece.region, REGION))


def check(piece: Piece, material: Material) -> dict[str, Any]:
    """The outcome of a check, as `checking.Checked` has it. It is made once, and kept."""
    if (known := winners.outcome(piece.region, REGION)) is not None:
        return known
    with torch.no_grad():
        outcome = checked(piece, material)
    keep_check(piece.region, outcome)
    return outcome


def keep_check(region: RegionProblem, outcome: dict[str, Any]) -> None:
    """In the user's file, or for this process alone what the next one may find otherwise."""
    keep = winners.keep_here if outcome.get("is_passing") else winners.keep
    table = Table.empty(str(winners.device_id("cpu")))
    keep(table._replace(checks=winners.checks_of(region, {REGION: outcome})))


def checked(piece: Piece, material: Material) -> dict[str, Any]:
    """How wrong the region is. What it raises says that it does not run now: another process tries again."""
    try:
        return _worst_of_two(piece, material)
    except Exception as error:
        return {"why": one_line(error), "is_passing": True}


def _worst_of_two(piece: Piece, material: Material) -> dict[str, Any]:
    """Every image of a batch, twice, with the images in the other order the second time.

    Before each time the workspace and the outputs hold NaN. The region may write into none of its inputs.
    """
    f, images = piece.fragment, images_of(piece.fragment)
    exact = material.in_fp64(piece)([x.double() for x in images])
    both = order_of(2)
    allowed = [_errors(*pair, both) for pair in zip(material.in_fp32(piece)(images), exact)]
    if not all(math.isfinite(value) for errors in allowed for pair in errors for value in pair):
        return {"why": "its nodes give no numbers", "is_passing": True}
    region = material.region(piece)
    workspace, first, worst = region.empty_workspace(), order_of(piece.region.N), 0.0
    for order in (first, 1 - first):
        inputs = [in_order(one, order) for one in images]
        kept = [x.clone() for x in inputs]
        outputs = [torch.full_like(y[:1], torch.nan, dtype=f.dtype).repeat(len(order), 1, 1, 1) for y in exact]
        outputs = [y.contiguous(memory_format=torch.channels_last) for y in outputs]
        tensors = (region.program, inputs, region.weights, region.biases)
        torch.ops.fused_resnet.cpu_region(*tensors, kernels.fastest_name(f.dtype), workspace.fill_(0xFF), outputs)
        if not all(map(torch.equal, inputs, kept)):
            return {"why": "it writes into its input"}
        for output, expected, most in zip(outputs, exact, allowed):
            for ours, k in zip(_errors(output, expected, order), order.tolist()):
                for one, other in zip(ours, most[k]):
                    ratio = one / (SLACK[f.dtype] * max(other, _EXACT[f.dtype]))
                    worst = max(worst, math.inf if math.isnan(ratio) else ratio)
    return {"error_ratio": finite(worst)}


def _errors(actual: Tensor, exact: Tensor, order: Tensor) -> list[tuple[float, float]]:
    """By image: the worst element relative to the largest, and the norm of the error relative to the result's."""
    found = []
    for image, k in zip(actual, order.tolist()):
        error, scale = (image.double() - exact[k]).abs(), exact[k].abs()
        largest, norm = scale.max().item() or 1.0, scale.square().sum().sqrt().item() or 1.0
        found.append((error.max().item() / largest, error.square().sum().sqrt().item() / norm))
    return found
