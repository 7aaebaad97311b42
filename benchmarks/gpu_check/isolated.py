"""Commands that cannot take the caller with them: time limits, whole process groups, whatever they print.

For gpu-check, whose steps may hang, crash or print garbage.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from fused_resnet.kernels import sources

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
CLOSING_CHARACTERS = 300
PATIENCE_S = 10.0  # between interrupting a process and killing it
LOGGED_CHARACTERS = 100_000  # of a command at most: a hundred of them stay below the 16 MiB that may be brought back


class Result(NamedTuple):
    """outcome: PASSED, FAILED or NOT_RUN; detail: the closing line, or why not."""

    outcome: str
    detail: str


class Watched(NamedTuple):
    """A file that a command writes to as it goes on: for how many seconds it may stand still."""

    file: Path
    patience_s: float

    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else -1


def execute(command: Sequence[str], limit_s: float, log: Optional[Path] = None, **variables: str) -> Result:
    """Run a command, its output shown as it comes and added to the log. Passed is exit code 0."""
    return executed(command, limit_s, log, **variables)[0]


def executed(
    command: Sequence[str], limit_s: float, log: Optional[Path] = None, watched: Optional[Watched] = None,
    **variables: str,
) -> tuple[Result, str]:  # fmt: skip
    """The result and everything the command printed, stderr included.

    After limit_s it and all that it started are interrupted, and killed if they do not end within PATIENCE_S. So they
    are when what is watched stands still. What they leave behind is killed too, and a process that escaped with the
    output's other end is not waited for.
    """
    lines: list[str] = []
    process = subprocess.Popen(
        command, cwd=sources.ROOT, text=True, errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **variables},
    )  # fmt: skip
    reader = threading.Thread(target=_echo, args=(process.stdout, lines, log), daemon=True)
    reader.start()
    why_late, known = None, None
    try:
        why_late = _waited(process, limit_s, watched)
        if why_late is not None:
            known = len(lines)
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        reader.join(5)
    output = "".join(lines)
    said = (line.strip() for line in reversed(lines[:known]) if line.strip())  # not what the interrupt made it say
    closing = next(said, "no output")[:CLOSING_CHARACTERS]
    if why_late is not None:
        return Result(FAILED, f"{why_late}; last it said: {closing}"), output
    if process.returncode < 0:
        return Result(FAILED, f"ended by {signal.Signals(-process.returncode).name}; last it said: {closing}"), output
    return Result(PASSED if process.returncode == 0 else FAILED, closing), output


def _waited(process: subprocess.Popen, limit_s: float, watched: Optional[Watched]) -> Optional[str]:
    """Why a process that has not ended is not waited for any longer; None of one that has."""
    now = time.monotonic()
    deadline, size, stands_since = now + limit_s, None, now
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, min(deadline - time.monotonic(), limit_s if watched is None else 1.0)))
            return None
        now = time.monotonic()
        if now >= deadline:
            return f"stopped after {limit_s:.0f} s"
        if watched is not None:
            if watched.size() != size:
                size, stands_since = watched.size(), now
            elif now - stands_since >= watched.patience_s:
                return f"stopped: {watched.file.name} stood still for {watched.patience_s:.0f} s"


def _echo(stream: Any, lines: list[str], log: Optional[Path]) -> None:
    room = LOGGED_CHARACTERS
    with contextlib.nullcontext() if log is None else open(log, "a", errors="replace") as file:
        for line in stream:
            lines.append(line)
            print(line, end="", flush=True)
            if file is not None and room > 0:
                file.write(line[:room])
                room -= len(line)
                if room <= 0:
                    file.write("\n[the rest of this command is left out]\n")
                file.flush()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
