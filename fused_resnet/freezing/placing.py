"""The passes that settle who computes what, and where tensors lie: sums over their residual, Triton's in row space."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from fused_resnet import choosing
from fused_resnet.choosing.decide import decide
from fused_resnet.choosing.planned import Placed
from fused_resnet.freezing import layouts
from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.gates import gated
from fused_resnet.graphs.memory import POOL_FUNCTIONS, POOLS
from fused_resnet.nn.stock import has_stock_call


def choose_measured(draft: Draft) -> None:
    """Have measured what is not known of the plan's convolutions, and take what is right and fastest here."""
    if draft.backend != "auto":
        return
    decide([conv.problem for conv in draft.convs.values()], draft.device, draft.tuning)
    for node, conv in list(draft.convs.items()):
        selection = draft.overrides.get(conv.problem) or choosing.select(conv.problem, in_plan=True)
        draft.decide(node, selection=selection)


def mark_sums_in_place(draft: Draft) -> None:
    """Let a convolution write its sum over the residual where nothing reads the residual's memory afterwards.

    The residual must be memory of its own, made by a fused convolution or a pooling. Every other reader of it must be
    a fused convolution or a pooling that comes earlier: those return no views. A convolution whose input is the
    residual itself never qualifies.
    """
    order = {node: index for index, node in enumerate(draft.graph.nodes)}
    for node, conv in list(draft.convs.items()):
        if not conv.problem.has_residual or conv.selection.backend.plan.bind is None:
            continue
        source, residual = cast("tuple[fx.Node, fx.Node]", node.args)
        readers = [user for user in residual.users if user is not node]
        in_place = (
            source is not residual
            and _owns_its_memory(draft, residual)
            and all(order[reader] < order[node] and _owns_its_memory(draft, reader) for reader in readers)
        )
        draft.decide(node, in_place=in_place)


def reselect_stranded(draft: Draft) -> None:
    """Where x cannot lie in row space, take what was measured fastest without it."""
    while stranded := layouts.stranded(_as_selected(draft)):
        for node in stranded:
            problem = draft.convs[node].problem
            draft.decide(node, selection=choosing.select(problem, draft.backend, in_plan=True, in_nhwc=True))


def place_in_row_space(draft: Draft) -> None:
    """Settle the layouts of what is placed, and the configs with them (`layouts`)."""
    is_replayed = draft.device.type == "cuda" and not torch.version.hip
    for node, placed in layouts.assign(_as_selected(draft), draft.device, is_replayed=is_replayed).items():
        selection = draft.convs[node].selection._replace(config=placed.config)
        draft.decide(node, placed=placed, selection=selection)


def _as_selected(draft: Draft) -> dict[fx.Node, Placed]:
    return {
        node: Placed(conv.problem, conv.selection.config)
        for node, conv in draft.convs.items()
        if conv.selection.backend.plan.placed
    }


def _owns_its_memory(draft: Draft, node: fx.Node) -> bool:
    """Whether it is new memory in NCHW or NHWC. What else is new (`graphs.memory`) may have strides in any order."""
    module = draft.called_by(node)
    if module is not None:
        return isinstance(module, POOLS) and has_stock_call(module)
    is_new = node.target in POOL_FUNCTIONS or node.target is gated
    return node in draft.convs or node.op == "call_function" and is_new
