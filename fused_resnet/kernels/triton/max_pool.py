"""act(max_pool(y) + bias) without indices: one pass over memory behind a convolution that left both to it.

A sum with a constant, its rounding and these activations are monotone, so this is max_pool(act(y + bias)) to the last
bit, for a finite bias. That takes a bias and an activation from every pixel of the window to one of the output.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.runtime import jit, tl
from fused_resnet.operators.problem import MaxPoolProblem

ACTIVATIONS = ("none", "relu", "relu6")  # the monotone ones
BLOCK = 1024  # 16 bytes per thread and load in 16-bit types with 4 warps
MOST_CHANNELS = 64  # of a program: whole lines of the cache in 16-bit types
NUM_WARPS = 4
_LIMIT = 2**31


@jit
def _max_pool_kernel(
    x_ptr, bias_ptr, out_ptr, M, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # row m = (n, p, q), channel c, fastest
    num_c = tl.cdiv(C, BLOCK_C)
    first_row = tl.program_id(0) // num_c * BLOCK_M
    channels = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = first_row + tl.arange(0, BLOCK_M)
    line = rows // Q
    n = line // P
    h0 = (line - n * P) * STRIDE_H - PADDING_H
    w0 = (rows - line * Q) * STRIDE_W - PADDING_W
    image = x_ptr + (n.to(tl.int64) * H * W * C)[:, None]  # what lies inside an image is a 32-bit offset
    live = (rows < M)[:, None] & (channels < C)[None, :]
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    for tap in range(R * S):
        h, w = h0 + tap // S, w0 + tap % S
        is_inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        offsets = ((h * W + w) * C)[:, None] + channels[None, :]
        value = tl.load(image + offsets, mask=live & is_inside[:, None], other=float("-inf"))
        best = tl.maximum(best, value.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    if bias_ptr is not None:
        best += tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        best = tl.maximum(best, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        best = tl.minimum(best, 6.0, propagate_nan=tl.PropagateNan.ALL)
    out = out_ptr + first_row.to(tl.int64) * C
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + channels[None, :]
    tl.store(out + offsets, best.to(out_ptr.dtype.element_ty), mask=live)


def why_not(problem: MaxPoolProblem) -> Optional[str]:
    """Why this machine cannot run the problem, or None."""
    p = problem
    if p.activation not in ACTIVATIONS:
        return f"{p.activation} is not monotone ({', '.join(ACTIVATIONS)} are)"
    N, C, P, Q = p.output_shape
    if max(N * P * Q + BLOCK, (p.H + p.R) * (p.W + p.S) * C) >= _LIMIT:
        return f"images of {p.H}x{p.W} pixels and {C} channels, or {N * P * Q} outputs, need 64-bit offsets"
    return runtime.why_not(p.device, p.dtype)


def launch(problem: MaxPoolProblem, x: Tensor, bias: Optional[Tensor], out: Tensor) -> None:
    """out = act(max_pool(x) + bias), the sum rounded to out's dtype once. What lies in the padding is -infinity.

    x and out: NHWC in memory, dense; the caller has seen to it. bias: contiguous, finite, in x's dtype. NaN stays NaN.
    The sign of a zero may differ from that of ATen's passes.
    """
    if out.numel():
        runtime.start(_max_pool_kernel, *arguments_of(problem, x, bias, out), like=x)


def arguments_of(
    problem: MaxPoolProblem, x: Tensor, bias: Optional[Tensor], out: Tensor
) -> tuple[int, tuple, dict[str, Any]]:
    """How many programs to start, their arguments, and the options."""
    p = problem
    N, C, P, Q = p.output_shape
    block_c = min(MOST_CHANNELS, 1 << max(C - 1, 0).bit_length())
    block_m = BLOCK // block_c
    options = dict(
        R=p.R, S=p.S, STRIDE_H=p.stride[0], STRIDE_W=p.stride[1], PADDING_H=p.padding[0], PADDING_W=p.padding[1],
        ACTIVATION=p.activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    num_programs = -(-N * P * Q // block_m) * -(-C // block_c)
    return num_programs, (x, bias, out, N * P * Q, C, p.H, p.W, P, Q), options
