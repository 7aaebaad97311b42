"""Trained weights and labelled images nobody here made, for tests. Not in the repository: about 120 MB.

The folder is $FUSED_RESNET_DATA, or ../shared/data beside the repository. A test that needs an absent file skips.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import os
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Optional

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import data
from fused_resnet import models

FOLDER = Path(os.environ.get("FUSED_RESNET_DATA") or Path(__file__).parents[3] / "shared" / "data")
PRUNED_WIDTHS = (11, 8, 9, 22, 20, 32, 52, 56, 64)

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_CAFFE_BGR_MEAN = (103.939, 116.779, 123.68)
_AKAMASTER = {
    "resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"
}  # fmt: skip


def path(name: str) -> Path:
    """The file called `name` in the data folder. Skips the test, with the reason, where it is absent."""
    found = FOLDER / name
    if not found.exists():
        pytest.skip(f"needs {name} under $FUSED_RESNET_DATA or ../shared/data")
    return found


def cifar10(split: str = "test", count: Optional[int] = None) -> tuple[Tensor, Tensor]:
    """The first `count` of 10,000 images: uint8 RGB (N, 3, 32, 32) and int64 labels. split: "test", "train_batch1"."""
    images, labels = _arrays(path(f"cifar10/cifar10_{split}.npz"))
    return torch.from_numpy(images[:count]), torch.from_numpy(labels[:count].astype(np.int64))


def akamaster(name: str) -> nn.Module:
    """The trained "resnet20", "resnet32" or "resnet56" for CIFAR-10, in eval mode. Input: `imagenet_normalized`."""
    return models.create(name, weights=path(f"cifar10/{_AKAMASTER[name]}")).eval()


def pruned_resnet20() -> nn.Module:
    """Distiller's channel-pruned option-B ResNet-20 for CIFAR-10, in eval mode. Input: `half_normalized`."""
    weights = path("cifar10/distiller_resnet20_channel_pruned.npz")
    return models.cifar.resnet20(option="B", inner_widths=PRUNED_WIDTHS, weights=weights).eval()


def keras_resnet50() -> nn.Module:
    """The trained ResNet-50 v1 with convolution biases, in eval mode. Input: `imagenet_400`."""
    model = models.resnet50(stride_in_1x1=True)
    return models.load_keras_weights(model, path("imagenet/resnet50_keras_w16.npz")).eval()


def imagenet_normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def half_normalized(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5) / 0.5


def imagenet_400(count: int = 400) -> tuple[Tensor, Tensor]:
    """The first `count` of 400 labelled 224-pixel images as `keras_resnet50` wants them: fp32 BGR minus the mean."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with zipfile.ZipFile(path("imagenet/nips17_400_224.zip")) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))[:count]
        pixels = [np.asarray(image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB")) for row in rows]
    bgr = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).flip(1).float()
    return bgr - torch.tensor(_CAFFE_BGR_MEAN).view(3, 1, 1), torch.tensor([int(row["label"]) for row in rows])


def expected_output(name: str) -> Tensor:
    """What torchvision's own test expects of its model `name`: seed 0, 50 classes, then torch.rand."""
    file = path(f"torchvision_expect/ModelTester.test_{name}_expect.pkl")
    return torch.load(file, weights_only=True)


def refcheck() -> ModuleType:
    """Functional implementations of the same networks that share no code with ours."""
    return _imported(path("refcheck.py"))


def torchvision() -> ModuleType:
    """torchvision, a CUDA build beside a CPU-only torch included. Skips the test where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    data.let_torchvision_import()
    return pytest.importorskip("torchvision")


def predictions(model: nn.Module, inputs: Tensor, batch: int = 250, k: int = 1) -> Tensor:
    """The k likeliest classes of each input, (N, k), int64."""
    with torch.inference_mode():
        return torch.cat([model(x).topk(k, dim=1).indices for x in inputs.split(batch)])


def correct(predicted: Tensor, labels: Tensor) -> int:
    """How many rows of `predicted` contain their label."""
    return int((predicted == labels[:, None]).any(1).sum())


@functools.cache
def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as arrays:
        return arrays["images"], arrays["labels"]


@functools.cache
def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"real_data_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
