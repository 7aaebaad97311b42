"""The generators of random numbers that a forward may draw from unseen."""

from __future__ import annotations

import random
import sys
from typing import Any, Callable

import torch
from torch import Tensor


def generators() -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """(get, set) of the state of each: Python's, torch's, numpy's where it is loaded, and the current GPU's."""
    found: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        found.append((numpy.get_state, numpy.set_state))
    if torch.cuda.is_initialized():
        found.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    return found


def comparable(state: Any) -> list:
    """A generator's state without arrays."""
    parts = [state] if isinstance(state, Tensor) else state
    return [part.tolist() if hasattr(part, "tolist") else part for part in parts]


def random_state() -> list:
    """The state of all of them, to be compared."""
    return [comparable(get()) for get, _ in generators()]
