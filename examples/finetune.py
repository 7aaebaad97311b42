"""Fine-tune a torchvision or timm checkpoint on a folder of images.

    python examples/finetune.py --model resnet50 --weights resnet50-11ad3fa6.pth --data flowers --out out/flowers
    python examples/finetune.py --model timm/resnet50d --weights resnet50d.pth --data flowers --out out/flowers

The folder has `train` and `val`, and each of these a folder of images for each class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fused_resnet.cli.train import perform, run_options
from fused_resnet.recipes import data, settings
from fused_resnet.recipes.finetune import pretrained


@click.command()
@click.option("--model", default="resnet50", show_default=True,
              help="One of fused_resnet.models, torchvision/NAME or timm/NAME.")  # fmt: skip
@click.option("--weights", required=True, help="A file or URL of trained weights.")
@click.option("--data", "path", type=click.Path(path_type=Path), required=True, help="A folder with train and val.")
@click.option("--image", type=click.IntRange(min=1), default=224, show_default=True, help="Image size.")
@click.option("--workers", type=click.IntRange(min=0), default=4, show_default=True,
              help="Processes that read image files.")  # fmt: skip
@run_options
def main(model: str, weights: str, path: Path, image: int, workers: int, **given: Any) -> None:
    """Train a trained network on other classes."""
    try:
        perform(
            lambda classes: pretrained(model, weights, classes),
            lambda: data.folders(path, image, workers), settings.FINETUNE, **given,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
