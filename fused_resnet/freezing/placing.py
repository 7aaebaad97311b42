"""The passes that settle where tensors lie: sums over their residual, Triton's in row space."""

from __future__ import annotations

import torch
from torch import fx

from fused_resnet import backends
from fused_resnet.freezing import layouts
from fused_resnet.freezing.modules import FrozenConv, FrozenMaxPool
from fused_resnet.graphs.memory import POOL_FUNCTIONS, POOLS
from fused_resnet.graphs.nodes import module_of
from fused_resnet.nn.bypass import has_stock_call


def mark_sums_in_place(graph: fx.Graph, modules: dict) -> None:
    """Let a convolution write its sum over the residual where nothing reads the residual's memory afterwards.

    The residual must be memory of its own, made by a fused convolution or a pooling. Every other reader of it must be
    a fused convolution or a pooling that comes earlier: those return no views. A convolution whose input is the
    residual itself never qualifies.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        conv = module_of(node, modules)
        if not isinstance(conv, FrozenConv) or len(node.args) < 2 or conv.backend.plan.bind is None:
            continue
        source, residual = node.args
        readers = [user for user in residual.users if user is not node]
        conv.in_place = (
            source is not residual
            and _owns_its_memory(residual, modules)
            and all(order[reader] < order[node] and _owns_its_memory(reader, modules) for reader in readers)
        )


def reselect_stranded(graph: fx.Graph, modules: dict, backend: str) -> None:
    """Where x cannot lie in row space, take what was measured fastest without it."""
    while stranded := layouts.stranded(_triton_as_selected(graph, modules)):
        for node in stranded:
            conv = modules[node.target]
            conv.select(backends.select(conv.problem, backend, in_plan=True, in_nhwc=True))


def _triton_as_selected(graph: fx.Graph, modules: dict) -> dict[fx.Node, layouts.Placed]:
    return {
        node: layouts.Placed(conv.problem, conv.selection.config)
        for node in graph.nodes
        if isinstance(conv := module_of(node, modules), FrozenConv) and conv.backend.plan.placed
    }


def place_triton(graph: fx.Graph, modules: dict, device: torch.device) -> None:
    asked = _triton_as_selected(graph, modules)
    is_replayed = device.type == "cuda" and not torch.version.hip
    for node, placed in layouts.assign(asked, device, is_replayed=is_replayed).items():
        conv = modules[node.target]
        conv.placed, conv.selection = placed, conv.selection._replace(config=placed.config)


def _owns_its_memory(node: fx.Node, modules: dict) -> bool:
    module = module_of(node, modules)
    if module is not None:
        return isinstance(module, (FrozenConv, FrozenMaxPool, *POOLS)) and has_stock_call(module)
    return node.op == "call_function" and node.target in POOL_FUNCTIONS
