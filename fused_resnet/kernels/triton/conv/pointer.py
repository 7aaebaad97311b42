"""act(scale * conv(x, w) + shift + residual) by implicit GEMM with pointers: every problem, every GPU from sm_80 on.

Row m = (n, p, q) of dense NHWC, column k; reduction (r, s, c), c fastest. The epilogue is `epilogue.finish`.
"""

from __future__ import annotations

from fused_resnet.kernels.triton.conv.epilogue import add_products, finish, no_sums, part_and_tile, steps_of_part
from fused_resnet.kernels.triton.runtime import jit, tl


@jit
def _pointwise_bn_act_kernel(
    x_ptr, weight_ptr, epilogue, M, K, P, Q, C,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, WHOLE_STEPS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m = (n, h, w), column k; reduction c. WHOLE_STEPS: BLOCK_K divides C
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    part, tile_m, tile_n = part_and_tile(tl.program_id(0), num_m, num_n, GROUP_M)
    first_row = tile_m * BLOCK_M
    local_rows = tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    live_rows, live_channels = first_row + local_rows < M, channels < K
    x_tile = x_ptr + first_row.to(tl.int64) * C
    weight_tile = weight_ptr + (tile_n * BLOCK_N).to(tl.int64) * C
    x_offsets = local_rows[:, None] * C + steps[None, :]
    weight_offsets = tl.arange(0, BLOCK_N)[None, :] * C + steps[:, None]

    acc = no_sums(x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    first, last = steps_of_part(part, tl.cdiv(C, BLOCK_K), SPLIT_K)
    for c in range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
        if WHOLE_STEPS:
            x = tl.load(x_tile + c + x_offsets, mask=live_rows[:, None], other=0.0)
            weight = tl.load(weight_tile + c + weight_offsets, mask=live_channels[None, :], other=0.0)
        else:
            live_steps = c + steps < C
            x = tl.load(x_tile + c + x_offsets, mask=live_rows[:, None] & live_steps[None, :], other=0.0)
            live_weights = live_channels[None, :] & live_steps[:, None]
            weight = tl.load(weight_tile + c + weight_offsets, mask=live_weights, other=0.0)
        acc = add_products(x, weight, acc, INPUT_PRECISION)

    finish(
        acc, first_row, channels, live_channels, 0, part, epilogue, M, K, P, Q,
        ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M, SPLIT_K,
    )  # fmt: skip


@jit
def _conv_bn_act_kernel(
    x_ptr, weight_ptr, epilogue, M, K, P, Q, C, H, W, S, group_K, group_C, reduction,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, WHOLE_STEPS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m = (n, p, q), column k; reduction (r, s, c), c fastest. WHOLE_STEPS: BLOCK_K divides C/groups, so that
    # each step of the loop lies within one filter tap (r, s)
    tiles_per_group = tl.cdiv(group_K, BLOCK_N)
    num_m, num_n = tl.cdiv(M, BLOCK_M), K // group_K * tiles_per_group
    part, tile_m, tile_n = part_and_tile(tl.program_id(0), num_m, num_n, GROUP_M)
    group = tile_n // tiles_per_group
    first_row = tile_m * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
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

    acc = no_sums(x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    first, last = steps_of_part(part, tl.cdiv(reduction, BLOCK_K), SPLIT_K)
    r, s, c = 0, 0, 0
    if SPLIT_K > 1:
        # in whole steps of BLOCK_K, so that the compiler knows it for a multiple and keeps the loads wide
        c = first % (group_C // BLOCK_K) * BLOCK_K if WHOLE_STEPS else 0
        s = first * BLOCK_K // group_C % S
        r = first * BLOCK_K // group_C // S
    for k in range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
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
        acc = add_products(x, weight, acc, INPUT_PRECISION)

    finish(
        acc, first_row, channels, live_channels, 0, part, epilogue, M, K, P, Q,
        ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M, SPLIT_K,
    )  # fmt: skip
