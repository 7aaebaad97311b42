"""The convolution by ATen, then one pass of ours over its output, in place: BN, bias, residual and activation."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_resnet.backends.record import Auto, Backend, Rounding
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import is_interpreted
from fused_resnet.machine.errors import one_line
from fused_resnet.operators import affine, composites, detours, layout
from fused_resnet.operators.composites import activate_
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


def why_not(problem: ConvProblem) -> Optional[str]:
    """What `auto` may choose unmeasured is checked first; anything else is asked for by name, or measured."""
    from fused_resnet.kernels.triton import runtime  # Triton itself

    reason = runtime.why_not(problem.device, problem.dtype)
    return reason if reason is not None or not pays(problem) else _why_wrong(problem)


def run(problem: ConvProblem, operands: ConvOperands, in_nchw: bool = False) -> Tensor:
    """in_nchw: to an output in NCHW memory."""
    from fused_resnet.kernels.triton import affine_act

    placed = layout.nchw if in_nchw else layout.channels_last
    x, weight = operands.x, operands.weight
    if not (in_nchw and x.is_contiguous() and weight.is_contiguous()):
        weight = layout.channels_last(weight)
    y = placed(detours.convolution(problem, x, weight))
    o = operands.map(lambda tensor: tensor if tensor.dim() == 4 else tensor.contiguous())
    residual = None if o.residual is None else placed(o.residual)
    affine_act.launch(y, o._replace(residual=residual), problem.activation)
    return y


def pays(problem: ConvProblem) -> bool:
    """In place of eager's three passes. What has no live BN is for plans, and libraries fuse its bias."""
    return problem.has_bn


# Whether the pass was right on this machine, by dtype, has_residual and activation: None, or how it was not.
_checked: dict[tuple, Optional[str]] = {}


def _why_wrong(problem: ConvProblem) -> Optional[str]:
    """Why the pass must not be used here. Asked of the kernel itself, once in a process, by running it."""
    key = (problem.device, problem.dtype, problem.has_residual, problem.activation)
    if key not in _checked:
        if not _may_check():
            return "it is checked at its first call, which cannot be in a CUDA graph, a trace or a transform"
        _checked[key] = self_check(*key)
    return _checked[key]


def _may_check() -> bool:
    is_watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or composites.is_transformed()
    )
    return not is_watched and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def self_check(device: str, dtype: torch.dtype, has_residual: bool, activation: str) -> Optional[str]:
    """Why the pass is wrong on this machine, found by one small tensor in either layout, or None."""
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), torch._C.DisableTorchFunction():
            for placed in (layout.channels_last, layout.nchw):
                if not _is_right(placed, device, dtype, has_residual, activation):
                    return f"its self-check was wrong for {activation} in {dtype}"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"its self-check failed ({one_line(error)})"
    return None


def _is_right(placed, device: str, dtype: torch.dtype, has_residual: bool, activation: str) -> bool:
    """Whether the pass gives what ATen gives in fp32. The sizes fill no tile; the values go through all branches."""
    from fused_resnet.kernels.triton import affine_act

    N, K, P, Q = 3, 152, 5, 7
    steps = torch.arange(N * K * P * Q, device=device, dtype=torch.float32)
    y = placed((torch.sin(steps) * 8).view(N, K, P, Q).to(dtype))
    y[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    vectors = [torch.cos(steps[:K] + shift) for shift in range(4)]
    variance = torch.cos(steps[:K]) ** 2
    residual = placed(torch.cos(steps).view(N, K, P, Q).to(dtype)) if has_residual else None
    gamma, beta, mean, bias = vectors
    o = ConvOperands(y, y.new_empty(K, 1, 1, 1), gamma, beta, mean, variance, bias=bias, residual=residual)
    scale, shift = affine.scale_and_shift(o, torch.float32)
    expected = y.float() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    expected = activate_(expected if residual is None else expected + residual, activation)
    affine_act.launch(y, o, activation)
    # fp32's own roundings, of terms up to thousands where the variance is small
    tolerance = 8 * torch.finfo(dtype).eps
    error = (y.float() - expected).abs() - tolerance * (expected.abs() + (scale.abs() * 8 + 8).view(1, -1, 1, 1))
    agrees = (error <= 0) | (y == expected) | (y.isnan() & expected.isnan())
    return bool(agrees.all())


BACKEND = Backend(
    "cudnn_pass",
    why_not,
    run,
    auto=Auto(("cuda",), pays),
    rounding=Rounding(lambda problem, operands: True, spreads_nan=True),  # the convolution's output is rounded
    origin="interpreted" if is_interpreted() else "ours",
    sources=sources.PASS,
    after_aten=True,
)
