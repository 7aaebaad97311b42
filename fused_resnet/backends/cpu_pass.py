"""ATen's convolution, then one pass of ours over its output, in place: BN, residual and activation, on a CPU."""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends import eager
from fused_resnet.backends.record import Auto, Backend, Rounding, why_not_cpu
from fused_resnet.kernels import compiled, sources
from fused_resnet.operators import detours
from fused_resnet.operators.layout import channels_last, empty_output, nchw
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, dtype_name

_DTYPES = (torch.float32, torch.bfloat16)


def why_not(problem: ConvProblem) -> Optional[str]:
    p, reason = problem, why_not_cpu(problem)
    if reason is not None:
        return reason
    if not p.has_bn:
        return "it is for live BN; what has folded BN is computed in one pass by others"
    if p.dtype not in _DTYPES:
        return f"{dtype_name(p.dtype)} is not supported (float32, bfloat16 are)"
    return compiled.load("cpu")


def run(problem: ConvProblem, operands: ConvOperands, in_nchw: bool = False) -> Tensor:
    """in_nchw: to an output in NCHW memory."""
    o, placed = operands, nchw if in_nchw else channels_last
    mean, bias = o.bn_mean, o.bias
    if bias is not None and bias.dtype != o.x.dtype:  # ATen does not take it
        mean, bias = (-bias if mean is None else mean.float() - bias), None
    y = placed(eager.convolution(problem, o, bias))
    residual = None if o.residual is None else placed(o.residual)
    vectors = (None if v is None else _as_read(v) for v in (o.bn_weight, o.bn_bias, mean, o.bn_var))
    torch.ops.fused_resnet.cpu_affine_act.default(y, *vectors, o.eps, residual, problem.activation)
    return y


def _as_read(vector: Tensor) -> Tensor:
    return (vector if vector.dtype in _DTYPES else vector.float()).contiguous()


def settled(problem: ConvProblem, operands: ConvOperands, in_nchw: bool) -> Optional[Callable[..., Tensor]]:
    """`run` without its questions, for operands in a row with the facts of these: x to bn_var, eps, bias, residual.

    None where an answer may be another one at the next call, and off the usual path.
    """
    p, o, placed = problem, operands, nchw if in_nchw else channels_last
    if p.dtype != torch.float32 or detours.forward_detour(p) is not None:
        return None
    if any(_as_read(vector) is not vector for vector in o[2:6] if vector is not None):
        return None
    conv2d, affine_act, groups = torch.conv2d, torch.ops.fused_resnet.cpu_affine_act.default, p.groups
    # one number is read faster than a pair
    stride, padding, dilation = (one[0] if one[0] == one[1] else one for one in (p.stride, p.padding, p.dilation))
    is_brought, activation = eager.is_brought_into_nchw(p, o), p.activation
    strides = empty_output(p, torch.empty(0, device="meta"), not in_nchw).stride()

    def run(x, weight, gamma, beta, mean, var, eps, bias, residual) -> Tensor:
        y = conv2d(x.contiguous() if is_brought else x, weight, bias, stride, padding, dilation, groups)
        if y.stride() != strides:
            y = placed(y)
        if residual is not None and residual.stride() != strides:
            residual = placed(residual)
        affine_act(y, gamma, beta, mean, var, eps, residual, activation)
        return y

    return run


BACKEND = Backend(
    "cpu_pass",
    why_not,
    run,
    auto=Auto(("cpu",)),
    rounding=Rounding(lambda problem, operands: True, spreads_nan=True),  # the convolution's output is rounded
    sources=sources.CPU_PASS,
    after_aten=True,
)
