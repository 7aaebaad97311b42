"""Plain networks get worse with depth, residual ones do not: trains both, and draws the figure.

    python examples/degradation.py --short --data cifar10_train_batch1.npz --out out/degradation
    python examples/degradation.py --data cifar-10-batches-bin --epochs 164 --out out/degradation

The first form takes minutes on two cores, the second one GPU. `--out` holds the runs: an interrupted call goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click

from fused_resnet.cli.console import device_option, progress_on_stderr
from fused_resnet.recipes import degradation
from fused_resnet.reporting import charts


@click.command()
@click.option("--data", "images", type=click.Path(path_type=Path), required=True,
              help="CIFAR-10: its binary or Python folder, or an .npz.")  # fmt: skip
@click.option("--test", type=click.Path(path_type=Path), default=None, help="An .npz of test images.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--short", is_flag=True, help="Three networks, three seeds, 300 steps.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=164.0, show_default=True,
              help="Of the full form; the paper's is 164.")  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1), default=degradation.SHORT_STEPS, show_default=True, help="Of the short form."
)
@click.option("--seeds", type=click.IntRange(min=1), default=None, help="How many; default, 1, and 3 with --short.")
@device_option
def main(
    images: Path, test: Optional[Path], out: Path, short: bool, epochs: float, steps: int, seeds: Optional[int],
    device: str,
) -> None:  # fmt: skip
    """Train plain networks and ResNets alike, and draw their curves: degradation.json and degradation.png."""
    if short:
        experiment = degradation.short(images, test, device, steps)
        experiment = experiment if seeds is None else experiment._replace(seeds=range(seeds))
    else:
        experiment = degradation.full(epochs, range(seeds or 1), images, test, device)
    try:
        with progress_on_stderr("degradation") as progress:
            record = degradation.perform(experiment, out, command(), progress)
        charts.save_png(record, out / "degradation.png")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for seed, found in record.summary["seeds"].items():
        errors = ", ".join(f"{name} {100 * found[name]:.1f} %" for name in degradation.SHORT_NETWORKS)
        click.echo(f"seed {seed}: training error {errors}")
    click.echo("Decisive in every seed." if record.summary["is_decisive"] else "Not decisive.")


def command() -> str:
    """This call, with paths by their names alone."""
    shown = [Path(one).name if "/" in one else one for one in sys.argv[1:]]
    return " ".join(["python examples/degradation.py", *shown])


if __name__ == "__main__":
    main()
