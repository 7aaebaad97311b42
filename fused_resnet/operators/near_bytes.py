"""How far a byte of a kernel may lie that rounds more often than the contract of int8 (`quantized` has the formula).

Its sums are exact too. Behind them are at most 8 operations in fp32: the conversion, the scale, the bias, the scaled
residual, their sums, a zero point. Each rounds a number of at most

    T = |M * sum| + |B| + |R * skip| + 128

by 2**-24 of it, in whatever order. So the value before the last rounding is within e = 8 * 2**-24 * T of the exact one,
and the byte within 1/2 + e. That of the contract is too. Where T is below 2**20, e is below 1/2, and the two bytes are
equal or neighbours: a step of the output's scale apart. They differ only where the exact value lies within e of the
middle between two bytes.
"""

from __future__ import annotations

from torch import Tensor

from fused_resnet.operators import quantized
from fused_resnet.operators.float8 import exact
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import ConvProblem

__all__ = ["error_bound", "exact"]

_OPERATIONS, _EPS = 8, 2.0**-24
_ZERO_POINT = 128.0


def error_bound(problem: ConvProblem, operands: Int8Operands) -> Tensor:
    """The most by which a kernel's byte may differ from `exact`, for each element in fp64."""
    p, o, e = problem, operands, operands.epilogue
    multiplier, bias = (vector.double().view(1, -1, 1, 1) for vector in e[:2])
    total = quantized.sums(o.x, o.weight, p.stride, p.padding, p.dilation, p.groups).double()
    size = (multiplier * total).abs() + bias.abs() + _ZERO_POINT
    if o.residual is not None:
        size = size + (e.residual * o.residual.double()).abs()
    return 0.5 + _OPERATIONS * _EPS * size
