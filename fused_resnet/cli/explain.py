"""`fused-resnet explain`: who runs each convolution of a model, and why nobody else."""

from __future__ import annotations

from typing import Any, Optional

import click
import torch

from fused_resnet import backends, models
from fused_resnet.cli.console import (
    Listed,
    as_json_option,
    device_option,
    dtype_option,
    image_shape,
    model_option,
    prepare,
    print_json,
)
from fused_resnet.explaining import explain as explanation
from fused_resnet.freezing.freeze import freeze
from fused_resnet.fusing import convert
from fused_resnet.operators.problem import SHORT_DTYPES


@click.command()
@model_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@dtype_option
@device_option
@click.option("--image", type=click.IntRange(min=1), default=None, help="Image size; default, the model's own.")
@click.option("--frozen", is_flag=True, help="As fused_resnet.freeze plans it; default, as fused_resnet.fuse makes it.")
@click.option("--backend", type=Listed("backend", lambda: ("auto", *backends.known("conv_bn_act"))), default="auto",
              show_default=True, help="Asked for by every convolution.")  # fmt: skip
@click.option("--time", "measure", is_flag=True, help="Also time every convolution, over a few runs of the model.")
@as_json_option
def explain(
    model: str, batch: int, dtype: str, device: str, image: Optional[int], frozen: bool, backend: str, measure: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Every convolution of a model: backend, config, why not the others, bytes against the least, roofline.

    For a model of your own: print(fused_resnet.explain(model, example_input)).
    """
    prepare(device, None)
    precision = SHORT_DTYPES[dtype]
    network: Any = models.create(model).eval()
    network = network.to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, *image_shape(model, image), device=device).to(memory_format=torch.channels_last)
    if frozen:
        network = freeze(network, x, dtype=precision, backend=backend)
    else:
        network, x = convert.fuse(network.to(precision), backend=backend), x.to(precision)
    found = explanation.explain(network, x, measure=measure)
    if as_json:
        return print_json(found.as_dict())
    click.echo(str(found))
