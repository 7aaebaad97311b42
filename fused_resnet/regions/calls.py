"""Calls of a compiled region, from several threads at once: each has a workspace of its own."""

from __future__ import annotations

import collections
from typing import Callable

import torch
from torch import Tensor

from fused_resnet.regions import kernels
from fused_resnet.regions.program import CompiledRegion

_MOST = 8  # workspaces that wait for a call

Workspaces = collections.deque[Tensor]


def new_workspaces(region: CompiledRegion) -> Workspaces:
    """Where a region's workspaces wait between calls: one at first."""
    return Workspaces([region.empty_workspace()], maxlen=_MOST)


def bound(region: CompiledRegion, workspaces: Workspaces) -> Callable[[list[Tensor], list[Tensor]], None]:
    """(inputs, outputs to be written), with all else settled. A call that finds no workspace makes one."""
    call, kernel = torch.ops.fused_resnet.cpu_region.default, kernels.fastest_name(region.dtype)
    program, weights, biases = region.program, region.weights, region.biases

    def run(inputs: list[Tensor], outputs: list[Tensor]) -> None:
        try:
            workspace = workspaces.pop()
        except IndexError:
            workspace = region.empty_workspace()
        call(program, inputs, weights, biases, kernel, workspace, outputs)
        workspaces.append(workspace)

    return run
