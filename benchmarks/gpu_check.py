"""Everything that needs a GPU, in one call: python -m benchmarks.gpu_check [--out folder] [--only tests,ops].

Builds _C_cuda where there is none, then by value: a smoke test, the GPU tests, `verify`, compute-sanitizer, the tuner,
the benchmarks. Each step is a process group of its own, so that one that crashes or hangs costs only itself. Writes
check.json, with what was verified, after each step, beside log.txt, the tuner's configs.json and journal.jsonl, and one
file per benchmark: eight in all, in benchmarks/results/<device>/.

--budget says how many seconds the call may take. A later call goes on: --only names steps, "rest" those that have not
passed on these sources. check.json keeps the others with their dates. The tuner and the benchmarks go on in their
files, on another machine too where the results' folder was brought along.
--device cpu runs what a CPU can of it, to try the whole out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch

from benchmarks.isolated import CLOSING_CHARACTERS, FAILED, NOT_RUN, PASSED, Result, execute, executed
from fused_resnet.backends import winners as tuning
from fused_resnet.backends import winners_file
from fused_resnet.kernels import compiled
from fused_resnet.kernels import sources as provenance
from fused_resnet.machine import devices
from fused_resnet.measuring import Record
from fused_resnet.measuring.environment import environment as environment_of
from fused_resnet.tuning import tuner

PYTHON = sys.executable
CLI = (PYTHON, "-m", "fused_resnet")
OURS = ("cuda", "triton")
NEEDED = ("click", "rich", "platformdirs", "filelock", "pytest", "xdist", "hypothesis", "expecttest", "numpy", "PIL")
# The tuner's: time is split among the first, until so much is left, of which a quarter may go into starting.
_ATTEMPTS, _ATTEMPT_S = 5, 120.0


class Step(NamedTuple):
    """One step.

    needs_s: it is given at least so many seconds, and not begun with fewer. limit_s: at most so many. share: 0 for what
    takes as long as it takes. Otherwise its weight when what is left is divided among it and the steps after it. run:
    does it within the seconds it is given.
    """

    name: str
    needs_s: float
    limit_s: float
    share: float
    run: Callable[[float], Result]


def main() -> int:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: needs a CUDA GPU and a CUDA build of torch; this torch sees none.", file=sys.stderr)
        return 2
    device = devices.device_name(options.device)
    out = options.out or provenance.ROOT / "benchmarks" / "results" / device.lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "check.json"
    setup = Setup(out, options.device, options.model, options.problems, options.configs)
    bring_back(setup)
    steps = all_steps(setup)
    unknown = set(options.only or ()) - {"rest", *(step.name for step in steps)}
    if unknown:
        known = ", ".join(step.name for step in steps)
        print(f"gpu-check: unknown step {', '.join(sorted(unknown))}; known ones are rest, {known}.", file=sys.stderr)
        return 2
    done = run_steps(chosen(steps, options.only, file), file, device, options.budget)
    print(f"\nrecords in {out}: {', '.join(sorted(file.name for file in out.iterdir() if file.is_file()))}")
    for name, step in done.items():
        print(f"  {name:18} {step['outcome']:8} {step['seconds']:6.0f} s  {step['detail'][:100]}")
    return 1 if any(step["outcome"] == FAILED for step in done.values()) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    parser.add_argument("--only", type=lambda text: text.split(","), default=None,
                        help='steps, separated by commas; "rest": those that have not passed yet')  # fmt: skip
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all (default: 1500)")
    parser.add_argument("--problems", type=int, default=300, help="random problems per backend (default: 300)")
    parser.add_argument("--model", default="resnet50", help="what the benchmarks measure (default: resnet50)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--configs", type=Path, default=None,
                        help="of the tuner's winners (default: fused_resnet/configs; on a CPU, OUT/tuned)")  # fmt: skip
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------- steps


class Setup(NamedTuple):
    """What the steps of one call share."""

    out: Path
    device: str
    model: str
    problems: int
    configs: Optional[Path]

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def winners(self) -> Optional[Path]:
        """The tuner's file for this device: where it ships, unless --configs says otherwise; on a CPU, in OUT."""
        name = tuning.device_id(self.device)
        ships = provenance.ROOT / "fused_resnet" / "configs"
        folder = self.configs or (ships if self.is_gpu else self.out / "tuned")
        return None if name is None else folder / winners_file.file_name(name)

    @property
    def kept(self) -> list[tuple[Path, Path]]:
        """(where the tuner and `auto` look for what is tuned, its copy in OUT), of the winners and of the journal."""
        found = [(tuner.journal_path(self.device), self.out / "journal.jsonl")]
        return found if self.winners is None else [*found, (self.winners, self.out / "configs.json")]


def bring_back(setup: Setup) -> None:
    """Put what an earlier call has tuned, perhaps on another machine, where it is looked for."""
    for place, copy in setup.kept:
        if copy.exists() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copy, place)


def all_steps(setup: Setup) -> list[Step]:
    """In the order in which they run: what later steps stand on first, then by value."""

    def bench(name: str, needs_s: float, limit_s: float, share: float, *arguments: str) -> Step:
        return Step(name, needs_s, limit_s, share, lambda seconds: benchmark(setup, name, arguments, seconds))

    def random_problems(name: str) -> Step:
        kind = ("--common",) if name in ("cudnn", "cublaslt") else ()  # they run too few of the others
        return Step(f"verify-{name}", 30, 200, 0, lambda seconds: verify(setup, name, setup.problems, seconds, *kind))

    if setup.is_gpu:
        smoked, large, batches, dtypes = OURS, "256", "256,32,128,8,1", "fp16,bf16"
        rivals_verified = ("cudnn", "cublaslt", "eager")
    else:
        smoked, large, batches, dtypes = ("onednn", "eager"), "2", "2,1", "fp32"
        rivals_verified = ()
    frozen = [argument for name in (("auto", *OURS) if setup.is_gpu else ("auto",)) for argument in ("--backend", name)]
    rivals = ("--baseline", "compile", "--baseline", "cudnn")
    dtype = dtypes.split(",")[0]
    return [
        Step("environment", 45, 120, 0, lambda seconds: environment(setup, seconds)),
        Step("build", 5, 400, 0, lambda seconds: build(setup, seconds)),
        Step("smoke", 60, 200, 0, lambda seconds: smoke(setup, smoked, seconds)),
        Step("tests", 60, 300, 0, lambda seconds: gpu_tests(setup, seconds)),
        *map(random_problems, smoked),
        Step("sanitizer", 20, 100, 0, lambda seconds: sanitize(setup, seconds)),
        Step("tune", 90 * setup.is_gpu, 1200, 6, lambda seconds: tune(setup, batches, dtypes, seconds)),
        bench("ops", 60, 400, 5, "ops", "--batch", batches, "--dtype", dtypes),
        # a network's first row takes its compilation by torch.compile and a reference in fp64: with less time than
        # that nothing is written. How much that is on a GPU is a guess
        bench("model", 150, 400, 4, "model", "--batch", f"{large},1", "--dtype", dtypes, *rivals, *frozen),
        bench("autotune", 240, 500, 4, "model", "--batch", large, "--dtype", dtype, *rivals, "--baseline", "autotune",
              "--baseline", "tensorrt"),
        bench("blocks", 60, 200, 1, "blocks", "--batch", large, "--dtype", dtype, *rivals),
        *map(random_problems, rivals_verified),
        Step("sanitizer-configs", 30, 100, 0, lambda seconds: sanitize_configs(setup, seconds)),
    ]  # fmt: skip


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
        print(f"gpu-check: {file.name} cannot be read and is begun anew ({error})", file=sys.stderr)
    return {}


def has_passed(step: dict[str, Any]) -> bool:
    return step.get("outcome") == PASSED and step.get("sources") == provenance.source_digest()


def run_steps(steps: Sequence[Step], file: Path, device: str, budget_s: float) -> dict[str, dict[str, Any]]:
    """Run the steps one after the other, and keep check.json up to date after each. Returns its steps."""
    done = read_steps(file)
    deadline = time.monotonic() + budget_s
    for index, step in enumerate(steps):
        left_s = deadline - time.monotonic()
        given_s = given(step, steps[index + 1 :], left_s)
        print(f"\n=== {index + 1}/{len(steps)} {step.name}: {given_s:.0f} s of the {left_s:.0f} s left", flush=True)
        started = time.monotonic()
        result = run_step(step, given_s)
        print(f"=== {step.name}: {result.outcome} ({result.detail})", flush=True)
        done[step.name] = {
            **result._asdict(),
            "seconds": round(time.monotonic() - started, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "sources": provenance.source_digest(),
        }
        environment = environment_of("cuda" if torch.cuda.is_available() else "cpu")
        more = {"steps": done, "verified": verified(done, device)}
        Record("gpu-check", device, None, environment, more=more).write(file)
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
    return provenance.verified_record(device, date, backends)


# ------------------------------------------------------------------------------------------------- what the steps do


def environment(setup: Setup, limit_s: float) -> Result:
    """What is here: kept whole in the log, and what is missing in the result."""
    result = execute((*CLI, "info", "--json"), limit_s, setup.log)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return Result(FAILED, f"not installed: {', '.join(missing)}")
    return result if result.outcome == FAILED else Result(PASSED, "`info --json` is in log.txt")


def build(setup: Setup, limit_s: float) -> Result:
    """The library that is there, when it loads; else a new one, when there is a compiler for it."""
    if not setup.is_gpu:
        return Result(NOT_RUN, "it needs a CUDA build of torch")
    load = (PYTHON, "-c", "import sys; from benchmarks import gpu_check; sys.exit(gpu_check.why_not_this_library())")
    result = execute(load, limit_s, setup.log)
    if result.outcome == PASSED:
        return Result(PASSED, "the library that was there loads")
    command = (PYTHON, "setup.py", "build_ext", "--inplace")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        return Result(NOT_RUN, f"{result.detail}; and there is no nvcc to build it with")
    built = execute(command, limit_s, setup.log, FUSED_RESNET_CUDA="1")
    if built.outcome == FAILED:
        return built
    loaded = execute(load, limit_s, setup.log)
    return loaded if loaded.outcome == FAILED else Result(PASSED, "built, and it loads")


def why_not_this_library() -> Optional[str]:
    """Why _C_cuda cannot be what is verified and tuned here, or None. fused_resnet/_build.json, which lies beside it,
    says what it was compiled from."""
    built, sources = compiled.kernel_digest("cuda"), provenance.kernel_digest("cuda")
    why = compiled.load("cuda")
    if why is None and built != sources:
        why = f"_C_cuda was compiled from kernels {built} by _build.json, these are {sources}"
    return why


def smoke(setup: Setup, backends: Sequence[str], limit_s: float) -> Result:
    """A few random problems on each backend, each in a process of its own."""
    results = {name: verify(setup, name, 2, limit_s / len(backends)) for name in backends}
    broken = [f"{name}: {result.detail}" for name, result in results.items() if result.outcome != PASSED]
    return Result(FAILED, "; ".join(broken)) if broken else Result(PASSED, f"{', '.join(backends)} ran")


def verify(setup: Setup, backend: str, problems: int, limit_s: float, *kind: str) -> Result:
    """Random problems against the reference, on a GPU in several processes: most of the time goes into compiling."""
    workers = min(8, max(1, (os.cpu_count() or 1) // 2), problems) if setup.is_gpu else 1

    def part(seed: int) -> Result:
        command = (*CLI, "verify", "--device", setup.device, "--backend", backend, "--seed", str(seed),
                   "--problems", str(-(-problems // workers)), *kind)  # fmt: skip
        result, output = executed(command, limit_s, setup.log, OMP_NUM_THREADS="2")
        is_idle = result.outcome == FAILED and "could not run any of these problems" in output
        is_excused = is_idle and backend not in OURS and "MISMATCH" not in output
        return result._replace(outcome=NOT_RUN) if is_excused else result

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(part, range(workers)))
    broken = [f"seed {seed}: {result.detail}" for seed, result in enumerate(results) if result.outcome == FAILED]
    if broken:
        return Result(FAILED, "; ".join(broken))
    return next((result for result in results if result.outcome == PASSED), results[0])


def gpu_tests(setup: Setup, limit_s: float) -> Result:
    if not setup.is_gpu:
        return Result(NOT_RUN, "they need a GPU")
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    # cuDNN is no kernel of ours, and has a step of its own; without addopts, or pytest would ask for pytest-benchmark
    command = (PYTHON, "-m", "pytest", "tests", "-q", *workers, "-o", "faulthandler_timeout=120", "-o", "addopts=",
               "-k", "(cuda or gpu or triton) and not (aot or gpu_check or cudnn)")  # fmt: skip
    return execute(command, limit_s, setup.log)


def sanitize(setup: Setup, limit_s: float) -> Result:
    """memcheck over a few problems of our kernels."""
    backends = [argument for name in OURS for argument in ("--backend", name)]
    return memcheck(setup, limit_s, *CLI, "verify", "--device", "cuda", "--problems", "8", *backends)


def sanitize_configs(setup: Setup, limit_s: float) -> Result:
    """memcheck over every config that the tuner has kept, each once."""
    if not (setup.out / "configs.json").exists():
        return Result(NOT_RUN, "nothing is tuned")
    return memcheck(setup, limit_s, PYTHON, "-m", "benchmarks.run_configs", str(setup.out / "configs.json"))


def memcheck(setup: Setup, limit_s: float, *command: str) -> Result:
    """A command under compute-sanitizer; NOT_RUN where that is missing or cannot attach to the GPU."""
    if not setup.is_gpu:
        return Result(NOT_RUN, "it needs a GPU")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return Result(NOT_RUN, "compute-sanitizer is not installed")
    # torch and Triton ask the driver for functions that it may lack, which would be counted as errors
    checked = (tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", *command)
    # torch's allocator hands out parts of large blocks, inside which an overrun would go unseen
    return judge_sanitizer(*executed(checked, limit_s, setup.log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def judge_sanitizer(result: Result, output: str) -> Result:
    summaries = [line.strip() for line in output.splitlines() if "ERROR SUMMARY" in line]
    if not summaries:
        return Result(NOT_RUN, f"compute-sanitizer did not come to a summary: {result.detail}")
    return Result(result.outcome, summaries[-1])


def tune(setup: Setup, batches: str, dtypes: str, limit_s: float) -> Result:
    """The tuner goes on where it stopped; its winners come back as configs.json, and all else it has found out as
    journal.jsonl.

    Several attempts, each with half of what is left: a candidate that leaves the GPU unusable, or hangs, ends its
    process, is recorded, and the next attempt goes on after it.
    """
    winners = setup.winners
    if winners is None:
        return Result(FAILED, "GPUs of different kinds are visible")
    command = (*CLI, "tune", "--device", setup.device, "--model", setup.model, "--batch", batches, "--dtype", dtypes,
               "--configs", str(winners.parent), "--budget-minutes")  # fmt: skip
    deadline = time.monotonic() + limit_s
    result = Result(NOT_RUN, "there was no time")
    for _ in range(_ATTEMPTS):
        left_s = deadline - time.monotonic()
        if left_s < _ATTEMPT_S / 4:
            break
        given_s = left_s / 2 if left_s > _ATTEMPT_S else left_s
        result, output = executed((*command, f"{0.85 * given_s / 60:.2f}"), given_s, setup.log)
        unfinished = re.search(r"\d+ convolutions are left", output)
        if result.outcome == PASSED and unfinished is None:
            break
        if result.outcome == PASSED:
            result = Result(NOT_RUN, f"the time was up: {unfinished.group()}; --only tune goes on")
    for place, copy in setup.kept:
        if place.exists():
            shutil.copyfile(place, copy)
    return result


def benchmark(setup: Setup, name: str, arguments: Sequence[str], limit_s: float) -> Result:
    """One `bench` command into <name>.json. It goes on with a file of the same measurement, and replaces another's."""
    file = setup.out / f"{name}.json"
    rounds_s = min(60.0, 0.4 * limit_s)
    command = (*CLI, "bench", *arguments, "--model", setup.model, "--device", setup.device, "--out", str(file),
               "--budget", f"{rounds_s:.0f}", "--stop-after", f"{0.75 * limit_s:.0f}")  # fmt: skip
    resumed, output = executed((*command, "--resume"), limit_s, setup.log)
    if resumed.outcome == FAILED and "--resume:" in output:
        resumed = execute(command, limit_s, setup.log)
    if not file.exists():
        return resumed
    left = json.loads(file.read_text()).get("left", [])
    if left and resumed.outcome == PASSED:
        return Result(NOT_RUN, f"the time was up: {len(left)} left, {left[0]} the first; --only {name} goes on")
    return resumed


if __name__ == "__main__":
    sys.exit(main())
