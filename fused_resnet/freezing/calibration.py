"""What `freeze` was given to make a model int8 or e4m3, checked, and what follows from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, fx, nn

from fused_resnet import backends
from fused_resnet.backends import BackendError
from fused_resnet.choosing import quantized as in_steps
from fused_resnet.choosing.timing import Progress
from fused_resnet.freezing.draft import Quantization
from fused_resnet.freezing.fake_quantize import brings_scales
from fused_resnet.freezing.given_scales import Given, notes_of, ranges_of
from fused_resnet.freezing.quantized import kept_by, linear_names, why_no_int8
from fused_resnet.machine import devices, onednn
from fused_resnet.operators.problem import FLOAT8, dtype_name
from fused_resnet.quantizing.calibrate import Subject, calibrate, sensitivity
from fused_resnet.quantizing.scales import Scales, digest, digest_of_steps
from fused_resnet.regions import kernels

QUANTIZED_DTYPES = (torch.int8, FLOAT8)
Source = Union[Scales, str, "os.PathLike[str]", Iterable[Any]]
Keep = Union[int, str, Sequence[str]]
_NEEDED = (
    "dtype={} needs calibrate: a loader of 16 or more images as the model takes them, or the file that "
    "frozen.scales().save(path) wrote."
)

log = logging.getLogger("fused_resnet")


class Calibration(NamedTuple):
    """calibrate, keep, dtype and backend, as `freeze` takes them. any_size: whether images may be of other sizes than
    the example, as those that a model in parts calls a part with."""

    source: Optional[Source]  # None: the model brings its scales
    keep: Keep
    dtype: torch.dtype = torch.int8
    backend: str = "auto"
    any_size: bool = False

    def of(
        self, model: nn.Module, traced: fx.GraphModule, subject: Subject, example: Tensor, progress: Progress
    ) -> Quantization:
        """The scales, made now or read, and the names of the convolutions that stay in floats. Those that the model
        brings itself come first.

        Raises ValueError where the scales are of other weights or steps. Also where keep names no convolution, or asks
        for the most sensitive of a file's. Also what `quantizing.calibrate` raises.
        """
        problems = {subject.names[node]: conv.problem for node, conv in subject.convolutions.items()}
        given = ranges_of(notes_of(subject), {name: problem.activation for name, problem in problems.items()})
        scales, first = self._scales(model, digest_of_steps(traced), subject, example, progress, given)
        forms = {name: (problem.activation, problem.has_residual) for name, problem in problems.items()}
        found = Quantization(scales, forms, frozenset(), self.dtype, given.limits, given.unknown)
        if not isinstance(self.keep, int):
            asked = [self.keep] if isinstance(self.keep, str) else self.keep
            return found._replace(kept=kept_by([*problems, *linear_names(subject)], asked))
        if not self.keep:
            return found
        if first is None:
            raise ValueError(
                f"freeze: keep={self.keep} asks for the most sensitive convolutions, which only images show. Name them "
                "in keep, or pass a loader as calibrate."
            )
        errors = sensitivity(subject, scales.ranges, first, self.dtype)
        possible = [name for name in errors if why_no_int8(problems[name], self.dtype, self.backend) is None]
        if self.dtype == FLOAT8:  # whose first convolution is in bf16 anyway
            possible = [name for name in possible if name != next(iter(problems))]
        return found._replace(kept=frozenset(sorted(possible, key=errors.__getitem__)[: self.keep]))

    def _scales(
        self,
        model: nn.Module,
        steps: str,
        subject: Subject,
        example: Tensor,
        progress: Progress,
        given: Given,
    ) -> tuple[Scales, Optional[Tensor]]:
        """The scales, and the first batch where images were seen."""
        if self.source is None:
            if not given.ranges:
                raise ValueError(f"freeze: the model rounds nothing that int8 keeps. {_NEEDED.format(self.dtype)}")
            return Scales(given.ranges, None, 0), None
        weights, first = digest(model), None
        if isinstance(self.source, Scales):
            scales = self.source
        elif isinstance(self.source, (str, os.PathLike)):
            scales = Scales.load(self.source)
        else:
            told = lambda images: progress(0.0, f"calibrating with {images} images")  # noqa: E731
            scales, first = calibrate(
                subject, self.source, None if self.any_size else example, weights, told, given.ranges
            )
            scales = scales._replace(steps=steps)
        if scales.parts:
            raise ValueError(
                f"freeze: these scales are of a model in parts ({', '.join(scales.parts)}), and this one is frozen as "
                "a whole. Calibrate again: pass a loader as calibrate."
            )
        if scales.weights is None:
            _check_names(scales, [subject.names[node] for node in subject.convolutions])
        else:
            _check_model(scales, weights, steps)
        return scales._replace(ranges={**scales.ranges, **given.ranges}), first


def _check_names(scales: Scales, convolutions: Sequence[str]) -> None:
    """Raises ValueError for the scales of a quantized model whose convolutions have other names."""
    if not scales.ranges.keys() & set(convolutions):
        raise ValueError(
            f"freeze: these scales are of {', '.join([*scales.ranges][:4])} and the like, but the model's convolutions "
            f"are {', '.join(convolutions[:4])}. Pass a loader as calibrate."
        )


def _check_model(scales: Scales, weights: str, steps: str) -> None:
    """Raises ValueError for scales that another model was calibrated with."""
    if scales.weights != weights:
        raise ValueError(
            f"freeze: these scales are of other weights (sha256 {str(scales.weights)[:12]}, the model's is "
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


def checked(
    dtype: Optional[torch.dtype],
    calibrate: Optional[Source],
    keep: Keep,
    backend: str,
    device: torch.device,
    model: nn.Module,
) -> Optional[Calibration]:
    """None where another dtype was asked for. calibrate may be None for a model that brings its scales.

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
    if calibrate is None and not (dtype == torch.int8 and brings_scales(model)):
        raise ValueError(f"freeze: {_NEEDED.format(dtype)}")
    is_source = calibrate is None or isinstance(calibrate, (Scales, str, os.PathLike, Iterable))
    if not is_source or isinstance(calibrate, Tensor):
        raise TypeError(
            f"freeze: calibrate must be batches of images, a path or Scales, got a {type(calibrate).__name__}. One "
            "batch x is [x]."
        )
    if backend != "auto":
        possible = ["auto", *named_for(dtype)]
        if backend not in possible:
            raise ValueError(
                f"freeze: backend={backend!r} is not for {name}; {', '.join(map(repr, possible))} can be asked for."
            )
        if (why := in_steps.why_none(dtype, device.type, backend)) is not None:
            raise BackendError(f"freeze: {name} by {backend} cannot run on {device}: {why}. Leave out backend=.")
    elif (why := why_not_on(dtype, device)) is not None:
        raise BackendError(f"freeze: {name} cannot run {why}")
    return Calibration(calibrate, keep, dtype, backend)


def named_for(dtype: torch.dtype) -> list[str]:
    """The backends that `freeze` takes by name in int8 or e4m3: those that plans pack weights for."""
    op = "conv_float8" if dtype == FLOAT8 else "conv_int8"
    return [name for name, backend in backends.known(op).items() if backend.plan.bind is not None]


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
    why = in_steps.why_none(dtype, device.type)
    instead = "torch.int8 or torch.bfloat16" if dtype == FLOAT8 else "torch.bfloat16"
    return why and f"on {device}: {why}. Freeze in {instead} there."


def beside_int8() -> torch.dtype:
    """What stays in floats on a CPU is bf16 where this processor multiplies it faster than fp32."""
    is_fast = onednn.has_amx() or onednn.has_bf16() and "avx512_bf16" in devices.cpu_flags()
    return torch.bfloat16 if is_fast else torch.float32


def beside_quantized(device: torch.device) -> torch.dtype:
    """The same on any device: on GPUs it is bf16."""
    return beside_int8() if device.type == "cpu" else torch.bfloat16
