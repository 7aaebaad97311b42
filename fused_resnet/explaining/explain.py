"""explain: who runs each convolution of a model, why nobody else, and how far its memory traffic is from the least.

A plain or fused model is run on fake tensors, which have shapes and no values, and the calls that pass by are noted.
A frozen one shows its plan.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet import backends, choosing
from fused_resnet.choosing import choice, winners
from fused_resnet.explaining import calls
from fused_resnet.explaining.table import Explanation, RegionRow, Row
from fused_resnet.freezing.copies import copy_with_parameters, unwrapped
from fused_resnet.freezing.frozen import FrozenModel, FrozenParts
from fused_resnet.fusing import convert
from fused_resnet.measuring import rooflines
from fused_resnet.operators.problem import ConvProblem


def explain(
    model: nn.Module, example_input: Any, *, measure: bool = False, roofline: Optional[rooflines.Roofline] = None
) -> Explanation:
    """A row for every convolution that `model(example_input)` calls. The model is not changed.

    model: plain, which shows what `fused_resnet.fuse` would make of it; fused, as it is; or frozen, as planned for
    this input. In training mode too. example_input: what the model takes, as a rule a tensor; only its shape, dtype
    and device matter. Where fake tensors cannot follow the model (its control flow reads values), it is run once.

    measure: also time every convolution, over a few runs of the model; wall time, on CUDA with the launch.
    roofline: what the device reaches; default, measured now (`timing.roofline`, some seconds, once per dtype).

    Raises TypeError for what is no model or lies on another device, ValueError when the model cannot take the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: expected an nn.Module, got {type(model).__name__}.")
    model = unwrapped(model)
    device = _device_of(model, example_input)
    if isinstance(model, (FrozenModel, FrozenParts)):
        form, name = "frozen", type(model.unfreeze()).__name__
        found, left_alone, regions = calls.planned(model, example_input, measure)
    else:
        regions = []
        form = "fused" if convert.fused_convs(model) else "plain"
        name = getattr(model, "plain_class", type(model)).__name__
        model = copy_with_parameters(model)
        if form == "plain":
            convert.fuse(model)
        left_alone = convert.left_alone(model)
        found = calls.recorded(model, example_input, left_alone, device, measure)
    dtypes = dict.fromkeys(call.problem.dtype for call in found)
    roofs = {dtype: roofline or rooflines.roofline(str(device), dtype) for dtype in dtypes}
    rows = tuple(_judged(call, roofs[call.problem.dtype]) for call in found)
    within = tuple(_region(call, roofs[call.region.fragment.dtype]) for call in regions)
    return Explanation(name, form, calls.shown(example_input), rows, tuple(left_alone), roofs, within)


def _device_of(model: nn.Module, example: Any) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(f"explain: example_input must hold a tensor, got {type(example).__name__}.")
    device = next((p.device for p in model.parameters()), getattr(model, "device", tensors[0].device))
    for tensor in tensors:
        if tensor.device != device:
            raise TypeError(f"explain: example_input is on {tensor.device} but the model is on {device}.")
    return device


def _region(call: calls.RegionCall, roofline: rooflines.Roofline) -> RegionRow:
    r = call.region
    return RegionRow(
        call.name, len(r.convolutions), sum(conv.by_winograd for conv in r.convolutions), r.micro_kernel, r.why,
        r.fragment.bytes_at_seams, r.workspace_bytes, r.bytes_moved, r.flops,
        roofline.least_us(r.bytes_moved, r.flops), call.time_us, *r.fragment.gate_bytes,
    )  # fmt: skip


def _judged(call: calls.Call, roofline: rooflines.Roofline) -> Row:
    problem, selection, source = call.problem, call.selection, call.source
    if selection is None and call.backend is not None:
        try:
            selection = choosing.select(problem, call.backend)
        except backends.BackendError:
            reason = backends.known(problem.op)[call.backend].why_not(problem)
            source = f"{call.backend} was asked for by name and cannot run this: {reason}"
    chosen = None if selection is None else selection.backend.name
    others = {
        other.name: other.why_not(problem) or _why_not_chosen(problem, other, selection, call.backend)
        for other in backends.known(problem.op).values()
        if other.name != chosen and problem.dtype != torch.int8  # which no other has
    }
    config = getattr(selection, "config", None)
    return Row(
        call.name, problem, chosen, source if selection is None else selection.source,
        None if config is None else config._asdict(), others, roofline.time_us(problem), call.time_us,
        winners.measurement_of(problem), call.region, call.scales, call.not_int8, call.effect,
    )  # fmt: skip


def _why_not_chosen(
    problem: ConvProblem, other: backends.Backend, selection: Optional[choosing.Selection], asked: Optional[str]
) -> str:
    """Why a backend that could run this does not."""
    measured = winners.measurement_of(problem)
    if selection is not None and measured is not None:
        if other.name in measured.times_us:
            return f"it was slower when both were measured ({measured.when[:10]}), or no faster than what rules take"
        if wrong := [why for name, why in measured.wrong.items() if name.partition(" ")[0] == other.name]:
            return f"it is wrong here: {wrong[0]}"
    if selection is None:
        cause = "the convolution is not fused" if asked is None else f"{asked} was asked for by name"
        return f"it could run this, but {cause}"
    if asked == "auto" and selection.source.startswith(choice.FIXED_ORDER) and problem.device not in other.auto.devices:
        return f"it could run this, but on {problem.device} auto takes it only where it was measured to be faster"
    return f"it could run this, but {selection.backend.name} was chosen: {selection.source}"
