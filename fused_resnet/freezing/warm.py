"""A new plan's first run, which says what it cannot do; the memory that it works in; and its capture on a GPU."""

from __future__ import annotations

import itertools
import logging
import math

import torch
from torch import Tensor, fx

from fused_resnet import choosing
from fused_resnet.choosing.case import synchronize
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.freezing.plan import GraphedPlan, Plan, Turns
from fused_resnet.freezing.state import content_of_tensor, keeps_state
from fused_resnet.machine import malloc
from fused_resnet.machine.cuda_graphs import capturing
from fused_resnet.machine.errors import first_line, is_out_of_memory, one_line
from fused_resnet.operators import layout
from fused_resnet.operators.problem import ConvProblem, dtype_name

log = logging.getLogger("fused_resnet")


def warmed(plan: Plan, x: Tensor, turns: Turns) -> Plan:
    """The plan, run once on x, with malloc told what it needs; on CUDA, captured as a graph if it can be.

    turns: of the graphs of the model's other plans.
    """
    if x.device.type == "cpu":
        malloc.trim()  # measuring and packing took more than the plan works in
        malloc.keep(*_workspace_of(plan.module.graph))
    if not _has_graphs(x.device):
        _try_once(plan, x)
        return plan
    with capturing():  # from the first run on, which is when cuDNN takes its algorithms
        _try_once(plan, x)
        try:
            return GraphedPlan(plan, x, turns)
        except RuntimeError as error:
            log.warning("frozen without a CUDA graph: %s cannot be captured (%s)", _shown(x), error)
            return plan


def refused(plan: Plan) -> dict[ConvProblem, tuple[choosing.Selection, str]]:
    """The convolutions of a plan that does not run which their backend refuses, each run alone, and what it says."""
    found = {}
    for module in plan.module.modules():
        if not isinstance(module, FrozenConv) or module.placed is not None:
            continue
        p, device = module.problem, module.weight.device
        x = torch.zeros(p.N, p.C, p.H, p.W, dtype=p.dtype, device=device)
        residual = torch.zeros(p.output_shape, dtype=p.dtype, device=device) if p.has_residual else None
        try:
            module(layout.channels_last(x), None if residual is None else layout.channels_last(residual))
            synchronize(device)
        except Exception as error:  # whatever a library raises
            if not is_out_of_memory(error):
                found[p] = module.selection, one_line(error)
    return found


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _try_once(plan: Plan, x: Tensor) -> None:
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
