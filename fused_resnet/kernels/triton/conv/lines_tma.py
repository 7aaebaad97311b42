"""act(scale * conv(x, w) + shift + residual) for 3x3 filters with padding 1, stride 1 or 2, dense NHWC. From sm_90 on.

Stride 1: x as a matrix [N * H, W * C], one row a line. The outputs (n, p) of one column q then read, for tap (r, s), a
plain 2-D tile of it: r - 1 rows further down, from column (q + s - 1) * C on. TMA reads zero left and right of the
matrix. Above and below an image lies the next one: what r = 0 brings to p = 0, and r = 2 to p = P - 1, is dropped.

Stride 2, H and W even: x as [N * H/2, 2 * W * C], one row a pair of lines. r = 0 is in the second half of the row
above. r = 1 is in the first half of row n * P + p, and r = 2 in its second half. s = 0 is left out for q = 0, since
left of the second half lies the first; below an image nothing is read.

Nothing is masked, padded or copied, and no row is wasted.
"""

from __future__ import annotations

from fused_resnet.kernels.triton.conv.epilogue import finish, ordered_tile
from fused_resnet.kernels.triton.runtime import jit, tl


@jit
def _add_taps(
    acc, x_desc, weight_desc, row, first_column, first_channel, first_weight, first_step, STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The taps (r, 0), (r, 1) and (r, 2) of one r: their columns of x lie side by side, and so do their weights."""
    for step in range(first_step, STEPS):
        x = x_desc.load([row, first_column + step * BLOCK_K])
        weight = weight_desc.load([first_channel, first_weight + step * BLOCK_K])
        acc = tl.dot(x, weight.T, acc, input_precision=INPUT_PRECISION)
    return acc


@jit
def _lines_tma_kernel(
    x_desc, weight_desc, epilogue, M, K, P, Q, C,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, STRIDE: tl.constexpr, STEPS_PER_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m = (n, p) of one column q, column k; reduction (r, s, c), c fastest
    tile_m, tile_n = ordered_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M) * Q, tl.cdiv(K, BLOCK_N), GROUP_M)
    first_row, q, first_channel = tile_m // Q * BLOCK_M, tile_m % Q, tile_n * BLOCK_N
    p = (first_row + tl.arange(0, BLOCK_M)) % P
    column = (q * STRIDE - 1) * C
    STEPS: tl.constexpr = 3 * STEPS_PER_TAP

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if STRIDE == 2:
        half = 2 * Q * C
        left_out = tl.where(q == 0, STEPS_PER_TAP, 0)
        acc = _add_taps(
            acc, x_desc, weight_desc, first_row - 1, half + column, first_channel, 0, left_out, STEPS,
            BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
        acc = tl.where((p > 0)[:, None], acc, 0.0)
        for step in range(2 * left_out, 2 * STEPS):  # (s, r, c): the taps to be left out come first
            s, second = step // (2 * STEPS_PER_TAP), step // STEPS_PER_TAP % 2
            c = step % STEPS_PER_TAP * BLOCK_K
            x = x_desc.load([first_row, second * half + s * C + column + c])
            weight = weight_desc.load([first_channel, (second * 3 + 3 + s) * C + c])
            acc = tl.dot(x, weight.T, acc, input_precision=INPUT_PRECISION)
    else:
        acc = _add_taps(
            acc, x_desc, weight_desc, first_row - 1, column, first_channel, 0, 0, STEPS, BLOCK_K, INPUT_PRECISION
        )
        above = tl.where((p > 0)[:, None], acc, 0.0)
        acc = _add_taps(
            tl.zeros_like(acc), x_desc, weight_desc, first_row + 1, column, first_channel, 6 * C, 0, STEPS,
            BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
        acc = above + tl.where((p < P - 1)[:, None], acc, 0.0)
        acc = _add_taps(
            acc, x_desc, weight_desc, first_row, column, first_channel, 3 * C, 0, STEPS, BLOCK_K, INPUT_PRECISION
        )

    channels = first_channel + tl.arange(0, BLOCK_N)
    finish(
        acc, first_row, channels, channels < K, q, 0, epilogue, M, K, P, Q,
        ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M, 1,
    )  # fmt: skip
