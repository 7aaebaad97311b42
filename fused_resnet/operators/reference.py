"""The specification: every operator in fp64 on the CPU, written to be obviously right, and the error it allows.

Nothing here is fast and nothing here is shared with a kernel.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.operators.operands import BnActOperands, ChainOperands, ConvOperands
from fused_resnet.operators.problem import BnActProblem, ChainProblem, ConvProblem

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


class BnAct(NamedTuple):
    """What bn_act gives, or how far each may be from that: output, statistics, gradients if asked for."""

    y: Tensor
    mean: Tensor
    var: Tensor
    grad_x: Optional[Tensor] = None
    grad_weight: Optional[Tensor] = None
    grad_bias: Optional[Tensor] = None
    grad_residual: Optional[Tensor] = None


def bn_act(
    problem: BnActProblem, operands: BnActOperands, grad: Optional[Tensor] = None, passes: Optional[Tensor] = None
) -> BnAct:
    """act(weight * (x - mean) / sqrt(var + eps) + bias + residual) in fp64, and its gradients for a grad of it.

    mean and var: those given, or the mean and the biased variance of x per channel. passes: where the activation lets
    gradients through, as a kernel found it; near a kink its rounding decides. None: by the reference's own values.
    """
    o = _bn_fp64(operands)
    mean, var = _statistics(o)
    inverse = _per_channel(1 / torch.sqrt(var + o.eps))
    normal = (o.x - _per_channel(mean)) * inverse
    weight = torch.ones_like(var) if o.weight is None else o.weight
    before = normal * _per_channel(weight) + (0 if o.bias is None else _per_channel(o.bias))
    before = before if o.residual is None else before + o.residual
    y = _ACTIVATE[problem.activation](before)
    if grad is None:
        return BnAct(y, mean, var)
    if passes is None:
        passes = {"relu": before > 0, "relu6": (before > 0) & (before < 6)}.get(problem.activation)
    g = grad.detach().cpu().double()
    if problem.activation == "silu":
        s = torch.sigmoid(before)
        g = g * s * (1 + before * (1 - s))
    elif passes is not None:
        g = torch.where(passes.cpu(), g, 0.0)
    grad_x = g
    if problem.is_training:  # through the statistics
        grad_x = g - _channel_mean(g) - normal * _channel_mean(g * normal)
    return BnAct(
        y, mean, var, grad_x * inverse * _per_channel(weight), (g * normal).sum((0, 2, 3)), g.sum((0, 2, 3)), g
    )


def bn_act_bound(
    problem: BnActProblem, operands: BnActOperands, expected: BnAct, *, terms: int, stored: Optional[torch.dtype] = None
) -> BnAct:
    """How far a correct kernel may be from the reference, per element. Of the gradients not with SiLU.

    terms: values that it adds up in fp32 before it rounds no more. stored: the dtype in which it rounds values between
    BN, addition and activation, as the unfused composite does. Statistics are rounded to fp32, and to fp32 alone: a
    mean of 1e4 beside a deviation of 1e-2 is off by up to 5 % of that, as torch's is.
    """
    o, eps = _bn_fp64(operands), unit_roundoff(torch.promote_types(torch.float32, problem.dtype))
    sums = SLACK * (terms + 8) * eps
    inverse = 1 / torch.sqrt(expected.var + o.eps)
    weight = torch.ones_like(inverse) if o.weight is None else o.weight
    off = (o.x - _per_channel(expected.mean)).abs()
    if problem.is_training:
        added = off.amax((0, 2, 3)) + (0 if stored is None else expected.mean.abs())  # ATen adds up x itself
        mean = eps * expected.mean.abs() + sums * added
        var = 2 * sums * expected.var + mean**2 + _underflow(torch.float32)
    else:
        mean, var = torch.zeros_like(inverse), torch.zeros_like(inverse)
    shift, by_var = inverse * mean, 0.5 * var * inverse**2  # of the normalised values, and in relation to them
    normal: Tensor = off * _per_channel(inverse)
    scale = _per_channel(weight.abs())
    sizes = scale * (normal + _per_channel(inverse * expected.mean.abs()))  # ATen computes x * scale - mean * scale
    for one in (None if o.bias is None else _per_channel(o.bias), o.residual):
        sizes = sizes if one is None else sizes + one.abs()
    between = 0 if stored is None else 4 * unit_roundoff(stored)
    slack = 8 * SLACK * eps + between
    statistics = scale * (_per_channel(shift) + normal * _per_channel(by_var))
    rounded = unit_roundoff(problem.dtype) * expected.y.abs()
    y = rounded + slack * sizes + statistics + _underflow(problem.dtype)
    if expected.grad_x is None or expected.grad_residual is None:
        return BnAct(y, mean, var)
    g = expected.grad_residual.abs()
    dots, by_mean = (g * normal).sum((0, 2, 3)), g.sum((0, 2, 3))
    grad_bias = (sums + eps + between) * by_mean
    grad_weight = (sums + eps + between + by_var) * dots + shift * by_mean
    grad_x = unit_roundoff(problem.dtype) * expected.grad_x.abs() + _underflow(problem.dtype)
    parts: Tensor = g
    if problem.is_training:
        shares = (_per_channel(vector / max(problem.values, 1)) for vector in (dots, by_mean, grad_weight, grad_bias))
        dots, by_mean, dots_off, mean_off = shares
        parts = g + by_mean + normal * dots
        grad_x = grad_x + scale * _per_channel(inverse) * (
            mean_off + normal * dots_off + (_per_channel(shift) + normal * _per_channel(by_var)) * dots
        )
    grad_x = grad_x + _per_channel(slack + 3 * by_var) * scale * _per_channel(inverse) * parts
    return BnAct(y, mean, var, grad_x, grad_weight, grad_bias, torch.zeros_like(g))


class Chain(NamedTuple):
    """What bottleneck_chain gives, or how far each may be from that. reduced: None without a next block."""

    y: Tensor
    reduced: Optional[Tensor]


def bottleneck_chain(problem: ChainProblem, operands: ChainOperands) -> Chain:
    """The convolutions of a chain one behind the other, in fp64, nothing rounded between them."""
    _, y, reduced = _chain_steps(problem, operands)
    return Chain(y, reduced)


def bottleneck_chain_bound(
    problem: ChainProblem, operands: ChainOperands, *, stored: Optional[torch.dtype] = None
) -> Chain:
    """How far a correct kernel may be from the reference, per element. stored: as `error_bound` has it.

    Each convolution errs by its own bound, and by what its weights make of the error of its input. An activation
    spreads no error by more than 1.1, the steepest slope of SiLU. So 1.1 also covers products of errors.
    """
    t, y, reduced = _chain_steps(problem, operands)
    filtered, expanded, *rest = problem.convolutions
    o = operands
    of_t = error_bound(filtered, o.of_filter(), expected=t, stored=stored)
    of_y = _carried(expanded, o.of_expansion(t), of_t, y, stored)
    if reduced is None:
        return Chain(of_y, None)
    return Chain(of_y, _carried(rest[0], o.of_reduction(y), of_y, reduced, stored))


def _chain_steps(problem: ChainProblem, o: ChainOperands) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    filtered, expanded, *rest = problem.convolutions
    t = conv_bn_act(filtered, o.of_filter())
    y = conv_bn_act(expanded, o.of_expansion(t))
    return t, y, conv_bn_act(rest[0], o.of_reduction(y)) if rest else None


def _carried(
    problem: ConvProblem, operands: ConvOperands, off: Tensor, expected: Tensor, stored: Optional[torch.dtype]
) -> Tensor:
    """The bound of a convolution whose x is `off` by that much already."""
    near = operands._replace(x=operands.x.abs() + off)
    own = error_bound(problem, near, expected=expected, stored=stored)
    return own + 1.1 * _conv(problem, off, operands.weight.detach().cpu().double().abs())


def _statistics(o: BnActOperands) -> tuple[Tensor, Tensor]:
    if o.mean is not None and o.var is not None:
        return o.mean, o.var
    mean = o.x.mean((0, 2, 3))
    return mean, (o.x - _per_channel(mean)).square().mean((0, 2, 3))


def _channel_mean(tensor: Tensor) -> Tensor:
    return tensor.mean((0, 2, 3), keepdim=True)


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


def _bn_fp64(o: BnActOperands) -> BnActOperands:
    return o.map(lambda tensor: tensor.detach().cpu().double())


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
