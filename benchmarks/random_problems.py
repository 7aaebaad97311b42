"""Many random problems on every backend of this machine, in parts: `python -m benchmarks.random_problems`.

Each part is `fused-resnet verify` with a seed of its own in a process of its own. So a backend that ends the process
costs that part alone. Emulated kernels cannot, so all their parts are in this one. Finished parts are kept in --parts
and not run again; the record holds their sum.

Two kinds are the CPU engine's: "regions", convolutions by each of its micro-kernels, and "networks", small residual
networks as frozen plans. Their parts are those of the engine's sources as they are.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional, Sequence

import torch

from fused_resnet.machine import devices, files
from fused_resnet.measuring import Record

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "verify"
EMULATED = ("sm_80", "sm_89", "sm_90")
ENGINE = {"regions": "benchmarks.cpu_check.problems", "networks": "benchmarks.cpu_check.networks"}
QUANTIZED = ("int8", "float8_e4m3fn")
_OF_THE_ENGINE = ("csrc/cpu", "csrc/common", "fused_resnet", "benchmarks/cpu_check")


def run_part(file: Path, problems: int, seed: int, device: str, kind: str) -> Optional[int]:
    """Run one part into `file`. None, or the exit code of a process that ended without a report."""
    if device in EMULATED:
        _emulate_part(file, problems, seed, device, kind)
        return None
    command = (sys.executable, "-m", ENGINE.get(kind, "fused_resnet"))
    if kind not in ENGINE:
        drawn = {"random": (), **{one: ("--dtype", one) for one in QUANTIZED}}.get(kind, (f"--{kind}",))
        command += ("verify", "--device", device, "--json", *drawn)
    size = ("--problems", str(problems), "--seed", str(seed))
    # of bytes Triton's kernels run compiled, emulated
    compiled_alone = device.startswith("cuda") or kind in ENGINE or kind in QUANTIZED
    interpret = {} if compiled_alone else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        (*command, *size), cwd=ROOT, env={**os.environ, **interpret}, stdout=subprocess.PIPE, text=True
    )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return done.returncode
    files.write_json(file, report)
    return None


def _emulate_part(file: Path, problems: int, seed: int, arch: str, kind: str) -> None:
    """In this process, which compiles the CUDA kernels once for all parts."""
    from fused_resnet.emulation import verify as emulated

    if reason := emulated.why_not():
        raise SystemExit(f"random_problems: {reason}")
    kind = "any" if kind == "random" else kind
    files.write_json(file, emulated.verify(problems, seed, int(arch.removeprefix("sm_")), kind=kind).as_dict())


def part_file(folder: Path, problems: int, seed: int, device: str, kind: str) -> Path:
    """Where a finished part is kept. Of the engine's kinds, for these very sources and instructions."""
    name = f"{kind}_{problems}_{seed}_{device}.json"
    return folder / engine_digest() / name if kind in ENGINE else folder / name


@functools.lru_cache(maxsize=None)
def engine_digest() -> str:
    """One digest of what such a part depends on: the package, and the instructions that it may use here."""
    limits = [os.environ.get("FUSED_RESNET_CPU_ISA", ""), os.environ.get("ATEN_CPU_CAPABILITY", "")]
    digest = hashlib.sha256(" ".join(devices.cpu_flags() + limits).encode())
    for folder in _OF_THE_ENGINE:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".cpp", ".h", ".py"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of reports of `fused-resnet verify --json`: counts added, mismatches listed, the worst error kept."""
    backends: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, part in report["backends"].items():
            whole = backends.setdefault(
                name, {"ok": 0, "mismatches": [], "cannot_run": {}, "worst_error": 0.0, "worst_case": None}
            )
            whole["ok"] += part["ok"]
            for count in ("num_bytes", "num_differing") if part.get("num_bytes") else ():  # of int8
                whole[count] = whole.get(count, 0) + part[count]
            whole["mismatches"] += part["mismatches"]
            for reason, count in part["cannot_run"].items():
                whole["cannot_run"][reason] = whole["cannot_run"].get(reason, 0) + count
            if part["worst_error"] >= whole["worst_error"]:
                whole.update(worst_error=part["worst_error"], worst_case=part["worst_case"])
    return {
        "problems": sum(report["problems"] for report in reports),
        "seeds": [report["seed"] for report in reports],
        "kinds": [report["kind"] for report in reports],
        "passed": all(report["passed"] for report in reports),
        "backends": dict(sorted(backends.items())),
    }


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Exit code 0, or 1 when a result differs or a part ended without a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=20_000)
    parser.add_argument("--per-part", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2000, help="of the first part; the others count up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="or sm_80, sm_89, sm_90: the compiled kernels, in the PTX emulator")  # fmt: skip
    kinds = ("random", "common", "strided", *QUANTIZED, "mixed", *ENGINE)
    parser.add_argument("--kind", choices=kinds, default="random",
                        help="as `verify --common` and so on; mixed: random and common in turn")  # fmt: skip
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no part later, except the first")
    parser.add_argument("--parts", type=Path, default=ROOT / "out" / "random_problems")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: results/verify/KIND_problems.json; emulated, DEVICE_problems.json, of bytes DEVICE_KIND_...",
    )
    options = parser.parse_args(arguments)
    if options.problems < 1 or options.per_part < 1:
        parser.error(f"--problems and --per-part must be positive, got {options.problems} and {options.per_part}")
    if options.kind in ENGINE and options.device != "cpu":
        parser.error(f"the kind {options.kind} runs on the CPU, not on {options.device}")
    started = time.monotonic()
    ended: list[dict[str, int]] = []
    reports, left = [], 0
    for index, start in enumerate(range(0, options.problems, options.per_part)):
        problems, seed = min(options.per_part, options.problems - start), options.seed + index
        kind = ("random", "common")[index % 2] if options.kind == "mixed" else options.kind
        file = part_file(options.parts, problems, seed, options.device, kind)
        is_late = options.stop_after is not None and time.monotonic() - started >= options.stop_after
        if is_late and index and not file.exists():
            left += problems
            continue
        exit_code = None if file.exists() else run_part(file, problems, seed, options.device, kind)
        if exit_code is None:
            reports.append({**json.loads(file.read_text()), "kind": kind})
        else:
            ended.append({"seed": seed, "problems": problems, "exit_code": exit_code})
        print(f"{start + problems} of {options.problems}, {len(ended)} parts without a report", file=sys.stderr)
    found = {"per_part": options.per_part, **merged(reports), "ended_without_report": ended}
    found["passed"] = found["passed"] and not ended
    if left:
        found["left"] = left  # for want of time
    out = _write(options, found)
    unrun = f", {left} not run for want of time" if left else ""
    print(f"{out}: {found['problems']} problems{unrun}, {'passed' if found['passed'] else 'NOT passed'}")
    return 0 if found["passed"] else 1


def _write(options: argparse.Namespace, found: dict[str, Any]) -> Path:
    if options.device not in EMULATED:
        out = options.out or RECORDS / f"{options.kind}_problems.json"
        return Record.here("verify", options.device)._replace(more=found).write(out)
    name = f"{options.device}_{options.kind}" if options.kind in QUANTIZED else options.device
    out = options.out or RECORDS / f"{name}_problems.json"
    return Record.here("verify", "cpu")._replace(more={"emulated": options.device, **found}).write(out)


if __name__ == "__main__":
    sys.exit(main())
