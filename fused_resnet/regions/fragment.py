"""A run of convolutions and poolings as a value, and the region that computes it.

Values are numbered: the inputs first, then the result of each step.
"""

from __future__ import annotations

import hashlib
import math
from typing import Mapping, NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_resnet.operators.problem import ConvProblem, dtype_name, output_size
from fused_resnet.regions.program import CompiledRegion, Map, Pair, Region, Segment, Shape


class ConvStep(NamedTuple):
    """A convolution, and the values that are its input and its residual."""

    problem: ConvProblem
    x: int
    residual: Optional[int] = None

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def __str__(self) -> str:
        return f"{str(self.problem).partition('x')[2]} of {', '.join(map(str, self.reads))}"


class PoolStep(NamedTuple):
    """kind: "max" or "average"."""

    kind: str
    x: int
    window: Pair
    stride: Pair
    padding: Pair
    counts_padding: bool

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,)

    def __str__(self) -> str:
        padding = ", counted" if self.kind == "average" and self.counts_padding else ""
        return f"{self.kind} {self.window} {self.stride} {self.padding}{padding} of {self.x}"


Step = Union[ConvStep, PoolStep]


class Fragment(NamedTuple):
    """shapes: of the inputs. outputs: the steps' values that are read outside, in the order of the steps."""

    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    dtype: torch.dtype

    @property
    def convolutions(self) -> list[ConvProblem]:
        return [step.problem for step in self.steps if isinstance(step, ConvStep)]

    @property
    def value_shapes(self) -> list[Shape]:
        shapes = list(self.shapes)
        for step in self.steps:
            if isinstance(step, ConvStep):
                shapes.append(step.problem.output_shape)
            else:
                N, C, H, W = shapes[step.x]
                P, Q = (output_size(*side, 1) for side in zip((H, W), step.window, step.stride, step.padding))
                shapes.append((N, C, P, Q))
        return shapes

    @property
    def bytes_at_seams(self) -> int:
        """What is read and written in NHWC: the inputs and the outputs, which are converted."""
        shapes = self.value_shapes
        values = (*range(len(self.shapes)), *self.outputs)
        return sum(math.prod(shapes[value]) for value in values) * self.dtype.itemsize

    @property
    def text(self) -> str:
        """All of it but the batch: a readable beginning and a digest of the rest."""
        shapes = self.value_shapes
        ends = ["x".join(map(str, shapes[value][1:])) for value in (0, self.outputs[-1])]
        parts = (*map(str, self.steps), str([shape[1:] for shape in self.shapes]), str(self.outputs))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        count = len(self.convolutions)
        return f"region of {count} convolutions, {' to '.join(ends)} {dtype_name(self.dtype)}, {digest}"


def projections(fragment: Fragment) -> dict[int, int]:
    """{the place of a step: that of the step which becomes its second segment}, instead of a map for its residual.

    That is a convolution with neither activation nor residual, whose result is nothing but another's residual.
    """
    first, readers = len(fragment.shapes), dict[int, list[int]]()
    for place, step in enumerate(fragment.steps):
        for value in step.reads:
            readers.setdefault(value, []).append(place)
    found: dict[int, int] = {}
    for place, step in enumerate(fragment.steps):
        residual = step.residual if isinstance(step, ConvStep) else None
        source = fragment.steps[residual - first] if residual is not None and residual >= first else None
        if residual is None or not isinstance(source, ConvStep):
            continue
        is_plain = source.problem.activation == "none" and source.residual is None
        if is_plain and readers[residual] == [place] and residual not in fragment.outputs:
            found[place] = residual - first
    return found


def segments(fragment: Fragment) -> dict[int, tuple[int, ...]]:
    """{the place of a convolution of the region: the places of the steps whose weights it has, in their order}."""
    second = projections(fragment)
    return {
        place: (place, second[place]) if place in second else (place,)
        for place, step in enumerate(fragment.steps)
        if isinstance(step, ConvStep) and place not in second.values()
    }


def compile_fragment(
    fragment: Fragment, packed: Mapping[int, Tensor], biases: Mapping[int, Optional[Tensor]]
) -> CompiledRegion:
    """packed: the `packed_weights` of the `segments`, by place. biases: of each convolution, None without one.

    A sum replaces its residual where nothing reads that later.
    """
    region, parts, first = Region(fragment.dtype), segments(fragment), len(fragment.shapes)
    last_read = _last_read(fragment, parts)
    maps: dict[int, Map] = {value: region.read(shape) for value, shape in enumerate(fragment.shapes)}
    for place, step in enumerate(fragment.steps):
        if isinstance(step, PoolStep):
            window = (step.window, step.stride, step.padding)
            y = region.pool(maps[step.x], step.kind, *window, count_include_pad=step.counts_padding)
        elif place in parts:
            residual = step.residual if len(parts[place]) == 1 else None
            y = region.convolve(
                [_segment(fragment.steps[part], maps) for part in parts[place]],
                _sum([biases[part] for part in parts[place]]),
                activation=step.problem.activation,
                residual=None if residual is None else maps[residual],
                in_place=residual is not None and residual != step.x and last_read[residual] == place,
                packed=packed[place],
            )
        else:
            continue  # a part of a later step
        maps[first + place] = y
        if first + place in fragment.outputs:  # before anything is written over it
            region.write(y)
    return region.compile()


def _last_read(fragment: Fragment, parts: Mapping[int, tuple[int, ...]]) -> dict[int, int]:
    """{value: the place of the last step of the region that reads it}."""
    found: dict[int, int] = {}
    for place, step in enumerate(fragment.steps):
        if isinstance(step, PoolStep):
            found[step.x] = place
        elif place in parts:
            found.update((fragment.steps[part].x, place) for part in parts[place])
            if step.residual is not None:
                found[step.residual] = place
    return found


def _segment(step: Step, maps: Mapping[int, Map]) -> Segment:
    assert isinstance(step, ConvStep)
    p = step.problem
    shape = torch.empty(p.K, p.C, p.R, p.S, device="meta")
    return Segment(maps[step.x], shape, p.stride, p.padding, p.dilation)


def _sum(biases: list[Optional[Tensor]]) -> Optional[Tensor]:
    there = [bias.float() for bias in biases if bias is not None]
    return torch.stack(there).sum(0) if there else None
