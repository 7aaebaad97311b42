"""Random problems against the fp64 reference: what `fused-resnet verify` runs and the tests draw from."""

from fused_resnet.choosing.case import AddReluOperands, Case, bound_of
from fused_resnet.testing.compare import Outcome, check, run
from fused_resnet.testing.draw import KINDS, LAYOUTS, case_at, laid_out, random_case
from fused_resnet.testing.large import check_large, large_problems
from fused_resnet.testing.report import BackendReport, Report, known_backends, verify

__all__ = [
    "AddReluOperands", "BackendReport", "Case", "KINDS", "LAYOUTS", "Outcome", "Report", "bound_of", "case_at", "check",
    "check_large", "known_backends", "laid_out", "large_problems", "random_case", "run", "verify",
]  # fmt: skip
