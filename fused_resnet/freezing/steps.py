"""The module of a plan that computes a quantized fragment by one kernel after another, as on a GPU."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional, Union

import torch
from torch import Tensor, nn

from fused_resnet.choosing import Selection
from fused_resnet.choosing.material import in_a_row
from fused_resnet.freezing.region import FrozenRegion, RegionConv
from fused_resnet.operators import layout, quantized
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.operators.quantized import Epilogue
from fused_resnet.regions.fragment import ConvStep, FlattenStep, Fragment, PoolStep


class FrozenSteps(FrozenRegion):
    """A fragment in int8 or e4m3, a kernel for each convolution. Between them tensors are bytes or e4m3.

    weights, epilogues: by the place of the step, on the device. selections: of the fragment's convolutions, in its
    order. why: they are quantized, as part of a sentence.
    """

    def __init__(
        self,
        fragment: Fragment,
        convolutions: tuple[RegionConv, ...],
        weights: Mapping[int, Tensor],
        epilogues: Mapping[int, Epilogue],
        selections: tuple[Selection, ...],
        why: str,
    ) -> None:
        nn.Module.__init__(self)  # there is no compiled region
        self.fragment, self.convolutions, self.why = fragment, convolutions, why
        self.weights = {place: layout.channels_last(weight) for place, weight in weights.items()}
        self.epilogues, self.selections = epilogues, selections
        for place, selection in zip(self.weights, selections):
            plan, problem = selection.backend.plan, self._problem(place)
            self.weights[place] = plan.pack(problem, self.weights[place], selection.config)
        self.micro_kernel = ", ".join(dict.fromkeys(one.backend.name for one in selections))

    def bound(self) -> Callable[..., Union[Tensor, tuple[Tensor, ...]]]:
        """(*inputs) -> outputs, with all else settled: what a plan calls."""
        f, selections = self.fragment, iter(self.selections)
        calls = []
        for place, step in enumerate(f.steps):
            is_conv = isinstance(step, ConvStep)
            calls.append(self._convolution(place, next(selections)) if is_conv else _other(f, step))
        run_steps, ends = in_a_row(f, calls), list(zip(f.outputs, f.has_vectors))

        def run(*inputs: Tensor) -> Union[Tensor, tuple[Tensor, ...]]:
            kept = [x if how is None else quantized.quantize(x, how) for x, how in zip(inputs, f.scales)]
            found: list[Tensor] = []
            for y, (value, is_vectors) in zip(run_steps(kept), ends):
                how = f.scales[value]
                y = y if how is None else quantized.dequantize(y, how)
                found.append(y.flatten(1) if is_vectors else layout.channels_last(y))
            return found[0] if len(found) == 1 else tuple(found)

        return run

    def _convolution(self, place: int, selection: Selection) -> Callable[..., Tensor]:
        weight, epilogue, p = self.weights[place], self.epilogues[place], self._problem(place)
        bind = selection.backend.plan.bind
        if bind is not None:
            return bind(p, weight, epilogue)
        sums = weight.sum((1, 2, 3), dtype=torch.int32) if weight.dtype == torch.int8 else None

        def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
            return selection.run(p, Int8Operands(x, weight, epilogue, residual, sums))

        return run

    def _problem(self, place: int) -> ConvProblem:
        """What a step's kernel computes, of x as it is kept."""
        step = self.fragment.steps[place]
        assert isinstance(step, ConvStep)
        x = self.fragment.scales[step.x]
        assert x is not None
        return step.problem._replace(dtype=x.dtype, has_bias=True, device=self.weights[place].device.type)

    @property
    def weights_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def bytes_moved(self) -> int:
        """Each kernel reads and writes its own."""
        return sum(conv.problem.bytes_moved for conv in self.convolutions)

    @property
    def workspace_bytes(self) -> int:
        """None that is its own: what lies between the steps is torch's to give and to take back."""
        return 0

    def selection_of(self, conv: RegionConv) -> Selection:
        """Who computes one of its convolutions, and why."""
        selection = self.selections[self.convolutions.index(conv)]
        return selection._replace(source=f"{selection.source} ({self.why})")


def _other(fragment: Fragment, step: Union[PoolStep, FlattenStep]) -> Callable[[Tensor], Tensor]:
    if isinstance(step, FlattenStep):
        return lambda x: x
    if step.kind == "max":
        return lambda q: quantized.max_pool(q, step.window, step.stride, step.padding)
    how: Any = fragment.scales[step.x]
    return lambda q: quantized.average_pool(q, how)
