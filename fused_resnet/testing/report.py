"""Many random cases on every backend, as a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Optional, Sequence, Union

from fused_resnet import backends
from fused_resnet.choosing.case import why_unusable
from fused_resnet.testing.compare import Outcome, check
from fused_resnet.testing.draw import case_at
from fused_resnet.testing.large import check_large, large_problems


@dataclass
class BackendReport:
    """One backend's counts. `cannot_run` counts problems by the reason given."""

    ok: int = 0
    mismatches: list[dict[str, str]] = field(default_factory=list)
    cannot_run: dict[str, int] = field(default_factory=dict)
    worst_error: float = 0.0
    worst_case: Optional[str] = None
    num_bytes: int = 0  # compared, of convolutions of bytes
    num_differing: int = 0


@dataclass
class Report:
    """What `verify` found on a device. A backend is named "operator/backend", an emulated kernel "maker/form"."""

    seed: int
    device: str
    problems: int = 0
    backends: dict[str, BackendReport] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not any(entry.mismatches for entry in self.backends.values())

    @property
    def counted_problems(self) -> str:
        return f"{self.problems} problem{'' if self.problems == 1 else 's'}"

    def add(self, name: str, outcome: Outcome, call: str, shown: Any) -> None:
        """Count an outcome. call: what repeats it; shown: the case, whose text the report keeps."""
        entry = self.backends.setdefault(name, BackendReport())
        entry.num_bytes += outcome.num_bytes
        entry.num_differing += outcome.num_differing
        if outcome.status == "cannot run":
            entry.cannot_run[outcome.detail] = entry.cannot_run.get(outcome.detail, 0) + 1
        elif outcome.status == "mismatch":
            entry.mismatches.append({"call": call, "problem": str(shown), "detail": outcome.detail})
        else:
            entry.ok += 1
            worst_error = outcome.worst_error or 0.0
            if worst_error >= entry.worst_error:
                entry.worst_error, entry.worst_case = worst_error, f"{call}: {shown}"

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for json.dumps."""
        return dict(asdict(self), passed=self.passed)

    def __str__(self) -> str:
        lines = [f"{self.counted_problems}, seed {self.seed}, {self.device}"]
        for name, entry in sorted(self.backends.items()):
            lines.append(
                f"{name}: {entry.ok} ok, {len(entry.mismatches)} mismatches, {sum(entry.cannot_run.values())} not run, "
                f"worst {entry.worst_error:.3f} of the bound"
            )
            lines.extend(f"  {found['call']}\n    {found['detail']}" for found in entry.mismatches)
        return "\n".join(lines)


def verify(
    problems: Union[int, range],
    seed: int = 0,
    device: str = "cpu",
    backends: Optional[Sequence[str]] = None,
    progress: Optional[Callable[[int], None]] = None,
    *,
    kind: str = "any",
    large: bool = False,
) -> Report:
    """Run random problems on every backend of their operator and compare each result with the reference.

    problems: how many, or which indices (so that processes can share the work). backends: names; default, all.
    progress: called with the index of each finished problem. kind: as `random_case`.
    large: also convolutions beyond 2**31 elements.
    """
    indices = range(problems) if isinstance(problems, int) else problems
    report = Report(seed, device)
    for index in indices:
        case = case_at(seed, index, device, kind=kind)
        for name in _asked_for(case.problem.op, backends):
            drawn = "" if kind == "any" else f", kind={kind!r}"
            call = f"check(case_at({seed}, {index}, {device!r}{drawn}), {name!r})"
            if not _goes_on(report, case, call, case.problem.op, check(case, name)):
                return report
        report.problems += 1
        if progress is not None:
            progress(index)
    for problem in large_problems(seed, device) if large else ():
        for name in _asked_for(problem.op, backends):
            call = f"check_large(parsed_problem({str(problem)!r}, {problem.device!r}), {name!r}, {device!r})"
            if not _goes_on(report, problem, call, problem.op, check_large(problem, name, device)):
                return report
        report.problems += 1
    return report


def known_backends(op: str) -> tuple[str, ...]:
    return tuple(backends.known(op))


def _asked_for(op: str, names: Optional[Sequence[str]]) -> list[str]:
    return [name for name in known_backends(op) if names is None or name in names]


def _goes_on(report: Report, shown: Any, call: str, op: str, outcome: Outcome) -> bool:
    """Record an outcome. False where the backend has left the device unusable, which is a mismatch too."""
    report.add(f"{op}/{outcome.backend}", outcome, call, shown)
    why = why_unusable(report.device)
    if why is not None:
        unusable = Outcome(outcome.backend, "mismatch", f"has left the device unusable: {why}")
        report.add(f"{op}/{outcome.backend}", unusable, call, shown)
    return why is None
