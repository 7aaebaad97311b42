"""bn_act with the statistics of several processes: what nn.SyncBatchNorm computes, on CPUs too.

Each process sends count, mean and variance of its part, and in the backward two sums per channel. All of them join what
they got in the same order, in fp64, so that they agree to the last bit. A process may have any number of images.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_resnet import choosing
from fused_resnet.backends.bn_act import BnAct
from fused_resnet.operators import gradients
from fused_resnet.operators.describe import bn_act_problem
from fused_resnet.operators.operands import BnActOperands


def group_of(bn: Any) -> Optional[Any]:
    """The process group that a norm in training mode takes its statistics from; None where it is this process alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not dist.is_available() or not dist.is_initialized():
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class Joined:
    """What the processes of a group know together of one call. values: of a channel, in this process.

    total: the values of a channel in all processes, once `statistics` has been called.
    """

    def __init__(self, group: Any, values: int) -> None:
        self._group, self._values, self.total = group, values, 0

    def statistics(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all processes, from those of each.

        Raises ValueError where there is one value per channel in all.
        """
        count = mean.new_full((1,), self._values, dtype=torch.float64)
        parts = self._gathered(torch.cat((count, mean.double(), var.double())))
        counts, (means, variances) = parts[:, :1], parts[:, 1:].chunk(2, 1)
        self.total = int(counts.sum())
        if self.total <= 1:
            raise ValueError(
                f"bn_act: Expected more than 1 value per channel when training, got {self.total} in all processes. "
                "Give them larger batches."
            )
        joined = (counts * means).sum(0) / self.total
        # of the squares, each about its own mean: sums of squares about 0 would cancel
        spread = (counts * (variances + (means - joined).square())).sum(0) / self.total
        return joined.to(mean.dtype), spread.to(var.dtype)

    def sums(self, sum: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient's sums over all processes, for a backward that divides them by this process's values."""
        total = self._gathered(torch.cat((sum.double(), dot.double()))).sum(0) * (self._values / self.total)
        first, second = total.to(sum.dtype).chunk(2)
        return first, second

    def _gathered(self, part: Tensor) -> Tensor:
        """A row for each process."""
        rows = [torch.empty_like(part) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(rows, part, group=self._group)
        return torch.stack(rows)


def bn_act(group: Any, operands: BnActOperands, activation: str, backend: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """y, and of all processes mean, biased variance and values of a channel. Gradients are once differentiable.

    Those of weight and bias are this process's own, as torch's: DDP adds them up.
    """
    N, _, H, W = operands.x.shape
    joined = Joined(group, N * H * W)
    y, mean, var = _BnAct.apply(joined, *operands, activation, backend)[:3]
    return y, mean, var, joined.total


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(joined, *args):
        o, (activation, backend) = BnActOperands(*args[:7]), args[7:]
        problem, run = _chosen(o, activation, backend)
        return run.forward(problem, o, joined.statistics)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.joined = inputs[0]
        gradients.keep_for_bn_act(ctx, inputs[1:], output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *of_statistics):
        o, bits = gradients.kept_of_bn_act(ctx)
        needs = dict(zip(BnActOperands._fields, ctx.needs_input_grad[1:]))
        problem, run = _chosen(o, ctx.activation, ctx.backend)
        is_passed_on = ctx.activation == "none"  # the residual's gradient is the output's
        found = run.backward(
            problem, grad, o, bits, needs["x"], needs["residual"] and not is_passed_on, ctx.joined.sums
        )
        grads = dict.fromkeys(BnActOperands._fields)
        for name, gradient in zip(("x", "weight", "bias", "residual"), found):
            if needs[name]:
                grads[name] = grad if name == "residual" and is_passed_on else gradient
        return (None, *grads.values(), None, None)


def _chosen(o: BnActOperands, activation: str, backend: str) -> tuple[Any, BnAct]:
    """The problem of this process's part, in which one value per channel is enough."""
    nothing = o.x.new_empty(o.x.shape[1], dtype=torch.promote_types(torch.float32, o.x.dtype))
    known = o if o.mean is not None else o._replace(mean=nothing, var=nothing)
    problem = bn_act_problem(known, activation)._replace(is_training=True)
    return problem, cast(BnAct, choosing.select(problem, backend).backend.run)
