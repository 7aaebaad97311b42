"""Trained networks on labelled images, frozen: python -m benchmarks.cpu_check.accuracy --out accuracy.json

| network | images | fp32 | bf16 | int8 |
| --- | --- | --- | --- | --- |
| ResNet-20, 32 and 56 | CIFAR-10's test images | 0.02 % changed | 0.15 points | 0.3 points, 1 % changed, 29 dB |
| ResNet-50 | 400 of ImageNet's classes, in int8 300 | none changed | 1.5 % changed | 1 point, 2 % changed, 23 dB |

A row is one network in one dtype against itself in fp32 as torch computes it: points of top-1, predictions changed, and
SQNR of the logits. In int8 16 images calibrate, which are not counted. Beside it stands what NNCF's default makes of
the same images, by OpenVINO with all that is not quantised in fp32. Ours must have the higher SQNR. With --resume rows
that --out has of this commit and machine are kept. Exit code 1 for a missed bar, and for rows that are left.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

import fused_resnet
from benchmarks import data
from benchmarks.data import trained
from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.kernels import sources
from fused_resnet.machine.errors import why_missing
from fused_resnet.measuring import CannotGoOn, Record, Run, measure, rivals
from fused_resnet.measuring.agreement import Agreement, agreement
from fused_resnet.measuring.summary import Row
from fused_resnet.operators.problem import SHORT_DTYPES
from fused_resnet.regions import kernels

CALIBRATION_IMAGES = 16
DTYPES = {"fp32": torch.float32, "bf16": SHORT_DTYPES["bf16"], "int8": torch.int8}


class Limits(NamedTuple):
    """points: of top-1, either way. changed: share of the predictions. sqnr_db: at least."""

    points: Optional[float] = None
    changed: Optional[float] = None
    sqnr_db: Optional[float] = None

    def missed(self, found: Agreement) -> list[str]:
        assert found.drop is not None
        share = found.changed / found.images
        parts = [] if self.points is None or abs(found.drop) <= self.points + 1e-9 else [
            f"top-1 differs by {found.drop:+.2f} points, more than {self.points:g}"
        ]  # fmt: skip
        if self.changed is not None and share > self.changed:
            parts.append(f"{100 * share:.2f} % changed, more than {100 * self.changed:g} %")
        if self.sqnr_db is not None and not found.sqnr_db >= self.sqnr_db:
            parts.append(f"{found.sqnr_db:.1f} dB, less than {self.sqnr_db:g}")
        return parts


CIFAR = {"fp32": Limits(changed=2 / 10_000), "bf16": Limits(points=0.15), "int8": Limits(0.3, 0.01, 29.0)}
IMAGENET = {"fp32": Limits(changed=0.0), "bf16": Limits(changed=6 / 400), "int8": Limits(1.0, 0.02, 23.0)}


class Images(NamedTuple):
    inputs: Tensor
    labels: Tensor


class Network(NamedTuple):
    """A trained network, its images, and those that calibrate it. count: None for all of them."""

    create: Callable[[], nn.Module]
    images: Callable[[Optional[int]], Images]
    in_int8: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    limits: dict[str, Limits]

    def why_not(self) -> Optional[str]:
        """What is missing of it here, if anything."""
        try:
            self.create(), self.images(1)
        except trained.Missing as error:
            return str(error)
        return None


def _cifar(split: str, count: Optional[int]) -> Images:
    images, labels = trained.cifar10(split, count)
    return Images(data.normalize(images), labels)


def _calibrating_cifar() -> tuple[Tensor, Tensor]:
    """Images of another set that calibrate, and the numbers of those that are counted: all."""
    return _cifar("train_batch1", CALIBRATION_IMAGES).inputs, torch.arange(10_000)


@functools.cache
def _imagenet(count: Optional[int]) -> Images:
    return Images(*trained.imagenet_400(400 if count is None else count))


def _calibrating_imagenet() -> tuple[Tensor, Tensor]:
    """As the study of int8 divides them: a hundred to calibrate with, of which some are taken, the others to count."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    return _imagenet(None).inputs[order[:CALIBRATION_IMAGES]], order[100:]


NETWORKS = {
    **{
        name: Network(
            functools.partial(trained.akamaster, name),
            functools.partial(_cifar, "test"),
            _calibrating_cifar,
            250,
            CIFAR,
        )
        for name in ("resnet20", "resnet32", "resnet56")
    },
    "resnet50": Network(trained.keras_resnet50, _imagenet, _calibrating_imagenet, 10, IMAGENET),
}


class Subject(NamedTuple):
    """A network in a dtype: the subject of a row. count: of the images at most."""

    network: str
    dtype: str
    count: Optional[int]

    @property
    def name(self) -> str:
        return f"{self.network} {self.dtype}"

    def measured(self, budget_s: float, rounds: Optional[int] = None, progress: Progress = silent) -> Row:
        network = NETWORKS[self.network]
        model, images = network.create(), network.images(None)
        options: dict[str, Any] = {"dtype": DTYPES[self.dtype]}
        chosen, calibrating = torch.arange(len(images.labels)), None
        if self.dtype == "int8":
            calibrating, chosen = network.in_int8()
            options["calibrate"] = [calibrating]
        exact = plain_logits(self.network, self.count)
        chosen = chosen[chosen < len(exact)]
        counted = Images(images.inputs[chosen], images.labels[chosen])

        def compared(fast: Callable[[Tensor], Tensor], title: str) -> Agreement:
            answers = iter(exact[chosen].split(network.batch))
            loader = zip(*(values.split(network.batch) for values in counted))
            told = lambda done: progress(done / len(chosen), f"{title}: {done} images")  # noqa: E731
            return agreement(lambda x: next(answers), fast, loader, progress=told)

        found = compared(fused_resnet.freeze(model, counted.inputs[: network.batch], **options), "frozen")
        limits = network.limits[self.dtype]
        row = {
            "network": self.network, "dtype": self.dtype, **as_json(found),
            "limits": limits._asdict(), "missed": limits.missed(found),
        }  # fmt: skip
        if calibrating is None:
            return row
        try:
            theirs = compared(by_nncf(model, calibrating, network.batch), "NNCF")
        except Exception as error:
            return {**row, "calibration_images": len(calibrating), "nncf": {"missing": why_missing(error)}}
        if not found.sqnr_db > theirs.sqnr_db:
            row["missed"] = [*row["missed"], f"{found.sqnr_db:.1f} dB, NNCF's default {theirs.sqnr_db:.1f} dB"]
        return {**row, "calibration_images": len(calibrating), "nncf": as_json(theirs)}


@functools.lru_cache(maxsize=1)
def plain_logits(network: str, count: Optional[int]) -> Tensor:
    """What the network answers as torch computes it in fp32."""
    found = NETWORKS[network]
    model, inputs = found.create(), found.images(count).inputs
    with torch.inference_mode():
        return torch.cat([model(x) for x in inputs.split(found.batch)])


def by_nncf(model: nn.Module, calibrating: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """The network as NNCF quantises it by default, for so many images at most."""
    calls: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in calls:
            taken = torch.empty_like(x)
            calls[len(x)] = taken, rivals.quantized_in_openvino(model, taken, list(calibrating.split(1)), rest="f32")
        taken, call = calls[len(x)]
        taken.copy_(x)
        return call().clone()

    run(calibrating[:1].expand(batch, -1, -1, -1).contiguous())
    return run


def as_json(found: Agreement) -> dict[str, Any]:
    sqnr = found.sqnr_db if math.isfinite(found.sqnr_db) else None  # JSON has no infinity
    return {**found._asdict(), "sqnr_db": sqnr, "drop": found.drop}


def markdown(record: Record) -> str:
    """The table as it is printed, with what was skipped and missed below."""
    head = ["network", "dtype", "images", "top-1 in fp32, %", "top-1, %", "changed", "SQNR, dB", "NNCF: changed",
            "NNCF: SQNR, dB", "verdict"]  # fmt: skip
    lines = [f"{record.device}, {', '.join(record.environment['cpu_flags'])}", "",
             f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]  # fmt: skip
    for row in record.rows:
        theirs = row.get("nncf", {})
        shares = (f"{100 * row[name]:.2f}" for name in ("top1", "fast_top1"))
        cells = [row["network"], row["dtype"], row["images"], *shares, row["changed"],
                 _decibels(row), theirs.get("changed", theirs.get("missing", "")),
                 _decibels(theirs), "MISSED" if row["missed"] else "ok"]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    missed = [f"{row['problem']}: {one}" for row in record.rows for one in row["missed"]]
    lines += ["", f"Missed: {'; '.join(missed) or 'none'}."]
    for what, reasons in (("Skipped", record.more.get("skipped")), ("Not measured", record.broken)):
        lines += [f"{what}: {name}: {why}." for name, why in (reasons or {}).items()]
    return "\n".join(lines)


def _decibels(found: dict[str, Any]) -> str:
    sqnr = found.get("sqnr_db")
    return "" if sqnr is None else f"{sqnr:.1f}"


def why_skipped(network: str, dtype: str) -> Optional[str]:
    if dtype == "int8" and (why := kernels.why_none(torch.int8)) is not None:
        return why
    return NETWORKS[network].why_not()


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse_arguments(arguments)
    wanted = [Subject(network, dtype, options.images) for network in options.network for dtype in options.dtype]
    skipped = {one.name: why for one in wanted if (why := why_skipped(one.network, one.dtype)) is not None}
    subjects = [one for one in wanted if one.name not in skipped]
    start = Record.here("accuracy", "cpu")
    commit = {name: start.environment[name] for name in ("commit", "dirty")}
    start = start._replace(
        settings={"images": options.images, **commit}, kernels=sources.source_digest(), more={"skipped": skipped}
    )
    run = Run(0.0, None, options.stop_after, options.out, options.resume)

    def show(fraction: float, text: str) -> None:
        print(f"{100 * fraction:3.0f} %  {text}", file=sys.stderr, flush=True)

    progress = show if options.progress else silent
    try:
        record = measure(start, subjects, run, progress)
    except CannotGoOn as error:
        print(f"cpu_check.accuracy: begun anew, {options.out} {error}", file=sys.stderr)
        record = measure(start, subjects, run._replace(resume=False), progress)
    if options.out is not None:
        record.write(options.out)
        options.out.with_suffix(".md").write_text(markdown(record) + "\n")
    print(markdown(record))
    missed, left = [row["problem"] for row in record.rows if row["missed"]], record.left or []
    parts = [f"{len(record.rows)} rows", f"{len(skipped)} skipped", f"{len(left)} left", f"{len(missed)} missed"]
    print(", ".join(parts) + (f": {', '.join(missed)}" if missed else ""))
    return 1 if missed or left else 0


def parse_arguments(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_check.accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="JSON file for the record, written after each row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--images", type=int, help="the first so many of each set alone (default: all)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no row later, except the first")
    parser.add_argument("--progress", action="store_true", help="say what is being done")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
