"""What is measured: operators, blocks and models, each as variants that compute the same thing.

Every variant is checked against fp64 first; then all of them are timed in turn in one process (`timing`).
"""

from fused_resnet.choosing.candidates import why_not_timed
from fused_resnet.choosing.cases import (
    Prepared,
    compared_case,
    error_ratio,
    folded_operands,
    random_operands,
)
from fused_resnet.choosing.planned import planned_call
from fused_resnet.choosing.timing import Stats, interleaved
from fused_resnet.measuring.networks import NetworkSubject, blocks_of, calibrated, max_error
from fused_resnet.measuring.operators import (
    CountedProblem,
    OperatorSubject,
    add_relu_variants,
    convs_of,
    mismatches,
    op_subjects,
    op_variants,
)
from fused_resnet.measuring.record import CannotGoOn, Record, measure
from fused_resnet.measuring.rivals import compiled
from fused_resnet.measuring.rooflines import Roofline, roofline
from fused_resnet.measuring.summary import (
    AUTO,
    COMPETITORS,
    COPY,
    FOLDED,
    LOSS_BELOW,
    OURS,
    THEIRS,
    UNFUSED,
    Row,
    chosen_by_auto,
    compared,
    is_ours,
    rival_of,
    summarise,
    summarise_networks,
    summarise_ops,
    summarise_rows,
    summarise_tuning,
    with_auto,
)
from fused_resnet.measuring.training import Saved, TrainingSubject, saved_bytes
from fused_resnet.measuring.turns import Measured, Run, Subject, in_turn, part_of
from fused_resnet.measuring.variants import (
    BASELINES,
    DEFAULT_BASELINES,
    UNTUNED,
    WITHOUT_REGIONS,
    as_before_regions,
    build_variants,
    variant_builders,
)

__all__ = [
    "AUTO", "BASELINES", "COMPETITORS", "COPY", "DEFAULT_BASELINES", "FOLDED", "LOSS_BELOW", "OURS", "THEIRS",
    "UNFUSED", "UNTUNED", "WITHOUT_REGIONS", "CannotGoOn", "CountedProblem", "Measured", "NetworkSubject",
    "OperatorSubject", "Prepared", "Record", "Roofline", "Row", "Run", "Saved", "Stats", "Subject", "TrainingSubject",
    "add_relu_variants", "as_before_regions", "blocks_of", "build_variants", "calibrated", "chosen_by_auto", "compared",
    "compared_case", "compiled", "convs_of", "error_ratio", "folded_operands", "in_turn", "interleaved", "is_ours",
    "max_error", "measure", "mismatches", "op_subjects", "op_variants", "part_of", "planned_call", "random_operands",
    "rival_of", "roofline", "saved_bytes", "summarise", "summarise_networks", "summarise_ops", "summarise_rows",
    "summarise_tuning", "variant_builders", "why_not_timed", "with_auto",
]  # fmt: skip
