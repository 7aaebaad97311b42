"""Everything that needs a GPU, in one call: python -m benchmarks.gpu_check [--out folder] [--only tests,verify].

Builds _C_cuda where there is none, runs the GPU tests, compute-sanitizer, `verify` and the benchmarks. Writes
check.json, with what was verified, and one file per benchmark: six in all, in benchmarks/results/<device>/.
A later call with --only repeats some of the steps; check.json keeps the others with their dates.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import torch

from fused_resnet import provenance, timing

PYTHON = sys.executable
CLI = (PYTHON, "-m", "fused_resnet")
OURS = ("cuda", "triton")
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class Result(NamedTuple):
    """outcome: PASSED, FAILED or NOT_RUN; detail: the closing line, or why not."""

    outcome: str
    detail: str


class Step(NamedTuple):
    """One step: its name, its limit in seconds, and what it does within the seconds it is given."""

    name: str
    limit_s: float
    run: Callable[[float], Result]


def main() -> int:
    options = parse_arguments()
    if not torch.cuda.is_available():
        print("gpu-check: needs a CUDA GPU and a CUDA build of torch; this torch sees none.", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    out = options.out or provenance.ROOT / "benchmarks" / "results" / device.lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    steps = all_steps(out, options.model, options.problems)
    unknown = set(options.only or ()) - {step.name for step in steps}
    if unknown:
        known = ", ".join(step.name for step in steps)
        print(f"gpu-check: unknown step {', '.join(sorted(unknown))}; known ones are {known}.", file=sys.stderr)
        return 2
    chosen = [step for step in steps if options.only is None or step.name in options.only]
    record = run_steps(chosen, out / "check.json", device, options.budget)
    print(f"\nrecords in {out}: {', '.join(sorted(file.name for file in out.glob('*.json')))}")
    return 1 if any(record["steps"][step.name]["outcome"] == FAILED for step in chosen) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    parser.add_argument("--only", type=lambda text: text.split(","), default=None, help="steps, separated by commas")
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all (default: 1500)")
    parser.add_argument("--problems", type=int, default=300, help="random problems per backend (default: 300)")
    parser.add_argument("--model", default="resnet50", help="what the benchmarks measure (default: resnet50)")
    return parser.parse_args()


def all_steps(out: Path, model: str, problems: int) -> list[Step]:
    def bench(name: str, limit_s: float, *arguments: str) -> Step:
        file = str(out / f"{name}.json")
        command = (*CLI, "bench", *arguments, "--model", model, "--device", "cuda", "--out", file)
        return Step(name, limit_s, lambda seconds: execute(command, seconds))

    def verified_by_random_problems(name: str) -> Step:
        return Step(f"verify-{name}", 300, lambda seconds: verify(name, problems, seconds))

    chosen = [argument for name in ("auto", *OURS) for argument in ("--backend", name)]
    return [
        Step("build", 400, build),
        Step("tests", 500, lambda seconds: execute(test_command(), seconds)),
        Step("sanitizer", 240, sanitize),
        *map(verified_by_random_problems, (*OURS, "cudnn", "eager")),
        bench("ops-fp16-b256", 240, "ops", "--dtype", "fp16", "--batch", "256", "--budget", "60"),
        bench("ops-fp16-b8", 240, "ops", "--dtype", "fp16", "--batch", "8", "--budget", "30"),
        bench("ops-fp32-b32", 240, "ops", "--dtype", "fp32", "--batch", "32", "--budget", "30"),
        bench("blocks", 240, "blocks", "--dtype", "fp16", "--batch", "32", "--budget", "20"),
        bench("model", 500, "model", "--dtype", "fp32,fp16", "--batch", "1,32,256", "--budget", "60", *chosen),
    ]


# -------------------------------------------------------------------------------------------------------------- steps


def run_steps(steps: list[Step], file: Path, device: str, budget_s: float) -> dict[str, Any]:
    """Run the steps one after the other, and keep check.json up to date after each."""
    record = json.loads(file.read_text()) if file.exists() else {"kind": "gpu-check", "steps": {}}
    deadline = time.monotonic() + budget_s
    for step in steps:
        remaining = deadline - time.monotonic()
        print(f"\n=== {step.name}", flush=True)
        started = time.monotonic()
        result = step.run(min(step.limit_s, remaining)) if remaining > 1 else Result(NOT_RUN, "out of time")
        print(f"=== {step.name}: {result.outcome} ({result.detail})", flush=True)
        record["steps"][step.name] = {
            **result._asdict(),
            "seconds": round(time.monotonic() - started, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "sources": source_digest(),
        }
        record["device"] = device
        record["environment"] = timing.environment("cuda" if torch.cuda.is_available() else "cpu")
        record["verified"] = verified(record["steps"], device)
        timing.write_json(file, record)
    return record


def verified(steps: dict[str, dict], device: str) -> Optional[dict[str, Any]]:
    """The provenance record of those backends that passed on the sources as they are now, or None."""

    def passed(name: str) -> bool:
        step = steps.get(name, {})
        return step.get("outcome") == PASSED and step.get("sources") == source_digest()

    backends = [name for name in OURS if passed("tests") and passed(f"verify-{name}")]
    if not backends:
        return None
    date = max(steps[f"verify-{name}"]["date"] for name in backends)
    return provenance.verified_record(device, date, backends)


def source_digest() -> str:
    return hashlib.sha256(json.dumps(provenance.digests(), sort_keys=True).encode()).hexdigest()[:16]


def execute(command: tuple[str, ...], limit_s: float, **environment: str) -> Result:
    """Run a command, its output shown as it comes. Passed is exit code 0."""
    result, _ = executed(command, limit_s, **environment)
    return result


def executed(command: tuple[str, ...], limit_s: float, **environment: str) -> tuple[Result, str]:
    """The result and everything the command printed, stderr included."""
    lines: list[str] = []
    started = time.monotonic()
    with subprocess.Popen(
        ("timeout", f"{limit_s:.0f}", *command), cwd=provenance.ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, **environment},
    ) as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    output = "".join(lines)
    if process.returncode == 124 and time.monotonic() - started >= limit_s - 1:
        return Result(FAILED, f"stopped after {limit_s:.0f} s"), output
    closing = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return Result(PASSED if process.returncode == 0 else FAILED, closing), output


def build(limit_s: float) -> Result:
    """The library that is there, when it loads; else a new one, when there is a compiler for it."""
    load = (PYTHON, "-c", "import sys; from fused_resnet import extension; sys.exit(extension.load('cuda'))")
    result = execute(load, limit_s)
    if result.outcome == PASSED:
        return Result(PASSED, "the library that was there loads")
    command = (PYTHON, "setup.py", "build_ext", "--inplace")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        return Result(NOT_RUN, f"{result.detail}; and there is no nvcc to build it with")
    built = execute(command, limit_s, FUSED_RESNET_CUDA="1")
    if built.outcome == FAILED:
        return built
    loaded = execute(load, limit_s)
    return loaded if loaded.outcome == FAILED else Result(PASSED, "built, and it loads")


def test_command() -> tuple[str, ...]:
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    return (PYTHON, "-m", "pytest", "tests", "-k", "(cuda or gpu or triton) and not aot", *workers)


def verify(backend: str, problems: int, limit_s: float) -> Result:
    return execute((*CLI, "verify", "--device", "cuda", "--backend", backend, "--problems", str(problems)), limit_s)


def sanitize(limit_s: float) -> Result:
    """memcheck over a few problems of our kernels; NOT_RUN where the tool is missing or cannot attach to the GPU."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return Result(NOT_RUN, "compute-sanitizer is not installed")
    backends = [argument for name in OURS for argument in ("--backend", name)]
    command = (*CLI, "verify", "--device", "cuda", "--problems", "8", *backends)
    memcheck = (tool, "--tool", "memcheck", "--error-exitcode", "9", *command)
    # torch's allocator hands out parts of large blocks, inside which an overrun would go unseen
    return judge_sanitizer(*executed(memcheck, limit_s, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def judge_sanitizer(result: Result, output: str) -> Result:
    summaries = [line.strip() for line in output.splitlines() if "ERROR SUMMARY" in line]
    if not summaries:
        return Result(NOT_RUN, f"compute-sanitizer did not come to a summary: {result.detail}")
    return Result(result.outcome, summaries[-1])


if __name__ == "__main__":
    sys.exit(main())
