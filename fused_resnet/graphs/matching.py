"""Where a graph computes conv -> BN -> (+ residual) -> activation, or BN -> activation in front of convolutions, in a
way that may become one call.

In whole models, with shapes known, for `freezing`; in one module's forward, without them, for `fusing`.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Callable, NamedTuple, Optional, Union, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.graphs.memory import memory_of, writes_in_place, written
from fused_resnet.graphs.nodes import module_of, only_user
from fused_resnet.graphs.spelling import arguments_of
from fused_resnet.nn.bypass import why_not_fused, why_not_norm
from fused_resnet.nn.norms import Norm, is_norm, may_be_norm, norm_of, why_not_bn
from fused_resnet.nn.stock import why_called

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu",
}  # fmt: skip


class Match(NamedTuple):
    """conv -> bn? -> add? -> activation?, each the only user of the one before it. Nothing follows a bn that calls
    modules with its result."""

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
    is_fit: Callable[[fx.Node], bool] = lambda node: True,
    is_alike: Callable[[Any, fx.Node], bool] = lambda other, head: True,
    is_write: Callable[[fx.Node, dict], bool] = writes_in_place,
) -> list[Match]:
    """Every convolution that can be bypassed, with as much of what follows it as may be computed together with it.

    is_fit: whether a convolution or its norm takes a batch of images and computes in its dtype. is_alike: whether an
    addend has the shape and dtype of the convolution's result, so that the addition does not broadcast. is_write:
    whether a node may write memory that it is given. Where the graph cannot tell, the caller must find out at run time.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    heads = _heads(graph, modules, is_fit)
    found = []
    for head, match in heads.items():
        norm = norm_of(norm_at(match.bn, modules))
        if norm is not None and norm.then:
            found.append(match)
            continue
        add = only_user(head)
        if add is not None and is_plain_add(add):
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


class NormMatch(NamedTuple):
    """bn -> activation?, the only user of the bn. Where there is none, the norm has an activation of its own."""

    bn: fx.Node
    act: Optional[fx.Node]


def norms_in_front(graph: fx.Graph, modules: dict[str, nn.Module], found: list[Match]) -> list[NormMatch]:
    """Every activated norm that can be bypassed and is in none of the matches that were found. Where it was, one call
    may stand: what it reads and updates is read and updated when it was."""
    owned = {node for match in found for node in match.nodes}
    norms = []
    for node in graph.nodes:
        module = module_of(node, modules)
        if node in owned or not is_norm(module) or len(node.args) != 1 or node.kwargs or why_not_norm(module, None):
            continue
        act = only_user(node)
        if act is None or activation_of(act, modules) == "none":
            act = None
        then = cast(Norm, norm_of(module)).then
        if bool(then) != (act is not None):  # an activation behind those of a norm's own is another pass
            norms.append(NormMatch(node, act))
    return norms


def _heads(graph: fx.Graph, modules: dict[str, nn.Module], is_fit: Callable) -> dict[fx.Node, Match]:
    """conv -> bn? by their last node."""
    heads = {}
    for node in graph.nodes:
        conv = module_of(node, modules)
        if conv is None or why_not_fused(None, [(conv, None)]) is not None:
            continue
        if len(node.args) != 1 or node.kwargs or not is_fit(node):
            continue
        user = only_user(node)
        bn = norm_at(user, modules)
        has_bn = bn is not None and why_not_fused(None, [(conv, bn)]) is None and is_fit(user)
        heads[user if has_bn else node] = Match(node, user if has_bn else None, None, None)
    return heads


def norm_at(node: Optional[fx.Node], modules: dict[str, nn.Module]) -> Union[nn.Module, Norm, None]:
    """The norm that a node calls: a module, or F.batch_norm in eval mode with attributes; None of any other node."""
    module, operands = module_of(node, modules), norm_operands(node)
    if module is not None or not operands:
        return module if is_norm(module) else None

    def value_of(operand: Any) -> Any:
        is_node = isinstance(operand, fx.Node)
        return functools.reduce(getattr, str(operand.target).split("."), modules[""]) if is_node else operand

    return Norm(**{name: value_of(operand) for name, operand in operands.items()})


def norm_operands(node: Optional[fx.Node]) -> dict[str, Any]:
    """Norm's fields where a node is F.batch_norm in eval mode, its vectors as the nodes of attributes; else empty."""
    call = _batch_norm_call(node)
    vectors = [call.get(name) for name in Norm._fields[:4]]
    eps = call.get("eps", 1e-5)
    is_kept = all(vector is None or getattr(vector, "op", None) == "get_attr" for vector in vectors)
    is_eval = bool(call) and call.get("training", False) is False and None not in vectors[2:]
    return dict(zip(Norm._fields, (*vectors, eps))) if is_kept and is_eval and isinstance(eps, (int, float)) else {}


def _batch_norm_call(node: Optional[fx.Node]) -> dict[str, Any]:
    """The arguments of a call of F.batch_norm by name; empty of any other node."""
    return arguments_of(node) if node is not None and node.target in (F.batch_norm, torch.batch_norm) else {}


def unfolded_norms(graph: fx.Graph, modules: dict[str, nn.Module], conv: type[nn.Module]) -> list[tuple[fx.Node, str]]:
    """The convolutions, modules of this class, whose result goes into what looks like a batch norm and cannot be
    folded, and why."""
    convs = [node for node in graph.nodes if isinstance(module_of(node, modules), conv)]
    reasons = [(node, _why_not_norm(user, modules)) for node in convs for user in node.users]
    return [(node, reason) for node, reason in reasons if reason is not None]


def _why_not_norm(node: fx.Node, modules: dict[str, nn.Module]) -> Optional[str]:
    module = module_of(node, modules)
    if module is not None:
        return why_called(module) or why_not_bn(module) if may_be_norm(module) else None
    if not _batch_norm_call(node) or norm_operands(node):
        return None
    return "its batch_norm uses the batch's statistics, or vectors that are no attributes of a module"


def _before_writes(
    match: Match, order: dict[fx.Node, int], writes: list[fx.Node], memory: dict, modules: dict[str, nn.Module]
) -> Match:
    """The part of a match that no foreign in-place operation cuts.

    Everything moves to the match's last node. The reads of the input, of the residual and of a functional BN's vectors
    must not move past a write to them. A BN module updates its running statistics, so it must not move past another
    call of the same module.
    """
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
        or match.bn is not None
        and any(cut(match.bn, vector) for vector in match.bn.all_input_nodes if vector is not match.conv)
        or any(map(calls_bn, order))
    ):
        last = match._fields[max(i for i, node in enumerate(match) if node is not None)]
        match = match._replace(**{last: None})
    return match


def is_plain_add(node: fx.Node) -> bool:
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
