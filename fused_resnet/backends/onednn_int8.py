"""oneDNN's convolutions of bytes, through torch's private operators: a step off at most (`near_bytes`). CPU only.

With scales of 1 and the multipliers as the weight's scales it computes the contract's formula, and rounds more often.
So nothing takes it unasked. The binding knows u8 alone: s8 are u8 with a zero point of 128, the same but for a bit.
"""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends.record import Backend, InPlan, Rounding, why_not_cpu
from fused_resnet.machine import onednn
from fused_resnet.operators.detours import forward_detour
from fused_resnet.operators.layout import channels_last, empty_output
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.operators.quantized import Epilogue

_ZERO_POINT = 128


def why_not(problem: ConvProblem) -> Optional[str]:
    p, reason = problem, why_not_cpu(problem)
    if reason is not None:
        return reason
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")):
        return "this torch has no oneDNN convolutions of bytes"
    if (reason := onednn.why_no_vnni()) is not None:
        return reason
    # What its sums hold for padding is not written in full (oneDNN 3.12): of one channel and several outputs a group
    # with AVX-512, with AMX also where a group's outputs fill no blocks.
    is_grouped = (p.groups > 1 or p.C == 1) and not p.C == p.groups == p.K
    if p.dtype == torch.int8 and is_grouped and p.padding != (0, 0):
        return "oneDNN computes padding around s8 wrongly in groups other than depthwise ones"
    return None


def run(problem: ConvProblem, operands: Int8Operands) -> Tensor:
    o = operands
    if not problem.N:
        return empty_output(problem, o.x)
    return bind(problem, pack(problem, o.weight), o.epilogue)(o.x, o.residual)


def pack(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    p, detour = problem, forward_detour(problem)
    if detour is not None:
        p, weight = detour.problem, detour.filter(weight)
    ones, size = torch.ones(p.K), [p.N, p.C, p.H, p.W]
    how = (p.stride, p.padding, p.dilation, p.groups)
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, _zero_point(problem.dtype), *how, size)


def bind(problem: ConvProblem, weight: Tensor, epilogue: Epilogue) -> Callable[..., Tensor]:
    """(x, residual=None) -> output. weight: packed."""
    p, e, detour = problem, epilogue, forward_detour(problem)
    if detour is not None:
        p = detour.problem
    is_signed, zeros = e.dtype == torch.int8, torch.zeros(p.K, dtype=torch.int32)
    of_x = (1.0, _zero_point(p.dtype))
    of_weight = (weight, e.multiplier.contiguous(), zeros)
    how = (p.stride, p.padding, p.dilation, p.groups, 1.0, _zero_point(e.dtype), torch.uint8)
    convolution, with_sum = torch.ops.onednn.qconv2d_pointwise.default, torch.ops.onednn.qconv2d_pointwise.binary
    bias, highest = e.bias.contiguous(), round(e.high)

    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        x = _as_u8(x if detour is None else detour.input(x))
        if residual is None:
            y = convolution(x, *of_x, *of_weight, bias, *how, "none", [], "")
        else:
            of_sum: tuple = (e.residual, _zero_point(residual.dtype), "sum", 1.0, "none", [], "")
            y = with_sum(x, *of_x, *of_weight, _copied_as_u8(residual), bias, *how, *of_sum)
        if is_signed:
            return channels_last(y.bitwise_xor_(_ZERO_POINT).view(torch.int8))
        # of ReLU6: the same before and behind the rounding
        return channels_last(y.clamp_(max=highest) if highest < 255 else y)

    return run


def _zero_point(dtype: torch.dtype) -> int:
    return _ZERO_POINT if dtype == torch.int8 else 0


def _as_u8(q: Tensor) -> Tensor:
    q = channels_last(q)
    return q.view(torch.uint8) ^ _ZERO_POINT if q.dtype == torch.int8 else q


def _copied_as_u8(q: Tensor) -> Tensor:
    """The same in memory of its own: sums replace what they add."""
    return _as_u8(q if q.dtype == torch.int8 else q.clone(memory_format=torch.channels_last))


BACKEND = Backend(
    "onednn",
    why_not,
    run,
    takes_bn=False,
    rounding=Rounding(near_bytes=True),
    origin="library",
    plan=InPlan(pack, bind),
)
