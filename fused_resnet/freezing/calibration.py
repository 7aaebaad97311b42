"""What `freeze` was given to make a model int8 or e4m3, checked, and what follows from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, fx, nn

from fused_resnet.backends import BackendError
from fused_resnet.choosing import quantized as on_gpu
from fused_resnet.choosing.timing import Progress
from fused_resnet.freezing.draft import Quantization
from fused_resnet.freezing.quantized import kept_by, linear_names, why_no_int8
from fused_resnet.machine import devices, onednn
from fused_resnet.operators.problem import FLOAT8, dtype_name
from fused_resnet.quantizing.calibrate import Subject, calibrate, sensitivity
from fused_resnet.quantizing.scales import Scales, digest, digest_of_steps
from fused_resnet.regions import kernels

QUANTIZED_DTYPES = (torch.int8, FLOAT8)
Source = Union[Scales, str, "os.PathLike[str]", Iterable[Any]]
Keep = Union[int, str, Sequence[str]]

log = logging.getLogger("fused_resnet")


class Calibration(NamedTuple):
    """calibrate, keep and dtype, as `freeze` takes them. any_size: whether images may have other sizes than the
    example, as those that a model in parts calls a part with."""

    source: Source
    keep: Keep
    dtype: torch.dtype = torch.int8
    any_size: bool = False

    def of(
        self, model: nn.Module, traced: fx.GraphModule, subject: Subject, example: Tensor, progress: Progress
    ) -> Quantization:
        """The scales, made now or read, and the names of the convolutions that stay in floats.

        Raises ValueError where the scales are of other weights or steps. Also where keep names no convolution, or asks
        for the most sensitive of a file's. Also what `quantizing.calibrate` raises.
        """
        weights, steps, first = digest(model), digest_of_steps(traced), None
        if isinstance(self.source, Scales):
            scales = self.source
        elif isinstance(self.source, (str, os.PathLike)):
            scales = Scales.load(self.source)
        else:
            told = lambda images: progress(0.0, f"calibrating with {images} images")  # noqa: E731
            scales, first = calibrate(subject, self.source, None if self.any_size else example, weights, told)
            scales = scales._replace(steps=steps)
        if scales.parts:
            raise ValueError(
                f"freeze: these scales are of a model in parts ({', '.join(scales.parts)}), and this one is frozen as "
                "a whole. Calibrate again: pass a loader as calibrate."
            )
        if scales.weights != weights:
            raise ValueError(
                f"freeze: these scales are of other weights (sha256 {scales.weights[:12]}, the model's is "
                f"{weights[:12]}). Calibrate again: pass a loader as calibrate."
            )
        if scales.steps is None:
            log.warning(
                "freeze: an older version wrote these scales, and they say nothing of strides and activations. "
                "They are taken for its weights alone. Calibrate again to have that checked."
            )
        elif scales.steps != steps:
            raise ValueError(
                "freeze: these scales are of a model with the same weights and other steps: strides, paddings, "
                "activations (also in place), how they follow each other or are exported (sha256 "
                f"{scales.steps[:12]} by torch {scales.torch}, the model's is {steps[:12]}). Calibrate again: pass a "
                "loader as calibrate."
            )
        problems = {subject.names[node]: conv.problem for node, conv in subject.convolutions.items()}
        forms = {name: (problem.activation, problem.has_residual) for name, problem in problems.items()}
        if not isinstance(self.keep, int):
            asked = [self.keep] if isinstance(self.keep, str) else self.keep
            return Quantization(scales, forms, kept_by([*problems, *linear_names(subject)], asked), self.dtype)
        if not self.keep:
            return Quantization(scales, forms, dtype=self.dtype)
        if first is None:
            raise ValueError(
                f"freeze: keep={self.keep} asks for the most sensitive convolutions, which only images show. Name them "
                "in keep, or pass a loader as calibrate."
            )
        errors = sensitivity(subject, scales.ranges, first, self.dtype)
        possible = [name for name in errors if why_no_int8(problems[name], self.dtype) is None]
        if self.dtype == FLOAT8:  # whose first convolution is in bf16 anyway
            possible = [name for name in possible if name != next(iter(problems))]
        kept = frozenset(sorted(possible, key=errors.__getitem__)[: self.keep])
        return Quantization(scales, forms, kept, self.dtype)


def checked(
    dtype: Optional[torch.dtype], calibrate: Optional[Source], keep: Keep, backend: str, device: torch.device
) -> Optional[Calibration]:
    """None where another dtype was asked for.

    Raises TypeError and ValueError for arguments that do not fit together, BackendError where the dtype cannot run.
    """
    name = None if dtype is None else dtype_name(dtype)
    is_named = isinstance(keep, (str, Sequence)) and all(isinstance(name, str) for name in keep)
    if not is_named and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
        raise TypeError(f"freeze: keep must be names of convolutions or how many of them, got {keep!r}.")
    if dtype is None or dtype not in QUANTIZED_DTYPES:
        for name, value in (("calibrate", calibrate), ("keep", keep or None)):
            if value is not None:
                raise ValueError(f"freeze: {name} is for dtype=torch.int8 or float8_e4m3fn, got dtype={dtype}.")
        return None
    if calibrate is None:
        raise ValueError(
            f"freeze: dtype={dtype} needs calibrate: a loader of 16 or more images as the model takes them, or the "
            "file that frozen.scales().save(path) wrote."
        )
    if not isinstance(calibrate, (Scales, str, os.PathLike, Iterable)) or isinstance(calibrate, Tensor):
        raise TypeError(
            f"freeze: calibrate must be batches of images, a path or Scales, got a {type(calibrate).__name__}. One "
            "batch x is [x]."
        )
    if backend != "auto":
        raise ValueError(f"freeze: backend={backend!r} computes in floats; {name} needs backend='auto'.")
    if (why := why_not_on(dtype, device)) is not None:
        raise BackendError(f"freeze: {name} cannot run {why}")
    return Calibration(calibrate, keep, dtype)


def why_not_on(dtype: torch.dtype, device: torch.device) -> Optional[str]:
    """Why no plan in int8 or e4m3 runs on this device, and what to do instead: the end of a sentence; or None."""
    if device.type == "cpu":
        if dtype == FLOAT8:
            return (
                "on a CPU: it needs an NVIDIA GPU of compute capability 8.9 or later, and Triton. Freeze in torch.int8 "
                "or torch.bfloat16 here."
            )
        why = kernels.why_none(torch.int8)
        return why and (
            f"here: {why}. Build the C++ library (pip install . with a compiler), or freeze in torch.bfloat16 or "
            "torch.float32."
        )
    why = on_gpu.why_none(dtype, device.type)
    instead = "torch.int8 or torch.bfloat16" if dtype == FLOAT8 else "torch.bfloat16"
    return why and f"on {device}: {why}. Freeze in {instead} there."


def beside_int8() -> torch.dtype:
    """What stays in floats on a CPU is bf16 where this processor multiplies it faster than fp32."""
    is_fast = onednn.has_amx() or onednn.has_bf16() and "avx512_bf16" in devices.cpu_flags()
    return torch.bfloat16 if is_fast else torch.float32


def beside_quantized(device: torch.device) -> torch.dtype:
    """The same on any device: on GPUs it is bf16."""
    return beside_int8() if device.type == "cpu" else torch.bfloat16
