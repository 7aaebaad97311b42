"""A bottleneck from its 3x3 on, and the first 1x1 of the next block, as one kernel: `operators.problem.ChainProblem`.

    t = act(conv3x3(x) + bias),  y = act(t * expand_weight + bias + residual),  reduced = act(y * reduce_weight + bias)

The 3x3 comes first, so that nothing in a halo is computed twice: behind it all is per pixel and stays on the chip. All
maps lie in row space (`conv.row_space`), where a tap of the 3x3 is a shift of rows. The halo rows of y and reduced are
written as zeros, whatever was computed for them.

A program takes BLOCK_M rows and all channels. It sums the 3x3, and then walks the expanded channels: BLOCK_E of them
are expanded, stored, and multiplied into the sums of the reduction at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.kernels.triton.conv.configs import MAX_ROWS
from fused_resnet.kernels.triton.conv.epilogue import activated
from fused_resnet.kernels.triton.conv.launch import Launch
from fused_resnet.kernels.triton.runtime import jit, tl
from fused_resnet.operators.operands import ChainOperands
from fused_resnet.operators.problem import ChainProblem

DTYPES = (torch.float16, torch.bfloat16)
_LEAST_WGMMA = 64  # rows of its first operand


class ChainConfig(NamedTuple):
    """Rows of a program, expanded channels in a step, and how it is compiled.

    tma: tiles come and go as TMA's, from sm_90 on. Else by pointers.
    """

    BLOCK_M: int
    BLOCK_E: int
    num_warps: int
    num_stages: int
    tma: bool


class _Row(NamedTuple):
    """A config, and up to how many channels of x and of reduced it neither spills nor lacks shared memory."""

    C: int
    L: int
    config: ChainConfig


# The likeliest first; none spills (`aot.compile_chain`). All have four warps: eight would compute 64 expanded channels
# twice, and have miscompiled flattened loops (`conv.configs.SAFE_WARPS`).
_TABLE = (
    # layer1 of ResNet-50: 96 KiB, so that two programs share a multiprocessor
    _Row(64, 64, ChainConfig(128, 64, 4, 2, True)),
    # wider ones: 128 rows would take 255 registers, or spill
    _Row(256, 256, ChainConfig(64, 64, 4, 2, True)),
    # more copies under way, in one program a multiprocessor
    _Row(64, 64, ChainConfig(128, 64, 4, 3, True)),
    _Row(128, 128, ChainConfig(64, 64, 4, 3, True)),
    # sm_80, in the 99 KiB of sm_86
    _Row(128, 128, ChainConfig(64, 64, 4, 2, False)),
    # more sums need all registers
    _Row(256, 256, ChainConfig(32, 64, 4, 2, False)),
)


@jit
def _tile(source, row, column, M, N: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """A tile of a dense matrix of M rows and N columns. What lies outside reads as zero."""
    if TMA:
        tile = source.load([row, column])
    else:
        rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        is_inside = ((rows >= 0) & (rows < M))[:, None] & (columns < N)[None, :]
        start = source + tl.cast(row, tl.int64) * N
        tile = tl.load(start + tl.arange(0, HEIGHT)[:, None] * N + columns[None, :], mask=is_inside, other=0.0)
    return tile


@jit
def _store(target, value, row, column, M, N: tl.constexpr, TMA: tl.constexpr):
    """A tile into a dense matrix of M rows and N columns. What lies outside is left alone."""
    if TMA:
        target.store([row, column], value)
    else:
        rows, columns = tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        is_inside = (row + rows < M)[:, None] & (columns < N)[None, :]
        start = target + tl.cast(row, tl.int64) * N
        tl.store(start + rows[:, None] * N + columns[None, :], value, mask=is_inside)


@jit
def _shift_kernel(
    x, weight, bias, residual, expand_weight, expand_bias, reduce_weight, reduce_bias, y, reduced, M, H, W,
    C: tl.constexpr, K: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    # row m = (n, h, w) of H + 1 lines and W + 1 columns; reduction of the 3x3 (r, s, c), c fastest
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    line = rows // (W + 1)
    is_pixel = (rows - line * (W + 1) < W) & (line % (H + 1) < H)

    ELEMENT: tl.constexpr = y.dtype if TMA else y.dtype.element_ty
    STEPS: tl.constexpr = C // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(9 * STEPS):
        tap = step // STEPS
        shift = (tap // 3 - 1) * (W + 1) + tap % 3 - 1
        pixels = _tile(x, first_row + shift, step % STEPS * BLOCK_K, M, C, BLOCK_M, BLOCK_K, TMA)
        filters = _tile(weight, 0, step * BLOCK_K, C, 9 * C, BLOCK_C, BLOCK_K, TMA)
        sums = tl.dot(pixels, filters.T, sums)
    channels = tl.arange(0, BLOCK_C)
    sums += tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    t = activated(sums, ACTIVATION).to(ELEMENT)

    # From here on (channels, rows), so that weights are the first operands of products and maps the second, which come
    # from shared memory. ptxas may overwrite a first one in registers while wgmma still reads it: Triton's issue 9433
    is_pixel = is_pixel[None, :]
    reduced_sums = tl.zeros((BLOCK_L, BLOCK_M), tl.float32)
    for e in range(0, K, BLOCK_E):
        filters = _tile(expand_weight, e, 0, K, C, BLOCK_E, BLOCK_C, TMA)
        expanded = tl.dot(filters, t.T)
        expansion = e + tl.arange(0, BLOCK_E)
        expanded += tl.load(expand_bias + expansion, mask=expansion < K, other=0.0).to(tl.float32)[:, None]
        expanded += _tile(residual, first_row, e, M, K, BLOCK_M, BLOCK_E, TMA).T.to(tl.float32)
        value = tl.where(is_pixel, activated(expanded, ACTIVATION), 0.0).to(ELEMENT)
        _store(y, value.T, first_row, e, M, K, TMA)
        if L > 0:
            filters = _tile(reduce_weight, 0, e, L, K, BLOCK_L, BLOCK_E, TMA)
            reduced_sums = tl.dot(filters, value, reduced_sums)
    if L > 0:
        behind = tl.arange(0, BLOCK_L)
        reduced_sums += tl.load(reduce_bias + behind, mask=behind < L, other=0.0).to(tl.float32)[:, None]
        value = tl.where(is_pixel, activated(reduced_sums, ACTIVATION), 0.0).to(ELEMENT)
        _store(reduced, value.T, first_row, 0, M, L, TMA)


def why_not(problem: ChainProblem) -> Optional[str]:
    """Why this machine cannot run the problem, or None."""
    p, rows = problem, row_space.num_rows(problem.N, problem.H, problem.W)
    if p.C % 16 or p.K % 16 or p.L % 16:
        return f"channels must be multiples of 16, not {p.C}, {p.K} and {p.L}"
    most_C, most_L = max(row.C for row in _TABLE), max(row.L for row in _TABLE)
    if p.C > most_C or p.L > most_L:
        return f"a program holds {most_C} channels of x and {most_L} of the reduction at most, not {p.C} and {p.L}"
    if rows > MAX_ROWS:
        return f"{rows} rows with their halo are too many (at most {MAX_ROWS})"
    return runtime.why_not(p.device, p.dtype, DTYPES)


def configs(problem: ChainProblem, arch: int) -> list[ChainConfig]:
    """Those of the table that hold the problem's channels, the likeliest first. arch: compute capability times ten."""
    return [c for C, L, c in _TABLE if problem.C <= C and problem.L <= L and (arch >= 90 or not c.tma)]


def default_config(problem: ChainProblem) -> ChainConfig:
    """By pointers, which any GPU and any memory takes."""
    return configs(problem, 80)[0]


def launch(
    problem: ChainProblem, operands: ChainOperands, y: Tensor, reduced: Optional[Tensor],
    config: Optional[ChainConfig] = None,
) -> None:  # fmt: skip
    """Write y and reduced, sums in fp32. NaN stays NaN.

    x, residual, y and reduced lie in row space: (rows, channels), the halo of x zero. Weights are KRSC in memory. All
    are dense, and the vectors contiguous: the caller has seen to it. reduced: None where no block follows.

    config: by default `default_config`, also where TMA's tensors do not start at multiples of 16 bytes. ValueError for
    one that is not in the table for this problem.
    """
    known = configs(problem, runtime.arch(y.device))
    config = config or default_config(problem)
    if config not in known:
        raise ValueError(f"bottleneck_chain: {config} is not for {problem}: known are {known}.")
    maps = (operands.x, operands.residual, *(t for t in operands if isinstance(t, Tensor) and t.dim() == 4), y, reduced)
    if config.tma and any(one is not None and one.data_ptr() % 16 for one in maps):
        config = default_config(problem)
    if y.numel():
        runtime.start(*prepare(problem, operands, y, reduced, config), like=y)


def prepare(
    problem: ChainProblem, operands: ChainOperands, y: Tensor, reduced: Optional[Tensor], config: ChainConfig
) -> Launch:
    """What `launch` starts."""
    p, o, c = problem, operands, config
    M = row_space.num_rows(p.N, p.H, p.W)
    block_c, block_l = (1 << max(size - 1, 15).bit_length() for size in (p.C, p.L))
    block_l = max(block_l, _LEAST_WGMMA) if c.tma else block_l
    block_k = min(64, p.C & -p.C)  # a step leaves no tap

    def matrix(tensor: Optional[Tensor], rows: int, columns: int, height: int, width: int) -> Any:
        if tensor is None or not c.tma:
            return tensor
        return runtime.descriptor(tensor, (rows, columns), (height, width))

    arguments = (
        matrix(o.x, M, p.C, c.BLOCK_M, block_k), matrix(o.weight, p.C, 9 * p.C, block_c, block_k), o.bias,
        matrix(o.residual, M, p.K, c.BLOCK_M, c.BLOCK_E),
        matrix(o.expand_weight, p.K, p.C, c.BLOCK_E, block_c), o.expand_bias,
        matrix(o.reduce_weight, p.L, p.K, block_l, c.BLOCK_E), o.reduce_bias,
        matrix(y, M, p.K, c.BLOCK_M, c.BLOCK_E), matrix(reduced, M, p.L, c.BLOCK_M, block_l), M, p.H, p.W,
    )  # fmt: skip
    options = dict(
        C=p.C, K=p.K, L=p.L, ACTIVATION=p.activation, TMA=c.tma, BLOCK_M=c.BLOCK_M,
        BLOCK_C=block_c, BLOCK_L=block_l, BLOCK_K=block_k, BLOCK_E=c.BLOCK_E, num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    return Launch(_shift_kernel, -(-M // c.BLOCK_M), arguments, options)


def launches(problem: ChainProblem, config: ChainConfig, bias_dtype: torch.dtype) -> list[Launch]:
    """What `launch` would start with aligned tensors, none of which is there."""
    p, M = problem, row_space.num_rows(problem.N, problem.H, problem.W)

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    vectors = [empty(size, dtype=bias_dtype) for size in (p.C, p.K, p.L)]
    o = ChainOperands(
        empty(M, p.C), empty(M, p.K), empty(p.C, p.C, 3, 3), vectors[0], empty(p.K, p.C, 1, 1), vectors[1],
        *((empty(p.L, p.K, 1, 1), vectors[2]) if p.L else ()),
    )  # fmt: skip
    return [prepare(p, o, empty(M, p.K), empty(M, p.L) if p.L else None, config)]
