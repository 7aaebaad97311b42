"""The passes that replace nodes of a graph by frozen modules: BN folded, weights packed."""

from __future__ import annotations

import math
from typing import Any, Optional, Union

import torch
from torch import Tensor, fx, nn

from fused_resnet import backends
from fused_resnet.freezing import dtypes
from fused_resnet.freezing.dtypes import Conversion, facts_of
from fused_resnet.freezing.modules import LOWERED, FrozenConv, FrozenLinear, FrozenMaxPool, WideConv
from fused_resnet.graphs.matching import Match, activation_of, matches, norm_at
from fused_resnet.graphs.nodes import module_of
from fused_resnet.graphs.spelling import CONVOLUTIONS, add_child, arguments_of
from fused_resnet.nn.bypass import Norm, has_stock_call, norm_of
from fused_resnet.operators import affine, library_faults
from fused_resnet.operators.describe import conv_problem, pair
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import FLOAT_DTYPES, dtype_name


def matched(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Match]:
    return matches(
        graph,
        modules,
        is_fit=lambda node: len(getattr(facts_of(node), "shape", ())) == 4 and _keeps_dtype(node),
        is_alike=lambda other, head: facts_of(other) == facts_of(head),
    )


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether it returns the dtype that it was given, and that is one which plans know."""
    source, result = facts_of(node.all_input_nodes[0]), facts_of(node)
    return bool(source and result and source.dtype == result.dtype in FLOAT_DTYPES)


def lower_convolution(module: fx.GraphModule, modules: dict, match: Match, backend: str) -> None:
    """Replace a match by one FrozenConv, placed where its last node was, and what its norm calls after that."""
    conv: nn.Conv2d = modules[match.conv.target]
    norm = norm_of(norm_at(match.bn, modules))
    activation, then = ("none", ()) if norm is None else norm.activation
    source, residual, tail = match.conv.all_input_nodes[0], match.residual, match.nodes[-1]
    facts = source.meta["facts"]
    weight, bias = fold(conv, norm, facts.dtype)
    described = ConvOperands(
        torch.empty(facts.shape, dtype=facts.dtype, device="meta"),
        weight.to("meta"),
        bias=None if bias is None else bias.to("meta"),
        residual=None if residual is None else torch.empty(tail.meta["facts"].shape, dtype=facts.dtype, device="meta"),
    )
    if match.act is not None:
        activation = activation_of(match.act, modules)
    window = (pair("stride", conv.stride), pair("padding", conv.padding), pair("dilation", conv.dilation))
    problem = conv_problem(described, *window, conv.groups, activation)
    problem = problem._replace(device=weight.device.type)
    frozen = FrozenConv(problem, backends.select(problem, backend, in_plan=True), weight, bias)
    name = add_child(module, modules, f"fused_{match.conv.name}", frozen)
    with module.graph.inserting_before(tail):
        fused = module.graph.call_module(name, (source,) if residual is None else (source, residual))
        fused.meta = dict(tail.meta)
        for called in then:
            name = add_child(module, modules, f"{match.conv.name}_{type(called).__name__.lower()}", called)
            fused = module.graph.call_module(name, (fused,))
            fused.meta = dict(tail.meta)
    tail.replace_all_uses_with(fused)
    vectors = [node for node in match.bn.all_input_nodes if node.op == "get_attr"] if match.bn else []
    for node in (*reversed(match.nodes), *vectors):
        if not node.users:
            module.graph.erase_node(node)


def pack_linears(module: fx.GraphModule, modules: dict) -> None:
    for node in module.graph.nodes:
        linear, facts = module_of(node, modules), facts_of(node.args[0]) if node.args else None
        if type(linear) is not nn.Linear or not has_stock_call(linear) or node.kwargs or facts is None:
            continue
        if len(facts.shape) != 2 or not facts.shape[0] or type(linear.weight) is not nn.Parameter:
            continue
        if _keeps_dtype(node) and backends.onednn_missing(facts.dtype) is None:
            packed = FrozenLinear(linear, facts.dtype, facts.shape[0])
            node.target = add_child(module, modules, f"packed_{node.name}", packed)


def replace_max_pools(module: fx.GraphModule, modules: dict) -> None:
    for node in module.graph.nodes:
        pool, facts = module_of(node, modules), facts_of(node)
        if type(pool) is not nn.MaxPool2d or not has_stock_call(pool) or node.kwargs or facts is None:
            continue
        is_plain = pair("pooling", pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices
        if is_plain and len(facts.shape) == 4 and facts.dtype in FLOAT_DTYPES:
            node.target = add_child(module, modules, f"frozen_{node.name}", FrozenMaxPool(pool, facts.shape))


def widen_what_is_wrong(module: fx.GraphModule, modules: dict) -> None:
    """Have convolutions that were not lowered computed in fp32 where torch's own would be wrong."""
    for node in module.graph.nodes:
        facts, conv = facts_of(node), module_of(node, modules)
        if isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            weight: Optional[tuple] = tuple(conv.weight.shape)
            stride, dilation = conv.stride, conv.dilation
        elif node.op == "call_function" and node.target in CONVOLUTIONS:
            asked = arguments_of(node)
            weight = getattr(facts_of(asked["weight"]), "shape", None)
            dims = len(weight or ()) - 2
            if asked.get("transposed"):
                continue
            stride, dilation = (_spread(asked.get(name, 1), dims) for name in ("stride", "dilation"))
        else:
            continue
        if facts and weight and library_faults.may_be_wrong(facts.dtype, weight, facts.shape, stride, dilation):
            wide = WideConv(conv or node.target)
            node.op, node.target = "call_module", add_child(module, modules, f"wide_{node.name}", wide)


def _spread(value: Any, dims: int) -> tuple:
    """A step for each dimension. What is computed may be any, so it counts as the longest."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = tuple(math.inf if isinstance(step, fx.Node) else step for step in values)
    return values if len(values) == dims else values * dims


def convert_the_rest(module: fx.GraphModule, modules: dict, conversion: Conversion) -> None:
    """Give converted copies to the modules that were not lowered: one for each dtype that a module computes in."""
    names: dict[tuple[Any, torch.dtype], str] = {}
    for node in module.graph.nodes:
        child, dtype = module_of(node, modules), node.meta.get("arrives_in")
        if child is None or dtype is None or isinstance(child, LOWERED):
            continue
        key = (node.target, dtype)
        if key not in names:
            copied = dtypes.converted(child, conversion.main, dtype)
            names[key] = add_child(module, modules, f"{node.name}_{dtype_name(dtype)}", copied)
        node.target = names[key]


def fold(conv: nn.Conv2d, bn: Union[nn.Module, Norm, None], dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
    """(weight * scale, shift) of conv -> BN in eval mode, computed in fp64; the weight in channels_last."""
    operands, norm = ConvOperands(conv.weight, conv.weight, bias=conv.bias), norm_of(bn)
    if norm is not None:
        operands = ConvOperands(conv.weight, conv.weight, *norm[:5], bias=conv.bias)
    weight, shift = affine.fold(operands, dtype)
    return weight, None if conv.bias is None and norm is None else shift
