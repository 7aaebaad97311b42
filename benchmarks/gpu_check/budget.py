"""Steps within a budget of seconds, and check.json, which keeps what came of them: of gpu-check and of cpu-check."""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch

from benchmarks.gpu_check.isolated import CLOSING_CHARACTERS, FAILED, NOT_RUN, PASSED, Result
from fused_resnet.kernels import sources
from fused_resnet.measuring import Record
from fused_resnet.measuring.environment import environment as environment_of
from fused_resnet.measuring.verified import verified_record

OURS = ("cuda", "triton")  # the backends whose kernels this check can call verified


class Step(NamedTuple):
    """One step.

    needs_s: it is given at least so many seconds, and not begun with fewer. limit_s: at most so many. share: 0 for what
    takes as long as it takes. Otherwise its weight when what is left is divided among it and the steps after it of its
    part. run: does it within the seconds it is given. part: 1 for what a first call is for, which leaves nothing for
    the others; 2 for those.
    """

    name: str
    needs_s: float
    limit_s: float
    share: float
    run: Callable[[float], Result]
    part: int = 2


def chosen(steps: Sequence[Step], only: Optional[Sequence[str]], file: Path) -> list[Step]:
    """The steps asked for: all, those named, or with "rest" also those that check.json does not call passed."""
    if only is None:
        return list(steps)
    done = read_steps(file) if "rest" in only else {}
    rest = [step.name for step in steps if not has_passed(done.get(step.name, {}))] if "rest" in only else []
    return [step for step in steps if step.name in only or step.name in rest]


def read_steps(file: Path) -> dict[str, dict[str, Any]]:
    """The steps that an earlier call left in check.json; none where it is missing or unreadable."""
    try:
        return dict(Record.from_json(json.loads(file.read_text())).more["steps"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"check: {file.name} cannot be read and is begun anew ({error})", file=sys.stderr)
    return {}


def has_passed(step: dict[str, Any]) -> bool:
    return step.get("outcome") == PASSED and step.get("sources") == sources.source_digest()


def run_steps(
    steps: Sequence[Step], file: Path, device: str, budget_s: float, kind: str = "gpu-check"
) -> dict[str, dict[str, Any]]:
    """Run the steps one after the other, and keep check.json up to date after each. Returns its steps.

    kind: of the record; "gpu-check" also says which kernels it has verified.
    """
    done = read_steps(file)
    deadline = time.monotonic() + budget_s
    for index, step in enumerate(steps):
        left_s = deadline - time.monotonic()
        given_s = given(step, [later for later in steps[index + 1 :] if later.part == step.part], left_s)
        print(f"\n=== {index + 1}/{len(steps)} {step.name}: {given_s:.0f} s of the {left_s:.0f} s left", flush=True)
        started = time.monotonic()
        result = run_step(step, given_s)
        print(f"=== {step.name}: {result.outcome} ({result.detail})", flush=True)
        done[step.name] = {
            **result._asdict(),
            "seconds": round(time.monotonic() - started, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "sources": sources.source_digest(),
        }
        environment = environment_of("cuda" if torch.cuda.is_available() else "cpu")
        more = {"steps": done, **({"verified": verified(done, device)} if kind == "gpu-check" else {})}
        Record(kind, device, None, environment, more=more).write(file)
    return done


def given(step: Step, later: Sequence[Step], left_s: float) -> float:
    """The seconds a step is given of those that are left."""
    if not step.share:
        return min(step.limit_s, left_s)
    free_s = left_s - sum(other.needs_s for other in later if not other.share)
    shares = step.share + sum(other.share for other in later)
    return min(step.limit_s, left_s, max(step.needs_s, free_s * step.share / shares))


def run_step(step: Step, given_s: float) -> Result:
    if given_s < step.needs_s:
        return Result(NOT_RUN, f"it needs {step.needs_s:.0f} s, and {max(given_s, 0):.0f} s were left")
    try:
        return step.run(given_s)
    except Exception as error:  # whatever it is, the next step does not depend on it
        return Result(FAILED, f"{type(error).__name__}: {error}"[:CLOSING_CHARACTERS])


def verified(steps: dict[str, dict], device: str) -> Optional[dict[str, Any]]:
    """The provenance record of those backends that passed on the sources as they are now, or None."""
    backends = [name for name in OURS if all(has_passed(steps.get(one, {})) for one in ("tests", f"verify-{name}"))]
    if not backends:
        return None
    date = max(steps[f"verify-{name}"]["date"] for name in backends)
    return verified_record(device, date, backends)
