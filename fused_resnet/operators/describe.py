"""From operands to the problem. Here bad input is refused, with the values, before anything is computed."""

from __future__ import annotations

import functools
import operator
from operator import attrgetter
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.operators import layout, quantized
from fused_resnet.operators.operands import VECTORS, BnActOperands, ChainOperands, ConvOperands, Int8Operands
from fused_resnet.operators.problem import (
    ACTIVATIONS,
    BYTE_DTYPES,
    FLOAT8,
    FLOAT_DTYPES,
    AddReluProblem,
    BnActProblem,
    ChainProblem,
    ConvProblem,
    dtype_name,
    pair_text,
)


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


def conv_int8_problem(
    operands: Int8Operands,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> ConvProblem:
    """Check the operands of a convolution of bytes, or of e4m3, and describe them.

    Raises TypeError for dtypes and devices, ValueError for shapes and parameters. Another ValueError is for an epilogue
    that is not the activation's, or for sums that may leave int32.
    """
    x, weight, epilogue, residual, filter_sums = operands
    is_float8 = x.dtype == FLOAT8
    op = "conv_float8" if is_float8 else "conv_int8"
    activations, weights = ((FLOAT8,), (FLOAT8,)) if is_float8 else (BYTE_DTYPES, (torch.int8,))
    bytes_of = {"x": x} if residual is None else {"x": x, "residual": residual}
    vectors = {"multiplier": epilogue.multiplier, "bias": epilogue.bias}
    sums = {} if filter_sums is None else {"filter_sums": filter_sums}
    for named, dtypes in (
        (bytes_of, activations), ({"weight": weight}, weights), (vectors, (torch.float32,)), (sums, (torch.int32,)),
    ):  # fmt: skip
        for name, tensor in named.items():
            _check_operand(op, name, _as_facts(tensor), dtypes, _as_facts(x))
    if activation not in quantized.ACTIVATIONS:
        known = ", ".join(quantized.ACTIVATIONS)
        raise ValueError(f"{op}: unknown activation {activation!r}; known ones are {known}.")
    given = FLOAT8 if is_float8 else torch.int8 if activation == "none" else torch.uint8
    if epilogue.dtype != given:
        wanted, got = dtype_name(given), dtype_name(epilogue.dtype)
        raise ValueError(f"{op}: activation {activation!r} gives {wanted}, the epilogue is for {got}.")
    facts = {name: _as_facts(tensor) for name, tensor in {**vectors, **sums}.items()}
    skip = None if residual is None else _as_facts(residual)
    problem = _shaped(
        op, _as_facts(x), _as_facts(weight), facts, skip, stride, padding, dilation, groups, activation,
        has_bn=False, has_bias=True,
    )  # fmt: skip
    if not is_float8 and (reason := quantized.why_not_reduced(problem.reduction)) is not None:
        raise ValueError(f"{op}: {reason}.")
    return problem


def _as_facts(tensor: Tensor) -> Facts:
    return Facts(*_facts(tensor))


def add_relu_problem(a: Tensor, b: Tensor) -> AddReluProblem:
    """Check the operands of add_relu and describe them. TypeError for dtypes and devices, ValueError for shapes."""
    facts = (_facts(a), a.stride(), _facts(b), b.stride())
    try:
        return _describe_sum(*facts)
    except TypeError:
        pass
    return _describe_sum.__wrapped__(*facts)


def bn_act_problem(operands: BnActOperands, activation: str) -> BnActProblem:
    """Check the operands of bn_act and describe them. TypeError for dtypes and devices, ValueError for the rest."""
    x, *others, _ = operands
    facts = [tensor if tensor is None else _facts(tensor) for tensor in (x, *others)]
    _check_image("bn_act", _as_facts(x))
    is_nhwc = layout.is_nhwc(x)
    try:
        return _describe_bn_act(*facts, is_nhwc, activation)
    except TypeError:
        pass
    return _describe_bn_act.__wrapped__(*facts, is_nhwc, activation)


def chain_problem(operands: ChainOperands, activation: str) -> ChainProblem:
    """Check the operands of bottleneck_chain and describe them. TypeError for dtypes and devices, else ValueError."""
    op = "bottleneck_chain"
    facts = {name: _as_facts(tensor) for name, tensor in operands._asdict().items() if tensor is not None}
    x = facts["x"]
    _check_dtypes(op, {name: one for name, one in facts.items() if not name.endswith("bias")})
    _check_vector_dtypes(op, {name: one for name, one in facts.items() if name.endswith("bias")}, x)
    _check_activation(op, activation)
    _check_image(op, x)
    if ("reduce_weight" in facts) != ("reduce_bias" in facts):
        given = "reduce_weight" if "reduce_weight" in facts else "reduce_bias"
        raise ValueError(f"{op}: only {given} is given: give both, or neither where no block follows.")
    N, C, H, W = x.shape
    K, L = (facts[name].shape[:1] if name in facts else () for name in ("expand_weight", "reduce_weight"))
    wanted = {
        "residual": (N, *K, H, W), "weight": (C, C, 3, 3), "bias": (C,), "expand_weight": (*K, C, 1, 1),
        "expand_bias": K, "reduce_weight": (*L, *K, 1, 1), "reduce_bias": L,
    }  # fmt: skip
    for name, one in facts.items():
        if name != "x" and tuple(one.shape) != tuple(wanted[name]):
            raise ValueError(
                f"{op}: {name} must have shape {tuple(wanted[name])}, got {tuple(one.shape)}: x has shape "
                f"{tuple(x.shape)}, expand_weight {tuple(facts['expand_weight'].shape)}."
            )
    if 0 in (C, H, W, *K, *L):
        raise ValueError(f"{op}: x of shape {tuple(x.shape)}, expand_weight or reduce_weight has an empty dimension.")
    return ChainProblem(N, C, H, W, K[0], L[0] if L else 0, activation, x.dtype, x.device.type)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order of dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


@functools.lru_cache(maxsize=4096)
def _describe_conv(
    x, weight, bn_weight, bn_bias, bn_mean, bn_var, bias, residual, stride, padding, dilation, groups, activation
) -> ConvProblem:
    """conv_problem of operands as plain (shape, dtype, device), None where one is missing."""
    x, weight = Facts(*x), Facts(*weight)
    _check_dimensions("conv_bn_act", x, weight)
    activations = {"x": x, "weight": weight}
    if residual is not None:
        residual = activations["residual"] = Facts(*residual)
    named = zip(VECTORS, (bn_weight, bn_bias, bn_mean, bn_var, bias))
    vectors = {name: Facts(*facts) for name, facts in named if facts is not None}
    _check_dtypes("conv_bn_act", activations)
    _check_vector_dtypes("conv_bn_act", vectors, x)
    return _shaped(
        "conv_bn_act", x, weight, vectors, residual, stride, padding, dilation, groups, activation,
        has_bn=any(name != "bias" for name in vectors), has_bias=bias is not None,
    )  # fmt: skip


def _check_dimensions(op: str, x: Facts, weight: Facts) -> None:
    if len(x.shape) != 4 or len(weight.shape) != 4:
        name, facts = ("x", x) if len(x.shape) != 4 else ("weight", weight)
        raise ValueError(
            f"{op}: {name} must have 4 dimensions, {'(N, C, H, W)' if name == 'x' else '(K, C/groups, R, S)'}, "
            f"got {len(facts.shape)} with shape {tuple(facts.shape)}."
        )


def _shaped(
    op: str, x: Facts, weight: Facts, vectors: dict[str, Facts], residual: Optional[Facts],
    stride, padding, dilation, groups, activation, *, has_bn: bool, has_bias: bool,
) -> ConvProblem:  # fmt: skip
    """The problem, if the shapes fit each other."""
    _check_dimensions(op, x, weight)
    _check_window(op, stride, padding, dilation, groups, activation)
    N, C, H, W = x.shape
    K, channels_per_group, R, S = weight.shape
    if C != channels_per_group * groups:
        raise ValueError(
            f"{op}: weight has {channels_per_group} input channels per group but x has {C} (groups={groups}): "
            f"x needs {channels_per_group * groups} channels."
        )
    if K == 0 or C == 0 or R == 0 or S == 0:
        raise ValueError(f"{op}: weight of shape {tuple(weight.shape)} has an empty dimension.")
    if K % groups:
        raise ValueError(f"{op}: {K} output channels cannot be split into groups={groups}.")
    for name, vector in vectors.items():
        if tuple(vector.shape) != (K,):
            raise ValueError(
                f"{op}: {name} must have shape ({K},), one value per output channel, got {tuple(vector.shape)}."
            )

    problem = ConvProblem(
        N, C, H, W, K, R, S, stride, padding, dilation, groups, activation,
        has_bn=has_bn,
        has_bias=has_bias,
        has_residual=residual is not None,
        dtype=x.dtype,
        device=x.device.type,
    )  # fmt: skip
    if problem.P <= 0 or problem.Q <= 0:
        raise ValueError(
            f"{op}: the output would be empty ({problem.P} x {problem.Q}): a {R}x{S} filter with dilation "
            f"{pair_text(dilation)} does not fit into {H}x{W} with padding {pair_text(padding)}."
        )
    if residual is not None and tuple(residual.shape) != problem.output_shape:
        raise ValueError(
            f"{op}: residual must have the output's shape {problem.output_shape}, got {tuple(residual.shape)}."
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


def _check_image(op: str, x: Facts) -> None:
    if len(x.shape) != 4:
        raise ValueError(
            f"{op}: x must have 4 dimensions, (N, C, H, W), got {len(x.shape)} with shape {tuple(x.shape)}."
        )


@functools.lru_cache(maxsize=4096)
def _describe_bn_act(x, mean, var, weight, bias, residual, is_nhwc, activation) -> BnActProblem:
    """bn_act_problem of operands as plain (shape, dtype, device), None where one is missing."""
    op, x = "bn_act", Facts(*x)
    activations = {"x": x} if residual is None else {"x": x, "residual": Facts(*residual)}
    named = zip(BnActOperands._fields[1:5], (mean, var, weight, bias))
    vectors = {name: Facts(*facts) for name, facts in named if facts is not None}
    _check_dtypes(op, activations)
    _check_vector_dtypes(op, vectors, x)
    _check_activation(op, activation)
    N, C, H, W = x.shape
    for name, vector in vectors.items():
        if tuple(vector.shape) != (C,):
            raise ValueError(f"{op}: {name} must have shape ({C},), one value per channel, got {tuple(vector.shape)}.")
    if residual is not None and activations["residual"].shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(activations['residual'].shape)}."
        )
    if C == 0:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)} has no channels.")
    if (mean is None) != (var is None):
        raise ValueError(f"{op}: mean and var come together: either both are given, or both are the batch's.")
    if mean is None and N * H * W == 1:
        raise ValueError(
            f"{op}: Expected more than 1 value per channel when training, got x of shape {tuple(x.shape)}. "
            "Give it a larger batch, or training=False."
        )
    return BnActProblem(N, C, H, W, activation, mean is None, residual is not None, is_nhwc, x.dtype, x.device.type)


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


def _check_vector_dtypes(op: str, vectors: dict[str, Facts], x: Facts) -> None:
    allowed = FLOAT_DTYPES if x.dtype == torch.float64 else FLOAT_DTYPES[:3]
    for name, vector in vectors.items():
        _check_operand(op, name, vector, allowed, x, f"with x in {dtype_name(x.dtype)} ")


def _check_operand(
    op: str, name: str, facts: Facts, dtypes: tuple[torch.dtype, ...], x: Facts, where: str = ""
) -> None:
    """One of these dtypes, and on x's device."""
    if facts.dtype not in dtypes:
        allowed = ", ".join(map(dtype_name, dtypes))
        raise TypeError(f"{op}: {name} has dtype {dtype_name(facts.dtype)}; {where}it may be {allowed}.")
    _check_device(op, name, facts, "x", x)


def _check_device(op: str, name: str, facts: Facts, first_name: str, first: Facts) -> None:
    if facts.device != first.device:
        raise TypeError(
            f"{op}: {name} is on {facts.device} but {first_name} is on {first.device}. Move one with .to()."
        )


def _check_window(op: str, stride, padding, dilation, groups, activation) -> None:
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if pair[0] < least or pair[1] < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {pair_text(pair)}.")
    if groups < 1:
        raise ValueError(f"{op}: groups must be at least 1, got {groups}.")
    _check_activation(op, activation)


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; known ones are {', '.join(ACTIVATIONS)}.")


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
