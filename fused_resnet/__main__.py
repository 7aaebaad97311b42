"""The command line: `fused-resnet info | verify | bench ops|blocks|model`, or `python -m fused_resnet`.

Results go to stdout, as tables or with --json as one JSON document; progress and errors go to stderr.
Exit codes: 0, 1 for a mismatch or a failure, 2 for wrong arguments, 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

import click
import torch

import fused_resnet
from fused_resnet import backends, bench, extension, models, provenance, testing, timing
from fused_resnet.problem import ACTIVATIONS, FLOAT_DTYPES, ConvProblem, dtype_name

_SECONDS_BETWEEN_LINES = 2.0
_TEXT_COLUMNS = {"operator", "backend", "cpu", "cuda", "operator/backend", "convolution", "variant"}


# --------------------------------------------------------------------------------------------------------- parameters


class _Listed(click.ParamType):
    """Values out of a known set, separated by commas; the error lists what is known."""

    def __init__(self, name: str, known: Callable[[], Sequence[str]], many: bool = False) -> None:
        self.name, self.known, self.many = name, known, many

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")] if self.many else [value]
        for part in parts:
            if part not in self.known():
                self.fail(f"unknown {self.name} {part!r}; known ones are {', '.join(self.known())}.", param, ctx)
        return tuple(dict.fromkeys(parts)) if self.many else value


class _Batches(click.ParamType):
    name = "batch"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            batches = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,8.", param, ctx)
        if min(batches) < 1:
            self.fail(f"a batch has at least one image, got {value}.", param, ctx)
        return batches


class _Device(click.ParamType):
    name = "device"

    def convert(self, value, param, ctx):
        try:
            device = torch.device(value)
        except RuntimeError:
            device = None
        if device is None or value not in ("cpu", "cpu:0") and device.type != "cuda":
            self.fail(f"unknown device {value!r}; known ones are cpu, cuda and cuda:N.", param, ctx)
        if device.type == "cpu":
            return "cpu"
        if not torch.cuda.is_available():
            self.fail(f"{_why_no_cuda()}.", param, ctx)
        last = torch.cuda.device_count() - 1
        # torch keeps an index in eight bits: to it cuda:256 is cuda:0
        if str(device) != value or not 0 <= (device.index or 0) <= last:
            self.fail(f"there is no device {value!r}; the last one is cuda:{last}.", param, ctx)
        return value


def _backend_names() -> list[str]:
    return list(dict.fromkeys(name for op in ("conv_bn_act", "add_relu") for name in backends.known(op)))


def _options(*options: Callable) -> Callable:
    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_device = click.option("--device", type=_Device(), default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu or cuda; default, cuda where there is one.")  # fmt: skip
_model = click.option("--model", type=_Listed("model", models.names), default="resnet50", show_default=True)
_dtype = click.option("--dtype", type=_Listed("dtype", lambda: tuple(bench.SHORT_DTYPES)), default="fp32",
                      show_default=True)  # fmt: skip
_dtypes = click.option("--dtype", "dtypes", type=_Listed("dtype", lambda: tuple(bench.SHORT_DTYPES), many=True),
                       default="fp32,bf16", show_default=True)  # fmt: skip
_measuring = _options(
    click.option("--image", type=click.IntRange(min=1), default=None, help="Image size; default, the model's own."),
    click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default, torch's choice."),
    click.option("--budget", "budget_s", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
                 help="Seconds of timing in all; every variant is timed at least three times."),
    click.option("--rounds", type=click.IntRange(min=1), default=None, help="At most so many rounds."),
    click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=None,
                 help="Also write the JSON to this file."),
    _as_json,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fused_resnet.__version__, prog_name="fused-resnet")
def cli() -> None:
    """Fused residual networks: what works here, is it right, is it fast."""


# --------------------------------------------------------------------------------------------------------------- info


@cli.command()
@_as_json
def info(as_json: bool) -> None:
    """Versions, devices, backends and compiled parts: what is missing, why, and what to do."""
    record = collect_info()
    if as_json:
        return _print_json(record)
    out = _console()
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in record["versions"].items())
    cpu, gpu = record["devices"]["cpu"], record["devices"]["cuda"]
    out.print(versions)
    out.print(f"CPU: {cpu['name']}, {cpu['threads']} threads, {' '.join(cpu['flags']) or 'no vector flags known'}")
    for dtype, reason in cpu["onednn"].items():
        out.print(f"  oneDNN {dtype}: {'yes' if reason is None else reason}")
    for name in gpu["names"] or [f"none ({gpu['why']})"]:
        out.print(f"GPU: {name}")
    out.print(f"Triton: {record['triton_error'] or 'imported'}\n")
    rows: dict[tuple[str, str], list[str]] = {}
    reasons: list[str] = []
    for entry in record["backends"]:
        rows.setdefault((entry["op"], entry["backend"]), []).append(_support(entry, reasons))
    devices = dict.fromkeys(entry["device"] for entry in record["backends"])
    table = _table("operator", "backend", *devices, title="Backends: the dtypes they run; (1), (2): why not")
    for operator_and_backend, cells in rows.items():
        table.add_row(*operator_and_backend, *cells)
    out.print(table)
    for number, reason in enumerate(reasons, 1):
        out.print(f"({number}) {reason}", markup=False)
    out.print()
    for part, entry in record["parts"].items():
        out.print(f"{part}: {'present' if entry['present'] else 'absent'}{', loaded' if entry['loaded'] else ''}")
        if entry["why"]:
            out.print(f"  {entry['why']}")
    out.print(f"\nProvenance: {record['provenance']['sentence']}")


def collect_info() -> dict[str, Any]:
    """Everything `fused-resnet info` shows, as plain values."""
    from fused_resnet.triton_kernels import runtime

    record = timing.environment()
    state = provenance.newest()
    has_cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_cuda else []
    return {
        "versions": {
            "fused_resnet": fused_resnet.__version__,
            **{name: record[name] for name in ("python", "torch", "triton")},
            "cuda": torch.version.cuda,
        },
        "devices": {
            "cpu": {
                "name": record["cpu"],
                "threads": record["threads"],
                "flags": record["cpu_flags"],
                "onednn": {short: backends.onednn_missing(dtype) for short, dtype in bench.SHORT_DTYPES.items()},
            },
            "cuda": {"names": names, "why": None if has_cuda else _why_no_cuda()},
        },
        "triton_error": None if runtime.IMPORT_ERROR is None else str(runtime.IMPORT_ERROR),
        "backends": [
            _backend_info(op, backend, device)
            for op in ("conv_bn_act", "add_relu")
            for backend in backends.known(op).values()
            for device in ("cpu", "cuda")
            if device == "cpu" or has_cuda
        ],
        "parts": extension.status(),
        "provenance": {"sentence": str(state), **state._asdict()},
    }


def _backend_info(op: str, backend: backends.Backend, device: str) -> dict[str, Any]:
    return {
        "op": op,
        "backend": backend.name,
        "device": device,
        "auto": device in backend.auto,
        "dtypes": {dtype_name(dtype): backend.why_not(_example(op, dtype, device)) for dtype in FLOAT_DTYPES},
    }


def _example(op: str, dtype: torch.dtype, device: str) -> backends.Problem:
    """A convolution with folded BN and ReLU as every ResNet has it, or an addition."""
    if op == "add_relu":
        return backends.AddReluProblem((1, 64, 56, 56), True, dtype, device)
    return ConvProblem(
        1, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, ACTIVATIONS[1], False, True, False, dtype, device
    )  # fmt: skip


def _support(entry: dict[str, Any], reasons: list[str]) -> str:
    """The dtypes an entry of `collect_info` runs, and the others with the number of their reason in `reasons`, where
    new ones are added."""
    runs: list[str] = []
    others: dict[int, list[str]] = {}
    for dtype, reason in entry["dtypes"].items():
        short = dtype.replace("bfloat", "bf").replace("float", "fp")
        if reason is None:
            runs.append(short)
            continue
        if reason not in reasons:
            reasons.append(reason)
        others.setdefault(reasons.index(reason) + 1, []).append(short)
    if not runs and len(others) == 1:
        return f"no ({next(iter(others))})"
    parts = [("auto: " if entry["auto"] else "") + ", ".join(runs)] if runs else []
    if others:
        parts.append("no: " + ", ".join(f"{', '.join(names)} ({number})" for number, names in others.items()))
    return "; ".join(parts)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device"


# ------------------------------------------------------------------------------------------------------------- verify


@cli.command()
@click.option("--problems", type=click.IntRange(min=1), default=200, show_default=True, help="How many to draw.")
@click.option("--seed", type=int, default=0, show_default=True)
@_device
@click.option("--backend", "chosen", multiple=True, type=_Listed("backend", _backend_names),
              help="Repeat for several; default, all.")  # fmt: skip
@_as_json
@click.pass_context
def verify(ctx, problems: int, seed: int, device: str, chosen: tuple[str, ...], as_json: bool) -> None:
    """Random problems on every backend against the fp64 reference. Exit code 1 when one differs.

    A backend asked for by name that could not run a single problem is a failure too.
    """
    with _progress(f"verify on {device}") as progress:
        report = testing.verify(
            problems, seed, device, chosen or None,
            progress=lambda index: progress((index + 1) / problems, f"{index + 1}/{problems}"),
        )  # fmt: skip
    idle = [name for name in chosen if not any(_ran(entry) for key, entry in report.backends.items()
                                               if key.split("/")[1] == name)]  # fmt: skip
    if as_json:
        _print_json({**report.as_dict(), "asked_for_but_never_ran": idle})
    else:
        _show_report(report)
        for name in idle:
            click.echo(f"verify: backend {name!r} could not run any of these problems.", err=True)
    ctx.exit(0 if report.passed and not idle else 1)


def _ran(entry: testing.BackendReport) -> int:
    return entry.ok + len(entry.mismatches)


def _show_report(report: testing.Report) -> None:
    out = _console()
    table = _table("operator/backend", "ok", "mismatches", "not run", "worst error / bound",
                   title=f"{report.problems} problems, seed {report.seed}, {report.device}")  # fmt: skip
    for name, entry in sorted(report.backends.items()):
        wrong = f"[bold red]{len(entry.mismatches)}[/]" if entry.mismatches else "0"
        worst = f"{entry.worst_error:.3f}" if entry.ok else "-"
        table.add_row(name, str(entry.ok), wrong, str(sum(entry.cannot_run.values())), worst)
    out.print(table)
    for name, entry in sorted(report.backends.items()):
        for reason, count in sorted(entry.cannot_run.items(), key=lambda item: -item[1]):
            out.print(f"{name}: {count} not run: {reason}", markup=False)
        for mismatch in entry.mismatches:
            lines = (f"MISMATCH {name}: {mismatch['call']}", mismatch["problem"], mismatch["detail"])
            out.print("\n  ".join(lines), markup=False)
    out.print("no mismatch" if report.passed else "[bold red]some results differ from the reference[/]")


# -------------------------------------------------------------------------------------------------------------- bench


@cli.group("bench")
def bench_group() -> None:
    """Measure: variants interleaved in one process, medians, each checked before it is timed."""


@bench_group.command("ops")
@_model
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@_dtype
@_device
@_measuring
@click.pass_context
def bench_ops(ctx, model, batch, dtype, device, image, threads, budget_s, rounds, out, as_json) -> None:
    """Every distinct convolution of a model on every backend that can run it, beside eager unfused."""
    _prepare(device, threads)
    shape = _image_shape(model, image)
    settings = {"model": model, "batch": batch, "dtype": dtype, "device": device, "image": shape[1],
                "budget_s": budget_s, "rounds": rounds}  # fmt: skip
    with _progress(f"bench ops, {model}") as progress:
        progress(0.0, "reading the model's convolutions")
        network = models.create(model)
        problems = bench.convs_of(network, shape, batch, bench.SHORT_DTYPES[dtype], device)
        measured = bench.bench_ops(problems, device=device, budget_s=budget_s, rounds=rounds, progress=progress)
    record = _finish("bench ops", settings, device, measured, out)
    if as_json:
        _print_json(record)
    else:
        _show_ops(record)
    ctx.exit(1 if record["mismatches"] else 0)


@bench_group.command("blocks")
@_model
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@_dtypes
@_device
@_measuring
def bench_blocks(model, batch, dtypes, device, image, threads, budget_s, rounds, out, as_json) -> None:
    """The last residual block of each stage: plain, fused, frozen, torch.compile."""
    _prepare(device, threads)
    shape = _image_shape(model, image)
    settings = {"model": model, "batch": batch, "dtypes": dtypes, "device": device, "image": shape[1],
                "budget_s": budget_s, "rounds": rounds}  # fmt: skip
    rows = []
    with _progress(f"bench blocks, {model}") as progress:
        network = bench.calibrated(models.create(model), shape).to(device)
        blocks = bench.blocks_of(network, shape)
        for index, (name, block, input_shape) in enumerate(blocks):
            x = torch.randn(batch, *input_shape, device=device)
            measured = bench.bench_network(
                block, x, device=device, budget_s=budget_s / len(blocks), rounds=rounds, with_fused=True,
                dtypes=[bench.SHORT_DTYPES[dtype] for dtype in dtypes],
                progress=_part_of(progress, index, len(blocks), name),
            )  # fmt: skip
            problem = f"{type(block).__name__} {name} {'x'.join(map(str, x.shape))}"
            rows.append({"problem": problem, "input": list(input_shape), **measured})
    measured = {"rows": rows, "summary": bench.summarise(rows, "eager NCHW fp32")}
    record = _finish("bench blocks", settings, device, measured, out)
    if as_json:
        return _print_json(record)
    console = _console()
    for row in rows:
        _show_network(console, row["problem"], row)
    _show_summary(console, record["summary"])


@bench_group.command("model")
@_model
@click.option("--batch", "batches", type=_Batches(), default="1,8", show_default=True)
@_dtypes
@click.option("--baseline", "baselines", multiple=True, type=_Listed("baseline", lambda: bench.BASELINES),
              help=f"Repeat for several: {', '.join(bench.BASELINES)}. Default: eager, folded, compile.")
@click.option("--backend", "frozen_backends", multiple=True, default=("auto",), show_default=True,
              type=_Listed("backend", lambda: ("auto", *backends.known("conv_bn_act"))),
              help="Backends to freeze with.")
@_device
@_measuring
def bench_model(
    model, batches, dtypes, baselines, frozen_backends, device, image, threads, budget_s, rounds, out, as_json
) -> None:
    """A whole model: eager, folded, torch.compile, frozen, and other runtimes where installed."""
    _prepare(device, threads)
    shape = _image_shape(model, image)
    baselines = baselines or ("eager", "folded", "compile")
    settings = {"model": model, "batches": batches, "dtypes": dtypes, "baselines": baselines, "device": device,
                "backends": frozen_backends, "image": shape[1], "budget_s": budget_s, "rounds": rounds}  # fmt: skip
    runs = []
    with _progress(f"bench model, {model}") as progress:
        progress(0.0, "calibrating BN statistics")
        network = bench.calibrated(models.create(model), shape).to(device)
        for index, batch in enumerate(batches):
            measured = bench.bench_network(
                network, torch.randn(batch, *shape, device=device), device=device, budget_s=budget_s / len(batches),
                rounds=rounds, dtypes=[bench.SHORT_DTYPES[dtype] for dtype in dtypes], baselines=baselines,
                frozen_backends=frozen_backends,
                progress=_part_of(progress, index, len(batches), f"batch {batch}"),
            )  # fmt: skip
            runs.append(measured)
    record = _finish("bench model", settings, device, {"runs": runs}, out)
    if as_json:
        return _print_json(record)
    for run in runs:
        _show_network(_console(), f"{model}, batch {run['batch']}, {shape[1]} px, {record['device']}", run)


def _part_of(progress: timing.Progress, index: int, parts: int, title: str) -> timing.Progress:
    """Progress of part number `index` as progress of the whole."""
    return lambda fraction, text: progress((index + fraction) / parts, f"{title}: {text}")


def _prepare(device: str, threads: Optional[int]) -> None:
    torch.manual_seed(0)
    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)  # takes no "cuda"
        torch.backends.cudnn.benchmark = True  # the competitor's best algorithm, not its first guess


def _image_shape(model: str, image: Optional[int]) -> tuple[int, int, int]:
    channels, height, width = models.input_shape(model)
    return (channels, image or height, image or width)


def _finish(kind: str, settings: dict, device: str, measured: dict[str, Any], out: Optional[Path]) -> dict[str, Any]:
    """The record of a measurement, written to `out` if that is given."""
    record = {
        "kind": kind,
        "device": timing.device_name(device),
        "settings": settings,
        "environment": timing.environment(device),
        **measured,
    }
    if out is not None:
        timing.write_json(out, record)
    return json.loads(json.dumps(record))


# ------------------------------------------------------------------------------------------------------------- tables


def _show_ops(record: dict[str, Any]) -> None:
    out, settings = _console(), record["settings"]
    roof = record["roofline"]
    title = f"{settings['model']}, batch {settings['batch']}, {settings['dtype']}, {record['device']}"
    table = _table("convolution", "times", "variant", "us", "TFLOP/s", "GB/s", "% of roofline", f"vs {bench.UNFUSED}",
                   "error / bound", title=title)  # fmt: skip
    for row in record["rows"]:
        for index, (name, one) in enumerate(row["variants"].items()):
            head = (row["problem"], str(row["count"])) if index == 0 else ("", "")
            chosen = " (auto)" if name == row["auto"] else ""
            table.add_row(
                *head, name + chosen, f"{one['median_us']:.1f}", f"{one['tflops']:.3g}", f"{one['gb_per_s']:.3g}",
                f"{one['roofline_percent']:.0f}", _ratio(one["speedup"]), _error_ratio(one["error_ratio"]),
            )  # fmt: skip
        for name, ratio in row["not_timed"].items():
            table.add_row("", "", f"[bold red]{name}[/]", "not timed", "", "", "", "WRONG", _error_ratio(ratio))
        table.add_section()
    out.print(table)
    out.print(f"Roofline measured here: copy {roof['gb_per_s']:.3g} GB/s, matmul {roof['tflops']:.3g} TFLOP/s. "
              "Data that stays in caches can exceed it.")  # fmt: skip
    _show_summary(out, record["summary"])
    reasons = {(name, reason): None for row in record["rows"] for name, reason in row["skipped"].items()}
    for name, reason in reasons:
        out.print(f"not run: {name}: {reason}", markup=False)


def _show_summary(out, summary: Sequence[dict[str, Any]]) -> None:
    for entry in summary:
        total = entry["total_us_against"] / entry["total_us"]
        out.print(
            f"\n{entry['variant']} against {entry['against']}: geometric mean {entry['geomean_speedup']:.2f}x over "
            f"{entry['problems']}, all together {total:.2f}x, worst {entry['worst_speedup']:.2f}x "
            f"({entry['worst_problem']}), {len(entry['losses'])} losses",
            markup=False,
        )
        for loss in entry["losses"]:
            out.print(f"  [bold red]LOSS[/] {loss['speedup']:.2f}x {loss['problem']}")


def _show_network(out, title: str, measured: dict[str, Any]) -> None:
    table = _table("variant", "ms", "p10 - p90", "img/s", "vs eager NCHW fp32", "vs compile, same dtype",
                   "max error / max output", title=title)  # fmt: skip
    for name, one in measured["variants"].items():
        error = one["max_rel_error"]
        versus = one["ratio_to_compile"]
        table.add_row(
            name, f"{one['ms']:.3g}", f"{one['p10'] / 1e3:.3g} - {one['p90'] / 1e3:.3g}", f"{one['images_per_s']:.4g}",
            _ratio(one["ratio"]), "-" if versus is None else _ratio(versus),
            "not finite" if error is None else f"{error:.1e}",
        )  # fmt: skip
    out.print(table)
    for name, reason in measured["skipped"].items():
        out.print(f"not run: {name}: {reason}", markup=False)


def _ratio(speedup: float) -> str:
    text = f"{speedup:.2f}x"
    return f"[bold red]{text} LOSS[/]" if speedup < bench.LOSS_BELOW else text


def _error_ratio(ratio: Optional[float]) -> str:
    if ratio is None or ratio > 1:
        return f"[bold red]{'not finite' if ratio is None else f'{ratio:.2g}'}[/]"
    return f"{ratio:.2g}"


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def _table(*columns: str, title: Optional[str] = None):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right", overflow="fold")
    return table


def _print_json(record: Any) -> None:
    click.echo(json.dumps(record, indent=1, allow_nan=False))


@contextlib.contextmanager
def _progress(title: str) -> Iterator[timing.Progress]:
    """A bar on stderr, or a plain line every two seconds where that is no terminal."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(fraction: float, text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                click.echo(f"{title}: {100 * fraction:.0f} % {text}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=f"{title}: {text}")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return cli.main(arguments, prog_name="fused-resnet", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except (backends.BackendError, ValueError, TypeError, OSError) as error:
        click.echo(f"fused-resnet: {error}", err=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
