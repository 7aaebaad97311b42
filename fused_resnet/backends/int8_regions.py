"""Convolutions of bytes by the micro-kernels of regions (csrc/cpu/blocked), a backend for each. CPU only.

Plans run whole regions. These are for `fused-resnet verify`, which forces each kernel by its name. A region reads and
writes fp32: with scales of 1 its inputs and its outputs are the bytes themselves.
"""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import Tensor

from fused_resnet.backends import blocked
from fused_resnet.backends.record import Backend
from fused_resnet.kernels import sources
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.operators.quantized import Quantized
from fused_resnet.regions import fragment, kernels
from fused_resnet.regions.fragment import ConvStep, Fragment

# csrc/cpu/blocked/kernels.cpp
NAMES = ("amx_int8", "amx_int8_emulated", "avx512_vnni", "avx_vnni", "avx2_int8", "portable_int8")


def why_not(name: str, problem: ConvProblem) -> Optional[str]:
    of_floats = problem._replace(dtype=torch.float32, groups=1)
    if (reason := blocked.why_not(of_floats) or blocked.why_no_groups(problem, torch.int8)) is not None:
        return reason
    row = next((kernel for kernel in kernels.table() if kernel.name == name), None)
    return "the library does not have it: build it again" if row is None else row.why_not or None


def run(name: str, problem: ConvProblem, operands: Int8Operands) -> Tensor:
    p, o = problem, operands
    bytes_in = [o.x] if o.residual is None else [o.x, o.residual]
    step = ConvStep(p._replace(dtype=torch.int8), 0, 1 if p.has_residual else None)
    scales = tuple(Quantized(1.0, dtype == torch.int8) for dtype in (*(q.dtype for q in bytes_in), p.output_dtype))
    shapes = tuple((int(N), int(C), int(H), int(W)) for N, C, H, W in (q.shape for q in bytes_in))
    region_of = Fragment(shapes, (step,), (len(bytes_in),), torch.int8, scales)
    packed = {place: packing.of([o.weight]) for place, packing in fragment.packings(region_of).items()}
    region = fragment.compile_fragment(region_of, packed, {0: o.epilogue})
    (y,) = region([q.float() for q in bytes_in], region.empty_workspace(), name)
    return y.to(p.output_dtype)


BACKENDS = tuple(
    Backend(
        name, functools.partial(why_not, name), functools.partial(run, name), takes_bn=False, sources=sources.BLOCKED
    )
    for name in NAMES
)
