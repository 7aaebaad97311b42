"""Frozen networks against what else there is on a CPU: python -m benchmarks.cpu_check.tables resnet50 --threads 1

| table | its rows |
| --- | --- |
| resnet50 | ResNet-50 in bf16 and fp32 at batch 1 and 8 against OpenVINO and ONNX Runtime, beside what is required |
| networks | thirteen networks in both dtypes at batch 1, also without regions, against OpenVINO and torch.compile |
| int8 | ResNet-50 in int8 at batch 1 and 8, and five others, against OpenVINO (quantised by NNCF) and ONNX Runtime |

A row is one interleaved run: each variant is called five times in its turn, and timed the last time. Each is compared
with fp64 first; a wrong one is listed and not timed. The process keeps to as many cores as it has threads. With
--resume rows that --out has of this commit and machine are kept. The table is written beside --out, too, in Markdown.
Exit code 1 for a missed bar, and for rows that are left.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import nn

from benchmarks import data, wild
from benchmarks.cpu_check.cores import keep_to
from fused_resnet import measuring, models
from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.kernels import sources
from fused_resnet.machine import devices
from fused_resnet.measuring import WITHOUT_REGIONS, CannotGoOn, NetworkSubject, Record, Run
from fused_resnet.measuring.summary import LOSS_BELOW, Row
from fused_resnet.operators.problem import SHORT_DTYPES

OURS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
THEIRS = ("timm resnet50d", "timm seresnet50", "torchvision fcn_resnet50", "torchvision vgg16_bn",
          "torchvision densenet121", "torchvision regnet_y_400mf")  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(models.create, name) for name in OURS},
    **{name: wild.MODELS[name] for name in THEIRS},
}
IN_INT8 = ("resnet50", "resnet18", "resnet101", "resnext50_32x4d", "timm seresnet50", "torchvision vgg16_bn")
DTYPES = {**SHORT_DTYPES, "int8": torch.int8}
# whose best is what ResNet-50 must be so many times as fast as
RIVALS = {"bf16": ("openvino",), "fp32": ("openvino", "onnxruntime"), "int8": ("openvino",)}
# (dtype, batch): how many times that is on one core, with AMX and without
REQUIRED = {
    True: {("bf16", 1): 1.6, ("bf16", 8): 1.4, ("fp32", 1): 1.0, ("fp32", 8): 1.15, ("int8", 1): 2.0, ("int8", 8): 1.4},
    False: {("bf16", 1): 1.1, ("bf16", 8): 1.1, ("fp32", 1): 1.1, ("fp32", 8): 1.2, ("int8", 1): 1.1, ("int8", 8): 1.1},
}
# MLPerf Inference, closed division, ResNet-50 offline in int8: images a second and core, of samples a second and cores
MLPERF = {"two Xeon Platinum 8592+ (v4.0)": 25_290 / 128, "two Xeon 6980P (v5.0)": 46_041 / 256}
MLPERF_SOURCE = "https://mlcommons.org/benchmarks/inference-datacenter"
KEPT_BY_TWO = 0.9  # of the ratio on one core, at least, on two
SLOWER_BELOW = 0.97  # two runs of the same plan differ by up to so much
REPEATS = 4  # then a call takes what it takes later, but for a twentieth
PAUSE_S = 0.005  # between calls of several threads
OK, MISSED, WRONG, NO_RIVAL, NOT_ASKED = "ok", "MISSED", "WRONG", "no rival", "nothing required"


class Table(NamedTuple):
    """What its rows are, and what takes turns in each: the baselines, and the networks that are frozen."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    baselines: tuple[str, ...]
    frozen: tuple[str, ...] = ("auto",)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*(f"frozen {name}".removesuffix(" auto") for name in self.frozen), *self.baselines)


TABLES = {
    "resnet50": Table(("resnet50",), ("bf16", "fp32"), (1, 8), ("openvino", "onnxruntime")),
    "networks": Table(tuple(MODELS), ("bf16", "fp32"), (1,), ("openvino", "compile"), ("auto", WITHOUT_REGIONS)),
    "int8": Table(IN_INT8, ("int8",), (1, 8), ("openvino", "onnxruntime")),
}


class Bar(NamedTuple):
    """A network in a dtype at a batch, and the variants that take turns: the subject of a row."""

    model: str
    dtype: str
    batch: int
    threads: int
    size: int
    budget_s: float
    baselines: tuple[str, ...]
    frozen: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} batch {self.batch}"

    def measured(self, budget_s: float, rounds: Optional[int] = None, progress: Progress = silent) -> Row:
        torch.manual_seed(0)
        image = (3, self.size, self.size)
        model = measuring.calibrated(MODELS[self.model](), image)
        subject = NetworkSubject(
            self.name, model, (self.batch, *image), "cpu", [DTYPES[self.dtype]], self.baselines, self.frozen,
            only_right=True, pause_s=PAUSE_S if self.threads > 1 else 0.0, repeats=REPEATS,
        )  # fmt: skip
        row = subject.measured(self.budget_s, rounds, progress)
        return {"model": self.model, "dtype": self.dtype, "threads": self.threads, **row}


def ms_of(row: Row, variant: str) -> Optional[float]:
    """Milliseconds of a variant by its name without the dtype: "openvino", "frozen", "frozen without regions"."""
    word, _, rest = variant.partition(" ")
    found = row["variants"].get(" ".join(filter(None, (word, row["dtype"], rest))))
    return None if found is None else found["median_us"] / 1e3


def ratio(row: Row, rivals: Sequence[str]) -> Optional[float]:
    """How many times as fast as the fastest of these rivals; None without any of them, or where ours is missing."""
    own, other = ms_of(row, "frozen"), [ms for rival in rivals if (ms := ms_of(row, rival)) is not None]
    return min(other) / own if own is not None and other else None


def required(row: Row, has_amx: bool, one_thread: Mapping[str, float]) -> Optional[float]:
    """On one core as REQUIRED says; on more, so much of the ratio on one. None where that is not known."""
    if row["model"] != "resnet50":
        return None
    if row["threads"] == 1:
        return REQUIRED[has_amx].get((row["dtype"], row["batch"]))
    return KEPT_BY_TWO * one_thread[row["problem"]] if row["problem"] in one_thread else None


def verdict(row: Row, found: Optional[float], least: Optional[float]) -> str:
    if f"frozen {row['dtype']}" in row["wrong"]:
        return WRONG
    if ms_of(row, "frozen") is None:
        return MISSED
    if found is None:
        return NO_RIVAL
    return NOT_ASKED if least is None else OK if found >= least else MISSED


def judged(table: str, row: Row, has_amx: bool, one_thread: Mapping[str, float]) -> Row:
    """The row with what it comes to: "ratio", "required" and "verdict"."""
    if table == "networks":
        found, least = ratio(row, [f"frozen {WITHOUT_REGIONS}"]), SLOWER_BELOW
    else:
        found, least = ratio(row, RIVALS[row["dtype"]]), required(row, has_amx, one_thread)
    return {**row, "ratio": found, "required": least, "verdict": verdict(row, found, least)}


def losses(row: Row, columns: Sequence[str]) -> list[str]:
    """Who is faster than the frozen network, by how much."""
    found = []
    for name in columns[1:]:
        against = ratio(row, [name])
        if against is not None and against < LOSS_BELOW:
            found.append(f"{row['problem']}: {against:.2f}x of {name}")
    return found


def cell(row: Row, variant: str) -> str:
    """Milliseconds, or why there are none."""
    ms = ms_of(row, variant)
    if ms is not None:
        return f"{ms:.1f}"
    word, _, rest = variant.partition(" ")
    name = " ".join(filter(None, (word, row["dtype"], rest)))
    return f"wrong: {row['wrong'][name]}" if name in row["wrong"] else row["skipped"].get(name, "missing")


def beside_mlperf(rows: Sequence[Row]) -> list[str]:
    """A line of what ResNet-50 in int8 does for each core, and of what others have published; none without its rows."""
    own = []
    for row in rows:
        ms = ms_of(row, "frozen") if (row["model"], row["dtype"]) == ("resnet50", "int8") else None
        if ms is not None:
            own.append(f"{1000 * row['batch'] / ms / row['threads']:.0f} at batch {row['batch']}")
    if not own:
        return []
    published = ", ".join(f"{value:.0f} by {machine}" for machine, value in MLPERF.items())
    return [f"Images a second and core, ResNet-50 in int8: {', '.join(own)}. Published by MLPerf (closed division, "
            f"offline): {published}; {MLPERF_SOURCE}."]  # fmt: skip


def markdown(table: str, record: Record) -> str:
    """The table as it is printed, with every loss and every result that was wrong below."""
    columns = TABLES[table].columns
    times = [f"{name}, ms" for name in columns]
    head = ["network", "dtype", "batch", "threads", *times, "ratio", "required", "verdict"]
    lines = [f"{record.device}, {', '.join(record.environment['cpu_flags'])}", "",
             f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]  # fmt: skip
    for row in record.rows:
        numbers = ["-" if value is None else f"{value:.2f}" for value in (row["ratio"], row["required"])]
        cells = [row["model"], row["dtype"], row["batch"], row["threads"], *(cell(row, name) for name in columns)]
        lines.append(f"| {' | '.join(map(str, [*cells, *numbers, row['verdict']]))} |")
    lost = [loss for row in record.rows for loss in losses(row, columns)]
    wrong = [f"{row['problem']}: {name}, {why}" for row in record.rows for name, why in row["wrong"].items()]
    lines += ["", f"Losses: {'; '.join(lost) or 'none'}.", f"Wrong, and not timed: {'; '.join(wrong) or 'none'}."]
    lines += beside_mlperf(record.rows)
    for name, why in (record.broken or {}).items():
        lines.append(f"Not measured: {name}: {why}.")
    if record.left:
        lines.append(f"Left for want of time: {', '.join(set(record.left) - set(record.broken or {})) or 'none'}.")
    return "\n".join(lines)


def bars(options: argparse.Namespace) -> list[Bar]:
    table = TABLES[options.table]
    return [
        Bar(name, dtype, batch, options.threads, options.size, options.budget,
            tuple(rival for rival in table.baselines if rival != "onnxruntime" or dtype != "bf16"), table.frozen)
        for name in options.model or table.models
        for dtype in options.dtype or table.dtypes
        for batch in options.batch or table.batches
    ]  # fmt: skip


def ratios_in(file: Optional[Path]) -> dict[str, float]:
    """The ratios of a record of one thread, by row; none without the file."""
    if file is None or not file.exists():
        return {}
    rows = Record.from_json(json.loads(file.read_text())).rows
    return {row["problem"]: row["ratio"] for row in rows if row.get("ratio") is not None}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse_arguments(arguments)
    keep_to(options.threads)
    data.let_torchvision_import()
    start = Record.here("cpu-check table", "cpu")
    commit = {name: start.environment[name] for name in ("commit", "dirty")}
    settings = {"table": options.table, "size": options.size, "budget_s": options.budget, **commit}
    start = start._replace(settings=settings, kernels=sources.source_digest())
    subjects = bars(options)
    run = Run(options.budget * len(subjects), options.rounds, options.stop_after, options.out, options.resume)

    def show(fraction: float, text: str) -> None:
        print(f"{100 * fraction:3.0f} %  {text}", file=sys.stderr, flush=True)

    progress = show if options.progress else silent
    try:
        record = measuring.measure(start, subjects, run, progress)
    except CannotGoOn as error:
        print(f"cpu_check.tables: begun anew, {options.out} {error}", file=sys.stderr)
        record = measuring.measure(start, subjects, run._replace(resume=False), progress)
    has_amx, one_thread = "amx_bf16" in devices.cpu_flags(), ratios_in(options.one_thread)
    record = record._replace(rows=[judged(options.table, row, has_amx, one_thread) for row in record.rows])
    shown = markdown(options.table, record)
    if options.out is not None:
        record.write(options.out)
        options.out.with_suffix(".md").write_text(shown + "\n")
    print(shown)
    missed = [row["problem"] for row in record.rows if row["verdict"] in (MISSED, WRONG)] + list(record.broken or ())
    left = len(subjects) - len(record.rows) - len(record.broken or ())
    counted = f"{len(record.rows)} rows, {left} left for want of time, {len(missed)} missed"
    print(counted + (f": {', '.join(missed)}" if missed else ""))
    return 1 if missed or left else 0


def parse_arguments(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_check.tables", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--threads", type=int, default=1, help="and cores (default: 1)")
    parser.add_argument("--one-thread", type=Path, help="the record of one thread, for what several must keep of it")
    parser.add_argument("--out", type=Path, help="JSON file for the record, written after each row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), metavar="NAME", help="default: as the table says")
    parser.add_argument("--dtype", nargs="+", choices=list(RIVALS), help="default: as the table says")
    parser.add_argument("--batch", nargs="+", type=int, help="images (default: as the table says)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of timing for each row (default: 40)")
    parser.add_argument("--rounds", type=int, help="at most so many rounds for each row")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no row later, except the first")
    parser.add_argument("--progress", action="store_true", help="say what is being done")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
