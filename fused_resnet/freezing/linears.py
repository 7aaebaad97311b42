"""Linear layers with a ReLU, of maps laid flat, as convolutions over whole maps: int8 computes them like others."""

from __future__ import annotations

import functools
from typing import Collection, Optional, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet import choosing
from fused_resnet.freezing.draft import Decision, Draft, lowered
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.freezing.fragments import FLATTENS, weight_of
from fused_resnet.graphs.matching import activation_of
from fused_resnet.graphs.nodes import only_user
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.operators.describe import Facts, conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.regions.layout import DTYPES, MOST_TAPS


def lower_linears(draft: Draft, kept: Collection[fx.Node] = (), *, is_of_one_size: bool = True) -> None:
    """Lower every flatten -> linear -> ReLU, and those that follow one so. kept: those to leave alone.

    What reads the last one gets its mean, which is itself, as vectors: a classifier of means. is_of_one_size: whether
    poolings that return a map of this size may be left out.
    """
    for node in list(draft.graph.nodes):
        layer, act = draft.called_by(node), only_user(node)
        if act is None or activation_of(act, draft.modules) not in ("relu", "relu6") or node in kept:
            continue
        source = _source_of(draft, node, is_of_one_size)
        if source is not None and type(layer) is nn.Linear:
            _lower(draft, node, act, layer, source)


def _source_of(draft: Draft, node: fx.Node, is_of_one_size: bool) -> Optional[fx.Node]:
    """The map, that is no mean, which a plain linear layer reads flat, if it does."""
    layer, facts = draft.called_by(node), facts_of(node)
    if type(layer) is not nn.Linear or not has_stock_call(layer) or type(layer.weight) is not nn.Parameter:
        return None
    if len(node.args) != 1 or node.kwargs or facts is None or len(facts.shape) != 2 or facts.dtype not in DTYPES:
        return None
    flat = node.all_input_nodes[0]
    module = draft.called_by(flat)
    if not (flat.op != "get_attr" and flat.target in FLATTENS or type(module) is nn.Flatten and has_stock_call(module)):
        return None
    source = flat.all_input_nodes[0] if len(flat.all_input_nodes) == 1 else node
    while is_of_one_size and _returns_its_map(draft, source) or _is_mean_of_one(draft, source):
        source = source.all_input_nodes[0]
    shape = tuple(getattr(facts_of(source), "shape", ()))
    found = [facts_of(one) for one in (source, flat)]
    if (
        len(shape) != 4
        or 0 in shape
        or max(shape[2:]) > MOST_TAPS
        or any(one is None or one.dtype != facts.dtype for one in found)
    ):
        return None
    is_mean = shape[2:] == (1, 1) and source not in draft.convs
    is_whole = getattr(found[1], "shape", ()) == (shape[0], shape[1] * shape[2] * shape[3])
    return source if is_whole and not is_mean else None


def _returns_its_map(draft: Draft, node: fx.Node) -> bool:
    """Whether it averages over single pixels."""
    pool, facts = draft.called_by(node), facts_of(node)
    if type(pool) is not nn.AdaptiveAvgPool2d or not has_stock_call(pool) or len(node.args) != 1 or node.kwargs:
        return False
    source = facts_of(node.args[0])
    return facts is not None and source is not None and tuple(facts.shape) == tuple(source.shape)


def _is_mean_of_one(draft: Draft, node: fx.Node) -> bool:
    """Whether it is what `_lower` puts behind a linear layer."""
    return _returns_its_map(draft, node) and node.all_input_nodes[0] in draft.convs


def _lower(draft: Draft, node: fx.Node, act: fx.Node, layer: nn.Linear, source: fx.Node) -> None:
    facts, of_source = cast(Facts, facts_of(node)), cast(Facts, facts_of(source))
    (N, C, H, W), K, graph = of_source.shape, len(layer.weight), draft.graph
    weight_of_layer = functools.partial(weight_of, layer)

    def fold(dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
        weight, bias = weight_of_layer(dtype)
        return weight.view(K, C, H, W).contiguous(memory_format=torch.channels_last), bias

    weight, bias = fold(facts.dtype)
    x = torch.empty(N, C, H, W, dtype=facts.dtype, device="meta")
    operands = ConvOperands(x, weight.to("meta"), bias=None if bias is None else bias.to("meta"))
    problem = conv_problem(operands, (1, 1), (0, 0), (1, 1), 1, activation_of(act, draft.modules))
    problem = problem._replace(device=draft.device.type)
    flat = node.all_input_nodes[0]
    node.op, node.target, node.args = "call_function", lowered, (source,)
    map_facts = facts._replace(shape=(N, K, 1, 1))
    node.meta = {**node.meta, "facts": map_facts}
    draft.convs[node] = Decision(problem, choosing.select(problem, draft.backend, in_plan=True), weight, bias)
    draft.folds[node] = fold
    with graph.inserting_before(act):
        mean = graph.call_module(draft.add(f"{node.name}_mean", nn.AdaptiveAvgPool2d(1)), (node,))
        vectors = graph.call_function(torch.flatten, (mean, 1))
    mean.meta, vectors.meta = {**act.meta, "facts": map_facts}, {**act.meta, "facts": facts}
    act.replace_all_uses_with(vectors)
    graph.erase_node(act)
    for unused in (flat, *flat.all_input_nodes):
        if not unused.users and unused is not source:
            graph.erase_node(unused)
