"""`fused-resnet bench ops|blocks|model|train`: measured, interleaved, checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import click
import torch

from fused_resnet import backends, measuring, models
from fused_resnet.cli.console import (
    Batches,
    Listed,
    device_option,
    dtypes_option,
    measuring_options,
    networks_of,
    new_table,
    options,
    prepare,
    print_json,
    progress_on_stderr,
    speedup_cell,
    stdout_console,
)
from fused_resnet.emulation.timing_model import GPUS
from fused_resnet.kernels import sources
from fused_resnet.measuring import NetworkSubject, Record, Run
from fused_resnet.operators.problem import SHORT_DTYPES, ConvProblem
from fused_resnet.reporting import charts

continuing_options = options(
    click.option("--resume", is_flag=True,
                 help="Keep what the file of --out holds of this measurement, and measure the rest."),
    click.option("--stop-after", "stop_after_s", type=click.FloatRange(min=0, min_open=True), default=None,
                 help="Seconds after which nothing new is begun; --resume goes on from there."),
    click.option("--chart", type=click.Path(dir_okay=False, path_type=Path), default=None,
                 help="Also draw it into this PNG (needs matplotlib)."),
)  # fmt: skip
baselines_option = click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=Listed("baseline", lambda: measuring.BASELINES),
    help=f"Repeat for several: {', '.join(measuring.BASELINES)}. Default: eager, folded, compile.",
)
backends_option = click.option(
    "--backend",
    "frozen_backends",
    multiple=True,
    default=("auto",),
    show_default=True,
    type=Listed("backend", lambda: ("auto", *backends.known("conv_bn_act"), measuring.UNTUNED)),
    help=f"Backends to freeze with; {measuring.UNTUNED}: auto without what `fused-resnet tune` has measured.",
)
op_dtypes_option = click.option(
    "--dtype", "dtypes", type=Listed("dtype", lambda: tuple(SHORT_DTYPES), many=True),
    default="fp32", show_default=True,
)  # fmt: skip


def _measuring(*own: Callable, batch: str, dtypes: Callable) -> Callable:
    """What every command takes, batches by default `batch`, and the options of its own among it."""
    return options(
        click.option("--model", "names", type=Listed("model", models.names, many=True), default="resnet50",
                     show_default=True, help="One, or several separated by commas."),
        click.option("--batch", "batches", type=Batches(), default=batch, show_default=True),
        dtypes, *own, device_option, measuring_options, continuing_options, click.pass_context,
    )  # fmt: skip


@click.group("bench")
def bench_group() -> None:
    """Measure: variants interleaved in one process, medians, each checked before it is timed."""


predict_option = click.option(
    "--predict", type=click.Choice(sorted(GPUS)), default=None,
    help="Also print what the timing model expects of our kernels on this GPU, which need not be here.",
)  # fmt: skip


@bench_group.command("ops")
@_measuring(predict_option, batch="1", dtypes=op_dtypes_option)
def bench_ops(
    ctx, names, batches, dtypes, predict, device, image, threads, budget_s, rounds, out, as_json, resume, stop_after_s,
    chart,
) -> None:  # fmt: skip
    """Every distinct convolution and addition of these models on every backend that can run it, beside eager unfused.

    Exit code 1 when a kernel of ours misses the reference, or anything raises.
    """
    prepare(device, threads)
    settings = {"models": names, "batches": batches, "dtypes": dtypes, "device": device, "image": image,
                "rounds": rounds}  # fmt: skip
    subjects = measuring.op_subjects(networks_of(names, image), batches, _torch_dtypes(dtypes), device=device)
    run = Run(budget_s, rounds, stop_after_s, out, resume, chart)
    if predict is not None:
        _show_predictions([subject.problem for subject in subjects], predict, as_json)
    elif device == "cpu" and not as_json:
        click.echo("No GPU is measured. --predict h200 prints what the timing model expects of one.")
    _measure_and_show(ctx, "bench ops", settings, subjects, run, as_json)


@bench_group.command("blocks")
@_measuring(baselines_option, batch="1", dtypes=dtypes_option)
def bench_blocks(
    ctx, names, batches, dtypes, baselines, device, image, threads, budget_s, rounds, out, as_json, resume,
    stop_after_s, chart,
) -> None:  # fmt: skip
    """The last residual block of each stage: plain, fused, frozen, torch.compile."""
    prepare(device, threads)
    baselines = baselines or measuring.DEFAULT_BASELINES
    settings = {"models": names, "batches": batches, "dtypes": dtypes, "baselines": baselines, "device": device,
                "image": image, "rounds": rounds}  # fmt: skip
    subjects = []
    for name, (model, shape) in networks_of(names, image).items():
        network = measuring.calibrated(model, shape).to(device)
        for path, block, input_shape in measuring.blocks_of(network, shape):
            for batch in batches:
                title = f"{name} {path}, {type(block).__name__} {'x'.join(map(str, (batch, *input_shape)))}"
                subjects.append(NetworkSubject(title, block, (batch, *input_shape), device, _torch_dtypes(dtypes),
                                               baselines, with_fused=True))  # fmt: skip
    run = Run(budget_s, rounds, stop_after_s, out, resume, chart)
    _measure_and_show(ctx, "bench blocks", settings, subjects, run, as_json)


@bench_group.command("model")
@_measuring(baselines_option, backends_option, batch="1,8", dtypes=dtypes_option)
def bench_model(
    ctx, names, batches, dtypes, baselines, frozen_backends, device, image, threads, budget_s, rounds, out, as_json,
    resume, stop_after_s, chart,
) -> None:  # fmt: skip
    """A whole model: eager, folded, torch.compile, frozen, and other runtimes where installed."""
    prepare(device, threads)
    baselines = baselines or measuring.DEFAULT_BASELINES
    settings = {"models": names, "batches": batches, "dtypes": dtypes, "baselines": baselines, "device": device,
                "backends": frozen_backends, "image": image, "rounds": rounds}  # fmt: skip
    subjects = []
    for name, (model, shape) in networks_of(names, image).items():
        network = measuring.calibrated(model, shape).to(device)
        for batch in batches:
            title = f"{name}, batch {batch}, {shape[1]} px"
            subjects.append(NetworkSubject(title, network, (batch, *shape), device, _torch_dtypes(dtypes), baselines,
                                           frozen_backends))  # fmt: skip
    run = Run(budget_s, rounds, stop_after_s, out, resume, chart)
    _measure_and_show(ctx, "bench model", settings, subjects, run, as_json)


compile_option = click.option(
    "--compile/--no-compile", "with_compile", default=True, show_default=True, help="Also train by torch.compile."
)


@bench_group.command("train")
@_measuring(compile_option, batch="8", dtypes=dtypes_option)
def bench_train(
    ctx, names, batches, dtypes, with_compile, device, image, threads, budget_s, rounds, out, as_json, resume,
    stop_after_s, chart,
) -> None:  # fmt: skip
    """A training step: eager, fused and torch.compile, in autocast for other dtypes than fp32; and the bytes it keeps.

    The step is SGD's, with momentum, on one batch of random images. Kept bytes are of activations, for the backward.
    """
    prepare(device, threads)
    settings = {"models": names, "batches": batches, "dtypes": dtypes, "compile": with_compile, "device": device,
                "image": image, "rounds": rounds}  # fmt: skip
    subjects = []
    for name, (model, shape) in networks_of(names, image).items():
        network = measuring.calibrated(model, shape).to(device)
        for batch in batches:
            title = f"{name}, batch {batch}, {shape[1]} px, training"
            subject = (title, network, (batch, *shape), device, _torch_dtypes(dtypes), with_compile)
            subjects.append(measuring.TrainingSubject(*subject))
    run = Run(budget_s, rounds, stop_after_s, out, resume, chart)
    _measure_and_show(ctx, "bench train", settings, subjects, run, as_json)


# ---------------------------------------------------------------------------------------------------------- measuring


def _torch_dtypes(names: Sequence[str]) -> list[torch.dtype]:
    return [SHORT_DTYPES[name] for name in names]


def _measure_and_show(
    ctx: click.Context,
    kind: str,
    settings: dict[str, Any],
    subjects: Sequence[measuring.Subject],
    run: Run,
    as_json: bool,
) -> None:
    """Ends with exit code 1 where a result was wrong or something broke."""
    if run.resume and run.out is None:
        raise click.UsageError("--resume needs --out, the file to go on with.")
    start = Record.here(kind, settings["device"], settings)._replace(kernels=sources.source_digest())
    try:
        with progress_on_stderr(kind) as progress:
            record = measuring.measure(start, subjects, run, progress)
    except measuring.CannotGoOn as error:
        raise click.UsageError(f"--resume: {run.out} {error}") from error
    if run.chart is not None:
        charts.save_png(record, run.chart)
    if as_json:
        print_json(record.as_json())
    elif kind == "bench ops":
        _show_ops(record)
    elif kind == "bench train":
        _show_training(record)
    else:
        _show_networks(record)
    ctx.exit(1 if record.mismatches or record.broken else 0)


# ----------------------------------------------------------------------------------------------------------- showing


def _show_ops(record: Record) -> None:
    from rich.markup import escape

    out = stdout_console()
    table = new_table("convolution", "times", "variant", "us", "TFLOP/s", "GB/s", "% of roofline",
                      f"vs {measuring.UNFUSED}", "error / bound", title=record.device)  # fmt: skip
    for row in record.rows:
        for index, (name, one) in enumerate(row["variants"].items()):
            head = (row["problem"], str(row["count"])) if index == 0 else ("", "")
            chosen = " (auto)" if name in (row["auto"], measuring.chosen_by_auto(row)) else ""
            table.add_row(
                *head, name + chosen, f"{one['median_us']:.1f}", f"{one['tflops']:.3g}", f"{one['gb_per_s']:.3g}",
                f"{one['roofline_percent']:.0f}", speedup_cell(one["speedup"]), _error_ratio(one["error_ratio"]),
            )  # fmt: skip
        for name, ratio in row["not_timed"].items():
            table.add_row("", "", f"[bold red]{name}[/]", "not timed", "", "", "", "WRONG", _error_ratio(ratio))
        for name, reason in row["failed"].items():
            table.add_row("", "", f"[bold red]{name}[/]", "not timed", "", "", "", "FAILED", escape(reason))
        table.add_section()
    out.print(table)
    for dtype, roof in {row["dtype"]: row["roofline"] for row in record.rows}.items():
        l2 = "" if roof["l2_gb_per_s"] is None else f", reading L2 {roof['l2_gb_per_s']:.3g} GB/s"
        out.print(f"Ceilings measured here, {dtype}: copy {roof['gb_per_s']:.3g} GB/s{l2}, matmul "
                  f"{roof['tflops']:.3g} TFLOP/s. Data that stays in caches can exceed them.")  # fmt: skip
    _show_end(out, record)


def _show_networks(record: Record) -> None:
    out = stdout_console()
    for row in record.rows:
        table = new_table("variant", "ms", "p10 - p90", "img/s", "vs eager NCHW fp32", "vs compile, same dtype",
                          "max error / max output", title=f"{row['problem']}, {record.device}")  # fmt: skip
        for name, one in row["variants"].items():
            error, versus = one["max_rel_error"], one["ratio_to_compile"]
            table.add_row(
                name, f"{one['ms']:.3g}", f"{one['p10'] / 1e3:.3g} - {one['p90'] / 1e3:.3g}",
                f"{one['images_per_s']:.4g}", speedup_cell(one["ratio"]),
                "-" if versus is None else speedup_cell(versus), "not finite" if error is None else f"{error:.1e}",
            )  # fmt: skip
        out.print(table)
    _show_end(out, record)


def _show_training(record: Record) -> None:
    out = stdout_console()
    for row in record.rows:
        versus_both = ("vs eager NHWC, same dtype", "of which fusion alone", "vs compile, same dtype")
        columns = ("variant", "ms", "p10 - p90", "img/s", *versus_both)
        kept = ("kept MB", "of eager's", "gradients' error")
        table = new_table(*columns, *kept, title=f"{row['problem']}, {record.device}")
        for name, one in row["variants"].items():
            alone = one["fusion_alone"] if name.startswith("fused") else None
            ratios = (one["ratio_to_eager"], alone, one["ratio_to_compile"])
            table.add_row(
                name, f"{one['ms']:.4g}", f"{one['p10'] / 1e3:.4g} - {one['p90'] / 1e3:.4g}",
                f"{one['images_per_s']:.4g}", *("-" if ratio is None else speedup_cell(ratio) for ratio in ratios),
                f"{one['saved_mb']:.1f}", f"{one['saved_ratio']:.0%}",
                f"{one['max_rel_error']:.1e}",
            )  # fmt: skip
        out.print(table)
    _show_end(out, record)


def _show_predictions(problems: Sequence[Any], name: str, as_json: bool) -> None:
    """Before anything is measured, and in no record: records hold measurements."""
    if as_json:
        raise click.UsageError("--predict prints a table; --json prints measurements alone.")
    from fused_resnet.emulation import predictions

    if reason := predictions.why_not():
        raise click.UsageError(f"--predict: {reason}.")
    out = stdout_console()
    out.print(f"PREDICTIONS for an {name}: nothing was measured, and times are lower bounds (docs/timing-model.md).")
    for problem in problems:
        if isinstance(problem, ConvProblem):
            table = new_table("variant", "predicted us", "bound by", title=str(problem))
            for way, found in predictions.ways(problem._replace(device="cuda"), GPUS[name]):
                table.add_row(way, *(("-", found) if isinstance(found, str) else (f"{found.us:.1f}", found.bound)))
            out.print(table)  # one after the other: a minute each where nothing was compiled before


def _show_end(out, record: Record) -> None:
    """The summary with every loss, what did not run and why, what is left to measure."""
    for entry in record.summary:
        total = entry["total_us_against"] / entry["total_us"]
        where = "" if entry["where"] == "all" else f" ({entry['where']})"
        out.print(
            f"\n{entry['variant']} against {entry['against']}{where}: geometric mean {entry['geomean_speedup']:.2f}x "
            f"over {entry['problems']}, all together {total:.2f}x, worst {entry['worst_speedup']:.2f}x "
            f"({entry['worst_problem']}), {entry['share_won']:.0%} won, {len(entry['losses'])} lost",
            markup=False,
        )
        for loss in entry["losses"]:
            out.print(f"  [bold red]LOSS[/] {loss['speedup']:.2f}x {loss['problem']}")
    for name, reason in dict.fromkeys(pair for row in record.rows for pair in row["skipped"].items()):
        out.print(f"not run: {name}: {reason}", markup=False)
    for name, reason in (record.broken or {}).items():
        out.print(f"BROKEN: {name}: {reason}", markup=False)
    if record.left:
        out.print(f"left to measure: {len(record.left)}, from {record.left[0]} on (--out and --resume go on)",
                  markup=False)  # fmt: skip


def _error_ratio(ratio: Optional[float]) -> str:
    if ratio is None or ratio > 1:
        return f"[bold red]{'not finite' if ratio is None else f'{ratio:.2g}'}[/]"
    return f"{ratio:.2g}"
