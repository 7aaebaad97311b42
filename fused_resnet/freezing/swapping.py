"""On a GPU, the two best of each convolution against each other inside the captured plan.

Times of a convolution alone leave out what its neighbours do to it: launches that overlap, and caches. So a captured
plan is compared with others in which one convolution has its second best. Whole graphs are replayed in turn.
"""

from __future__ import annotations

import time
from typing import Callable, Mapping, Sequence

from torch import Tensor

from fused_resnet.choosing import Selection, decide, timing, winners
from fused_resnet.freezing.plan import Plan
from fused_resnet.operators.problem import ConvProblem

GAIN = 0.005  # of the whole plan's time, or noise would decide
SECONDS = 20.0
_ROUNDS = 30

Overrides = Mapping[ConvProblem, Selection]


def swapped(
    plan: Plan, make: Callable[[Overrides], Plan], problems: Sequence[ConvProblem], x: Tensor, seconds: float = SECONDS
) -> Plan:
    """The plan, or one with the second best of some convolutions, whichever a replay is faster with.

    make: a captured plan in which these problems are computed so, and all others as they are. What is found is kept.
    Each problem has its turn once on a machine, those first whose candidates take longest; none later than `seconds`.
    """
    begun, taken, tried = time.monotonic(), dict[ConvProblem, Selection](), []
    for problem, rival in decide.rivals(problems):
        if time.monotonic() - begun >= seconds:
            break
        other = make({**taken, problem: rival})
        calls = {"own": lambda plan=plan: plan(x), "other": lambda other=other: other(x)}
        stats = timing.interleaved(calls, device=str(x.device), rounds=_ROUNDS)
        if stats["other"].median_us < (1 - GAIN) * stats["own"].median_us:
            plan, taken[problem] = other, rival
        tried.append(problem)
    winners.keep_swaps({problem: taken.get(problem) for problem in tried})
    return plan
