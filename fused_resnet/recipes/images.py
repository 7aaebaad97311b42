"""Labelled images: CIFAR-10's folders, .npz files and folders of image files, read without trust.

| what | how it looks |
| --- | --- |
| CIFAR-10, binary | data_batch_1.bin to data_batch_5.bin, test_batch.bin |
| CIFAR-10, Python | data_batch_1 to data_batch_5, test_batch: pickles, of which nothing but arrays is loaded |
| .npz | `images` uint8 (N, 3, H, W), and perhaps `labels` (N,) |
| image files | a folder for each class, as torchvision.datasets.ImageFolder numbers them |
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_ZOOM = 256 / 224  # the shorter side before the middle is cut out

CIFAR_CLASSES = 10
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}

# what the networks' weights were trained with: channels, then (x / 255 - mean) / std
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Images(NamedTuple):
    """pixels: uint8 (N, 3, H, W). labels: int64 (N,), or None where there are none."""

    pixels: Tensor
    labels: Optional[Tensor]

    def batch(self, chosen: Tensor, normalization: str) -> tuple[Tensor, Optional[Tensor]]:
        """Some of them, fp32, normalized, with their labels."""
        return normalized(self.pixels[chosen], normalization), None if self.labels is None else self.labels[chosen]


def normalized(pixels: Tensor, normalization: str) -> Tensor:
    """uint8 (N, 3, H, W) as fp32, channel by channel."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS[normalization])
    return (pixels.float() / 255 - mean) / std


def load(path: Path, size: int, split: str = "test") -> Images:
    """All images of a CIFAR-10 folder's split, of an .npz file or of a folder of image files.

    A folder of folders has a class in each, numbered in the order of their names. Image files of any size are scaled,
    and their middle is cut out. Raises FileNotFoundError and ValueError for what is none of these.
    """
    if not path.exists():
        raise FileNotFoundError(f"images: there is no file or folder {path}.")
    if not path.is_dir():
        return load_npz(path)
    return load_cifar10(path, split) if is_cifar10(path) else _of_folder(path, size)


def load_npz(path: Path) -> Images:
    import numpy as np

    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in ("images", "labels") if name in arrays.files}
            held = ", ".join(arrays.files) or "nothing"
    except Exception as error:  # zip and numpy each raise their own kinds
        raise ValueError(f"images: {path} is no .npz file: {error}") from None
    pixels = found.get("images")
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        got = f"no array `images` but {held}" if pixels is None else f"`images` {pixels.shape} in {pixels.dtype}"
        raise ValueError(f"images: {path} must have uint8 `images` (N, 3, H, W), got {got}.")
    labels = found.get("labels")
    if labels is not None and (labels.shape != (len(pixels),) or labels.dtype.kind not in "iu"):
        got = f"{labels.shape} in {labels.dtype}"
        raise ValueError(f"images: {path} must have {len(pixels)} integer `labels`, got {got}.")
    return Images(torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels.astype(np.int64)))


# ---------------------------------------------------------------------------------------------------------- CIFAR-10


def is_cifar10(folder: Path) -> bool:
    return any((folder / f"{_CIFAR_FILES['train'][0]}{suffix}").exists() for suffix in ("", ".bin"))


def load_cifar10(folder: Path, split: str) -> Images:
    """The "train" or "test" images of the folder as its archive holds it: cifar-10-batches-bin or -py.

    Raises FileNotFoundError where a file is missing, ValueError for one that is damaged.
    """
    suffix = ".bin" if (folder / f"{_CIFAR_FILES['train'][0]}.bin").exists() else ""
    files = [folder / f"{name}{suffix}" for name in _CIFAR_FILES[split]]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"images: {folder} lacks {', '.join(missing)}; unpack the whole archive of CIFAR-10.")
    parts = [_binary(file) if suffix else _pickled(file) for file in files]
    return Images(*(torch.cat(tensors) for tensors in zip(*parts)))


def _binary(file: Path) -> tuple[Tensor, Tensor]:
    """Records of one byte for the label and then the pixels, channel by channel."""
    import numpy as np

    found = np.fromfile(file, dtype=np.uint8)
    if not len(found) or len(found) % (1 + _CIFAR_PIXELS):
        raise ValueError(f"images: {file} has {len(found)} bytes, not a multiple of {1 + _CIFAR_PIXELS}; get it again.")
    records = torch.from_numpy(found.reshape(-1, 1 + _CIFAR_PIXELS))
    return _cifar(file, records[:, 1:], records[:, 0])


def _pickled(file: Path) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        with open(file, "rb") as opened:
            content = _Arrays(opened, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
    except OSError:
        raise
    except Exception as error:  # a pickle that is cut off raises what it likes
        raise ValueError(f"images: {file} is no batch of CIFAR-10 ({type(error).__name__}: {error}).") from None
    if pixels.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.shape != (len(pixels),):
        got = f"{pixels.shape} in {pixels.dtype}, labels {labels.shape} in {labels.dtype}"
        raise ValueError(f"images: {file} must hold uint8 data and as many integer labels, got {got}.")
    return _cifar(file, torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64)))


class _Arrays(pickle.Unpickler):
    """Loads arrays of numpy, and refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        import _codecs

        import numpy as np

        allowed = {
            "_reconstruct": np.zeros(1).__reduce__()[0],  # type: ignore[index]
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": _codecs.encode,  # in what Python 3 wrote for Python 2
        }
        if name not in allowed or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is no array")
        return allowed[name]


def _cifar(file: Path, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if pixels.shape[1:] != (_CIFAR_PIXELS,) or not len(pixels):
        raise ValueError(f"images: {file} must have rows of {_CIFAR_PIXELS} pixels, got {tuple(pixels.shape)}.")
    if int(labels.max()) >= CIFAR_CLASSES or int(labels.min()) < 0:
        raise ValueError(f"images: {file} has labels {int(labels.min())} to {int(labels.max())}, not 0 to 9.")
    return pixels.reshape(-1, *_CIFAR_SHAPE), labels.long()


# ------------------------------------------------------------------------------------------------------- image files


def labelled_files(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """The image files below a folder of folders with the numbers of their classes, and the names of these."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, number) for number, inside in enumerate(classes) for path in _images_in(inside)]
    return files, [inside.name for inside in classes]


def open_image(path: Path, header_alone: bool = False) -> Any:
    """An image file in RGB, or not decoded yet. ValueError where it cannot be read."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("images: reading image files needs Pillow: pip install pillow.") from None
    try:
        with Image.open(path) as opened:
            return opened if header_alone else opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError and more
        raise ValueError(f"images: {path} cannot be read ({error}). Remove it or get it again.") from None


def middle(image: Any, size: int) -> Tensor:
    """The middle of an image, (3, size, size) in uint8; one of that size as it is."""
    if image.size == (size, size):
        return as_tensor(image)
    side = round(size * _ZOOM)
    scale = side / min(image.size)
    image = image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return as_tensor(image.crop((left, top, left + size, top + size)))


def as_tensor(image: Any) -> Tensor:
    """uint8 (3, H, W)."""
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _of_folder(folder: Path, size: int) -> Images:
    files, classes = labelled_files(folder)
    files = files or [(path, -1) for path in _images_in(folder)]
    if not files:
        raise ValueError(f"images: {folder} holds no images ({', '.join(_SUFFIXES)}), nor folders with some.")
    pixels = torch.stack([middle(open_image(path), size) for path, _ in files])
    return Images(pixels, torch.tensor([number for _, number in files]) if classes else None)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
