"""What fused_resnet does for a trained model, in under three minutes: python -m benchmarks.demo [--out out].

It prints three things, in this order:

- accuracy of a trained ResNet-20 on real CIFAR-10 images
- the speed of ResNet-50 beside eager and torch.compile
- where the JSON, the Markdown table and the chart went
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fused_resnet
from benchmarks import data
from fused_resnet import backends, measuring, models
from fused_resnet.machine import devices
from fused_resnet.measuring import NetworkSubject, Record
from fused_resnet.reporting import charts

DTYPES = (torch.float32, torch.bfloat16)
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def main() -> int:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    started = time.monotonic()
    console.print(
        f"fused_resnet {fused_resnet.__version__} on {devices.device_name(device)}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads\n"
    )
    console.print("[bold]1. Same answers?[/] ResNet-20 with trained weights, real CIFAR-10 test images")
    accuracy = measure_accuracy(device, options.images)
    show_accuracy(accuracy)

    console.print(f"\n[bold]2. Faster?[/] {options.model}, {options.image} px, random weights with calibrated BN")
    runs = measure_speed(device, options)
    for run in runs:
        show_speed(run, device)
    console.print("The error of eager in a dtype is what that dtype costs by itself. Ratios below 1 are losses.")

    settings = {"model": options.model, "image": options.image, "batches": options.batches}
    record = Record.here("demo", device, settings)._replace(rows=runs, more={"accuracy": accuracy})
    written = [
        record.write(options.out / "demo.json"),
        write_markdown(options.out / "demo.md", record, device),
        charts.save_png(record, options.out / "demo.png"),
    ]
    console.print(f"\n[bold]3. Written[/] after {time.monotonic() - started:.0f} s: {', '.join(map(str, written))}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    parser.add_argument("--model", default="resnet50", choices=models.names())
    parser.add_argument("--image", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--images", type=int, default=500, help="CIFAR-10 images to classify, at most 500")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per batch size (default: 20)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------- accuracy


def measure_accuracy(device: str, count: int) -> list[dict[str, Any]]:
    """Per variant: how many of the images it classifies rightly, and how many differently from eager."""
    images, labels = data.load_cifar10_sample()
    x, labels = data.normalize(images[:count]).to(device), labels[:count]
    model = models.cifar.resnet20(weights=data.RESNET20_WEIGHTS).to(device).eval()
    variants = {
        "eager": model,
        "fused": fused_resnet.fuse(copy.deepcopy(model)),
        "frozen fp32": fused_resnet.freeze(model, x),
        "frozen bf16": fused_resnet.freeze(model, x, dtype=torch.bfloat16),
    }
    with torch.no_grad():
        predicted = {name: variant(x).argmax(1).cpu() for name, variant in variants.items()}
    return [
        {
            "variant": name,
            "images": len(labels),
            "correct": int((classes == labels).sum()),
            "changed": int((classes != predicted["eager"]).sum()),
        }
        for name, classes in predicted.items()
    ]


def show_accuracy(rows: list[dict[str, Any]]) -> None:
    table = plain_table("variant", "right", "top-1", "predictions changed")
    for row in rows:
        right = f"{row['correct']} of {row['images']}"
        table.add_row(row["variant"], right, f"{row['correct'] / row['images']:.1%}", str(row["changed"]))
    console.print(table)


# -------------------------------------------------------------------------------------------------------------- speed


def measure_speed(device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    shape = (3, options.image, options.image)
    torch.manual_seed(0)
    model = measuring.calibrated(models.create(options.model), shape).to(device)
    baselines = ("eager", "folded") if options.no_compile else ("eager", "folded", "compile")
    runs = []
    for batch in options.batches:
        subject = NetworkSubject(f"batch {batch}", model, (batch, *shape), device, DTYPES, baselines)
        with console.status("") as status:
            runs.append(subject.measured(options.budget, progress=reporter(status, subject.name)))
    return runs


def reporter(status, title: str):
    """A live line on a terminal; elsewhere one line per stage."""
    seen = set()

    def report(fraction: float, text: str) -> None:
        status.update(f"{title}: {text}")
        stage = text.split(" ")[0] if text.startswith("round") else text
        if not console.is_terminal and stage not in seen:
            seen.add(stage)
            console.print(f"  {title}: {stage}")

    return report


def label(name: str, device: str) -> str:
    """The variant's name, with a remark where bf16 has no instructions of its own on this machine."""
    return name if not name.endswith("bf16") or has_native_bf16(device) else f"{name} (no native bf16 here)"


def has_native_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return backends.onednn_missing(torch.bfloat16) is None


def columns(run: dict[str, Any], device: str) -> list[tuple[str, ...]]:
    """One row of text per variant: name, ms, img/s, both ratios, error."""
    rows = []
    for name, one in run["variants"].items():
        versus = one["ratio_to_compile"]
        error = one["max_rel_error"]
        speed = (f"{one['ms']:.1f}", f"{one['images_per_s']:.1f}", f"{one['ratio']:.2f}x")
        ratio_to_compile = "-" if versus is None else f"{versus:.2f}x"
        rows.append((label(name, device), *speed, ratio_to_compile, "not finite" if error is None else f"{error:.0e}"))
    return rows


HEADINGS = ("variant", "ms", "img/s", "vs eager", "vs compile, same dtype", "error vs fp64")


def show_speed(run: dict[str, Any], device: str) -> None:
    table = plain_table(*HEADINGS, title=f"batch {run['batch']}")
    for row in columns(run, device):
        table.add_row(*row, style="bold" if row[0].startswith("frozen") else None)
    console.print(table)
    for name, reason in run["skipped"].items():
        console.print(f"  not run: {name}: {reason}", markup=False)


def plain_table(*names: str, title: str = "") -> Table:
    table = Table(*names, title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


# -------------------------------------------------------------------------------------------------------------- files


def caption(record: Record) -> str:
    environment = record.environment
    return (
        f"{record.device}, {environment['threads']} CPU threads, torch {environment['torch']}, "
        f"{environment['date'][:10]}"
    )


def write_markdown(path: Path, record: Record, device: str) -> Path:
    """The tables of the demo as Markdown."""
    settings = record.settings
    lines = [f"# {settings['model']}, {settings['image']} px", "", f"{caption(record)}.", ""]
    for run in record.rows:
        rows = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1), *columns(run, device)]
        lines += [f"Batch {run['batch']}:", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        lines += [f"Not run: {name}: {reason}." for name, reason in run["skipped"].items()]
    lines += ["ResNet-20 on CIFAR-10 images, trained weights:", "", "| variant | right | predictions changed |"]
    lines += ["| --- | ---: | ---: |"]
    lines += [f"| {row['variant']} | {row['correct']} of {row['images']} | {row['changed']} |"
              for row in record.more["accuracy"]]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
