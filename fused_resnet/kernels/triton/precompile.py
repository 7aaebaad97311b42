"""Triton kernels compiled ahead of their first launch, by processes of their own, also where there is no GPU.

What is compiled lands in Triton's cache folder under the very key that a launch looks up, since Triton's own launcher
derives it: only the driver is replaced, by one that names the architecture asked for. The key holds Triton's version,
so a cache that is carried serves that version alone; `carried` lets both sides say so.

    echo '{"problem": "...", "configs": [{...}]}' | python -m fused_resnet.kernels.triton.precompile 90

is a worker. One line comes out for each config, in order: {"seconds": ...} or {"why": ...}
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional, Sequence

from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.kernels.triton.conv.launch import launches
from fused_resnet.machine.errors import one_line
from fused_resnet.operators.problem import ConvProblem, parsed_problem

_STARTUP_S, _CONFIG_S = 120.0, 60.0  # what a worker may take before a config counts as one that never ends


# -------------------------------------------------------------------------------------------------------- the parent


class Precompiler:
    """Compiles configs of problems for one architecture, several problems at a time. Use it as a context manager."""

    def __init__(self, arch: int, cache: Optional[Path] = None, workers: Optional[int] = None) -> None:
        self.arch = arch
        # a GPU is none of the workers' business, and what is interpreted cannot be compiled
        self._environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self._environment["CUDA_VISIBLE_DEVICES"] = ""
        if cache is not None:
            self._environment["TRITON_CACHE_DIR"] = str(Path(cache).resolve())
        self._pool = concurrent.futures.ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 2) - 1))
        self._running: set[subprocess.Popen] = set()
        self._lock, self._is_closed = threading.Lock(), False

    def __enter__(self) -> "Precompiler":
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends what still runs: nothing that was compiled is lost."""
        with self._lock:
            self._is_closed = True
            for process in list(self._running):  # which the threads that wait for them empty meanwhile
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, problem: ConvProblem, configs: Sequence[TritonConfig]) -> concurrent.futures.Future:
        """The future result: by config None, or why it does not compile."""
        return self._pool.submit(self._compile, problem, list(configs))

    def _compile(self, problem: ConvProblem, configs: list[TritonConfig]) -> dict[TritonConfig, Optional[str]]:
        """A config that takes the worker down with it is named, and the ones after it get a new worker."""
        results: dict[TritonConfig, Optional[str]] = {}
        while len(results) < len(configs) and not self._is_closed:
            rest = configs[len(results) :]
            reports, why = self._work(problem, rest)
            results.update(zip(rest, reports))
            if len(reports) < len(rest):
                results[rest[len(reports)]] = why
        return results

    def _work(self, problem: ConvProblem, configs: list[TritonConfig]) -> tuple[list[Optional[str]], str]:
        """(the reports of one worker, why there are no more of them)."""
        job = json.dumps({"problem": str(problem), "configs": [config._asdict() for config in configs]})
        command = [sys.executable, "-m", "fused_resnet.kernels.triton.precompile", str(self.arch)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with self._lock:
            if self._is_closed:
                return [], "interrupted"
            process = subprocess.Popen(command, env=self._environment, text=True, **pipes)
            self._running.add(process)
        try:
            out, err = process.communicate(job, timeout=_STARTUP_S + _CONFIG_S * len(configs))
            last = err.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            why = f"the compiler ended: {last[0]}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, why = process.communicate()[0], "the compiler did not end"
        finally:
            self._running.discard(process)
        return [json.loads(line).get("why") for line in out.splitlines() if line.startswith("{")], why


# -------------------------------------------------------------------------------------------------------- the worker


class _Driver:
    """As much of a Triton driver as compiling asks for, on behalf of a GPU that need not be there."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Optional[int] = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)


def compile_config(problem: ConvProblem, config: TritonConfig) -> None:
    """Compile what a plan's call of this convolution would launch: its bias is in the problem's dtype."""
    for each in launches(problem, config, problem.dtype):
        each.kernel.warmup(*each.arguments, grid=(each.num_programs,), **each.options)


def main(arch: int) -> None:
    from triton.runtime import driver

    driver.set_active(_Driver(arch))
    job = json.load(sys.stdin)
    problem = parsed_problem(job["problem"], "cuda")
    for fields in job["configs"]:
        started = time.monotonic()
        try:
            compile_config(problem, TritonConfig(**fields))
            report: dict[str, Any] = {"seconds": round(time.monotonic() - started, 2)}
        except Exception as error:  # whatever Triton, LLVM or ptxas raise
            report = {"why": f"it does not compile: {one_line(error)}"}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
