"""Programs of the operator `cpu_region`: csrc/cpu/blocked/program.h says what their integers mean.

region = Region(torch.float32)
x = region.read((1, 64, 56, 56))
region.write(region.convolve([Segment(x, weight, padding=(1, 1))], bias, activation="relu"))
compiled = region.compile()
(y,) = compiled([images], compiled.empty_workspace())
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fused_resnet.kernels import compiled
from fused_resnet.operators.problem import ACTIVATIONS, output_size
from fused_resnet.regions import layout

_VERSION = 1
_ACTIVATIONS = ACTIVATIONS[:3]  # the kernels have no others
_FROM_NHWC, _TO_NHWC, _ZERO_HALO, _CONVOLVE, _POOL = range(5)
Shape = tuple[int, int, int, int]
Pair = tuple[int, int]


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

    @property
    def output_shape(self) -> Shape:
        N, _, H, W = self.x.shape
        K, _, R, S = self.weight.shape
        sides = zip((H, W), (R, S), self.stride, self.padding, self.dilation)
        P, Q = (output_size(*side) for side in sides)
        return N, K, P, Q


def packed_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights of a convolution's segments side by side: their k steps follow one another."""
    return torch.cat([layout.pack_weight(weight, dtype) for weight in weights], 1)


class CompiledRegion(NamedTuple):
    """What one call takes, for one input shape. Its workspace may hold anything before a call."""

    program: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    output_shapes: list[Shape]
    dtype: torch.dtype
    workspace_bytes: int

    def empty_workspace(self) -> Tensor:
        return torch.empty(self.workspace_bytes, dtype=torch.uint8)

    def __call__(self, inputs: Sequence[Tensor], workspace: Tensor, kernel: str = "") -> list[Tensor]:
        """inputs: in channels_last. kernel: a row of the table of micro-kernels, or the fastest that runs here."""
        outputs = [
            torch.empty(shape, dtype=self.dtype, memory_format=torch.channels_last) for shape in self.output_shapes
        ]
        torch.ops.fused_resnet.cpu_region(
            self.program, list(inputs), self.weights, self.biases, kernel, workspace, outputs
        )
        return outputs


@dataclass
class Region:
    """Takes the steps one by one. Maps get their place only when all readers are known."""

    dtype: torch.dtype
    _maps: list[Map] = field(default_factory=list)
    # each gives its integers once maps have numbers
    _steps: list[Callable[[], list[int]]] = field(default_factory=list)
    _written: list[Optional[Map]] = field(default_factory=list)  # the map that a step writes first
    _weights: list[Tensor] = field(default_factory=list)
    _biases: list[Tensor] = field(default_factory=list)
    _num_inputs: int = 0
    _output_shapes: list[Shape] = field(default_factory=list)

    def read(self, shape: Shape) -> Map:
        """The next of the region's inputs."""
        x, index = self._new_map(shape), self._num_inputs
        self._num_inputs += 1
        self._add(lambda: [_FROM_NHWC, index, self._number(x)], [], x)
        return x

    def write(self, x: Map) -> None:
        """x becomes the next of the region's outputs."""
        index = len(self._output_shapes)
        self._output_shapes.append(x.shape)
        self._add(lambda: [_TO_NHWC, self._number(x), index], [x])

    def convolve(
        self,
        segments: Sequence[Segment],
        bias: Optional[Tensor],
        *,
        activation: str = "none",
        residual: Optional[Map] = None,
        in_place: bool = False,
        packed: Optional[Tensor] = None,
    ) -> Map:
        """act(sum of the segments' convolutions + bias + residual). in_place: the residual's map takes the result.

        packed: the segments' weights as `packed_weights` gives them, by somebody who keeps them for several regions.
        The segments' own then only say their shapes.

        Raises ValueError for what does not fit together, and for activations that the kernels do not have.
        """
        shape = segments[0].output_shape
        self._check(segments, bias, activation, residual, in_place)
        out = residual if in_place and residual is not None else self._new_map(shape)
        weight = packed_weights([segment.weight for segment in segments], self.dtype) if packed is None else packed
        numbers = (
            self._keep(weight, self._weights),
            self._keep(None if bias is None else layout.pack_bias(bias), self._biases),
        )
        for segment in segments:
            segment.x.halo = max(segment.x.halo, *segment.padding)
        # what is larger is read once: by one thread, and by all of them together
        by_channels = int(weight.nbytes > sum(math.prod(segment.x.shape) for segment in segments) * self.dtype.itemsize)

        def integers() -> list[int]:
            added = -1 if residual is None else self._number(residual)
            head = [_CONVOLVE, self._number(out), added, ACTIVATIONS.index(activation), by_channels, *numbers]
            windows = ((self._number(s.x), *s.weight.shape[2:], *s.stride, *s.padding, *s.dilation) for s in segments)
            return [*head, len(segments), *itertools.chain(*windows)]

        read = [segment.x for segment in segments] + ([] if residual is None else [residual])
        self._add(integers, read, None if out is residual else out)
        return out

    @staticmethod
    def _check(
        segments: Sequence[Segment], bias: Optional[Tensor], activation: str, residual: Optional[Map], in_place: bool
    ) -> None:
        shape = segments[0].output_shape
        for x, weight, *_ in segments:
            if weight.shape[1] != x.shape[1]:
                raise ValueError(f"convolve: a weight of {tuple(weight.shape)} meets a map of {x.shape[1]} channels")
        for segment in segments:
            if segment.output_shape != shape:
                raise ValueError(f"convolve: segments give {shape} and {segment.output_shape}")
        if bias is not None and bias.shape != shape[1:2]:
            raise ValueError(f"convolve: a bias of {tuple(bias.shape)} is added to {shape[1]} channels")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"convolve: the activations are {', '.join(_ACTIVATIONS)}, not {activation}")
        if residual is not None and residual.shape != shape:
            raise ValueError(f"convolve: a residual of {residual.shape} is added to {shape}")
        if in_place and (residual is None or any(segment.x is residual for segment in segments)):
            raise ValueError("convolve: in place there must be a residual that no segment reads")

    def pool(
        self, x: Map, kind: str, window: Pair, stride: Pair, padding: Pair = (0, 0), *, count_include_pad: bool = True
    ) -> Map:
        """kind: "max" or "average"."""
        N, C, H, W = x.shape
        P, Q = (output_size(*side, 1) for side in zip((H, W), window, stride, padding))
        out = self._new_map((N, C, P, Q))
        what = [int(kind == "max"), int(count_include_pad)]
        self._add(lambda: [_POOL, *what, self._number(x), self._number(out), *window, *stride, *padding], [x], out)
        return out

    def compile(self) -> CompiledRegion:
        if (why := compiled.load("cpu")) is not None:
            raise RuntimeError(f"a region runs in C++: {why}")
        places = self._places()
        pitches = self._pitches()
        integers = [_VERSION, len(self._maps)]
        for x in self._maps:
            integers += [*x.shape, x.halo, pitches[x.shape[3]], places[self._number(x)]]
        for step, written in zip(self._steps, self._written):
            if written is not None and written.halo > 0:
                integers += [_ZERO_HALO, self._number(written)]
            integers += step()
        size = max((place + self._bytes(x) for place, x in zip(places, self._maps)), default=0)
        program = torch.tensor(integers, dtype=torch.int64)
        return CompiledRegion(program, self._weights, self._biases, self._output_shapes, self.dtype, size)

    def _new_map(self, shape: Shape) -> Map:
        self._maps.append(Map(shape, first_step=len(self._steps)))
        return self._maps[-1]

    def _number(self, x: Map) -> int:
        return self._maps.index(x)

    def _add(self, step: Callable[[], list[int]], read: list[Map], written: Optional[Map] = None) -> None:
        for x in read + ([] if written is None else [written]):
            x.last_step = len(self._steps)
        self._steps.append(step)
        self._written.append(written)

    @staticmethod
    def _keep(tensor: Optional[Tensor], tensors: list[Tensor]) -> int:
        if tensor is None:
            return -1
        tensors.append(tensor)
        return len(tensors) - 1

    def _pitches(self) -> dict[int, int]:
        """One for all maps of a width: between maps of one pitch, tiles run on over the ends of rows."""
        pitches: dict[int, int] = {}
        for x in self._maps:
            W = x.shape[3]
            pitches[W] = max(pitches.get(W, 0), W + x.halo)
        return pitches

    def _bytes(self, x: Map) -> int:
        N, C, H, W = x.shape
        pixels = (H + 2 * x.halo - 1) * self._pitches()[W] + W + 2 * x.halo
        return N * layout.blocks(C, self.dtype) * pixels * layout.PIXEL_BYTES

    def _places(self) -> list[int]:
        """Offsets in the workspace: each map at the lowest place that is free while it is used."""
        places: list[int] = []
        for x in self._maps:
            taken = sorted(
                (place, place + self._bytes(other))
                for place, other in zip(places, self._maps)
                if other.first_step <= x.last_step and x.first_step <= other.last_step
            )
            place = 0
            for begin, end in taken:
                if place + self._bytes(x) <= begin:
                    break
                place = max(place, end)
            places.append(place)
        return places
