"""Real images and trained weights small enough to travel with the code; sources and licences in cifar10/README.md."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

RESNET20_WEIGHTS = Path(__file__).parent / "cifar10" / "resnet20-12fca82f.th"

# what RESNET20_WEIGHTS was trained with: ImageNet's statistics, not CIFAR's
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def let_torchvision_import() -> None:
    """Declare the operators that a CUDA build of torchvision wants, where a CPU-only torch cannot load its library.

    Its networks need none of them.
    """
    if torch.version.cuda is None and not _STAND_INS:
        _STAND_INS.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _STAND_INS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_STAND_INS: list[torch.library.Library] = []  # a library that is dropped takes its operators along


def load_cifar10_sample() -> tuple[Tensor, Tensor]:
    """500 CIFAR-10 test images, 50 of each class: uint8 RGB (500, 3, 32, 32) and int64 labels (500,)."""
    import numpy as np

    with np.load(Path(__file__).parent / "cifar10" / "cifar10_sample.npz") as sample:
        return torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"].astype(np.int64))


def normalize(images: Tensor) -> Tensor:
    """uint8 RGB (N, 3, H, W) as the fp32 input RESNET20_WEIGHTS expects: (x/255 - mean) / std."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (images.float() / 255 - mean) / std
