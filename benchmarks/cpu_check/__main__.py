"""Everything that shows the CPU engine right and how fast it is: python -m benchmarks.cpu_check [--out folder].

Correctness first: random convolutions by every micro-kernel that runs here, random small networks, all kernels under
sanitizers, many threads on one frozen model, accuracy with real weights. Then memory and the first freeze, and the
tables against other libraries.

Each step is a process group of its own. Writes check.json after each, beside it log.txt and a record for each step, in
benchmarks/results/<processor>/.

--budget says how many seconds the call may take. A later call goes on: --only names steps, "rest" those that have not
passed on these sources. Tables go on with the rows that they have. --evidence is what a record needs that others rely
on: 20,000 convolutions, 2,000 networks and ten minutes of many threads. It takes hours.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

from benchmarks.cpu_check import accuracy, sanitizers
from benchmarks.gpu_check.budget import Step, chosen, run_steps
from benchmarks.gpu_check.isolated import FAILED, NOT_RUN, PASSED, Result, execute
from fused_resnet.kernels import compiled, sources
from fused_resnet.machine import devices
from fused_resnet.regions import kernels

PYTHON = sys.executable
PATIENCE_S = 900.0  # for the row or the part that was begun last


class Setup(NamedTuple):
    """What the steps of one call share."""

    out: Path
    problems: int
    networks: int
    sanitized: int
    soak_s: float
    row_s: float

    @property
    def log(self) -> Path:
        return self.out / "log.txt"


def all_steps(setup: Setup) -> list[Step]:
    """In the order in which they run: what is wrong makes what is fast uninteresting."""

    def script(name: str, needs_s: float, limit_s: float, *arguments: str) -> Step:
        command = (PYTHON, "-m", *arguments)
        return Step(name, needs_s, limit_s, 0, lambda seconds: execute(command, seconds, setup.log))

    def script_that_stops(name: str, needs_s: float, share: float, *arguments: str) -> Step:
        """By itself: what it has begun by then, a part or a row, it ends."""

        def run(seconds: float) -> Result:
            command = (PYTHON, "-m", *arguments, "--stop-after", str(seconds))
            return execute(command, seconds + PATIENCE_S, setup.log)

        return Step(name, needs_s, math.inf, share, run)

    def randomly(kind: str, count: int, per_part: int) -> Step:
        size = ("--problems", str(count), "--per-part", str(min(count, per_part)))
        file = str(setup.out / f"random_{kind}.json")
        module = ("benchmarks.random_problems", "--device", "cpu", "--kind", kind)
        return script_that_stops(kind, 20, 0, *module, *size, "--out", file)

    def table(name: str, threads: int, share: float) -> Step:
        file, one = (setup.out / f"{name}_{n}_thread{'s' * (n > 1)}.json" for n in (threads, 1))
        arguments = ["--threads", str(threads), "--budget", str(setup.row_s), "--resume", "--out", str(file)]
        if threads > 1:
            arguments += ["--one-thread", str(one)]
        step = script_that_stops(f"{name}-{threads}", 60, share, "benchmarks.cpu_check.tables", name, *arguments)
        return step if threads <= cores() else step._replace(needs_s=0, run=lambda seconds: too_few_cores(threads))

    soak = ("benchmarks.cpu_check.soak", "--seconds", str(setup.soak_s), "--out", str(setup.out / "soak.json"))
    accuracy_step = script_that_stops("accuracy", 60, 0, "benchmarks.cpu_check.accuracy", "--resume",
                                      "--out", str(setup.out / "accuracy.json"))  # fmt: skip
    footprint = ("benchmarks.cpu_check.footprint", "--out", str(setup.out / "footprint.json"))
    return [
        script("environment", 5, 120, "fused_resnet", "info", "--json"),
        Step("kernels", 0, 60, 0, lambda seconds: kernels_here()),
        randomly("regions", setup.problems, 500),
        randomly("networks", setup.networks, 50),
        Step("sanitizers", 300, 7200, 0, lambda seconds: under_sanitizers(setup, seconds)),
        script("soak", setup.soak_s + 60, setup.soak_s + 600, *soak),
        accuracy_step._replace(run=lambda seconds: why_no_accuracy() or accuracy_step.run(seconds)),
        script("footprint", 30, 600, *footprint),
        table("resnet50", 1, 1),
        table("resnet50", 2, 1),
        table("networks", 1, 4),
        table("int8", 1, 2),
    ]


def kernels_here() -> Result:
    """Which micro-kernels run here, and why no others."""
    table = kernels.table()
    if not table:
        return Result(FAILED, f"none: {compiled.load('cpu')}")
    ran = [kernel.name for kernel in table if not kernel.why_not]
    missing = [f"{kernel.name}: {kernel.why_not}" for kernel in table if kernel.why_not]
    return Result(PASSED, "; ".join([", ".join(ran), *missing]))


def under_sanitizers(setup: Setup, limit_s: float) -> Result:
    missing = [why for name in sanitizers.SANITIZERS if (why := sanitizers.why_not(name)) is not None]
    if len(missing) == len(sanitizers.SANITIZERS):
        return Result(NOT_RUN, "; ".join(missing))
    options = ("--problems", str(setup.sanitized), "--out", str(setup.out / "sanitizers.json"))
    return execute((PYTHON, "-m", "benchmarks.cpu_check.sanitizers", *options), limit_s, setup.log)


def why_no_accuracy() -> Optional[Result]:
    """What is not there of every network's trained weights and labelled images, if so much is missing."""
    missing = {network.why_not() for network in accuracy.NETWORKS.values()}
    return None if None in missing else Result(NOT_RUN, "; ".join(sorted(filter(None, missing))))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def too_few_cores(threads: int) -> Result:
    return Result(NOT_RUN, f"it needs {threads} processors, and this process may use {cores()}")


def folder_of(name: str, flags: Sequence[str]) -> str:
    """Where the records of a processor lie: its name, and the instructions that decide how fast it multiplies."""
    words = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    best = next((word for flag, word in _INSTRUCTIONS.items() if flag in flags), "portable")
    return "-".join([*re.findall(r"[\w.]+", words), best])


_INSTRUCTIONS = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2"}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse_arguments(arguments)
    name = devices.device_name("cpu")
    out = options.out or sources.ROOT / "benchmarks" / "results" / folder_of(name, devices.cpu_flags())
    out.mkdir(parents=True, exist_ok=True)
    setup = Setup(out, options.problems, options.networks, options.sanitized, options.soak, options.row)
    steps, file = all_steps(setup), out / "check.json"
    unknown = set(options.only or ()) - {"rest", *(step.name for step in steps)}
    if unknown:
        known = ", ".join(step.name for step in steps)
        print(f"cpu-check: unknown step {', '.join(sorted(unknown))}; known ones are rest, {known}.", file=sys.stderr)
        return 2
    done = run_steps(chosen(steps, options.only, file), file, name, options.budget, "cpu-check")
    print(f"\nrecords in {out}: {', '.join(sorted(file.name for file in out.iterdir() if file.is_file()))}")
    for name, step in done.items():
        print(f"  {name:14} {step['outcome']:8} {step['seconds']:6.0f} s  {step['detail'][:200]}")
    return 1 if any(step["outcome"] == FAILED for step in done.values()) else 0


def parse_arguments(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--evidence", action="store_true", help="as much of everything as a record needs")
    evidence = parser.parse_known_args(arguments)[0].evidence
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<processor>")
    parser.add_argument("--only", type=lambda text: text.split(","), default=None,
                        help='steps, separated by commas; "rest": those that have not passed yet')  # fmt: skip
    for option, little, much, text in (
        ("--budget", 1500.0, 6 * 3600.0, "seconds in all"),
        ("--problems", 300, 20_000, "random convolutions"),
        ("--networks", 50, 2_000, "random networks"),
        ("--sanitized", 30, 300, "random problems of each kind under sanitizers"),
        ("--soak", 10.0, 600.0, "seconds of many threads"),
        ("--row", 20.0, 40.0, "seconds of timing for each row of a table"),
    ):
        parser.add_argument(option, type=type(little), default=much if evidence else little,
                            help=f"{text} (default: {little:g}, {much:g} with --evidence)")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
