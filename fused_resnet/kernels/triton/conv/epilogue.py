"""What every convolution kernel does with its sums: BN or bias, residual, activation, and where the result lies.

    out = act(scale * sum + shift + residual)
    scale = bn_weight / sqrt(bn_var + eps),  shift = (bias - bn_mean) * scale + bn_bias

What is None in `Epilogue` is a compile-time constant and costs nothing. Rows are numbered in one of three ways:

    "compact"  (n * P + p) * Q + q                    a dense NHWC tensor
    "halo"     (n * (P + 1) + p) * (Q + 1) + q        a line of zeros below and a column right of each image
    "lines"    n * P + p, the column q is the program's own

A kernel computes its rows in one space (ROWS) and may write, and read a residual, in another.

Sums of bytes are int32, and what follows them is the int8 contract (`operators.quantized`), in fp32:

    out = rint(min(max(fma(residual, R, fma(float(sum), M, B)), low), high))

Sums of e4m3 are fp32, and the same follows, with a rounding to e4m3 for rint. NaN then stays NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from torch import Tensor

from fused_resnet.kernels.triton.runtime import jit, tl


class Epilogue(NamedTuple):
    """What a kernel's sums meet and where they go, as one argument: tensors in a launch, pointers in the kernel.

    A field that is None is no parameter of the compiled kernel. partial: [part, row, channel] in fp32, where each part
    of a split reduction leaves its sums.
    """

    bn_weight: Optional[Tensor]
    bn_bias: Optional[Tensor]
    bn_mean: Optional[Tensor]
    bn_var: Optional[Tensor]
    eps: float
    bias: Optional[Tensor]
    residual: Optional[Tensor]
    out: Any
    partial: Optional[Tensor]


class Int8Epilogue(NamedTuple):
    """The same for a convolution of bytes or of e4m3. filter_sums: (K,) int32, with u8 activations (`add_products`)."""

    multiplier: Tensor
    bias: Tensor
    residual_scale: float
    low: float
    high: float
    filter_sums: Optional[Tensor]
    residual: Optional[Tensor]
    out: Any
    partial: Optional[Tensor]


@jit
def no_sums(ELEMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of zeros: int32 for sums of bytes, else fp32."""
    return tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if ELEMENT.is_int() else tl.float32)


@jit
def add_products(x, weight, acc, INPUT_PRECISION: tl.constexpr):
    """acc + x @ weight.

    Triton multiplies s8 by s8 alone. u8 is made s8 by its upper bit, which subtracts 128 from it, also where x was
    masked or padded: `rescaled` adds 128 times the sum of the filter.

    Tensor cores sum e4m3 products with 13 bits. So each step's sum begins anew, and is added in fp32.
    """
    if x.dtype == tl.float8e4nv:
        acc += tl.dot(x, weight, max_num_imprecise_acc=x.shape[1], out_dtype=tl.float32)
    else:
        if x.dtype == tl.uint8:
            x = (x ^ 0x80).to(tl.int8, bitcast=True)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)
    return acc


@jit
def ordered_tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """(tile of rows, tile of channels): GROUP_M tiles of rows share their weights in L2 before the next ones come."""
    group_size = GROUP_M * num_n
    first_m = tile // group_size * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + tile % group_size % height, tile % group_size // height


@jit
def part_and_tile(program, num_m, num_n, GROUP_M: tl.constexpr):
    """(part of the reduction, tile of rows, tile of channels): all tiles of the first part come first."""
    part = program // (num_m * num_n)
    tile_m, tile_n = ordered_tile(program % (num_m * num_n), num_m, num_n, GROUP_M)
    return part, tile_m, tile_n


@jit
def steps_of_part(part, num_steps, SPLIT_K: tl.constexpr):
    """[first, last) of the reduction's steps that one of SPLIT_K parts sums. The last parts may be empty."""
    if SPLIT_K == 1:
        return 0, num_steps
    each = tl.cdiv(num_steps, SPLIT_K)
    return part * each, tl.minimum(part * each + each, num_steps)


@jit
def _row_in(rows, column, P, Q, ROWS: tl.constexpr, SPACE: tl.constexpr):
    """The rows' numbers in SPACE. Means nothing for halo rows in a compact space: their stores are masked."""
    if ROWS == SPACE:
        return rows
    if ROWS == "halo":
        line = rows // (Q + 1)
        return rows - line - line // (P + 1) * Q
    if ROWS == "compact":
        line = rows // Q
        return rows + line + line // P * (Q + 1)
    if SPACE == "halo":
        return (rows + rows // P) * (Q + 1) + column
    return rows * Q + column


@jit
def _write_halo(out, offsets, stored, rows, column, K, P, Q, ROWS: tl.constexpr):
    """Zeros into the halo that the rows of a compact tile border on: right of a line, below an image, the corner."""
    line = rows if ROWS == "lines" else rows // Q
    is_last_column = (column + tl.zeros_like(rows) if ROWS == "lines" else rows - line * Q) == Q - 1
    is_last_line = line % P == P - 1
    zero = tl.zeros(offsets.shape, tl.float32).to(out.dtype.element_ty)
    tl.store(out + offsets + K, zero, mask=stored & is_last_column[:, None])
    tl.store(out + offsets + (Q + 1) * K, zero, mask=stored & is_last_line[:, None])
    tl.store(out + offsets + (Q + 2) * K, zero, mask=stored & (is_last_column & is_last_line)[:, None])


@jit
def normalised(y, channels, live_channels, epilogue, AXIS: tl.constexpr):
    """BN and bias of a tile. AXIS: the one that the channels' vectors lack, 0 of (rows, channels)."""
    # One vector at a time, and not as y * scale + shift: where a thread holds whole rows of the tile (sm_100) each
    # live vector costs it BLOCK_N registers. Subtracting the mean before scaling also loses less to cancellation.
    if epilogue.bias is not None:
        bias = tl.load(epilogue.bias + channels, mask=live_channels, other=0.0).to(tl.float32)
        y += tl.expand_dims(bias, AXIS)
    if epilogue.bn_mean is not None:
        mean = tl.load(epilogue.bn_mean + channels, mask=live_channels, other=0.0).to(tl.float32)
        y -= tl.expand_dims(mean, AXIS)
    if epilogue.bn_var is not None:
        variance = tl.load(epilogue.bn_var + channels, mask=live_channels, other=1.0).to(tl.float32)
        y *= tl.expand_dims(tl.rsqrt(variance + tl.cast(epilogue.eps, tl.float32)), AXIS)
    if epilogue.bn_weight is not None:
        weight = tl.load(epilogue.bn_weight + channels, mask=live_channels, other=0.0).to(tl.float32)
        y *= tl.expand_dims(weight, AXIS)
    if epilogue.bn_bias is not None:
        bias = tl.load(epilogue.bn_bias + channels, mask=live_channels, other=0.0).to(tl.float32)
        y += tl.expand_dims(bias, AXIS)
    return y


@jit
def activated(y, ACTIVATION: tl.constexpr):
    """One of the activations. NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@jit
def rescaled(acc, channels, live_channels, epilogue):
    """fma(float(sum), M, B) of a tile of sums of bytes or of e4m3."""
    if epilogue.filter_sums is not None:
        acc += 128 * tl.load(epilogue.filter_sums + channels, mask=live_channels, other=0)[None, :]
    multiplier = tl.load(epilogue.multiplier + channels, mask=live_channels, other=0.0)
    bias = tl.load(epilogue.bias + channels, mask=live_channels, other=0.0)
    return tl.fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])


@jit
def limited(y, epilogue):
    """min(max(y, low), high), to be stored in e4m3. Of bytes rint of that, half to even, in the last byte of an int32.
    NaN gives low there."""
    if epilogue.out.dtype.element_ty == tl.float8e4nv:
        y = tl.maximum(y, tl.cast(epilogue.low, tl.float32), propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, tl.cast(epilogue.high, tl.float32), propagate_nan=tl.PropagateNan.ALL)
    else:
        y = tl.maximum(y, tl.cast(epilogue.low, tl.float32))
        y = tl.minimum(y, tl.cast(epilogue.high, tl.float32))
        y = (y + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2**23, whose last bit counts ones
    return y


@jit
def apply_epilogue(
    acc, first_row, channels, live_channels, column, epilogue, M, K, P, Q,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Finish a tile of sums and store it. M: how many rows there are in ROWS."""
    IS_QUANTIZED: tl.constexpr = epilogue.out.dtype.element_ty.primitive_bitwidth == 8
    if IS_QUANTIZED:
        y = rescaled(acc, channels, live_channels, epilogue)
    else:
        y = normalised(acc, channels, live_channels, epilogue, AXIS=0)

    rows = first_row + tl.arange(0, BLOCK_M)
    live_rows = rows < M
    if ROWS == "halo":
        padded = rows // (Q + 1)
        is_inside = (rows - padded * (Q + 1) < Q) & (padded % (P + 1) < P)
    # the tile's place is a 64-bit scalar, the places within it are 32-bit: fewer registers
    if epilogue.residual is not None:
        live_residual = live_rows & is_inside if ROWS == "halo" else live_rows
        first = _row_in(first_row, column, P, Q, ROWS, RESIDUAL)
        offsets = (_row_in(rows, column, P, Q, ROWS, RESIDUAL) - first)[:, None] * K + channels[None, :]
        mask = live_residual[:, None] & live_channels[None, :]
        skip = tl.load(epilogue.residual + first.to(tl.int64) * K + offsets, mask=mask, other=0.0).to(tl.float32)
        if IS_QUANTIZED:
            y = tl.fma(skip, tl.cast(epilogue.residual_scale, tl.float32), y)
        else:
            y += skip
    if IS_QUANTIZED:
        y = limited(y, epilogue)
    else:
        y = activated(y, ACTIVATION)

    if ROWS == "halo" and OUT == "halo":
        y = tl.where(is_inside[:, None], y, 0)
    elif ROWS == "halo":
        live_rows &= is_inside
    first = _row_in(first_row, column, P, Q, ROWS, OUT)
    out = epilogue.out + first.to(tl.int64) * K
    offsets = (_row_in(rows, column, P, Q, ROWS, OUT) - first)[:, None] * K + channels[None, :]
    stored = live_rows[:, None] & live_channels[None, :]
    tl.store(out + offsets, y.to(epilogue.out.dtype.element_ty), mask=stored)
    if ROWS != "halo" and OUT == "halo":
        _write_halo(out, offsets, stored, rows, column, K, P, Q, ROWS)


@jit
def finish(
    acc, first_row, channels, live_channels, column, part, epilogue, M, K, P, Q,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """The end of a kernel that sums the whole reduction, or one part of it into partial[part, row, k]."""
    if SPLIT_K == 1:
        apply_epilogue(
            acc, first_row, channels, live_channels, column, epilogue, M, K, P, Q,
            ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M,
        )  # fmt: skip
    else:
        rows = first_row + tl.arange(0, BLOCK_M)
        pitch = K * Q if ROWS == "lines" else K
        place = part.to(tl.int64) * M * pitch + first_row.to(tl.int64) * pitch
        if ROWS == "lines":
            place += column * K
        offsets = tl.arange(0, BLOCK_M)[:, None] * pitch + channels[None, :]
        tl.store(epilogue.partial + place + offsets, acc, mask=(rows < M)[:, None] & live_channels[None, :])


@jit
def sum_parts_kernel(
    epilogue, M, K, P, Q,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # row m in ROWS, which is "compact" or "halo", channel k. The parts are added in order: the same sum every time
    num_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0)
    first_row = tile // num_n * BLOCK_M
    channels = tile % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_channels = channels < K
    live = (first_row + tl.arange(0, BLOCK_M) < M)[:, None] & live_channels[None, :]
    offsets = tl.arange(0, BLOCK_M)[:, None] * K + channels[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=epilogue.partial.dtype.element_ty)
    for part in range(SPLIT_K):
        place = (tl.cast(part, tl.int64) * M + first_row) * K
        acc += tl.load(epilogue.partial + place + offsets, mask=live, other=0.0)
    apply_epilogue(
        acc, first_row, channels, live_channels, 0, epilogue, M, K, P, Q,
        ACTIVATION, ROWS, RESIDUAL, OUT, BLOCK_M,
    )  # fmt: skip
