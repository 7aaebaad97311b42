"""A traced graph whose reading and writing of memory is what the model's was.

A view that becomes a copy is not written through. What the model writes into its input, the graph writes into a copy.
What it returns is new memory.
"""

from __future__ import annotations

import collections
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.freezing.copies import copy_tensors
from fused_resnet.graphs.memory import memory_of, writes_in_place, written
from fused_resnet.graphs.nodes import module_of
from fused_resnet.graphs.tracer import Unfaithful

# A view of contiguous memory, a copy of channels_last memory; or the other way round.
_LAYOUT_DECIDES = {"view", "reshape", "flatten", "ravel", "contiguous", torch.reshape, torch.flatten, torch.ravel}


def renew_made_tensors(root: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Give each call tensors of its own where the forward makes some and may write to them: a graph has them once.

    Raises Unfaithful where such a tensor is a view of another one.
    """
    memory = memory_of(graph, modules)
    writes = [node for node in graph.nodes if writes_in_place(node, modules)]
    touched = {owner for write in writes for node in written(write) for owner in memory[node]}
    got = {str(node.target) for node in touched if node.op == "get_attr"}
    made = {name for name in got if name.startswith("_tensor_constant")}
    if not made:
        return
    held = {id(t): t for module in root.modules() for t in pytree.tree_leaves(vars(module)) if isinstance(t, Tensor)}
    places = collections.Counter(_storage_of(tensor) for tensor in held.values())
    renewed: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in made:
            continue
        if places[_storage_of(getattr(root, str(node.target)))] > 1:
            raise Unfaithful(
                "freeze: the forward writes into a view of a tensor that is not computed from its input, which a plan "
                "would not see. Write into the tensor itself (t[i] = value), or use fused_resnet.fuse."
            )
        if node.target not in renewed:
            with graph.inserting_after(node):
                renewed[node.target] = graph.call_function(copy_tensors, (node,))
        own = renewed[node.target]
        node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def let_views_copy(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """`view` as `reshape`, because a plan's activations are channels_last, which few views survive.

    Not where the model writes memory on one side of the view and reads it on the other: there a view stays a view.
    Raises ValueError there for the others, of which the layout decides whether they copy.
    """
    memory, order = memory_of(graph, modules), {node: index for index, node in enumerate(graph.nodes)}
    writes = [node for node in graph.nodes if writes_in_place(node, modules)]
    for view in graph.nodes:
        if view.op == "call_function" and view.target is torch.as_strided or view.target == "as_strided":
            raise ValueError(f"freeze: {view} reads memory by strides, and a plan has other strides than the model.")
        is_module = isinstance(module_of(view, modules), nn.Flatten)
        if not (is_module or view.op in ("call_function", "call_method") and view.target in _LAYOUT_DECIDES):
            continue
        if view.target == "view" and isinstance(view.args[-1], torch.dtype):
            continue
        lost = _lost_write(view, writes, list(graph.nodes), memory, order)
        if lost is not None and view.target != "view":
            raise ValueError(
                f"freeze: {lost[0]} writes memory that {lost[1]} reads through {view}: whether it sees the write "
                f"depends on the memory layout, which a plan changes. Copy first (clone())."
            )
        if lost is None and view.target == "view":
            view.target = "reshape"


def _lost_write(
    view: fx.Node, writes: list[fx.Node], nodes: list[fx.Node], memory: dict[fx.Node, set[fx.Node]], order: dict
) -> Optional[tuple[fx.Node, fx.Node]]:
    """A write on one side of the view and a later reader on the other, if there are any."""
    base = memory[view] - {view}
    for write in writes:
        touched = set().union(*(memory[node] for node in written(write)))
        if order[write] < order[view] or not touched & memory[view]:
            continue
        through_view = view in touched
        for reader in nodes[order[write] + 1 :]:
            if any((view in memory[n]) != through_view and memory[n] & base for n in reader.all_input_nodes):
                return write, reader
    return None


def leave_input_alone(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Work on a copy of the input where the model writes it. Whether it does."""
    memory, placeholder = memory_of(graph, modules), next(iter(graph.nodes))
    writes = [node for node in graph.nodes if writes_in_place(node, modules)]
    if any(placeholder in memory[node] for write in writes for node in written(write)):
        with graph.inserting_after(placeholder):
            own = graph.call_function(copy_tensors, (placeholder,))
        placeholder.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
        return True
    return False


def return_new_memory(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Copy outputs that may be the input or a buffer: what a plan returns belongs to the caller."""
    memory, (output,) = memory_of(graph, modules), [node for node in graph.nodes if node.op == "output"]
    for node in output.all_input_nodes:
        if any(owner.op in ("placeholder", "get_attr") for owner in memory[node]):
            with graph.inserting_before(output):
                output.replace_input_with(node, graph.call_function(copy_tensors, (node,)))
