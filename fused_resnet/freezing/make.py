"""From a traced model to the plan for one input shape: a list of passes over the graph, then one run.

Every conv -> BN -> (+ residual) -> activation becomes one call of the backend chosen for that very problem. Everything
else stays the module or function it was.
"""

from __future__ import annotations

import itertools
import logging
import math
from typing import Callable, Optional

import torch
from torch import Tensor, fx

from fused_resnet.freezing import dtypes
from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.dtypes import Conversion, facts_of, first_line
from fused_resnet.freezing.lowering import (
    convert_the_rest,
    lower_convolutions,
    pack_linears,
    replace_max_pools,
    widen_what_is_wrong,
)
from fused_resnet.freezing.placing import mark_sums_in_place, place_in_row_space, reselect_stranded
from fused_resnet.freezing.plan import GraphedPlan, Plan
from fused_resnet.freezing.state import content_of_tensor
from fused_resnet.graphs.tracer import keeps_state
from fused_resnet.machine import malloc
from fused_resnet.operators.problem import dtype_name

log = logging.getLogger("fused_resnet")


PASSES: tuple[Callable[[Draft], None], ...] = (
    lower_convolutions,
    reselect_stranded,
    mark_sums_in_place,
    place_in_row_space,
    pack_linears,
    replace_max_pools,
    convert_the_rest,
    widen_what_is_wrong,
)


def make_plan(traced: fx.GraphModule, x: Tensor, conversion: Optional[Conversion], backend: str) -> Plan:
    """The plan for inputs like x: as the model computes, or with its dtypes converted."""
    module = dtypes.propagated(traced, x, conversion)
    draft = Draft(module, dict(module.named_modules()), backend, x.device, conversion)
    for lower in PASSES:
        lower(draft)
    module.delete_all_unused_submodules()
    module.recompile()
    plan = Plan(module.eval(), conversion)
    if x.device.type == "cpu":
        malloc.keep(*_workspace_of(module.graph))
    try_once(plan, x)
    if x.device.type != "cuda" or torch.version.hip:
        return plan
    try:
        return GraphedPlan(plan, x)
    except RuntimeError as error:
        log.warning("frozen without a CUDA graph: %s cannot be captured (%s)", _shown(x), error)
        return plan


def try_once(plan: Plan, x: Tensor) -> None:
    """Run a new plan once, so that what it cannot do is said where it is made, and what it would keep."""
    held = {**dict(plan.module.named_parameters()), **dict(plan.module.named_buffers())}
    before = {name: content_of_tensor(tensor) for name, tensor in held.items()}
    try:
        plan(x)
    except Exception as error:
        wanted = plan.conversion and plan.conversion.wanted
        where = f"{f' in {dtype_name(wanted)}' if wanted else ''} on an input of {_shown(x)}"
        raise ValueError(f"freeze: the model does not run{where}: {first_line(error)}") from error
    for name, tensor in held.items():
        if content_of_tensor(tensor) != before[name]:
            raise keeps_state(f"its attribute {name.removeprefix('model.')}")


def _shown(x: Tensor) -> str:
    return f"shape {tuple(x.shape)} in {dtype_name(x.dtype)}"


def _workspace_of(graph: fx.Graph) -> tuple[int, int]:
    """Bytes of the largest tensor, and of all that are alive at once, as a plan computes its nodes in order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    change = [0] * (len(order) + 1)  # bytes that come alive at each node
    largest = 0
    for node, index in order.items():
        facts = facts_of(node)
        size = 0 if facts is None else math.prod(facts.shape) * facts.dtype.itemsize
        largest = max(largest, size)
        change[index] += size
        change[1 + max((order[user] for user in node.users), default=index)] -= size
    return largest, max(itertools.accumulate(change))
