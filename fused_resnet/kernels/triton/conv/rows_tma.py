"""act(scale * conv(x, w) + shift + residual) for 3x3 filters with stride 1 and padding 1, x with a halo. From sm_90 on.

x lies in rows m = (n * (H + 1) + p) * (W + 1) + q. The last line of every image and the last column of every line are
zero. The right halo of a line is the left halo of the next, and the halo below an image is above the next. TMA reads
zero before the start and past the end. So tap (r, s) is the same 2-D tile shifted by (r - 1) * (W + 1) + (s - 1) rows:
no masks and no index arithmetic. The price is (H + 1) * (W + 1) / (H * W) as many rows.
"""

from __future__ import annotations

from fused_resnet.kernels.triton.conv.epilogue import add_products, finish, no_sums, part_and_tile, steps_of_part
from fused_resnet.kernels.triton.runtime import jit, tl


@jit
def _rows_tma_kernel(
    x_desc, weight_desc, epilogue, M, K, P, Q, num_tiles,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, STEPS_PER_TAP: tl.constexpr, SPLIT_K: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m = (n, p, q) of H + 1 lines and W + 1 columns, column k; reduction (r, s, c), c fastest
    # one tile a program, or with PERSISTENT every num_programs-th one, the next one's loads under this one's epilogue
    program = tl.program_id(0)
    end = num_tiles if PERSISTENT else program + 1
    for tile in tl.range(program, end, tl.num_programs(0), flatten=PERSISTENT):
        num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
        part, tile_m, tile_n = part_and_tile(tile, num_m, num_n, GROUP_M)
        first_row, first_channel = tile_m * BLOCK_M, tile_n * BLOCK_N

        acc = no_sums(x_desc.dtype, BLOCK_M, BLOCK_N)
        first, last = steps_of_part(part, 9 * STEPS_PER_TAP, SPLIT_K)
        for step in range(first, last):
            tap = step // STEPS_PER_TAP
            shift = (tap // 3 - 1) * (Q + 1) + tap % 3 - 1
            x = x_desc.load([first_row + shift, step % STEPS_PER_TAP * BLOCK_K])
            weight = weight_desc.load([first_channel, step * BLOCK_K])
            acc = add_products(x, weight.T, acc, INPUT_PRECISION)

        channels = first_channel + tl.arange(0, BLOCK_N)
        finish(
            acc, first_row, channels, channels < K, 0, part, epilogue, M, K, P, Q,
            ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M, SPLIT_K,
        )  # fmt: skip
