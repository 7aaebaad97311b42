"""One problem with its operands, what it should give, and how a backend did on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_resnet import functional
from fused_resnet.operators import reference
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import AddReluProblem, Problem, dtype_name


class AddReluOperands(NamedTuple):
    """The addends, and the gradient that the backward kernel is given."""

    a: Tensor
    b: Tensor
    grad: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operator with its operands, and what the reference says about it."""

    problem: Problem
    operands: Union[ConvOperands, AddReluOperands]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.operands._asdict().items() if isinstance(value, Tensor)}

    @functools.cached_property
    def bounds(self) -> dict[tuple[Optional[torch.dtype], bool], Tensor]:
        """For `bound_of`, which is asked once per backend and config and finds few different ones."""
        return {}

    @functools.cached_property
    def expected(self) -> Tensor:
        """The reference's result, fp64 on the CPU."""
        if isinstance(self.problem, AddReluProblem):
            return reference.add_relu(self.operands.a, self.operands.b)
        return reference.conv_bn_act(self.problem, self.operands)

    def run(self, backend: str) -> Tensor:
        """The public function's result, without gradients."""
        with torch.no_grad():
            if isinstance(self.problem, AddReluProblem):
                return functional.add_relu(self.operands.a, self.operands.b, backend=backend)
            p, o = self.problem, self.operands
            return functional.conv_bn_act(
                *o[:6], eps=o.eps, bias=o.bias, residual=o.residual, stride=p.stride, padding=p.padding,
                dilation=p.dilation, groups=p.groups, activation=p.activation, backend=backend,
            )  # fmt: skip

    def __str__(self) -> str:
        shown = (f"{name} {dtype_name(t.dtype)}{list(t.stride())}" for name, t in self.tensors.items())
        return f"{self.problem.op} {self.problem} ({', '.join(shown)})"


class Outcome(NamedTuple):
    """What came of one case on one backend.

    status: "ok", "mismatch" or "cannot run". detail: what differs and where, or the backend's why_not. worst_error:
    the largest error as a fraction of what the reference allows there; 0 for an exact operator, None if not run.
    """

    backend: str
    status: str
    detail: str = ""
    worst_error: Optional[float] = None
