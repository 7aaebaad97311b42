"""Which backend computes a problem: the one asked for, the measured winner, or the first in a fixed order."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

from torch import Tensor

from fused_resnet.backends import record
from fused_resnet.backends.record import Backend, BackendError
from fused_resnet.choosing import winners
from fused_resnet.operators.problem import Problem

FIXED_ORDER = "the fixed order of backends"
BY_NAME = "asked for by name"


class Selection(NamedTuple):
    """A backend and its config (None: its own default), and why these: part of a sentence, "" of a mere candidate."""

    backend: Backend
    config: Optional[Any] = None
    source: str = ""

    @property
    def reads_row_space(self) -> bool:
        """Whether its time is for x in row space, where only a plan keeps it."""
        return self.backend.configs is not None and self.backend.configs.reads_row_space(self.config)

    def run(self, problem: Problem, *operands: Any) -> Tensor:
        if self.config is None:
            return self.backend.run(problem, *operands)
        return self.backend.run(problem, *operands, config=self.config)

    def __str__(self) -> str:
        if self.config is None:
            return self.backend.name
        return f"{self.backend.name} {' '.join(f'{key}={value}' for key, value in self.config._asdict().items())}"


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
    winner = winners.lookup(problem, backend, in_nhwc) if chosen.configs else None
    config = winner and _config(chosen, problem, winner)
    if winner is None or config is None:
        return Selection(chosen, None, BY_NAME)
    measured = Selection(chosen, config, f"{BY_NAME}; {winner.source}")
    if _why_not_here(measured, winner, in_plan, in_nhwc):
        return Selection(chosen, None, BY_NAME)
    return measured


def fixed_order(problem: Problem, in_plan: bool = False) -> Selection:
    """The first backend that may run unmeasured on this device, can, and has not been found wrong here."""
    candidates = record.REGISTRY[problem.op]
    for candidate in candidates.values():
        if problem.device not in candidate.auto.devices or candidate.plan.only > in_plan:
            continue
        if candidate.why_not(problem) is None and candidate.auto.pays(problem):
            selection = Selection(candidate, None, FIXED_ORDER)
            if why_rejected(problem, selection) is None:
                return selection
    return Selection(candidates["eager"], None, FIXED_ORDER)


def why_rejected(problem: Problem, selection: Selection) -> Optional[str]:
    """What was found wrong when this was checked on exactly this problem, or None."""
    return winners.why_wrong(winners.outcome(problem, str(selection)))


def _measured_winner(problem: Problem, in_plan: bool, in_nhwc: bool) -> Optional[Selection]:
    """None without a measurement; the fixed order, with the reason, where the winner cannot be had here."""
    winner = winners.lookup(problem, in_nhwc=in_nhwc)
    if winner is None:
        if problem.device == "cuda" and problem.device not in winners.warned and _has_configs(problem):
            winners.warn_untuned(problem)
        return None
    backend = record.REGISTRY[problem.op].get(winner.backend)
    reason = "there is no such backend" if backend is None else backend.why_not(problem)
    if reason is None and backend is not None and backend.plan.only > in_plan:
        reason = "only a plan packs its weight once"
    config = None if backend is None or reason is not None else _config(backend, problem, winner)
    if reason is None and config is None and winner.config is not None:
        reason = "it has no such config any more"
    if reason is None and backend is not None:
        measured = Selection(backend, config, winner.source)
        wrong = why_rejected(problem, measured)
        reason = f"it is wrong here: {wrong}" if wrong else _why_not_here(measured, winner, in_plan, in_nhwc)
        if reason is None:
            return measured
    source = f"{FIXED_ORDER}; {winner.source}: {winner.backend}, but {reason}"
    return fixed_order(problem, in_plan)._replace(source=source)


def _why_not_here(measured: Selection, winner: winners.Winner, in_plan: bool, in_nhwc: bool) -> Optional[str]:
    """Why what was measured would not be as fast at this place, or None."""
    if in_nhwc and measured.reads_row_space:
        return "its time is for x in row space, where it does not lie here"
    configs = measured.backend.configs
    if not in_plan and configs is not None and winner.time_us < configs.launch_us(measured.config):
        return "outside a frozen plan its launch takes longer than the kernel"
    return None


def _has_configs(problem: Problem) -> bool:
    candidates = record.REGISTRY[problem.op].values()
    return any(backend.configs is not None and backend.why_not(problem) is None for backend in candidates)


def _config(backend: Backend, problem: Problem, winner: winners.Winner) -> Optional[Any]:
    if winner.config is None:
        return backend.configs and backend.configs.default and backend.configs.default(problem)
    return _config_of(backend, problem, tuple(sorted(winner.config.items())))


@functools.lru_cache(maxsize=8192)
def _config_of(backend: Backend, problem: Problem, fields: tuple) -> Optional[Any]:
    return backend.configs and backend.configs.find(problem, dict(fields))
