"""Programs of the operator `cpu_region`: csrc/cpu/blocked/program.h says what their integers mean.

region = Region(torch.float32)
x = region.read((1, 64, 56, 56))
region.write(region.convolve([Segment(x, weight, padding=(1, 1))], bias, activation="relu"))
compiled = region.compile()
(y,) = compiled([images], compiled.empty_workspace())
"""

from __future__ import annotations

import enum
import itertools
import math
import struct
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import compiled
from fused_resnet.machine.devices import second_level_cache_bytes
from fused_resnet.machine.malloc import LargePages
from fused_resnet.operators.problem import ACTIVATIONS, output_size
from fused_resnet.operators.quantized import (
    GATES,
    Epilogue,
    Kept,
    Quantized,
    Wide,
    why_no_linear,
    why_not_reduced,
)
from fused_resnet.regions import layout

_VERSION = 6
_NUMBERS = {torch.float32: 0, torch.bfloat16: 2, torch.int8: 3}  # of the dtypes
_TILE = 16  # rows of the largest tile
_FOR_MAPS = 0.75  # of the second-level caches
_FOR_A_BAND = 0.125  # of one of them
_SAVED = 0.8  # of the tiles: phases are split where no more are left
Shape = tuple[int, int, int, int]
Pair = tuple[int, int]


class StepKind(enum.IntEnum):
    """With which number each step of a program begins."""

    READ = 0
    WRITE = 1
    ZERO_HALO = 2
    CONVOLVE = 3
    POOL = 4
    SPLIT_PHASES = 5
    WINOGRAD = 6
    WRITE_MEANS = 7
    POOLED_STEM = 8
    WRITE_LINEAR = 9
    COPY = 10
    GATE = 11
    MEANS = 12
    LINEAR = 13
    NORM = 14


@dataclass(eq=False)
class Map:
    """A blocked activation: its shape, the zeros around it that its readers need, and when it is used."""

    shape: Shape
    halo: int = 0
    first_step: int = 0
    last_step: int = 0


class Segment(NamedTuple):
    """A convolution's input, with the weight and the window that it meets there."""

    x: Map
    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    phases: Optional[Map] = None  # of x, where they are read in its place

    @property
    def output_shape(self) -> Shape:
        N, _, H, W = self.x.shape
        K, _, R, S = self.weight.shape
        sides = zip((H, W), (R, S), self.stride, self.padding, self.dilation)
        P, Q = (output_size(*side) for side in sides)
        return N, K, P, Q


class Requantizing(NamedTuple):
    """What follows a convolution's sums in int8, and whether the bytes that it reads are signed."""

    epilogue: Epilogue
    is_input_signed: bool
    is_residual_signed: bool = False


def rows_of_window(weight: Tensor, dtype: torch.dtype, line_stride: int) -> Tensor:
    """A stem's weight (K, C, R, S) as (K, rows * S * C, R / rows, 1), for an input unfolded along its lines.

    The weight itself where that takes no fewer k steps. Where R is no multiple of the rows, zeros follow.
    """
    (K, C, R, S), lanes = weight.shape, layout.lanes(dtype)
    if -(-C * S // lanes) >= S * -(-C // lanes):
        return weight
    rows = _rows_of_a_pixel(C * S, dtype, line_stride)
    wider = F.pad(weight, (0, 0, 0, -R % rows)).reshape(K, C, -1, rows, S)
    return wider.permute(0, 3, 4, 1, 2).reshape(K, rows * S * C, -1, 1)


def _rows_of_a_pixel(values: int, dtype: torch.dtype, line_stride: int) -> int:
    """How many neighbouring rows of an unfolded input a pixel holds, each of so many values.

    As many as its window moves on, where they fit a block. In floats what follows them would have to be zero.
    """
    return line_stride if dtype == torch.int8 and values * line_stride <= layout.lanes(dtype) else 1


def packed_weights(weights: Sequence[Tensor], dtype: torch.dtype, groups: Sequence[int] = ()) -> Tensor:
    """The weights of a convolution's segments side by side: their k steps follow one another. groups: of each, or 1."""
    counts = itertools.chain(groups, itertools.repeat(1))
    return torch.cat([layout.pack_weight(weight, dtype, count) for weight, count in zip(weights, counts)], 1)


class Pooling(NamedTuple):
    """kind: "max" or "average"."""

    kind: str
    window: Pair
    stride: Pair
    padding: Pair = (0, 0)
    counts_padding: bool = True

    def output_shape(self, shape: Shape) -> Shape:
        N, C, H, W = shape
        P, Q = (output_size(*side, 1) for side in zip((H, W), self.window, self.stride, self.padding))
        return N, C, P, Q

    @property
    def kind_integers(self) -> list[int]:
        return [int(self.kind == "max"), int(self.counts_padding)]

    @property
    def window_integers(self) -> list[int]:
        return [*self.window, *self.stride, *self.padding]


class CompiledRegion(NamedTuple):
    """What one call takes, for one input shape. Its workspace may hold anything before a call."""

    program: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    output_shapes: list[Shape]
    dtype: torch.dtype
    workspace_bytes: int

    def empty_workspace(self) -> Tensor:
        return LargePages(self.workspace_bytes).empty(self.workspace_bytes)

    def __call__(self, inputs: Sequence[Tensor], workspace: Tensor, kernel: str = "") -> list[Tensor]:
        """inputs: of any strides, in fp32 or bf16. kernel: a row of the table of micro-kernels, or the fastest here."""
        dtype, in_nhwc = layout.outside(self.dtype), torch.channels_last
        outputs = [torch.empty(shape, dtype=dtype, memory_format=in_nhwc) for shape in self.output_shapes]
        torch.ops.fused_resnet.cpu_region(
            self.program, list(inputs), self.weights, self.biases, kernel, workspace, outputs
        )
        return outputs


@dataclass(frozen=True)
class _Step:
    """integers: what follows its kind in a program, once its maps have numbers. written: the map that it is the first
    to write."""

    kind: StepKind
    integers: Callable[[], list[int]]
    read: list[Map]
    written: Optional[Map]
    weight_bytes: int

    @property
    def maps(self) -> list[Map]:
        return self.read if self.written is None else [*self.read, self.written]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last map that it touches."""
        return self.maps[-1].shape[2:]


class _Wave(NamedTuple):
    """Steps from begin to end, for so many images at a time."""

    begin: int
    end: int
    images: int

    def holds(self, x: Map) -> bool:
        """Whether it is the only one that touches x."""
        return self.begin <= x.first_step and x.last_step < self.end


@dataclass
class Region:
    """Takes the steps one by one. Maps get their place only when all readers are known.

    In int8 what reads or writes a map is told how it is quantised, and convolutions take `Requantizing`.
    """

    dtype: torch.dtype
    _maps: list[Map] = field(default_factory=list)
    _steps: list[_Step] = field(default_factory=list)
    # of the wave that is being written down: the numbers of its maps' buffers, its first image and how many there are
    _numbers: dict[Map, int] = field(default_factory=dict)
    _first_image: int = 0
    _images_now: int = 0
    _weights: list[Tensor] = field(default_factory=list)
    _biases: list[Tensor] = field(default_factory=list)
    _num_inputs: int = 0
    _output_shapes: list[Shape] = field(default_factory=list)

    def read(self, shape: Shape, how: Optional[Kept] = None) -> Map:
        """The next of the region's inputs."""
        return self._read(shape, self._unfolding(1, 1, 0), how)

    def read_for(
        self, shape: Shape, weight: Tensor, stride: Pair, padding: Pair, how: Optional[Kept] = None
    ) -> Segment:
        """The next of the region's inputs as the one convolution that reads it wants it: a stem.

        Where that takes fewer k steps, a pixel of the map holds a row of the window over all channels:
        out[n, s * C + c, h, q] = x[n, c, h, q * stride + s - padding]. The channels of an image are too few to fill
        a block by themselves. In int8 it may hold as many such rows as the window moves on.
        """
        segment, unfolding = self._unfolded(shape, weight, stride, padding)
        return segment._replace(x=self._read(segment.x.shape, unfolding, how))

    def _unfolded(self, shape: Shape, weight: Tensor, stride: Pair, padding: Pair) -> tuple[Segment, list[int]]:
        """A stem over the map that its input becomes, and how it does."""
        by_rows = rows_of_window(weight, self.dtype, stride[0])
        if by_rows is weight:
            return Segment(Map(shape), weight, stride, padding), self._unfolding(1, 1, 0)
        (N, C, H, W), (_, _, R, S) = shape, weight.shape
        Q, rows = output_size(W, S, stride[1], padding[1], 1), _rows_of_a_pixel(C * S, self.dtype, stride[0])
        if rows == 1:
            segment = Segment(Map((N, S * C, H, Q)), by_rows, (stride[0], 1), (padding[0], 0))
            return segment, self._unfolding(S, stride[1], padding[1])
        lines = output_size(H, R, stride[0], padding[0], 1) + by_rows.shape[2] - 1
        unfolding = self._unfolding(S, stride[1], padding[1], rows, padding[0])
        return Segment(Map((N, rows * S * C, lines, Q)), by_rows), unfolding

    def _unfolding(self, taps: int, stride: int, padding: int, rows: int = 1, padding_h: int = 0) -> list[int]:
        """As a program says it: along the lines, and in int8 over some of them."""
        return [taps, stride, padding, *([rows, padding_h] if self.dtype == torch.int8 else [])]

    def _read(self, shape: Shape, unfolding: list[int], how: Optional[Kept]) -> Map:
        x, index, tail = self._new_map(shape), self._num_inputs, self._quantized("read", how, lambda scale: 1 / scale)
        self._num_inputs += 1
        self._add(StepKind.READ, lambda: [index, self._first_image, self._number(x), *unfolding, *tail], [], x)
        return x

    def write(self, x: Map, how: Optional[Kept] = None) -> None:
        """x becomes the next of the region's outputs."""
        index, tail = len(self._output_shapes), self._quantized("write", how, lambda scale: scale)
        self._output_shapes.append(x.shape)
        self._add(StepKind.WRITE, lambda: [self._number(x), index, self._first_image, *tail], [x])

    def write_means(self, x: Map, how: Kept) -> None:
        """The mean of each of x's maps becomes the next of the region's outputs, (N, C, 1, 1): in int8."""
        (N, C, H, W), index = x.shape, len(self._output_shapes)
        tail = self._quantized("write_means", how, lambda scale: scale / (H * W))
        self._output_shapes.append((N, C, 1, 1))
        self._add(StepKind.WRITE_MEANS, lambda: [self._number(x), index, self._first_image, *tail], [x])

    def write_linear(self, x: Map, packed: Tensor, epilogue: Epilogue) -> None:
        """A linear layer of the means of x's maps becomes the next of the region's outputs, (N, K, 1, 1): in int8.

        x: of u8, at most MOST_PIXELS_OF_A_MEAN pixels. packed: its weight (K, C, 1, 1), as `packed_weights` gives it.
        Raises ValueError for what does not fit together.
        """
        (N, C, H, W), index, K = x.shape, len(self._output_shapes), len(epilogue.multiplier)
        if self.dtype != torch.int8 or (reason := why_no_linear(Quantized(1.0, False), H * W)) is not None:
            raise ValueError(f"write_linear: {reason if self.dtype == torch.int8 else f'the region is {self.dtype}'}")
        if packed.shape[:2] != (-(-K // layout.PANEL), -(-C // layout.lanes(self.dtype))):
            raise ValueError(f"write_linear: a weight packed as {tuple(packed.shape)} is not of {K} x {C} channels")
        numbers = (
            self._keep(packed, self._weights),
            self._keep(layout.pack_constants(epilogue, packed), self._biases),
        )
        self._output_shapes.append((N, K, 1, 1))
        self._add(
            StepKind.WRITE_LINEAR, lambda: [self._number(x), index, self._first_image, *numbers], [x], weight=packed
        )

    def _quantized(
        self, caller: str, how: Optional[Kept], factor: Callable[[float], float] = lambda scale: scale
    ) -> list[int]:
        """What a step says at its end: a factor made of the scale, and whether the bytes are signed."""
        if (how is None) == (self.dtype == torch.int8):
            raise ValueError(f"{caller}: a scale belongs to regions of int8 alone, and this one is of {self.dtype}")
        return [] if how is None else [_bits(factor(how.scale)), int(how.is_signed)]

    def convolve(
        self,
        segments: Sequence[Segment],
        bias: Optional[Tensor],
        *,
        activation: str = "none",
        residual: Optional[Map] = None,
        in_place: bool = False,
        packed: Optional[Tensor] = None,
        requantizing: Optional[Requantizing] = None,
    ) -> Map:
        """act(sum of the segments' convolutions + bias + residual). in_place: the residual's map takes the result.

        requantizing: in int8, in place of a bias and an activation.

        packed: the segments' weights as `packed_weights` gives them, by somebody who keeps them for several regions.
        The segments' own then only say their shapes.

        Raises ValueError for what does not fit together, for activations that the kernels do not have, and in int8
        for sums that may leave int32.
        """
        shape = segments[0].output_shape
        self._check(segments, bias, activation, residual, in_place)
        self._check_requantizing(requantizing, segments, bias, activation, packed)
        out = residual if in_place and residual is not None else self._new_map(shape)
        if packed is None:
            packed = packed_weights([one.weight for one in segments], self.dtype, [one.groups for one in segments])
        weight = packed
        numbers = self._keep(weight, self._weights), self._keep_constants(requantizing, bias, weight)
        segments = self._split_phases(segments, shape)
        for segment in segments:
            if segment.phases is None:
                segment.x.halo = max(segment.x.halo, *segment.padding)
        pixels = sum(math.prod(segment.x.shape[1:]) for segment in segments)
        reduction = math.prod(segments[0].weight.shape[1:])
        tail = [] if requantizing is None else _integers_of_epilogue(requantizing, reduction)

        def integers() -> list[int]:
            added = -1 if residual is None else self._number(residual)
            # what is larger is read once: by one thread, and by all of them together
            by_channels = int(weight.nbytes > self._images_now * pixels * self.dtype.itemsize)
            head = [self._number(out), added, ACTIVATIONS.index(activation), by_channels, *numbers]
            return [*head, len(segments), *itertools.chain(*map(self._integers_of, segments)), *tail]

        read = [segment.phases or segment.x for segment in segments] + ([] if residual is None else [residual])
        self._add(StepKind.CONVOLVE, integers, read, None if out is residual else out, weight)
        return out

    def winograd(
        self,
        x: Map,
        points: Tensor,
        padding: Pair,
        bias: Optional[Tensor],
        *,
        activation: str = "none",
        replaced: Optional[Map] = None,
    ) -> Map:
        """act(a 3x3 convolution of stride 1 + bias + residual) by Winograd's F(4x4, 3x3), with fp32 inside.

        points: the weight as (36, K/16, C, 16) in fp32 (`kernels.winograd`). replaced: the residual, whose map takes
        the result. Raises ValueError for what does not fit together, and for channels in no multiples of 32.
        """
        (N, C, H, W), K = x.shape, points.shape[1] * points.shape[3]
        if C % layout.PANEL or K % layout.PANEL or points.shape[2] != C:
            raise ValueError(
                f"winograd: channels must be multiples of {layout.PANEL}, and a weight of {tuple(points.shape)} meets "
                f"a map of {C} channels"
            )
        shape = (N, K, H + 2 * padding[0] - 2, W + 2 * padding[1] - 2)
        _check_epilogue("winograd", shape, bias, activation, replaced, [x] if replaced is not None else [])
        out = self._new_map(shape) if replaced is None else replaced
        numbers = (
            self._keep(points, self._weights),
            self._keep(None if bias is None else layout.pack_bias(bias), self._biases),
        )

        def integers() -> list[int]:
            what = (self._number(x), self._number(out), int(replaced is not None), ACTIVATIONS.index(activation))
            return [*what, *numbers, *padding]

        read, written = ([x], out) if replaced is None else ([x, replaced], None)
        self._add(StepKind.WINOGRAD, integers, read, written, points)
        return out

    def _integers_of(self, segment: Segment) -> list[int]:
        _, _, R, S = segment.weight.shape
        read = segment.phases or segment.x
        channels = 0 if segment.phases is None else segment.x.shape[1]
        window = [R, S, *segment.stride, *segment.padding, *segment.dilation]
        return [self._number(read), channels, *window, segment.groups]

    def _split_phases(self, segments: Sequence[Segment], shape: Shape) -> list[Segment]:
        """Those of a larger stride read the phases of their map, where tiles that run on over the ends of lines are
        clearly fewer: on small maps."""
        _, _, P, Q = shape
        by_lines, run_on = P * -(-Q // _TILE), -(-((P - 1) * (Q + 1) + Q) // _TILE)
        strided = [segment for segment in segments if segment.stride != (1, 1)]
        if not strided or run_on > _SAVED * by_lines or None in map(_reach, strided):
            return list(segments)
        return [segment if segment.stride == (1, 1) else self._with_phases(segment, shape) for segment in segments]

    def _with_phases(self, segment: Segment, shape: Shape) -> Segment:
        (N, C, _, _), (_, _, P, Q), (R, S) = segment.x.shape, shape, segment.weight.shape[2:]
        sides = zip((R, S), segment.stride, segment.padding, segment.dilation)
        count = math.prod(len({tap * d % stride for tap in range(taps)}) for taps, stride, _, d in sides)
        phases = self._new_map((N, count * layout.blocks(C, self.dtype) * layout.lanes(self.dtype), P, Q))
        phases.halo = _reach(segment) or 0
        window = (R, S, *segment.stride, *segment.padding, *segment.dilation)
        integers = lambda: [self._number(segment.x), self._number(phases), *window]  # noqa: E731
        self._add(StepKind.SPLIT_PHASES, integers, [segment.x], phases)
        return segment._replace(phases=phases)

    @staticmethod
    def _check(
        segments: Sequence[Segment], bias: Optional[Tensor], activation: str, residual: Optional[Map], in_place: bool
    ) -> None:
        shape = segments[0].output_shape
        for segment in segments:
            (K, C, _, _), channels, groups = segment.weight.shape, segment.x.shape[1], segment.groups
            if C * groups != channels or K % groups:
                of_groups = f" of {groups} groups" if groups > 1 else ""
                raise ValueError(
                    f"convolve: a weight of {tuple(segment.weight.shape)}{of_groups} meets a map of {channels} channels"
                )
        for segment in segments:
            if segment.output_shape != shape:
                raise ValueError(f"convolve: segments give {shape} and {segment.output_shape}")
        if in_place and residual is None:
            raise ValueError("convolve: in place there must be a residual that no segment reads")
        _check_epilogue("convolve", shape, bias, activation, residual, [x for x, *_ in segments] if in_place else [])

    def _check_requantizing(
        self,
        requantizing: Optional[Requantizing],
        segments: Sequence[Segment],
        bias: Optional[Tensor],
        activation: str,
        packed: Optional[Tensor],
    ) -> None:
        if (requantizing is None) == (self.dtype == torch.int8):
            raise ValueError(f"convolve: constants of int8 belong to its regions alone, and this one is {self.dtype}")
        if requantizing is None:
            return
        K, *reduced = segments[0].weight.shape
        if len(segments) > 1 or bias is not None or activation != "none":
            raise ValueError("convolve: in int8 there is one segment, and constants in place of bias and activation")
        if requantizing.epilogue.multiplier.shape != (K,) or requantizing.epilogue.bias.shape != (K,):
            raise ValueError(f"convolve: {K} channels have as many constants, not {requantizing.epilogue[:2]}")
        weight = segments[0].weight if packed is None else packed
        if (reason := why_not_reduced(math.prod(reduced), weight)) is not None:
            raise ValueError(f"convolve: {reason}")

    def pool(
        self,
        x: Map,
        kind: str,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
        *,
        count_include_pad: bool = True,
        how: Optional[Kept] = None,
    ) -> Map:
        """kind: "max", or "average", which int8 has only as `write_means`."""
        if self.dtype == torch.int8 and kind != "max":
            raise ValueError("pool: in int8 there is no average but write_means")
        tail, pooling = self._quantized("pool", how)[1:], Pooling(kind, window, stride, padding, count_include_pad)
        out = self._new_map(pooling.output_shape(x.shape))
        what = pooling.kind_integers
        integers = lambda: [*what, self._number(x), self._number(out), *pooling.window_integers, *tail]  # noqa: E731
        self._add(StepKind.POOL, integers, [x], out)
        return out

    def copy(
        self,
        maps: Sequence[Map],
        *,
        before: int = 0,
        after: int = 0,
        stride: Pair = (1, 1),
        factor: Pair = (1, 1),
    ) -> Map:
        """The maps' channels one after another, between channels of zeros: every `stride`-th pixel, `factor` times."""
        sides = {x.shape[::2] + x.shape[3:] for x in maps}
        if len(sides) != 1:
            raise ValueError(f"copy: maps of {', '.join(str(x.shape) for x in maps)} do not lie side by side")
        (N, _, H, W), channels = maps[0].shape, [x.shape[1] for x in maps]
        P, Q = (-(-size // step) * times for size, step, times in zip((H, W), stride, factor))
        out = self._new_map((N, before + sum(channels) + after, P, Q))
        # what panels have beyond the channels is zero, too
        zeroes = before + after > 0 or out.shape[1] % max(layout.PANEL, layout.lanes(self.dtype)) > 0
        firsts = itertools.accumulate(channels[:-1], initial=before)
        for place, (x, first) in enumerate(zip(maps, firsts)):
            tail = [first, *stride, *factor, int(zeroes and place == 0)]
            integers = lambda x=x, tail=tail: [self._number(x), self._number(out), *tail]  # noqa: E731
            self._add(StepKind.COPY, integers, [x, *([out] if place else [])], None if place else out)
        return out

    def means(self, x: Map, how: Kept) -> Map:
        """The mean of each of x's maps as a vector in fp32: in int8, for `linear`."""
        N, C, H, W = x.shape
        tail, out = self._quantized("means", how, lambda scale: scale / (H * W)), self._new_vector(N, C)
        self._add(StepKind.MEANS, lambda: [self._number(x), self._number(out), *tail], [x], out)
        return out

    def linear(
        self, x: Map, channels: int, packed: Tensor, epilogue: Epilogue, how: Wide, activation: str = "none"
    ) -> Map:
        """A linear layer of a vector of so many channels, taken as `how` says, as another vector: in int8.

        packed: its weight (K, C, 1, 1), as `packed_weights` gives it. Raises ValueError for what does not fit together.
        """
        K, wanted = len(epilogue.multiplier), self._vector_shape(x.shape[0], channels)
        tail = self._quantized("linear", how, lambda scale: 256 / scale)
        if x.shape != wanted or packed.shape[:2] != (-(-K // layout.PANEL), -(-channels // layout.lanes(self.dtype))):
            raise ValueError(
                f"linear: a vector of {channels} channels is {wanted}, not {x.shape}, and a weight packed as "
                f"{tuple(packed.shape)} is of {K} outputs or not"
            )
        out = self._new_vector(x.shape[0], K)
        numbers = (
            self._keep(packed, self._weights),
            self._keep(layout.pack_constants(epilogue, packed), self._biases),
        )
        rest = [*tail, ACTIVATIONS.index(activation), *numbers]
        integers = lambda: [channels, K, self._number(x), self._number(out), *rest]  # noqa: E731
        self._add(StepKind.LINEAR, integers, [x], out, packed)
        return out

    def gate(
        self,
        x: Map,
        gate: Map,
        function: str,
        *,
        activation: str = "none",
        residual: Optional[Map] = None,
        into: Optional[Map] = None,
        requantizing: Optional[Requantizing] = None,
    ) -> Map:
        """act(x * f(gate) + residual), f the function of that name in `quantized.GATES`.

        gate: a map of one pixel, in int8 a vector in fp32. into: x or the residual, whose map takes the result.
        requantizing: in int8, with one multiplier and instead of an activation.

        Raises ValueError for what does not fit together.
        """
        N, C, _, _ = x.shape
        if gate.shape != (self._vector_shape(N, C) if self.dtype == torch.int8 else (N, C, 1, 1)):
            raise ValueError(f"gate: gates of {gate.shape} are not those of {x.shape}")
        if (requantizing is None) == (self.dtype == torch.int8):
            raise ValueError(f"gate: constants of int8 belong to its regions alone, and this one is {self.dtype}")
        if into is not None and into is not x and into is not residual or into is gate:
            raise ValueError("gate: the map that takes the result is x or the residual")
        _check_epilogue("gate", x.shape, None, activation, residual, [])
        out = self._new_map(x.shape) if into is None else into
        tail = [[*GATES].index(function), ACTIVATIONS.index(activation)]
        if requantizing is not None:
            constants, *signs = requantizing
            numbers = (constants.multiplier.item(), constants.residual, constants.low, constants.high)
            tail += [*map(_bits, numbers), *map(int, signs)]

        def integers() -> list[int]:
            added = -1 if residual is None else self._number(residual)
            return [self._number(out), self._number(x), self._number(gate), added, *tail]

        read = [gate, *([] if residual is None else [residual]), x]
        self._add(StepKind.GATE, integers, read, out if into is None else None)
        return out

    def norm(
        self,
        x: Map,
        scale: Tensor,
        shift: Tensor,
        *,
        activation: str = "none",
        in_place: bool = False,
        requantizing: Optional[Requantizing] = None,
    ) -> Map:
        """act(x * scale + shift), both (C,). in_place: x's map takes the result.

        requantizing: in int8, whose bounds stand for an activation. Raises ValueError for what does not fit together.
        """
        C = x.shape[1]
        if scale.shape != (C,) or shift.shape != (C,):
            raise ValueError(f"norm: vectors of {tuple(scale.shape)} and {tuple(shift.shape)} meet {C} channels")
        if (requantizing is None) == (self.dtype == torch.int8):
            raise ValueError(f"norm: constants of int8 belong to its regions alone, and this one is {self.dtype}")
        _check_epilogue("norm", x.shape, None, activation, None, [])
        out = x if in_place else self._new_map(x.shape)
        vectors = torch.stack([scale.detach().float(), shift.detach().float()])
        constants = self._keep(F.pad(vectors, (0, -C % layout.PIXEL_BYTES)).contiguous(), self._biases)
        tail = [ACTIVATIONS.index(activation), constants]
        if requantizing is not None:
            epilogue, is_signed, _ = requantizing
            tail += [*map(_bits, (epilogue.residual, epilogue.low, epilogue.high)), int(is_signed)]
        integers = lambda: [self._number(out), self._number(x), *tail]  # noqa: E731
        self._add(StepKind.NORM, integers, [x], None if in_place else out)
        return out

    @staticmethod
    def _vector_shape(N: int, C: int) -> Shape:
        """A vector of fp32 lies in a map of bytes, and has whole blocks of values."""
        return N, 4 * -(-C // layout.PIXEL_BYTES) * layout.PIXEL_BYTES, 1, 1

    def _new_vector(self, N: int, C: int) -> Map:
        return self._new_map(self._vector_shape(N, C))

    def pooled_stem(
        self,
        shape: Shape,
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        bias: Optional[Tensor],
        pooling: Pooling,
        *,
        activation: str = "none",
        packed: Optional[Tensor] = None,
        how: Optional[Kept] = None,
        requantizing: Optional[Requantizing] = None,
    ) -> Map:
        """`read_for` the next of the region's inputs, `convolve` and `pool`, some lines of the result at a time.

        The two maps between them have no memory in the workspace: a thread keeps the lines that its band needs.
        """
        segment, unfolding = self._unfolded(shape, weight, stride, padding)
        _check_epilogue("pooled_stem", segment.output_shape, bias, activation, None, [])
        self._check_requantizing(requantizing, [segment], bias, activation, packed)
        tail = self._quantized("pooled_stem", how, lambda scale: 1 / scale)
        if requantizing is not None:
            unfolding = [*unfolding, segment.x.shape[2]]
            tail += _integers_of_epilogue(requantizing, math.prod(segment.weight.shape[1:]))
        out = self._new_map(pooling.output_shape(segment.output_shape))
        index, self._num_inputs = self._num_inputs, self._num_inputs + 1
        weight = packed_weights([segment.weight], self.dtype) if packed is None else packed
        numbers = self._keep(weight, self._weights), self._keep_constants(requantizing, bias, weight)
        window = [*segment.weight.shape[2:], *segment.stride, *segment.padding, 1, 1]
        rest = [*unfolding, ACTIVATIONS.index(activation), *numbers, *window]
        rest += [*pooling.kind_integers, *pooling.window_integers]
        rest += [self._lines_of_a_band(segment, pooling, weight.nbytes), *tail]
        self._add(StepKind.POOLED_STEM, lambda: [self._number(out), index, self._first_image, *rest], [], out, weight)
        return out

    def _lines_of_a_band(self, segment: Segment, pooling: Pooling, weight_bytes: int) -> int:
        """Lines of the pooling's output whose inputs fit a part of a cache, or are as much as the weights."""
        _, C, _, W = segment.x.shape
        _, K, _, Q = segment.output_shape
        lines_read = layout.blocks(C, self.dtype) * W * segment.stride[0]
        line_bytes = (layout.blocks(K, self.dtype) * Q + lines_read) * pooling.stride[0] * layout.PIXEL_BYTES
        return max(1, max(int(_FOR_A_BAND * second_level_cache_bytes()), weight_bytes) // line_bytes)

    def compile(self) -> CompiledRegion:
        if (why := compiled.load("cpu")) is not None:
            raise RuntimeError(f"a region runs in C++: {why}")
        waves = self._waves()
        places = self._places(waves)
        buffers: list[list[int]] = []
        steps: list[int] = []
        for wave in waves:
            for first in range(0, max(wave.images, self._images), wave.images):
                self._number_buffers(wave, first, places, buffers)
                for step in self._steps[wave.begin : wave.end]:
                    if step.written is not None and step.written.halo > 0:
                        steps += [StepKind.ZERO_HALO, self._number(step.written)]
                    steps += [step.kind, *step.integers()]
        integers = [_VERSION, _NUMBERS[self.dtype], len(buffers), *itertools.chain(*buffers), *steps]
        size = max((place + self._bytes(x, waves) for x, place in places.items()), default=0)
        program = torch.tensor(integers, dtype=torch.int64)
        return CompiledRegion(program, self._weights, self._biases, self._output_shapes, self.dtype, size)

    @property
    def kinds(self) -> set[StepKind]:
        """What kinds of steps it has."""
        has_halo = any(step.written is not None and step.written.halo > 0 for step in self._steps)
        return {step.kind for step in self._steps} | ({StepKind.ZERO_HALO} if has_halo else set())

    @property
    def _images(self) -> int:
        return self._maps[0].shape[0] if self._maps else 0

    def _waves(self) -> list[_Wave]:
        """Neighbouring steps that are done for some images before the next ones, so that their maps stay in the
        second-level cache: as many images as that has room for, since each wave reads the weights anew.

        Maps of one wave alone take memory for its images only. ResNet-50 in bf16 at batch 8: a workspace of 17 MB
        instead of 27, in the same time (Xeon with AMX, one thread, 2026-11).
        """
        waves: list[_Wave] = []
        sizes = _around([step.size for step in self._steps])
        for _, some in itertools.groupby(range(len(self._steps)), sizes.__getitem__):
            stage = list(some)
            images = self._images_of([self._steps[index] for index in stage])
            if waves and waves[-1].images == images:
                waves[-1] = waves[-1]._replace(end=stage[-1] + 1)
            else:
                waves.append(_Wave(stage[0], stage[-1] + 1, images))
        return waves

    def _images_of(self, steps: Sequence[_Step]) -> int:
        """How many images at a time move the fewest bytes from beyond the second-level cache."""
        N, cache = self._images, _FOR_MAPS * torch.get_num_threads() * second_level_cache_bytes()

        def bytes_from_beyond(images: int) -> float:
            total = 0.0
            for step in steps:
                moved = sum(self._image_bytes(x) for x in step.maps)
                kept = cache / (images * moved + step.weight_bytes)
                total += step.weight_bytes * -(-N // images) + N * moved * max(0.0, 1 - kept)
            return total

        sizes = {max(N, 1), *(2**power for power in range(N.bit_length()))}
        return min(sorted(sizes, reverse=True), key=bytes_from_beyond)  # all where that makes no difference

    def _number_buffers(self, wave: _Wave, first: int, places: dict[Map, int], buffers: list[list[int]]) -> None:
        """A buffer for the images from `first` on of each map that the wave touches."""
        pitches = self._pitches()
        self._first_image, self._numbers = first, {}
        self._images_now = min(wave.images, self._images - first)
        for x in dict.fromkeys(x for step in self._steps[wave.begin : wave.end] for x in step.maps):
            _, *size = x.shape
            offset = places[x] if wave.holds(x) else places[x] + first * self._image_bytes(x)
            self._numbers[x] = len(buffers)
            buffers.append([self._images_now, *size, x.halo, pitches[x.shape[3]], offset])

    def _new_map(self, shape: Shape) -> Map:
        self._maps.append(Map(shape, first_step=len(self._steps)))
        return self._maps[-1]

    def _number(self, x: Map) -> int:
        return self._numbers[x]

    def _add(
        self,
        kind: StepKind,
        integers: Callable[[], list[int]],
        read: list[Map],
        written: Optional[Map] = None,
        weight: Optional[Tensor] = None,
    ) -> None:
        step = _Step(kind, integers, read, written, 0 if weight is None else weight.nbytes)
        for x in step.maps:
            x.last_step = len(self._steps)
        self._steps.append(step)

    @staticmethod
    def _keep(tensor: Optional[Tensor], tensors: list[Tensor]) -> int:
        if tensor is None:
            return -1
        tensors.append(tensor)
        return len(tensors) - 1

    def _keep_constants(self, requantizing: Optional[Requantizing], bias: Optional[Tensor], weight: Tensor) -> int:
        if requantizing is not None:
            return self._keep(layout.pack_constants(requantizing.epilogue, weight), self._biases)
        return self._keep(None if bias is None else layout.pack_bias(bias), self._biases)

    def _pitches(self) -> dict[int, int]:
        """One for all maps of a width: between maps of one pitch, tiles run on over the ends of rows."""
        pitches: dict[int, int] = {}
        for x in self._maps:
            W = x.shape[3]
            pitches[W] = max(pitches.get(W, 0), W + x.halo)
        return pitches

    def _image_bytes(self, x: Map) -> int:
        _, C, H, W = x.shape
        pixels = (H + 2 * x.halo - 1) * self._pitches()[W] + W + 2 * x.halo
        return layout.blocks(C, self.dtype) * pixels * layout.PIXEL_BYTES

    def _bytes(self, x: Map, waves: Sequence[_Wave]) -> int:
        """A map that one wave alone touches is there for its images only."""
        images = next((wave.images for wave in waves if wave.holds(x)), x.shape[0])
        return min(images, x.shape[0]) * self._image_bytes(x)

    def _places(self, waves: Sequence[_Wave]) -> dict[Map, int]:
        """Offsets in the workspace: each map at the lowest place that is free while it is used. What several waves
        touch is used for as long as they last."""
        used: dict[Map, tuple[int, int]] = {}
        for x in self._maps:
            used[x] = x.first_step, x.last_step
            if not any(wave.holds(x) for wave in waves):
                begins, ends = zip(
                    *((w.begin, w.end) for w in waves if w.begin <= x.last_step and w.end > x.first_step)
                )
                used[x] = min(begins), max(ends) - 1
        places: dict[Map, int] = {}
        for x in self._maps:
            begin, end = used[x]
            taken = sorted(
                (place, place + self._bytes(other, waves))
                for other, place in places.items()
                if used[other][0] <= end and begin <= used[other][1]
            )
            place = 0
            for lower, upper in taken:
                if place + self._bytes(x, waves) <= lower:
                    break
                place = max(place, upper)
            places[x] = place
        return places


def _around(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Steps over single pixels between two of one size have that size: a gate's squeeze belongs to its map."""
    found, begin = list(sizes), 0
    for size, some in itertools.groupby(sizes):
        end = begin + len(list(some))
        if size == (1, 1) and 0 < begin and end < len(sizes) and sizes[begin - 1] == sizes[end]:
            found[begin:end] = [sizes[end]] * (end - begin)
        begin = end
    return found


def _bits(value: float) -> int:
    """The bits of a number rounded to fp32."""
    return struct.unpack("I", struct.pack("f", value))[0]


def _integers_of_epilogue(requantizing: Requantizing, reduction: int) -> list[int]:
    epilogue, *signs = requantizing
    bounds = map(_bits, (epilogue.residual, epilogue.low, epilogue.high))
    return [*bounds, int(fits_int32(epilogue, reduction)), *map(int, signs)]


def fits_int32(epilogue: Epilogue, reduction: int) -> bool:
    """Whether y stays within int32, rounding included, whatever the bytes are."""
    most = 255 * (127 * reduction * epilogue.multiplier.double().abs() + epilogue.residual)
    return bool((most + epilogue.bias.double().abs() < 2**30).all())


def _check_epilogue(
    caller: str,
    shape: Shape,
    bias: Optional[Tensor],
    activation: str,
    residual: Optional[Map],
    kept: Sequence[Map],  # what must not be the residual
) -> None:
    if bias is not None and bias.shape != shape[1:2]:
        raise ValueError(f"{caller}: a bias of {tuple(bias.shape)} is added to {shape[1]} channels")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{caller}: the activations are {', '.join(ACTIVATIONS)}, not {activation}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"{caller}: a residual of {residual.shape} is added to {shape}")
    if any(x is residual for x in kept):
        raise ValueError(f"{caller}: in place there must be a residual that no segment reads")


def _reach(segment: Segment) -> Optional[int]:
    """How far before an output's own pixel a window begins in the phases of its map; None where it ends after it."""
    reach = 0
    for taps, stride, padding, dilation in zip(
        segment.weight.shape[2:], segment.stride, segment.padding, segment.dilation
    ):
        if (taps - 1) * dilation - padding >= stride:
            return None
        reach = max(reach, -(-padding // stride))
    return reach
