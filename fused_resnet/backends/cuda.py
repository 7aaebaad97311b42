"""Our kernels in CUDA (csrc/cuda)."""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fused_resnet.backends.record import Backend, Configs, why_not_nvidia
from fused_resnet.kernels import compiled, sources
from fused_resnet.machine import devices
from fused_resnet.operators import layout
from fused_resnet.operators.layout import all_channels_last
from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import ConvProblem, Problem


def why_not(problem: ConvProblem) -> Optional[str]:
    reason = why_not_here(problem)
    if reason is not None:
        return reason
    if problem.dtype == torch.float32 and not devices.allows_tf32():
        return "in float32 it multiplies in TF32, which torch.backends.cudnn does not allow"
    return _limits(problem)


@functools.lru_cache(maxsize=1024)  # it is asked at every call
def _limits(problem: ConvProblem) -> Optional[str]:
    """Why csrc's kernel cannot index this problem, or None. Asked of the library itself, which must be loaded.

    It assumes that x and the weight are 16-byte aligned, as tensors are that are not views into the middle of others.
    """
    question = torch.ops.fused_resnet.cuda_conv_why_not.default
    # past tracers, transforms and modes: they would record the question, or refuse its answer
    past_them = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return question.redispatch(past_them, *_sizes(problem), problem.dtype.itemsize) or None


def _sizes(p: ConvProblem) -> tuple:
    """The first arguments of csrc's questions about a convolution: x, weight, stride, padding, dilation, groups."""
    return (p.N, p.C, p.H, p.W), (p.K, p.C // p.groups, p.R, p.S), p.stride, p.padding, p.dilation, p.groups


def why_not_here(problem: Problem) -> Optional[str]:
    """Why none of csrc's CUDA kernels runs here, whatever the operator, or None."""
    reason = why_not_nvidia(problem) or compiled.load("cuda")
    if reason is not None:
        return reason
    if problem.dtype == torch.float64:
        return "float64 is not supported (float32, float16, bfloat16 are)"
    return devices.why_too_old()


class CudaConfig(NamedTuple):
    """How csrc's kernel computes a convolution.

    tile: one of csrc/cuda/sm80/tiles.h's, by index; from 60 on one of sm80/grouped_tiles.h's, from 90 on one of
    sm90/tiles.h's. splits: in how many parts the reduction is summed, before a second kernel adds them up. Tiles from
    60 on sum it in one.
    """

    tile: int
    splits: int


def run(problem: ConvProblem, operands: ConvOperands, config: Optional[CudaConfig] = None) -> Tensor:
    """config: by default the likeliest, which also takes the place of one that needs better aligned operands."""
    p, o = problem, all_channels_last(operands)
    out = layout.empty_output(p, o.x)
    tile, partials = _tile_and_partials(p, o.x, o.weight, out, torch.float32, config)
    torch.ops.fused_resnet.cuda_conv_bn_act.default(
        *o, p.stride, p.padding, p.dilation, p.groups, p.activation, devices.allows_tf32(), tile, partials,
        out,
    )  # fmt: skip
    return out


def run_int8(problem: ConvProblem, operands: Int8Operands, config: Optional[CudaConfig] = None) -> Tensor:
    """As `run`."""
    p, o = problem, all_channels_last(operands)
    out = layout.empty_output(p, o.x)
    tile, partials = _tile_and_partials(p, o.x, o.weight, out, torch.int32, config)
    multiplier, bias, residual_scale, low, high, _ = o.epilogue
    torch.ops.fused_resnet.cuda_conv_int8.default(
        o.x, o.weight, multiplier, bias, o.residual, residual_scale, low, high, p.stride, p.padding, p.dilation,
        p.groups, tile, partials, out,
    )  # fmt: skip
    return out


def _tile_and_partials(
    p: ConvProblem, x: Tensor, weight: Tensor, out: Tensor, dtype: torch.dtype, config: Optional[CudaConfig]
) -> tuple[int, Optional[Tensor]]:
    """The tile, and where it is split memory for the parts' sums, in this dtype."""
    is_aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    tile, splits = _choice(p, config, is_aligned, out.device.index)
    return tile, None if splits == 1 else torch.empty(splits, out.numel(), dtype=dtype, device=out.device)


@functools.lru_cache(maxsize=4096)
def _choice(problem: ConvProblem, config: Optional[CudaConfig], is_aligned: bool, device: int) -> CudaConfig:
    legal = legal_on(problem, is_aligned, device)
    return config if config is not None and config in legal else legal[0]


@functools.lru_cache(maxsize=4096)
def legal_on(problem: ConvProblem, is_aligned: bool, device: int) -> tuple[CudaConfig, ...]:
    """What this GPU can run, the likeliest first: more splits where a small batch would not fill it."""
    flat = torch.ops.fused_resnet.cuda_conv_configs.default(
        *_sizes(problem), problem.dtype.itemsize, is_aligned, device
    )
    return tuple(map(CudaConfig, flat[::2], flat[1::2]))


def legal(problem: ConvProblem) -> Sequence[CudaConfig]:
    return legal_on(problem, True, torch.cuda.current_device())


def worth(problem: ConvProblem) -> Sequence[CudaConfig]:
    """Each tile in one part and in as many as should suit it best; not the default, which is the first of all."""
    default, *others = legal(problem)
    seen, found = {default.tile}, []
    for config in others:
        if config.splits == 1 or config.tile not in seen:
            found.append(config)
        seen.add(config.tile)
    return found


BACKEND = Backend("cuda", why_not, run, sources=sources.CUDA, configs=Configs(worth, legal))
INT8 = Backend("cuda", why_not, run_int8, takes_bn=False, sources=sources.CUDA, configs=Configs(worth, legal))
