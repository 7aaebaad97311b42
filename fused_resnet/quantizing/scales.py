"""The range of each tensor of a model, as a value and as a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Union

import torch
from torch import Tensor, fx, nn

from fused_resnet.machine import files
from fused_resnet.machine.errors import one_line

_FORMAT = "fused_resnet scales 2"
_FORMATS = ("fused_resnet scales 1", _FORMAT)  # the first says nothing of steps


class Effect(NamedTuple):
    """What int8 does to a convolution by itself, of exact operands, on a few of the images that calibrated.

    sqnr_db: of its result, None where that or its error is 0. clipped: the share of its results beyond their bytes.
    """

    sqnr_db: Optional[float]
    clipped: float


class Scales(NamedTuple):
    """What calibration found: ranges of values, from which the scales of int8 follow.

    ranges: {tensor: (least, largest)}, by its name in the traced model. weights: `digest` of the model that was
    calibrated, None where the ranges are those of a quantized model: any model may take them. images: how many were
    seen. torch: its version then, for people. steps: `digest_of_steps` of that model, None in files of older versions.
    effects: on each convolution, by its name; none in those files. parts: of a model that is frozen in parts, those of
    each by its name; then `ranges` is empty.
    """

    ranges: Mapping[str, tuple[float, float]]
    weights: Optional[str]
    images: int
    torch: str = torch.__version__
    steps: Optional[str] = None
    effects: Mapping[str, Effect] = {}
    parts: Mapping[str, Scales] = {}

    def save(self, path: Union[str, os.PathLike[str]]) -> Path:
        """Write it as JSON, whole or not at all. Raises OSError where the folder cannot be written to."""
        return files.write_json(Path(path), self._record())

    def _record(self) -> dict[str, Any]:
        parts = {"parts": {name: part._record() for name, part in self.parts.items()}} if self.parts else {}
        return {
            "format": _FORMAT,
            "torch": self.torch,
            "weights_sha256": self.weights,
            "steps_sha256": self.steps,
            "images": self.images,
            "ranges": {name: list(found) for name, found in self.ranges.items()},
            "effects": {name: effect._asdict() for name, effect in self.effects.items()},
            **parts,
        }

    @classmethod
    def load(cls, path: Union[str, os.PathLike[str]]) -> Scales:
        """What `save` wrote. Raises FileNotFoundError without a file, ValueError for any other content."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"scales: there is no file {path}. Make one with frozen.scales().save(path), where frozen is "
                "freeze(model, x, dtype=torch.int8, calibrate=loader)."
            )
        try:
            return cls._parsed(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"scales: {path} is not what frozen.scales().save(path) writes: {one_line(error)}"
            ) from None

    @classmethod
    def _parsed(cls, record: Any) -> Scales:
        if record["format"] not in _FORMATS:
            raise ValueError(f"its format is {record['format']!r}, not {_FORMAT!r}")
        is_old = record["format"] != _FORMAT
        steps, effects = (None, {}) if is_old else (record["steps_sha256"], record["effects"] or {})
        ranges = {str(name): (float(least), float(largest)) for name, (least, largest) in record["ranges"].items()}
        for name, (least, largest) in ranges.items():
            if not (math.isfinite(least) and math.isfinite(largest) and least <= largest):
                raise ValueError(f"the range of {name} is {least} to {largest}")
        images, version = int(record["images"]), str(record["torch"])
        weights, steps = (None if found is None else str(found) for found in (record["weights_sha256"], steps))
        understood = {str(name): _effect(**effect) for name, effect in effects.items()}
        parts = {str(name): cls._parsed(part) for name, part in record.get("parts", {}).items()}
        return cls(ranges, weights, images, version, steps, understood, parts)


def _effect(sqnr_db: Optional[float], clipped: float) -> Effect:
    effect = Effect(None if sqnr_db is None else float(sqnr_db), float(clipped))
    if not (math.isfinite(effect.sqnr_db or 0.0) and 0 <= effect.clipped <= 1):
        raise ValueError(f"an effect is {effect}")
    return effect


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: their names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked") or not isinstance(tensor, Tensor):
            continue  # a count changes nothing that is computed in eval mode
        for line in _contents(name, tensor):
            found.update(line)
    return found.hexdigest()


def digest_of_steps(traced: fx.GraphModule) -> str:
    """SHA-256 of what a traced model computes with its weights: each step, its settings, and whose results it reads.

    It holds strides, paddings and activations, and what the trace has of constants. No shape of the input is in it.
    """
    found, numbers = hashlib.sha256(), dict[fx.Node, int]()
    modules = dict(traced.named_modules())
    for number, node in enumerate(traced.graph.nodes):
        numbers[node] = number
        read = fx.node.map_arg((node.args, node.kwargs), lambda value: f"%{numbers[value]}")
        called = modules.get(str(node.target)) if node.op == "call_module" else None
        parts = (
            node.op,
            _name_of(node.target),
            "" if called is None else f"{type(called).__qualname__} {_OF_TRAINING.sub('', str(called))}",
            read,
        )
        found.update(f"{_ADDRESS.sub('', str(parts))}\n".encode())
    for name, buffer in traced.named_buffers():
        if not name.endswith("num_batches_tracked"):
            for line in _contents(name, buffer):
                found.update(line)
    return found.hexdigest()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_OF_TRAINING = re.compile(r", (momentum|track_running_stats)=[^,)]*")  # of norms


def _name_of(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', None) or target}"


def _contents(name: str, tensor: Tensor) -> list[Any]:
    """A tensor's name, shape, dtype and values as bytes. Of a sparse one, the places of its values and these."""
    values = tensor.detach().cpu()
    if values.layout != torch.strided:
        values = values.to_sparse_coo().coalesce()
        return [*_contents(f"{name} {tuple(tensor.shape)}", values.indices()), *_contents(name, values.values())]
    values = values.contiguous()
    return [f"{name} {tuple(values.shape)} {values.dtype}\n".encode(), values.flatten().view(torch.uint8).numpy().data]
