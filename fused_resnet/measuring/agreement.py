"""How far a fast model agrees with the one that it stands for, on images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.quantizing.calibrate import pairs_of, sqnr_db


class Agreement(NamedTuple):
    """top1, top5: shares of images whose label is the likeliest class, or among five; None without labels. changed: how
    many images have another likeliest class. sqnr_db: 10 log10 of the logits' energy over that of their difference.
    """

    images: int
    top1: Optional[float]
    top5: Optional[float]
    fast_top1: Optional[float]
    fast_top5: Optional[float]
    changed: int
    sqnr_db: float

    @property
    def drop(self) -> Optional[float]:
        """How many points of top-1 the fast model loses; below 0 where it gains."""
        return None if self.top1 is None or self.fast_top1 is None else 100 * (self.top1 - self.fast_top1)

    def __str__(self) -> str:
        parts = [f"{self.images} images"]
        for name, one, other in (("top-1", self.top1, self.fast_top1), ("top-5", self.top5, self.fast_top5)):
            if one is not None and other is not None:
                parts.append(f"{name} {100 * one:.2f} % and {100 * other:.2f} %")
        share = f"{100 * self.changed / self.images:.2f} %"
        return ", ".join((*parts, f"{self.changed} predictions changed ({share})", f"SQNR {self.sqnr_db:.1f} dB"))


def agreement(
    model: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    *,
    progress: Optional[Callable[[int], None]] = None,
) -> Agreement:
    """Both models' answers to the same images: top-1 and top-5 of both, predictions changed, SQNR of the logits.

    model, fast: (N, ...) -> logits (N, classes). loader: batches of images, or (images, labels) pairs, labels (N,) of
    integers. progress: is told how many images are done. No gradients are kept. With fewer than five classes, top-5 is
    1. Raises TypeError for other batches, ValueError for none, for other outputs and where some batches lack labels.
    """
    images = changed = labelled = 0
    right = torch.zeros(4, dtype=torch.int64)
    signal = noise = 0.0
    for x, labels in pairs_of("agreement", loader):
        with torch.no_grad():
            exact, actual = model(x.clone()), fast(x)  # a model may write into its input
        for name, logits in (("model", exact), ("fast", actual)):
            if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"agreement: {name} must return logits (N, classes) for N={len(x)}, got {got}.")
        exact, actual = exact.double().cpu(), actual.double().cpu()
        images += len(x)
        signal += exact.square().sum().item()
        noise += (exact - actual).square().sum().item()
        changed += int((exact.argmax(1) != actual.argmax(1)).sum())
        if labels is not None:
            if labels.shape != (len(x),):
                raise ValueError(
                    f"agreement: {len(x)} images have labels of shape {tuple(labels.shape)}, not ({len(x)},)."
                )
            labelled += len(x)
            right += torch.tensor([_right(logits, labels.cpu(), k) for logits in (exact, actual) for k in (1, 5)])
        if progress is not None:
            progress(images)
    if not images:
        raise ValueError("agreement: the loader holds no images.")
    if labelled not in (0, images):
        raise ValueError(f"agreement: {labelled} of {images} images have labels; all must, or none.")
    top1, top5, fast_top1, fast_top5 = (right / images).tolist() if labelled else [None] * 4
    return Agreement(images, top1, top5, fast_top1, fast_top5, changed, sqnr_db(signal, noise))


def _right(logits: Tensor, labels: Tensor, k: int) -> int:
    likeliest = logits.topk(min(k, logits.shape[1]), 1).indices
    return int((likeliest == labels.view(-1, 1)).any(1).sum())
