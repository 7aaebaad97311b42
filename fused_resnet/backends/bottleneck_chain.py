"""A bottleneck from its 3x3 on, with the first 1x1 of the next block: in Triton on GPUs, by ATen anywhere."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from fused_resnet.backends import eager
from fused_resnet.backends.record import Auto, Backend, Configs, Rounding
from fused_resnet.backends.triton import target
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import is_interpreted
from fused_resnet.operators import layout
from fused_resnet.operators.operands import ChainOperands
from fused_resnet.operators.problem import ChainProblem


def _one_by_one(problem: ChainProblem, operands: ChainOperands) -> tuple[Tensor, Tensor]:
    filtered, expanded, *rest = problem.convolutions
    y = eager.run(expanded, operands.of_expansion(eager.run(filtered, operands.of_filter())))
    return y, eager.run(rest[0], operands.of_reduction(y)) if rest else y.new_empty(0)


def _triton_why_not(problem: ChainProblem) -> Optional[str]:
    from fused_resnet.kernels.triton.chain import shift  # Triton itself

    return shift.why_not(problem)


def _in_triton(problem: ChainProblem, operands: ChainOperands, config=None) -> tuple[Tensor, Tensor]:
    """Through copies into row space and out of it. Whoever keeps maps there calls `shift.launch`."""
    from fused_resnet.kernels.triton.chain import shift
    from fused_resnet.kernels.triton.conv import row_space

    p, o = problem, layout.all_channels_last(operands)
    o = o._replace(x=row_space.pack(o.x), residual=row_space.pack(o.residual))
    rows = row_space.num_rows(p.N, p.H, p.W)
    y, reduced = (torch.empty(rows, size, dtype=p.dtype, device=o.x.device) for size in (p.K, p.L))
    shift.launch(p, o, y, reduced if p.L else None, config)
    unpacked = row_space.unpack(y, p.N, p.H, p.W)
    return unpacked, row_space.unpack(reduced, p.N, p.H, p.W) if p.L else y.new_empty(0)


def _worth(problem: ChainProblem) -> Sequence:
    from fused_resnet.kernels.triton.chain import shift

    return shift.configs(problem, target()[0])


# In the order in which auto tries them. Triton's has run on no GPU, and auto takes it on none.
BOTTLENECK_CHAIN = (
    Backend(
        "triton",
        _triton_why_not,
        _in_triton,
        origin="interpreted" if is_interpreted() else "ours",
        sources=sources.TRITON_CHAIN,
        configs=Configs(_worth),
    ),
    Backend(
        "eager",
        lambda problem: None,
        _one_by_one,
        auto=Auto(("cpu", "cuda")),
        rounding=Rounding(lambda problem, operands: True, spreads_nan=True),
        origin="torch",
    ),
)
