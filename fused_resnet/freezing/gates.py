"""Gates of squeeze and excitation as one node each: what multiplies a map by a sigmoid, adds to it and activates it."""

from __future__ import annotations

import operator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.graphs.matching import activation_of, is_plain_add
from fused_resnet.graphs.memory import writes_in_place
from fused_resnet.graphs.nodes import only_user
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.regions.fragment import GateStep
from fused_resnet.regions.layout import DTYPES

_FUNCTIONS: dict[Any, str] = {
    nn.Sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", "sigmoid": "sigmoid",
    torch.sigmoid_: "sigmoid", "sigmoid_": "sigmoid", nn.Hardsigmoid: "hardsigmoid", F.hardsigmoid: "hardsigmoid",
}  # fmt: skip
_PRODUCTS = (operator.mul, torch.mul, "mul")


def gated(
    x: Tensor,
    gate: Tensor,
    residual: Optional[Tensor] = None,
    *,
    function: str = "sigmoid",
    activation: str = "none",
) -> Tensor:
    """act(x * f(gate) + residual) by torch: what the node calls where no region takes it."""
    return GateStep(0, 0, 0, function, activation).of(x, gate, residual)


def gate_of(node: fx.Node) -> Optional[GateStep]:
    """What a node of `join_gates` computes. Its inputs: from number 0 on."""
    if node.target is not gated:
        return None
    return GateStep(0, 1, 2 if len(node.args) > 2 else None, **node.kwargs)


def join_gates(draft: Draft) -> None:
    """One node for every x * f(gate) (+ residual) -> activation, in the last one's place and under its name."""
    for node in list(draft.graph.nodes):
        function, product = _function_of(draft, node), only_user(node)
        if function is None or product is None or (x := _gated_map(node, product)) is None:
            continue
        residual, nodes = None, [node, product]
        add = only_user(product)
        if add is not None and is_plain_add(add) and _is_private(draft, add, product):
            (other,) = [arg for arg in add.args if arg is not product] or [product]
            if isinstance(other, fx.Node) and other is not product and _are_alike(other, product, add):
                residual, nodes = other, [*nodes, add]
        act, activation = only_user(nodes[-1]), "none"
        if act is not None and _are_alike(act, product):
            activation = activation_of(act, draft.modules)
            nodes += [act] if activation != "none" else []
        if not _is_written_between(draft, nodes):
            _join(draft, nodes, x, residual, function, activation)


def _function_of(draft: Draft, node: fx.Node) -> Optional[str]:
    """The function of a gate (N, C, 1, 1), in place only where nothing else reads its argument."""
    module, facts = draft.called_by(node), facts_of(node)
    if node.op not in ("call_module", "call_function", "call_method") or len(node.all_input_nodes) != 1:
        return None
    if module is not None and not has_stock_call(module) or len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    function = _FUNCTIONS.get(node.target if module is None else type(module))
    source = node.all_input_nodes[0]
    if function is None or facts is None or facts.dtype not in DTYPES or not _are_alike(node, source):
        return None
    if writes_in_place(node, draft.modules) and (only_user(source) is not node or source not in draft.convs):
        return None
    return function if len(facts.shape) == 4 and tuple(facts.shape[2:]) == (1, 1) and 0 not in facts.shape else None


def _gated_map(gate: fx.Node, product: fx.Node) -> Optional[fx.Node]:
    """What the gate is multiplied with, if that is a map of its channels."""
    if product.op not in ("call_function", "call_method") or product.target not in _PRODUCTS or product.kwargs:
        return None
    others = [arg for arg in product.args if arg is not gate]
    if len(product.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    facts, of_gate = facts_of(others[0]), facts_of(gate)
    is_map = facts is not None and of_gate is not None and facts.shape[:2] == of_gate.shape[:2]
    return others[0] if is_map and _are_alike(others[0], product) else None


def _are_alike(*nodes: fx.Node) -> bool:
    """Whether their values have one shape and dtype, in which they are computed."""
    found = [facts_of(node) for node in nodes]
    known = {(tuple(one.shape), one.dtype) for one in found if one is not None}
    arrive = {node.meta.get("arrives_in") for node in nodes} - {None}
    return None not in found and len(known) == 1 and arrive <= {one.dtype for one in found if one is not None}


def _is_private(draft: Draft, add: fx.Node, product: fx.Node) -> bool:
    """Whether it writes at most into the product, which nothing else reads."""
    return not writes_in_place(add, draft.modules) or add.args[0] is product


def _is_written_between(draft: Draft, nodes: list[fx.Node]) -> bool:
    """Whether something else writes in place before the last of these: the others move there."""
    between, is_inside = [], False
    for node in draft.graph.nodes:
        is_inside |= node is nodes[0]
        if is_inside and node not in nodes:
            between.append(node)
        if node is nodes[-1]:
            break
    return any(writes_in_place(node, draft.modules) for node in between)


def _join(
    draft: Draft, nodes: list[fx.Node], x: fx.Node, residual: Optional[fx.Node], function: str, activation: str
) -> None:
    last = nodes[-1]
    operands = (x, nodes[0].all_input_nodes[0], *([] if residual is None else [residual]))
    last.op, last.target, last.args = "call_function", gated, operands
    last.kwargs = {"function": function, "activation": activation}
    for node in reversed(nodes[:-1]):
        draft.graph.erase_node(node)
