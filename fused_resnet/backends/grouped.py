"""Grouped 3x3 convolutions, as in ResNeXt, in C++ (csrc/cpu/grouped.h): sums stay in registers. CPU only."""

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
    if (p.R, p.S) != (3, 3) or max(p.stride) > 2 or p.dilation != (1, 1):
        return "it computes 3x3 convolutions with stride 1 or 2 and dilation 1"
    width = p.C // p.groups
    if p.groups == 1 or p.K != p.C or not (width in (4, 8) or width % PANEL == 0):
        return (
            f"it needs groups with as many outputs as inputs, 4, 8 or a multiple of {PANEL}; "
            f"there are {width} inputs and {p.K // p.groups} outputs in {p.groups}"
        )
    return compiled.load("cpu")


def pays(problem: ConvProblem) -> bool:
    """Where groups are of 4 channels, and for some wider ones in fp32.

    Those are groups of 8 with stride 1, and of 8 or 16 with stride 2 where pixels are a multiple of 1 KB apart. At such
    distances oneDNN's reads share cache sets.

    Times oneDNN's speed, EPYC Zen 4, 2026-11, batches 1 and 8:

    | dtype, channels a group | one thread | two threads |
    | --- | --- | --- |
    | fp32, 4 | 2.3 to 3.0 | 2.2 to 3.0 |
    | fp32, 8 with stride 1 | 0.99 to 1.4 | 1.0 to 1.5 |
    | fp32, with stride 2 as above | 1.6 to 2.55 | 1.6 to 2.5 |
    | fp32, left out | 0.8 to 1.1 | 0.8 to 1.3 |
    | bf16, 4 | 1.3 to 1.6 | 1.4 to 1.6 |
    | bf16, left out | 0.4 to 1.1 | 0.5 to 1.35 |
    """
    p = problem
    width = p.C // p.groups
    if width == 4 or p.dtype == torch.bfloat16:
        return width == 4
    return (width == 8 and p.stride == (1, 1)) or (width <= 16 and p.stride == (2, 2) and p.C % 256 == 0)


def pack(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    """(C/16, 3, C/groups, 3, 16) in fp32: panel of output channels, r, c of the group, s, output channel."""
    padded = F.pad(weight.detach().float(), (0, 0, 0, 0, 0, 0, 0, -problem.K % PANEL))
    return padded.unflatten(0, (-1, PANEL)).permute(0, 3, 2, 4, 1).contiguous()


def bind(
    problem: ConvProblem, weight: Tensor, bias: Optional[Tensor], *, into_residual: bool = False
) -> Callable[..., Tensor]:
    kernel = torch.ops.fused_resnet.cpu_grouped_conv.default
    return bind_kernel(kernel, (problem.stride, problem.padding), problem, weight, bias, into_residual)


BACKEND = Backend(
    "grouped",
    why_not,
    packing(pack, bind),
    auto=Auto(("cpu",), pays),
    takes_bn=False,
    sources=sources.GROUPED,
    plan=InPlan(pack, bind, only=True),
)
