"""Convolutions of one group with any window in C++ (csrc/cpu/direct.h): a matrix product without im2col. CPU only."""

from __future__ import annotations

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.cpu_kernels import PANEL, bind_kernel, packing, why_no_kernel
from fused_resnet.backends.record import Auto, Backend, InPlan
from fused_resnet.kernels import compiled, sources
from fused_resnet.operators.problem import ConvProblem


def why_not(problem: ConvProblem) -> Optional[str]:
    p, reason = problem, why_no_kernel(problem)
    if reason is not None:
        return reason
    if p.groups != 1:
        return f"it computes convolutions of one group, not of {p.groups}"
    return compiled.load("cpu")


def pack(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    """(K/16, R, S, C, 16) in fp32: panel of output channels, r, s, input channel, output channel."""
    padded = F.pad(weight.detach().float(), (0, 0, 0, 0, 0, 0, 0, -problem.K % PANEL))
    return padded.unflatten(0, (-1, PANEL)).permute(0, 3, 4, 2, 1).contiguous()


def bind(
    problem: ConvProblem, weight: Tensor, bias: Optional[Tensor], *, into_residual: bool = False
) -> Callable[..., Tensor]:
    p, kernel = problem, torch.ops.fused_resnet.cpu_direct_conv.default
    return bind_kernel(kernel, (p.stride, p.padding, p.dilation), p, weight, bias, into_residual)


BACKEND = Backend(
    "direct",
    why_not,
    packing(pack, bind),
    auto=Auto(("cpu",)),
    takes_bn=False,
    sources=sources.DIRECT,
    plan=InPlan(pack, bind, only=True),
)
