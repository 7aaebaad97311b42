"""How a plan calls a convolution: with all settled but the input. What is measured is this call."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.choosing.choice import Selection
from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.operators import layout
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


class Placed(NamedTuple):
    """A Triton convolution of a plan: its config (None: the default), and whether its output lies in row space."""

    problem: ConvProblem
    config: Optional[TritonConfig]
    writes_row_space: bool = False

    @property
    def wants_row_space(self) -> bool:
        """Whether its kernel reads x from row space alone: any other x would be copied there at every call."""
        return self.config is not None and self.config.form == "rows_tma"

    def run(self, operands: ConvOperands) -> Tensor:
        """x and the residual are NHWC or in row space, as whoever made them decided."""
        from fused_resnet.kernels.triton.conv import launch  # Triton itself

        p = self.problem
        if self.writes_row_space:
            out = operands.x.new_empty(row_space.num_rows(p.N, p.P, p.Q), p.K)
        else:
            out = operands.x.new_empty(p.N, p.P, p.Q, p.K).permute(0, 3, 1, 2)
        in_memory = operands.map(lambda tensor: layout.channels_last(tensor) if tensor.dim() == 4 else tensor)
        launch.launch(p, in_memory, out, self.config)
        return out


def bound(
    problem: ConvProblem,
    selection: Selection,
    weight: Tensor,
    bias: Optional[Tensor],
    *,
    in_place: bool = False,
    placed: Optional[Placed] = None,
) -> Callable[..., Tensor]:
    """(x, residual=None) -> output. weight: packed as the backend reads it in plans. bias: of folded BN.

    in_place: the sum replaces the residual's memory, where the backend can do that.
    """
    if selection.backend.plan.bind is not None:
        return selection.backend.plan.bind(problem, weight, bias, into_residual=in_place)
    if placed is not None:
        run_placed = placed.run
        return lambda x, residual=None: run_placed(ConvOperands(x, weight, bias=bias, residual=residual))
    run = selection.run
    return lambda x, residual=None: run(problem, ConvOperands(x, weight, bias=bias, residual=residual))


def pack_linear(weight: Tensor, batch: int) -> Tensor:
    """The weight (K, C) of a linear layer as oneDNN reads it for this batch."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, batch)


def bound_linear(weight: Tensor, bias: Optional[Tensor]) -> Callable[[Tensor], Tensor]:
    """x (N, C) -> (N, K), as a plan calls a linear layer on a CPU. weight: packed."""
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, weight, bias, "none", [], "")


class Planned(NamedTuple):
    """A convolution with the memory that a plan would give it.

    x, residual: where its input lies, to be written before each call. in_place: the sum replaces the residual's memory.
    """

    run: Callable[..., Tensor]
    x: Tensor
    residual: Optional[Tensor]
    in_place: bool
    reads_row_space: bool

    def take(self, x: Tensor, residual: Optional[Tensor]) -> None:
        """Write the input where the kernel reads it, as whoever computes before it in a plan."""
        if self.residual is not None and residual is not None:
            self.residual.copy_(residual)
        self.x.copy_(row_space.pack(x) if self.reads_row_space else x)

    def call(self) -> Tensor:
        return self.run(self.x, self.residual)


def planned_call(
    problem: ConvProblem, selection: Selection, operands: ConvOperands, *, in_place: bool = False
) -> Planned:
    """A convolution with folded BN as a frozen plan calls it: its weight packed, and x where the plan would have it.

    For a rows_tma config that is row space, and its time holds no conversion: a plan takes what was measured best
    without wherever it cannot keep x there (`freezing.layouts`). The residual and the output are NHWC, since where
    those lie depends on who else reads them. Triton without a config, which is to say unmeasured, runs its default, for
    which a plan that is replayed takes a likelier one. With live BN it is called as the operator calls it.

    in_place: a sum replaces its residual where the backend can do that.
    """
    plan = selection.backend.plan
    x, residual = operands.x, operands.residual
    if problem.has_bn:
        live = selection.run
        run = lambda x, residual: live(problem, operands._replace(x=x, residual=residual))  # noqa: E731
        return Planned(run, x, residual, False, False)
    placed = Placed(problem, selection.config) if plan.placed else None
    reads_row_space = placed is not None and placed.wants_row_space
    in_place = in_place and problem.has_residual and plan.bind is not None
    weight = plan.pack(problem, operands.weight, selection.config)
    run = bound(problem, selection, weight, operands.bias, in_place=in_place, placed=placed)
    return Planned(run, row_space.pack(x) if reads_row_space else x, residual, in_place, reads_row_space)
