"""act((x - mean) * weight / sqrt(var + eps) + bias + residual) with the batch's statistics, and its gradients.

| kernel | one pass over | what it finds |
| --- | --- | --- |
| `_moments_kernel` | x | mean and sum of squared deviations, of each part of the values of a channel |
| `_forward_kernel` | x, residual | y, and a bit for each of its elements that lets a gradient through |
| `_products_kernel` | grad, x, mask | sums of g and of g * (x - mean), of each part |
| `_backward_kernel` | grad, x, mask | the gradients of x and of the residual |

g is the gradient behind the activation. Two small kernels join the parts, in their order: no atomics, so two runs are
equal to the last bit. A mean is relative to the first value of its channel, so a small deviation beside a large mean is
not lost.

x is a dense matrix. "NHWC": row (n, p, q), column c. "NCHW": row (n, c), column (p, q). A row of the mask has whole
bytes. Tiles of a channel's values are BLOCK_M rows by BLOCK_N columns: all channels of some pixels in NHWC, pixels of
one channel in NCHW.
"""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv.epilogue import activated
from fused_resnet.kernels.triton.runtime import jit, tl, triton
from fused_resnet.operators.operands import BnActOperands
from fused_resnet.operators.problem import BnActProblem

TILE = 4096  # elements of a program's step: in 16-bit types four loads of 16 bytes for each thread and operand
NUM_WARPS = 4
JOINED = 64  # channels of a program that joins parts
_PROGRAMS_EACH = 4  # of sums, on a multiprocessor


# ------------------------------------------------------------------------------------------------------------- places


@jit
def _tile_of_values(t, unit, M, N, COLUMNS, C, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, how many rows and columns are inside) of tile t of a unit: of a block of channels, or of one."""
    if LAYOUT == "NHWC":
        first_row, first_column = t * BLOCK_M, unit * BLOCK_N
        rows, left_m = first_row + tl.arange(0, BLOCK_M), M - first_row
    else:
        num_n = tl.cdiv(COLUMNS, BLOCK_N)
        first_image, first_column = t // num_n * BLOCK_M, t % num_n * BLOCK_N
        rows, left_m = (first_image + tl.arange(0, BLOCK_M)) * C + unit, N - first_image
    return rows, first_column + tl.arange(0, BLOCK_N), left_m, COLUMNS - first_column


@jit
def _channels_of(unit, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """A unit's channels."""
    if LAYOUT == "NHWC":
        return unit * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        return unit + tl.arange(0, 1)


@jit
def _total(values, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of a tile for each channel of its unit."""
    if LAYOUT == "NHWC":
        return tl.sum(values, 0)
    else:
        return tl.sum(tl.reshape(values, (1, BLOCK_M * BLOCK_N)), 1)


@jit
def _first_value(x, channels, live, COLUMNS, LAYOUT: tl.constexpr):
    """The first value of each channel."""
    place = channels if LAYOUT == "NHWC" else channels.to(tl.int64) * COLUMNS
    return tl.load(x + place, mask=live, other=0.0).to(tl.float32)


@jit
def _passes(mask, rows, columns, live, mask_bytes):
    """Whether the gradient passes the activation."""
    bytes = tl.load(mask + rows[:, None].to(tl.int64) * mask_bytes + (columns // 8)[None, :], mask=live, other=0)
    return ((bytes.to(tl.int32) >> (columns % 8)[None, :]) & 1) != 0


# --------------------------------------------------------------------------------------------------------------- sums


@jit
def _joined(n, mean, squares, more, other_mean, other_squares):
    """Mean and sum of squared deviations of n values, joined with those of `more` others (Chan, Golub, LeVeque)."""
    share = more / (n + more)
    delta = other_mean - mean
    return n + more, mean + delta * share, squares + other_squares + delta * delta * n * share


@jit
def _moments_kernel(
    x, parts, M, N, COLUMNS, C, num_tiles, num_parts,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part, unit = tl.program_id(0) % num_parts, tl.program_id(0) // num_parts
    channels = _channels_of(unit, LAYOUT, BLOCK_N)
    live_channels = channels < C
    first = _first_value(x, channels, live_channels, COLUMNS, LAYOUT)
    n, mean, squares = 0.0, tl.zeros_like(first), tl.zeros_like(first)
    for t in range(part * num_tiles // num_parts, (part + 1) * num_tiles // num_parts):
        rows, columns, left_m, left_n = _tile_of_values(t, unit, M, N, COLUMNS, C, LAYOUT, BLOCK_M, BLOCK_N)
        live = (tl.arange(0, BLOCK_M) < left_m)[:, None] & (tl.arange(0, BLOCK_N) < left_n)[None, :]
        offsets = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
        value = tl.load(x + offsets, mask=live, other=0.0).to(tl.float32)
        value = tl.where(live, value - first[None, :], 0.0)
        more = tl.minimum(left_m, BLOCK_M).to(tl.float32)
        if LAYOUT == "NCHW":
            more *= tl.minimum(left_n, BLOCK_N).to(tl.float32)
        near = _total(value, LAYOUT, BLOCK_M, BLOCK_N) / more
        off = tl.where(live, value - near[None, :], 0.0)
        rest = _total(off, LAYOUT, BLOCK_M, BLOCK_N)
        off_squares = _total(off * off, LAYOUT, BLOCK_M, BLOCK_N) - rest * rest / more
        n, mean, squares = _joined(n, mean, squares, more, near + rest / more, off_squares)
    place = parts + part * 3 * C + channels
    tl.store(place, n + tl.zeros_like(first), mask=live_channels)
    tl.store(place + C, mean, mask=live_channels)
    tl.store(place + 2 * C, squares, mask=live_channels)


@jit
def _join_moments_kernel(x, parts, mean_ptr, var_ptr, COLUMNS, C, num_parts, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    n, mean, squares = (tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32))
    for part in range(num_parts):
        place = parts + part * 3 * C + channels
        more = tl.load(place, mask=live, other=1.0)
        other_mean, other_squares = (
            tl.load(place + C, mask=live, other=0.0),
            tl.load(place + 2 * C, mask=live, other=0.0),
        )
        n, mean, squares = _joined(n, mean, squares, more, other_mean, other_squares)
    tl.store(mean_ptr + channels, mean + _first_value(x, channels, live, COLUMNS, LAYOUT), mask=live)
    tl.store(var_ptr + channels, squares / n, mask=live)


@jit
def _products_kernel(
    grad, x, mean_ptr, mask, parts, M, N, COLUMNS, C, num_tiles, num_parts, mask_bytes,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part, unit = tl.program_id(0) % num_parts, tl.program_id(0) // num_parts
    channels = _channels_of(unit, LAYOUT, BLOCK_N)
    live_channels = channels < C
    mean = tl.load(mean_ptr + channels, mask=live_channels, other=0.0)
    sums, dots = tl.zeros_like(mean), tl.zeros_like(mean)
    for t in range(part * num_tiles // num_parts, (part + 1) * num_tiles // num_parts):
        rows, columns, left_m, left_n = _tile_of_values(t, unit, M, N, COLUMNS, C, LAYOUT, BLOCK_M, BLOCK_N)
        live = (tl.arange(0, BLOCK_M) < left_m)[:, None] & (tl.arange(0, BLOCK_N) < left_n)[None, :]
        offsets = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
        g = tl.load(grad + offsets, mask=live, other=0.0).to(tl.float32)
        if mask is not None:
            g = tl.where(_passes(mask, rows, columns, live, mask_bytes), g, 0.0)
        value = tl.load(x + offsets, mask=live, other=0.0).to(tl.float32)
        sums += _total(g, LAYOUT, BLOCK_M, BLOCK_N)
        dots += _total(tl.where(live, g * (value - mean[None, :]), 0.0), LAYOUT, BLOCK_M, BLOCK_N)
    place = parts + part * 2 * C + channels
    tl.store(place, sums, mask=live_channels)
    tl.store(place + C, dots, mask=live_channels)


@jit
def _join_products_kernel(parts, sum_ptr, dot_ptr, C, num_parts, BLOCK: tl.constexpr):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    sums, dots = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        place = parts + part * 2 * C + channels
        sums += tl.load(place, mask=live, other=0.0)
        dots += tl.load(place + C, mask=live, other=0.0)
    tl.store(sum_ptr + channels, sums, mask=live)
    tl.store(dot_ptr + channels, dots, mask=live)


# --------------------------------------------------------------------------------------------------------------- maps


@jit
def _first_column(COLUMNS, BLOCK_N: tl.constexpr):
    """The first column of a program's tile."""
    return tl.program_id(0) % tl.cdiv(COLUMNS, BLOCK_N) * BLOCK_N


@jit
def _tile_of_map(M, COLUMNS, C, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, which are inside, offsets, channels, which of those are inside) of a program's tile. Channels are
    along the columns in NHWC, along the rows in NCHW."""
    rows = tl.program_id(0).to(tl.int64) // tl.cdiv(COLUMNS, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = _first_column(COLUMNS, BLOCK_N) + tl.arange(0, BLOCK_N)
    live = (rows < M)[:, None] & (columns < COLUMNS)[None, :]
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    if LAYOUT == "NHWC":
        return rows, columns, live, offsets, columns, columns < COLUMNS
    else:
        return rows, columns, live, offsets, (rows % C).to(tl.int32), rows < M


@jit
def _of_channels(vector, channels, live, LAYOUT: tl.constexpr):
    """A vector's values, beside the tile."""
    return tl.expand_dims(tl.load(vector + channels, mask=live, other=0.0).to(tl.float32), 0 if LAYOUT == "NHWC" else 1)


@jit
def _scale(var, weight, eps, channels, live, LAYOUT: tl.constexpr):
    """weight / sqrt(var + eps)."""
    scale = 1.0 / tl.sqrt(_of_channels(var, channels, live, LAYOUT) + tl.cast(eps, tl.float32))
    if weight is not None:
        scale *= _of_channels(weight, channels, live, LAYOUT)
    return scale


@jit
def _forward_kernel(
    x, mean, var, weight, bias, eps, residual, mask, y, M, COLUMNS, C, mask_bytes,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, columns, live, offsets, channels, live_channels = _tile_of_map(M, COLUMNS, C, LAYOUT, BLOCK_M, BLOCK_N)
    value = tl.load(x + offsets, mask=live, other=0.0).to(tl.float32)
    value -= _of_channels(mean, channels, live_channels, LAYOUT)
    value *= _scale(var, weight, eps, channels, live_channels, LAYOUT)
    if bias is not None:
        value += _of_channels(bias, channels, live_channels, LAYOUT)
    if residual is not None:
        value += tl.load(residual + offsets, mask=live, other=0.0).to(tl.float32)
    if mask is not None:
        stops = value <= 0.0  # NaN compares false: it passes, as in torch
        if ACTIVATION == "relu6":
            stops = stops | (value >= 6.0)
        bits = tl.where(live & (stops == 0), 1, 0).to(tl.int32)
        eights = tl.reshape(bits, (BLOCK_M, BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
        places = _first_column(COLUMNS, BLOCK_N) // 8 + tl.arange(0, BLOCK_N // 8)
        stored = (rows < M)[:, None] & (places < mask_bytes)[None, :]
        tl.store(mask + rows[:, None] * mask_bytes + places[None, :], tl.sum(eights, 2).to(tl.uint8), mask=stored)
    tl.store(y + offsets, activated(value, ACTIVATION).to(y.dtype.element_ty), mask=live)


@jit
def _backward_kernel(
    grad, x, mean, var, weight, eps, mask, sum, dot, count, grad_x, grad_residual, M, COLUMNS, C, mask_bytes,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, columns, live, offsets, channels, live_channels = _tile_of_map(M, COLUMNS, C, LAYOUT, BLOCK_M, BLOCK_N)
    g = tl.load(grad + offsets, mask=live, other=0.0).to(tl.float32)
    if mask is not None:
        g = tl.where(_passes(mask, rows, columns, live, mask_bytes), g, 0.0)
    if grad_residual is not None:
        tl.store(grad_residual + offsets, g.to(grad_residual.dtype.element_ty), mask=live)
    if grad_x is not None:
        scale = _scale(var, weight, eps, channels, live_channels, LAYOUT)
        result = g * scale
        if sum is not None:  # through the statistics
            inverse = _scale(var, None, eps, channels, live_channels, LAYOUT)
            values = tl.cast(count, tl.float32)
            value = tl.load(x + offsets, mask=live, other=0.0).to(tl.float32)
            value -= _of_channels(mean, channels, live_channels, LAYOUT)
            by_x = scale * inverse * inverse * _of_channels(dot, channels, live_channels, LAYOUT) / values
            result -= value * by_x + scale * _of_channels(sum, channels, live_channels, LAYOUT) / values
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=live)


# ------------------------------------------------------------------------------------------------------------ launches


class Launch(NamedTuple):
    """As `conv.launch.Launch`. writes: the tensors that the kernel writes."""

    kernel: Any
    num_programs: int
    arguments: tuple
    options: dict[str, Any]
    writes: list[Tensor]


def why_not(problem: BnActProblem) -> Optional[str]:
    """Why this machine cannot run the problem, or None."""
    reason = runtime.why_not(problem.device, problem.dtype)
    if reason is None and problem.activation == "silu":
        return "its activations are none, relu, relu6, not silu"
    if reason is None and problem.values * problem.C == 0:
        return "there is nothing to compute: x is empty"
    if reason is None and problem.rows[0] >= 2**31 - TILE:
        return f"its rows, {problem.rows[0]}, do not fit into 32 bits"
    return reason


class _Tiling(NamedTuple):
    """How a map is walked. units: blocks of channels in NHWC, channels in NCHW. num_tiles: of a unit."""

    layout: str
    M: int
    columns: int
    units: int
    num_tiles: int
    num_parts: int
    blocks: dict[str, Any]


def _tiling(problem: BnActProblem, device: torch.device) -> _Tiling:
    p, layout = problem, "NHWC" if problem.is_nhwc else "NCHW"
    M, columns = p.rows
    block_n = min(max(triton.next_power_of_2(columns), 16), 128 if p.is_nhwc else 1024)
    block_m = TILE // block_n
    blocks = dict(LAYOUT=layout, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=NUM_WARPS)
    if p.is_nhwc:
        units, num_tiles = -(-columns // block_n), -(-M // block_m)
    else:
        units, num_tiles = p.C, -(-p.N // block_m) * -(-columns // block_n)
    num_parts = max(1, min(num_tiles, -(-_PROGRAMS_EACH * runtime.num_sms(device) // units)))
    return _Tiling(layout, M, columns, units, num_tiles, num_parts, blocks)


def statistics_launches(problem: BnActProblem, x: Tensor, mean: Tensor, var: Tensor) -> Iterator[Launch]:
    """mean, var: the batch's, the biased one, in fp32. x: dense, in the problem's layout."""
    p, t = problem, _tiling(problem, x.device)
    parts = x.new_empty(t.num_parts, 3, p.C, dtype=torch.float32)
    arguments = (x, parts, t.M, p.N, t.columns, p.C, t.num_tiles, t.num_parts)
    yield Launch(_moments_kernel, t.num_parts * t.units, arguments, t.blocks, [parts])
    joined = (x, parts, mean, var, t.columns, p.C, t.num_parts)
    options = dict(LAYOUT=t.layout, BLOCK=JOINED, num_warps=NUM_WARPS)
    yield Launch(_join_moments_kernel, -(-p.C // JOINED), joined, options, [mean, var])


def forward_launches(problem: BnActProblem, o: BnActOperands, mask: Optional[Tensor], y: Tensor) -> Iterator[Launch]:
    """y and the mask, with the operands' mean and var. x, residual, y: dense, in the problem's layout."""
    p, t = problem, _tiling(problem, o.x.device)
    arguments = (o.x, o.mean, o.var, o.weight, o.bias, o.eps, o.residual, mask, y, t.M, t.columns, p.C, p.mask_shape[1])
    writes = [y] if mask is None else [y, mask]
    yield Launch(_forward_kernel, _num_tiles(t), arguments, dict(t.blocks, ACTIVATION=p.activation), writes)


def sums_launches(
    problem: BnActProblem, grad: Tensor, o: BnActOperands, mask: Optional[Tensor], sum: Tensor, dot: Tensor
) -> Iterator[Launch]:
    """sum of g and dot of g and x - mean, in fp32, by channel."""
    p, t = problem, _tiling(problem, grad.device)
    parts = grad.new_empty(t.num_parts, 2, p.C, dtype=torch.float32)
    arguments = (grad, o.x, o.mean, mask, parts, t.M, p.N, t.columns, p.C, t.num_tiles, t.num_parts, p.mask_shape[1])
    yield Launch(_products_kernel, t.num_parts * t.units, arguments, t.blocks, [parts])
    options = dict(BLOCK=JOINED, num_warps=NUM_WARPS)
    yield Launch(_join_products_kernel, -(-p.C // JOINED), (parts, sum, dot, p.C, t.num_parts), options, [sum, dot])


def backward_launches(
    problem: BnActProblem, grad: Tensor, o: BnActOperands, mask: Optional[Tensor],
    sum: Optional[Tensor], dot: Optional[Tensor], grad_x: Optional[Tensor], grad_residual: Optional[Tensor],
) -> Iterator[Launch]:  # fmt: skip
    """The gradients of x and of the residual, where there are tensors for them. Without the sums, of constant
    statistics."""
    p, t = problem, _tiling(problem, grad.device)
    arguments = (
        grad, o.x, o.mean, o.var, o.weight, o.eps, mask, sum, dot, float(p.values), grad_x, grad_residual, t.M,
        t.columns, p.C, p.mask_shape[1],
    )  # fmt: skip
    writes = [one for one in (grad_x, grad_residual) if one is not None]
    yield Launch(_backward_kernel, _num_tiles(t), arguments, t.blocks, writes)


def _num_tiles(t: _Tiling) -> int:
    return -(-t.M // t.blocks["BLOCK_M"]) * -(-t.columns // t.blocks["BLOCK_N"])


def start(launches: Iterator[Launch], like: Tensor) -> None:
    """Run them in order on the device of `like`."""
    for each in launches:
        runtime.start(each.kernel, each.num_programs, each.arguments, each.options, like=like)
