"""act(scale * conv(x, w) + shift + residual) for 1x1 filters, as a GEMM whose tiles TMA brings. From sm_90 on.

Stride 1: row m of the input is row m of the output, compact or with a halo. Stride 2 over an even height: x as
[N * H/2, 2 * W * C], one row a pair of lines. The outputs of column q then come from C neighbouring columns of that
matrix, from 2 * q * C on: a plain 2-D tile, without a copy and without reading the other three quarters.
"""

from __future__ import annotations

from fused_resnet.kernels.triton.conv.epilogue import add_products, finish, no_sums, part_and_tile, steps_of_part
from fused_resnet.kernels.triton.runtime import jit, tl


@jit
def _gemm_tma_kernel(
    x_desc, weight_desc, epilogue, M, K, P, Q, C, num_tiles,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, SPLIT_K: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # row m in ROWS, column k; reduction c
    # one tile a program, or with PERSISTENT every num_programs-th one, the next one's loads under this one's epilogue
    program = tl.program_id(0)
    end = num_tiles if PERSISTENT else program + 1
    for tile in tl.range(program, end, tl.num_programs(0), flatten=PERSISTENT):
        num_columns = Q if ROWS == "lines" else 1
        num_m, num_n = tl.cdiv(M, BLOCK_M) * num_columns, tl.cdiv(K, BLOCK_N)
        part, tile_m, tile_n = part_and_tile(tile, num_m, num_n, GROUP_M)
        column = tile_m % num_columns
        first_row, first_channel = tile_m // num_columns * BLOCK_M, tile_n * BLOCK_N
        first_c = column * 2 * C

        acc = no_sums(x_desc.dtype, BLOCK_M, BLOCK_N)
        first, last = steps_of_part(part, tl.cdiv(C, BLOCK_K), SPLIT_K)
        for step in range(first, last):
            x = x_desc.load([first_row, first_c + step * BLOCK_K])
            weight = weight_desc.load([first_channel, step * BLOCK_K])
            acc = add_products(x, weight.T, acc, INPUT_PRECISION)

        channels = first_channel + tl.arange(0, BLOCK_N)
        finish(
            acc, first_row, channels, channels < K, column, part, epilogue, M, K, P, Q,
            ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M, SPLIT_K,
        )  # fmt: skip
