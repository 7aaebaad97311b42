"""Labelled images from a folder or an .npz file, as a network takes them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import Tensor

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_ZOOM = 256 / 224  # the shorter side before the middle is cut out

# what the networks' weights were trained with: channels, then (x / 255 - mean) / std
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Images(NamedTuple):
    """pixels: uint8 (N, 3, H, W). labels: int64 (N,), or None where there are none."""

    pixels: Tensor
    labels: Optional[Tensor]

    def batch(self, chosen: Tensor, normalization: str) -> tuple[Tensor, Optional[Tensor]]:
        """Some of them, fp32, normalized, with their labels."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS[normalization])
        x = (self.pixels[chosen].float() / 255 - mean) / std
        return x, None if self.labels is None else self.labels[chosen]


def load(path: Path, size: int) -> Images:
    """An .npz with `images` (N, 3, H, W) in uint8 and perhaps `labels` (N,), or a folder of images.

    A folder of folders has a class in each, numbered in the order of their names. Images of any size are scaled, and
    their middle is cut out. Raises FileNotFoundError and ValueError for what is neither.
    """
    if path.is_dir():
        return _of_folder(path, size)
    if not path.exists():
        raise FileNotFoundError(f"--images: there is no file or folder {path}.")
    import numpy as np

    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in ("images", "labels") if name in arrays.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"--images: {path} is no .npz file: {error}") from None
    pixels = found.get("images")
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        got = "no array `images`" if pixels is None else f"`images` {pixels.shape} in {pixels.dtype}"
        raise ValueError(f"--images: {path} must have uint8 `images` (N, 3, H, W), got {got}.")
    labels = found.get("labels")
    if labels is not None and (labels.shape != (len(pixels),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"--images: {path} must have {len(pixels)} integer `labels`, got {labels.shape}.")
    return Images(torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels.astype(np.int64)))


def _of_folder(folder: Path, size: int) -> Images:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, number) for number, inside in enumerate(classes) for path in _images_in(inside)]
    files = files or [(path, -1) for path in _images_in(folder)]
    if not files:
        raise ValueError(f"--images: {folder} holds no images ({', '.join(_SUFFIXES)}), nor folders with some.")
    pixels = torch.stack([_middle(path, size) for path, _ in files])
    return Images(pixels, torch.tensor([number for _, number in files]) if classes else None)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _middle(path: Path, size: int) -> Tensor:
    """The middle of an image, (3, size, size) in uint8; one of that size as it is."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError:
        raise ValueError("--images: reading image files needs Pillow: pip install pillow.") from None
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.size == (size, size):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    side = round(size * _ZOOM)
    scale = side / min(image.size)
    image = image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
