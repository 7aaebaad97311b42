"""The file that a killed run goes on from: written whole or not at all, and read without trust."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Mapping

import torch

from fused_resnet.machine import files
from fused_resnet.machine.errors import one_line

FORMAT = 1
NAME = "checkpoint.pt"
_FIELDS = {"format", "settings", "data", "processes", "step", "order", "sums", "history", "model", "optimizer",
           "schedule", "scaler", "random"}  # fmt: skip


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint. A kill at any moment leaves the old one or the new one."""
    with files.replacing(folder / NAME) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(folder: Path) -> dict[str, Any]:
    """The folder's checkpoint, on the CPU. ValueError for a file that is damaged or none of ours."""
    path = folder / NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip and pickle each raise their own kinds
        raise ValueError(
            f"train: {path} is not a readable checkpoint ({one_line(error)}). It may be cut off: begin anew in "
            "another folder, or put back a copy."
        ) from None
    if not isinstance(state, dict) or set(state) != _FIELDS or state["format"] != FORMAT:
        raise ValueError(f"train: {path} is no checkpoint of a run of this version; begin anew in another folder.")
    return state


def remove_unfinished(folder: Path) -> None:
    """What a kill in the middle of `save` left. To be called by the only writer."""
    for part in folder.glob(f"{NAME}*.part"):
        part.unlink()


def random_state() -> dict[str, Any]:
    """The global generators of torch, CUDA and Python, in tensors and numbers alone."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
