"""What is trained on: batches in an order and with an augmentation that follow from the seed alone.

A batch is the same in every run, however many processes share it and wherever a run was resumed.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Protocol, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.recipes import images
from fused_resnet.recipes.images import Images

_PADDING = 4  # He et al. 2015, section 4.2
_CHECKED_WHOLE = 20_000  # of more image files than this the headers alone are read before training


class Wanted(NamedTuple):
    """A batch to be made: the images of all processes, the seed of their augmentation, and this process's share.

    seed: None for images as they are.
    """

    chosen: Tensor
    seed: Optional[int]
    share: slice


class Source(Protocol):
    """Labelled images that can be made into batches. key: differs where the images do."""

    classes: int
    key: str

    def __len__(self) -> int: ...

    def batches(self, wanted: Sequence[Wanted]) -> Iterator[tuple[Tensor, Tensor]]: ...


class Data(NamedTuple):
    """What is trained on, and what is tested on where there is something."""

    train: Source
    test: Optional[Source]

    @property
    def key(self) -> str:
        return self.train.key + ("" if self.test is None else f" {self.test.key}")


def order_of(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch takes the images, int32."""
    return torch.randperm(count, generator=_generator(seed, epoch), dtype=torch.int32)


def batch_seed(seed: int, step: int) -> int:
    return zlib.crc32(f"{seed} {step}".encode())


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, numbers)).encode()))


class InMemory:
    """Images of one size, held as they are. Augmented by the paper: padded by 4, cut out at random, half of them
    mirrored.
    """

    def __init__(self, found: Images, classes: int, normalization: str) -> None:
        """ValueError where labels are missing or are none of the classes."""
        if found.labels is None:
            raise ValueError("images: training needs labels, and there are none.")
        if (highest := int(found.labels.max())) >= classes or int(found.labels.min()) < 0:
            raise ValueError(
                f"images: labels are {int(found.labels.min())} to {highest}, but there are {classes} classes, 0 to "
                f"{classes - 1}."
            )
        self.classes = classes
        self._pixels, self._labels, self._normalization = found.pixels, found.labels, normalization
        self.key = f"{len(self)} {zlib.crc32(found.labels.numpy().tobytes()):08x}"

    def __len__(self) -> int:
        return len(self._pixels)

    def batches(self, wanted: Sequence[Wanted]) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen, seed, share in wanted:
            mine = chosen[share].long()
            pixels = self._pixels[mine]
            if seed is not None:
                pixels = _augmented(pixels, _draws(len(chosen), seed)[share])
            yield images.normalized(pixels, self._normalization), self._labels[mine]


def _draws(count: int, seed: int) -> Tensor:
    """For each image where its window begins, and whether it is mirrored: (count, 3)."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(2 * _PADDING + 1, (count, 2), generator=generator)
    return torch.cat([windows, torch.randint(2, (count, 1), generator=generator)], dim=1)


def _augmented(pixels: Tensor, draws: Tensor) -> Tensor:
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, (_PADDING,) * 4)
    rows = draws[:, 0, None] + torch.arange(height)
    columns = draws[:, 1, None] + torch.arange(width)
    columns = torch.where(draws[:, 2, None].bool(), columns.flip(1), columns)
    images_, channels = torch.arange(len(pixels)).view(-1, 1, 1, 1), torch.arange(pixels.shape[1]).view(1, -1, 1, 1)
    return padded[images_, channels, rows[:, None, :, None], columns[:, None, None, :]]


class Files:
    """Image files in a folder for each class, read anew for each batch, in `workers` processes.

    Augmented for ImageNet: a part of 8 to 100 % of the area and 3:4 to 4:3 in shape, scaled; half are mirrored.
    """

    def __init__(self, folder: Path, size: int, workers: int = 0, normalization: str = "imagenet") -> None:
        """Reads them before anything is trained. FileNotFoundError without a folder or images, ValueError for a file
        that cannot be read.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"images: there is no folder {folder}; it has a folder of images for each class.")
        files, self.names = images.labelled_files(folder)
        if not files:
            raise FileNotFoundError(f"images: {folder} has no folders of images, one for each class.")
        empty = sorted(set(range(len(self.names))) - {label for _, label in files})
        if empty:
            raise ValueError(f"images: {folder} has classes without images: {self.names[empty[0]]}.")
        _check_readable([path for path, _ in files])
        self.classes = len(self.names)
        names = "\n".join(f"{path.relative_to(folder)} {label}" for path, label in files)
        self.key = f"{len(files)} {zlib.crc32(names.encode()):08x}"
        self._reader, self._workers = _Reader(files, size, normalization), workers

    def __len__(self) -> int:
        return len(self._reader.files)

    def batches(self, wanted: Sequence[Wanted]) -> Iterator[tuple[Tensor, Tensor]]:
        if not wanted:
            return
        asked = [[(int(i), seed) for i in chosen[share]] for chosen, seed, share in wanted]
        # a generator of its own: else a loader takes a number from the global one
        yield from torch.utils.data.DataLoader(
            self._reader, batch_sampler=asked, num_workers=self._workers, generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip


class _Reader(torch.utils.data.Dataset):
    """What a worker has: (number of an image, seed) -> (pixels, label)."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int, normalization: str) -> None:
        self.files, self.size, self._normalization = files, size, normalization

    def __getitem__(self, asked: tuple[int, Optional[int]]) -> tuple[Tensor, int]:
        number, seed = asked
        path, label = self.files[number]
        image = images.open_image(path)
        if seed is None:
            pixels = images.middle(image, self.size)
        else:
            pixels = _random_part(image, self.size, _generator(seed, number))
        return images.normalized(pixels[None], self._normalization)[0], label


def _random_part(image: Any, size: int, generator: torch.Generator) -> Tensor:
    """Szegedy et al. 2015 (arXiv 1409.4842), section 6; the largest square in the middle where no part fits."""
    left, top, width, height = _square(image.width, image.height)
    for _ in range(10):
        share, shape, x, y = torch.rand(4, generator=generator).tolist()
        area = (0.08 + 0.92 * share) * image.width * image.height
        aspect = (3 / 4) * (16 / 9) ** shape
        wide, high = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < wide <= image.width and 0 < high <= image.height:
            left, top = int(x * (image.width - wide + 1)), int(y * (image.height - high + 1))
            width, height = wide, high
            break
    pixels = images.as_tensor(image.resize((size, size), box=(left, top, left + width, top + height)))
    return pixels.flip(2) if torch.rand((), generator=generator) < 0.5 else pixels


def _square(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _check_readable(paths: Sequence[Path]) -> None:
    """ValueError for the first that cannot be read."""
    from concurrent.futures import ThreadPoolExecutor

    header_alone = len(paths) > _CHECKED_WHOLE

    def check(path: Path) -> None:
        images.open_image(path, header_alone)

    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python's lock while it decodes
        for _ in pool.map(check, paths):
            pass


# ----------------------------------------------------------------------------------------------------------- opening


def cifar10(path: Path, test: Optional[Path] = None, tested: Optional[int] = None) -> Data:
    """CIFAR-10: its binary or Python folder, or an .npz of training images and perhaps one of test images.

    tested: so many of the test images, the first, and not all. Raises FileNotFoundError and ValueError before anything
    is trained.
    """
    if not path.exists():
        raise FileNotFoundError(f"images: there is no file or folder {path}. docs/train.md says how to get CIFAR-10.")
    if path.is_dir() and not images.is_cifar10(path):
        raise FileNotFoundError(
            f"images: {path} is no folder of CIFAR-10: it has neither data_batch_1.bin nor data_batch_1. "
            "docs/train.md says how to get them."
        )
    train = _cifar10(path, "train", None)
    return Data(train, _cifar10(test or path, "test", tested) if test or path.is_dir() else None)


def _cifar10(path: Path, split: str, count: Optional[int]) -> InMemory:
    found = images.load(path, 32, split)
    if found.pixels.shape[1:] != (3, 32, 32):
        raise ValueError(f"images: CIFAR-10 has images (3, 32, 32), {path} has {tuple(found.pixels.shape[1:])}.")
    some = Images(found.pixels[:count], None if found.labels is None else found.labels[:count])
    return InMemory(some, images.CIFAR_CLASSES, "cifar10")


def folders(path: Path, size: int, workers: int = 0) -> Data:
    """A folder with "train" and "val", each with a folder of images for each class, as ImageNet is unpacked.

    Raises FileNotFoundError and ValueError before anything is trained.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"images: there is no folder {path}.")
    train, test = (Files(path / name, size, workers) for name in ("train", "val"))
    if train.names != test.names:
        odd = sorted(set(train.names) ^ set(test.names))
        raise ValueError(f"images: {path}: train and val differ in their classes: {', '.join(odd[:4])}.")
    return Data(train, test)
