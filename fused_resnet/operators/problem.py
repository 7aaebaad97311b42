"""What one fused operator is asked to do, as a value: shapes, dtypes, epilogue. No tensors, no kernels.

Each call makes the problem from its operands (`describe`). Backends look at the problem and at nothing else when they
say why they cannot run it. Measurements are kept under it.

Letters as in cuDNN and CUTLASS: x is (N, C, H, W), the weight (K, C/groups, R, S), the output (N, K, P, Q).
"""

from __future__ import annotations

import re
from typing import NamedTuple, Union

import torch

ACTIVATIONS = ("none", "relu", "relu6", "silu")

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BYTE_DTYPES = (torch.uint8, torch.int8)
FLOAT8 = torch.float8_e4m3fn
SHORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def output_size(extent: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """How many windows of a filter fit into an extent of x, along one axis: the size of the output."""
    return (extent + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


class ConvProblem(NamedTuple):
    """act(BN_eval(conv(x, w) + bias) + residual) as a value.

    `has_bn` says that at least one BN vector is live; `has_bias` that a convolution bias (or an already folded BN)
    is. Activations and weights are channels_last: NHWC and KRSC in memory.

    dtype: of x. Where that is uint8, int8 or float8_e4m3fn this is a convolution of quantized tensors
    (`quantized.conv_act`), with a bias and without BN: another operator, whose backends are its own.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str
    has_bn: bool
    has_bias: bool
    has_residual: bool
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> str:
        if self.dtype in BYTE_DTYPES:
            return "conv_int8"
        return "conv_float8" if self.dtype == FLOAT8 else "conv_bn_act"

    @property
    def output_dtype(self) -> torch.dtype:
        """That of x. Of bytes, uint8 behind a ReLU or ReLU6, else int8."""
        if self.dtype not in BYTE_DTYPES:
            return self.dtype
        return torch.int8 if self.activation == "none" else torch.uint8

    @property
    def P(self) -> int:
        return output_size(self.H, self.R, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        return output_size(self.W, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.P, self.Q)

    @property
    def reduction(self) -> int:
        """Terms in each output's dot product: R * S * C / groups."""
        return self.R * self.S * (self.C // self.groups)

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution with stride 1 and no padding: a plain GEMM over the rows (n, h, w)."""
        return (self.R, self.S) == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def reads_x(self) -> bool:
        """Whether any window reaches a pixel of x. Where none does, the convolution is 0."""
        if self.H and self.W and self.dilation == (1, 1) and self.padding[0] < self.R and self.padding[1] < self.S:
            return True  # the first window does: the usual case, found quickly, since this is asked at every call
        reaches_row = _reaches(self.H, self.P, self.R, self.stride[0], self.padding[0], self.dilation[0])
        return reaches_row and _reaches(self.W, self.Q, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution; the epilogue is not counted."""
        return 2 * self.N * self.P * self.Q * self.K * self.reduction

    @property
    def bytes_moved(self) -> int:
        """The least a kernel can move: x, w and the residual read once, the output written once."""
        element = self.dtype.itemsize
        outputs = self.N * self.K * self.P * self.Q
        inputs = self.N * self.C * self.H * self.W + self.K * self.reduction
        return element * (inputs + outputs * (2 if self.has_residual else 1))

    @property
    def bytes_of_two_passes(self) -> int:
        """With one pass for the convolution and one for all that follows."""
        return self.bytes_moved + 2 * self.N * self.K * self.P * self.Q * self.dtype.itemsize

    @property
    def bytes_unfused(self) -> int:
        """With conv, BN, addition and activation as a pass over memory each, which reads and writes its tensors."""
        extra_passes = self.has_bn + self.has_residual + (self.activation != "none")
        outputs = self.N * self.K * self.P * self.Q
        return self.bytes_moved + 2 * extra_passes * outputs * self.dtype.itemsize

    def __str__(self) -> str:
        epilogue = "+".join(
            part
            for part, present in (("bn", self.has_bn), ("bias", self.has_bias), ("add", self.has_residual))
            if present
        )
        dims = f"{self.N}x{self.C}x{self.H}x{self.W} -> {self.K}, {self.R}x{self.S}"
        extra = "".join(
            f" {name}{pair_text(value)}"
            for name, value, default in (
                ("s", self.stride, (1, 1)),
                ("p", self.padding, (0, 0)),
                ("d", self.dilation, (1, 1)),
                ("g", self.groups, 1),
            )
            if value != default
        )
        return f"{dims}{extra} {dtype_name(self.dtype)} {epilogue or 'plain'} {self.activation}"


def _reaches(extent: int, outputs: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    if extent >= stride and extent > dilation * (taps - 1):
        return True  # no step is long enough to pass x by
    starts = range(-padding, outputs * stride - padding, stride)
    return any(0 <= start + tap * dilation < extent for start in starts for tap in range(taps))


class AddReluProblem(NamedTuple):
    """max(a + b, 0) over tensors of one shape and one dense layout (`is_dense`), or arbitrary strides."""

    shape: tuple[int, ...]
    same_dense_layout: bool
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> str:
        return "add_relu"

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes_moved(self) -> int:
        return 3 * self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {dtype_name(self.dtype)}"


class BnActProblem(NamedTuple):
    """act(batch_norm(x) + residual) as a value, with the batch's statistics where it `is_training`.

    Maps lie in NHWC where `is_nhwc`, else in NCHW. A map of one pixel is both, and counts as NHWC.
    """

    N: int
    C: int
    H: int
    W: int
    activation: str
    is_training: bool
    has_residual: bool
    is_nhwc: bool
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> str:
        return "bn_act"

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def values(self) -> int:
        """Values of a channel."""
        return self.N * self.H * self.W

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows a map has, and of how many values. A row is a pixel in NHWC, in NCHW a plane of an image."""
        return (self.values, self.C) if self.is_nhwc else (self.N * self.C, self.H * self.W)

    @property
    def has_mask(self) -> bool:
        """Whether the gradient needs a bit for each output: whether it passes the activation there."""
        return self.activation in ("relu", "relu6")

    @property
    def mask_shape(self) -> tuple[int, int]:
        """The shape of the bits, in uint8: a line of whole bytes per row. Bit i of byte j is for value 8j + i."""
        rows, length = self.rows
        return (rows, (length + 7) // 8) if self.has_mask else (0, 0)

    @property
    def bytes_moved(self) -> int:
        """By two passes over x in training, else one."""
        maps = 2 + self.is_training + self.has_residual
        return maps * self.values * self.C * self.dtype.itemsize

    def __str__(self) -> str:
        mode, layout = "training" if self.is_training else "eval", "NHWC" if self.is_nhwc else "NCHW"
        added = "bn+add" if self.has_residual else "bn"
        return f"{self.N}x{self.C}x{self.H}x{self.W} {layout} {dtype_name(self.dtype)} {added} {self.activation} {mode}"


class ChainProblem(NamedTuple):
    """A bottleneck from its 3x3 on, and the first 1x1 of the block behind it, as a value.

        t = act(conv3x3(x) + bias),  y = act(conv1x1(t) + bias + residual),  reduced = act(conv1x1(y) + bias)

    x and t have C channels, the residual and y K, and reduced L: 0 where there is no such block. The 3x3 has stride 1
    and padding 1. All are dense NHWC. t and y are rounded to dtype before they are multiplied.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    L: int
    activation: str
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> str:
        return "bottleneck_chain"

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.H, self.W)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        return (self.N, self.L, self.H, self.W) if self.L else (0,)

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def convolutions(self) -> tuple[ConvProblem, ...]:
        """The two or three of them one by one, in order."""

        def conv(C: int, K: int, side: int, has_residual: bool) -> ConvProblem:
            window = (side, side, (1, 1), (side // 2,) * 2, (1, 1), 1)
            epilogue = (self.activation, False, True, has_residual)
            return ConvProblem(self.N, C, self.H, self.W, K, *window, *epilogue, self.dtype, self.device)

        both = (conv(self.C, self.C, 3, False), conv(self.C, self.K, 1, True))
        return (*both, conv(self.K, self.L, 1, False)) if self.L else both

    @property
    def flops(self) -> int:
        return sum(conv.flops for conv in self.convolutions)

    @property
    def bytes_moved(self) -> int:
        """The least a kernel can move: x, the residual and the weights read once, y and reduced written once."""
        weights = sum(conv.K * conv.reduction for conv in self.convolutions)
        return self.dtype.itemsize * (self.N * self.H * self.W * (self.C + 2 * self.K + self.L) + weights)

    def __str__(self) -> str:
        behind = f" -> {self.L}" if self.L else ""
        shape = f"{self.N}x{self.C}x{self.H}x{self.W} -> {self.K}{behind}"
        return f"{shape} chain {dtype_name(self.dtype)} {self.activation}"


class MaxPoolProblem(NamedTuple):
    """act(max_pool(x) + bias) in windows of R x S, of the plans alone: no operator of torch's registry."""

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    activation: str
    has_bias: bool
    dtype: torch.dtype
    device: str

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        P = output_size(self.H, self.R, self.stride[0], self.padding[0], 1)
        Q = output_size(self.W, self.S, self.stride[1], self.padding[1], 1)
        return (self.N, self.C, P, Q)

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        window = f"{self.R}x{self.S} s{pair_text(self.stride)} p{pair_text(self.padding)}"
        epilogue = f"{'bias' if self.has_bias else 'plain'} {self.activation}"
        return f"{self.N}x{self.C}x{self.H}x{self.W} max {window} {dtype_name(self.dtype)} {epilogue}"


Problem = Union[ConvProblem, AddReluProblem, BnActProblem, ChainProblem]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def short_name(dtype: torch.dtype) -> str:
    """The key of a dtype in SHORT_DTYPES; for others as torch calls them."""
    return {known: short for short, known in SHORT_DTYPES.items()}.get(dtype, dtype_name(dtype))


def pair_text(value) -> str:
    if isinstance(value, int):
        return str(value)
    return str(value[0]) if value[0] == value[1] else f"({value[0]}, {value[1]})"


_PROBLEM = re.compile(
    r"(\d+)x(\d+)x(\d+)x(\d+) -> (\d+), (\d+)x(\d+)((?: [spd](?:\d+|\(\d+, \d+\))| g\d+)*) (\w+) ([a-z+]+) (\w+)"
)


def parsed_problem(text: str, device: str) -> ConvProblem:
    """The convolution whose str() this is, on a kind of device. Raises ValueError for anything else."""
    found = _PROBLEM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no convolution such as '8x64x56x56 -> 64, 3x3 p1 float16 bias relu'.")
    N, C, H, W, K, R, S = (int(number) for number in found.groups()[:7])
    window, dtype, epilogue, activation = found.groups()[7:]
    pairs = {"s": (1, 1), "p": (0, 0), "d": (1, 1), "g": (1, 1)}
    for name, value in re.findall(r"([spdg])(\d+|\(\d+, \d+\))", window):
        first, *rest = (int(number) for number in re.findall(r"\d+", value))
        pairs[name] = (first, rest[0] if rest else first)
    parts = epilogue.split("+")
    problem = ConvProblem(
        N, C, H, W, K, R, S, pairs["s"], pairs["p"], pairs["d"], pairs["g"][0], activation,
        "bn" in parts, "bias" in parts, "add" in parts, getattr(torch, dtype, torch.int32), device,
    )  # fmt: skip
    if (
        problem.dtype not in (*FLOAT_DTYPES, *BYTE_DTYPES, FLOAT8)
        or activation not in ACTIVATIONS
        or str(problem) != text.strip()
    ):
        raise ValueError(f"{text!r} is no convolution: its dtype, epilogue or activation is not known.")
    if min(N, C, K, R, S, *problem.stride, *problem.dilation, problem.groups) < 1:
        raise ValueError(f"{text!r} is no convolution: one of its sizes is 0.")
    if C % problem.groups or K % problem.groups or min(problem.P, problem.Q) < 1:
        raise ValueError(f"{text!r} has no output, or channels that cannot be split into its groups.")
    return problem
