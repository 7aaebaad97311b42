"""What a long measurement has found out so far, so that it can be interrupted and go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from fused_resnet.machine import files
from fused_resnet.machine.errors import one_line


class Journal:
    """Rows by subject and outcomes by (subject, candidate), a line of JSON each, kept for one identity.

    identity: whatever has to be the same for an old line to count. A line that was cut short, as a killed process
    leaves it, is skipped. Where the file cannot be written that is said once, and the journal lasts as long as the
    process. Every record starts its own line, so that one cut short costs no other.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self._id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._clear()
        for line in self._lines():
            with contextlib.suppress(TypeError, KeyError):
                self._learn(line)

    def row(self, subject: str) -> Optional[dict]:
        return self._rows.get(subject)

    def outcome(self, subject: str, candidate: str) -> Optional[dict]:
        """What `end` was told; {"why"} for what was begun twice and never ended: it took the process with it."""
        place = (subject, candidate)
        if place not in self._outcomes and self._begun.get(place, 0) >= 2:
            return {"why": "the process ended twice while it ran"}
        return self._outcomes.get(place)

    def begin(self, subject: str, candidate: str) -> None:
        self._write({"subject": subject, "candidate": candidate, "begun": 1})

    def interrupt(self, subject: str, candidate: str) -> None:
        """It was begun, and it was not what ended the process."""
        self._write({"subject": subject, "candidate": candidate, "begun": -1})

    def end(self, subject: str, candidate: str, outcome: dict) -> None:
        self._write({"subject": subject, "candidate": candidate, "outcome": outcome})

    def finish(self, subject: str, row: dict) -> None:
        self._write({"subject": subject, "row": row})

    def start_anew(self) -> None:
        """Everything is to be measured again, also by processes that go on from here."""
        self._write({"anew": True})

    def _clear(self) -> None:
        self._rows: dict[str, dict] = {}
        self._outcomes: dict[tuple[str, str], dict] = {}
        self._begun: dict[tuple[str, str], int] = {}

    def _learn(self, line: dict) -> None:
        if "anew" in line:
            self._clear()
        elif "row" in line:
            self._rows[line["subject"]] = line["row"]
        elif "outcome" in line:
            self._outcomes[line["subject"], line["candidate"]] = line["outcome"]
        else:
            place = (line["subject"], line["candidate"])
            self._begun[place] = self._begun.get(place, 0) + line["begun"]

    def _lines(self) -> Iterator[dict]:
        with contextlib.suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and line.get("id") == self._id:
                        yield line

    def _write(self, line: dict) -> None:
        self._learn(line)
        try:
            with files.locked(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"id": self._id, **line}))
        except OSError as error:
            files.report_once(f"{self.path} cannot be written, so an interruption loses it ({one_line(error)}).")
