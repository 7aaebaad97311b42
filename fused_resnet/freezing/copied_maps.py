"""Nodes that copy maps and compute nothing, as steps of a region."""

from __future__ import annotations

import itertools
import operator
from typing import Any, Optional

import torch
from torch import fx, nn
from torch.nn import functional as F

from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.graphs.memory import writes_in_place
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.operators.describe import Facts
from fused_resnet.regions.fragment import CopyStep
from fused_resnet.regions.layout import DTYPES

PADS = (F.pad, torch._C._nn.pad)


def sources_of(node: fx.Node) -> list[fx.Node]:
    """What a node reads; twice where it reads it twice, and also of a list, as concatenations have it."""
    args = itertools.chain(*(arg if isinstance(arg, (list, tuple)) else [arg] for arg in node.args))
    return [source for source in args if isinstance(source, fx.Node)]


def copies_of(draft: Draft, node: fx.Node) -> Optional[CopyStep]:
    """What a node copies of maps, if a region can do it. Its inputs: from number 0 on.

    That is their channels side by side, pixels at a stride, zero channels around them, or each pixel several times.
    """
    facts, sources = facts_of(node), [facts_of(source) for source in sources_of(node)]
    if facts is None or len(facts.shape) != 4 or facts.dtype not in DTYPES or not sources or 0 in facts.shape:
        return None
    known = [one for one in sources if one is not None and one.dtype == facts.dtype and len(one.shape) == 4]
    if len(known) < len(sources) or node.meta.get("arrives_in") not in (None, facts.dtype):
        return None
    if node.op == "call_function" and node.target in (torch.cat, torch.concat):
        return _concatenation(node, len(sources))
    if len(sources) > 1:
        return None
    if node.op == "call_function" and node.target is operator.getitem:
        return _slice(draft, node)
    if node.op == "call_function" and node.target in PADS:
        return _zero_channels(node)
    return _upsampling(draft, node, known[0], facts)


def _concatenation(node: fx.Node, count: int) -> Optional[CopyStep]:
    asked = _asked(node, "tensors", "dim")
    is_list = isinstance(asked["tensors"], (list, tuple)) and len(asked["tensors"]) == count
    return CopyStep(tuple(range(count))) if is_list and asked.get("dim", 0) in (1, -3) and len(asked) == 2 else None


def _slice(draft: Draft, node: fx.Node) -> Optional[CopyStep]:
    """Every so many pixels from the first on. A slice is a view: a graph that writes in place may write through it."""
    index: Any = node.args[1]
    if not isinstance(index, tuple) or len(index) > 4 or not all(isinstance(one, slice) for one in index):
        return None
    if any(writes_in_place(one, draft.modules) for one in draft.graph.nodes):
        return None
    steps = [one.step or 1 for one in index if one.start in (None, 0) and one.stop is None]
    steps += [1] * (4 - len(index))
    if len(steps) < 4 or steps[:2] != [1, 1] or not all(isinstance(step, int) for step in steps):
        return None
    return CopyStep((0,), stride=(steps[2], steps[3]))


def _zero_channels(node: fx.Node) -> Optional[CopyStep]:
    asked = _asked(node, "input", "pad", "mode", "value")
    pad, is_zero = asked.get("pad"), asked.get("mode", "constant") == "constant" and asked.get("value") in (None, 0)
    if not is_zero or not isinstance(pad, (list, tuple)) or len(pad) != 6 or any(pad[:4]):
        return None
    before, after = pad[4:]
    is_around = isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0
    return CopyStep((0,), before, after) if is_around else None


def _upsampling(draft: Draft, node: fx.Node, source: Facts, facts: Facts) -> Optional[CopyStep]:
    """By the nearest pixel and powers of two: there torch's product of an index and a factor in fp32 is exact."""
    layer = draft.called_by(node)
    if node.op == "call_function" and node.target is F.interpolate:
        asked = _asked(node, "input", "size", "scale_factor", "mode")
        mode, scale = asked.get("mode", "nearest"), asked.get("scale_factor")
    elif isinstance(layer, nn.Upsample) and has_stock_call(layer) and len(node.args) == 1 and not node.kwargs:
        mode, scale = layer.mode, layer.scale_factor
    else:
        return None
    (H, W), (P, Q) = source.shape[2:], facts.shape[2:]
    h, w = factors = P // H, Q // W
    if mode != "nearest" or (P, Q) != (h * H, w * W) or any(one & (one - 1) or not one for one in factors):
        return None
    is_whole = scale is None or (tuple(scale) if isinstance(scale, (list, tuple)) else (scale, scale)) == factors
    return CopyStep((0,), factor=(h, w)) if is_whole else None


def _asked(node: fx.Node, *names: str) -> dict[str, Any]:
    return {**dict(zip(names, node.args)), **node.kwargs}
