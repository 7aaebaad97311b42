"""How far a kernel's convolution of e4m3 may lie from the exact one (`quantized` has the formula).

Tensor cores add e4m3 products with few bits. One step adds up to 32 products to the sum so far. Each addend loses what
lies more than 13 bits below the largest one's exponent, and the new sum likewise. For n products that is at most
(n + 2) * 2**-13 of the sum of their magnitudes. sm_90 takes four steps of 32 to 128 products, sm_89 eight steps of 16.
The latter lose more: 8 * 18 * 2**-13. The exponent of a subnormal factor counts as that of the least normal number.
These are the rules of MMA-Sim (arXiv 2511.10909), which its authors found by measurement.

Behind 128 products at most, kernels add what they have to a sum in fp32. The rest of a result is fp32, too. On sm_89
Triton cuts it off to fp16 before it rounds to e4m3: at most 2**-10 more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import ConvProblem

PROMOTION = 128  # products at most before a sum goes on in fp32
LOSS = 8 * 18 * 2.0**-13  # of the products' magnitudes
_EPS = 2.0**-24
_LEAST_NORMAL = 2.0**-6
_BY_FP16 = 2.0**-10
_HALF_STEP, _HALF_LEAST_STEP = 2.0**-4, 2.0**-10  # of e4m3: relative, and between subnormal numbers


def exact(problem: ConvProblem, operands: Int8Operands) -> Tensor:
    """min(max(M * sum + B + R * skip, low), high) in fp64: what a kernel rounds to e4m3, or to bytes. NaN stays NaN."""
    e = operands.epilogue
    return _before_limits(problem, operands).clamp(e.low, e.high)


def error_bound(problem: ConvProblem, operands: Int8Operands) -> Tensor:
    """The most by which a kernel's value may differ from `exact`, for each element in fp64."""
    p, o, e = problem, operands, operands.epilogue
    magnitudes = _convolved(p, _as_normal(o.x), _as_normal(o.weight))
    promotions = -(-p.reduction // PROMOTION) + 1
    scale, terms = _per_channel(e.multiplier).abs(), _per_channel(e.bias).abs().expand(p.output_shape)
    if o.residual is not None:
        terms = terms + abs(e.residual) * o.residual.double().abs()
    # two operations follow the sums, which may be split into more parts
    in_fp32 = (p.reduction / PROMOTION + promotions + 4) * _EPS * (scale * magnitudes + terms)
    before = scale * LOSS * magnitudes * (1 + promotions * _EPS) + in_fp32
    largest = exact(p, o).abs() + before
    return before + _BY_FP16 * largest + (_HALF_STEP * largest).clamp(min=_HALF_LEAST_STEP)


def _before_limits(p: ConvProblem, o: Int8Operands) -> Tensor:
    y = _per_channel(o.epilogue.multiplier) * _convolved(p, o.x.double(), o.weight.double())
    y = y + _per_channel(o.epilogue.bias)
    return y if o.residual is None else y + o.epilogue.residual * o.residual.double()


def _convolved(p: ConvProblem, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)


def _as_normal(q: Tensor) -> Tensor:
    """Magnitudes in fp64, those of subnormal numbers as the least normal one."""
    magnitude = q.double().abs()
    return torch.where(magnitude > 0, magnitude.clamp(min=_LEAST_NORMAL), magnitude)


def _per_channel(vector: Tensor) -> Tensor:
    return vector.double().view(1, -1, 1, 1)
