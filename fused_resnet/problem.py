"""What one fused operator is asked to do, as a value: shapes, dtypes, epilogue. No tensors, no kernels.

A problem is built once per call from the operands (`conv_problem`, `add_relu_problem`), which is also where bad
input is refused. Backends look at the problem and at nothing else when they say why they cannot run it, and it is
the key under which measurements are kept.

Letters as in cuDNN and CUTLASS: x is (N, C, H, W), the weight (K, C/groups, R, S), the output (N, K, P, Q).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "silu")
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
        return {name: getattr(self, name) for name in ("bn_weight", "bn_bias", "bn_mean", "bn_var")}

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


def conv_problem(
    operands: ConvOperands,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> ConvProblem:
    """Check the operands of conv_bn_act and describe them.

    Raises TypeError for dtypes and devices, ValueError for shapes and parameters; nothing has been computed by then.
    """
    x, weight = operands.x, operands.weight
    if x.dim() != 4 or weight.dim() != 4:
        name, tensor = ("x", x) if x.dim() != 4 else ("weight", weight)
        raise ValueError(
            f"conv_bn_act: {name} must have 4 dimensions, {'(N, C, H, W)' if name == 'x' else '(K, C/groups, R, S)'}, "
            f"got {tensor.dim()} with shape {_shape(tensor)}."
        )
    _check_dtypes("conv_bn_act", {"x": x, "weight": weight, "residual": operands.residual}, x)
    _check_vector_dtypes(operands)
    _check_window(stride, padding, dilation, groups, activation)

    N, C, H, W = x.shape
    K, channels_per_group, R, S = weight.shape
    if C != channels_per_group * groups:
        raise ValueError(
            f"conv_bn_act: weight has {channels_per_group} input channels per group but x has {C} (groups={groups}): "
            f"x needs {channels_per_group * groups} channels."
        )
    if K == 0 or C == 0 or R == 0 or S == 0:
        raise ValueError(f"conv_bn_act: weight of shape {_shape(weight)} has an empty dimension.")
    if K % groups:
        raise ValueError(f"conv_bn_act: {K} output channels cannot be split into groups={groups}.")
    for name, vector in (*operands.bn_vectors.items(), ("bias", operands.bias)):
        if vector is not None and tuple(vector.shape) != (K,):
            raise ValueError(
                f"conv_bn_act: {name} must have shape ({K},), one value per output channel, got {_shape(vector)}."
            )

    problem = ConvProblem(
        N, C, H, W, K, R, S, stride, padding, dilation, groups, activation,
        has_bn=any(vector is not None for vector in operands.bn_vectors.values()),
        has_bias=operands.bias is not None,
        has_residual=operands.residual is not None,
        dtype=x.dtype,
        device=x.device.type,
    )  # fmt: skip
    if problem.P <= 0 or problem.Q <= 0:
        raise ValueError(
            f"conv_bn_act: the output would be empty ({problem.P} x {problem.Q}): a {R}x{S} filter with dilation "
            f"{_shown(dilation)} does not fit into {H}x{W} with padding {_shown(padding)}."
        )
    if operands.residual is not None and tuple(operands.residual.shape) != problem.output_shape:
        raise ValueError(
            f"conv_bn_act: residual must have the output's shape {problem.output_shape}, "
            f"got {_shape(operands.residual)}."
        )
    return problem


def add_relu_problem(a: Tensor, b: Tensor) -> AddReluProblem:
    """Check the operands of add_relu and describe them. TypeError for dtypes and devices, ValueError for shapes."""
    _check_dtypes("add_relu", {"a": a, "b": b}, a)
    if a.shape != b.shape:
        raise ValueError(f"add_relu: a and b must have the same shape, got {_shape(a)} and {_shape(b)}.")
    same = a.stride() == b.stride() and is_dense(a)
    return AddReluProblem(tuple(a.shape), same, a.dtype, a.device.type)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order of dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtypes(op: str, tensors: dict[str, Optional[Tensor]], first: Tensor) -> None:
    first_name = next(iter(tensors))
    if first.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {first_name} has dtype {dtype_name(first.dtype)}; "
            f"{', '.join(map(dtype_name, FLOAT_DTYPES))} are supported."
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {dtype_name(tensor.dtype)} but {first_name} has {dtype_name(first.dtype)}. "
                f"Convert one of them, or use torch.autocast."
            )
        _check_device(op, name, tensor, first_name, first)


def _check_vector_dtypes(operands: ConvOperands) -> None:
    x = operands.x
    allowed = FLOAT_DTYPES if x.dtype == torch.float64 else FLOAT_DTYPES[:3]
    for name, vector in (*operands.bn_vectors.items(), ("bias", operands.bias)):
        if vector is None:
            continue
        if vector.dtype not in allowed:
            raise TypeError(
                f"conv_bn_act: {name} has dtype {dtype_name(vector.dtype)}; with x in {dtype_name(x.dtype)} it may be "
                f"{', '.join(map(dtype_name, allowed))}."
            )
        _check_device("conv_bn_act", name, vector, "x", x)


def _check_device(op: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        raise TypeError(
            f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}. Move one with .to()."
        )


def _check_window(stride, padding, dilation, groups, activation) -> None:
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if pair[0] < least or pair[1] < least:
            raise ValueError(f"conv_bn_act: {name} must be at least {least}, got {_shown(pair)}.")
    if groups < 1:
        raise ValueError(f"conv_bn_act: groups must be at least 1, got {groups}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_bn_act: unknown activation {activation!r}; known ones are {', '.join(ACTIVATIONS)}.")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _shown(value) -> str:
    if isinstance(value, int):
        return str(value)
    return str(value[0]) if value[0] == value[1] else f"({value[0]}, {value[1]})"
