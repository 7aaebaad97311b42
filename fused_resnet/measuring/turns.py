"""Measuring one subject after the other, so that a long run can stop, be stopped and go on."""

from __future__ import annotations

import math
import time
from typing import Callable, Mapping, NamedTuple

from fused_resnet.measuring.summary import Row
from fused_resnet.measuring.timing import Progress, silent
from fused_resnet.measuring.variants import missing_reason

# (seconds to spend, where to say how far it is) -> a row without its name
Subject = Callable[[float, Progress], Row]


class Measured(NamedTuple):
    """rows: in the order of the subjects; left: those without one; broken: why, for those of them that raised."""

    rows: list[Row]
    left: list[str]
    broken: dict[str, str]


def in_turn(
    subjects: Mapping[str, Subject],
    *,
    budget_s: float,
    known: Mapping[str, Row] = {},
    stop_after_s: float = math.inf,
    save: Callable[[Measured], None] = lambda measured: None,
    progress: Progress = silent,
) -> Measured:
    """Measure each subject that is not `known`. One that raises costs the others nothing; the first alone raises.

    No subject is begun after `stop_after_s` seconds, except the first. save: called with what is there after each.
    """
    started = time.monotonic()
    rows = {name: known[name] for name in subjects if name in known}
    todo = [name for name in subjects if name not in known]
    broken: dict[str, str] = {}

    def measured() -> Measured:
        left = [name for name in subjects if name not in rows]
        return Measured([rows[name] for name in subjects if name in rows], left, dict(broken))

    for index, name in enumerate(todo):
        if index and time.monotonic() - started >= stop_after_s:
            break
        within = part_of(progress, len(subjects) - len(todo) + index, len(subjects), name)
        within(0.0, "preparing")
        try:
            rows[name] = {"problem": name, **subjects[name](budget_s / len(todo), within)}
        except Exception as error:
            if not rows:
                raise
            broken[name] = missing_reason(error)
        save(measured())
    progress(1.0, "done")
    return measured()


def part_of(progress: Progress, index: int, parts: int, title: str) -> Progress:
    """Progress of part number `index` as progress of the whole."""
    return lambda fraction, text: progress((index + fraction) / parts, f"{title}: {text}")
