"""The candidates for a convolution: every backend with each config that arithmetic leaves in the race."""

from __future__ import annotations

from typing import Any, Optional

from fused_resnet import backends, choosing, measuring
from fused_resnet.choosing import Selection
from fused_resnet.operators.problem import ConvProblem


def candidates(problem: ConvProblem) -> tuple[list[Selection], dict[str, str]]:
    """(what is worth measuring, the fixed order's choice first; why the other backends cannot run the problem).

    A config is None for a default that is the same inside plans and outside.
    """
    first = choosing.fixed_order(problem, in_plan=True).backend
    found = {Selection(first, _default(problem, first)): None}
    skipped = measuring.why_not_timed(problem)
    for name, backend in backends.known(problem.op).items():
        if name not in skipped:
            worth = backend.configs.worth(problem) if backend.configs else ()
            found.update(dict.fromkeys(Selection(backend, config) for config in (_default(problem, backend), *worth)))
    return list(found), skipped


def _default(problem: ConvProblem, backend: backends.Backend) -> Optional[Any]:
    configs = backend.configs
    return None if configs is None or configs.default is None else configs.default(problem)
