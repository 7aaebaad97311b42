"""A bottleneck from its 3x3 on, with the 1x1 of the next block: its convolutions one by one, by ATen."""

from __future__ import annotations

from torch import Tensor

from fused_resnet.backends import eager
from fused_resnet.backends.record import Auto, Backend, Rounding
from fused_resnet.operators.operands import ChainOperands
from fused_resnet.operators.problem import ChainProblem


def _one_by_one(problem: ChainProblem, operands: ChainOperands) -> tuple[Tensor, Tensor]:
    filtered, expanded, *rest = problem.convolutions
    y = eager.run(expanded, operands.of_expansion(eager.run(filtered, operands.of_filter())))
    return y, eager.run(rest[0], operands.of_reduction(y)) if rest else y.new_empty(0)


# In the order in which auto tries them.
BOTTLENECK_CHAIN = (
    Backend(
        "eager",
        lambda problem: None,
        _one_by_one,
        auto=Auto(("cpu", "cuda")),
        rounding=Rounding(lambda problem, operands: True, spreads_nan=True),
        origin="torch",
    ),
)
