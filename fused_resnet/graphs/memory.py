"""Who owns the memory of a value in a graph, and which nodes write it."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.graphs.tracer import AUGMENTED
from fused_resnet.nn.norms import is_norm
from fused_resnet.nn.stock import has_stock_call

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
POOL_FUNCTIONS = (F.max_pool2d, F.avg_pool2d)
# Modules that return new memory, never their input or a view of it.
_FRESH = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase, *POOLS, nn.AdaptiveAvgPool2d)
_FRESH_FUNCTIONS = {
    *POOL_FUNCTIONS, F.conv2d, F.linear, F.adaptive_avg_pool2d, F.batch_norm, torch.batch_norm, torch.cat,
    "clone", torch.clone, "add", torch.add, "relu", torch.relu, "mul", "sum", "mean",
    operator.add, operator.sub, operator.mul,
}  # fmt: skip
# Functions and methods, by name, that return a tuple of views; and what puts tuples together.
_SPLITS = frozenset("chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind".split())
_JOINS = (operator.add, operator.mul)


def memory_of(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, set[fx.Node]]:
    """For each node, the nodes whose memory its result may be."""
    memory: dict[fx.Node, set[fx.Node]] = {}
    attributes: dict[Any, fx.Node] = {}
    tuples: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_tuple(node, tuples):
            tuples.add(node)
        owners = [] if node not in tuples and _is_fresh(node, modules) else node.all_input_nodes
        if node.op == "get_attr":
            owners = [attributes.setdefault(node.target, node)]
        memory[node] = {node}.union(*(memory.get(owner, set()) for owner in owners))
    return memory


def written(write: fx.Node) -> list[fx.Node]:
    """The arguments that an in-place operation may write: the first, or `out`; of an operator or a module, any."""
    if write.op == "call_module" or getattr(write.target, "_schema", None) is not None or "out" in write.kwargs:
        return write.all_input_nodes
    return write.all_input_nodes[:1]


def _is_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return (isinstance(module, _FRESH) or is_norm(module)) and has_stock_call(module)
    is_call = node.op in ("call_function", "call_method")
    return is_call and node.target in _FRESH_FUNCTIONS and not writes_in_place(node, modules)


def _is_tuple(node: fx.Node, tuples: set[fx.Node]) -> bool:
    """Whether it is a tuple that holds what it was made of: a tensor's parts, or tuples in a row."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _JOINS:
        return any(isinstance(arg, (tuple, list)) or arg in tuples for arg in node.args)
    return getattr(node.target, "__name__", node.target) in _SPLITS


def writes_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node writes into memory that it is given."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    schema = getattr(node.target, "_schema", None)  # of an operator, torch.ops.aten.relu_.default
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_inplace_name = name.endswith("_") and not name.endswith("__") or name in ("setitem", "__setitem__")
    is_augmented = getattr(node.target, "__module__", "") == "_operator" and name in AUGMENTED
    is_asked_for = "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return bool(schema is not None and schema.is_mutable) or is_inplace_name or is_augmented or is_asked_for
