"""ATen, one call per step: the specification at speed, and the fallback."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.record import Auto, Backend, Configs, InPlan, Rounding
from fused_resnet.operators import affine, detours
from fused_resnet.operators.composites import activate_
from fused_resnet.operators.layout import channels_last, nchw
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


class EagerConfig(NamedTuple):
    """How ATen convolves on a CPU. layout: "NCHW", into which a plan brings the weight once and x at each call."""

    layout: str


def worth(problem: ConvProblem) -> list[EagerConfig]:
    return [EagerConfig("NCHW")] if problem.device == "cpu" else []


def run(
    problem: ConvProblem, operands: ConvOperands, config: Optional[EagerConfig] = None, in_nchw: bool = False
) -> Tensor:
    """The operator as ATen calls, one per step. in_nchw: to an output in NCHW memory, without a detour."""
    o, placed = operands, nchw if in_nchw else channels_last
    has_late_bias = o.bias is not None and o.bias.dtype != o.x.dtype
    bias = None if has_late_bias else o.bias
    y = convolution(problem, o, bias, in_nchw=config is not None)
    if o.residual is not None:  # which as a rule has the output's layout
        y = placed(y)
    if not has_late_bias and _is_stock_batch_norm(o):
        y = F.batch_norm(y, o.bn_mean, o.bn_var, o.bn_weight, o.bn_bias, False, 0.0, o.eps)
    elif problem.has_bn or has_late_bias:
        wide = torch.promote_types(torch.float32, o.x.dtype)
        scale, shift = affine.scale_and_shift(o if has_late_bias else o._replace(bias=None), wide)
        y = (y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(o.x.dtype)
    if o.residual is not None:
        y = y.add_(o.residual)
    return placed(activate_(y, problem.activation))


def convolution(problem: ConvProblem, operands: ConvOperands, bias: Optional[Tensor], in_nchw: bool = False) -> Tensor:
    """ATen's convolution alone, in the layout that ATen gives it. in_nchw: of x in NCHW memory."""
    x = operands.x.contiguous() if in_nchw or _weight_is_dearer_to_convert(problem, operands) else operands.x
    return detours.convolution(problem, x, operands.weight, bias)


def is_brought_into_nchw(problem: ConvProblem, operands: ConvOperands) -> bool:
    """Whether `convolution` copies x."""
    return _weight_is_dearer_to_convert(problem, operands) and not operands.x.is_contiguous()


def pack(problem: ConvProblem, weight: Tensor, config: Optional[EagerConfig]) -> Tensor:
    return weight if config is None else weight.contiguous()


def _weight_is_dearer_to_convert(problem: ConvProblem, operands: ConvOperands) -> bool:
    """Whether it costs less to convert x and the output than to let ATen convert the weight at every call.

    On the CPU ATen brings both operands of a convolution into channels_last when one of them is. One thread,
    AVX-512, torch 2.13, 512 -> 512 channels 3x3 at 7x7: 8.8 ms that way, 4.8 ms in NCHW with both conversions.
    """
    if problem.device != "cpu" or operands.weight.is_contiguous(memory_format=torch.channels_last):
        return False
    return operands.weight.numel() > operands.x.numel() + problem.N * problem.K * problem.P * problem.Q


def _is_stock_batch_norm(operands: ConvOperands) -> bool:
    """Whether ATen's batch_norm does the same: statistics present, all vectors of one dtype that it accepts."""
    x, _, weight, bias, mean, var, *_ = operands
    if mean is None or var is None:
        return False
    dtype = mean.dtype
    if var.dtype != dtype or not (weight is None or weight.dtype == dtype) or not (bias is None or bias.dtype == dtype):
        return False
    return dtype == x.dtype or (dtype == torch.float32 and x.dtype != torch.float64)


BACKEND = Backend(
    "eager",
    lambda problem: None,
    run,
    auto=Auto(("cpu", "cuda")),
    rounding=Rounding(lambda problem, operands: True, spreads_nan=True),  # each step writes a tensor
    origin="torch",
    plan=InPlan(pack),
    configs=Configs(worth),
    after_aten=True,
)
