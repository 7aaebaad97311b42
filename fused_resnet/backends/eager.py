"""ATen, one call per step: the specification at speed, and the fallback."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.record import Auto, Backend, Configs, InPlan, Rounding
from fused_resnet.operators import affine, detours
from fused_resnet.operators.composites import activate_
from fused_resnet.operators.layout import channels_last, empty_output, nchw
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
    x = o.x.contiguous() if config is not None or _weight_is_dearer_to_convert(problem, o) else o.x
    y = detours.convolution(problem, x, o.weight, bias)
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


def settled(problem: ConvProblem, operands: ConvOperands, in_nchw: bool) -> Optional[Callable[..., Tensor]]:
    """`run` without its questions, for operands in a row with the facts of these: x to bn_var, eps, bias, residual.

    None where an answer may be another one at the next call, and off the usual path.
    """
    p, o, placed = problem, operands, nchw if in_nchw else channels_last
    if p.device != "cpu" or p.dtype not in (torch.float32, torch.float64) or detours.forward_detour(p) is not None:
        return None
    if not _is_stock_batch_norm(o) or o.bias is not None and o.bias.dtype != p.dtype:
        return None
    conv2d, batch_norm, groups = torch.conv2d, torch.native_batch_norm, p.groups
    # one number is read faster than a pair
    stride, padding, dilation = (one[0] if one[0] == one[1] else one for one in (p.stride, p.padding, p.dilation))
    is_brought, activation = _weight_is_dearer_to_convert(p, o) and not o.x.is_contiguous(), p.activation
    no_mean = no_var = torch.empty(0, dtype=p.dtype)  # of the batch, which in eval mode is not asked
    strides = empty_output(p, torch.empty(0, device="meta"), not in_nchw).stride()

    def run(x, weight, gamma, beta, mean, var, eps, bias, residual) -> Tensor:
        y = conv2d(x.contiguous() if is_brought else x, weight, bias, stride, padding, dilation, groups)
        if residual is not None and y.stride() != strides:
            y = placed(y)
        # in place: 0.6 ms of 8x64x56x56 where a new tensor takes 0.9 (one thread, torch 2.13, 2026-11)
        batch_norm(y, gamma, beta, mean, var, False, 0.0, eps, out=(y, no_mean, no_var))
        if residual is not None:
            y.add_(residual)
        y = y.relu_() if activation == "relu" else activate_(y, activation)
        return y if y.stride() == strides else placed(y)

    return run


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
)
