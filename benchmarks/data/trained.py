"""Trained weights and labelled images nobody here made. Not in the repository: about 120 MB.

The folder is $FUSED_RESNET_DATA, or ../shared/data beside the repository. What needs an absent file raises `Missing`.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import zipfile
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from fused_resnet import models

FOLDER = Path(os.environ.get("FUSED_RESNET_DATA") or Path(__file__).parents[3] / "shared" / "data")
PRUNED_WIDTHS = (11, 8, 9, 22, 20, 32, 52, 56, 64)

_CAFFE_BGR_MEAN = (103.939, 116.779, 123.68)
_AKAMASTER = {
    "resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"
}  # fmt: skip


class Missing(FileNotFoundError):
    """A file of the folder, or what reads it, is not here."""


def path(name: str) -> Path:
    """The file called `name` in the data folder. Raises Missing where it is absent."""
    found = FOLDER / name
    if not found.exists():
        raise Missing(f"needs {name} under $FUSED_RESNET_DATA or ../shared/data")
    return found


def cifar10(split: str = "test", count: Optional[int] = None) -> tuple[Tensor, Tensor]:
    """The first `count` of 10,000 images: uint8 RGB (N, 3, 32, 32) and int64 labels. split: "test", "train_batch1"."""
    images, labels = _arrays(path(f"cifar10/cifar10_{split}.npz"))
    return torch.from_numpy(images[:count]), torch.from_numpy(labels[:count].astype(np.int64))


def akamaster(name: str) -> nn.Module:
    """The trained "resnet20", "resnet32" or "resnet56" for CIFAR-10, in eval mode. Input: `data.normalize`d."""
    return models.create(name, weights=path(f"cifar10/{_AKAMASTER[name]}")).eval()


def pruned_resnet20() -> nn.Module:
    """Distiller's channel-pruned option-B ResNet-20 for CIFAR-10, in eval mode. Input: `half_normalized`."""
    weights = path("cifar10/distiller_resnet20_channel_pruned.npz")
    return models.cifar.resnet20(option="B", inner_widths=PRUNED_WIDTHS, weights=weights).eval()


def keras_resnet50() -> nn.Module:
    """The trained ResNet-50 v1 with convolution biases, in eval mode. Input: `imagenet_400`."""
    model = models.resnet50(stride_in_1x1=True)
    return models.load_keras_weights(model, path("imagenet/resnet50_keras_w16.npz")).eval()


def half_normalized(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5) / 0.5


def imagenet_400(count: int = 400) -> tuple[Tensor, Tensor]:
    """The first `count` of 400 labelled 224-pixel images as `keras_resnet50` wants them: fp32 BGR minus the mean."""
    try:
        from PIL import Image
    except ImportError:
        raise Missing("Pillow is not installed") from None
    with zipfile.ZipFile(path("imagenet/nips17_400_224.zip")) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))[:count]
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB")) for row in rows]
    bgr = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).flip(1).float()
    return bgr - torch.tensor(_CAFFE_BGR_MEAN).view(3, 1, 1), torch.tensor([int(row["label"]) for row in rows])


@functools.cache
def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as arrays:
        return arrays["images"], arrays["labels"]
