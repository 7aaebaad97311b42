"""int8 and e4m3 where a model is frozen in parts: each part is calibrated with what the model calls it with."""

from __future__ import annotations

import os
from typing import Any, Iterator, NamedTuple, Optional

from torch import Tensor, fx, nn

from fused_resnet.choosing.timing import Progress
from fused_resnet.freezing.calibration import Calibration
from fused_resnet.freezing.copies import copy_tensors, copy_with_parameters, unwrapped
from fused_resnet.freezing.draft import Quantization
from fused_resnet.freezing.parts import Uncalibrated, calls_of
from fused_resnet.operators.problem import dtype_name
from fused_resnet.quantizing.calibrate import Subject, images_of
from fused_resnet.quantizing.scales import Scales, digest


class CalibratedParts:
    """What `freeze` was given, for the parts of a model.

    The model runs on each batch once for each part. An iterator, which gives its batches once, is kept as a list.
    takes_tensor: else batches have no labels beside them.

    Raises ValueError where keep is a number, for scales of other weights, and for a model that brings its scales.
    """

    def __init__(self, given: Calibration, model: nn.Module, takes_tensor: bool) -> None:
        if isinstance(given.keep, int) and given.keep:
            raise ValueError(
                f"freeze: keep={given.keep} asks for the most sensitive convolutions, and this model is frozen in "
                "parts, which are calibrated one by one. Name them in keep."
            )
        fake = next((name for name, one in model.named_modules() if "FakeQuantize" in type(one).__name__), None)
        if fake is not None:
            raise ValueError(
                f"freeze: {fake} rounds as a quantized model would, and {dtype_name(given.dtype)} has scales of its "
                "own. Take the FakeQuantize modules out of the model."
            )
        if given.source is None:
            raise ValueError(
                "freeze: this model is frozen in parts, which do not take the scales that it brings. Pass a loader of "
                "images as calibrate."
            )
        asked = [] if isinstance(given.keep, int) else [given.keep] if isinstance(given.keep, str) else given.keep
        self._model, self._takes_tensor, self._dtype, self._backend = model, takes_tensor, given.dtype, given.backend
        self._asked, self._found = list(asked), set[str]()
        self._scales: Optional[Scales] = None
        self._batches: Any = ()
        self._weights = digest(unwrapped(model))
        if isinstance(given.source, (str, os.PathLike)):
            self._scales = Scales.load(given.source)
        elif isinstance(given.source, Scales):
            self._scales = given.source
        else:
            self._batches = list(given.source) if iter(given.source) is given.source else given.source
        if self._scales is not None and self._scales.weights != self._weights:
            raise ValueError(
                f"freeze: these scales are of other weights (sha256 {str(self._scales.weights)[:12]}, the model's is "
                f"{self._weights[:12]}). Calibrate again: pass a loader as calibrate."
            )

    def of(self, name: str) -> Optional[PartCalibration]:
        """What a part is calibrated with; None where `keep` names it, or what it is in."""
        around = {one for one in self._asked if name == one or name.startswith(f"{one}.")}
        self._found |= around
        return None if around else PartCalibration(self, name)

    def given_to(self, name: str) -> Calibration:
        """As `freeze` would take it for the part alone."""
        inside = [one for one in self._asked if one.startswith(f"{name}.")]
        self._found.update(inside)
        keep = [one[len(name) + 1 :] for one in inside]
        if self._scales is None:
            calls = _Calls(self._model, name, self._batches, self._takes_tensor)
            return Calibration(calls, keep, self._dtype, self._backend, any_size=True)
        if name not in self._scales.parts:
            known = ", ".join(self._scales.parts) or "a whole model"
            raise ValueError(f"freeze: these scales are of {known}. Calibrate again: pass a loader as calibrate.")
        return Calibration(self._scales.parts[name], keep, self._dtype, self._backend, any_size=True)

    def scales_of(self, parts: dict[str, Scales]) -> Scales:
        """Those of the whole. Raises ValueError where `keep` names what is in no part."""
        if unknown := [one for one in self._asked if one not in self._found]:
            raise ValueError(
                f"freeze: keep names {unknown[0]!r}, which is in no part that is frozen. The parts are "
                f"{', '.join(parts)}."
            )
        return Scales({}, self._weights, max((one.images for one in parts.values()), default=0), parts=parts)


class PartCalibration(NamedTuple):
    """For one part, in place of a `Calibration`."""

    whole: CalibratedParts
    name: str

    def of(
        self, model: nn.Module, traced: fx.GraphModule, subject: Subject, example: Tensor, progress: Progress
    ) -> Quantization:
        """As `Calibration.of`. Raises Uncalibrated where that raises ValueError."""
        try:
            return self.whole.given_to(self.name).of(model, traced, subject, example, progress)
        except ValueError as error:
            raise Uncalibrated(f"{error} (In {self.name}, a part of the model.)") from error


class _Calls(NamedTuple):
    """The tensors that a model calls a part with, batch for batch."""

    model: nn.Module
    name: str
    batches: Any
    takes_tensor: bool

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        model = copy_with_parameters(self.model)
        for batch in images_of("freeze", self.batches) if self.takes_tensor else self.batches:
            yield from calls_of(model, self.name, copy_tensors(batch))
