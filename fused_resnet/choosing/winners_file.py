"""The file of what was checked and measured on one device: by problem and batch, and the runs that measured.

An entry belongs to a problem without its batch (`winners.key`) and to the batch it was measured at. A check belongs to
a problem with its batch and to a candidate.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple, Optional

from fused_resnet.machine import files

SCHEMA = 2


class Measured(NamedTuple):
    """One candidate of an entry. error_ratio: its worst error as a fraction of what the reference allows, None where it
    was not checked as a whole."""

    config: Optional[dict]
    time_us: float
    error_ratio: Optional[float]


class Entry(NamedTuple):
    """The best of each backend for one problem at one batch, the backend that `auto` takes, and who measured it.

    default: the backend `auto` takes without tuning. run: key of the file's "runs", which hold the environments.
    in_nhwc: the same among the candidates that read x in NHWC, for where it cannot lie in row space. None where no
    candidate reads row space, and in entries that older versions wrote. is_swapped: whether the two best were compared
    inside a captured plan, and the winner is the better of them there.
    """

    winner: str
    default: str
    run: str
    candidates: dict[str, Measured]
    in_nhwc: Optional["Entry"] = None
    is_swapped: bool = False

    @classmethod
    def from_json(cls, record: dict) -> "Entry":
        """What `files.read_json` takes for a bad file is raised for anything that `as_json` would not have written."""
        candidates = {}
        for name, one in record["candidates"].items():
            config, error = one["config"], one["error_ratio"]
            measured = Measured(config, float(one["time_us"]), None if error is None else float(error))
            is_plain = config is None or all(isinstance(value, (int, str)) for value in config.values())
            is_right = measured.error_ratio is None or 0 <= measured.error_ratio <= 1
            if not (is_plain and 0 < measured.time_us < math.inf and is_right):
                raise ValueError(f"its candidate {name} is {one}")
            candidates[name] = measured
        if record["winner"] not in candidates:
            raise ValueError(f"the winner {record['winner']!r} was not measured")
        in_nhwc = record.get("in_nhwc")
        nested = None if in_nhwc is None else cls.from_json(in_nhwc)
        is_swapped = bool(record.get("is_swapped", False))
        return cls(record["winner"], str(record["default"]), str(record["run"]), candidates, nested, is_swapped)

    def as_json(self) -> dict:
        record = dict(self._asdict(), candidates={name: one._asdict() for name, one in self.candidates.items()})
        del record["in_nhwc"]
        return record if self.in_nhwc is None else {**record, "in_nhwc": self.in_nhwc.as_json()}


class Table(NamedTuple):
    """One file: entries by problem key and batch, and by run the environment and the kernels' digests.

    checks: by problem with its batch, and candidate: {"error_ratio"} or {"why"} (`checking.Checked`), with the digest
    of the kernels that were checked. trusted: by backend, its digest and versions when it had passed through a process
    of its own without ending it.
    """

    device: str
    entries: dict[str, dict[int, Entry]]
    runs: dict[str, dict]
    checks: dict[str, dict[str, dict]]
    trusted: dict[str, str]

    @classmethod
    def empty(cls, device: str) -> "Table":
        return cls(device, {}, {}, {}, {})

    def merge(self, other: "Table") -> None:
        """Take over what another has: its entries and checks replace those for the same."""
        self.runs.update(other.runs)
        self.trusted.update(other.trusted)
        for key, by_batch in other.entries.items():
            self.entries.setdefault(key, {}).update(by_batch)
        for key, by_candidate in other.checks.items():
            self.checks.setdefault(key, {}).update(by_candidate)

    @classmethod
    def from_json(cls, record: dict) -> "Table":
        if record["schema"] != SCHEMA:
            raise ValueError(f"its schema is {record['schema']!r}, this version reads {SCHEMA}")
        entries = {
            key: {int(batch): Entry.from_json(entry) for batch, entry in by_batch.items()}
            for key, by_batch in record["entries"].items()
        }
        if any(not 1 <= batch < 2**63 for by_batch in entries.values() for batch in by_batch):
            raise ValueError("a batch below 1 or beyond what a tensor has")
        runs = {run: dict(found) for run, found in record["runs"].items()}
        if not all(isinstance(found.get("kernels", {}), dict) for found in runs.values()):
            raise ValueError("the digests of a run's kernels are no dict")
        checks = {
            str(key): {str(candidate): _understood_check(one) for candidate, one in found.items()}
            for key, found in record.get("checks", {}).items()
        }
        trusted = {str(name): str(stamp) for name, stamp in record.get("trusted", {}).items()}
        return cls(record["device"], entries, runs, checks, trusted)

    def as_json(self) -> dict:
        """Runs that no entry names any more are left out."""
        entries = {
            key: {str(batch): by_batch[batch].as_json() for batch in sorted(by_batch)}
            for key, by_batch in sorted(self.entries.items())
        }
        used = {entry.run for by_batch in self.entries.values() for entry in by_batch.values()}
        runs = {run: found for run, found in self.runs.items() if run in used}
        return {
            "schema": SCHEMA, "device": self.device, "runs": runs, "entries": entries,
            "checks": dict(sorted(self.checks.items())), "trusted": self.trusted,
        }  # fmt: skip


def _understood_check(one: dict) -> dict:
    kernel = one["kernel"]
    if not (kernel is None or isinstance(kernel, str)):
        raise ValueError(f"the digest of a checked kernel is {kernel!r}")
    if "why" in one:
        return {"why": str(one["why"]), "kernel": kernel}
    ratio = None if one["error_ratio"] is None else float(one["error_ratio"])
    if ratio is not None and not 0 <= ratio < math.inf:
        raise ValueError(f"the error of a check is {ratio}")
    return {"error_ratio": ratio, "kernel": kernel}


def file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"


def read(path: Path, device: str) -> Optional[Table]:
    """The table in a file, None without one. A file that is corrupt or another device's is reported once."""

    def understood(record: dict) -> Table:
        table = Table.from_json(record)
        if table.device != device:
            raise ValueError(f"it is for {table.device}, this is {device}")
        return table

    return files.read_json(path, understood)
