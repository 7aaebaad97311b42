"""Measuring one subject after the other, so that a long run can stop, be stopped and go on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Iterable, Mapping, NamedTuple, Optional, Protocol

from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.machine.errors import why_missing
from fused_resnet.measuring.summary import Row


class Subject(Protocol):
    """What one row is about: a `networks.NetworkSubject`, for one."""

    @property
    def name(self) -> str: ...

    def measured(self, budget_s: float, rounds: Optional[int] = None, progress: Progress = silent) -> Row:
        """Its row without the name, from about so many seconds of timing or at most so many rounds."""
        ...


class Run(NamedTuple):
    """How long to measure, and where to.

    | field | what it is |
    | --- | --- |
    | budget_s | seconds of timing in all |
    | rounds | at most so many for each subject |
    | stop_after_s | no subject is begun later, except the first |
    | out | the record's file, written after each subject |
    | resume | keep the rows that `out` has |
    | chart | the PNG that who asked for the record draws of it |
    """

    budget_s: float
    rounds: Optional[int] = None
    stop_after_s: Optional[float] = None
    out: Optional[Path] = None
    resume: bool = False
    chart: Optional[Path] = None


class Measured(NamedTuple):
    """rows: in the order of the subjects; left: those without one; broken: why, for those of them that raised."""

    rows: list[Row]
    left: list[str]
    broken: dict[str, str]


def in_turn(
    subjects: Iterable[Subject],
    run: Run,
    *,
    known: Mapping[str, Row] = {},
    save: Callable[[Measured], None] = lambda measured: None,
    progress: Progress = silent,
) -> Measured:
    """Measure each subject that is not `known`. One that raises costs the others nothing; the first alone raises.

    Subjects of one name are one. save: called with what is there after each.
    """
    started = time.monotonic()
    named = {subject.name: subject for subject in subjects}
    rows = {name: known[name] for name in named if name in known}
    todo = [name for name in named if name not in known]
    broken: dict[str, str] = {}

    def measured() -> Measured:
        left = [name for name in named if name not in rows]
        return Measured([rows[name] for name in named if name in rows], left, dict(broken))

    for index, name in enumerate(todo):
        if index and run.stop_after_s is not None and time.monotonic() - started >= run.stop_after_s:
            break
        within = part_of(progress, len(named) - len(todo) + index, len(named), name)
        within(0.0, "preparing")
        try:
            rows[name] = {"problem": name, **named[name].measured(run.budget_s / len(todo), run.rounds, within)}
        except Exception as error:
            if not rows:
                raise
            broken[name] = why_missing(error)
        save(measured())
    progress(1.0, "done")
    return measured()


def part_of(progress: Progress, index: int, parts: int, title: str) -> Progress:
    """Progress of part number `index` as progress of the whole."""
    return lambda fraction, text: progress((index + fraction) / parts, f"{title}: {text}")
