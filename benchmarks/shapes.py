"""The shapes that are timed, read off the models themselves: no hand-written table that could go stale.

The tests take the same lists, so what is timed is what is proved right.
"""

from __future__ import annotations

import functools

import torch

from fused_resnet import measuring, models

STAGED_MODELS = ("resnet18", "resnet50")


@functools.lru_cache(maxsize=None)
def convs(model: str, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """The distinct fused convolutions of a model with their counts: 27 in ResNet-50, of 23 convolution shapes.

    The last 1x1 of each stage's first block stands apart from the others of its shape: the projection takes the sum.
    """
    network = models.create(model)
    return tuple(measuring.convs_of(network, models.input_shape(model), batch, dtype, device))


@functools.lru_cache(maxsize=None)
def blocks(model: str):
    """(name, block in eval mode with calibrated BN, its input's (C, H, W)): the last residual block of each stage."""
    shape = models.input_shape(model)
    network = measuring.calibrated(models.create(model), shape)
    return tuple(measuring.blocks_of(network, shape))
