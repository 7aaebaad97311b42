"""`fused-resnet train`: a network from a seed and images, alone or in the processes of torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Optional

import click
import torch
from torch import nn

from fused_resnet import models
from fused_resnet.cli.console import (
    Listed,
    as_json_option,
    device_option,
    image_shape,
    options,
    print_json,
    progress_on_stderr,
)
from fused_resnet.operators.problem import SHORT_DTYPES
from fused_resnet.recipes import data, logs, settings
from fused_resnet.recipes.data import Data
from fused_resnet.recipes.processes import joined
from fused_resnet.recipes.settings import Settings
from fused_resnet.recipes.train import train as run

# of a run in any recipe; what is not given is the recipe's
run_options = options(
    click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True,
                 help="A folder for the checkpoint, the weights, the history and TensorBoard's logs."),
    click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint, if it has one."),
    click.option("--epochs", type=float, default=None, help="Default, the recipe's."),
    click.option("--steps", type=click.IntRange(min=1), default=None, help="End after so many steps."),
    click.option("--batch", type=int, default=None, help="Images of a step, of all processes together."),
    click.option("--lr", type=float, default=None),
    click.option("--warm-up", type=click.FloatRange(min=0), default=None, help="Epochs in which the rate climbs."),
    click.option("--label-smoothing", type=click.FloatRange(min=0, max=1), default=None),
    click.option("--dtype", type=Listed("dtype", lambda: tuple(SHORT_DTYPES)), default=None,
                 help="What autocast computes in; fp16, on CUDA alone, with scaled losses."),
    click.option("--fused/--plain", default=None, help="Whether blocks are fused."),
    click.option("--channels-last/--nchw", default=None, help="How images lie in memory."),
    click.option("--seed", type=click.IntRange(min=0), default=None, help="Of weights, order and augmentation."),
    click.option("--log-every", type=int, default=None, help="Steps of a point of the curves."),
    click.option("--checkpoint-every", type=click.IntRange(min=1), default=200, show_default=True, help="Steps."),
    click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads of each process."),
    device_option,
    as_json_option,
)  # fmt: skip


@click.command("train")
@click.option("--recipe", type=click.Choice(("cifar", "imagenet")), default="cifar", show_default=True)
@click.option("--model", type=Listed("model", models.names), default=None,
              help="Default, resnet20 for CIFAR-10 and resnet50 for ImageNet.")  # fmt: skip
@click.option("--data", "path", type=click.Path(path_type=Path), required=True,
              help="CIFAR-10: its folder, binary or Python, or an .npz. ImageNet: one with train and val.")  # fmt: skip
@click.option("--test", type=click.Path(path_type=Path), default=None, help="CIFAR-10: an .npz of test images.")
@click.option("--image", type=click.IntRange(min=1), default=None, help="Image size; default, the model's own.")
@click.option("--workers", type=click.IntRange(min=0), default=4, show_default=True,
              help="Processes that read image files.")  # fmt: skip
@run_options
def train(
    recipe: str, model: Optional[str], path: Path, test: Optional[Path], image: Optional[int], workers: int,
    **given: Any,
) -> None:  # fmt: skip
    """Train a network. A run that was killed goes on with --resume, and ends with the same weights."""
    model = model or ("resnet20" if recipe == "cifar" else "resnet50")
    if recipe == "cifar":
        if models.input_shape(model) != models.input_shape("resnet20"):
            raise click.UsageError(f"--recipe cifar trains networks for 32 pixels, such as resnet20; got {model}.")
        perform(lambda _: models.create(model), lambda: data.cifar10(path, test), settings.CIFAR, **given)
        return
    if test is not None:
        raise click.UsageError("--test: for --recipe cifar alone; ImageNet's folder has `val`.")
    size = image_shape(model, image)[1]
    perform(
        lambda classes: models.create(model, num_classes=classes),
        lambda: data.folders(path, size, workers), settings.IMAGENET, **given,
    )  # fmt: skip


def perform(
    build: Callable[[int], nn.Module], read: Callable[[], Data], recipe: Settings, *, out: Path, resume: bool,
    checkpoint_every: int, threads: Optional[int], device: str, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Train what `build` makes for so many classes by a recipe and what was given of it, and say how it ended."""
    chosen = recipe._replace(**{name: value for name, value in given.items() if value is not None})
    if threads is not None:
        torch.set_num_threads(threads)
    with joined(device) as processes:
        found = read()
        with progress_on_stderr("train") as progress:
            history = run(
                lambda: build(found.train.classes), found, chosen, out, processes=processes, resume=resume,
                checkpoint_every=checkpoint_every, log=logs.tensorboard(out / "tensorboard"),
                progress=progress if processes.is_first else lambda fraction, text: None,
            )  # fmt: skip
        if not processes.is_first:
            return
    if as_json:
        print_json({"settings": chosen.as_json(), **history})
        return
    for name, one in (("training", history["points"][-1]), *(("test", one) for one in history["tests"][-1:])):
        click.echo(f"step {one['step']}: {name} error {100 * one['error']:.2f} %, loss {one['loss']:.4f}")
    click.echo(f"weights: {out / 'model.pt'}")
