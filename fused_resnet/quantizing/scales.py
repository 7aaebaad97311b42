"""The range of each tensor of a model, as a value and as a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import nn

from fused_resnet.machine import files
from fused_resnet.machine.errors import one_line

_FORMAT = "fused_resnet scales 1"


class Scales(NamedTuple):
    """What calibration found: ranges of values, from which the scales of int8 follow.

    ranges: {tensor: (least, largest)}, by its name in the traced model. weights: `digest` of the model that was
    calibrated. images: how many were seen. torch: its version then, for people.
    """

    ranges: dict[str, tuple[float, float]]
    weights: str
    images: int
    torch: str = torch.__version__

    def save(self, path: Union[str, os.PathLike[str]]) -> Path:
        """Write it as JSON, whole or not at all. Raises OSError where the folder cannot be written to."""
        record = {
            "format": _FORMAT,
            "torch": self.torch,
            "weights_sha256": self.weights,
            "images": self.images,
            "ranges": {name: list(found) for name, found in self.ranges.items()},
        }
        return files.write_json(Path(path), record)

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
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']!r}, not {_FORMAT!r}")
        ranges = {str(name): (float(least), float(largest)) for name, (least, largest) in record["ranges"].items()}
        for name, (least, largest) in ranges.items():
            if not (math.isfinite(least) and math.isfinite(largest) and least <= largest):
                raise ValueError(f"the range of {name} is {least} to {largest}")
        return cls(ranges, str(record["weights_sha256"]), int(record["images"]), str(record["torch"]))


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: their names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked") or not isinstance(tensor, torch.Tensor):
            continue  # a count changes nothing that is computed in eval mode
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        found.update(values.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
