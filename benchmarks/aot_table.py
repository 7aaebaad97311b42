"""Registers, shared memory and spills of every config worth measuring for a model's convolutions, without a GPU.

    python -m benchmarks.aot_table [--model resnet50] [--batch 1,32,256] [--dtype fp16] [--arch 90] [--jobs 2]

Writes benchmarks/results/aot/sm_ARCH_MODEL.json, and a Markdown summary beside it. What the JSON already holds for
these kernels and this Triton is not compiled again, so an interrupted run goes on where it stopped. TRITON_INTERPRET
must be unset.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any, Iterator, Optional

from benchmarks import shapes
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import aot, runtime
from fused_resnet.kernels.triton.conv.configs import TritonConfig, search_space
from fused_resnet.machine import files
from fused_resnet.operators.problem import SHORT_DTYPES, ConvProblem

RESULTS = Path(__file__).parent / "results" / "aot"
_SAVE_EVERY = 20  # compilations


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", default="1,32,256", help="the search space depends on it")
    parser.add_argument("--dtype", default="fp16", choices=sorted(SHORT_DTYPES))
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if reason := aot.cannot_compile():
        print(f"aot_table: {reason}.", file=sys.stderr)
        return 1
    path = arguments.out / f"sm_{arguments.arch}_{arguments.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = dict(
        model=arguments.model, arch=arguments.arch, dtype=arguments.dtype, triton=runtime.triton.__version__,
        kernels=sources.kernel_digest(sources.TRITON),
    )  # fmt: skip
    known = _known(path, table)
    rows, missing = [], []
    for row, problem in _considered(arguments):
        row.update(known.get(_key(row), {}))
        rows.append(row)
        if row["rejected"] is None and "kernels" not in row:
            missing.append((row, problem))
    _compile(missing, arguments, lambda: files.write_json(path, dict(table, rows=rows)))
    files.write_json(path, dict(table, rows=rows))
    path.with_suffix(".md").write_text(_summary(table, rows))
    print(f"{path} and {path.with_suffix('.md').name}: {len(rows)} configs, {len(missing)} of them compiled now")
    return 0


def _considered(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], ConvProblem]]:
    """A row for each config of each problem, at the largest batch at which it is worth measuring."""
    convs = shapes.convs(arguments.model, 1, SHORT_DTYPES[arguments.dtype])
    for problem, _ in convs:
        rows: dict[TritonConfig, tuple[dict[str, Any], ConvProblem]] = {}
        for batch in sorted(map(int, arguments.batch.split(","))):
            batched = problem._replace(N=batch, device="cuda")
            for config, reason in search_space(batched, arguments.arch):
                if config not in rows or reason is None or rows[config][0]["rejected"]:
                    row = dict(problem=str(batched), config=config._asdict(), rejected=reason)
                    rows[config] = row, batched
        yield from rows.values()


def _key(row: dict[str, Any]) -> str:
    return f"{row['problem']} {json.dumps(row['config'])}"


def _known(path: Path, table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier run of the same kernels and compiler has found, by `_key`."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    if any(before.get(name) != value for name, value in table.items()):
        return {}
    return {_key(row): {"kernels": row["kernels"]} for row in before["rows"] if "kernels" in row}


def _compile(missing: list, arguments: argparse.Namespace, save) -> None:
    """Fill in the rows, in processes of their own, and save now and then."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        futures = {pool.submit(_compiled, problem, row["config"], arguments.arch): row for row, problem in missing}
        for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
            futures[future]["kernels"] = future.result()
            if count % _SAVE_EVERY == 0:
                print(f"{count} of {len(missing)} compiled", flush=True)
                save()


def _compiled(problem: ConvProblem, config: dict[str, Any], arch: int) -> list[dict[str, Any]]:
    """Every kernel that a launch of the config starts."""
    reports = aot.compile_launches(problem, arch, TritonConfig(**config))
    return [
        dict(
            kernel=report.kernel, registers=report.registers, stack_bytes=report.stack_bytes,
            shared_bytes=report.shared_bytes, loops=report.loops._asdict(), instructions=report.instructions,
        )
        for report in reports
    ]  # fmt: skip


def _summary(table: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    compiled = [row for row in rows if "kernels" in row]
    spilling = [row for row in compiled if any(kernel["stack_bytes"] for kernel in row["kernels"])]
    lines = [
        f"# {table['model']}, {table['dtype']}, sm_{table['arch']}: what the search space compiles to",
        "",
        f"Triton {table['triton']}, no GPU. {len(rows)} configs considered, {len(compiled)} compiled, "
        f"{len(spilling)} spill. Each at the largest of the batches at which it is worth measuring. Ranges are "
        "over a form's configs; TMA: copies in the loop over the reduction; R: tensor-core products there that take "
        "their first operand from registers.",
        "",
        "| problem | form | configs | registers | shared KB | TMA | R | spill |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = collections.defaultdict(list)
    for row in compiled:
        shape = row["problem"].split("x", 1)[1]
        groups[shape, row["config"]["form"]].append(row["kernels"][0])
    for (problem, form), kernels in groups.items():
        registers, shared = ([kernel[name] for kernel in kernels] for name in ("registers", "shared_bytes"))
        tma, in_registers = ([kernel["loops"][name] for kernel in kernels] for name in ("tma_copies", "register_dots"))
        stack = sum(kernel["stack_bytes"] > 0 for kernel in kernels)
        lines.append(
            f"| {problem} | {form} | {len(kernels)} | {_range(registers)} | {_range([b // 1024 for b in shared])} "
            f"| {_range(tma)} | {_range(in_registers)} | {stack} |"
        )
    reasons = collections.Counter(row["rejected"] for row in rows if row["rejected"])
    lines += ["", "| rejected before compiling | configs |", "| --- | --- |"]
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _range(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


if __name__ == "__main__":
    sys.exit(main())
