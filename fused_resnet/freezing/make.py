"""From a traced model to the plan for one input shape: a list of passes over the graph.

Every conv -> BN -> (+ residual) -> activation becomes one call of the backend chosen for that very problem. The first
passes decide about these calls, then their modules are made. Everything else stays the module or function it was.
"""

from __future__ import annotations

from typing import Callable, Optional

from torch import Tensor, fx

from fused_resnet.freezing import dtypes
from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.dtypes import Conversion
from fused_resnet.freezing.lowering import (
    convert_the_rest,
    lower_convolutions,
    make_convolutions,
    pack_linears,
    replace_max_pools,
    widen_what_is_wrong,
)
from fused_resnet.freezing.placing import mark_sums_in_place, place_in_row_space, reselect_stranded
from fused_resnet.freezing.plan import Plan

PASSES: tuple[Callable[[Draft], None], ...] = (
    lower_convolutions,
    reselect_stranded,
    mark_sums_in_place,
    place_in_row_space,
    make_convolutions,
    pack_linears,
    replace_max_pools,
    convert_the_rest,
    widen_what_is_wrong,
)


def make_plan(traced: fx.GraphModule, x: Tensor, conversion: Optional[Conversion], backend: str) -> Plan:
    """The plan for inputs like x: as the model computes, or with its dtypes converted."""
    module = dtypes.propagated(traced, x, conversion)
    draft = Draft(module, dict(module.named_modules()), {}, backend, x.device, conversion)
    for run in PASSES:
        run(draft)
    module.delete_all_unused_submodules()
    module.recompile()
    return Plan(module.eval(), conversion)
