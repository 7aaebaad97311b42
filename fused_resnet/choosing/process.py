"""Checks and timings in a process of their own: what crashes or hangs there costs the caller one candidate.

    python -m fused_resnet.choosing.process     reads a request a line from standard input, writes an event a line

A candidate that ends the child, or of which it says nothing for too long (`_limit_of`), is recorded as wrong. Another
child goes on with the rest. On a GPU a child whose work is done waits a while for more. The first calls of a network
come one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Sequence, TextIO

import torch

from fused_resnet import backends
from fused_resnet.choosing import timing
from fused_resnet.choosing.candidates import candidates
from fused_resnet.choosing.case import why_unusable
from fused_resnet.choosing.checking import Subject, checked, tried
from fused_resnet.machine import devices
from fused_resnet.machine.locks import new_lock
from fused_resnet.operators.problem import parsed_problem

LIMIT_S = 60.0  # for one candidate of a small problem
_FLOPS_PER_S = 0.25e9  # a generous guess for the check of a larger one, whose four calls and reference take longer
_MOST_S = 1800.0
# of somebody else's doing, or of too little memory
_PASSING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
_START_S = 120.0  # until a child says its first word
_IDLE_S = 20.0  # that a child on a GPU waits for another request; it holds memory there
_MODULE = "fused_resnet.choosing.process"


class Job(NamedTuple):
    """A problem, and of its candidates those that are asked for, by name. known: outcomes of earlier checks.
    is_trial: they are run once and not checked (`checking.tried`)."""

    problem: str
    names: list[str]
    known: dict[str, dict[str, Any]]
    is_trial: bool = False


class Event(NamedTuple):
    """What came of a candidate of a job, or the times of its right ones. outcome: None of a candidate that the child
    does not know, since what registers it cannot be imported. has_ended: whether it has ended the process."""

    job: int
    name: str = ""
    outcome: Optional[dict[str, Any]] = None
    times: Optional[dict[str, timing.Stats]] = None
    has_ended: bool = False


class NoChild(RuntimeError):
    """There can be no process of our own here."""


def run(
    jobs: Sequence[Job], device: str, *, seconds: Optional[float] = None, deadline: float = math.inf
) -> Iterator[Event]:
    """Check the candidates of these jobs in a child process, and with `seconds` of timing for a job, time the right
    ones. deadline: on time.monotonic(), when the child is ended and the rest is left.

    Raises NoChild where a child does not even begin.
    """
    left = {str(index): job._asdict() for index, job in enumerate(jobs)}
    while left:
        request = {
            "device": device, "threads": torch.get_num_threads(), "seconds": seconds, "modules": _modules(),
            "precision": _precision(), "jobs": left,
        }  # fmt: skip
        begun: Optional[tuple[str, str]] = None
        has_begun = is_over = False
        with _child_on(device) as child:
            child.ask(request)
            for said in child.events(deadline):
                has_begun, job = True, said["job"]
                if said["is"] == "begun":
                    begun = (job, said["name"])
                    child.limit = _limit_of(left[job]["problem"], device)
                elif said["is"] == "checked":
                    begun = None
                    left[job]["known"][said["name"]] = said["outcome"]
                    yield Event(int(job), said["name"], said["outcome"])
                elif said["is"] == "fatal":
                    begun, is_over = None, True
                    left[job]["known"][said["name"]] = said["outcome"]
                    yield Event(int(job), said["name"], said["outcome"], has_ended=True)
                elif said["is"] == "timed":
                    yield Event(int(job), times={name: timing.Stats(*one) for name, one in said["times"].items()})
                else:
                    begun = None
                    del left[job]
        if not left or time.monotonic() >= deadline:
            return
        if not has_begun:
            raise NoChild(child.last_words())
        if is_over:
            continue
        if begun is None:  # nobody to blame, and no use in beginning that job again
            del left[min(left, key=int)]
            continue
        job, name = begun
        outcome = child.why_ended()
        left[job]["known"][name] = outcome
        yield Event(int(job), name, outcome, has_ended=True)


def _limit_of(problem: str, device: str) -> float:
    """How long a candidate may take: a large problem is checked for longer."""
    return min(_MOST_S, LIMIT_S + 4 * parsed_problem(problem, torch.device(device).type).flops / _FLOPS_PER_S)


class _Child:
    """A child that takes requests."""

    def __init__(self, environment: dict[str, str]) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise NoChild("this program is no Python interpreter")
        self._stderr = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except (OSError, TypeError) as error:  # no interpreter, no memory
            raise NoChild(str(error)) from error
        self.environment = environment
        self.is_free = self._is_late = self._has_ended = False
        self.limit = _START_S
        self._lines: queue.SimpleQueue[Optional[bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request: dict[str, Any]) -> None:
        self.is_free, self.limit = False, _START_S
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone already, which its silence shows
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def events(self, deadline: float) -> Iterator[dict[str, Any]]:
        """What it says, until all is done, it ends, is silent for longer than its limit, or the deadline is there."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(self.limit, deadline - time.monotonic())))
            except queue.Empty:
                self._is_late = True
                return
            if line is None:
                self._has_ended = True
                return
            with contextlib.suppress(ValueError):  # what a sitecustomize prints before `main` runs
                said = json.loads(line)
                if isinstance(said, dict) and said.get("is") == "free":
                    self.is_free = True
                    return
                if isinstance(said, dict) and "is" in said:
                    yield said

    def end(self) -> None:
        if not self._has_ended:
            self._process.kill()
        self._code = self._process.wait()

    def why_ended(self) -> dict[str, Any]:
        """The outcome of the candidate that it was at."""
        if self._is_late:
            return {"why": f"it had not ended after {self.limit:.0f} s"}
        if self._code >= 0:
            return {"why": f"it ended the process (exit status {self._code})"}
        name = signal.Signals(-self._code)
        passes = {"is_passing": True} if name in _PASSING else {}
        return {"why": f"it ended the process ({name.name})", **passes}

    def last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else self.why_ended()["why"]


class _Idle(NamedTuple):
    """A child that waits, whose it is, and what ends it."""

    child: _Child
    parent: int
    timer: threading.Timer


_idle: dict[str, _Idle] = {}
_idle_lock = new_lock()


@contextlib.contextmanager
def _child_on(device: str) -> Iterator[_Child]:
    """One that waits for more, or a new one. It waits again if it is free at the end and on a GPU; else it is ended."""
    environment = _environment()
    child = _taken(device)
    if child is not None and child.environment != environment:
        child.end()
        child = None
    child = child or _Child(environment)
    try:
        yield child
    finally:
        if child.is_free and _stays(device):
            _put_aside(device, child)
        else:
            child.end()


def _stays(device: str) -> bool:
    return torch.device(device).type != "cpu"


def _environment() -> dict[str, str]:
    """The same modules as here, and none that only happens to lie in the current folder; and no child of its own."""
    path = os.pathsep.join(one or os.getcwd() for one in sys.path if isinstance(one, str))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "FUSED_RESNET_TUNE": "0"}


def _taken(device: str) -> Optional[_Child]:
    with _idle_lock:
        idle = _idle.pop(device, None)
    if idle is None or idle.parent != os.getpid():  # a forked process has no child yet
        return None
    idle.timer.cancel()
    return idle.child


def _put_aside(device: str, child: _Child) -> None:
    def end() -> None:
        with _idle_lock:
            is_waiting = _idle.get(device) is idle
            if is_waiting:
                del _idle[device]
        if is_waiting:
            child.end()

    timer = threading.Timer(_IDLE_S, end)
    timer.daemon = True
    idle = _Idle(child, os.getpid(), timer)
    with _idle_lock:
        other = _idle.get(device)
        _idle[device] = idle
    if other is not None and other.parent == os.getpid():  # of another thread
        other.timer.cancel()
        other.child.end()
    timer.start()


def can_know(backend: backends.Backend) -> bool:
    """Whether a child can import what registers a backend."""
    return getattr(backend.run, "__module__", None) not in (None, "__main__")


def _modules() -> list[str]:
    """What registers the backends that others have added."""
    made = {getattr(backend.run, "__module__", None) for backend in backends.known("conv_bn_act").values()}
    return sorted(name for name in made if name not in (None, "__main__") and not name.startswith("fused_resnet."))


def _precision() -> dict[str, Any]:
    """What this process allows fp32 to be computed in, and by whom."""
    conv = getattr(torch.backends.mkldnn, "conv", None)
    return {
        "allows_tf32": devices.allows_tf32(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "mkldnn_conv": getattr(conv, "fp32_precision", None),
    }


def _set_precision(allows_tf32: bool, mkldnn: bool, mkldnn_conv: Optional[str]) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allows_tf32
    if mkldnn != torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.set_flags(mkldnn)
    conv: Any = getattr(torch.backends.mkldnn, "conv", None)
    if mkldnn_conv is not None and mkldnn_conv != conv.fp32_precision:
        conv.fp32_precision = mkldnn_conv


def main() -> None:
    events = os.fdopen(os.dup(1), "w")  # for events alone: what libraries print goes where errors go
    os.dup2(2, 1)
    for line in sys.stdin:
        _answer(json.loads(line), functools.partial(_say, events))


def _say(events: TextIO, what: str, **more: Any) -> None:
    print(json.dumps({"is": what, **more}), file=events, flush=True)


def _answer(request: dict[str, Any], say: Callable[..., None]) -> None:
    for name in request["modules"]:
        importlib.import_module(name)
    torch.set_num_threads(request["threads"])
    _set_precision(**request["precision"])
    with devices.on(request["device"]):
        for index, job in request["jobs"].items():
            told = functools.partial(say, job=index)
            _work(Job(**job), request["device"], request["seconds"], told)
            told("done")
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the parent's model needs it
    say("free")


def _work(job: Job, device: str, seconds: Optional[float], say: Any) -> None:
    problem = parsed_problem(job.problem, torch.device(device).type)
    subject, known = Subject(problem, device), {str(one): one for one in candidates(problem)[0]}
    calls = {}
    for name in job.names:
        say("begun", name=name)
        if name not in known:
            say("checked", name=name, outcome=None)
            continue
        if job.is_trial:
            say("checked", name=name, outcome=tried(subject, known[name]))
            continue
        one = checked(subject, known[name], job.known.get(name))
        if "why" in one.outcome and why_unusable(device):
            say("fatal", name=name, outcome=one.outcome)
            os._exit(1)
        say("checked", name=name, outcome=one.outcome)
        if one.call is not None and one.planned is not None:
            calls[name] = subject.fed(one.planned, one.call)
    if seconds is not None and calls:
        with torch.no_grad():
            times = timing.in_network_order({job.problem: calls}, device=device, budget_s=seconds)
        say("timed", times=times[job.problem])


if __name__ == "__main__":
    main()
