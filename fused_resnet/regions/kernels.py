"""The micro-kernels of regions, as csrc/cpu/blocked/kernels.cpp lists them: which one runs here, and why no other."""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch

from fused_resnet.kernels import compiled
from fused_resnet.operators.problem import dtype_name


class MicroKernel(NamedTuple):
    """A row of the table. is_chosen: else it runs only by its name. why_not: what this process lacks, or ""."""

    name: str
    dtype: torch.dtype
    is_chosen: bool
    registers: str
    reason: str
    why_not: str


@functools.lru_cache(maxsize=None)
def table() -> tuple[MicroKernel, ...]:
    """The fastest first; none without the library."""
    if compiled.load("cpu") is not None:
        return ()
    rows = (line.split("\t") for line in torch.ops.fused_resnet.cpu_region_kernels().splitlines())
    return tuple(
        MicroKernel(name, getattr(torch, dtype), taken == "chosen", *rest) for name, dtype, taken, *rest in rows
    )


def fastest(dtype: torch.dtype) -> Optional[MicroKernel]:
    """The one that runs a region of this dtype where none is named, or None."""
    return next((kernel for kernel in _chosen(dtype) if not kernel.why_not), None)


def fastest_name(dtype: torch.dtype) -> str:
    """Its name; "", with which a region says why none runs."""
    kernel = fastest(dtype)
    return "" if kernel is None else kernel.name


def why_none(dtype: torch.dtype) -> Optional[str]:
    """Why no region of this dtype runs here, or None."""
    if (why := compiled.load("cpu")) is not None:
        return why
    if fastest(dtype) is not None:
        return None
    reasons = "; ".join(f"{kernel.name}: {kernel.why_not}" for kernel in _chosen(dtype)) or "there is none"
    return f"no micro-kernel for {dtype_name(dtype)} runs here ({reasons})"


def _chosen(dtype: torch.dtype) -> list[MicroKernel]:
    return [kernel for kernel in table() if kernel.dtype == dtype and kernel.is_chosen]
