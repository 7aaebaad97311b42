"""Triton kernels compiled ahead of their first launch, by processes of their own, also where there is no GPU.

What is compiled lands in Triton's cache folder under the very key that a launch looks up, since Triton's own launcher
derives it: only the driver is replaced, by one that names the architecture asked for. The key holds Triton's version,
so a cache that is carried serves that version alone; `carried` lets both sides say so.

    echo '{"problem": "...", "configs": [{...}]}' | python -m fused_resnet.kernels.triton.precompile 90

is a worker, which takes a line for each problem. One line comes out for each config, in order: {"seconds": ...} or
{"why": ...}
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
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
        self._own = threading.local()  # of a thread: its worker, since starting one takes longer than most configs
        self._running: set[_Worker] = set()
        self._lock, self._is_closed = threading.Lock(), False

    def __enter__(self) -> "Precompiler":
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends what still runs: nothing that was compiled is lost."""
        with self._lock:
            self._is_closed = True
            for worker in list(self._running):  # which the threads that wait for them empty meanwhile
                worker.kill()
        self._pool.shutdown(cancel_futures=True)
        for worker in list(self._running):
            worker.why_ended()

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
        """(this thread's worker's reports, why there are no more of them)."""
        worker = getattr(self._own, "worker", None)
        if worker is None:
            with self._lock:
                if self._is_closed:
                    return [], "interrupted"
                worker = self._own.worker = _Worker(self.arch, self._environment)
                self._running.add(worker)
        reports = worker.compile(problem, configs)
        if len(reports) == len(configs):
            return reports, ""
        self._own.worker = None
        self._running.discard(worker)
        return reports, worker.why_ended()


class _Worker:
    """A process that compiles for one problem after the other."""

    def __init__(self, arch: int, environment: dict[str, str]) -> None:
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fused_resnet.kernels.triton.precompile", str(arch)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self._limit_s, self._is_late = _STARTUP_S + _CONFIG_S, False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # no library's
                self._lines.put(line)
        self._lines.put(None)

    def compile(self, problem: ConvProblem, configs: Sequence[TritonConfig]) -> list[Optional[str]]:
        """For each config None, or why it does not compile. Fewer where the process ends, or one takes too long."""
        job = json.dumps({"problem": str(problem), "configs": [config._asdict() for config in configs]})
        reports: list[Optional[str]] = []
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which its silence shows
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()
        while len(reports) < len(configs):
            try:
                line = self._lines.get(timeout=self._limit_s)
            except queue.Empty:
                self._is_late, line = True, None
            if line is None:
                break
            self._limit_s = _CONFIG_S
            reports.append(json.loads(line).get("why"))
        return reports

    def kill(self) -> None:
        self._process.kill()

    def why_ended(self) -> str:
        self.kill()
        code = self._process.wait()
        if self._is_late:
            return "the compiler did not end"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"the compiler ended: {lines[-1] if lines else f'exit code {code}'}"


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
    for line in sys.stdin:
        job = json.loads(line)
        problem = parsed_problem(job["problem"], "cuda")
        for fields in job["configs"]:
            print(json.dumps(_report(problem, TritonConfig(**fields))), flush=True)


def _report(problem: ConvProblem, config: TritonConfig) -> dict[str, Any]:
    started = time.monotonic()
    try:
        compile_config(problem, config)
    except Exception as error:  # whatever Triton, LLVM or ptxas raise
        return {"why": f"it does not compile: {one_line(error)}"}
    return {"seconds": round(time.monotonic() - started, 2)}


if __name__ == "__main__":
    main(int(sys.argv[1]))
