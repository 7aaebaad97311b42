"""Whether a NaN outlives its image in cuDNN's fused convolution when a CUDA graph is replayed.

python -m benchmarks.gpu_check.nan_stays

PyTorch hands the uninitialised output to cudnn_convolution_relu as the summand z, times zero (ConvShared.cpp). A graph
keeps its memory, so a library that reads z would add 0 * NaN to every later image. Exit code 1 when one does.
"""

from __future__ import annotations

import sys
from typing import Callable

import torch
from torch import Tensor

from fused_resnet.machine import cuda_graphs


def remaining(x: Tensor, replay: Callable[[], Tensor]) -> int:
    """How many values of a clean image's output are NaN, or differ, after an image with one. replay computes from x."""
    clean = torch.randn_like(x)
    x.copy_(clean)
    expected = replay().clone()
    x.fill_(torch.nan)
    assert replay().isnan().any(), "the NaN must reach the output"
    x.copy_(clean)
    return int((replay() != expected).sum())


def convolution(filter_size: int) -> tuple[Tensor, Callable[[], Tensor]]:
    """(x, a replay of cuDNN's fused convolution of it)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(torch.float16, memory_format=torch.channels_last)

    x, weight = normal(8, 64, 56, 56), normal(64, 64, filter_size, filter_size)
    bias, padding = torch.zeros(64, device="cuda", dtype=x.dtype), (filter_size // 2,) * 2
    return x, cuda_graphs.captured(lambda: torch.cudnn_convolution_relu(x, weight, bias, (1, 1), padding, (1, 1), 1))


def main() -> int:
    counts = {filter_size: remaining(*convolution(filter_size)) for filter_size in (1, 3)}
    for filter_size, count in counts.items():
        print(f"cudnn_convolution_relu {filter_size}x{filter_size}: {count} wrong values after images of NaN")
    return 1 if any(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
