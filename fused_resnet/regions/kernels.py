"""The micro-kernels of regions, as csrc/cpu/blocked/kernels.cpp lists them: which one runs here, and why no other.

Whether some are faster than fp32 is measured when the table is first read. Near the limit two processes may differ, so
the first answer is kept in the user's cache, in tuning/micro_kernels.json, and FUSED_RESNET_TUNED=0 ignores it.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple, Optional, Sequence

import torch

from fused_resnet.kernels import compiled, sources
from fused_resnet.machine import devices, files
from fused_resnet.operators.problem import dtype_name

_MEASURED = ("avx512_bf16",)  # csrc/cpu/blocked/pair_products.h


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
    found = (MicroKernel(name, getattr(torch, dtype), taken == "chosen", *rest) for name, dtype, taken, *rest in rows)
    return _settled(tuple(found))


def _settled(found: Sequence[MicroKernel]) -> tuple[MicroKernel, ...]:
    """The table with what an earlier process found of those that are measured. What none has found is kept."""
    measured = {kernel.name: kernel.is_chosen for kernel in found if kernel.name in _MEASURED and not kernel.why_not}
    if not measured or os.environ.get("FUSED_RESNET_TUNED") == "0":
        return tuple(found)
    file = files.cache_dir() / "tuning" / "micro_kernels.json"
    here = " ".join((devices.cpu_name(), *devices.cpu_flags(), str(compiled.built_digest(sources.BLOCKED))))
    known = files.read_json(file, _understood) or {}
    if not measured.keys() <= known.get(here, {}).keys():
        try:
            with files.locked(file):
                known = files.read_json(file, _understood) or {}
                known[here] = {**measured, **known.get(here, {})}
                files.write_json(file, known)
        except OSError:
            known = {here: measured}  # for this process alone
    kept = known[here]
    return tuple(
        kernel._replace(is_chosen=kept[kernel.name]) if kernel.name in measured else kernel for kernel in found
    )


def _understood(record: Any) -> dict[str, dict[str, bool]]:
    """{processor and build: {kernel: whether it is chosen}}, or what `files.read_json` takes for another file."""
    found = {str(here): dict(kept) for here, kept in record.items()}
    if not all(isinstance(chosen, bool) for kept in found.values() for chosen in kept.values()):
        raise ValueError("whether a kernel is chosen is neither true nor false")
    return found


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
