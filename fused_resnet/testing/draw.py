"""Random whole problems: shapes, windows, layouts, dtypes and values.

A case follows from (seed, index) alone, so a mismatch is reported as the call that shows it again:
`testing.check(testing.case_at(seed, index), backend)`.
"""

from __future__ import annotations

import random
from typing import Sequence

import torch
from torch import Tensor

from fused_resnet.choosing.case import AddReluOperands, Case
from fused_resnet.operators import quantized
from fused_resnet.operators.describe import add_relu_problem, conv_int8_problem, conv_problem
from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import ACTIVATIONS, BYTE_DTYPES, FLOAT8, FLOAT_DTYPES, output_size

Pair = tuple[int, int]
KINDS = ("any", "common", "strided", "int8", "float8_e4m3fn")
LAYOUTS = ("channels_last", "contiguous", "sliced", "expanded", "permuted")
# Triton's interpreter, the slowest backend, takes about a millisecond for each tile and step of the reduction
_MAX_TILE_STEPS = 150
_EPS = (1e-5, 1e-3, 1e-2)


def case_at(seed: int, index: int, device: str = "cpu", *, kind: str = "any") -> Case:
    """The case with this number: the same on every machine. kind: as `random_case`."""
    return random_case(random.Random(f"{seed}/{index}"), device, kind=kind)


def random_case(rng: random.Random, device: str = "cpu", *, kind: str = "any") -> Case:
    """A whole problem: shapes, window, epilogue, dtypes, memory layouts and values, awkward ones on purpose.

    kind: "any", or one of those that "any" draws too few of.
    "common": a convolution as plans of ResNets have it, with awkward sizes and values all the same. It is in fp32 (on
    CUDA fp16) or bf16, without BN, mostly with ReLU, and has channels in sixteens. Its window is 1x1, 3x3 with
    stride 1, or 3x3 with groups as wide as ResNeXt's.
    "strided": a convolution in bf16 with strides to 4 on maps of 1 to 33 rows and columns, where libraries err
    (`detours`).
    "int8": a convolution of bytes (`quantized`). Half of the windows are those of "common". "float8_e4m3fn": of e4m3.
    """
    if kind not in KINDS:
        raise ValueError(f"random_case: unknown kind {kind!r}; known ones are {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    draw = _Draw(rng, generator, device)
    if kind == "any" and rng.random() < 0.2:
        return _random_add_relu(draw)
    if kind == "float8_e4m3fn":
        return _random_float8(draw)
    return _random_int8(draw) if kind == "int8" else _random_conv(draw, kind)


class _Draw:
    """Tensors of random values in random layouts, made on the CPU so that every device gets the same."""

    def __init__(self, rng: random.Random, generator: torch.Generator, device: str) -> None:
        self.rng, self.generator, self.device = rng, generator, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def bytes(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """All values, or the two furthest apart alone, whose sums are the largest."""
        limits = torch.iinfo(dtype)
        drawn = torch.randint(limits.min, limits.max + 1, shape, generator=self.generator)
        if self.rng.random() < 0.1:
            drawn = torch.where(drawn * 2 > limits.min + limits.max, limits.max, limits.min)
        return drawn.to(dtype)

    def tensor(self, values: Tensor, dtype: torch.dtype, layouts: Sequence[str] = LAYOUTS) -> Tensor:
        layout = "contiguous" if self.rng.random() < 0.2 else self.rng.choice(layouts)
        return laid_out(values.to(dtype).to(self.device), layout)

    def vector(self, values: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
        return self.tensor(values, self.rng.choice(dtypes), ("contiguous", "contiguous", "sliced", "expanded"))

    def with_nonfinite(self, tensor: Tensor) -> Tensor:
        """A few NaN and infinities, where there is an element to replace."""
        flat = tensor.flatten().clone()
        for _ in range(self.rng.randint(1, 3) if flat.numel() else 0):
            flat[self.rng.randrange(flat.numel())] = self.rng.choice((torch.nan, torch.inf, -torch.inf))
        return flat.view(tensor.shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """These values with other strides; "expanded" repeats the first slice of the first dimension in stride 0."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and tensor.dim():
        poison = torch.nan if tensor.is_floating_point() else 85
        around = tensor.new_full([2 * size + 1 for size in tensor.shape], poison)
        view = around[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "expanded" and tensor.dim():
        return tensor[:1].expand_as(tensor)
    if layout == "permuted" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


def _random_conv(draw: _Draw, kind: str) -> Case:
    rng, is_common = draw.rng, kind == "common"
    common_dtypes = (torch.float32 if draw.device == "cpu" else torch.float16, torch.bfloat16)
    dtype = rng.choice(common_dtypes) if is_common else torch.bfloat16 if kind == "strided" else _random_dtype(rng)
    window, (N, C, H, W, K, R, S) = _common_window(rng) if is_common else _random_window(rng, kind == "strided")
    stride, padding, dilation, groups = window
    P, Q = (
        output_size(size, taps, step, pad, d)
        for size, pad, d, taps, step in zip((H, W), padding, dilation, (R, S), stride)
    )
    reduction = R * S * C // groups
    # fp16 ends at 65504, which its intermediates must not reach for nothing
    magnitude = rng.choice((1.0, 1.0, 1.0, 1e-3, 30.0) if dtype == torch.float16 else (1.0, 1.0, 1e-6, 1e4, 1e8))
    x, residual = draw.normal(N, C, H, W) * magnitude, draw.normal(N, K, P, Q) * magnitude
    if rng.random() < 0.1:
        x = draw.with_nonfinite(x)
        residual = draw.with_nonfinite(residual)
    vector_magnitude = min(magnitude, 1e3)  # vectors may be fp16 beside any x
    vector_dtypes = [dtype] * 3 + [d for d in FLOAT_DTYPES if d != torch.float64 or dtype == d]
    if rng.random() < 0.5:
        vector_dtypes = [rng.choice((dtype, torch.float32))]  # all alike, as in a model: ATen's batch_norm takes those
    spread = 1.0 if rng.random() < 0.7 else rng.choice((1e-10, 1e4))
    variance = (draw.normal(K).square() + 0.1) * spread
    vectors = {
        "bn_weight": draw.normal(K),
        "bn_bias": draw.normal(K) * vector_magnitude,
        "bn_mean": draw.normal(K) * vector_magnitude,
        "bn_var": variance,
    }
    some = tuple(rng.sample(list(vectors), rng.randint(1, 3)))
    has_bn = () if is_common else rng.choice(((), (), (), tuple(vectors), tuple(vectors), some))
    has_bias = 0.9 if is_common else 0.4  # folded BN leaves one
    operands = ConvOperands(
        draw.tensor(x, dtype),
        draw.tensor(draw.normal(K, C // groups, R, S) / reduction**0.5, dtype),
        **{name: draw.vector(vectors[name], vector_dtypes) for name in vectors if name in has_bn},
        eps=rng.choice(_EPS),
        bias=draw.vector(draw.normal(K) * vector_magnitude, vector_dtypes) if rng.random() < has_bias else None,
        residual=draw.tensor(residual, dtype) if rng.random() < 0.4 else None,
    )
    activations = (*ACTIVATIONS, "relu", "relu", "relu") if is_common else ACTIVATIONS
    return Case(conv_problem(operands, *window, rng.choice(activations)), operands)


def _random_int8(draw: _Draw) -> Case:
    rng = draw.rng
    window, (N, C, H, W, K, R, S), (P, Q) = _quantized_window(rng)
    groups = window[-1]
    activation, x_dtype = rng.choice(quantized.ACTIVATIONS), rng.choice((torch.uint8, torch.uint8, torch.int8))
    x, weight = draw.bytes(x_dtype, N, C, H, W), draw.bytes(torch.int8, K, C // groups, R, S).clamp(min=-127)
    residual = draw.bytes(rng.choice(BYTE_DTYPES), N, K, P, Q) if rng.random() < 0.5 else None
    epilogue = _random_epilogue(draw, K, R * S * C // groups, x_dtype, activation)
    operands = Int8Operands(
        draw.tensor(x, x_dtype),
        draw.tensor(weight, torch.int8),
        epilogue._replace(multiplier=epilogue.multiplier.to(draw.device), bias=epilogue.bias.to(draw.device)),
        None if residual is None else draw.tensor(residual, residual.dtype),
    )
    return Case(conv_int8_problem(operands, *window, activation), operands)


def _quantized_window(rng: random.Random) -> tuple[tuple[Pair, Pair, Pair, int], tuple[int, ...], Pair]:
    """(window, sizes, the output's (P, Q))."""
    window, sizes = _common_window(rng) if rng.random() < 0.5 else _random_window(rng)
    (stride, padding, dilation, _), (_, _, H, W, _, R, S) = window, sizes
    P = output_size(H, R, stride[0], padding[0], dilation[0])
    return window, sizes, (P, output_size(W, S, stride[1], padding[1], dilation[1]))


def _random_float8(draw: _Draw) -> Case:
    """With tensors that fill e4m3, or that are small in it, or NaN in places."""
    rng = draw.rng
    window, (N, C, H, W, K, R, S), (P, Q) = _quantized_window(rng)
    activation, reduction = rng.choice(quantized.ACTIVATIONS), R * S * C // window[-1]

    def values(*shape: int) -> Tensor:
        limit = quantized.LARGEST_FLOAT8
        return (draw.normal(*shape) * limit / rng.choice((1, 4, 4, 4, 400, 1e5))).clamp(-limit, limit)

    x, weight, residual = values(N, C, H, W), values(K, C // window[-1], R, S), values(N, K, P, Q)
    if rng.random() < 0.1:
        x, residual = (draw.with_nonfinite(one) for one in (x, residual))
    spread = ((x.nan_to_num(0, 0, 0).square().mean() * weight.square().mean()).sqrt().item() if N else 1) or 1e-3
    out = quantized.Float8(spread * reduction**0.5 / 110 * rng.uniform(0.3, 3))
    skip = quantized.Float8(out.scale * rng.uniform(0.1, 2))
    scales, bias = draw.normal(K).abs() + 0.1, draw.normal(K) * 50 * out.scale
    epilogue = quantized.epilogue_of(quantized.Float8(1.0), scales, out, bias, skip, activation)
    operands = Int8Operands(
        draw.tensor(x, FLOAT8),
        draw.tensor(weight, FLOAT8),
        epilogue._replace(multiplier=epilogue.multiplier.to(draw.device), bias=epilogue.bias.to(draw.device)),
        draw.tensor(residual, FLOAT8) if rng.random() < 0.5 else None,
    )
    return Case(conv_int8_problem(operands, *window, activation), operands)


def _random_epilogue(draw: _Draw, K: int, reduction: int, x_dtype: torch.dtype, activation: str) -> quantized.Epilogue:
    """From scales with which results fill the bytes, or with powers of two, by which many results are ties."""
    rng, is_signed = draw.rng, activation == "none"
    x_scale, weight_scales = 0.02 * rng.uniform(0.3, 3), (draw.normal(K).abs() + 0.1) * 1e-3
    typical_sum = (147 if x_dtype == torch.uint8 else 74) * 74 * reduction**0.5
    out = quantized.Quantized(x_scale * 1e-3 * typical_sum / 60 * rng.uniform(0.3, 3), is_signed)
    skip = quantized.Quantized(out.scale * rng.uniform(0.1, 2), True)
    kept_x = quantized.Quantized(x_scale, x_dtype == torch.int8)
    bias = draw.normal(K) * 50 * out.scale
    epilogue = quantized.epilogue_of(kept_x, weight_scales, out, bias, skip, activation)
    if rng.random() < 0.7:
        return epilogue
    multiplier = torch.full((K,), 2.0 ** -rng.randint(0, 16))
    return epilogue._replace(multiplier=multiplier, bias=(draw.normal(K) * 64).round().float() / 2, residual=0.5)


def _random_window(
    rng: random.Random, is_strided: bool = False
) -> tuple[tuple[Pair, Pair, Pair, int], tuple[int, ...]]:
    """((stride, padding, dilation, groups), (N, C, H, W, K, R, S)) of a convolution with an output, small enough."""
    while True:
        kind = rng.choice(("dense", "dense", "grouped", "depthwise", "pointwise"))
        R, S = (1, 1) if kind == "pointwise" else (rng.randint(1, 7), rng.randint(1, 7))
        if rng.random() < 0.4 and kind != "pointwise":
            R = S = 3
        C, K, groups = rng.randint(1, 70), rng.randint(1, 70), 1
        if kind == "grouped":
            groups = rng.randint(2, 8)
            C, K = groups * rng.randint(1, 70 // groups), groups * rng.randint(1, 70 // groups)
        elif kind == "depthwise":
            groups, K = C, C * rng.randint(1, max(1, 70 // C))
        stride = _pair(rng, (1, 2, 3, 4) if is_strided else (1, 1, 2, 3))
        padding = _pair(rng, (0, 1, 2, 3) if kind != "pointwise" else (0, 0, 0, 1))
        dilation = _pair(rng, (1, 1, 1, 2, 3))
        N = rng.choice((0, 1, 1, 1, 1, 2, 2, 2, 3, 4))
        H, W = (rng.randint(1, rng.choice((4, 33)) if is_strided else 19) for _ in range(2))
        P = output_size(H, R, stride[0], padding[0], dilation[0])
        Q = output_size(W, S, stride[1], padding[1], dilation[1])
        tiles = -(-N * P * Q // 64) * groups * -(-K // groups // 32)
        if P > 0 and Q > 0 and tiles * -(-R * S * C // groups // 32) <= _MAX_TILE_STEPS:
            return (stride, padding, dilation, groups), (N, C, H, W, K, R, S)


def _common_window(rng: random.Random) -> tuple[tuple[Pair, Pair, Pair, int], tuple[int, ...]]:
    """The same of the kind "common"."""
    padding = _pair(rng, (1, 1, 1, 0, 2, 7))
    N, C, K = rng.choice((0, 1, 1, 2, 3)), 16 * rng.randint(1, 6), 16 * rng.randint(1, 6)
    H, W = (rng.randint(max(1, 3 - 2 * pad), 23) for pad in padding)
    stride, groups = (1, 1), 1
    if rng.random() < 0.4:
        stride, width = _pair(rng, (1, 2)), rng.choice((4, 8, 16, 32))
        groups = rng.randint(2, max(2, 96 // width))
        C = K = groups * width
    elif rng.random() < 0.4:
        return ((1, 1), (0, 0), (1, 1), 1), (N, C, H, W, K, 1, 1)
    return (stride, padding, (1, 1), groups), (N, C, H, W, K, 3, 3)


def _random_dtype(rng: random.Random) -> torch.dtype:
    return rng.choice(3 * [dtype for dtype in FLOAT_DTYPES if dtype != torch.float64] + [torch.float64])


def _pair(rng: random.Random, values: Sequence[int]) -> Pair:
    first = rng.choice(values)
    return (first, first if rng.random() < 0.6 else rng.choice(values))


def _random_add_relu(draw: _Draw) -> Case:
    rng = draw.rng
    dims = rng.choice((0, 1, 2, 3, 4, 4, 4, 4, 4, 5))
    shape = [rng.choice((0, 1, 2, 3)) if dim == 0 else rng.randint(1, 17 if dims < 5 else 7) for dim in range(dims)]
    dtype = _random_dtype(rng)
    magnitude = rng.choice((1.0, 1.0, 1e-6, 1e4))  # 1e4: some sums of fp16 overflow
    a, b, grad = (draw.normal(*shape) * magnitude for _ in range(3))
    if rng.random() < 0.3:
        a, grad = draw.with_nonfinite(a), draw.with_nonfinite(grad)
    same_layout = rng.random() < 0.5  # the kernels' fast path
    layout = rng.choice(LAYOUTS)
    operands = AddReluOperands(
        *(draw.tensor(values, dtype, (layout,) if same_layout else LAYOUTS) for values in (a, b, grad))
    )
    return Case(add_relu_problem(operands.a, operands.b), operands)
