"""A graph on its way to a plan, as the passes get it."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import fx, nn

from fused_resnet.freezing.dtypes import Conversion
from fused_resnet.graphs.nodes import module_of
from fused_resnet.graphs.spelling import add_child


class Draft(NamedTuple):
    """The traced model for one input shape, and what was asked for.

    module: the graph, whose nodes know their shapes and dtypes. modules: those that its nodes may call, by name.
    backend: "auto", or the one that every convolution must use. conversion: of the caller's dtypes, if there is one.
    """

    module: fx.GraphModule
    modules: dict[str, nn.Module]
    backend: str
    device: torch.device
    conversion: Optional[Conversion]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def called_by(self, node: fx.Node) -> Optional[nn.Module]:
        return module_of(node, self.modules)

    def add(self, name: str, child: nn.Module) -> str:
        """Give the graph a module of this name, or of the next free one. Returns the name."""
        return add_child(self.module, self.modules, name, child)
