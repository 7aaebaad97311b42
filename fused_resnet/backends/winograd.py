"""Winograd's F(4x4, 3x3) in C++ (csrc/cpu/winograd.h): 36 products instead of 144 for 16 outputs. CPU only."""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends.cpu_kernels import PANEL, bind_kernel, packing, why_no_kernel
from fused_resnet.backends.record import Auto, Backend, InPlan, Rounding
from fused_resnet.kernels import compiled, sources, winograd
from fused_resnet.machine import onednn
from fused_resnet.operators.problem import ConvProblem


def why_not(problem: ConvProblem) -> Optional[str]:
    p, reason = problem, why_no_kernel(problem)
    if reason is not None:
        return reason
    if (p.R, p.S) != (3, 3) or p.stride != (1, 1) or p.dilation != (1, 1) or p.groups != 1:
        return "it computes 3x3 convolutions with stride 1, dilation 1 and one group"
    if p.C % PANEL or p.K % PANEL:
        return f"it needs channels in multiples of {PANEL}, there are {p.C} and {p.K}"
    return compiled.load("cpu")


def pays(problem: ConvProblem) -> bool:
    """Unless most of its 4x4 output tiles lie outside the output, or too few share four times the weights.

    In bf16 with many channels, where its fp32 sums meet bf16 instructions, only if the tiles fit the output. Never in
    bf16 where oneDNN has AMX: ResNet-50 at batch 8 took 107 ms with it and 91 without (Intel Xeon, one thread, 2026-11,
    one run).

    Times oneDNN's speed, EPYC Zen 4, 2026-11:

    | | one thread | two threads |
    | --- | --- | --- |
    | fp32, by this rule | 1.4 to 2.8 | 1.1 to 2.6 |
    | fp32, left out: 4 tiles of 512 channels | 1.1 | 0.8 |
    | bf16, to 192 channels | 0.95 to 1.6 | 1.2 to 1.6 |
    | bf16, more channels, by this rule | 1.2 to 1.45 | 1.2 to 1.5 |
    | bf16, more channels, left out: maps of 7, 14 and 17 | 0.6 to 1.1 | 0.6 to 1.2 |
    """
    p = problem
    channels, tiles = max(p.C, p.K), p.N * -(-p.P // 4) * -(-p.Q // 4)
    inside = p.N * p.P * p.Q / (16 * tiles) if tiles else 0.0
    if tiles < max(4, channels // 64) or inside < 0.5 or p.dtype == torch.bfloat16 and onednn.has_amx():
        return False
    return p.dtype == torch.float32 or channels <= 192 or inside > 0.9


def pack(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    """As `kernels.winograd.points` says."""
    return winograd.points(weight)


def bind(
    problem: ConvProblem, weight: Tensor, bias: Optional[Tensor], *, into_residual: bool = False
) -> Callable[..., Tensor]:
    kernel = torch.ops.fused_resnet.cpu_winograd.default
    return bind_kernel(kernel, (problem.padding,), problem, weight, bias, into_residual)


BACKEND = Backend(
    "winograd",
    why_not,
    packing(pack, bind),
    auto=Auto(("cpu",), pays),
    takes_bn=False,
    rounding=Rounding(winograd=True),
    sources=sources.WINOGRAD,
    plan=InPlan(pack, bind, only=True),
)
