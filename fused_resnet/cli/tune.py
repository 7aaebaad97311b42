"""`fused-resnet tune`: measure which backend and config is the fastest, and keep it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

import click
import torch

from fused_resnet import models
from fused_resnet.choosing import decide, winners
from fused_resnet.cli.console import (
    Batches,
    Listed,
    device_option,
    networks_of,
    new_table,
    options,
    prepare,
    print_json,
    progress_on_stderr,
    speedup_cell,
    stdout_console,
)
from fused_resnet.kernels.triton import carried, precompile, runtime
from fused_resnet.kernels.triton.conv import cost
from fused_resnet.measuring import Record, summarise_tuning
from fused_resnet.operators.problem import SHORT_DTYPES, ConvProblem, parsed_problem
from fused_resnet.tuning import convolution, tuner

_what_options = options(
    click.option("--model", "names", type=Listed("model", models.names, many=True), default=None,
                 help="One, or several separated by commas; default, resnet50 where there is no --conv."),
    click.option("--conv", "convs", multiple=True, help="A convolution as `bench ops` prints it; repeat for several."),
    click.option("--batch", "batches", type=Batches(), default="1,8,32,128,256", show_default=True),
    click.option("--dtype", "dtypes", type=Listed("dtype", lambda: tuple(SHORT_DTYPES), many=True), default=None,
                 help="Default: fp16,bf16 on a GPU, fp32,bf16 on a CPU."),
    click.option("--image", type=click.IntRange(min=1), default=None, help="Image size; default, the model's own."),
    click.option("--live-bn", is_flag=True, help="As `fuse` runs them, instead of folded as in a frozen plan."),
)  # fmt: skip
_how_options = options(
    device_option,
    click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default, torch's choice."),
    click.option("--budget-minutes", type=click.FloatRange(min=0, min_open=True), default=None,
                 help="Minutes after which no convolution is begun; the same command goes on from there."),
    click.option("--rounds", type=click.IntRange(min=1), default=None, help="At most so many rounds of timing."),
    click.option("--again", is_flag=True, help="Measure anew what has been measured with these versions."),
    click.option("--configs", "folder", type=click.Path(file_okay=False, path_type=Path), default=None,
                 help="Write <device>.json into this folder, not the user's cache: fused_resnet/configs ships."),
    click.option("--compiled", type=click.Path(file_okay=False, exists=True, path_type=Path), default=None,
                 help="A folder that --compile-only filled elsewhere."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
)  # fmt: skip
_ahead_options = options(
    click.option("--compile-only", is_flag=True, help="Only compile Triton's candidates; needs no GPU."),
    click.option("--arch", type=click.IntRange(min=80), default=90, show_default=True,
                 help="With --compile-only: the target's compute capability times ten."),
    click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=None,
                 help="With --compile-only: the folder to carry to the target."),
    click.option("--triton", "triton_version", default=None,
                 help="With --compile-only: the target's version of Triton; any other is refused."),
)  # fmt: skip


@click.command()
@_what_options
@_how_options
@_ahead_options
def tune(
    names, convs, batches, dtypes, image, live_bn, device, threads, budget_minutes, rounds, again, folder, compiled,
    as_json, compile_only, arch, out, triton_version,
) -> None:  # fmt: skip
    """Check and time every candidate for the convolutions of a model, and keep the fastest for `auto`.

    Interrupted, by Ctrl-C or by its budget, it goes on where it stopped when the same command is given again.
    """
    if compile_only == (out is None):
        raise click.UsageError("--compile-only and --out DIR go together.")
    kind = "cuda" if compile_only else torch.device(device).type
    dtypes = dtypes or (("fp16", "bf16") if kind == "cuda" else ("fp32", "bf16"))
    if not compile_only:
        prepare(device, threads)
    names = names or (() if convs else ("resnet50",))
    networks = networks_of(names, image)
    wanted = [SHORT_DTYPES[dtype] for dtype in dtypes]
    problems = [parsed_problem(conv, kind) for conv in convs]
    problems += tuner.problems_of(networks, batches, wanted, kind, live_bn=live_bn)
    if compile_only:
        return _compile(problems, arch, out, triton_version, as_json)
    if compiled is not None:
        _use_compiled(compiled, device)
    budget_s = None if budget_minutes is None else 60 * budget_minutes
    try:
        with progress_on_stderr("tune") as progress:
            found = tuner.tune(problems, device=device, folder=folder or winners.user_folder(), rounds=rounds,
                               again=again, progress=progress, budget_s=budget_s)  # fmt: skip
    except convolution.DeviceFailed as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("What was measured is kept: give the same command again to go on.", err=True)
        raise
    settings = {"models": list(networks), "convs": convs, "batches": batches, "dtypes": dtypes, "device": device,
                "live_bn": live_bn, "budget_minutes": budget_minutes, "rounds": rounds}  # fmt: skip
    rows = found.pop("rows")
    record = Record.here("tune", device, settings)._replace(rows=rows, summary=summarise_tuning(rows), more=found)
    print_json(record.as_json()) if as_json else _show(record)


def _use_compiled(folder: Path, device: str) -> None:
    """Let Triton read and write the carried cache. Raises ClickException where it cannot serve this GPU."""
    if torch.device(device).type != "cuda":
        raise click.UsageError("--compiled is for a GPU.")
    reason = carried.why_not_carried(folder, runtime.arch(torch.device(device)))
    if reason is not None:
        raise click.ClickException(f"{reason}.")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())


def _show(record: Record) -> None:
    out = stdout_console()
    table = new_table("convolution", "us", "fixed order", "winner", "speedup", "timed", "wrong", "failed",
                      title=f"Tuned on {record.device}")  # fmt: skip
    for row in record.rows:
        winner = row["winner"] and next(one for one in row["timed"] if _described(one) == _described(row["winner"]))
        cells = (f"{winner['median_us']:.1f}", _described(winner)) if winner else ("-", "none")
        speedup = "-" if row["speedup"] is None else speedup_cell(row["speedup"])
        counts = (str(len(row[name])) if row[name] else "" for name in ("timed", "wrong", "failed"))
        table.add_row(row["problem"], cells[0], row["default"]["backend"], cells[1], speedup, *counts)
    out.print(table)
    summary = record.summary
    if summary["geomean_speedup"] is not None:
        out.print(f"{summary['changed']} of {summary['convolutions']} are faster than the fixed order by more than "
                  f"{100 * decide.MARGIN:.0f} %; geometric mean over all {summary['geomean_speedup']:.3f}x, best "
                  f"{summary['best_speedup']:.2f}x")  # fmt: skip
    for row in record.rows:
        for one in row["wrong"]:
            ratio = "no number" if one["error_ratio"] is None else f"{one['error_ratio']:.3g} of the bound"
            out.print(f"[bold red]WRONG[/] {row['problem']}: {_described(one)}: {ratio}")
        for one in row["failed"]:
            out.print(f"failed: {row['problem']}: {_described(one)}: {one['why']}", markup=False)
    for name, reason in {pair: None for row in record.rows for pair in row["skipped"].items()}:
        out.print(f"not run: {name}: {reason}", markup=False)
    if record.more["remaining"]:
        out.print(f"{len(record.more['remaining'])} convolutions are left: give the same command again to go on.")
    out.print(f"kept in {record.more['file']}" if record.more["file"] else "nothing could be kept", markup=False)


def _described(one: dict[str, Any]) -> str:
    config = " ".join(f"{key}={value}" for key, value in (one["config"] or {}).items())
    return f"{one['backend']} {config}".strip()


def _compile(problems: list[ConvProblem], arch: int, out: Path, triton_version: Optional[str], as_json: bool) -> None:
    """Every candidate of Triton's for these problems on an architecture, into a folder that can be carried."""
    version = runtime.triton_version()
    if version is None or triton_version not in (None, version):
        raise click.ClickException(
            f"this is Triton {version or 'missing'}, and the target has {triton_version or 'one'}: kernels are found "
            f"again only by the very version that compiled them. Run this where that version is installed."
        )
    carried.write_manifest(out, arch)
    results: list[dict[str, Any]] = []
    with progress_on_stderr("compile") as progress, precompile.Precompiler(arch, out) as compiler:
        jobs = {p: compiler.submit(p, cost.promising(p, arch)) for p in problems}
        for index, (problem, job) in enumerate(jobs.items()):
            progress(index / len(jobs), f"{problem}, {len(jobs) - index} to go")
            results += [{"problem": str(problem), "config": c._asdict(), "why": why} for c, why in job.result().items()]
    failed = [one for one in results if one["why"]]
    if as_json:
        return print_json({"kind": "compile", "triton": version, "arch": arch, "compiled": len(results) - len(failed),
                           "failed": failed})  # fmt: skip
    for one in failed:
        click.echo(f"{one['problem']}: {one['config']}: {one['why']}")
    click.echo(f"{len(results) - len(failed)} kernels for sm_{arch} by Triton {version}, {len(failed)} failed. On the "
               f"target: fused-resnet tune --compiled {out}")  # fmt: skip
