"""A run of convolutions and poolings as a value, and the region that computes it.

Values are numbered: the inputs first, then the result of each step.
"""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Optional, Sequence, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import winograd
from fused_resnet.operators import composites, quantized
from fused_resnet.operators.problem import ConvProblem, dtype_name, output_size
from fused_resnet.operators.quantized import Epilogue, Kept, Quantized, Wide
from fused_resnet.regions import layout
from fused_resnet.regions.program import (
    CompiledRegion,
    Map,
    Pair,
    Pooling,
    Region,
    Requantizing,
    Segment,
    Shape,
    packed_weights,
    rows_of_window,
)

_LINES_OF_A_MAP = 4  # of a pooling's window at least, for bands of it


class ConvStep(NamedTuple):
    """A convolution, and the values that are its input and its residual. by_winograd: where the region can do that.
    is_linear: it is a linear layer, over a map of one pixel."""

    problem: ConvProblem
    x: int
    residual: Optional[int] = None
    by_winograd: bool = False
    is_linear: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def __str__(self) -> str:
        how = ", linear" if self.is_linear else ", by Winograd" if self.by_winograd else ""
        return f"{str(self.problem).partition('x')[2]} of {', '.join(map(str, self.reads))}{how}"


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


class FlattenStep(NamedTuple):
    """A map of one pixel as vectors, which in a region it is already."""

    x: int

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,)

    def __str__(self) -> str:
        return f"flatten {self.x}"


class CopyStep(NamedTuple):
    """The channels of maps one after another, between some of zeros: every `stride`-th pixel, `factor` times."""

    xs: tuple[int, ...]
    before: int = 0
    after: int = 0
    stride: Pair = (1, 1)
    factor: Pair = (1, 1)

    @property
    def reads(self) -> tuple[int, ...]:
        return self.xs

    def __str__(self) -> str:
        how = f"{self.before} {self.after} {self.stride} {self.factor}"
        return f"copies {how} of {', '.join(map(str, self.xs))}"

    def of(self, maps: Sequence[Tensor]) -> Tensor:
        """By torch, of any dtype."""
        y = torch.cat(list(maps), 1)[:, :, :: self.stride[0], :: self.stride[1]]
        y = y.repeat_interleave(self.factor[0], 2).repeat_interleave(self.factor[1], 3)
        return F.pad(y, (0, 0, 0, 0, self.before, self.after))


class GateStep(NamedTuple):
    """act(x * f(gate) + residual), f the function of that name in `quantized.GATES`. gate: a map of one pixel."""

    x: int
    gate: int
    residual: Optional[int] = None
    function: str = "sigmoid"
    activation: str = "none"

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x, self.gate) if self.residual is None else (self.x, self.gate, self.residual)

    def __str__(self) -> str:
        return f"gate {self.function} {self.activation} of {', '.join(map(str, self.reads))}"

    def of(self, x: Tensor, gate: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """By torch, of floats, as new memory."""
        y = x * GATE_FUNCTIONS[self.function](gate)
        if residual is not None:
            y += residual
        return y.relu_() if self.activation == "relu" else composites.activate(y, self.activation)


GATE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
Step = Union[ConvStep, PoolStep, FlattenStep, CopyStep, GateStep]


class Fragment(NamedTuple):
    """shapes: of the inputs. outputs: the steps' values that are read outside, in the order of the steps. Vectors count
    as maps of one pixel.

    scales: in int8 and e4m3, how each value is kept, or None of a mean and of a linear layer, which are fp32. `Wide`:
    a mean or a linear layer's result within the region, of which another linear layer is.
    Such a region quantizes its inputs, and its outputs are fp32. e4m3 is for GPUs: `compile_fragment` does not take it.
    """

    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    dtype: torch.dtype
    scales: tuple[Optional[Kept], ...] = ()

    @property
    def convolutions(self) -> list[ConvProblem]:
        return [
            step.problem
            for place, step in enumerate(self.steps)
            if isinstance(step, ConvStep) and self.is_convolution(place)
        ]

    def is_convolution(self, place: int) -> bool:
        step = self.steps[place]
        return isinstance(step, ConvStep) and not step.is_linear

    @property
    def has_vectors(self) -> tuple[bool, ...]:
        """Whether an output is vectors outside, for each."""
        steps = (self.steps[value - len(self.shapes)] for value in self.outputs)
        return tuple(isinstance(step, FlattenStep) or isinstance(step, ConvStep) and step.is_linear for step in steps)

    @property
    def value_shapes(self) -> list[Shape]:
        shapes = list(self.shapes)
        for step in self.steps:
            if isinstance(step, ConvStep):
                shapes.append(step.problem.output_shape)
            elif isinstance(step, (FlattenStep, GateStep)):
                shapes.append(shapes[step.x])
            elif isinstance(step, CopyStep):
                (N, _, H, W), C = shapes[step.xs[0]], sum(shapes[x][1] for x in step.xs)
                P, Q = (-(-size // each) * times for size, each, times in zip((H, W), step.stride, step.factor))
                shapes.append((N, step.before + C + step.after, P, Q))
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
        return sum(math.prod(shapes[value]) for value in values) * layout.outside(self.dtype).itemsize

    @property
    def gate_bytes(self) -> tuple[int, int]:
        """How many gates it has, and what they read and write of maps: x for its mean, and for the product with the
        residual and the result."""
        gates = [step for step in self.steps if isinstance(step, GateStep)]
        maps = (math.prod(self.value_shapes[step.x]) * (len(step.reads) + 1) for step in gates)
        return len(gates), sum(maps) * self.dtype.itemsize

    @property
    def text(self) -> str:
        """All of it but the batch and the values of scales: a readable beginning and a digest of the rest.

        A region's program is the same for all scales, which are factors in it.
        """
        shapes = self.value_shapes
        ends = ["x".join(map(str, shapes[value][1:])) for value in (0, self.outputs[-1])]
        parts = [*map(str, self.steps), str([shape[1:] for shape in self.shapes]), str(self.outputs)]
        parts += [str([how and how.is_signed for how in self.scales])] if self.scales else []
        digest = hashlib.sha256("\n".join((*parts, _code())).encode()).hexdigest()[:16]
        count = len(self.convolutions)
        return f"region of {count} convolutions, {' to '.join(ends)} {dtype_name(self.dtype)}, {digest}"


@functools.lru_cache(maxsize=None)
def _code() -> str:
    """A digest of what lays out regions, and of int8's contract: after a change they are checked and measured anew."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(quantized.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def projections(fragment: Fragment) -> dict[int, int]:
    """{the place of a step: that of the step which becomes its second segment}, instead of a map for its residual.

    That is a convolution with neither activation nor residual, whose result is nothing but another's residual. What is
    to be computed by Winograd has no second segment, and is none. In int8 there are none: the sums of two convolutions
    have different scales.
    """
    if fragment.dtype == torch.int8:
        return {}
    first, readers = len(fragment.shapes), _readers(fragment)
    found: dict[int, int] = {}
    for place, step in enumerate(fragment.steps):
        if not isinstance(step, ConvStep) or step.residual is None or step.residual < first or _is_winograd(step):
            continue
        source = fragment.steps[step.residual - first]
        if not isinstance(source, ConvStep) or _is_winograd(source):
            continue
        is_plain = source.problem.activation == "none" and source.residual is None
        if is_plain and readers[step.residual] == [place] and step.residual not in fragment.outputs:
            found[place] = step.residual - first
    return found


def _is_winograd(step: ConvStep) -> bool:
    """Whether it is to be computed so, and has the channels for it."""
    is_float = step.problem.dtype != torch.int8
    return is_float and step.by_winograd and step.problem.C % layout.PANEL == step.problem.K % layout.PANEL == 0


def _readers(fragment: Fragment) -> dict[int, list[int]]:
    """{value: the places of the steps that read it}."""
    readers: dict[int, list[int]] = {}
    for place, step in enumerate(fragment.steps):
        for value in step.reads:
            readers.setdefault(value, []).append(place)
    return readers


def segments(fragment: Fragment) -> dict[int, tuple[int, ...]]:
    """{the place of a convolution of the region: the places of the steps whose weights it has, in their order}."""
    second = projections(fragment)
    return {
        place: (place, second[place]) if place in second else (place,)
        for place, step in enumerate(fragment.steps)
        if isinstance(step, ConvStep) and place not in second.values()
    }


def replacing(fragment: Fragment) -> set[int]:
    """The places of the convolutions whose sum replaces their residual: nothing reads its map later, or beside it."""
    parts, last_read = segments(fragment), dict[int, int]()
    for place, step in enumerate(fragment.steps):
        if not isinstance(step, ConvStep):
            last_read.update((map_of(fragment, value), place) for value in step.reads)
        elif place in parts:  # a second segment is read there
            read = [fragment.steps[part].reads[0] for part in parts[place]]
            read += [] if step.residual is None or len(parts[place]) > 1 else [step.residual]
            last_read.update((map_of(fragment, value), place) for value in read)
    found = set()
    for place, of in parts.items():
        step = fragment.steps[place]
        assert isinstance(step, ConvStep)
        if step.residual is not None and len(of) == 1:
            replaced = map_of(fragment, step.residual)
            if last_read[replaced] == place and replaced != map_of(fragment, step.x):
                found.add(place)
    return found


def gated_into(fragment: Fragment) -> dict[int, int]:
    """{the place of a gate: the value whose map takes its result}: x or its residual, if nothing reads that later."""
    last_read = {map_of(fragment, value): place for place, step in enumerate(fragment.steps) for value in step.reads}
    for place, second in projections(fragment).items():  # which is read there
        read = map_of(fragment, fragment.steps[second].reads[0])
        last_read[read] = max(last_read[read], place)
    found: dict[int, int] = {}
    for place, step in enumerate(fragment.steps):
        if isinstance(step, GateStep):
            for value in (step.x,) if step.residual is None else (step.x, step.residual):
                replaced = map_of(fragment, value)
                if last_read[replaced] == place and replaced != map_of(fragment, step.gate):
                    found.setdefault(place, value)
    return found


def map_of(fragment: Fragment, value: int) -> int:
    """The value whose map it has: what is flattened stays where it is, and means of int8 are made when written."""
    while value >= len(fragment.shapes):
        step = fragment.steps[value - len(fragment.shapes)]
        is_mean = isinstance(step, PoolStep) and fragment.dtype == torch.int8 and fragment.scales[value] is None
        if not isinstance(step, FlattenStep) and not is_mean:
            break
        value = step.reads[0]
    return value


def by_winograd(fragment: Fragment) -> set[int]:
    """The places of the convolutions that are computed so: a residual must be one that the sum replaces."""
    replaced = replacing(fragment)
    return {
        place
        for place, step in enumerate(fragment.steps)
        if isinstance(step, ConvStep) and _is_winograd(step) and (step.residual is None or place in replaced)
    }


def stems(fragment: Fragment) -> dict[int, int]:
    """{an input's value: the place of the convolution that alone reads it, and nothing else} (`Region.read_for`)."""
    first, readers, points = len(fragment.shapes), _readers(fragment), by_winograd(fragment)
    found = {}
    for place, parts in segments(fragment).items():
        step = fragment.steps[place]
        assert isinstance(step, ConvStep)
        p = step.problem
        is_plain = len(parts) == 1 and p.dilation == (1, 1) and p.groups == 1 and place not in points
        if is_plain and step.x < first and readers[step.x] == [place]:
            found[step.x] = place
    return found


def pooled_stems(fragment: Fragment) -> dict[int, int]:
    """{the place of one of the `stems`: that of the pooling which alone reads it}: together `Region.pooled_stem`.

    Only where bands are few lines of the map, and read weights that are smaller than it.
    """
    first, readers, found = len(fragment.shapes), _readers(fragment), dict[int, int]()
    for place in stems(fragment).values():
        step, value = fragment.steps[place], first + place
        assert isinstance(step, ConvStep)
        if step.residual is not None or value in fragment.outputs or len(readers.get(value, ())) != 1:
            continue
        (reader,), p = readers[value], step.problem
        pool = fragment.steps[reader]
        if not isinstance(pool, PoolStep) or pool.kind == "average" and fragment.dtype == torch.int8:
            continue
        if _LINES_OF_A_MAP * pool.window[0] <= p.P and p.reduction <= p.P * p.Q:
            found[place] = reader
    return found


class Packing(NamedTuple):
    """How the weights of one of the `segments` are packed. parts: the places of the steps whose they are. line_stride:
    of a stem, else 0. groups: of each part."""

    parts: tuple[int, ...]
    by_winograd: bool
    line_stride: int
    dtype: torch.dtype
    groups: tuple[int, ...]

    def of(self, weights: Sequence[Tensor]) -> Tensor:
        """The parts' weights as their kernel reads them."""
        if self.by_winograd:
            return winograd.points(weights[0])
        if self.line_stride:
            weights = [rows_of_window(weights[0], self.dtype, self.line_stride)]
        return packed_weights(weights, self.dtype, self.groups)


def packings(fragment: Fragment) -> dict[int, Packing]:
    """{the place of each of the `segments`: how its weights are packed}."""
    points, steps = by_winograd(fragment), fragment.steps
    strides = {place: cast(ConvStep, steps[place]).problem.stride[0] for place in stems(fragment).values()}
    groups = {place: one.problem.groups for place, one in enumerate(steps) if isinstance(one, ConvStep)}
    return {
        place: Packing(
            parts, place in points, strides.get(place, 0), fragment.dtype, tuple(groups[part] for part in parts)
        )
        for place, parts in segments(fragment).items()
    }


def compile_fragment(
    fragment: Fragment, packed: Mapping[int, Tensor], biases: Mapping[int, Union[Tensor, Epilogue, None]]
) -> CompiledRegion:
    """packed: the weights of the `segments` as `packings` has them, by place. biases: of each convolution, None without
    one; in int8 its `Epilogue`.

    A sum replaces its residual where nothing reads that later. Raises ValueError for steps that int8 has not.
    """
    if fragment.dtype == torch.int8:
        return _compile_int8(fragment, packed, cast(Mapping[int, Epilogue], biases))
    return _compile_floats(fragment, packed, cast(Mapping[int, Optional[Tensor]], biases))


def _compile_int8(
    fragment: Fragment, packed: Mapping[int, Tensor], epilogues: Mapping[int, Epilogue]
) -> CompiledRegion:
    region, first, scales = Region(fragment.dtype), len(fragment.shapes), fragment.scales
    replaced, stem_of, pooled = replacing(fragment), stems(fragment), pooled_stems(fragment)
    into = gated_into(fragment)
    maps: dict[int, Map] = {}
    stem_segments: dict[int, Segment] = {}
    requantizing = {
        place: Requantizing(epilogues[place], _is_signed(fragment, step.x), _is_signed(fragment, step.residual))
        for place, step in enumerate(fragment.steps)
        if isinstance(step, ConvStep)
    }
    for value, shape in enumerate(fragment.shapes):
        place = stem_of.get(value)
        if place in pooled:
            y = _pooled_stem(region, fragment, place, pooled[place], packed[place], requantizing=requantizing[place])
            maps[first + pooled[place]] = y
        elif place is not None:
            stem_segments[place] = _stem(region, shape, fragment.steps[place], scales[value])
        else:
            maps[value] = region.read(shape, scales[value])
    for place, step in enumerate(fragment.steps):
        _check_int8(fragment, place)
        value = first + place
        if isinstance(step, ConvStep) and step.is_linear:
            region.write_linear(maps[step.x], packed[place], epilogues[place])
            continue
        how = scales[step.reads[0]]
        if place in pooled or value in maps:
            pass
        elif isinstance(step, ConvStep) and isinstance(how, Wide):
            p = step.problem
            maps[value] = region.linear(maps[step.x], p.C, packed[place], epilogues[place], how, p.activation)
        elif isinstance(step, ConvStep):
            maps[value] = region.convolve(
                [stem_segments[place] if place in stem_segments else _segment(step, maps)],
                None,
                residual=None if step.residual is None else maps[step.residual],
                in_place=place in replaced,
                packed=packed[place],
                requantizing=requantizing[place],
            )
        elif isinstance(step, PoolStep) and step.kind == "max":
            window = (step.window, step.stride, step.padding)
            maps[value] = region.pool(maps[step.x], step.kind, *window, how=scales[value])
        elif isinstance(step, CopyStep):
            maps[value] = _copies(region, step, maps)
        elif isinstance(step, GateStep):
            signs = _is_signed(fragment, step.x), _is_signed(fragment, step.residual)
            maps[value] = _gate(region, step, maps, into.get(place), "none", Requantizing(epilogues[place], *signs))
        elif isinstance(scales[value], Wide):
            maps[value] = region.means(maps[step.x], _scale_of_mean(fragment, step.x))
        else:
            maps[value] = maps[step.x]
        if value in fragment.outputs:
            if scales[value] is None:
                region.write_means(maps[value], _scale_of_mean(fragment, value))
            else:
                region.write(maps[value], scales[value])
    return region.compile()


def _check_int8(fragment: Fragment, place: int) -> None:
    """Raises ValueError for what bytes cannot be, or where the scales do not say it."""
    step, scales, value = fragment.steps[place], fragment.scales, len(fragment.shapes) + place
    shape = fragment.value_shapes[step.reads[0]]
    if isinstance(step, ConvStep) and step.is_linear:
        wrong = _why_no_linear(fragment, step)
        fits = scales[value] is None and scales[step.x] is None and value in fragment.outputs
    elif isinstance(step, ConvStep) and isinstance(scales[step.x], Wide):
        is_plain = (step.problem.R, step.problem.S, step.problem.groups, step.residual) == (1, 1, 1, None)
        wrong = None if is_plain else "a linear layer of vectors that is none"
        fits = (scales[value] is None or isinstance(scales[value], Wide)) and value not in fragment.outputs
    elif isinstance(step, GateStep):
        wrong = None if scales[step.gate] is None else "a gate of bytes"
        fits = step.gate >= len(fragment.shapes) and all(
            isinstance(scales[one], Quantized) for one in (step.x, step.residual, value) if one is not None
        )
    elif isinstance(step, ConvStep):
        wrong = None
        fits = all(isinstance(scales[one], Quantized) for one in (*step.reads, value))
    elif isinstance(step, PoolStep) and step.kind == "average":
        is_whole = step.window == shape[2:] and step.padding == (0, 0)
        wrong = None if is_whole else f"an average over {step.window} of {shape[2:]} pixels"
        fits = scales[value] is None or isinstance(scales[value], Wide) and value not in fragment.outputs
        fits &= isinstance(scales[step.x], Quantized)
    else:
        wrong, fits = None, all(scales[value] == scales[read] for read in step.reads)
        if isinstance(step, (PoolStep, CopyStep)) and scales[step.reads[0]] is None:
            wrong = "a maximum of means" if isinstance(step, PoolStep) else "copies of means"
    if wrong is not None:
        raise ValueError(f"int8 has no step for {wrong}: {step}")
    if not fits:
        raise ValueError(f"int8: step {step} has scales that do not belong to it")


def _why_no_linear(fragment: Fragment, step: ConvStep) -> Optional[str]:
    """What else than the means of maps of bytes it is of, if it is."""
    source = map_of(fragment, step.x)
    how, (_, _, H, W) = fragment.scales[source], fragment.value_shapes[source]
    if source == step.x or not isinstance(how, Quantized):
        return "a linear layer of no means"
    reason = quantized.why_no_linear(how, H * W)
    return None if reason is None else f"a linear layer: {reason}"


def _is_signed(fragment: Fragment, value: Optional[int]) -> bool:
    how = None if value is None else fragment.scales[value]
    return how is not None and how.is_signed


def _scale_of_mean(fragment: Fragment, value: int) -> Kept:
    how = fragment.scales[map_of(fragment, value)]
    assert how is not None
    return how


def _compile_floats(
    fragment: Fragment, packed: Mapping[int, Tensor], biases: Mapping[int, Optional[Tensor]]
) -> CompiledRegion:
    region, parts, first = Region(fragment.dtype), segments(fragment), len(fragment.shapes)
    replaced, stem_of, points = replacing(fragment), stems(fragment), by_winograd(fragment)
    pooled, into = pooled_stems(fragment), gated_into(fragment)
    maps: dict[int, Map] = {}
    stem_segments: dict[int, Segment] = {}
    for value, shape in enumerate(fragment.shapes):
        place = stem_of.get(value)
        if place in pooled:
            y = _pooled_stem(region, fragment, place, pooled[place], packed[place], biases[place])
            maps[first + pooled[place]] = y
        elif place is not None:
            stem_segments[place] = _stem(region, shape, fragment.steps[place])
        else:
            maps[value] = region.read(shape)
    for place, step in enumerate(fragment.steps):
        if first + place in maps:  # with its stem
            y = maps[first + place]
        elif isinstance(step, PoolStep):
            window = (step.window, step.stride, step.padding)
            y = region.pool(maps[step.x], step.kind, *window, count_include_pad=step.counts_padding)
        elif isinstance(step, FlattenStep):
            y = maps[step.x]
        elif isinstance(step, CopyStep):
            y = _copies(region, step, maps)
        elif isinstance(step, GateStep):
            y = _gate(region, step, maps, into.get(place), step.activation)
        elif place in points:
            y = region.winograd(
                maps[step.x],
                packed[place],
                step.problem.padding,
                biases[place],
                activation=step.problem.activation,
                replaced=None if step.residual is None else maps[step.residual],
            )
        elif place in parts and place not in pooled:
            residual = step.residual if len(parts[place]) == 1 else None
            stem = stem_segments.get(place)
            y = region.convolve(
                [_segment(fragment.steps[part], maps) for part in parts[place]] if stem is None else [stem],
                _sum([biases[part] for part in parts[place]]),
                activation=step.problem.activation,
                residual=None if residual is None else maps[residual],
                in_place=place in replaced,
                packed=packed[place],
            )
        else:
            continue  # a part of a later step
        maps[first + place] = y
        if first + place in fragment.outputs:  # before anything is written over it
            region.write(y)
    return region.compile()


def _copies(region: Region, step: CopyStep, maps: Mapping[int, Map]) -> Map:
    how = step._asdict()
    return region.copy([maps[x] for x in how.pop("xs")], **how)


def _gate(
    region: Region,
    step: GateStep,
    maps: Mapping[int, Map],
    into: Optional[int],
    activation: str,
    requantizing: Optional[Requantizing] = None,
) -> Map:
    return region.gate(
        maps[step.x],
        maps[step.gate],
        step.function,
        activation=activation,
        residual=None if step.residual is None else maps[step.residual],
        into=None if into is None else maps[into],
        requantizing=requantizing,
    )


def _segment(step: Step, maps: Mapping[int, Map]) -> Segment:
    assert isinstance(step, ConvStep)
    p = step.problem
    return Segment(maps[step.x], _shape_of_weight(p), p.stride, p.padding, p.dilation, p.groups)


def _stem(region: Region, shape: Shape, step: Step, how: Optional[Kept] = None) -> Segment:
    assert isinstance(step, ConvStep)
    p = step.problem
    return region.read_for(shape, _shape_of_weight(p), p.stride, p.padding, how)


def _pooled_stem(
    region: Region,
    fragment: Fragment,
    place: int,
    pooled: int,
    packed: Tensor,
    bias: Optional[Tensor] = None,
    requantizing: Optional[Requantizing] = None,
) -> Map:
    step, pool = fragment.steps[place], fragment.steps[pooled]
    assert isinstance(step, ConvStep) and isinstance(pool, PoolStep)
    p, shape = step.problem, fragment.shapes[step.x]
    pooling = Pooling(pool.kind, pool.window, pool.stride, pool.padding, pool.counts_padding)
    conv = (_shape_of_weight(p), p.stride, p.padding, bias)
    if requantizing is not None:
        how = fragment.scales[step.x]
        return region.pooled_stem(shape, *conv, pooling, packed=packed, how=how, requantizing=requantizing)
    return region.pooled_stem(shape, *conv, pooling, activation=p.activation, packed=packed)


def _shape_of_weight(problem: ConvProblem) -> Tensor:
    return torch.empty(problem.K, problem.C // problem.groups, problem.R, problem.S, device="meta")


def _sum(biases: list[Optional[Tensor]]) -> Optional[Tensor]:
    there = [bias.float() for bias in biases if bias is not None]
    return torch.stack(there).sum(0) if there else None
