"""Convolutions, norms and poolings that a graph calls as functions: which these are, and with what arguments."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import fx

_ATEN = torch.ops.aten
# By what a weight's rank must be; torch.convolution takes several.
CONVOLUTIONS = {F.conv1d: 3, F.conv2d: 4, F.conv3d: 5, torch.convolution: None}
# ATen's operators by the function that takes the same arguments.
ATEN_CONVOLUTIONS: dict[Any, Any] = {
    _ATEN.conv1d.default: F.conv1d, _ATEN.conv2d.default: F.conv2d, _ATEN.conv3d.default: F.conv3d,
    _ATEN.conv1d.padding: F.conv1d, _ATEN.conv2d.padding: F.conv2d, _ATEN.conv3d.padding: F.conv3d,
    _ATEN.convolution.default: torch.convolution,
}  # fmt: skip
_CONVOLUTION = "input weight bias stride padding dilation groups".split()
_ARGUMENTS: dict[Any, list[str]] = {
    F.conv1d: _CONVOLUTION, F.conv2d: _CONVOLUTION, F.conv3d: _CONVOLUTION,
    torch.convolution: "input weight bias stride padding dilation transposed output_padding groups".split(),
    F.linear: "input weight bias".split(),
    F.batch_norm: "input running_mean running_var weight bias training momentum eps".split(),
    torch.batch_norm: "input weight bias running_mean running_var training momentum eps cudnn_enabled".split(),
    F.max_pool2d: "input kernel_size stride padding dilation ceil_mode return_indices".split(),
}  # fmt: skip


def arguments_of(node: Optional[fx.Node]) -> dict[str, Any]:
    """The arguments by name of a function in this table; empty of any other node."""
    if node is None or node.op != "call_function" or node.target not in _ARGUMENTS:
        return {}
    return {**dict(zip(_ARGUMENTS[node.target], node.args)), **node.kwargs}


def has_convolutions(graph: fx.Graph) -> bool:
    """Whether it calls a convolution as a function or an operator."""
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    return any(function in CONVOLUTIONS or function in ATEN_CONVOLUTIONS for function in called)
