"""Regions of C++ in tests: which micro-kernels run here, and calls with workspaces full of NaN."""

import contextlib
from unittest import mock

import torch

from fused_resnet.kernels import compiled
from fused_resnet.operators import affine
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.regions.blocks import FoldedConv, residual_block


def table():
    """{name: (dtype, how it is taken, why not)} of all micro-kernels."""
    if compiled.load("cpu") is not None:
        return {}
    rows = (line.split("\t") for line in torch.ops.fused_resnet.cpu_region_kernels().splitlines())
    return {name: (getattr(torch, dtype), taken, why) for name, dtype, taken, _, _, why in rows}


def kernels():
    """{name: dtype} of those of floats that run here."""
    return {name: dtype for name, (dtype, _, why) in table().items() if not why and dtype != torch.int8}


def int8_kernels():
    """The names of those of bytes that run here."""
    return [name for name, (dtype, _, why) in table().items() if not why and dtype == torch.int8]


def fastest(dtype):
    """The first kernel that runs here, even if only by its name."""
    return next(name for name, known in kernels().items() if known == dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def call(region, inputs, kernel):
    """The region's outputs; neither its workspace nor its outputs hold numbers before."""
    compiled_region = region.compile()
    workspace = compiled_region.empty_workspace().fill_(0xFF)  # NaN in both dtypes
    empty = lambda *args, **options: torch_empty(*args, **options).fill_(torch.nan)  # noqa: E731
    torch_empty = torch.empty
    with mock.patch.object(torch, "empty", empty):
        return compiled_region(inputs, workspace, kernel)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def folded(conv, bn, dtype):
    """A convolution and its BN as a region takes them."""
    operands = ConvOperands(None, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, conv.bias)
    return FoldedConv(*affine.fold(operands, dtype), conv.stride, conv.padding, conv.dilation)


def add_block(region, x, block):
    """A BasicBlock or Bottleneck as steps of a region."""
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
    convs = [folded(*pair, region.dtype) for pair in pairs]
    projection = None if block.downsample is None else folded(*block.downsample, region.dtype)
    return residual_block(region, x, convs, projection)
