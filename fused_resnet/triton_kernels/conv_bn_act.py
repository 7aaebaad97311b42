"""act(scale * conv(x, w) + shift + residual), one kernel, BN live in the fp32 epilogue.

    scale = bn_weight / sqrt(bn_var + eps),  shift = (bias - bn_mean) * scale + bn_bias

Implicit GEMM over channels_last memory: row m = (n, p, q), column k; reduction (r, s, c), c fastest. A None vector
is a compile-time constant and costs nothing.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from fused_resnet.problem import ConvOperands, ConvProblem
from fused_resnet.triton_kernels import runtime
from fused_resnet.triton_kernels.conv_configs import TritonConfig, configs, default_config, is_gemm, num_programs
from fused_resnet.triton_kernels.runtime import jit, tl

# Row numbers are 32-bit, since dividing them is the slow part, and so are offsets within a tile; offsets of tiles and
# of whole tensors are 64-bit.
_MAX_ROWS = 2**31 - 2**10
_MAX_CHANNELS = 2**22

__all__ = ["TritonConfig", "allows_tf32", "configs", "default_config", "launch", "prepare", "why_not"]


@jit
def _tile(num_m, num_n, GROUP_M: tl.constexpr):
    """Which tile this program computes: GROUP_M tiles of rows share their weights in L2 before the next ones come."""
    program = tl.program_id(0)
    group_size = GROUP_M * num_n
    first_m = program // group_size * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + program % group_size % height, program % group_size // height


@jit
def _epilogue(
    acc, first_row, local_rows, channels, live_rows, live_channels,
    bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps, bias_ptr, residual_ptr, out_ptr, K,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One vector at a time, and not as acc * scale + shift: where a thread holds whole rows of the tile (sm_100) each
    # live vector costs it BLOCK_N registers. Subtracting the mean before scaling also loses less to cancellation.
    y = acc
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask=live_channels, other=0.0).to(tl.float32)[None, :]
    if bn_mean_ptr is not None:
        y -= tl.load(bn_mean_ptr + channels, mask=live_channels, other=0.0).to(tl.float32)[None, :]
    if bn_var_ptr is not None:
        variance = tl.load(bn_var_ptr + channels, mask=live_channels, other=1.0).to(tl.float32)
        y *= tl.rsqrt(variance + tl.cast(eps, tl.float32))[None, :]
    if bn_weight_ptr is not None:
        y *= tl.load(bn_weight_ptr + channels, mask=live_channels, other=0.0).to(tl.float32)[None, :]
    if bn_bias_ptr is not None:
        y += tl.load(bn_bias_ptr + channels, mask=live_channels, other=0.0).to(tl.float32)[None, :]

    # the tile's place is a 64-bit scalar, the places within it are 32-bit: fewer registers
    tile = first_row.to(tl.int64) * K
    offsets = local_rows[:, None] * K + channels[None, :]
    stored = live_rows[:, None] & live_channels[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + tile + offsets, mask=stored, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + tile + offsets, y.to(out_ptr.dtype.element_ty), mask=stored)


@jit
def _pointwise_bn_act_kernel(
    x_ptr, weight_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps, bias_ptr, residual_ptr, out_ptr,
    M, K, C,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, WHOLE_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m = (n, h, w), column k; reduction c. WHOLE_STEPS: BLOCK_K divides C
    tile_m, tile_n = _tile(tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    first_row = tile_m * BLOCK_M
    local_rows = tl.arange(0, BLOCK_M)
    rows = first_row + local_rows
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    live_rows, live_channels = rows < M, channels < K
    x_tile = x_ptr + first_row.to(tl.int64) * C
    weight_tile = weight_ptr + (tile_n * BLOCK_N).to(tl.int64) * C
    x_offsets = local_rows[:, None] * C + steps[None, :]
    weight_offsets = tl.arange(0, BLOCK_N)[None, :] * C + steps[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c in range(0, C, BLOCK_K):
        if WHOLE_STEPS:
            x = tl.load(x_tile + c + x_offsets, mask=live_rows[:, None], other=0.0)
            weight = tl.load(weight_tile + c + weight_offsets, mask=live_channels[None, :], other=0.0)
        else:
            live_steps = c + steps < C
            x = tl.load(x_tile + c + x_offsets, mask=live_rows[:, None] & live_steps[None, :], other=0.0)
            live_weights = live_channels[None, :] & live_steps[:, None]
            weight = tl.load(weight_tile + c + weight_offsets, mask=live_weights, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)

    _epilogue(
        acc, first_row, local_rows, channels, live_rows, live_channels,
        bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps, bias_ptr, residual_ptr, out_ptr, K,
        ACTIVATION, BLOCK_N,
    )  # fmt: skip


@jit
def _conv_bn_act_kernel(
    x_ptr, weight_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps, bias_ptr, residual_ptr, out_ptr,
    M, K, C, H, W, P, Q, S, group_K, group_C, reduction,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, WHOLE_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m = (n, p, q), column k; reduction (r, s, c), c fastest. WHOLE_STEPS: BLOCK_K divides C/groups, so that
    # each step of the loop lies within one filter tap (r, s)
    tiles_per_group = tl.cdiv(group_K, BLOCK_N)
    tile_m, tile_n = _tile(tl.cdiv(M, BLOCK_M), K // group_K * tiles_per_group, GROUP_M)
    group = tile_n // tiles_per_group
    first_row = tile_m * BLOCK_M
    local_rows = tl.arange(0, BLOCK_M)
    rows = first_row + local_rows
    in_group = tile_n % tiles_per_group * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = group * group_K + in_group
    steps = tl.arange(0, BLOCK_K)
    live_rows, live_channels = rows < M, in_group < group_K

    image_row = rows // Q
    image = image_row // P
    h0 = (image_row - image * P) * stride_h - pad_h
    w0 = (rows - image_row * Q) * stride_w - pad_w
    x_rows = x_ptr + ((image.to(tl.int64) * H + h0) * W + w0) * C + group * group_C
    weight_rows = weight_ptr + channels.to(tl.int64) * reduction

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    r, s, c = 0, 0, 0
    for k in range(0, reduction, BLOCK_K):
        if WHOLE_STEPS:
            h, w = h0 + r * dilation_h, w0 + s * dilation_w
            inside = live_rows & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            tap = (tl.cast(r * dilation_h, tl.int64) * W + s * dilation_w) * C + c
            x = tl.load(x_rows[:, None] + (tap + steps)[None, :], mask=inside[:, None], other=0.0)
            weight = tl.load(weight_rows[None, :] + (k + steps)[:, None], mask=live_channels[None, :], other=0.0)
            # carried along rather than divided out of k, so that the loop has no divisions
            c += BLOCK_K
            s = tl.where(c == group_C, s + 1, s)
            c = tl.where(c == group_C, 0, c)
            r = tl.where(s == S, r + 1, r)
            s = tl.where(s == S, 0, s)
        else:
            live_steps = k + steps < reduction
            tap_index = (k + steps) // group_C
            tap_r, tap_s = tap_index // S, tap_index % S
            h = h0[:, None] + (tap_r * dilation_h)[None, :]
            w = w0[:, None] + (tap_s * dilation_w)[None, :]
            inside = live_rows[:, None] & live_steps[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            tap = ((tap_r * dilation_h).to(tl.int64) * W + tap_s * dilation_w) * C + (k + steps) % group_C
            x = tl.load(x_rows[:, None] + tap[None, :], mask=inside, other=0.0)
            live_weights = live_channels[None, :] & live_steps[:, None]
            weight = tl.load(weight_rows[None, :] + (k + steps)[:, None], mask=live_weights, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)

    _epilogue(
        acc, first_row, local_rows, channels, live_rows, live_channels,
        bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps, bias_ptr, residual_ptr, out_ptr, K,
        ACTIVATION, BLOCK_N,
    )  # fmt: skip


def why_not(problem: ConvProblem) -> Optional[str]:
    """Why this machine cannot run the problem, or None."""
    rows, channels = problem.N * problem.P * problem.Q, max(problem.C, problem.K)
    if rows > _MAX_ROWS:
        return f"{rows} output pixels are too many (at most {_MAX_ROWS})"
    if channels > _MAX_CHANNELS:
        return f"{channels} channels are too many (at most {_MAX_CHANNELS})"
    return runtime.why_not(problem.device, problem.dtype)


def launch(problem: ConvProblem, operands: ConvOperands, out: Tensor, config: Optional[TritonConfig] = None) -> None:
    """out = act(scale * conv(x, w) + shift + residual), accumulated in fp32; NaN stays NaN.

    x, residual and out are NHWC, the weight KRSC in memory, all dense, and the vectors are contiguous: the caller has
    seen to it. Strides are not read, since those of dimensions of size 1 may be anything. In fp32 the products are
    TF32 where torch's own convolution would use it (`allows_tf32`), else fp32.
    """
    if out.numel():
        prepared = prepare(problem, operands, out, config or default_config(problem))
        runtime.start(*prepared, like=out)


def prepare(
    problem: ConvProblem, operands: ConvOperands, out: Any, config: TritonConfig
) -> tuple[Any, int, tuple, dict]:
    """What `launch` starts: the kernel, how many programs, the arguments in order, constants and compiler options."""
    p, o = problem, operands
    pointers = (
        o.x, o.weight, o.bn_weight, o.bn_bias, o.bn_mean, o.bn_var, float(o.eps), o.bias, o.residual, out
    )  # fmt: skip
    sizes: tuple[int, ...] = (p.N * p.P * p.Q, p.K, p.C)
    options = dict(
        config._asdict(),
        ACTIVATION=p.activation,
        INPUT_PRECISION="tf32" if p.dtype == torch.float32 and allows_tf32() else "ieee",
        WHOLE_STEPS=p.C // p.groups % config.BLOCK_K == 0,
    )
    if is_gemm(problem):
        return _pointwise_bn_act_kernel, num_programs(p, config), (*pointers, *sizes), options
    window = (*p.stride, *p.padding, *p.dilation)
    sizes += (p.H, p.W, p.P, p.Q, p.S, p.K // p.groups, p.C // p.groups, p.reduction)
    return _conv_bn_act_kernel, num_programs(p, config), (*pointers, *sizes, *window), options


def allows_tf32() -> bool:
    """Whether torch's own fp32 convolutions may use TF32 on CUDA. By torch's default they may.

    Asked of `torch.backends.cudnn.conv.fp32_precision`, since `allow_tf32` raises after that one has been set.
    """
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
