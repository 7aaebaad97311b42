"""Convolutions of one group over blocked activations in C++ (csrc/cpu/blocked): to blocks, the product, back. CPU only.

`auto` takes it for a single convolution only where that was measured to pay. Its kernels are made for regions, whose
maps stay in blocks from one convolution to the next (`regions`).
"""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends.cpu_kernels import packing, why_no_kernel
from fused_resnet.backends.record import Backend, InPlan
from fused_resnet.kernels import sources
from fused_resnet.operators.layout import channels_last, empty_output
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions import calls, fragment, kernels, layout
from fused_resnet.regions.fragment import ConvStep, Fragment, compile_fragment
from fused_resnet.regions.layout import MOST_TAPS

# channels that a panel may read for each of a group: the others meet zeros
_MOST_READ, _MOST_READ_BY_TILES = {torch.float32: 2, torch.bfloat16: 4, torch.int8: 16}, 8
_MOST = 2**24  # csrc/cpu/blocked/program.cpp: of every number but a window's sides


def why_not(problem: ConvProblem) -> Optional[str]:
    if problem.groups != 1:
        return f"it computes convolutions of one group, not of {problem.groups}"
    return why_not_in_region(problem)


def why_not_in_region(problem: ConvProblem) -> Optional[str]:
    """The same of a region, which also computes groups: as plans may, it spreads what is not finite to neighbours."""
    p, reason = problem, why_no_kernel(problem)
    if reason is not None:
        return reason
    if (reason := why_no_groups(p, p.dtype)) is not None:
        return reason
    if not (p.H and p.W):
        return f"it needs a map of one pixel at least, not {p.H}x{p.W}"
    if max(p.R, p.S) > MOST_TAPS:
        return f"its windows are at most {MOST_TAPS} pixels high and wide, not {p.R}x{p.S}"
    sizes = (p.N, p.C, p.K, p.H, p.W, p.P, p.Q, *p.stride, *p.padding, *p.dilation, p.C * p.R * p.S)
    if max(sizes) > _MOST:
        return f"its sizes are at most {_MOST}, not {max(sizes)}"
    return kernels.why_none(p.dtype)


def why_no_groups(problem: ConvProblem, dtype: torch.dtype) -> Optional[str]:
    """Why a region of this dtype does not compute the problem's groups. In int8 the same everywhere: who computes a
    convolution there is part of the result."""
    p, each, most = problem, problem.C // problem.groups, _MOST_READ[dtype]
    if p.groups == 1 or not p.C or not p.K:
        return None
    if dtype == torch.bfloat16 and kernels.fastest_name(dtype).startswith("amx"):
        most = _MOST_READ_BY_TILES
    read = layout.blocks_of_panels(p.K, p.C, p.groups, dtype).each * layout.lanes(dtype)
    if read <= most * each:
        return None
    return f"its panels would read {read} channels for groups of {each}, and more than {most} times as many do not pay"


def pack(problem: ConvProblem, weight: Tensor, config: None = None) -> Tensor:
    """As `regions.fragment.Packing` says."""
    return fragment.packings(_fragment(problem))[0].of([weight])


def _fragment(problem: ConvProblem) -> Fragment:
    p = problem
    shapes = ((p.N, p.C, p.H, p.W), *([p.output_shape] if p.has_residual else []))
    return Fragment(shapes, (ConvStep(p, 0, 1 if p.has_residual else None),), (len(shapes),), p.dtype)


def bind(
    problem: ConvProblem, weight: Tensor, bias: Optional[Tensor], *, into_residual: bool = False
) -> Callable[..., Tensor]:
    p, region = problem, compile_fragment(_fragment(problem), {0: weight}, {0: bias})
    call = calls.bound(region, calls.new_workspaces(region))

    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        inputs = [x] if residual is None else [x, channels_last(residual)]
        out = inputs[1] if into_residual and residual is not None else empty_output(p, x)
        call(inputs, [out])
        return out

    return run


BACKEND = Backend(
    "blocked",
    why_not,
    packing(pack, bind),
    takes_bn=False,
    sources=sources.BLOCKED,
    plan=InPlan(pack, bind, only=True),
)
