"""Where a graph computes conv -> BN -> (+ residual) -> activation in a way that may become one call.

For `plan` (whole models, shapes known) and `rewriting` (one module's forward, shapes not known).
"""

from __future__ import annotations

import operator
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.nn import is_norm, why_not_fused
from fused_resnet.tracing import memory_of, module_of, only_user, writes_in_place, written

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu",
}  # fmt: skip


class Match(NamedTuple):
    """conv -> bn? -> add? -> activation?, each the only user of the one before it."""

    conv: fx.Node
    bn: Optional[fx.Node]
    add: Optional[fx.Node]
    act: Optional[fx.Node]

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self if node is not None]

    @property
    def residual(self) -> Optional[fx.Node]:
        """The addend that is not this convolution. Read from the graph: lowering replaces nodes."""
        head = self.bn or self.conv
        return None if self.add is None else next(arg for arg in self.add.args if arg is not head)


def matches(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    *,
    is_image: Callable[[Any], bool] = lambda node: True,
    is_alike: Callable[[Any, fx.Node], bool] = lambda other, head: True,
    is_write: Callable[[fx.Node, dict], bool] = writes_in_place,
) -> list[Match]:
    """Every convolution that can be bypassed, with as much of what follows it as may be computed together with it.

    is_image: whether a convolution's input is a batch of images. is_alike: whether an addend has the shape and dtype of
    the convolution's result, so that the addition does not broadcast. is_write: whether a node may write memory that it
    is given. Where the graph cannot tell, the caller must find out when it runs.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    heads = _heads(graph, modules, is_image)
    found = []
    for head, match in heads.items():
        add = only_user(head)
        if add is not None and _is_plain_add(add):
            (other,) = [arg for arg in add.args if arg is not head] or [None]
            # both addends may be convolutions (a projection shortcut): the later one takes the sum
            is_later = other in heads and only_user(other) is add and order[other] > order[head]
            # an augmented add writes its first argument, which others may read later unless it is a convolution's own
            is_private = not writes_in_place(add, modules) or add.args[0] in heads and only_user(add.args[0]) is add
            if isinstance(other, fx.Node) and not is_later and is_private and is_alike(other, head):
                match = match._replace(add=add)
        act = only_user(match.nodes[-1])
        if act is not None and activation_of(act, modules) != "none":
            match = match._replace(act=act)
        found.append(match)
    owned = {node for match in found for node in match.nodes}
    writes = [node for node in graph.nodes if node not in owned and is_write(node, modules)]
    memory = memory_of(graph, modules)
    return [_before_writes(match, order, writes, memory, modules) for match in found]


def _heads(graph: fx.Graph, modules: dict[str, nn.Module], is_image: Callable) -> dict[fx.Node, Match]:
    """conv -> bn? by their last node."""
    heads = {}
    for node in graph.nodes:
        conv = module_of(node, modules)
        if conv is None or why_not_fused(None, [(conv, None)]) is not None:
            continue
        if len(node.args) != 1 or node.kwargs or not is_image(node.args[0]):
            continue
        user = only_user(node)
        bn = module_of(user, modules)
        has_bn = is_norm(bn) and why_not_fused(None, [(conv, bn)]) is None
        heads[user if has_bn else node] = Match(node, user if has_bn else None, None, None)
    return heads


def _before_writes(
    match: Match, order: dict[fx.Node, int], writes: list[fx.Node], memory: dict, modules: dict[str, nn.Module]
) -> Match:
    """The part of a match that no foreign in-place operation cuts: everything moves to the match's last node, and the
    reads of the input and of the residual must not move past a write to them, nor a BN past another call of the same,
    which updates its running statistics too."""
    bn = module_of(match.bn, modules)

    def cut(first: fx.Node, read: fx.Node) -> bool:
        between = [write for write in writes if order[first] < order[write] < order[match.nodes[-1]]]
        return any(memory[node] & memory[read] for write in between for node in written(write))

    def calls_bn(node: fx.Node) -> bool:
        module = module_of(node, modules)
        is_between = match.bn is not None and order[match.bn] < order[node] < order[match.nodes[-1]]
        return is_between and module is not None and any(inner is bn for inner in module.modules())

    while len(match.nodes) > 1 and (
        cut(match.conv, match.conv.args[0])
        or match.residual is not None
        and cut(match.add, match.residual)
        or any(map(calls_bn, order))
    ):
        last = match._fields[max(i for i, node in enumerate(match) if node is not None)]
        match = match._replace(**{last: None})
    return match


def _is_plain_add(node: fx.Node) -> bool:
    is_call = node.op in ("call_function", "call_method")
    return is_call and node.target in _ADD and len(node.args) == 2 and not node.kwargs


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The activation that a node computes, "none" if it computes anything else."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return "none" if why_not_fused(module, []) is not None else _ACTIVATIONS.get(type(module), "none")
    if node.op not in ("call_function", "call_method") or len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return "none"
    return _ACTIVATIONS.get(node.target, "none")
