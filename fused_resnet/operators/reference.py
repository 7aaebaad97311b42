"""The specification: every operator in fp64 on the CPU, written to be obviously right, and the error it allows.

Nothing here is fast and nothing here is shared with a kernel.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem

# |ours - ref| <= eps_out*|ref| + SLACK * K*eps_acc*(|scale|*conv(|x|,|w|) + |shift| + |residual|), per element.
# K*eps is the worst case of a sum of K terms in any order; 2 covers the epilogue's own few roundings.
SLACK = 2.0

_ACTIVATE = {
    "none": lambda y: y,
    "relu": lambda y: torch.relu(y),
    "relu6": lambda y: y.clamp(0, 6),
    "silu": lambda y: y * torch.sigmoid(y),
}


def conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    """act(scale * conv(x, w) + shift + residual) in fp64, (N, K, P, Q).

    scale = bn_weight / sqrt(bn_var + eps); shift = (bias - bn_mean) * scale + bn_bias. A missing vector is left out:
    no bn_weight is 1, no bn_var divides by nothing, the others are 0.
    """
    o = _fp64(operands)
    scale, shift = _scale_and_shift(o)
    y = _conv(problem, o.x, o.weight) * _per_channel(scale) + _per_channel(shift)
    if o.residual is not None:
        y = y + o.residual
    return _ACTIVATE[problem.activation](y)


def error_bound(
    problem: ConvProblem,
    operands: ConvOperands,
    *,
    expected: Optional[Tensor] = None,
    eps_acc: float = 2.0**-24,
    stored: Optional[torch.dtype] = None,
    winograd: bool = False,
) -> Tensor:
    """How far a correct kernel may be from the reference, per element, in fp64.

    expected: the reference's result, where the caller has it. eps_acc: unit roundoff of the accumulation (2**-24 for
    fp32 sums, 2**-11 for TF32 products, 2**-53 for fp64). stored: the dtype in which a kernel rounds values between
    convolution, BN, addition and activation, as the unfused composite does. None: the kernel keeps them in registers.
    winograd: the sums are those of F(4x4, 3x3) (`winograd_products`). Their constant is no proof: its
    transforms could amplify by more, but errors of random sign stay below a fifth of this bound.
    """
    o = _fp64(operands)
    expected = conv_bn_act(problem, operands) if expected is None else expected
    scale, _ = _scale_and_shift(o)
    if winograd:  # NaN and infinity count as 0, so that outputs which they do not reach have a bound
        products = winograd_products(problem, o.x.nan_to_num(0.0, 0.0, 0.0), o.weight)
    else:
        products = _conv(problem, o.x.abs(), o.weight.abs())
    magnitude = products * _per_channel(scale.abs())
    # shift = bias*scale - mean*scale + bn_bias may cancel: each part brings its own rounding error
    for vector, factor in ((o.bias, scale), (o.bn_mean, scale), (o.bn_bias, torch.ones_like(scale))):
        if vector is not None:
            magnitude = magnitude + _per_channel((vector * factor).abs())
    if o.residual is not None:
        magnitude = magnitude + o.residual.abs()
    # a sum of K terms errs by at most K*eps_acc; the epilogue adds about eight roundings of its own (rsqrt included)
    bound = unit_roundoff(problem.dtype) * expected.abs() + SLACK * (problem.reduction + 8) * eps_acc * magnitude
    if stored is not None:
        bound = bound + 4 * unit_roundoff(stored) * magnitude
    return bound + _underflow(problem.dtype)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """max(a + b, 0) in fp64."""
    return torch.relu(a.detach().cpu().double() + b.detach().cpu().double())


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding: half of torch.finfo(dtype).eps."""
    return torch.finfo(dtype).eps / 2


def _underflow(dtype: torch.dtype) -> float:
    """Results below the normal range may be rounded to a multiple of the smallest subnormal, or flushed."""
    return torch.finfo(dtype).tiny


def _scale_and_shift(o: ConvOperands) -> tuple[Tensor, Tensor]:
    """BN and bias of fp64 operands as one affine map per output channel."""
    absent = torch.zeros(o.weight.shape[0], dtype=torch.float64)
    weight = absent + 1 if o.bn_weight is None else o.bn_weight
    bn_bias, mean, bias = (absent if vector is None else vector for vector in (o.bn_bias, o.bn_mean, o.bias))
    scale = weight if o.bn_var is None else weight / torch.sqrt(o.bn_var + o.eps)
    return scale, (bias - mean) * scale + bn_bias


def _conv(problem: ConvProblem, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups)


def winograd_products(problem: ConvProblem, x: Tensor, weight: Tensor) -> Tensor:
    """Per output, sum over c of max|x_c| over its tile's 6x6 input times sum|w_c|: (N, K, P, Q).

    In F(4x4, 3x3) each of a tile's 16 outputs is computed from all of the tile's input and all taps of the filter.
    """
    _, _, P, Q = problem.output_shape
    down, right = -P % 4, -Q % 4  # up to whole tiles
    top, left = problem.padding
    padded = F.pad(x.abs(), (left, left + right, top, top + down))
    largest = F.max_pool2d(padded, 6, 4)
    products = torch.einsum("nctu,kc->nktu", largest, weight.abs().sum((2, 3)))
    return products.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :P, :Q]


def _fp64(operands: ConvOperands) -> ConvOperands:
    return operands.map(lambda tensor: tensor.detach().cpu().double())


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
