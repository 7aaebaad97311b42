"""Whether a candidate computes a convolution right on this very machine, as a plan would run it."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.choosing import winners
from fused_resnet.choosing.case import Case, poisoned_memory, synchronize
from fused_resnet.choosing.cases import finite, folded_operands, in_order, order_of, random_operands, worst_error
from fused_resnet.choosing.choice import Selection
from fused_resnet.choosing.planned import Planned, planned_call
from fused_resnet.choosing.timing import Fed
from fused_resnet.machine import cuda_graphs, devices
from fused_resnet.machine.errors import is_out_of_memory, one_line
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


class Subject:
    """One convolution, and what its candidates are held against: an ordinary image, and one of extreme values.

    Each place of the batch holds either in turn. The candidates share the memory of x and of the residual.
    """

    def __init__(self, problem: ConvProblem, device: str) -> None:
        self.problem, self.device = problem, device
        live = random_operands(problem._replace(N=2), device, is_extreme=True)
        self.images = live if problem.has_bn else folded_operands(live, has_bias=problem.has_bias)

    @functools.cached_property
    def case(self) -> Case:
        return Case(self.problem._replace(N=2), self.images)

    @functools.cached_property
    def operands(self) -> ConvOperands:
        return self.batch(order_of(self.problem.N))

    def batch(self, order: Tensor) -> ConvOperands:
        """A batch of the two images in this order, in new memory."""
        o = self.images
        return o._replace(x=in_order(o.x, order), residual=None if o.residual is None else in_order(o.residual, order))

    def planned(self, candidate: Selection) -> Planned:
        return planned_call(self.problem, candidate, self.operands, in_place=True)

    def fed(self, planned: Planned, call: Callable[[], Tensor]) -> Fed:
        """The call with its input written anew, to be timed."""
        given = self._given
        return Fed(lambda: planned.take(given.x, given.residual), call)

    @functools.cached_property
    def _given(self) -> ConvOperands:
        return self.batch(order_of(self.problem.N))


class Checked(NamedTuple):
    """What came of a check. call: the candidate as it may be timed, if it is right.

    outcome: {"error_ratio": the worst error as a fraction of what is allowed, None if that is no number}, or {"why"} it
    could not be run. "is_passing": that says something of the moment, and not of the candidate.
    """

    outcome: dict[str, Any]
    planned: Optional[Planned] = None
    call: Optional[Callable[[], Tensor]] = None


def tried(subject: Subject, candidate: Selection) -> dict[str, Any]:
    """Run a candidate once. {}, or as an outcome why it could not be run; whether it is right is not asked."""
    try:
        with torch.no_grad(), devices.on(subject.device):
            subject.planned(candidate).call()
    except Exception as error:
        return _why_not_run(error)
    return {}


def _why_not_run(error: Exception) -> dict[str, Any]:
    passes = {"is_passing": True} if is_out_of_memory(error) else {}
    return {"why": one_line(error), **passes}


def checked(subject: Subject, candidate: Selection, known: Optional[dict[str, Any]] = None) -> Checked:
    """Run a candidate and compare all of its output, twice, with other values at each place the second time.

    Before each time it has computed from NaN alone, and new memory holds NaN: what it keeps from call to call, reads
    without having written it, or leaves out, shows. It may write into no input but the residual that it replaces. On
    CUDA it is captured first, as a plan does. known: the outcome of an earlier check, which is not repeated. Whatever a
    kernel, a compiler or a library raises costs this candidate alone.
    """
    if known is not None and winners.why_wrong(known) is not None:
        return Checked(known)
    try:
        with torch.no_grad(), devices.on(subject.device):
            planned = subject.planned(candidate)
            call = planned.call if subject.device == "cpu" else cuda_graphs.captured(planned.call)
            outcome = known or {"error_ratio": finite(_worst_of_two(subject, candidate, planned, call))}
    except Exception as error:
        return Checked(_why_not_run(error))
    return Checked(outcome, planned, call) if winners.why_wrong(outcome) is None else Checked(outcome)


def _worst_of_two(subject: Subject, candidate: Selection, planned: Planned, call: Callable[[], Tensor]) -> float:
    worst, p, first = 0.0, subject.problem, order_of(subject.problem.N)
    for order in (first, 1 - first):
        batch = subject.batch(order)
        planned.take(torch.full_like(batch.x, torch.nan), batch.residual)
        stained = call()
        planned.take(batch.x, batch.residual)
        before = planned.x.clone()
        with poisoned_memory(stained):
            del stained
            actual = call()
        synchronize(actual.device)
        if (tuple(actual.shape), actual.dtype) != (p.output_shape, p.dtype):
            raise ValueError(f"its output is {tuple(actual.shape)} in {actual.dtype}")
        if not torch.equal(planned.x, before) or not (planned.in_place or _is_kept(planned.residual, batch.residual)):
            raise ValueError("it writes into its input")
        worst = max(worst, worst_error(subject.case, candidate.backend.name, actual, order))
    return worst


def _is_kept(residual: Optional[Tensor], given: Optional[Tensor]) -> bool:
    return residual is None or given is None or torch.equal(residual, given)
