"""The module of a plan that computes several convolutions and poolings in one call of C++."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Union

import torch
from torch import Tensor, nn

from fused_resnet.backends import blocked
from fused_resnet.choosing import Selection
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions import calls, kernels, layout
from fused_resnet.regions.fragment import Fragment
from fused_resnet.regions.program import CompiledRegion


class RegionConv(NamedTuple):
    """A convolution within a region: the name of the node that it was, what it computes, and whether by Winograd."""

    name: str
    problem: ConvProblem
    by_winograd: bool = False


class FrozenRegion(nn.Module):
    """A fragment of a plan as one call. Returns a tensor, or a tuple of several.

    convolutions: of the fragment, in its order. why: it runs as a region, as part of a sentence.
    """

    def __init__(
        self,
        fragment: Fragment,
        convolutions: tuple[RegionConv, ...],
        compiled: CompiledRegion,
        why: str,
    ) -> None:
        super().__init__()
        self.fragment, self.convolutions, self.compiled = fragment, convolutions, compiled
        self.why, self.micro_kernel = why, kernels.fastest_name(compiled.dtype)
        self.workspaces = calls.new_workspaces(compiled)

    @property
    def weights_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.compiled.weights)

    @property
    def workspace_bytes(self) -> int:
        return self.compiled.workspace_bytes

    def forward(self, *inputs: Tensor) -> Any:
        return self.bound()(*inputs)

    def bound(self) -> Callable[..., Union[Tensor, tuple[Tensor, ...]]]:
        """(*inputs) -> outputs, with all else settled: what a plan calls."""
        compiled = self.compiled
        call, shapes = calls.bound(compiled, self.workspaces), compiled.output_shapes
        empty, in_nhwc, has_vectors = torch.empty, torch.channels_last, self.fragment.has_vectors
        dtype = layout.outside(self.fragment.dtype)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = [empty(shape, dtype=dtype, memory_format=in_nhwc) for shape in shapes]
            call(list(inputs), outputs)
            return tuple(out.flatten(1) if flat else out for out, flat in zip(outputs, has_vectors))

        def run_for_one(*inputs: Tensor) -> Tensor:
            return run(*inputs)[0]

        return run_for_one if len(shapes) == 1 else run

    @property
    def flops(self) -> int:
        return sum(conv.problem.flops for conv in self.convolutions)

    @property
    def bytes_moved(self) -> int:
        """The least that it can move: inputs, weights and outputs once. What lies between them stays in caches."""
        return self.fragment.bytes_at_seams + self.weights_bytes

    def selection_of(self, conv: RegionConv) -> Selection:
        """Who computes one of its convolutions, and why."""
        how = "Winograd" if conv.by_winograd else self.micro_kernel
        source = f"by {how} in a region of {len(self.convolutions)} convolutions ({self.why})"
        return Selection(blocked.BACKEND, None, source)

    def extra_repr(self) -> str:
        f = self.fragment
        ends = " -> ".join(", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (
            f.shapes, [f.value_shapes[value] for value in f.outputs],
        ))  # fmt: skip
        return f"{len(self.convolutions)} convolutions, {ends}, {self.micro_kernel}"
