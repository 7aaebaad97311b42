"""Operands of a convolution, drawn by seed, for whoever runs one on the emulator."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import BYTE_DTYPES, FLOAT8, ConvProblem
from fused_resnet.operators.quantized import LARGEST_FLOAT8, Epilogue


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


def int8_operands_of(problem: ConvProblem, seed: int = 0) -> Int8Operands:
    """Bytes of all values, and constants by which results fill the output's bytes; channels_last. Or e4m3 throughout,
    as a network's values are kept in it."""
    if problem.dtype == FLOAT8:
        return _float8_operands_of(problem, seed)
    p, generator = problem, torch.Generator().manual_seed(seed)

    def image(dtype: torch.dtype, *shape: int) -> Tensor:
        least, most = (0, 255) if dtype == torch.uint8 else (-128, 127)
        drawn = torch.randint(least, most + 1, shape, generator=generator)
        return drawn.to(dtype).contiguous(memory_format=torch.channels_last)

    x, weight = image(p.dtype, p.N, p.C, p.H, p.W), image(torch.int8, p.K, p.C // p.groups, p.R, p.S).clamp(min=-127)
    spread = (147 if p.dtype == torch.uint8 else 74) * 74 * p.reduction**0.5  # of a sum
    multiplier = (torch.rand(p.K, generator=generator) + 0.5) * 60 / spread
    is_signed = p.activation == "none"
    low, high = (-128.0, 127.0) if is_signed else (0.0, 200.4 if p.activation == "relu6" else 255.0)
    bias = torch.randn(p.K, generator=generator) * 30 + (0 if is_signed else 60)
    epilogue = Epilogue(multiplier, bias, 0.37 if p.has_residual else 0.0, low, high, p.output_dtype)
    residual = image(BYTE_DTYPES[seed % 2], *p.output_shape) if p.has_residual else None
    return Int8Operands(x, weight, epilogue, residual)


def _float8_operands_of(problem: ConvProblem, seed: int) -> Int8Operands:
    p, generator = problem, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        """Normal values of which the largest are at the limit."""
        values = torch.randn(shape, generator=generator) * (LARGEST_FLOAT8 / 4)
        return values.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8).contiguous(memory_format=torch.channels_last)

    x, weight = draw(p.N, p.C, p.H, p.W), draw(p.K, p.C // p.groups, p.R, p.S)
    spread = (LARGEST_FLOAT8 / 4) ** 2 * p.reduction**0.5  # of a sum
    multiplier = (torch.rand(p.K, generator=generator) + 0.5) * 110 / spread
    low = -LARGEST_FLOAT8 if p.activation == "none" else 0.0
    high = 200.4 if p.activation == "relu6" else LARGEST_FLOAT8
    bias = torch.randn(p.K, generator=generator) * 40
    epilogue = Epilogue(multiplier, bias, 0.37 if p.has_residual else 0.0, low, high, FLOAT8)
    return Int8Operands(x, weight, epilogue, draw(*p.output_shape) if p.has_residual else None)
