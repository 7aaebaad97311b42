"""What the commands share: parameters and options, tables, progress on stderr, one JSON document on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

import click
import torch

from fused_resnet import measuring, models
from fused_resnet.choosing import timing
from fused_resnet.machine.cuda_graphs import best_algorithms
from fused_resnet.operators.problem import SHORT_DTYPES

_SECONDS_BETWEEN_LINES = 2.0
_TEXT_COLUMNS = {"operator", "backend", "cpu", "cuda", "operator/backend", "convolution", "variant"}


class Listed(click.ParamType):
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


class Batches(click.ParamType):
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


class Device(click.ParamType):
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
            self.fail(f"{why_no_cuda()}.", param, ctx)
        last = torch.cuda.device_count() - 1
        # torch keeps an index in eight bits: to it cuda:256 is cuda:0
        if str(device) != value or not 0 <= (device.index or 0) <= last:
            self.fail(f"there is no device {value!r}; the last one is cuda:{last}.", param, ctx)
        return value


def why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device"


def options(*options: Callable) -> Callable:
    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


as_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
device_option = click.option("--device", type=Device(), default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu or cuda; default, cuda where there is one.")  # fmt: skip
model_option = click.option("--model", type=Listed("model", models.names), default="resnet50", show_default=True)
dtype_option = click.option("--dtype", type=Listed("dtype", lambda: tuple(SHORT_DTYPES)), default="fp32",
                      show_default=True)  # fmt: skip
dtypes_option = click.option(
    "--dtype", "dtypes", type=Listed("dtype", lambda: tuple(SHORT_DTYPES), many=True),
    default="fp32,bf16", show_default=True,
)  # fmt: skip
measuring_options = options(
    click.option("--image", type=click.IntRange(min=1), default=None, help="Image size; default, the model's own."),
    click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default, torch's choice."),
    click.option("--budget", "budget_s", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
                 help="Seconds of timing in all; every variant is timed at least three times."),
    click.option("--rounds", type=click.IntRange(min=1), default=None, help="At most so many rounds."),
    click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=None,
                 help="Also write the JSON to this file."),
    as_json_option,
)  # fmt: skip


def prepare(device: str, threads: Optional[int]) -> None:
    """Settle the seed, the threads and the device of a command; on CUDA rivals run their best algorithms in it, too."""
    torch.manual_seed(0)
    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)  # takes no "cuda"
        click.get_current_context().with_resource(best_algorithms())


def image_shape(model: str, image: Optional[int]) -> tuple[int, int, int]:
    channels, height, width = models.input_shape(model)
    return (channels, image or height, image or width)


def networks_of(names: Sequence[str], image: Optional[int]) -> dict[str, tuple[torch.nn.Module, tuple[int, int, int]]]:
    """(model, image shape) by name."""
    return {name: (models.create(name), image_shape(name, image)) for name in names}


def stdout_console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def new_table(*columns: str, title: Optional[str] = None):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right", overflow="fold")
    return table


def print_json(record: Any) -> None:
    click.echo(json.dumps(record, indent=1, allow_nan=False))


@contextlib.contextmanager
def progress_on_stderr(title: str) -> Iterator[timing.Progress]:
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


def speedup_cell(speedup: float) -> str:
    text = f"{speedup:.2f}x"
    return f"[bold red]{text} LOSS[/]" if speedup < measuring.LOSS_BELOW else text
