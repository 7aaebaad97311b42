"""A run of a plan's convolutions and poolings as a value: what one region, or separate nodes, compute."""

from __future__ import annotations

import hashlib
from typing import Any, Mapping, NamedTuple, Optional

import torch

from fused_resnet import backends
from fused_resnet.choosing import winners
from fused_resnet.choosing.choice import Selection
from fused_resnet.regions.fragment import CopyStep, Fragment, Step


class Separate(NamedTuple):
    """How a plan runs a convolution that is in no region."""

    selection: Selection
    in_place: bool


class RegionProblem(NamedTuple):
    """A piece under which measurements are kept, as a convolution is by its problem."""

    N: int
    text: str
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> str:
        return "region"

    def __str__(self) -> str:
        return f"{self.N}x{self.text}"


class Piece(NamedTuple):
    """A fragment of a plan, the places of its steps in the plan, and how its convolutions run separately.

    separate: of each step, None of what is no convolution; None of a piece that is held against whoever might compute
    them (`outright`). is_packed: of each step, whether another plan of the model has its weight packed for a region.
    """

    fragment: Fragment
    places: tuple[int, ...]
    separate: Optional[tuple[Optional[Separate], ...]] = None
    is_packed: tuple[bool, ...] = ()

    @property
    def region(self) -> RegionProblem:
        """As it is kept whether the region is right."""
        return RegionProblem(self.fragment.shapes[0][0], self.fragment.text, self.fragment.dtype, "cpu")

    @property
    def problem(self) -> RegionProblem:
        """As times are kept: also by who computes the convolutions separately, since that is what it beat."""
        if self.separate is None:
            texts = [f"{name} {winners.kernel_digest(name)}" for name in sorted(backends.known("conv_bn_act"))]
        else:
            rivals = ((one.selection, one.in_place) for one in self.separate if one is not None)
            texts = [f"{one} {in_place} {winners.kernel_digest(one.backend.name)}" for one, in_place in rivals]
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        return self.region._replace(text=f"{self.fragment.text} {digest}")

    def part(self, begin: int, end: int) -> Piece:
        """The steps from begin to end as a piece of their own."""
        f, first = self.fragment, len(self.fragment.shapes)
        within, shapes = range(first + begin, first + end), f.value_shapes
        reads = dict.fromkeys(value for step in f.steps[begin:end] for value in step.reads if value not in within)
        read_later = {value for step in f.steps[end:] for value in step.reads} | set(f.outputs)
        renamed = {value: number for number, value in enumerate([*reads, *within])}
        steps = tuple(_renamed(step, renamed) for step in f.steps[begin:end])
        outputs = tuple(renamed[value] for value in within if value in read_later)
        fragment = Fragment(tuple(shapes[value] for value in reads), steps, outputs, f.dtype)
        separate = None if self.separate is None else self.separate[begin:end]
        return Piece(fragment, self.places[begin:end], separate, self.is_packed[begin:end])


def _renamed(step: Step, renamed: Mapping[int, int]) -> Step:
    if isinstance(step, CopyStep):
        return step._replace(xs=tuple(renamed[x] for x in step.xs))
    read = {name: value for name, value in step._asdict().items() if name in ("x", "gate", "residual")}
    changed: Any = {name: value if value is None else renamed[value] for name, value in read.items()}
    return step._replace(**changed)
