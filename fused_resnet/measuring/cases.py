"""A problem as something to run: random operands, the call that a plan makes, and how wrong its result is."""

from __future__ import annotations

import functools
import math
from typing import Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fused_resnet import choosing, testing
from fused_resnet.freezing import layouts, modules
from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.operators import affine
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


def random_operands(problem: ConvProblem, device: str, seed: int = 0) -> ConvOperands:
    """Operands with live BN for a problem: random-normal activations, He-scaled weights, vectors in fp32."""
    generator = torch.Generator(device=device).manual_seed(seed)
    p = problem

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(p.dtype, memory_format=torch.channels_last)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(p.K, device=device).uniform_(low, high, generator=generator)

    return ConvOperands(
        normal(p.N, p.C, p.H, p.W),
        normal(p.K, p.C // p.groups, p.R, p.S, scale=math.sqrt(2 / p.reduction)),
        uniform(0.5, 1.5), uniform(-0.5, 0.5), uniform(-0.5, 0.5), uniform(0.5, 1.5),
        residual=normal(*p.output_shape) if p.has_residual else None,
    )  # fmt: skip


def folded_operands(operands: ConvOperands, *, has_bias: bool = True) -> ConvOperands:
    """The same operation with BN folded into weight and bias, as `freeze` does; without a bias that it moves away."""
    weight, shift = affine.fold(operands, operands.x.dtype)
    return ConvOperands(operands.x, weight, bias=shift if has_bias else None, residual=operands.residual)


def planned_call(problem: ConvProblem, selection: choosing.Selection, operands: ConvOperands) -> Callable[[], Tensor]:
    """A convolution with folded BN as a frozen plan calls it: its weight packed, and x where the plan would have it.

    For a rows_tma config that is row space, and its time holds no conversion: a plan takes what was measured best
    without wherever it cannot keep x there (`layouts`). The residual and the output are NHWC, since where those lie
    depends on who else reads them. Triton without a config, which is to say unmeasured, runs its default, for which a
    plan that is replayed takes a likelier one.
    """
    placed = layouts.Placed(problem, selection.config) if selection.backend.plan.placed else None
    conv = modules.FrozenConv(problem, selection, operands.weight, operands.bias, placed=placed)
    x = row_space.pack(operands.x) if placed is not None and placed.wants_row_space else operands.x
    return functools.partial(conv.bound(), x, operands.residual)


class Prepared(NamedTuple):
    """A variant of an operator: how to run it, and by which backend's rules a few of its images are compared."""

    run: Callable[[], Tensor]
    images: Sequence[int]
    case: testing.Case
    backend: str


def compared_images(batch: int) -> list[int]:
    """The first two images and the last.

    The whole batch is computed, since kernel choice and tile borders depend on it. But an image's output depends on no
    other image, so a few are enough for the fp64 reference.
    """
    return sorted({0, min(1, batch - 1), batch - 1})


def compared_case(problem: ConvProblem, operands: ConvOperands) -> tuple[list[int], testing.Case]:
    """The images of a batch that are held against the reference, and the case that they make."""
    images = compared_images(problem.N)
    return images, testing.Case(problem._replace(N=len(images)), _only(images, operands))


def _only(images: Sequence[int], operands: ConvOperands) -> ConvOperands:
    residual = operands.residual
    return operands._replace(x=operands.x[images], residual=None if residual is None else residual[images])


def error_ratio(prepared: Prepared) -> float:
    """The worst error as a fraction of what the backend is allowed, over a few images; 0 for a copy.

    Of a convolution, reference.error_bound; an addition rounds once, so any other result counts as infinitely wrong.
    Anything but a number does too.
    """
    if not prepared.images:
        return 0.0
    with torch.no_grad():
        actual = prepared.run()[prepared.images].cpu()
    case = prepared.case
    if case.problem.op == "add_relu":
        return 0.0 if torch.equal(actual, case.expected.to(actual.dtype)) else math.inf
    error = (actual.double() - case.expected).abs()
    return (error / testing.bound_of(case, prepared.backend)).nan_to_num(nan=math.inf).max().item()


def finite(value: float) -> Optional[float]:
    """JSON has no infinity: None stands for an error without bound."""
    return value if math.isfinite(value) else None
