"""The passes that find what a plan computes its own way, and that make the modules for it."""

from __future__ import annotations

import functools
import math
from typing import Any, Optional, Union, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet import backends, choosing
from fused_resnet.backends.bn_act import BN_ACT, BnAct
from fused_resnet.freezing import dtypes
from fused_resnet.freezing.draft import Decision, Draft, lowered
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.freezing.given_scales import rounded_weight
from fused_resnet.freezing.modules import LOWERED, FrozenConv, FrozenLinear, FrozenNorm, WideConv
from fused_resnet.graphs.matching import Match, activation_of, matches, norm_at, norms_in_front
from fused_resnet.graphs.spelling import CONVOLUTIONS, arguments_of
from fused_resnet.nn.norms import Norm, norm_of
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.operators import affine, detours
from fused_resnet.operators.describe import conv_problem, pair
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import FLOAT_DTYPES, BnActProblem, dtype_name


def lower_convolutions(draft: Draft) -> None:
    """One node for every conv -> BN -> (+ residual) -> activation, BN folded, and who computes it."""
    found = matches(
        draft.graph,
        draft.modules,
        is_fit=lambda node: len(getattr(facts_of(node), "shape", ())) == 4 and _keeps_dtype(node),
        is_alike=lambda other, head: facts_of(other) == facts_of(head),
    )
    for match in found:
        _lower(draft, match)


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether it returns the dtype that it was given, and that is one which plans know."""
    source, result = facts_of(node.all_input_nodes[0]), facts_of(node)
    return bool(source and result and source.dtype == result.dtype in FLOAT_DTYPES)


def _lower(draft: Draft, match: Match) -> None:
    """Replace a match by one node where its last node was, and by what its norm calls after that."""
    conv = cast(nn.Conv2d, draft.modules[match.conv.target])
    norm = norm_of(norm_at(match.bn, draft.modules))
    activation, then = ("none", ()) if norm is None else norm.activation
    source, residual, tail = match.conv.all_input_nodes[0], match.residual, match.nodes[-1]
    facts = source.meta["facts"]
    weight, bias = folded_weights(conv, norm, facts.dtype)
    described = ConvOperands(
        torch.empty(facts.shape, dtype=facts.dtype, device="meta"),
        weight.to("meta"),
        bias=None if bias is None else bias.to("meta"),
        residual=None if residual is None else torch.empty(tail.meta["facts"].shape, dtype=facts.dtype, device="meta"),
    )
    if match.act is not None:
        activation = activation_of(match.act, draft.modules)
    window = (pair("stride", conv.stride), pair("padding", conv.padding), pair("dilation", conv.dilation))
    problem = conv_problem(described, *window, conv.groups, activation)
    problem = problem._replace(device=draft.device.type)
    inputs = (source,) if residual is None else (source, residual)
    with draft.graph.inserting_before(tail):
        fused = draft.graph.create_node("call_function", lowered, inputs, name=f"fused_{match.conv.name}")
        fused.meta = dict(tail.meta)
        selection = choosing.select(problem, draft.backend, in_plan=True)
        draft.convs[fused] = Decision(problem, selection, weight, bias)
        draft.folds[fused] = functools.partial(folded_weights, conv, norm)
        if (how := rounded_weight(conv)) is not None:
            scale = affine.scale_and_shift(_operands(conv, norm), torch.float64)[0]
            draft.rounded[fused] = how._replace(scales=how.scales * scale)
        for called in then:
            name = draft.add(f"{match.conv.name}_{type(called).__name__.lower()}", called)
            fused = draft.graph.call_module(name, (fused,))
            fused.meta = dict(tail.meta)
    tail.replace_all_uses_with(fused)
    vectors = [node for node in match.bn.all_input_nodes if node.op == "get_attr"] if match.bn else []
    for node in (*reversed(match.nodes), *vectors):
        if not node.users:
            draft.graph.erase_node(node)


def make_convolutions(draft: Draft) -> None:
    """The modules of the lowered convolutions: from here on nothing is decided about them."""
    for node in list(draft.convs):
        frozen = FrozenConv(*draft.convs.pop(node))  # so that a weight goes once it is packed
        frozen.weight = draft.packed.shared(node.name, frozen.backend.name, frozen.weight)
        node.op, node.target = "call_module", draft.add(node.name, frozen)


def lower_norms(draft: Draft) -> None:
    """One node for every norm with an activation that stands in front of convolutions, where a kernel of ours runs."""
    asked = backends.known("conv_bn_act").get(draft.backend)
    if asked is not None and asked.origin == "torch":
        return
    for match in norms_in_front(draft.graph, draft.modules, []):
        norm, facts = cast(Norm, norm_of(draft.called_by(match.bn))), facts_of(match.bn)
        activation, then = norm.activation
        if match.act is not None:
            activation = activation_of(match.act, draft.modules)
        if then or facts is None or len(facts.shape) != 4 or not _keeps_dtype(match.bn) or norm.promotes:
            continue
        problem = BnActProblem(*facts.shape, activation, False, False, True, facts.dtype, draft.device.type)
        chosen = [one for one in BN_ACT if one.why_not(problem) is None and draft.device.type in one.auto.devices]
        if chosen[0].origin == "torch":
            continue
        with draft.graph.inserting_before(match.bn):
            frozen = FrozenNorm(norm, activation, cast(BnAct, chosen[0].run).again)
            name = draft.add(f"frozen_{match.bn.name}", frozen)
            node = draft.graph.call_module(name, match.bn.args)
            node.meta = dict(match.bn.meta)
        for old in (match.act, match.bn):
            if old is not None:
                old.replace_all_uses_with(node)
                draft.graph.erase_node(old)


def pack_linears(draft: Draft) -> None:
    """On a CPU, where the backend asked for packs linear layers too."""
    asked = backends.known("conv_bn_act").get(draft.backend)
    if draft.device.type != "cpu" or asked is not None and not asked.plan.linears:
        return
    for node in draft.graph.nodes:
        linear, facts = draft.called_by(node), facts_of(node.args[0]) if node.args else None
        if type(linear) is not nn.Linear or not has_stock_call(linear) or node.kwargs or facts is None:
            continue
        if len(facts.shape) != 2 or not facts.shape[0] or type(linear.weight) is not nn.Parameter:
            continue
        if _keeps_dtype(node) and backends.onednn_missing(facts.dtype) is None:
            packed = FrozenLinear(linear, facts.dtype, facts.shape[0])
            packed.weight = draft.packed.shared(node.name, "linear", packed.weight)
            node.target = draft.add(f"packed_{node.name}", packed)


def widen_what_is_wrong(draft: Draft) -> None:
    """On a CPU, have convolutions that were not lowered computed in fp32 where torch's own would be wrong."""
    if draft.device.type != "cpu":
        return
    for node in draft.graph.nodes:
        facts, conv = facts_of(node), draft.called_by(node)
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
        if facts and weight and detours.may_be_wrong(facts.dtype, weight, facts.shape, stride, dilation):
            wide = WideConv(conv or node.target)
            node.op, node.target = "call_module", draft.add(f"wide_{node.name}", wide)


def _spread(value: Any, dims: int) -> tuple:
    """A step for each dimension. What is computed may be any, so it counts as the longest."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = tuple(math.inf if isinstance(step, fx.Node) else step for step in values)
    return values if len(values) == dims else values * dims


def convert_the_rest(draft: Draft) -> None:
    """Give converted copies to the modules that were not lowered: one for each dtype that a module computes in."""
    if draft.conversion is None or draft.conversion.wanted is None:
        return
    names: dict[tuple[Any, torch.dtype], str] = {}
    for node in draft.graph.nodes:
        child, dtype = draft.called_by(node), node.meta.get("arrives_in")
        if child is None or dtype is None or isinstance(child, LOWERED):
            continue
        key = (node.target, dtype)
        if key not in names:
            copied = dtypes.converted(child, draft.conversion.main, dtype)
            names[key] = draft.add(f"{node.name}_{dtype_name(dtype)}", copied)
        node.target = names[key]


def folded_weights(
    conv: nn.Conv2d, bn: Union[nn.Module, Norm, None], dtype: torch.dtype
) -> tuple[Tensor, Optional[Tensor]]:
    """(weight * scale, shift) of conv -> BN in eval mode, computed in fp64; the weight in channels_last."""
    norm = norm_of(bn)
    weight, shift = affine.fold(_operands(conv, norm), dtype)
    return weight, None if conv.bias is None and norm is None else shift


def _operands(conv: nn.Conv2d, norm: Optional[Norm]) -> ConvOperands:
    operands = ConvOperands(conv.weight, conv.weight, bias=conv.bias)
    return operands if norm is None else ConvOperands(conv.weight, conv.weight, *norm[:5], bias=conv.bias)
