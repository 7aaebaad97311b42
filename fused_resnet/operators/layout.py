"""Memory layouts of 4d tensors."""

from __future__ import annotations

from typing import Any, TypeVar, Union

import torch
from torch import Tensor

from fused_resnet.operators.operands import ChainOperands, ConvOperands, Int8Operands
from fused_resnet.operators.problem import ChainProblem

Operands = TypeVar("Operands", bound=Union[ConvOperands, Int8Operands, ChainOperands])


def empty_output(problem, like: Tensor, channels_last: bool = True) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        problem.output_shape, dtype=problem.output_dtype, device=like.device, memory_format=memory_format
    )


def empty_chain(problem: ChainProblem, like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for y and reduced, the latter without elements where no block follows."""
    y = empty_output(problem, like)
    if not problem.L:
        return y, like.new_empty(0)
    return y, torch.empty(problem.reduced_shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


def all_channels_last(operands: Operands) -> Operands:
    moved: Any = operands.map(lambda tensor: channels_last(tensor) if tensor.dim() == 4 else tensor.contiguous())
    return moved


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels_last memory, with the strides of a new one in dimensions of size 1 too.

    torch takes (N, 1, H, W) and (N, C, 1, 1) for channels_last whatever their strides. But Inductor counts on those of
    the fake tensor, and oneDNN's binding leaves its fused path for others.
    """
    _, C, H, W = tensor.shape
    strides = (C * H * W, 1, C * W, C)
    if tensor.stride() != strides:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def is_nhwc(tensor: Tensor) -> bool:
    """Whether bn_act walks this in NHWC: where its channels are neighbours in memory, or it has a single pixel."""
    _, C, H, W = tensor.shape
    return H * W == 1 or C > 1 and tensor.stride(1) == 1


def densely(tensor: Tensor, in_nhwc: bool) -> Tensor:
    """The tensor in NHWC or in NCHW memory, itself where it lies so."""
    return tensor.contiguous(memory_format=torch.channels_last if in_nhwc else torch.contiguous_format)


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of another one of its shape, itself where it has them."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def nchw(tensor: Tensor) -> Tensor:
    """The tensor in NCHW memory, as `channels_last`."""
    _, C, H, W = tensor.shape
    strides = (C * H * W, H * W, W, 1)
    if tensor.stride() != strides:
        tensor = tensor.contiguous()
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)
