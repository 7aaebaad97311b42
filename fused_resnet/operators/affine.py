"""BN and bias as one affine map per output channel, and convolutions folded with it."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.operators.operands import ConvOperands


def scale_and_shift(operands: ConvOperands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """BN and bias as one affine map per output channel: two (K,) vectors of `dtype`."""
    vectors = {
        name: None if vector is None else vector.to(dtype)
        for name, vector in (*operands.bn_vectors.items(), ("bias", operands.bias))
    }
    scale = torch.ones(operands.weight.shape[0], dtype=dtype, device=operands.weight.device)
    shift = torch.zeros_like(scale)
    if vectors["bn_var"] is not None:
        scale = scale / torch.sqrt(vectors["bn_var"] + operands.eps)
    if vectors["bn_weight"] is not None:
        scale = scale * vectors["bn_weight"]
    if vectors["bias"] is not None:
        shift = shift + vectors["bias"]
    if vectors["bn_mean"] is not None:
        shift = shift - vectors["bn_mean"]
    shift = shift * scale
    if vectors["bn_bias"] is not None:
        shift = shift + vectors["bn_bias"]
    return scale, shift


def fold(operands: ConvOperands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight * scale, shift), computed in fp64 and rounded to `dtype` once; the weight in channels_last."""
    with torch.no_grad():
        scale, shift = scale_and_shift(operands, torch.float64)
        weight = operands.weight.to(torch.float64, copy=True, memory_format=torch.channels_last)
        weight *= scale.view(-1, 1, 1, 1)
    return weight.to(dtype, memory_format=torch.channels_last), shift.to(dtype)
