"""The CPU engine under GCC's sanitizers: python -m benchmarks.cpu_check.sanitizers --problems 30

csrc/cpu is compiled twice more, into folders that are removed: for addresses and undefined behaviour, and for threads.
A process with such a library runs what `sanitized` draws, within each instruction set that this processor has.

| what it does not see | instead |
| --- | --- |
| inline assembly: AMX's tiles, amx_bf16's epilogue | amx_bf16_emulated, the same source without it |
| pointers that are computed and not followed; alignment | nothing: checks of them take GCC 12 too long |
| torch's own threads | csrc/sanitized/parallel_for.cpp, new threads for each call |
| torch's own code | nothing: what it does to memory is not ours |

Exit code 0, or 1: for a finding, for a wrong result, or where nothing could be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

from benchmarks.gpu_check.isolated import FAILED, NOT_RUN, PASSED, Result, executed
from fused_resnet.kernels import sources
from fused_resnet.measuring import Record

THREADS = "sanitized/parallel_for.cpp"  # below csrc/
SETS = ("portable", "avx2", "avx512")
_LINES, _FINDINGS = 12, 5  # of a finding, of a process
_BEGINS = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer|FATAL: ThreadSanitizer")


class Sanitizer(NamedTuple):
    """flags: of the compiler. runtime: its library, which a process must load before all others."""

    flags: tuple[str, ...]
    runtime: str
    variables: dict[str, str]


SANITIZERS = {
    "address,undefined": Sanitizer(
        # checks as calls and not in line: there are thousands in a kernel
        (
            "-fsanitize=address,undefined",
            # with these three int8_amx.cpp takes GCC 12 a quarter of an hour. Null and wild pointers are faults of
            # addresses where they are followed; alignment is not checked
            "-fno-sanitize=null,pointer-overflow,alignment",
            "-fno-sanitize-recover=undefined",
            "-O1",
            "--param=asan-instrumentation-with-call-threshold=0",
        ),
        "libasan.so",
        # Python keeps what it has allocated until it ends; handle_segv: else Python's own handler reports a crash
        {"ASAN_OPTIONS": "detect_leaks=0:handle_segv=2:handle_sigbus=2", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Sanitizer(
        ("-fsanitize=thread",),
        "libtsan.so",
        # nothing of what torch and Python do: their locks are partly atomics that are not seen
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
    ),
}
# the lines of a report name the source; what the library itself looks up it finds at first
_FLAGS = ("-g1", "-fno-omit-frame-pointer", "-Wl,-Bsymbolic")


def setup_py(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", root / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not(name: str) -> Optional[str]:
    """What this machine lacks to compile and run with this sanitizer."""
    if not (sources.ROOT / "setup.py").exists():
        return "it needs the source tree, not only the wheel"
    tools = setup_py(sources.ROOT).Toolchain()
    if (missing := tools.missing()) is not None:
        return ": ".join(missing)
    runtime = SANITIZERS[name].runtime
    if not Path(_library(tools.cxx, runtime)).is_absolute():
        return f"{Path(tools.cxx).name} has no {runtime}"
    return None


def _library(cxx: str, name: str) -> str:
    """Where the compiler has a library; its bare name where it has none."""
    command = (cxx, f"-print-file-name={name}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(
    name: str, folder: Path, limit_s: float, root: Path = sources.ROOT, files: Optional[Sequence[str]] = None
) -> Result:
    """_C_cpu.so of the sources below `root` for this sanitizer, into `folder`. files: below csrc/, instead of all."""
    module = setup_py(root)
    tools = module.Toolchain()
    (part,) = (part for part in module.plan(tools) if part.name == "cpu")
    part = part._replace(sources=(*(part.sources if files is None else files), THREADS))
    module.write_ninja([part], tools, folder, (*SANITIZERS[name].flags, *_FLAGS))
    jobs = ("-j", os.environ["MAX_JOBS"]) if "MAX_JOBS" in os.environ else ()
    return executed((tools.ninja, "-C", str(folder), *jobs, part.filename), limit_s)[0]


def run(name: str, folder: Path, limit_s: float, *arguments: str, **variables: str) -> tuple[Result, str]:
    """`sanitized` with the library of that folder. Returns its result and all it printed."""
    sanitizer, tools = SANITIZERS[name], setup_py(sources.ROOT).Toolchain()
    # libstdc++ as well: else the sanitizer does not find what it is to catch exceptions by
    preload = " ".join(_library(tools.cxx, library) for library in (sanitizer.runtime, "libstdc++.so.6"))
    untuned = {"FUSED_RESNET_TUNED": "0", "FUSED_RESNET_TUNE": "0", "FUSED_RESNET_CACHE_DIR": str(folder)}
    command = (sys.executable, "-m", "benchmarks.cpu_check.sanitized", str(folder), *arguments)
    return executed(command, limit_s, LD_PRELOAD=preload, **sanitizer.variables, **untuned, **variables)


def findings(output: str, root: Path = sources.ROOT) -> list[str]:
    """What sanitizers reported: the first line of each, and where in our sources it happened."""
    found: list[list[str]] = []
    for line in output.replace(f"{root}/", "").splitlines():
        if _BEGINS.search(line):
            found.append([re.sub(r"==\d+==|\(pid=\d+\)", "", line).strip()])
        elif found and " csrc/" in line and len(found[-1]) < _LINES:
            found[-1].append(line.strip())
    return list(dict.fromkeys("\n".join(lines) for lines in found))[:_FINDINGS]


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each instruction set that this processor has, the widest first."""
    if (why := why_not(name)) is not None:
        yield {"sanitizer": name, "outcome": NOT_RUN, "detail": why}
        return
    with tempfile.TemporaryDirectory(prefix="fused_resnet_") as folder:
        started = time.monotonic()
        built = build(name, Path(folder), options.limit)
        print(f"{name}: compiled in {time.monotonic() - started:.0f} s", flush=True)
        if built.outcome != PASSED:
            yield {"sanitizer": name, "outcome": FAILED, "detail": f"compiling failed: {built.detail}"}
            return
        row = _row(name, Path(folder), options)
        yield row
        for narrower in reversed(SETS[: SETS.index(row.get("instruction_set", SETS[0]))]):
            variables = {"FUSED_RESNET_CPU_ISA": narrower}
            yield {"instruction_set": narrower, **_row(name, Path(folder), options, variables)}


def _row(
    name: str, folder: Path, options: argparse.Namespace, variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    started = time.monotonic()
    size = ("--problems", str(options.problems), "--seed", str(options.seed))
    result, output = run(name, folder, options.limit, *size, **variables)
    row = {"sanitizer": name, "outcome": result.outcome, "findings": findings(output), **reported(output)}
    if row["findings"]:
        row["outcome"] = FAILED  # whatever the process made of it
    if row["outcome"] != PASSED:
        row["detail"] = row["findings"][0].partition("\n")[0] if row["findings"] else result.detail
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def reported(output: str) -> dict[str, Any]:
    """What `sanitized` said of its problems; nothing where it was ended before."""
    last = next((line for line in reversed(output.splitlines()) if line.startswith("{")), "{}")
    return dict(json.loads(last))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=30, help="of each kind, for each sanitizer and instruction set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(SANITIZERS), help="this one alone")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for a compilation or a process")
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args(arguments)
    rows = []
    for name in SANITIZERS if options.only is None else (options.only,):
        for row in rows_of(name, options):
            rows.append(row)
            print(f"{name}, {row.get('instruction_set', '-')}: {row['outcome']} {row.get('detail', '')}", flush=True)
            for finding in row.get("findings", ()):
                print(finding, flush=True)
    outcomes = [row["outcome"] for row in rows]
    passed = FAILED not in outcomes and PASSED in outcomes
    if options.out is not None:
        settings = {"problems": options.problems, "seed": options.seed}
        Record.here("sanitizers", "cpu", settings)._replace(rows=rows, more={"passed": passed}).write(options.out)
    print("; ".join(f"{row['sanitizer']} {row.get('instruction_set', '')} {row['outcome']}" for row in rows))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
