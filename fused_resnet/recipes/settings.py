"""What a run is: the numbers of a recipe, and the rate of learning that follows from them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Sequence

import torch

from fused_resnet.operators.problem import SHORT_DTYPES

_SCHEDULES = ("steps", "cosine")


class Settings(NamedTuple):
    """One run. A checkpoint goes on with the same alone.

    | field | what it is |
    | --- | --- |
    | epochs | passes over the images; steps, where given, ends a run earlier |
    | batch | images of a step, of all processes together; what is left of an epoch is not trained on |
    | lr, momentum, weight_decay | SGD's |
    | warm_up | epochs, or parts of one, in which the rate climbs from a tenth |
    | schedule | "steps": a tenth of the rate after each of `milestones`; "cosine": down to 0 |
    | milestones | parts of the run |
    | label_smoothing | cross_entropy's |
    | dtype | "fp32", or what autocast computes in: "bf16", on CUDA also "fp16" |
    | fused, channels_last | whether blocks are fused, and lie in NHWC |
    | augment | whether images are cut out and mirrored at random |
    | seed | of weights, order and augmentation |
    | log_every | steps of a point of the curves |
    | gradients | whether the norms of the convolutions' gradients are kept at such points |
    """

    epochs: float
    batch: int
    lr: float
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warm_up: float = 0.0
    schedule: str = "steps"
    milestones: Sequence[float] = (0.5, 0.75)
    label_smoothing: float = 0.0
    dtype: str = "fp32"
    fused: bool = True
    channels_last: bool = True
    augment: bool = True
    seed: int = 0
    steps: Optional[int] = None
    log_every: int = 50
    gradients: bool = False

    def checked(self, images: int, device: torch.device) -> "Settings":
        """Itself. ValueError for what cannot be trained on so many images, on such a device."""
        for name in ("epochs", "batch", "lr", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} must be positive, got {getattr(self, name)}.")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"train: schedule must be one of {', '.join(_SCHEDULES)}, got {self.schedule!r}.")
        if self.dtype not in SHORT_DTYPES:
            raise ValueError(f"train: dtype must be one of {', '.join(SHORT_DTYPES)}, got {self.dtype!r}.")
        if self.dtype == "fp16" and device.type != "cuda":
            raise ValueError("train: fp16 is trained on CUDA alone, with scaled losses; take bf16 here.")
        if self.batch > images:
            raise ValueError(f"train: a batch of {self.batch} is more than all {images} images.")
        return self

    def steps_per_epoch(self, images: int) -> int:
        return images // self.batch

    def total_steps(self, images: int) -> int:
        """At least one."""
        planned = max(1, round(self.epochs * self.steps_per_epoch(images)))
        return planned if self.steps is None else min(planned, self.steps)

    def lr_factor(self, step: int, images: int) -> float:
        """What the rate is multiplied by in this step."""
        planned = max(1, round(self.epochs * self.steps_per_epoch(images)))
        climbing = round(self.warm_up * self.steps_per_epoch(images))
        factor = 0.1 + 0.9 * step / climbing if step < climbing else 1.0
        if self.schedule == "cosine":
            return factor * (1 + math.cos(math.pi * min(1.0, step / planned))) / 2
        return factor * 0.1 ** sum(step >= milestone * planned for milestone in self.milestones)

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "milestones": list(self.milestones)}


# He et al. 2015, section 4.2: 64,000 steps of 128 images, which is 164 epochs of all 50,000
CIFAR = Settings(epochs=164, batch=128, lr=0.1, warm_up=1)
# section 3.4, with the warm-up of Goyal et al. 2017 (arXiv 1706.02677) and smoothed labels
IMAGENET = Settings(epochs=90, batch=256, lr=0.1, warm_up=5, milestones=(1 / 3, 2 / 3), label_smoothing=0.1)
# all layers, at a rate that keeps what they know
FINETUNE = Settings(epochs=10, batch=64, lr=0.01, warm_up=0.5, schedule="cosine", label_smoothing=0.1)
