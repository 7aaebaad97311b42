"""The weight of a 3x3 convolution as csrc/cpu/winograd.h reads it, for Winograd's F(4x4, 3x3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PANEL = 16  # output channels that lie together
# csrc/cpu/winograd.h: the points, the rows of G they lead to (the last is infinity's).
_POINTS = (0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))
_G = [[p**power / math.prod(p - q for q in _POINTS if q != p) for power in range(3)] for p in _POINTS] + [
    [0.0, 0.0, 1.0]
]


def points(weight: Tensor) -> Tensor:
    """G w G^T in fp64 of a weight (K, C, 3, 3), as (36, K/16, C, 16) in fp32: point (i, j), panel of output channels,
    input channel. K is a multiple of 16.

    A panel at a time, whose fp64 numbers stay in the caches: 59 ms for 512 channels, 286 for all panels at once (EPYC,
    one thread, 2026-11).
    """
    K, C = weight.shape[:2]
    G = torch.tensor(_G, dtype=torch.float64, device=weight.device)
    products = torch.kron(G, G)  # of the nine taps
    packed = weight.new_empty((36, K // PANEL, C, PANEL), dtype=torch.float32)
    for panel, taps in zip(packed.unbind(1), weight.detach().split(PANEL)):
        taps = taps.permute(2, 3, 1, 0).to(torch.float64).reshape(9, -1)
        panel.copy_((products @ taps).view_as(panel))
    return packed
