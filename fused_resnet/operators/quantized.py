"""The contract of int8 and of e4m3: what kernels give, and a reference that gives it.

A tensor has one scale, and no zero point: u8 where it is never negative, s8 elsewhere. Weights are s8 with a scale per
output channel, and sums are exact int32. Then, in fp32, with one rounding for each operation:

    y = fma(float(sum), M, B)        M = sx*sw/sy,  B = bias/sy
    y = fma(float(skip), R, y)       R = sr/sy,     with a residual
    q = rint(min(max(y, low), high)) half to even;  NaN gives low

M, B and R are computed in fp64 and rounded once. Every kernel gives these bytes.

A linear layer of the means of u8 maps is two convolutions, of the lower and of the upper byte of each map's sum. Its
result is fp32:

    y = fma(float(low), M, B)        M = sx*sw/pixels,  B = bias
    y = fma(float(high), 256*M, y)

Other linear layers are of vectors in fp32, whose values they take as 16 bits in two bytes. Result: fp32, too.

    q = rint(min(max(v * (256/s), low), high))    low, high: -32768 and 32767, or 0 and 65535
    y = act(fma(float(upper), 256*M, fma(float(lower), M, B)))        M = s/256*sw,  B = bias

A gate is fp32. It is applied to a map of bytes:

    y = float(x) * (f(gate) * G)     G = sx/sy,  f: `sigmoid` or `hardsigmoid`, whose operations are in one order
    y = fma(float(skip), R, y), and then q as above

In e4m3 (torch.float8_e4m3fn) tensors and weights have scales likewise, and a sum is rounded to fp32 once. The end is

    q = e4m3(min(max(y, low), high)) half to even;  NaN stays NaN

Tensor cores sum such products with fewer bits than fp32 has, so kernels of e4m3 have a bound instead (`float8`).
Nothing here is fast and nothing here is shared with a kernel.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

# 255 * 127 * K stays below 2**31 in magnitude, and so does every partial sum, in any order.
LARGEST_REDUCTION = 66_310
# The same with weights of -128, which `quantized_weight` does not give.
LARGEST_REDUCTION_OF_LEAST_WEIGHTS = 65_793
# The sum of so many u8 fits two bytes.
MOST_PIXELS_OF_A_MEAN = 257
ACTIVATIONS = ("none", "relu", "relu6")
FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0


class Quantized(NamedTuple):
    """How a tensor is kept in bytes: x is about scale * q. scale: positive, finite; kernels read it in fp32."""

    scale: float
    is_signed: bool

    @property
    def low(self) -> float:
        return -128.0 if self.is_signed else 0.0

    @property
    def high(self) -> float:
        return 127.0 if self.is_signed else 255.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.is_signed else torch.uint8

    def __str__(self) -> str:
        return f"{'s8' if self.is_signed else 'u8'} {self.scale:.4g}"


class Float8(NamedTuple):
    """How a tensor is kept in e4m3: x is about scale * q. scale: positive, finite; kernels read it in fp32."""

    scale: float

    @property
    def is_signed(self) -> bool:
        return True

    @property
    def low(self) -> float:
        return -LARGEST_FLOAT8

    @property
    def high(self) -> float:
        return LARGEST_FLOAT8

    @property
    def dtype(self) -> torch.dtype:
        return FLOAT8

    def __str__(self) -> str:
        return f"e4m3 {self.scale:.4g}"


class Wide(NamedTuple):
    """How a linear layer takes vectors, which are kept in fp32: as 16 bits, x is about scale / 256 * q."""

    scale: float
    is_signed: bool

    @property
    def low(self) -> float:
        return -32768.0 if self.is_signed else 0.0

    @property
    def high(self) -> float:
        return 32767.0 if self.is_signed else 65535.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __str__(self) -> str:
        return f"{'s16' if self.is_signed else 'u16'} {self.scale / 256:.4g}"


Kept = Union[Quantized, Float8, Wide]


class Epilogue(NamedTuple):
    """What follows a convolution's sums. multiplier, bias: (K,) fp32. residual: R, an fp32 value, 0 without one.

    dtype: of the result, uint8, int8 or float8_e4m3fn; float32 of a linear layer, whose low and high are infinite.
    """

    multiplier: Tensor
    bias: Tensor
    residual: float
    low: float
    high: float
    dtype: torch.dtype


def quantized_over(least: float, largest: float, is_signed: Optional[bool] = None) -> Quantized:
    """How values from `least` to `largest` are kept: u8 with largest / 255, or s8 with max(-least, largest) / 127.

    is_signed: whether s8; default, where some are negative. Where all are 0, or `is_too_small`, the scale is 1. Raises
    ValueError for no range.
    """
    _check_range("quantized_over", least, largest)
    is_signed = least < 0 if is_signed is None else is_signed
    scale = max(-least, largest) / 127 if is_signed else max(largest, 0.0) / 255
    return Quantized(1.0 if is_too_small(least, largest) else scale, is_signed)


def kept_over(least: float, largest: float, dtype: torch.dtype, activation: Optional[str] = None) -> Kept:
    """How values in this range are kept in int8 or e4m3.

    activation: of the convolution that gives them, which says whether its bytes are signed; None: of anything else.
    """
    if dtype == FLOAT8:
        return float8_over(least, largest)
    return quantized_over(least, largest, {"none": True, "relu": False, "relu6": False}.get(activation or ""))


def is_too_small(least: float, largest: float) -> bool:
    """Whether values from `least` to `largest` have no scale: in fp32 it would be subnormal, with few digits, or 0."""
    return max(-least, largest) / 255 < torch.finfo(torch.float32).tiny


def float8_over(least: float, largest: float) -> Float8:
    """How values from `least` to `largest` are kept in e4m3: with max(-least, largest) / 448, or 1 as above.

    Raises ValueError for no range.
    """
    _check_range("float8_over", least, largest)
    scale = max(-least, largest) / LARGEST_FLOAT8
    return Float8(1.0 if scale < torch.finfo(torch.float32).tiny else scale)


def _check_range(caller: str, least: float, largest: float) -> None:
    if not (math.isfinite(least) and math.isfinite(largest) and least <= largest):
        raise ValueError(f"{caller}: values from {least} to {largest} have no scale")


def quantize(x: Tensor, how: Kept) -> Tensor:
    """rint(min(max(x * (1 / scale), low), high)) in fp32, 1 / scale rounded once: in how.dtype. NaN gives low.

    In e4m3 it is rounded to that instead of to an integer, and NaN stays NaN.
    """
    return _kept(x.float() * _fp32(1 / how.scale), how.low, how.high, how.dtype)


def dequantize(q: Tensor, how: Kept, dtype: torch.dtype = torch.float32) -> Tensor:
    """float(q) * float(scale) in fp32, then rounded to `dtype`."""
    return (q.float() * _fp32(how.scale)).to(dtype)


def quantized_weight(
    weight: Tensor, dtype: torch.dtype = torch.int8, scales: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """(K, C, R, S) of any float dtype as (s8, its scales (K,) in fp64): rint(w / scale), scale = max|w| / 127 of each
    output channel, 1 where all of it is 0. Raises ValueError where a weight is not finite.

    dtype: or float8_e4m3fn, with max|w| / 448 and the value rounded to e4m3 from fp64 by way of fp32. scales: others
    for s8, from -128 on; a scale may be negative, and where it is 0 so is the weight.
    """
    weight = weight.detach().double()
    if not weight.isfinite().all():
        raise ValueError("quantized_weight: a weight is NaN or infinite, and has no scale")
    if scales is not None:
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        return (weight / scales.view(-1, 1, 1, 1)).round().clamp(-128, 127).to(torch.int8), scales
    largest = weight.abs().flatten(1).amax(1) if weight.numel() else weight.new_zeros(weight.shape[0])
    limit = LARGEST_FLOAT8 if dtype == FLOAT8 else 127.0
    scales = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    scaled = weight / scales.view(-1, 1, 1, 1)
    if dtype == FLOAT8:
        return scaled.clamp(-limit, limit).float().to(FLOAT8), scales
    return scaled.round().clamp(-limit, limit).to(torch.int8), scales


def epilogue_of(
    x: Kept,
    weight_scales: Tensor,
    out: Kept,
    bias: Optional[Tensor] = None,
    residual: Optional[Kept] = None,
    activation: str = "none",
) -> Epilogue:
    """The constants of act(conv(x, w) + bias + residual), kept as `out`: computed in fp64, rounded once to fp32.

    weight_scales: (K,), of `quantized_weight`. bias: (K,) of any float dtype. activation: "none", which gives s8;
    "relu", "relu6", which give u8, the latter at most 6. In e4m3 all give e4m3, the last two nothing below 0. Raises
    ValueError for other pairs, other activations and constants that fp32 does not hold.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"epilogue_of: the activations are {', '.join(ACTIVATIONS)}, not {activation}")
    is_float8 = out.dtype == FLOAT8
    if not is_float8 and out.is_signed != (activation == "none"):
        raise ValueError(f"epilogue_of: activation {activation} does not give {out.dtype}")
    scales = weight_scales.double()
    multiplier = (x.scale * scales / out.scale).float()
    shift = (torch.zeros_like(scales) if bias is None else bias.to(scales) / out.scale).float()
    factor = 0.0 if residual is None else _fp32(residual.scale / out.scale)
    if not (multiplier.isfinite().all() and shift.isfinite().all() and math.isfinite(factor)):
        raise ValueError(f"epilogue_of: an output of scale {out.scale} has constants beyond fp32")
    high = min(out.high, _fp32(6 / out.scale)) if activation == "relu6" else out.high
    low = 0.0 if is_float8 and activation != "none" else out.low
    return Epilogue(multiplier, shift, factor, low, high, out.dtype)


def epilogue_of_linear(x: Quantized, pixels: int, weight_scales: Tensor, bias: Optional[Tensor] = None) -> Epilogue:
    """The constants of a linear layer of the means of maps of so many pixels, kept as x: in fp64, rounded once to fp32.

    Raises ValueError where there is a reason in `why_no_linear`, and for constants that fp32 does not hold.
    """
    if (reason := why_no_linear(x, pixels)) is not None:
        raise ValueError(f"epilogue_of_linear: {reason}")
    scales = weight_scales.double()
    multiplier = (x.scale * scales / pixels).float()
    shift = (torch.zeros_like(scales) if bias is None else bias.to(scales)).float()
    if not ((256 * multiplier).isfinite().all() and shift.isfinite().all()):
        raise ValueError(f"epilogue_of_linear: an input of scale {x.scale} has constants beyond fp32")
    return Epilogue(multiplier, shift, 0.0, -math.inf, math.inf, torch.float32)


def why_no_linear(x: Quantized, pixels: int) -> Optional[str]:
    """Why a linear layer of the means of such maps has no int8 form, if it has none."""
    if x.is_signed:
        return "a linear layer in int8 is of means of u8 maps"
    if pixels > MOST_PIXELS_OF_A_MEAN:
        return f"sums of {pixels} bytes may leave two bytes (at most {MOST_PIXELS_OF_A_MEAN} stay)"
    return None


def linear_of_means(q: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """A linear layer of the means of the maps q, (N, C, H, W) u8: fp32, (N, K, 1, 1).

    weight: (K, C, 1, 1), s8. epilogue: of `epilogue_of_linear`. Raises TypeError for other dtypes, ValueError where
    maps have more than MOST_PIXELS_OF_A_MEAN pixels.
    """
    if q.dtype != torch.uint8:
        raise TypeError(f"linear_of_means: q must be uint8, not {q.dtype}")
    if (reason := why_no_linear(Quantized(1.0, False), q.shape[2] * q.shape[3])) is not None:
        raise ValueError(f"linear_of_means: {reason}")
    total = q.long().sum((2, 3), keepdim=True)
    low, high = (total % 256).to(torch.uint8), (total // 256).to(torch.uint8)
    multiplier, bias = (vector.to(q.device).view(1, -1, 1, 1) for vector in epilogue[:2])
    return fma(sums(high, weight).float(), 256 * multiplier, fma(sums(low, weight).float(), multiplier, bias))


def epilogue_of_vectors(x: Wide, weight_scales: Tensor, bias: Optional[Tensor] = None) -> Epilogue:
    """The constants of a linear layer of vectors: in fp64, rounded once to fp32.

    Raises ValueError for constants that fp32 does not hold.
    """
    scales = weight_scales.double()
    multiplier = (x.scale / 256 * scales).float()
    shift = (torch.zeros_like(scales) if bias is None else bias.to(scales)).float()
    if not ((256 * multiplier).isfinite().all() and shift.isfinite().all() and math.isfinite(_fp32(256 / x.scale))):
        raise ValueError(f"epilogue_of_vectors: an input of scale {x.scale} has constants beyond fp32")
    return Epilogue(multiplier, shift, 0.0, -math.inf, math.inf, torch.float32)


def linear_of_vectors(v: Tensor, how: Wide, weight: Tensor, epilogue: Epilogue, activation: str = "none") -> Tensor:
    """A linear layer of vectors in fp32, (N, C, 1, 1), taken as `how` says: fp32, (N, K, 1, 1).

    weight: (K, C, 1, 1), s8. epilogue: of `epilogue_of_vectors`. activation: also "silu".
    """
    y = v.float() * _fp32(256 / how.scale)
    y = torch.where(y > how.low, y, how.low)  # NaN is not, and gives low
    q = torch.where(y < how.high, y, how.high).round().int()
    low, high = (q & 255).to(torch.uint8), (q >> 8).to(torch.int8 if how.is_signed else torch.uint8)
    multiplier, bias = (vector.to(v.device).view(1, -1, 1, 1) for vector in epilogue[:2])
    y = fma(sums(high, weight).float(), 256 * multiplier, fma(sums(low, weight).float(), multiplier, bias))
    return {"none": lambda: y, "relu": y.relu, "relu6": lambda: y.clamp(0, 6), "silu": lambda: y * sigmoid(y)}[
        activation
    ]()


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of fp32, within a few units in the last place: the operations of csrc/cpu/blocked/gating.h.

    exp(y) = 2^n * exp(r) with |r| <= log(2) / 2 (Cody and Waite), and exp(r) by the polynomial of Cephes' expf.
    """

    def of(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=x.device)

    y = (-x).clamp(of(-88.02969), of(88.72283))  # NaN stays
    shifted = fma(y, of(1.44269504), of(12582912.0))  # sums are integers, and n lies in their lowest bits
    n = shifted - 12582912.0
    r = fma(n, of(2.12194440e-4), fma(n, of(-0.693359375), y))
    p = of(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p.expand_as(r), r, of(term))
    exponential = fma(p, r * r, r) + 1
    scale = (shifted.view(torch.int32) + 127 << 23).view(torch.float32)
    return 1 / fma(exponential, scale, of(1.0))


def hardsigmoid(x: Tensor) -> Tensor:
    """min(max(fma(x, 1/6, 1/2), 0), 1) in fp32."""
    return fma(x, torch.tensor(1 / 6, device=x.device), torch.tensor(0.5, device=x.device)).clamp(0, 1)


def epilogue_of_gate(
    x: Quantized, out: Quantized, residual: Optional[Quantized] = None, activation: str = "none"
) -> Epilogue:
    """The constants of act(x * f(gate) + residual), kept as `out`: G as the only multiplier, and R.

    activation: "none", "relu" and "relu6", the latter two for u8. Raises ValueError for others, and for constants that
    fp32 does not hold.
    """
    if activation not in ACTIVATIONS or activation != "none" and out.is_signed:
        raise ValueError(f"epilogue_of_gate: activation {activation} does not give {out.dtype}")
    multiplier, factor = torch.tensor([x.scale / out.scale]), 0.0 if residual is None else residual.scale / out.scale
    if not (multiplier.isfinite().all() and math.isfinite(_fp32(factor))):
        raise ValueError(f"epilogue_of_gate: an output of scale {out.scale} has constants beyond fp32")
    high = min(out.high, _fp32(6 / out.scale)) if activation == "relu6" else out.high
    return Epilogue(multiplier.float(), torch.zeros(1), _fp32(factor), out.low, high, out.dtype)


def gate_act(
    x: Tensor, gate: Tensor, epilogue: Epilogue, function: str = "sigmoid", residual: Optional[Tensor] = None
) -> Tensor:
    """The bytes of act(x * f(gate) + residual). x, residual: u8 or s8. gate: fp32, (N, C, 1, 1).

    epilogue: of `epilogue_of_gate`. function: of `GATES`.
    """
    _check_kept("x", x)
    y = x.float() * (GATES[function](gate) * epilogue.multiplier.to(x.device))
    if residual is not None:
        _check_kept("the residual", residual)
        y = fma(residual.float(), torch.tensor(epilogue.residual, device=x.device), y)
    return _kept(y, epilogue.low, epilogue.high, epilogue.dtype)


GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": sigmoid, "hardsigmoid": hardsigmoid}


def conv_act(
    x_q: Tensor,
    w_q: Tensor,
    epilogue: Epilogue,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual_q: Optional[Tensor] = None,
) -> Tensor:
    """The bytes of a convolution and its epilogue, (N, K, P, Q), u8 or s8 as the epilogue says.

    x_q: (N, C, H, W), u8 or s8. w_q: (K, C/groups, R, S), s8. residual_q: of the output's shape, u8 or s8. Or all of
    them are e4m3, and so is what is returned. Raises TypeError for other dtypes, and ValueError where sums of bytes are
    longer than LARGEST_REDUCTION, or LARGEST_REDUCTION_OF_LEAST_WEIGHTS where a weight is -128.
    """
    return requantize(sums(x_q, w_q, stride, padding, dilation, groups), epilogue, residual_q)


def sums(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The exact int32 sums of a convolution of bytes: in fp64, which holds every integer up to 2**53. Of e4m3, the sums
    in fp32."""
    _check_kept("x", x)
    wanted = FLOAT8 if x.dtype == FLOAT8 else torch.int8
    if weight.dtype != wanted:
        raise TypeError(f"conv_act: the weight must be {str(wanted).removeprefix('torch.')}, not {weight.dtype}")
    if wanted == torch.int8 and (reason := why_not_reduced(weight.shape[1:].numel(), weight)) is not None:
        raise ValueError(f"conv_act: {reason}")
    # a product of two e4m3 is exact, and a sum of fewer than 2**17 of them in fp64 too: 36 bits each
    y = F.conv2d(x.cpu().double(), weight.cpu().double(), None, stride, padding, dilation, groups)
    return y.to(torch.float32 if wanted == FLOAT8 else torch.int32).to(x.device)


def why_not_reduced(reduction: int, weight: Optional[Tensor] = None) -> Optional[str]:
    """Why sums of so many products may leave int32, if they may. weight: s8 in any layout; without it, from -127 on."""
    if reduction > LARGEST_REDUCTION:
        return f"sums of {reduction:,} products may leave int32 (at most {LARGEST_REDUCTION:,} stay)"
    if reduction <= LARGEST_REDUCTION_OF_LEAST_WEIGHTS or weight is None or not (weight == -128).any():
        return None
    return (
        f"sums of {reduction:,} products with weights of -128 may leave int32 (at most "
        f"{LARGEST_REDUCTION_OF_LEAST_WEIGHTS:,} stay, and {LARGEST_REDUCTION:,} where no weight is below -127)"
    )


def requantize(total: Tensor, epilogue: Epilogue, residual: Optional[Tensor] = None) -> Tensor:
    """The epilogue alone, of int32 or fp32 sums (N, K, P, Q): the formula at the head of this module."""
    per_channel = (1, -1, 1, 1)
    multiplier, bias = (vector.to(total.device).view(per_channel) for vector in epilogue[:2])
    y = fma(total.float(), multiplier, bias)
    if residual is not None:
        _check_kept("the residual", residual)
        y = fma(residual.float(), torch.tensor(epilogue.residual, device=total.device), y)
    return _kept(y, epilogue.low, epilogue.high, epilogue.dtype)


def max_pool(q: Tensor, window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The largest bytes in windows of (N, C, H, W); what lies outside counts as the lowest. The scale stays."""
    _check_kept("q", q)
    return F.max_pool2d(q.float(), window, stride, padding).to(q.dtype)


def average_pool(q: Tensor, how: Kept) -> Tensor:
    """float(sum) * float(scale / count) over each whole map, scale / count in fp64 rounded once: fp32, (N, C, 1, 1)."""
    _check_kept("q", q)
    count, exact = q.shape[2] * q.shape[3], torch.float64 if q.dtype == FLOAT8 else torch.int64
    return q.to(exact).sum((2, 3), keepdim=True).float() * _fp32(how.scale / count)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32, rounded once to fp32, half to even.

    A product of two fp32 is exact in fp64. Its sum with c is rounded to odd there, which no later rounding mistakes
    for a tie.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # of the sum, exactly (Knuth's TwoSum)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)  # whether the true sum is larger in magnitude
    inexact = total.isfinite() & (error != 0) & (bits % 2 == 0)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()


def _kept(y: Tensor, low: float, high: float, dtype: torch.dtype) -> Tensor:
    if dtype == FLOAT8:
        return y.clamp(low, high).to(FLOAT8)  # which keeps NaN
    y = torch.where(y > low, y, low)  # NaN is not, and gives low
    return torch.where(y < high, y, high).round().to(dtype)


def _check_kept(name: str, q: Tensor) -> None:
    if q.dtype not in (torch.uint8, torch.int8, FLOAT8):
        raise TypeError(f"quantized: {name} must be uint8, int8 or float8_e4m3fn, not {q.dtype}")


def _fp32(value: float) -> float:
    """Rounded to fp32, half to even."""
    return torch.tensor(value, dtype=torch.float64).float().item()
