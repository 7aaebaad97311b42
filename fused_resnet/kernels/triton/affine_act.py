"""y = act(scale * y + shift + residual) in place: what follows a convolution that a library computed, in one pass.

scale and shift are a convolution's (`conv.epilogue`), read live from BN's vectors in fp32. The result is rounded once.
"""

from __future__ import annotations

from torch import Tensor

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv.epilogue import Epilogue, activated, normalised
from fused_resnet.kernels.triton.runtime import jit, tl, triton
from fused_resnet.operators.operands import ConvOperands

TILE = 4096  # elements of a program: in 16-bit types four loads of 16 bytes for each thread and operand
NUM_WARPS = 4


@jit
def _affine_act_kernel(
    epilogue, M, COLUMNS, K,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # y is a dense matrix: "NHWC" row m = (n, p, q), column k; "NCHW" row m = (n, k), column (p, q)
    num_n = tl.cdiv(COLUMNS, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    first_row = program // num_n * BLOCK_M
    columns = (program % num_n * BLOCK_N).to(tl.int32) + tl.arange(0, BLOCK_N)
    live_columns = columns < COLUMNS
    places = first_row + tl.arange(0, BLOCK_M)
    live = (places < M)[:, None] & live_columns[None, :]
    offsets = places[:, None] * COLUMNS + columns[None, :]

    y = tl.load(epilogue.out + offsets, mask=live, other=0.0).to(tl.float32)
    if LAYOUT == "NHWC":
        y = normalised(y, columns, live_columns, epilogue, AXIS=0)
    else:
        channels = ((first_row % K).to(tl.int32) + tl.arange(0, BLOCK_M)) % K
        y = normalised(y, channels, places < M, epilogue, AXIS=1)
    if epilogue.residual is not None:
        y += tl.load(epilogue.residual + offsets, mask=live, other=0.0).to(tl.float32)
    y = activated(y, ACTIVATION)
    tl.store(epilogue.out + offsets, y.to(epilogue.out.dtype.element_ty), mask=live)


def arguments(y: Tensor, o: ConvOperands, activation: str) -> tuple[int, tuple, dict]:
    """How many programs to start, their arguments, and the options."""
    N, K, P, Q = y.shape
    layout = "NHWC" if y.stride() == (K * P * Q, 1, K * Q, K) else "NCHW"
    M, columns = (N * P * Q, K) if layout == "NHWC" else (N * K, P * Q)
    # rows of pixels are as long as they can be; of channels each program reads the vectors, so it takes more rows
    most = 128 if layout == "NHWC" else 1024
    block_n = min(max(triton.next_power_of_2(columns), 16), most)
    block_m = TILE // block_n
    epilogue = Epilogue(o.bn_weight, o.bn_bias, o.bn_mean, o.bn_var, o.eps, o.bias, o.residual, y, None)
    options = dict(ACTIVATION=activation, LAYOUT=layout, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=NUM_WARPS)
    return -(-M // block_m) * -(-columns // block_n), (epilogue, M, columns, K), options


def launch(y: Tensor, o: ConvOperands, activation: str) -> None:
    """y = act(scale * y + shift + residual), of the operands all but x and the weight.

    y: dense, in channels_last memory or NCHW with the strides of a new tensor. The residual has its strides and dtype,
    the vectors are contiguous; the caller has seen to it. NaN stays NaN.
    """
    if y.numel():
        num_programs, values, options = arguments(y, o, activation)
        runtime.start(_affine_act_kernel, num_programs, values, options, like=y)
