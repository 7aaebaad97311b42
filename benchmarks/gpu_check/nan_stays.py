"""Whether a NaN outlives its image when a CUDA graph is replayed: of cuDNN's fused convolution, and of frozen plans.

python -m benchmarks.gpu_check.nan_stays

PyTorch hands the uninitialised output to cudnn_convolution_relu as the summand z, times zero (ConvShared.cpp). A graph
keeps its memory, so a library that reads z would add 0 * NaN to every later image. Exit code 1 when one does.
"""

from __future__ import annotations

import sys
from typing import Callable

import torch
from torch import Tensor

import fused_resnet
from fused_resnet import models
from fused_resnet.machine import cuda_graphs

PLANS = ("auto", "cuda", "triton")  # unmeasured, "auto" takes cuDNN where that can


def remaining(x: Tensor, replay: Callable[[], Tensor]) -> int:
    """How many values of a clean image's output differ after an image that is NaN, or infinite in a channel.

    A ReLU may make zeros of NaN, so infinities are what surely stays in memory. replay computes from x.
    """
    clean, counts = torch.randn_like(x), []
    x.copy_(clean)
    expected = replay().clone()
    for value, where in ((torch.nan, x), (torch.inf, x[:, :1])):
        x.copy_(clean)
        where.fill_(value)
        is_reached = not bool(replay().isfinite().all())
        x.copy_(clean)
        counts.append((int((replay() != expected).sum()), is_reached))
    assert any(is_reached for _, is_reached in counts), "neither reached the output"
    return max(count for count, _ in counts)


def convolution(filter_size: int) -> tuple[Tensor, Callable[[], Tensor]]:
    """(x, a replay of cuDNN's fused convolution of it)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(torch.float16, memory_format=torch.channels_last)

    x, weight = normal(8, 64, 56, 56), normal(64, 64, filter_size, filter_size)
    bias, padding = torch.zeros(64, device="cuda", dtype=x.dtype), (filter_size // 2,) * 2
    return x, cuda_graphs.captured(lambda: torch.cudnn_convolution_relu(x, weight, bias, (1, 1), padding, (1, 1), 1))


def plan(backend: str) -> tuple[Tensor, Callable[[], Tensor]]:
    """(x, a call of a frozen ResNet-18, whose plan is captured)."""
    x = torch.randn(8, 3, 224, 224, device="cuda")
    frozen = fused_resnet.freeze(models.resnet18().eval().cuda(), x, dtype=torch.float16, backend=backend, tune=False)
    return x, lambda: frozen(x)


def main() -> int:
    cases = {f"cudnn_convolution_relu {size}x{size}": (convolution, size) for size in (1, 3)}
    cases.update({f"a frozen plan by {backend}": (plan, backend) for backend in PLANS})
    outcomes = []
    for name, (make, argument) in cases.items():
        try:
            outcomes.append(remaining(*make(argument)))
            print(f"{name}: {outcomes[-1]} wrong values after images of NaN", flush=True)
        except Exception as error:  # the next one does not depend on it
            outcomes.append(1)
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    print(f"{outcomes.count(0)} of {len(outcomes)} forget a NaN")
    return 1 if any(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
