"""What gpu-check does, step by step: each a command or several, whose outcome it judges."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import torch

from benchmarks.gpu_check import read_bytes
from benchmarks.gpu_check.budget import OURS, Step
from benchmarks.gpu_check.isolated import FAILED, NOT_RUN, PASSED, Result, Watched, execute, executed
from fused_resnet.choosing import winners, winners_file
from fused_resnet.kernels import compiled, sources
from fused_resnet.tuning import tuner

PYTHON = sys.executable
CLI = (PYTHON, "-m", "fused_resnet")
NEEDED = ("click", "rich", "platformdirs", "filelock", "pytest", "xdist", "hypothesis", "expecttest", "numpy", "PIL")
# The tuner's: how often it is begun at most, with how many seconds at least a fourth time over, and how long its
# journal may stand still. It is written before and after each candidate
_ATTEMPTS, _ATTEMPT_S, _STANDSTILL_S = 5, 120.0, 180.0


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
        name = winners.device_id(self.device)
        ships = sources.ROOT / "fused_resnet" / "configs"
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
    """In the order in which they run: first what a first call of 540 s is for, then by value."""

    def bench(name: str, needs_s: float, limit_s: float, share: float, *arguments: str, part: int = 2) -> Step:
        return Step(name, needs_s, limit_s, share, lambda seconds: benchmark(setup, name, arguments, seconds), part)

    def random_problems(name: str) -> Step:
        kind = ("--common",) if name in ("cudnn", "cublaslt") else ()  # they run too few of the others
        return Step(f"verify-{name}", 30, 200, 0, lambda seconds: verify(setup, name, setup.problems, seconds, *kind))

    if setup.is_gpu:
        verified, large, batches, dtypes = OURS, "256", "256,32,128,8,1", "fp16,bf16"
        rivals_verified = ("cudnn", "cublaslt", "eager")
    else:
        verified, large, batches, dtypes = ("onednn", "eager"), "2", "2,1", "fp32"
        rivals_verified = ()
    frozen = [argument for name in (("auto", *OURS) if setup.is_gpu else ("auto",)) for argument in ("--backend", name)]
    rivals = ("--baseline", "compile", "--baseline", "cudnn")
    dtype = dtypes.split(",")[0]

    def sanitizer(kind: str, part: int = 2) -> Step:
        return Step(kind, 20, 100, 0, lambda seconds: sanitize_forms(setup, kind, seconds), part)

    first = [
        Step("environment", 45, 120, 0, lambda seconds: environment(setup, seconds), 1),
        Step("build", 5, 400, 0, lambda seconds: build(setup, seconds), 1),
        Step("forms", 60, 200, 0, lambda seconds: every_form(setup, seconds), 1),
        Step("golden", 15, 60, 0, lambda seconds: golden(setup, seconds), 1),
        sanitizer("racecheck", 1),
        # the tuner's first part: each convolution by every candidate, cuDNN by FIND among them; `tune` goes on with it
        Step("convs", 90 * setup.is_gpu, 200, 3, lambda seconds: tune(setup, large, dtype, seconds), 1),
        # a network's first row takes its compilation by torch.compile and a reference in fp64: with less time than
        # that nothing is written. How much that is on a GPU is a guess
        bench("model", 120, 400, 2, "model", "--batch", f"{large},1", "--dtype", dtypes, *rivals, *frozen, part=1),
        Step("read-bytes", 20, 60, 0, lambda seconds: read_bytes_of_cudnn(setup, seconds), 1),
        Step("nan-stays", 20, 60, 0, lambda seconds: nan_stays(setup, seconds), 1),
    ]
    return first + [
        Step("tune", 90 * setup.is_gpu, 1200, 6, lambda seconds: tune(setup, batches, dtypes, seconds)),
        Step("tests", 60, 300, 0, lambda seconds: gpu_tests(setup, seconds)),
        *map(random_problems, verified),
        bench("ops", 60, 400, 5, "ops", "--batch", batches, "--dtype", dtypes),
        Step("tune-live-bn", 90 * setup.is_gpu, 600, 2,
             lambda seconds: tune(setup, large, dtype, seconds, "--live-bn")),
        Step("sanitizer", 20, 100, 0, lambda seconds: sanitize(setup, seconds)),
        *map(sanitizer, ("synccheck", "initcheck")),
        bench("autotune", 240, 500, 4, "model", "--batch", large, "--dtype", dtype, *rivals, "--baseline", "autotune",
              "--baseline", "tensorrt"),
        bench("blocks", 60, 200, 1, "blocks", "--batch", large, "--dtype", dtype, *rivals),
        *map(random_problems, rivals_verified),
        Step("sanitizer-configs", 30, 100, 0, lambda seconds: sanitize_configs(setup, seconds)),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what the steps do


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
    load = (PYTHON, "-c", "import sys; from benchmarks.gpu_check import steps; sys.exit(steps.why_not_this_library())")
    result = execute(load, limit_s, setup.log)
    if result.outcome == PASSED:
        return Result(PASSED, "the library that was there loads")
    command = (PYTHON, "setup.py", "build_ext", "--inplace")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        return Result(NOT_RUN, f"{result.detail}; and there is no nvcc to build it with")
    built = execute(command, limit_s, setup.log, FUSED_RESNET_CUDA="1", **arch_of_this_gpu())
    if built.outcome == FAILED:
        return built
    loaded = execute(load, limit_s, setup.log)
    return loaded if loaded.outcome == FAILED else Result(PASSED, "built, and it loads")


def arch_of_this_gpu() -> dict[str, str]:
    """TORCH_CUDA_ARCH_LIST for it alone, which takes a sixth of the time of all; none where the caller has set one."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ or not torch.cuda.is_available():
        return {}
    return {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}


def why_not_this_library() -> Optional[str]:
    """Why _C_cuda cannot be what is verified and tuned here, or None. fused_resnet/_build.json, which lies beside it,
    says what it was compiled from."""
    built, wanted = compiled.built_digest(sources.CUDA), sources.kernel_digest(sources.CUDA)
    why = compiled.load("cuda")
    if why is None and built != wanted:
        why = f"_C_cuda was compiled from kernels {built} by _build.json, these are {wanted}"
    return why


def every_form(setup: Setup, limit_s: float) -> Result:
    """Each form of our kernels in each dtype, several at once, each in a process of its own."""
    if not setup.is_gpu:
        return Result(NOT_RUN, "it needs a GPU")
    command = (PYTHON, "-m", "benchmarks.gpu_check.run_forms")
    deadline = time.monotonic() + limit_s
    listed, output = executed((*command, "--list"), limit_s, setup.log)
    found = [words for line in output.splitlines() if (words := line.split()) and words[0] in OURS and len(words) == 3]
    if listed.outcome == FAILED or not found:
        return Result(FAILED, f"no forms: {listed.detail}")

    def one(words: Sequence[str]) -> Result:
        named = [word for pair in zip(("--backend", "--form", "--dtype"), words) for word in pair]
        left_s = max(1.0, deadline - time.monotonic())
        return execute((*command, *named), left_s, setup.log, OMP_NUM_THREADS="2")

    with concurrent.futures.ThreadPoolExecutor(min(8, max(1, (os.cpu_count() or 1) // 2))) as pool:
        results = list(pool.map(one, found))
    broken = [f"{' '.join(words)}: {result.detail}"
              for words, result in zip(found, results) if result.outcome != PASSED]  # fmt: skip
    return Result(FAILED, "; ".join(broken)) if broken else Result(PASSED, f"{len(found)} forms are right")


def nan_stays(setup: Setup, limit_s: float) -> Result:
    if not setup.is_gpu:
        return Result(NOT_RUN, "it needs a GPU")
    return execute((PYTHON, "-m", "benchmarks.gpu_check.nan_stays"), limit_s, setup.log)


def golden(setup: Setup, limit_s: float) -> Result:
    """Each golden kernel on the GPU, into golden.json."""
    if not setup.is_gpu:
        return Result(NOT_RUN, "it needs a GPU")
    return execute((PYTHON, "-m", "benchmarks.gpu_check.golden", str(setup.out / "golden.json")), limit_s, setup.log)


def read_bytes_of_cudnn(setup: Setup, limit_s: float) -> Result:
    """Whether cuDNN reads the summand that is multiplied by zero, by ncu's count of bytes."""
    program = tool("ncu") if setup.is_gpu else None
    if program is None:
        return Result(NOT_RUN, "ncu is not installed" if setup.is_gpu else "it needs a GPU")
    found = []
    for name in read_bytes.NAMES:
        command = (program, "--csv", "--metrics", read_bytes.METRICS, "--profile-from-start", "off",
                   "--clock-control", "none", "--target-processes", "all",
                   PYTHON, "-m", "benchmarks.gpu_check.read_bytes", name)  # fmt: skip
        result, output = executed(command, limit_s / len(read_bytes.NAMES), setup.log)
        read = read_bytes.bytes_of(output)["dram__bytes_read.sum"]
        if not read:  # it may not count here, as ERR_NVGPUCTRPERM says
            why = next((line.strip() for line in output.splitlines() if "==ERROR==" in line), result.detail)
            return Result(NOT_RUN, f"ncu counted nothing: {why}")
        found.append(read)
    return Result(PASSED, read_bytes.verdict(*found))


def tool(name: str) -> Optional[str]:
    """Where a program of the CUDA toolkit is, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def verify(setup: Setup, backend: str, problems: int, limit_s: float, *kind: str) -> Result:
    """Random problems against the reference, on a GPU in several processes: most of the time goes into compiling."""
    workers = min(8, max(1, (os.cpu_count() or 1) // 2), problems) if setup.is_gpu else 1

    def part(seed: int) -> Result:
        large = ("--large" if setup.is_gpu and seed == 0 else "--no-large",)  # their memory is wanted once
        command = (*CLI, "verify", "--device", setup.device, "--backend", backend, "--seed", str(seed),
                   "--problems", str(-(-problems // workers)), *large, *kind)  # fmt: skip
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
    command = (*CLI, "verify", "--device", "cuda", "--problems", "8", "--no-large", *backends)
    return sanitized(setup, "memcheck", limit_s, *command)


def sanitize_forms(setup: Setup, kind: str, limit_s: float) -> Result:
    """Another of compute-sanitizer's tools over every form of our kernels in fp16."""
    forms = (PYTHON, "-m", "benchmarks.gpu_check.run_forms", "--dtype", "float16")
    return sanitized(setup, kind, limit_s, *forms)


def sanitize_configs(setup: Setup, limit_s: float) -> Result:
    """memcheck over every config that the tuner has kept, each once."""
    if not (setup.out / "configs.json").exists():
        return Result(NOT_RUN, "nothing is tuned")
    configs = (PYTHON, "-m", "benchmarks.gpu_check.run_configs", str(setup.out / "configs.json"))
    return sanitized(setup, "memcheck", limit_s, *configs)


def sanitized(setup: Setup, kind: str, limit_s: float, *command: str) -> Result:
    """A command under one of compute-sanitizer's tools; NOT_RUN where it is missing or cannot attach to the GPU."""
    if not setup.is_gpu:
        return Result(NOT_RUN, "it needs a GPU")
    program = tool("compute-sanitizer")
    if program is None:
        return Result(NOT_RUN, "compute-sanitizer is not installed")
    # torch and Triton ask the driver for functions that it may lack, which would be counted as errors
    api_errors = ("--report-api-errors", "no") if kind == "memcheck" else ()
    checked = (program, "--tool", kind, *api_errors, "--error-exitcode", "9", *command)
    # torch's allocator hands out parts of large blocks, inside which an overrun would go unseen
    return judge_sanitizer(*executed(checked, limit_s, setup.log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def judge_sanitizer(result: Result, output: str) -> Result:
    summaries = [line.strip() for line in output.splitlines() if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    if not summaries:
        return Result(NOT_RUN, f"compute-sanitizer did not come to a summary: {result.detail}")
    return Result(result.outcome, summaries[-1])


def tune(setup: Setup, batches: str, dtypes: str, limit_s: float, *more: str) -> Result:
    """The tuner goes on where it stopped; its winners come back as configs.json, and all else it has found out as
    journal.jsonl.

    A candidate that leaves the GPU unusable ends its process, and one that hangs lets the journal stand still. Either
    is recorded, and another attempt goes on after it.
    """
    file = setup.winners
    if file is None:
        return Result(FAILED, "GPUs of different kinds are visible")
    command = (*CLI, "tune", "--device", setup.device, "--model", setup.model, "--batch", batches, "--dtype", dtypes,
               "--configs", str(file.parent), *more, "--budget-minutes")  # fmt: skip
    deadline = time.monotonic() + limit_s
    result = Result(NOT_RUN, "there was no time")
    for _ in range(_ATTEMPTS):
        left_s = deadline - time.monotonic()
        if left_s < _ATTEMPT_S / 4:
            break
        watched = Watched(tuner.journal_path(setup.device), _STANDSTILL_S)
        result, output = executed((*command, f"{0.85 * left_s / 60:.2f}"), left_s, setup.log, watched)
        if result.outcome == PASSED:
            unfinished = re.search(r"\d+ convolutions are left", output)
            if unfinished is not None:
                result = Result(NOT_RUN, f"the time was up: {unfinished.group()}; --only tune goes on")
            break
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
