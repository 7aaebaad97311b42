"""Residual blocks as steps of a region: the sum in place, and a projection within the last convolution's reduction."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fused_resnet.regions.program import Map, Pair, Region, Segment


class FoldedConv(NamedTuple):
    """A convolution with its BN folded in."""

    weight: Tensor
    bias: Optional[Tensor]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def at(self, x: Map) -> Segment:
        return Segment(x, self.weight, self.stride, self.padding, self.dilation)


def residual_block(
    region: Region, x: Map, convs: Sequence[FoldedConv], projection: Optional[FoldedConv], activation: str = "relu"
) -> Map:
    """act(convs(x) + shortcut(x)), with the activation between the convolutions, too.

    Without a projection the result lies where x was: nothing else may read x later. With one, both are one convolution
    over the channels of two maps, whose biases are added beforehand.
    """
    y = x
    for conv in convs[:-1]:
        y = region.convolve([conv.at(y)], conv.bias, activation=activation)
    last = convs[-1]
    if projection is None:
        return region.convolve([last.at(y)], last.bias, activation=activation, residual=x, in_place=True)
    biases = [conv.bias for conv in (last, projection) if conv.bias is not None]
    bias = torch.stack([bias.float() for bias in biases]).sum(0) if biases else None
    return region.convolve([last.at(y), projection.at(x)], bias, activation=activation)
