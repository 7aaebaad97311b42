"""oneDNN through torch's private operators: convolution, bias, sum and activation in one primitive. CPU only."""

from __future__ import annotations

import functools
from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends.record import NEEDS_FOLDED_BN, Auto, Backend, InPlan, Rounding, rounds_bias, why_not_cpu
from fused_resnet.machine.onednn import isa_limit
from fused_resnet.operators.composites import activate_
from fused_resnet.operators.detours import forward_detour
from fused_resnet.operators.layout import all_channels_last, channels_last
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, dtype_name

_MKLDNN_ACTIVATION = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


def why_not(problem: ConvProblem) -> Optional[str]:
    folded = NEEDS_FOLDED_BN if problem.has_bn else None
    return why_not_cpu(problem) or folded or onednn_missing(problem.dtype)


@functools.lru_cache(maxsize=None)
def onednn_missing(dtype: torch.dtype) -> Optional[str]:
    """Why oneDNN's fused convolutions are not to be had for this dtype on this machine, or None."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return "this torch has no oneDNN fused convolutions"
    supported: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in supported:
        return f"{dtype_name(dtype)} is not supported (float32, bfloat16, float16 are)"
    if not supported[dtype]():
        variable, limit = isa_limit()
        within = f" within {variable}={limit}" if variable else ""
        return f"this CPU has no {dtype_name(dtype)} instructions that oneDNN can use{within}"
    return None


def run(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    o, detour = all_channels_last(operands), forward_detour(problem)
    weight = o.weight if detour is None else detour.filter(o.weight)
    bias = None if o.bias is None else o.bias.to(o.x.dtype)
    return channels_last(bind(problem, weight, bias)(o.x, o.residual))


def pack(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    # Packed without the input's real size, some shapes fall to a reference loop: bf16 1x1 256->1024 at 14x14 took
    # 11 ms instead of 0.22 (torch 2.13, one core, AVX-512 bf16).
    detour, p = forward_detour(problem), problem
    if detour is not None:
        p, weight = detour.problem, detour.filter(weight)
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, p.padding, p.stride, p.dilation, p.groups, [p.N, p.C, p.H, p.W]
    )


def bind(
    problem: ConvProblem, weight: Tensor, bias: Optional[Tensor], *, into_residual: bool = False
) -> Callable[..., Tensor]:
    """(x, residual=None) -> oneDNN's convolution with bias, add and activation as post-ops.

    Everything that does not change from call to call is bound here, because a plan calls it dozens of times with cold
    caches. weight: as `pack` packs it for this input size, or the filter that it packs. into_residual: the
    sum replaces the residual's memory, and the residual is returned.
    """
    detour = forward_detour(problem)
    if detour is not None:
        inner = bind(detour.problem, weight, bias, into_residual=into_residual)
        return lambda x, residual=None: inner(detour.input(x), residual)
    constants = (weight, bias, problem.padding, problem.stride, problem.dilation, problem.groups)
    act, scalars = _MKLDNN_ACTIVATION[problem.activation]
    convolution = torch.ops.mkldnn._convolution_pointwise.default

    def plain(x: Tensor, residual: None = None) -> Tensor:
        return convolution(x, *constants, act, scalars, "")

    def then_sum(x: Tensor, residual: Tensor) -> Tensor:
        y = convolution(x, *constants, "none", [], "")
        return activate_(residual.add_(y) if into_residual else y.add_(residual), problem.activation)

    # Where strides do not tell channels_last from NCHW, a new output "could not create a memory" (torch 2.11, not 2.12)
    in_place = into_residual or problem.K == 1 or problem.P * problem.Q == 1

    def with_sum(x: Tensor, residual: Tensor) -> Tensor:
        x = channels_last(x)
        # after a sum oneDNN's binding knows only ReLU; the others follow in place
        unary = "relu" if act == "relu" else None
        if in_place:
            op = torch.ops.mkldnn._convolution_pointwise_.binary
            first = (residual if into_residual else residual.clone(memory_format=torch.channels_last), x)
        else:
            op, first = torch.ops.mkldnn._convolution_pointwise.binary, (x, residual)
        y = op(*first, *constants, "add", 1.0, unary, [], "")
        return y if unary else activate_(y, problem.activation)

    if not problem.has_residual:
        return plain
    # The binding does not fuse these sums: it rounds first, its add_relu turns Inf into the largest number and
    # raises in bf16 (torch 2.13). So the sum is ATen's.
    return then_sum if problem.groups > 1 or problem.C * problem.H * problem.W == 1 else with_sum


def _rounds_between(problem: ConvProblem, operands: ConvOperands) -> bool:
    """With these sums ATen adds or activates what oneDNN has rounded."""
    p = problem
    rounds_sum = p.has_residual and (p.groups > 1 or p.activation in ("relu6", "silu"))
    return rounds_sum or rounds_bias(problem, operands)


BACKEND = Backend(
    "onednn",
    why_not,
    run,
    auto=Auto(("cpu",)),
    takes_bn=False,
    rounding=Rounding(_rounds_between, spreads_nan=True, drops_nan=True),
    origin="library",
    plan=InPlan(pack, bind, linears=True),
)
