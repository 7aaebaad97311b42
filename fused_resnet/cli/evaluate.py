"""`fused-resnet eval`: a frozen network's answers on images, beside those of the network it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import click
import torch
from click.core import ParameterSource

from fused_resnet import models
from fused_resnet.cli.console import (
    Listed,
    as_json_option,
    device_option,
    image_shape,
    model_option,
    prepare,
    print_json,
    progress_on_stderr,
)
from fused_resnet.freezing.freeze import freeze
from fused_resnet.measuring.agreement import agreement
from fused_resnet.operators.problem import SHORT_DTYPES
from fused_resnet.recipes import images

_DTYPES = {**SHORT_DTYPES, "int8": torch.int8}


@click.command("eval")
@model_option
@click.option("--weights", required=True, help="A file or URL of trained weights.")
@click.option("--images", "path", required=True, type=click.Path(path_type=Path),
              help="A folder with a folder for each class, or an .npz with `images` and `labels`.")  # fmt: skip
@click.option("--dtype", type=Listed("dtype", lambda: tuple(_DTYPES)), default="fp32", show_default=True)
@click.option("--calibrate", type=click.IntRange(min=1), default=16, show_default=True,
              help="For int8: so many of the images calibrate, and are not counted.")  # fmt: skip
@click.option("--keep", default="0", show_default=True,
              help="For int8: convolutions to leave in floats, separated by commas, or how many.")  # fmt: skip
@click.option("--max-drop", type=float, default=None, help="Exit code 1 where top-1 loses more points than this.")
@click.option("--normalize", type=click.Choice(list(images.NORMALIZATIONS)), default="imagenet", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--image", type=click.IntRange(min=1), default=None, help="Image size; default, the model's own.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default, torch's choice.")
@device_option
@as_json_option
@click.pass_context
def evaluate(
    ctx, model: str, weights: str, path: Path, dtype: str, calibrate: int, keep: str, max_drop: Optional[float],
    normalize: str, batch: int, image: Optional[int], threads: Optional[int], device: str, as_json: bool,
) -> None:  # fmt: skip
    """Top-1 and top-5 of a network in fp32 and frozen, predictions changed, SQNR of the logits."""
    given = [f"--{name}" for name in ("keep", "calibrate") if ctx.get_parameter_source(name) != ParameterSource.DEFAULT]
    if dtype != "int8" and given:
        raise click.UsageError(f"{' and '.join(given)}: for --dtype int8 alone, got --dtype {dtype}.")
    prepare(device, threads)
    found = images.load(path, image_shape(model, image)[1])
    if max_drop is not None and found.labels is None:
        raise click.UsageError(f"--max-drop needs labels, and {path} has none.")
    order = torch.randperm(len(found.pixels), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if dtype == "int8":
        if calibrate >= len(order):
            raise click.UsageError(f"--calibrate {calibrate} leaves none of {len(order)} images to be counted.")
        x, _ = found.batch(order[:calibrate], normalize)
        options.update(calibrate=[x.to(device)], keep=_kept(keep))
        order = order[calibrate:]
    network: Any = models.create(model, weights=weights).eval()
    network = network.to(device, memory_format=torch.channels_last)
    batches = order.split(batch)
    example, _ = found.batch(batches[0], normalize)
    title = f"eval {model} {dtype}"
    with progress_on_stderr(title) as progress:
        fast = freeze(network, example.to(device), progress=progress, **options)
        result = agreement(
            network,
            fast,
            ((x.to(device), labels) for x, labels in (found.batch(one, normalize) for one in batches)),
            progress=lambda count: progress(count / len(order), f"{count}/{len(order)} images"),
        )
    is_lost = max_drop is not None and result.drop is not None and result.drop > max_drop
    if as_json:
        sqnr = result.sqnr_db if abs(result.sqnr_db) < float("inf") else None  # JSON has no infinity
        record = {**result._asdict(), "sqnr_db": sqnr, "drop": result.drop}
        print_json({"model": model, "dtype": dtype, **record, "passed": not is_lost})
    else:
        click.echo(f"{model}, fp32 and frozen in {dtype}: {result}")
        if is_lost:
            click.echo(f"eval: top-1 drops by {result.drop:.2f} points, more than {max_drop:g}.", err=True)
    ctx.exit(1 if is_lost else 0)


def _kept(text: str) -> Union[int, list[str]]:
    return int(text) if text.isdigit() else [name.strip() for name in text.split(",")]
