"""Breaks our kernels one line at a time, and counts what the emulator notices: python -m benchmarks.mutations

Mutants are drawn by seed: waits, commits, fences, barriers, counts, parities, descriptors, swizzles, masks, addresses.
They are edits of the PTX of Triton's and nvcc's kernels, and of csrc's CUDA source. "report" counts those that a report
gives away, "data" those whose output is wrong or unfinished. Nothing but the output tells of "data alone".

Left out, and another one drawn, is what does not compile or load. So are lines that no problem reaches (a trap in their
place goes unnoticed too) and edits of which ptxas makes the same machine code. Survivors are explained by hand in
results/mutations/reasons.json. Those that cannot be told from the kernel ("equivalent") are not counted in the rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional

from benchmarks import mutants, mutation_subjects
from benchmarks.mutants import Mutant
from benchmarks.mutation_subjects import Run, Subject
from fused_resnet.emulation import PtxError, cuda_launches
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from fused_resnet.kernels.triton import runtime
from fused_resnet.machine import devices, files

RESULTS = Path(__file__).parent / "results" / "mutations"
_MOST_STEPS = 3_000_000  # warp instructions, beyond which a mutant counts as hanging
_WAYS = tuple(zip(itertools.cycle(LANDINGS), SCHEDULES))
_COUNTED = ("mutants", "killed", "report", "data", "data_alone", "refused", "unreached", "same_code")


class Verdict(NamedTuple):
    reports: list[str]
    is_wrong: bool

    @property
    def is_killed(self) -> bool:
        return bool(self.reports) or self.is_wrong


def tried(subject: Subject, ptx: str, seed: int) -> Optional[Verdict]:
    """Until something is noticed. None where it does not load."""
    for run, (landing, schedule) in _turns(subject):
        how = dict(landing=landing, schedule=schedule, seed=seed, max_steps=_MOST_STEPS)
        try:
            is_right, reports = run(ptx, how)
        except (PtxError, RuntimeError, StopIteration):
            return None
        if reports or not is_right:
            return Verdict(reports, not is_right)
    return Verdict([], False)


def _turns(subject: Subject) -> Iterator[tuple[Run, tuple[str, str]]]:
    """Each problem in each way, and each of the sweep in one."""
    yield from ((run, way) for way, run in itertools.product(_WAYS, subject.runs))
    yield from zip(subject.sweep, itertools.cycle(_WAYS))


def is_reached(subject: Subject, mutant: Mutant, seed: int, known: Optional[dict[tuple, bool]] = None) -> bool:
    """Whether any problem executes the line of PTX that was changed; True of source, of which this cannot be told.

    known: what was found before, by basic block and guard.
    """
    if subject.mutants is not mutants.mutants_of_ptx:
        return True
    lines, known = subject.text.split("\n"), {} if known is None else known
    guard = re.match(r"\s*(@!?%p\d+\s+)", lines[mutant.line - 1])
    found = _first_of_block(lines, mutant.line - 1), guard[1] if guard and mutant.kind != "guard turned" else ""
    if found not in known:
        lines.insert(mutant.line - 1, f"{found[1]}trap;")
        verdict = tried(subject, "\n".join(lines), seed)
        known[found] = verdict is None or verdict.is_killed
    return known[found]


def _first_of_block(lines: list[str], line: int) -> int:
    """Compilers write a predicate once, so that a guard means the same all through a block."""
    while line > 0 and not re.match(r"\s*(\$?[\w$]+:|@!?%p\d+\s+bra|bra|ret)", lines[line - 1]):
        line -= 1
    return line


def machine_code(ptx: str, arch: int) -> Optional[bytes]:
    """What ptxas makes of it; None where there is none, or where it refuses."""
    ptxas = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if ptxas is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        target = re.search(r"\.target\s+(sm_\w+)", ptx)
        command = [ptxas, f"-arch={target[1] if target else f'sm_{arch}'}", source, "-o", made]
        done = subprocess.run(list(map(str, command)), capture_output=True)
        return made.read_bytes() if done.returncode == 0 else None


def verdict_of(
    subject: Subject, mutant: Mutant, seed: int, known: Optional[dict[tuple, bool]] = None
) -> "str | Verdict":
    """Or why the mutant counts for nothing: one of the last names of _COUNTED."""
    try:
        ptx = subject.ptx(mutant.text)
    except RuntimeError:
        return "refused"
    stock = subject.ptx(subject.text)
    if ptx == stock:
        return "same_code"
    if not is_reached(subject, mutant, seed, known):
        return "unreached"
    verdict = tried(subject, ptx, seed)
    if verdict is None:
        return "refused"
    if verdict.is_killed:
        return verdict
    code = machine_code(ptx, subject.arch)
    return "same_code" if code is not None and code == machine_code(stock, subject.arch) else verdict


def campaign(subject: Subject, count: int, seed: int) -> dict[str, Any]:
    """So many mutants that count, or as many as there are."""
    whole = tried(subject, subject.ptx(subject.text), seed)
    if whole is None or whole.is_killed:
        raise SystemExit(f"mutations: {subject.name} is not right to begin with: {whole}")
    row: dict[str, Any] = dict(subject=subject.name, problems=len(subject.runs) + len(subject.sweep),
                               **dict.fromkeys(_COUNTED, 0), kinds={}, survivors=[])  # fmt: skip
    reached: dict[tuple, bool] = {}
    for mutant in mutants.drawn(subject.mutants(subject.text), f"{seed}/{subject.name}"):
        if row["mutants"] == count:
            break
        verdict = verdict_of(subject, mutant, seed, reached)
        if isinstance(verdict, str):
            row[verdict] += 1
            continue
        kind = row["kinds"].setdefault(mutant.kind, [0, 0])
        row["mutants"] += 1
        kind[1] += 1
        row["killed"] += verdict.is_killed
        kind[0] += verdict.is_killed
        row["report"] += bool(verdict.reports)
        row["data"] += verdict.is_wrong
        row["data_alone"] += verdict.is_wrong and not verdict.reports
        if not verdict.is_killed:
            row["survivors"].append(dict(kind=mutant.kind, line=mutant.line, where=mutant.where))
    return row


# -------------------------------------------------------------------------------------------------------- explanations


def key(subject: str, survivor: dict[str, Any]) -> tuple:
    return subject, survivor["kind"], survivor["line"], survivor["where"]


def reasons(file: Path = RESULTS / "reasons.json") -> dict[tuple, dict[str, Any]]:
    """By `key`, what was written about survivors: why, and whether they are equivalent to the kernel."""
    if not file.exists():
        return {}
    return {key(one["subject"], one): one for one in json.loads(file.read_text())["reasons"]}


def kill_rate(record: dict[str, Any], known: dict[tuple, dict[str, Any]]) -> float:
    """Among the mutants that are not known for equivalent."""
    survivors = [key(row["subject"], one) for row in record["rows"] for one in row["survivors"]]
    equivalent = sum(one in known and known[one]["equivalent"] for one in survivors)
    return sum(row["killed"] for row in record["rows"]) / (sum(row["mutants"] for row in record["rows"]) - equivalent)


def main() -> int:
    makers = ["triton", "cuda", "source"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=makers, choices=makers)
    parser.add_argument("--mutants", type=int, default=40, help="of each kernel (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = dict(
        what="mutants that the emulator notices", seed=options.seed, machine=devices.cpu_name(),
        triton=runtime.triton_version(), nvcc=cuda_launches.nvcc_version(), rows=[],
    )  # fmt: skip
    columns = ("subject", *_COUNTED)
    print("| " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("| --- " * len(columns) + "|", flush=True)
    for subject in mutation_subjects.of_names(options.only):
        row = campaign(subject, options.mutants, options.seed)
        record["rows"].append(row)
        print("| " + " | ".join(str(row[name]) for name in columns) + " |", flush=True)
        if options.out:
            files.write_json(options.out, record)
    known = reasons()
    print(f"killed: {kill_rate(record, known):.1%} of those not known for equivalent")
    for row in record["rows"]:
        for one in row["survivors"]:
            why = known.get(key(row["subject"], one), {}).get("reason", "NOT EXPLAINED")
            print(f"survives: {row['subject']}: {one['kind']}, line {one['line']}: {one['where']}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
