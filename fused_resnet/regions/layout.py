"""How the blocked CPU kernels want weights and biases: csrc/cpu/blocked/layout.h says why."""

from __future__ import annotations

from typing import NamedTuple

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
    """What the outputs of a region of this dtype are in: those of int8 and e4m3 are written as fp32."""
    return torch.float32 if dtype.itemsize == 1 else dtype


class PanelBlocks(NamedTuple):
    """Which blocks of its input each panel of a convolution reads: `each` from first[panel] on."""

    first: list[int]
    each: int


def blocks_of_panels(K: int, C: int, groups: int, dtype: torch.dtype) -> PanelBlocks:
    """Those in which the groups of its outputs lie. C, K: channels of all groups.

    As csrc/cpu/blocked/program.cpp has it: a panel of fewer blocks than others reads some that its groups have not.
    """
    inputs, outputs, width = C // groups, K // groups, lanes(dtype)
    begins = [panel // outputs * inputs // width for panel in range(0, K, PANEL)]
    ends = [-(-(min(panel + PANEL - 1, K - 1) // outputs + 1) * inputs // width) for panel in range(0, K, PANEL)]
    count = max(end - begin for begin, end in zip(begins, ends))
    return PanelBlocks([min(begin, -(-C // width) - count) for begin in begins], count)


def spread_groups(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(K, C / groups, R, S) as (K, channels of the blocks that a panel reads, R, S), zero where the groups differ."""
    K, inputs = weight.shape[:2]
    first, count = blocks_of_panels(K, inputs * groups, groups, dtype)
    output = torch.arange(K)
    begin = output // (K // groups) * inputs - torch.tensor(first)[output // PANEL] * lanes(dtype)
    place = (begin[:, None] + torch.arange(inputs))[:, :, None, None].expand_as(weight)
    return weight.new_zeros(K, count * lanes(dtype), *weight.shape[2:]).scatter_(1, place, weight)


def pack_weight(weight: Tensor, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """(K, C, R, S) as (panels, k steps, 2 halves, 16 rows, values of a row). Missing channels are zero.

    C: the channels of a group. Of groups a panel has the blocks in which those of its outputs lie.

    A row has one input channel of 16 outputs in fp32, and a pair of input channels of each of them in bf16. In int8 it
    has four. Raises TypeError where one of int8 and another dtype meet.
    """
    if (weight.dtype == torch.int8) != (dtype == torch.int8):
        raise TypeError(f"pack_weight: a weight of {weight.dtype} is not packed as {dtype}")
    weight = weight.detach().to(dtype)
    weight = spread_groups(weight, groups, dtype) if groups > 1 else weight
    K, C, R, S = weight.shape
    pair = lanes(dtype) // HALF
    padded = F.pad(weight, (0, 0, 0, 0, 0, -C % lanes(dtype), 0, -K % PANEL))
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
