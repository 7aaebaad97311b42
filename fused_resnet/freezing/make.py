"""From a traced model to the plan for one input shape: a list of passes over the graph.

Every conv -> BN -> (+ residual) -> activation becomes one call of the backend chosen for that very problem. The first
passes decide about these calls, then their modules are made. Everything else stays the module or function it was.
"""

from __future__ import annotations

from typing import Callable, Mapping, Optional

import torch
from torch import Tensor, fx, nn

from fused_resnet.choosing import Selection, winners
from fused_resnet.choosing.decide import NOTHING, Tuning
from fused_resnet.freezing import dtypes
from fused_resnet.freezing.biases import move_biases
from fused_resnet.freezing.draft import Draft, Quantization
from fused_resnet.freezing.dtypes import Conversion
from fused_resnet.freezing.fragments import form_clear_regions, form_regions
from fused_resnet.freezing.gates import join_gates
from fused_resnet.freezing.linears import lower_linears
from fused_resnet.freezing.lowering import (
    convert_the_rest,
    lower_convolutions,
    lower_norms,
    make_convolutions,
    pack_linears,
    widen_what_is_wrong,
)
from fused_resnet.freezing.modules import PackedWeights
from fused_resnet.freezing.placing import choose_measured, mark_sums_in_place, place_in_row_space, reselect_stranded
from fused_resnet.freezing.plan import Plan, plainly
from fused_resnet.freezing.pooling import pool_after_convolutions, replace_max_pools
from fused_resnet.freezing.quantized import form_quantized, observed
from fused_resnet.freezing.trace import trace
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.quantizing.calibrate import Subject

SETTLE_PROBLEMS: tuple[Callable[[Draft], None], ...] = (
    lower_convolutions,
    join_gates,
    form_quantized,
    move_biases,
)
PASSES: tuple[Callable[[Draft], None], ...] = (
    *SETTLE_PROBLEMS,
    form_clear_regions,
    choose_measured,
    reselect_stranded,
    mark_sums_in_place,
    place_in_row_space,
    pool_after_convolutions,
    form_regions,
    make_convolutions,
    pack_linears,
    replace_max_pools,
    lower_norms,
    convert_the_rest,
    widen_what_is_wrong,
)


def make_plan(
    graph: fx.GraphModule,
    x: Tensor,
    conversion: Optional[Conversion],
    backend: str,
    packed: PackedWeights,
    tuning: Tuning = NOTHING,
    overrides: Mapping[ConvProblem, Selection] = {},
    quantization: Optional[Quantization] = None,
) -> Plan:
    """The plan for inputs like x: as the model computes, or with its dtypes converted. packed: of its other plans.

    graph: what `propagated` returned for x; it becomes the plan's. tuning: what may be measured for it. overrides,
    quantization: as `Draft` says.
    """
    draft = _draft_of(graph, conversion, backend, x.device, packed)
    draft = draft._replace(tuning=tuning, overrides=overrides, quantization=quantization)
    for run in PASSES:
        run(draft)
    draft.module.delete_all_unused_submodules()
    draft.module.recompile()
    return Plan(draft.module.eval(), conversion)


def planned_problems(model: nn.Module, x: Tensor, dtype: torch.dtype, device: torch.device) -> list[ConvProblem]:
    """The convolutions of the plan for inputs like x in this dtype on this device, which need not be here, in order.

    What was measured is left out: the problems do not depend on who wins them.
    """
    with plainly(x.device), winners.ignored():
        traced = trace(model)
        to = dtypes.conversion(traced, x, dtypes.main_dtype(model, x.dtype), dtype)
        draft = _draft_of(dtypes.propagated(traced, x, to), to, "auto", device, PackedWeights())
        for settle in SETTLE_PROBLEMS:
            settle(draft)
    return [draft.convs[node].problem for node in draft.graph.nodes if node in draft.convs]


def calibration_subject(traced: fx.GraphModule, x: Tensor, main: torch.dtype) -> Subject:
    """The traced model as it computes, for inputs like x, to be calibrated."""
    to = dtypes.conversion(traced, x, main, None)
    draft = _draft_of(dtypes.propagated(traced, x, to), to, "eager", x.device, PackedWeights())
    lower_convolutions(draft)
    join_gates(draft)
    lower_linears(draft, is_of_one_size=False)
    return observed(draft, x.dtype if to is None else to.input)


def _draft_of(
    graph: fx.GraphModule,
    conversion: Optional[Conversion],
    backend: str,
    device: torch.device,
    packed: PackedWeights,
) -> Draft:
    return Draft(graph, dict(graph.named_modules()), {}, {}, {}, backend, device, conversion, packed)
