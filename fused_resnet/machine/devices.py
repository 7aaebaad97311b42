"""What the processors here are called. No host name, no path."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch

_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name()


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those instruction sets of this CPU that decide how fast a convolution can be."""
    found = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return [flag for flag in _CPU_FLAGS if flag in found]


@functools.lru_cache(maxsize=None)
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    with contextlib.suppress(OSError):
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
        return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    return {}
