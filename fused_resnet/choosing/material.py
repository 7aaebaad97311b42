"""What a piece is run on: random weights and images; and its nodes one by one, in several ways."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import backends
from fused_resnet.backends import winograd
from fused_resnet.choosing.choice import Selection
from fused_resnet.choosing.piece import Piece
from fused_resnet.choosing.planned import bound, bound_linear, pack_linear
from fused_resnet.operators import composites, reference
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions.fragment import (
    ConvStep,
    CopyStep,
    Fragment,
    GateStep,
    PoolStep,
    by_winograd,
    compile_fragment,
    packings,
)
from fused_resnet.regions.program import CompiledRegion

Call = Callable[..., Tensor]
Nodes = Callable[[Sequence[Tensor]], list[Tensor]]


class Material:
    """Random weights and biases of a plan's convolutions by their place there, and the same packed: each once."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, ConvProblem], tuple[Tensor, Optional[Tensor]]] = {}
        self._packed: dict[Any, Tensor] = {}

    def of(self, piece: Piece) -> dict[int, tuple[Tensor, Optional[Tensor]]]:
        """(weight, bias) by step."""
        found = {}
        for step, (place, one) in enumerate(zip(piece.places, piece.fragment.steps)):
            if isinstance(one, ConvStep):
                p, key = one.problem, (place, one.problem)
                if key not in self._weights:
                    generator = torch.Generator().manual_seed(place)
                    weight = torch.randn(p.K, p.C // p.groups, p.R, p.S, generator=generator) * math.sqrt(
                        2 / p.reduction
                    )
                    bias = torch.empty(p.K).uniform_(-0.5, 0.5, generator=generator) if p.has_bias else None
                    weight = weight.to(p.dtype, memory_format=torch.channels_last)
                    self._weights[key] = weight, None if bias is None else bias.to(p.dtype)  # as `affine.fold` has them
                found[step] = self._weights[key]
        return found

    def region(self, piece: Piece) -> CompiledRegion:
        of, packed = self.of(piece), {}
        for step, packing in packings(piece.fragment).items():
            key = packing._replace(parts=tuple(piece.places[part] for part in packing.parts))
            weights = [of[part][0] for part in packing.parts]
            packed[step] = self._once(key, functools.partial(packing.of, weights))
        return compile_fragment(piece.fragment, packed, {step: bias for step, (_, bias) in of.items()})

    def separate(self, piece: Piece) -> Nodes:
        """The nodes as a plan calls them one by one."""
        of, calls, f = self.of(piece), list[Call](), piece.fragment
        for step, (one, how) in enumerate(zip(f.steps, piece.separate or ())):
            if isinstance(one, ConvStep) and how is not None:
                p, selection = one.problem, how.selection
                pack = functools.partial(selection.backend.plan.pack, p, of[step][0], selection.config)
                packed = self._once((str(selection), piece.places[step], p), pack)
                calls.append(bound(p, selection, packed, of[step][1], in_place=how.in_place))
            elif isinstance(one, ConvStep):
                calls.append(linear(*of[step], one.problem.N))
            elif isinstance(one, PoolStep):
                calls.append(_pooling_of_plans(f, step))
            elif isinstance(one, CopyStep):
                calls.append(_copies_of_torch(one))
            elif isinstance(one, GateStep):
                calls.append(one.of)
            else:
                calls.append(lambda x: x)
        return in_a_row(f, calls)

    def in_fp64(self, piece: Piece) -> Nodes:
        """The nodes for two images, exactly."""
        of = self.of(piece)
        return _nodes(piece.fragment, lambda step, p: _convolution_in_fp64(p, *of[step]))

    def in_fp32(self, piece: Piece) -> Nodes:
        """The nodes for two images as they should be: sums in fp32, each result rounded to the fragment's dtype.

        By a matrix product of torch, no matter what computes them in a plan. What the region computes by Winograd is
        computed so here, too, by the kernel for a convolution by itself.
        """
        of, points = self.of(piece), by_winograd(piece.fragment)

        def convolution(step: int, problem: ConvProblem) -> Call:
            weight, bias = of[step]
            if step not in points:
                return _convolution_in_fp32(problem, weight, bias)
            return bound(problem, Selection(winograd.BACKEND), winograd.pack(problem, weight), bias)

        return _nodes(piece.fragment, convolution)

    def _once(self, key: Any, pack: Callable[[], Tensor]) -> Tensor:
        if key not in self._packed:
            self._packed[key] = pack()
        return self._packed[key]


def in_a_row(fragment: Fragment, calls: Sequence[Call]) -> Nodes:
    """All steps one after another. What is not read any more is dropped, as in a plan."""
    first = len(fragment.shapes)
    last_read = {value: place for place, step in enumerate(fragment.steps) for value in step.reads}
    dropped: dict[int, list[int]] = {}
    for value, place in last_read.items():
        if value not in fragment.outputs:
            dropped.setdefault(place, []).append(value)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        values = dict(enumerate(inputs))
        for place, (step, call) in enumerate(zip(fragment.steps, calls)):
            values[first + place] = call(*(values[value] for value in step.reads))
            for value in dropped.get(place, ()):
                del values[value]
        return [values[value] for value in fragment.outputs]

    return run


def _nodes(fragment: Fragment, convolution: Callable[[int, ConvProblem], Call]) -> Nodes:
    """For two images. convolution: what computes a step's."""
    calls: list[Call] = []
    for place, step in enumerate(fragment.steps):
        if isinstance(step, ConvStep):
            calls.append(convolution(place, step.problem._replace(N=2)))
        elif isinstance(step, PoolStep):
            calls.append(_pooling_of_torch(step))
        elif isinstance(step, CopyStep):
            calls.append(_copies_of_torch(step))
        elif isinstance(step, GateStep):
            calls.append(_gate_rounded_once(step))
        else:
            calls.append(lambda x: x)
    return in_a_row(fragment, calls)


def _convolution_in_fp64(problem: ConvProblem, weight: Tensor, bias: Optional[Tensor]) -> Call:
    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return reference.conv_bn_act(problem, ConvOperands(x, weight, bias=bias, residual=residual))

    return run


def _convolution_in_fp32(problem: ConvProblem, weight: Tensor, bias: Optional[Tensor]) -> Call:
    p, matrix = problem, weight.contiguous().view(problem.groups, problem.K // problem.groups, -1).float()
    added = None if bias is None else bias.float().view(-1, 1)

    def run(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        columns = F.unfold(x.float(), (p.R, p.S), p.dilation, p.padding, p.stride)
        y = (matrix @ columns.view(len(x), p.groups, matrix.shape[2], -1)).flatten(1, 2)
        y = (y if added is None else y + added).view(p.output_shape)
        return composites.activate(y if residual is None else y + residual, p.activation).to(p.dtype)

    return run


def linear(weight: Tensor, bias: Optional[Tensor], batch: int) -> Call:
    """As a plan calls a linear layer, from and to maps of one pixel."""
    matrix = weight.flatten(1)
    if backends.onednn_missing(weight.dtype) is not None:
        return lambda x: F.linear(x.flatten(1), matrix, bias)[..., None, None]
    call = bound_linear(pack_linear(matrix, batch), bias)
    return lambda x: call(x.flatten(1))[..., None, None]


def _pooling_of_plans(fragment: Fragment, place: int) -> Call:
    """A plan's max-poolings write no indices (`freezing.pooling`), its others are torch's."""
    step, dtype = fragment.steps[place], fragment.dtype
    assert isinstance(step, PoolStep)
    if step.kind == "average":
        return _pooling_of_torch(step)
    shape, window = fragment.value_shapes[len(fragment.shapes) + place], (step.window, step.stride, step.padding)
    pool = torch.ops.fused_resnet.cpu_max_pool2d.default

    def run(x: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        pool(x, *window, out)
        return out

    return run


def _pooling_of_torch(step: PoolStep) -> Call:
    window, stride, padding, counts = step.window, step.stride, step.padding, step.counts_padding
    if step.kind == "max":
        return lambda x: F.max_pool2d(x, window, stride, padding)
    return lambda x: F.avg_pool2d(x, window, stride, padding, count_include_pad=counts)


def _gate_rounded_once(step: GateStep) -> Call:
    def run(*values: Tensor) -> Tensor:
        finer = [value if value.dtype == torch.float64 else value.float() for value in values]
        return step.of(*finer).to(values[0].dtype)

    return run


def _copies_of_torch(step: CopyStep) -> Call:
    return lambda *maps: step.of(maps).contiguous(memory_format=torch.channels_last)


def images_of(fragment: Fragment) -> list[Tensor]:
    """Two images of each input: an ordinary one, and one of any size from channel to channel, with many zeros."""
    generator, found = torch.Generator().manual_seed(0), []
    for _, C, H, W in fragment.shapes:
        values = torch.randn(2, C, H, W, generator=generator)
        exponents = torch.empty(C, 1, 1).uniform_(-4.0, 4.0, generator=generator)
        values[1] *= 10**exponents * (torch.randn(C, H, W, generator=generator) > -0.5)
        found.append(values.to(fragment.dtype))
    return found
