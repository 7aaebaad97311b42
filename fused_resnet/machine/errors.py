"""Exceptions as parts of sentences."""

from __future__ import annotations

import torch


def first_line(error: BaseException) -> str:
    """What an exception says first; its class where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line(error: BaseException) -> str:
    """The same, after its class."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"


def why_missing(error: BaseException) -> str:
    """Why something that had to be imported or built is not there."""
    return f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else one_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory at that moment: torch's CPU allocator says so in words alone."""
    words = ("allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(one in str(error) for one in words)
