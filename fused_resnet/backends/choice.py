"""Which backend computes a problem: the one asked for, the measured winner, or the first in a fixed order."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

from torch import Tensor

from fused_resnet.backends import record, winners
from fused_resnet.backends.record import Backend, BackendError
from fused_resnet.operators.problem import Problem

FIXED_ORDER = "the fixed order of backends"
BY_NAME = "asked for by name"


class Selection(NamedTuple):
    """The backend for a problem, its config (None: its own default), and why these: part of a sentence."""

    backend: Backend
    config: Optional[Any] = None
    source: str = FIXED_ORDER

    def run(self, problem: Problem, *operands: Any) -> Tensor:
        if self.config is None:
            return self.backend.run(problem, *operands)
        return self.backend.run(problem, *operands, config=self.config)


def select(problem: Problem, backend: str = "auto", *, in_plan: bool = False, in_nhwc: bool = False) -> Selection:
    """Who runs this problem, and how. "auto": the measured winner where there is one, else the fixed order.

    A backend asked for by name takes its best measured config. in_plan: the weight is packed once for many calls, and x
    may lie in row space. in_nhwc: but this x cannot, so the best measured without it counts; as ever outside plans.
    BackendError when the backend is unknown or cannot run this.
    """
    candidates, in_nhwc = record.REGISTRY[problem.op], in_nhwc or not in_plan
    if backend == "auto":
        return _measured_winner(problem, in_plan, in_nhwc) or fixed_order(problem, in_plan)
    if backend not in candidates:
        raise BackendError(
            f"unknown backend {backend!r} for {problem.op}; known ones are auto, {', '.join(candidates)}."
        )
    chosen = candidates[backend]
    reason = chosen.why_not(problem)
    if reason is not None:
        raise BackendError(
            f"backend {backend!r} cannot run this: {reason}. Use backend='eager' or 'auto'. The problem: {problem}."
        )
    choice = winners.lookup(problem, backend, in_nhwc) if chosen.configs else None
    config = choice and _config(chosen, problem, choice)
    if choice is None or config is None or _why_not_here(chosen, config, choice, in_plan, in_nhwc):
        return Selection(chosen, None, BY_NAME)
    return Selection(chosen, config, f"{BY_NAME}; {choice.source}")


def fixed_order(problem: Problem, in_plan: bool = False) -> Selection:
    """The first backend that may run unmeasured on this device and can."""
    candidates = record.REGISTRY[problem.op]
    for candidate in candidates.values():
        if problem.device not in candidate.auto.devices or candidate.plan.only > in_plan:
            continue
        if candidate.why_not(problem) is None and candidate.auto.pays(problem):
            return Selection(candidate)
    return Selection(candidates["eager"])


def _measured_winner(problem: Problem, in_plan: bool, in_nhwc: bool) -> Optional[Selection]:
    """None without a measurement; the fixed order, with the reason, where the winner cannot be had here."""
    choice = winners.lookup(problem, in_nhwc=in_nhwc)
    if choice is None:
        if problem.device == "cuda" and problem.device not in winners.warned and _has_configs(problem):
            winners.warn_untuned(problem)
        return None
    backend = record.REGISTRY[problem.op].get(choice.backend)
    reason = "there is no such backend" if backend is None else backend.why_not(problem)
    if reason is None and backend is not None and backend.plan.only > in_plan:
        reason = "only a plan packs its weight once"
    config = None if backend is None or reason is not None else _config(backend, problem, choice)
    if reason is None and config is None and choice.config is not None:
        reason = "it has no such config any more"
    if reason is None and backend is not None:
        reason = _why_not_here(backend, config, choice, in_plan, in_nhwc)
    if backend is None or reason is not None:
        source = f"{FIXED_ORDER}; {choice.source}: {choice.backend}, but {reason}"
        return fixed_order(problem, in_plan)._replace(source=source)
    return Selection(backend, config, choice.source)


def _why_not_here(backend: Backend, config: Any, choice: winners.Choice, in_plan: bool, in_nhwc: bool) -> Optional[str]:
    """Why what was measured would not be as fast at this place, or None."""
    if in_nhwc and backend.reads_row_space(config):
        return "its time is for x in row space, where it does not lie here"
    if not in_plan and backend.configs is not None and choice.time_us < backend.configs.launch_us(config):
        return "outside a frozen plan its launch takes longer than the kernel"
    return None


def _has_configs(problem: Problem) -> bool:
    candidates = record.REGISTRY[problem.op].values()
    return any(backend.configs is not None and backend.why_not(problem) is None for backend in candidates)


def _config(backend: Backend, problem: Problem, choice: winners.Choice) -> Optional[Any]:
    if choice.config is None:
        return backend.configs and backend.configs.default and backend.configs.default(problem)
    return _config_of(backend, problem, tuple(sorted(choice.config.items())))


@functools.lru_cache(maxsize=8192)
def _config_of(backend: Backend, problem: Problem, fields: tuple) -> Optional[Any]:
    """The config with these fields, if the backend still has it: what comes from a file runs only if it is legal."""
    if backend.configs is None:
        return None
    legal = backend.configs.legal or backend.configs.worth
    return next((found for found in legal(problem) if found._asdict() == dict(fields)), None)
