"""The record of a measurement: what was found, and what that depends on. Every benchmark writes its JSON here.

`measure` measures subjects in turn and writes the record after each; `Record.write` is the only writer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple, Optional, Sequence

from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.machine import devices, files
from fused_resnet.measuring.environment import environment as environment_of
from fused_resnet.measuring.operators import mismatches
from fused_resnet.measuring.summary import Row, summarise_rows
from fused_resnet.measuring.turns import Measured, Run, Subject, in_turn

# the kinds that have rows, and what their files call them
_ROWS = {
    "bench ops": "rows",
    "bench blocks": "rows",
    "bench model": "runs",
    "bench train": "runs",
    "tune": "rows",
    "demo": "runs",
    "choices": "rows",
    "cpu-check table": "rows",
    "footprint": "rows",
    "sanitizers": "rows",
    "soak": "rows",
    "accuracy": "rows",
    "degradation": "rows",
}
# the form of the other fields; a summary is a list of contests, the tuner's one dictionary
_FORMS: dict[str, Any] = {
    "environment": dict, "kind": str, "device": str, "settings": dict, "kernels": str, "budget_s": (int, float),
    "left": list, "broken": dict, "summary": (list, dict), "mismatches": list,
}  # fmt: skip
_REQUIRED = ("environment", "kind", "device")


class Record(NamedTuple):
    """One measurement, its fields in the order of the file. What is None is not in the file.

    | field | what it is |
    | --- | --- |
    | kind | the command, such as "bench ops", "bench model", "tune", "demo", "verify", "golden" or "cpu-check" |
    | device, environment | the machine's name, and what else a number depends on |
    | settings | what was asked for |
    | kernels | the digest of all kernel sources |
    | budget_s | seconds of timing |
    | left, broken | subjects without a row, and why for those that raised |
    | rows | what was measured, a row a subject |
    | summary | what the rows come to |
    | mismatches | the results that were wrong |
    | more | what only this kind has, by its name in the file |
    """

    kind: str
    device: str
    settings: Optional[dict[str, Any]]
    environment: dict[str, Any]
    kernels: Optional[str] = None
    budget_s: Optional[float] = None
    left: Optional[list[str]] = None
    broken: Optional[dict[str, str]] = None
    rows: Sequence[Row] = ()
    summary: Any = None
    mismatches: Optional[list[dict[str, Any]]] = None
    more: Mapping[str, Any] = {}

    @classmethod
    def here(cls, kind: str, device: str, settings: Optional[dict[str, Any]] = None) -> "Record":
        """A record without rows, of this machine as it is now. device: "cpu", "cuda" or "cuda:N"."""
        return cls(kind, devices.device_name(device), settings, environment_of(device))

    @classmethod
    def from_json(cls, record: Any) -> "Record":
        """KeyError, TypeError or ValueError is raised for what `as_json` would not have written."""
        content = dict(record)
        fields = {name: content.pop(name) for name in _FORMS if name in _REQUIRED or name in content}
        for name, value in fields.items():
            if not isinstance(value, _FORMS[name]):
                raise TypeError(f"its {name} is {value!r}")
        rows = content.pop(_ROWS[fields["kind"]]) if fields["kind"] in _ROWS else []
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise TypeError("its rows are no list of dictionaries")
        return cls(**{"settings": None, **fields}, rows=rows, more=content)

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name in self._fields[:-1]:
            if name == "rows" and self.kind in _ROWS:
                content[_ROWS[self.kind]] = self.rows
            elif name != "rows" and getattr(self, name) is not None:
                content[name] = getattr(self, name)
        return {**content, **self.more}

    def write(self, file: Path) -> Path:
        """Whole or not at all: an interrupted call leaves what was there before. Returns the file."""
        return files.write_json(file, self.as_json())

    def with_rows_of(self, measured: Measured, budget_s: float) -> "Record":
        """The record of a benchmark with what has been measured so far, and what that comes to."""
        rows, left, broken = measured
        wrong = mismatches(rows) if self.kind == "bench ops" else None
        return self._replace(budget_s=budget_s, left=left, broken=broken, rows=rows, mismatches=wrong,
                             summary=summarise_rows(self.kind, rows))  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What two records must share for their rows to stand in one table. KeyError where this one lacks it."""
        content = self.as_json()
        identity = {
            **{f"another {name}": content[name] for name in ("kind", "device", "kernels")},
            **{f"another {name}": self.environment[name] for name in ("torch", "triton", "threads")},
            **{f"other {name}": value for name, value in content["settings"].items()},
        }
        return json.loads(json.dumps(identity))


class CannotGoOn(ValueError):
    """Why a measurement cannot go on with a file, as the rest of a sentence that begins with the file's name."""


def kept_rows(file: Path, start: Record) -> dict[str, Row]:
    """The rows that an earlier run of the same measurement left, by name. CannotGoOn where the file holds another."""
    if not file.exists():
        return {}
    try:
        record = Record.from_json(json.loads(file.read_text()))
        differs = [name for name, value in record.identity().items() if value != start.identity()[name]]
        rows = {row["problem"]: row for row in record.rows}
    except (ValueError, KeyError, TypeError) as error:
        raise CannotGoOn(f"is no record to go on with ({type(error).__name__}: {error}).") from error
    if differs:
        raise CannotGoOn(f"holds another measurement ({', '.join(differs)}); give another --out.")
    return rows


def measure(start: Record, subjects: Iterable[Subject], run: Run, progress: Progress = silent) -> Record:
    """`start` with a row for each subject, written to `run.out` after each.

    Raises CannotGoOn where that is to be resumed and holds another measurement, and what `turns.in_turn` raises.
    """
    known = kept_rows(run.out, start) if run.resume and run.out is not None else {}

    def save(measured: Measured) -> None:
        if run.out is not None:
            start.with_rows_of(measured, run.budget_s).write(run.out)

    return start.with_rows_of(in_turn(subjects, run, known=known, save=save, progress=progress), run.budget_s)
