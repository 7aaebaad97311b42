"""What one fused operator is asked to do, as a value: shapes, dtypes, epilogue. No tensors, no kernels.

Each call makes the problem from its operands (`conv_problem`, `add_relu_problem`), which is also where bad input is
refused. Backends look at the problem and at nothing else when they say why they cannot run it. Measurements are kept
under it.

Letters as in cuDNN and CUTLASS: x is (N, C, H, W), the weight (K, C/groups, R, S), the output (N, K, P, Q).
"""

from __future__ import annotations

import functools
import operator
import re
from operator import attrgetter
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "silu")
VECTORS = ("bn_weight", "bn_bias", "bn_mean", "bn_var", "bias")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ConvOperands(NamedTuple):
    """The tensors of one conv_bn_act call. Vectors have length K; a None vector drops out of the formula."""

    x: Tensor
    weight: Tensor
    bn_weight: Optional[Tensor] = None
    bn_bias: Optional[Tensor] = None
    bn_mean: Optional[Tensor] = None
    bn_var: Optional[Tensor] = None
    eps: float = 1e-5
    bias: Optional[Tensor] = None
    residual: Optional[Tensor] = None

    @property
    def bn_vectors(self) -> dict[str, Optional[Tensor]]:
        return {name: getattr(self, name) for name in VECTORS[:4]}

    def map(self, fn) -> "ConvOperands":
        """The same operands with `fn` applied to every tensor among them."""
        return ConvOperands(*(fn(value) if isinstance(value, Tensor) else value for value in self))


class ConvProblem(NamedTuple):
    """act(BN_eval(conv(x, w) + bias) + residual) as a value.

    `has_bn` says that at least one BN vector is live; `has_bias` that a convolution bias (or an already folded BN)
    is. Activations and weights are channels_last: NHWC and KRSC in memory.
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
        return "conv_bn_act"

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1

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

    def __str__(self) -> str:
        epilogue = "+".join(
            part
            for part, present in (("bn", self.has_bn), ("bias", self.has_bias), ("add", self.has_residual))
            if present
        )
        dims = f"{self.N}x{self.C}x{self.H}x{self.W} -> {self.K}, {self.R}x{self.S}"
        extra = "".join(
            f" {name}{_shown(value)}"
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
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes_moved(self) -> int:
        return 3 * self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {dtype_name(self.dtype)}"


class Facts(NamedTuple):
    """All that a problem knows of one operand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_facts = attrgetter(*Facts._fields)


def conv_problem(
    operands: ConvOperands,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> ConvProblem:
    """Check the operands of conv_bn_act and describe them. What was described once is looked up: a third of the time.

    Raises TypeError for dtypes and devices, ValueError for shapes and parameters; nothing has been computed by then.
    """
    x, weight, bn_weight, bn_bias, bn_mean, bn_var, _, bias, residual = operands
    tensors = (x, weight, bn_weight, bn_bias, bn_mean, bn_var, bias, residual)
    facts = [tensor if tensor is None else _facts(tensor) for tensor in tensors]
    try:
        return _describe_conv(*facts, stride, padding, dilation, groups, activation)
    except TypeError:  # symbolic sizes and lists cannot be looked up; bad input is refused again below
        pass
    return _describe_conv.__wrapped__(*facts, stride, padding, dilation, groups, activation)


def add_relu_problem(a: Tensor, b: Tensor) -> AddReluProblem:
    """Check the operands of add_relu and describe them. TypeError for dtypes and devices, ValueError for shapes."""
    facts = (_facts(a), a.stride(), _facts(b), b.stride())
    try:
        return _describe_sum(*facts)
    except TypeError:
        pass
    return _describe_sum.__wrapped__(*facts)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order of dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _describe_conv(
    x, weight, bn_weight, bn_bias, bn_mean, bn_var, bias, residual, stride, padding, dilation, groups, activation
) -> ConvProblem:
    """conv_problem of operands as plain (shape, dtype, device), None where one is missing."""
    x, weight = Facts(*x), Facts(*weight)
    if len(x.shape) != 4 or len(weight.shape) != 4:
        name, facts = ("x", x) if len(x.shape) != 4 else ("weight", weight)
        raise ValueError(
            f"conv_bn_act: {name} must have 4 dimensions, {'(N, C, H, W)' if name == 'x' else '(K, C/groups, R, S)'}, "
            f"got {len(facts.shape)} with shape {tuple(facts.shape)}."
        )
    activations = {"x": x, "weight": weight}
    if residual is not None:
        residual = activations["residual"] = Facts(*residual)
    named = zip(VECTORS, (bn_weight, bn_bias, bn_mean, bn_var, bias))
    vectors = {name: Facts(*facts) for name, facts in named if facts is not None}
    _check_dtypes("conv_bn_act", activations)
    _check_vector_dtypes(vectors, x)
    _check_window(stride, padding, dilation, groups, activation)

    N, C, H, W = x.shape
    K, channels_per_group, R, S = weight.shape
    if C != channels_per_group * groups:
        raise ValueError(
            f"conv_bn_act: weight has {channels_per_group} input channels per group but x has {C} (groups={groups}): "
            f"x needs {channels_per_group * groups} channels."
        )
    if K == 0 or C == 0 or R == 0 or S == 0:
        raise ValueError(f"conv_bn_act: weight of shape {tuple(weight.shape)} has an empty dimension.")
    if K % groups:
        raise ValueError(f"conv_bn_act: {K} output channels cannot be split into groups={groups}.")
    for name, vector in vectors.items():
        if tuple(vector.shape) != (K,):
            raise ValueError(
                f"conv_bn_act: {name} must have shape ({K},), one value per output channel, got {tuple(vector.shape)}."
            )

    problem = ConvProblem(
        N, C, H, W, K, R, S, stride, padding, dilation, groups, activation,
        has_bn=any(name != "bias" for name in vectors),
        has_bias=bias is not None,
        has_residual=residual is not None,
        dtype=x.dtype,
        device=x.device.type,
    )  # fmt: skip
    if problem.P <= 0 or problem.Q <= 0:
        raise ValueError(
            f"conv_bn_act: the output would be empty ({problem.P} x {problem.Q}): a {R}x{S} filter with dilation "
            f"{_shown(dilation)} does not fit into {H}x{W} with padding {_shown(padding)}."
        )
    if residual is not None and tuple(residual.shape) != problem.output_shape:
        raise ValueError(
            f"conv_bn_act: residual must have the output's shape {problem.output_shape}, got {tuple(residual.shape)}."
        )
    return problem


@functools.lru_cache(maxsize=4096)
def _describe_sum(a, a_stride, b, b_stride) -> AddReluProblem:
    """add_relu_problem of operands as plain (shape, dtype, device) and strides."""
    a, b = Facts(*a), Facts(*b)
    _check_dtypes("add_relu", {"a": a, "b": b})
    if a.shape != b.shape:
        raise ValueError(f"add_relu: a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    same = a_stride == b_stride and is_dense(torch.empty_strided(a.shape, a_stride, device="meta"))
    return AddReluProblem(tuple(a.shape), same, a.dtype, a.device.type)


def _check_dtypes(op: str, operands: dict[str, Facts]) -> None:
    first_name, first = next(iter(operands.items()))
    if first.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {first_name} has dtype {dtype_name(first.dtype)}; "
            f"{', '.join(map(dtype_name, FLOAT_DTYPES))} are supported."
        )
    for name, facts in operands.items():
        if facts.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {dtype_name(facts.dtype)} but {first_name} has {dtype_name(first.dtype)}. "
                f"Convert one of them, or use torch.autocast."
            )
        _check_device(op, name, facts, first_name, first)


def _check_vector_dtypes(vectors: dict[str, Facts], x: Facts) -> None:
    allowed = FLOAT_DTYPES if x.dtype == torch.float64 else FLOAT_DTYPES[:3]
    for name, vector in vectors.items():
        if vector.dtype not in allowed:
            raise TypeError(
                f"conv_bn_act: {name} has dtype {dtype_name(vector.dtype)}; with x in {dtype_name(x.dtype)} it may be "
                f"{', '.join(map(dtype_name, allowed))}."
            )
        _check_device("conv_bn_act", name, vector, "x", x)


def _check_device(op: str, name: str, facts: Facts, first_name: str, first: Facts) -> None:
    if facts.device != first.device:
        raise TypeError(
            f"{op}: {name} is on {facts.device} but {first_name} is on {first.device}. Move one with .to()."
        )


def _check_window(stride, padding, dilation, groups, activation) -> None:
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if pair[0] < least or pair[1] < least:
            raise ValueError(f"conv_bn_act: {name} must be at least {least}, got {_shown(pair)}.")
    if groups < 1:
        raise ValueError(f"conv_bn_act: groups must be at least 1, got {groups}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_bn_act: unknown activation {activation!r}; known ones are {', '.join(ACTIVATIONS)}.")


def pair(name: str, value: Any) -> tuple[int, int]:
    """A parameter of a window as torch takes it, one int or one or two of them, as two. Whole floats are refused here:
    they are equal to ints, also to a lookup, but no kernel takes them."""
    if type(value) is int:
        return (value, value)
    if type(value) is tuple and [*map(type, value)] == [int, int]:  # at once: this runs at every call
        return value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise ValueError(f"conv_bn_act: {name} must be an int or a pair, got {value!r}.")
    try:
        values = tuple(one if isinstance(one, (int, torch.SymInt)) else operator.index(one) for one in values)
    except TypeError:
        raise TypeError(f"conv_bn_act: {name} must be an int or a pair of ints, got {value!r}.") from None
    return values if len(values) == 2 else values * 2


def _shown(value) -> str:
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
        "bn" in parts, "bias" in parts, "add" in parts, getattr(torch, dtype, torch.int8), device,
    )  # fmt: skip
    if problem.dtype not in FLOAT_DTYPES or activation not in ACTIVATIONS or str(problem) != text.strip():
        raise ValueError(f"{text!r} is no convolution: its dtype, epilogue or activation is not known.")
    if min(N, C, K, R, S, *problem.stride, *problem.dilation, problem.groups) < 1:
        raise ValueError(f"{text!r} is no convolution: one of its sizes is 0.")
    if C % problem.groups or K % problem.groups or min(problem.P, problem.Q) < 1:
        raise ValueError(f"{text!r} has no output, or channels that cannot be split into its groups.")
    return problem
