"""Activations with a shared zero halo: rows m = (n * (H + 1) + h) * (W + 1) + w, one of them a pixel's C channels.

Below each image lies a line of zeros, and right of each line a zero pixel. So a 3x3 filter's taps are shifts of rows
(`rows_tma`). A tensor of this layout has two dimensions, (rows, C), and is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_rows(N: int, H: int, W: int) -> int:
    return N * (H + 1) * (W + 1)


def pack(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (rows, C), a copy with the halo."""
    N, C, H, W = x.shape
    rows = x.new_zeros(N, H + 1, W + 1, C)
    rows[:, :H, :W] = x.permute(0, 2, 3, 1)
    return rows.view(-1, C)


def unpack(rows: Tensor, N: int, H: int, W: int) -> Tensor:
    """(rows, C) -> (N, C, H, W) in channels_last, a copy without the halo."""
    images = rows.view(N, H + 1, W + 1, rows.shape[1])[:, :H, :W]
    return images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
