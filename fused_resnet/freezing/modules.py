"""The modules of a plan: convolutions, linear layers and poolings, with all settled but the input."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet import backends, choosing
from fused_resnet.choosing import planned
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.nn.norms import Norm
from fused_resnet.operators.describe import bn_act_problem
from fused_resnet.operators.layout import channels_last, empty_output
from fused_resnet.operators.operands import BnActOperands
from fused_resnet.operators.problem import ConvProblem, MaxPoolProblem


class FrozenConv(nn.Module):
    """One fused convolution of a plan: the problem, the backend and config chosen for it, and its packed weight."""

    def __init__(
        self,
        problem: ConvProblem,
        selection: choosing.Selection,
        weight: Tensor,
        bias: Optional[Tensor],
        in_place: bool = False,
        placed: Optional[planned.Placed] = None,
    ) -> None:
        """Takes what was decided (`draft.Decision`), and packs the weight."""
        super().__init__()
        self.problem, self.selection, self.bias = problem, selection, bias
        self.weight = selection.backend.plan.pack(problem, weight, selection.config)
        self.in_place, self.placed = in_place, placed

    @property
    def backend(self) -> backends.Backend:
        return self.selection.backend

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return self.bound()(x, residual)

    def bound(self) -> Callable[..., Tensor]:
        """(x, residual=None) -> output, with all else settled: what a plan calls."""
        return planned.bound(
            self.problem, self.selection, self.weight, self.bias, in_place=self.in_place, placed=self.placed
        )

    def extra_repr(self) -> str:
        layout = ", in place" if self.in_place else ", into row space" if self.writes_row_space else ""
        return f"{self.problem}, {self.backend.name}{layout}"

    @property
    def writes_row_space(self) -> bool:
        return self.placed is not None and self.placed.writes_row_space


class FrozenNorm(nn.Module):
    """act(bn(x)) of a norm in front of convolutions, in one pass. kernel: `BnAct.again` of a backend."""

    def __init__(self, norm: Norm, activation: str, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        self.vectors = [None if vector is None else vector.detach().float().clone() for vector in vectors]
        self.eps, self.activation, self.kernel = norm.eps, activation, kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.bound()(x)

    def bound(self) -> Callable[[Tensor], Tensor]:
        (mean, var, weight, bias), eps, activation, kernel = self.vectors, self.eps, self.activation, self.kernel

        def run(x: Tensor) -> Tensor:
            operands = BnActOperands(x, mean, var, weight, bias, None, eps)
            return kernel(bn_act_problem(operands, activation), operands)

        return run

    def extra_repr(self) -> str:
        return self.activation


class FrozenLinear(nn.Module):
    """A classifier on a CPU, its weight packed for oneDNN and the batch size."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, batch: int) -> None:
        super().__init__()
        with torch.no_grad():
            self.weight = planned.pack_linear(linear.weight.to(dtype), batch)
            self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.bound()(x)

    def bound(self) -> Callable[[Tensor], Tensor]:
        return planned.bound_linear(self.weight, self.bias)


class FrozenMaxPool(nn.Module):
    """A max-pooling that writes no indices, perhaps with what the convolution before it left to it.

    kernel: called with (problem, x, bias, output), the images in NHWC.
    """

    def __init__(
        self,
        problem: MaxPoolProblem,
        bias: Optional[Tensor],
        kernel: Callable[[MaxPoolProblem, Tensor, Optional[Tensor], Tensor], None],
    ) -> None:
        super().__init__()
        self.problem, self.bias, self.kernel = problem, bias, kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.bound()(x)

    def bound(self) -> Callable[[Tensor], Tensor]:
        problem, bias, kernel = self.problem, self.bias, self.kernel

        def run(x: Tensor) -> Tensor:
            out = empty_output(problem, x)
            kernel(problem, channels_last(x), bias, out)
            return out

        return run

    def extra_repr(self) -> str:
        return str(self.problem)


class WideConv(nn.Module):
    """A convolution that is no FrozenConv and that torch would compute wrongly in a 16-bit dtype: in fp32.

    run: a module or a function of torch.nn.functional.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = copy.deepcopy(run).float() if isinstance(run, nn.Module) else run

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (dtype,) = {value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return self.run(*args, **kwargs).to(dtype)


class PackedWeights:
    """The packed weights of a model's plans, each once as long as a plan has it: most shapes pack a weight alike."""

    def __init__(self) -> None:
        self._weights: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()

    def shared(
        self, name: str, backend: str, packed: Tensor, kept: Callable[[Tensor], Tensor] = lambda packed: packed
    ) -> Tensor:
        """What another plan has for the convolution or linear layer of this name, if that is the same.

        Else `packed`, in the memory that `kept` gives it.

        oneDNN's packed weights are opaque, and equal where their layouts are.
        """
        if packed.is_mkldnn:
            layout: Any = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())
        else:
            layout = packed.dtype, packed.shape, packed.stride()
        known = self._weights.get((name, backend, layout))
        if known is not None and (known.is_mkldnn or torch.equal(known, packed)):
            return known
        packed = kept(packed)
        self._weights[name, backend, layout] = packed
        return packed

    def has(self, name: str, backend: str) -> bool:
        """Whether a plan has a weight of this name, in whatever layout."""
        return any(key[:2] == (name, backend) for key in list(self._weights))


LOWERED = (FrozenConv, FrozenLinear, FrozenMaxPool, FrozenNorm, FrozenRegion)
