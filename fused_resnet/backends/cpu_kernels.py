"""What the CPU's convolutions of csrc have in common: what they ask of a problem, and how plans call them."""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends.record import NEEDS_FOLDED_BN, why_not_cpu
from fused_resnet.operators.layout import channels_last
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, dtype_name

PANEL = 16  # output channels that lie together in their weights


def why_no_kernel(problem: ConvProblem) -> Optional[str]:
    """Why none of them runs this problem, whatever its window."""
    p, reason = problem, why_not_cpu(problem)
    if reason is not None:
        return reason
    if p.has_bn:
        return NEEDS_FOLDED_BN
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype_name(p.dtype)} is not supported (float32, bfloat16 are)"
    return None


def packing(
    pack: Callable[[ConvProblem, Tensor], Tensor], bind: Callable[..., Callable[..., Tensor]]
) -> Callable[[ConvProblem, ConvOperands], Tensor]:
    """How a backend runs outside plans: it packs the weight at every call."""

    def run(problem: ConvProblem, operands: ConvOperands) -> Tensor:
        o = operands
        return bind(problem, pack(problem, o.weight), o.bias)(o.x, o.residual)

    return run


def bind_kernel(
    kernel: Callable[..., None],
    window: tuple,
    problem: ConvProblem,
    weight: Tensor,
    bias: Optional[Tensor],
    into_residual: bool,
) -> Callable[..., Tensor]:
    """As `onednn.bind`, with a kernel (x, weight, bias, residual, *window, activation, out).

    bf16 activations are widened, summed in fp32 and rounded once. weight: packed.
    """
    activation, shape, dtype = problem.activation, problem.output_shape, problem.dtype
    bias = None if bias is None else bias.float().contiguous()

    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        residual = None if residual is None else channels_last(residual)
        if into_residual and residual is not None:
            out = residual
        else:
            out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        kernel(channels_last(x), weight, bias, residual, *window, activation, out)
        return out

    return run
