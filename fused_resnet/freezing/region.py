"""The module of a plan that computes several convolutions and poolings in one call of C++."""

from __future__ import annotations

import collections
from typing import Any, Callable, NamedTuple, Union

import torch
from torch import Tensor, nn

from fused_resnet.backends import blocked
from fused_resnet.choosing import Selection
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions import kernels
from fused_resnet.regions.fragment import Fragment
from fused_resnet.regions.program import MOST_WORKSPACES, CompiledRegion


class RegionConv(NamedTuple):
    """A convolution within a region: the name of the node that it was, and what it computes."""

    name: str
    problem: ConvProblem


class FrozenRegion(nn.Module):
    """A fragment of a plan as one call. Returns a tensor, or a tuple of several.

    convolutions: of the fragment, in its order. why: it runs as a region, as part of a sentence. Between calls its
    workspaces wait in a pool. A call takes one, or makes one where other threads have all.
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
        self.why, self.micro_kernel = why, kernels.fastest_name(fragment.dtype)
        self.workspaces = collections.deque([compiled.empty_workspace()], maxlen=MOST_WORKSPACES)

    def forward(self, *inputs: Tensor) -> Any:
        return self.bound()(*inputs)

    def bound(self) -> Callable[..., Union[Tensor, tuple[Tensor, ...]]]:
        """(*inputs) -> outputs, with all else settled: what a plan calls."""
        program, weights, biases, shapes, _, _ = compiled = self.compiled
        call, kernel, pool = torch.ops.fused_resnet.cpu_region.default, self.micro_kernel, self.workspaces
        empty, in_nhwc, has_vectors = torch.empty, torch.channels_last, self.fragment.has_vectors
        dtype = self.fragment.dtype_outside

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            try:
                workspace = pool.pop()
            except IndexError:
                workspace = compiled.empty_workspace()
            outputs = [empty(shape, dtype=dtype, memory_format=in_nhwc) for shape in shapes]
            call(program, list(inputs), weights, biases, kernel, workspace, outputs)
            pool.append(workspace)
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
        return self.fragment.bytes_at_seams + sum(weight.nbytes for weight in self.compiled.weights)

    @property
    def selection(self) -> Selection:
        """Who computes each of its convolutions, and why."""
        source = f"in a region of {len(self.convolutions)} convolutions by {self.micro_kernel} ({self.why})"
        return Selection(blocked.BACKEND, None, source)

    def extra_repr(self) -> str:
        f = self.fragment
        ends = " -> ".join(", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (
            f.shapes, self.compiled.output_shapes,
        ))  # fmt: skip
        return f"{len(self.convolutions)} convolutions, {ends}, {self.micro_kernel}"
