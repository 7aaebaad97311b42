"""Winograd's F(4x4, 3x3) in C++ (csrc/winograd.h): 36 products instead of 144 for 16 outputs. CPU only."""

from __future__ import annotations

import math
from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet import extension
from fused_resnet.backends.eager import channels_last
from fused_resnet.problem import ConvOperands, ConvProblem, dtype_name
from fused_resnet.registry import NEEDS_FOLDED_BN, Backend

# csrc/winograd.h: the points, the rows of G they lead to (the last is infinity's), and columns that lie together.
_WINOGRAD_POINTS = (0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))
_WINOGRAD_G = [
    [p**power / math.prod(p - q for q in _WINOGRAD_POINTS if q != p) for power in range(3)] for p in _WINOGRAD_POINTS
] + [[0.0, 0.0, 1.0]]
_WINOGRAD_PANEL = 16
_WINOGRAD_ACTIVATIONS = ("none", "relu", "relu6")


def _winograd_why_not(problem: ConvProblem) -> Optional[str]:
    p = problem
    if p.device != "cpu":
        return f"it runs on the CPU, the tensors are on {p.device}"
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype_name(p.dtype)} is not supported (float32, bfloat16 are)"
    if p.has_bn:
        return NEEDS_FOLDED_BN
    if (p.R, p.S) != (3, 3) or p.stride != (1, 1) or p.dilation != (1, 1) or p.groups != 1:
        return "it computes 3x3 convolutions with stride 1, dilation 1 and one group"
    if p.C % _WINOGRAD_PANEL or p.K % _WINOGRAD_PANEL:
        return f"it needs channels in multiples of {_WINOGRAD_PANEL}, there are {p.C} and {p.K}"
    if p.activation not in _WINOGRAD_ACTIVATIONS:
        return f"its activations are {', '.join(_WINOGRAD_ACTIVATIONS)}, not {p.activation}"
    return extension.load("cpu")


def _winograd_pays(problem: ConvProblem) -> bool:
    """Unless most of its 4x4 output tiles lie outside the output, or too few share four times the weights.

    EPYC Zen 4, 2026-11, times oneDNN's speed on one thread and on two: fp32, 1.4 to 2.8 and 1.1 to 2.6 by this rule,
    1.1 and 0.8 at 4 tiles of 512 channels; bf16, 1.1 to 1.5 and 1.2 to 1.6, 0.5 to 1.05 from 256 channels on.
    """
    p = problem
    channels, tiles = max(p.C, p.K), p.N * -(-p.P // 4) * -(-p.Q // 4)
    if tiles < max(4, channels // 64) or 2 * p.N * p.P * p.Q < 16 * tiles:
        return False
    return p.dtype == torch.float32 or channels <= 128


def _winograd_weight(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    """G w G^T in fp64 as (36, K/16, C, 16): point (i, j), panel of output channels, input channel."""
    G = torch.tensor(_WINOGRAD_G, dtype=torch.float64, device=weight.device)
    points = torch.einsum("ir,kcrs,js->ijck", G, weight.detach().double(), G)
    panels = points.reshape(36, problem.C, problem.K // _WINOGRAD_PANEL, _WINOGRAD_PANEL).transpose(1, 2)
    return panels.to(torch.float32).contiguous()


def winograd_convolution(
    problem: ConvProblem, weight: Tensor, bias: Optional[Tensor], *, into_residual: bool = False
) -> Callable[..., Tensor]:
    """As `onednn_convolution`, with csrc's kernel: bf16 activations are widened, summed in fp32 and rounded once."""
    convolution = torch.ops.fused_resnet.cpu_winograd.default
    padding, activation, shape, dtype = problem.padding, problem.activation, problem.output_shape, problem.dtype
    bias = None if bias is None else bias.float().contiguous()

    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        residual = None if residual is None else channels_last(residual)
        if into_residual and residual is not None:
            out = residual
        else:
            out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        convolution(channels_last(x), weight, bias, residual, padding, activation, out)
        return out

    return run


def _winograd_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    o = operands
    return winograd_convolution(problem, _winograd_weight(problem, o.weight), o.bias)(o.x, o.residual)


WINOGRAD = Backend(
    "winograd",
    _winograd_why_not,
    _winograd_conv_bn_act,
    auto=("cpu",),
    takes_bn=False,
    pack=_winograd_weight,
    bind=winograd_convolution,
    only_packed=True,
    pays=_winograd_pays,
)
