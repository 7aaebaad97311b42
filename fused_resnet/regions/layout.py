"""How the blocked CPU kernels want weights and biases: csrc/cpu/blocked/layout.h says why."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.operators.quantized import Epilogue

PANEL, HALF = 32, 16  # output channels of a panel, and of its halves
PIXEL_BYTES = 64  # of a block
MOST_TAPS = 1024  # along a side of a window (csrc/cpu/blocked/program.cpp)
DTYPES = (torch.float32, torch.bfloat16)


def lanes(dtype: torch.dtype) -> int:
    """Channels in a block."""
    return PIXEL_BYTES // dtype.itemsize


def blocks(channels: int, dtype: torch.dtype) -> int:
    """Blocks that are kept for this many channels: those of whole panels."""
    unit = max(PANEL, lanes(dtype))
    return -(-channels // unit) * (unit // lanes(dtype))


def outside(dtype: torch.dtype) -> torch.dtype:
    """What the outputs of a region of this dtype are in: those of int8 are written as fp32."""
    return torch.float32 if dtype == torch.int8 else dtype


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, C, R, S) as (panels, k steps, 2 halves, 16 rows, values of a row). Missing channels are zero.

    A row has one input channel of 16 outputs in fp32, and a pair of input channels of each of them in bf16. In int8 it
    has four. Raises TypeError where one of int8 and another dtype meet.
    """
    if (weight.dtype == torch.int8) != (dtype == torch.int8):
        raise TypeError(f"pack_weight: a weight of {weight.dtype} is not packed as {dtype}")
    K, C, R, S = weight.shape
    pair = lanes(dtype) // HALF
    padded = F.pad(weight.detach().to(dtype), (0, 0, 0, 0, 0, -C % lanes(dtype), 0, -K % PANEL))
    parts = padded.view(-1, 2, HALF, padded.shape[1] // lanes(dtype), HALF, pair, R, S)
    # panel, half, output, block, row, of a pair, r, s -> panel, block, r, s, half, row, output, of a pair
    steps = parts.permute(0, 3, 6, 7, 1, 4, 2, 5)
    return steps.reshape(steps.shape[0], -1, 2, HALF, lanes(dtype))


def pack_bias(bias: Tensor) -> Tensor:
    """In fp32, with zeros up to a whole panel."""
    return F.pad(bias.detach().float(), (0, -len(bias) % PANEL)).contiguous()


def pack_constants(epilogue: Epilogue, packed: Tensor) -> Tensor:
    """(panels, 3, 32) in fp32: M, B, and -128 times the sum of each output's weights, which fp32 holds exactly.

    With the last, sums of signed bytes are those of the same bytes taken as unsigned and 128 larger.
    """
    offsets = -128 * packed.view(*packed.shape[:4], HALF, 4).sum((1, 3, 5)).flatten()
    vectors = (pack_bias(epilogue.multiplier), pack_bias(epilogue.bias), offsets.float())
    return torch.stack([vector.view(-1, PANEL) for vector in vectors], 1)
