"""Operands of a convolution, drawn by seed, for whoever runs one on the emulator."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


def operands_of(problem: ConvProblem, seed: int = 0) -> ConvOperands:
    """Values of the size that networks have; channels_last."""
    p, generator = problem, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image(*shape: int) -> Tensor:
        return draw(*shape).to(p.dtype).contiguous(memory_format=torch.channels_last)

    gamma, beta, mean, var = (draw(p.K), draw(p.K), draw(p.K), draw(p.K).abs() + 0.5) if p.has_bn else (None,) * 4
    weight = draw(p.K, p.C // p.groups, p.R, p.S) * p.reduction**-0.5
    return ConvOperands(
        image(p.N, p.C, p.H, p.W), weight.to(p.dtype).contiguous(memory_format=torch.channels_last),
        gamma, beta, mean, var, 1e-5,
        draw(p.K).to(p.dtype) if p.has_bias else None, image(p.N, p.K, p.P, p.Q) if p.has_residual else None,
    )  # fmt: skip
