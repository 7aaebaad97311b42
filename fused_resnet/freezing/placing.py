"""The passes that settle where tensors lie: sums over their residual, Triton's in row space."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from fused_resnet import backends
from fused_resnet.freezing import layouts
from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.modules import FrozenConv, FrozenMaxPool
from fused_resnet.graphs.memory import POOL_FUNCTIONS, POOLS
from fused_resnet.nn.bypass import has_stock_call


def mark_sums_in_place(draft: Draft) -> None:
    """Let a convolution write its sum over the residual where nothing reads the residual's memory afterwards.

    The residual must be memory of its own, made by a fused convolution or a pooling. Every other reader of it must be
    a fused convolution or a pooling that comes earlier: those return no views. A convolution whose input is the
    residual itself never qualifies.
    """
    order = {node: index for index, node in enumerate(draft.graph.nodes)}
    for node in draft.graph.nodes:
        conv = draft.called_by(node)
        if not isinstance(conv, FrozenConv) or len(node.args) < 2 or conv.backend.plan.bind is None:
            continue
        source, residual = node.args
        readers = [user for user in residual.users if user is not node]
        conv.in_place = (
            source is not residual
            and _owns_its_memory(draft, residual)
            and all(order[reader] < order[node] and _owns_its_memory(draft, reader) for reader in readers)
        )


def reselect_stranded(draft: Draft) -> None:
    """Where x cannot lie in row space, take what was measured fastest without it."""
    while stranded := layouts.stranded(_as_selected(draft)):
        for node in stranded:
            conv = cast(FrozenConv, draft.called_by(node))
            conv.select(backends.select(conv.problem, draft.backend, in_plan=True, in_nhwc=True))


def _as_selected(draft: Draft) -> dict[fx.Node, layouts.Placed]:
    return {
        node: layouts.Placed(conv.problem, conv.selection.config)
        for node in draft.graph.nodes
        if isinstance(conv := draft.called_by(node), FrozenConv) and conv.backend.plan.placed
    }


def place_in_row_space(draft: Draft) -> None:
    """Settle the layouts of what is placed, and the configs with them (`layouts`)."""
    asked, device = _as_selected(draft), draft.device
    is_replayed = device.type == "cuda" and not torch.version.hip
    for node, placed in layouts.assign(asked, device, is_replayed=is_replayed).items():
        conv = cast(FrozenConv, draft.called_by(node))
        conv.placed, conv.selection = placed, conv.selection._replace(config=placed.config)


def _owns_its_memory(draft: Draft, node: fx.Node) -> bool:
    module = draft.called_by(node)
    if module is not None:
        return isinstance(module, (FrozenConv, FrozenMaxPool, *POOLS)) and has_stock_call(module)
    return node.op == "call_function" and node.target in POOL_FUNCTIONS
