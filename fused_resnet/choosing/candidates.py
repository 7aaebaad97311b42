"""The candidates for a convolution: every backend with each config that arithmetic leaves in the race."""

from __future__ import annotations

from typing import Any, Optional

from fused_resnet import backends
from fused_resnet.choosing.choice import Selection, fixed_order
from fused_resnet.operators.problem import ConvProblem, Problem


def candidates(problem: ConvProblem, most: Optional[int] = None) -> tuple[list[Selection], dict[str, str]]:
    """(what is worth measuring, the fixed order's choice first; why the other backends cannot run the problem).

    A config is None for a default that is the same inside plans and outside. most: of each backend's other configs, the
    likeliest first.
    """
    first = fixed_order(problem, in_plan=True).backend
    found = {Selection(first, default_config(problem, first)): None}
    skipped = why_not_timed(problem)
    for name, backend in backends.known(problem.op).items():
        if name not in skipped:
            worth = backend.configs.worth(problem) if backend.configs else ()
            configs = (default_config(problem, backend), *worth[:most])
            found.update(dict.fromkeys(Selection(backend, config) for config in configs))
    return list(found), skipped


def why_not_timed(problem: Problem) -> dict[str, str]:
    """The backends that cannot run a problem, or are not worth timing on it, and why."""
    skipped = {}
    for name, backend in backends.known(problem.op).items():
        reason = backend.why_not(problem)
        if reason is None and backend.origin == "interpreted":
            reason = "TRITON_INTERPRET is set, and the interpreter is not worth timing"
        if reason is not None:
            skipped[name] = reason
    return skipped


def default_config(problem: ConvProblem, backend: backends.Backend) -> Optional[Any]:
    configs = backend.configs
    return None if configs is None or configs.default is None else configs.default(problem)
