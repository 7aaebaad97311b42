"""Regions of C++ in tests: which micro-kernels run here, and calls with workspaces full of NaN."""

import math
from unittest import mock

import torch

from fused_resnet.kernels import compiled
from fused_resnet.operators import affine
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.regions.blocks import FoldedConv, residual_block
from fused_resnet.regions.fragment import CopyStep


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


def draw_groups(draw, C, K):
    """A number of groups that divides both, often 1."""
    common = math.gcd(C, K)
    divisors = [count for count in range(1, common + 1) if common % count == 0]
    return draw.choice(divisors) if draw.random() < 0.3 else 1


def draw_copies(draw, x, known):
    """A step that copies map x and others of its size, which `known` has as (value, shape); and the shape it gives."""
    shapes = dict(known)
    N, _, H, W = shapes[x]
    alike = [value for value, shape in known if shape[2:] == (H, W)]
    xs = (x, *(draw.choice(alike) for _ in range(draw.choice((0, 0, 1, 2)))))
    before, after = draw.choice(((0, 0), (0, 0), (3, 5), (0, 32), (32, 1)))
    stride, factor = draw.choice(((1, 1), (2, 2), (2, 3))), draw.choice(((1, 1), (1, 1), (2, 2), (1, 3)))
    P, Q = (-(-size // step) * times for size, step, times in zip((H, W), stride, factor))
    shape = (N, before + sum(shapes[value][1] for value in xs) + after, P, Q)
    return CopyStep(xs, before, after, stride, factor), shape


def copied(step, maps):
    """What a `CopyStep` gives, pixel by pixel."""
    (N, _, H, W), C = maps[0].shape, sum(y.shape[1] for y in maps)
    rows = [h for h in range(0, H, step.stride[0]) for _ in range(step.factor[0])]
    columns = [w for w in range(0, W, step.stride[1]) for _ in range(step.factor[1])]
    out = maps[0].new_zeros(N, step.before + C + step.after, len(rows), len(columns))
    out[:, step.before : step.before + C] = torch.cat(maps, 1)[:, :, rows][..., columns]
    return out


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
