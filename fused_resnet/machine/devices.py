"""What the processors here are called, and what they can and may do. No host name, no path."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch

_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")
_MIN_CAPABILITY = (8, 0)  # below, GPUs have no bfloat16, and Triton spills thousands of bytes
_FLOAT8_CAPABILITY = (8, 9)  # below, tensor cores have no e4m3


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """Inside, this is the current device, where it is a GPU: streams and graphs are made there."""
    with torch.cuda.device(device) if torch.device(device).type == "cuda" else contextlib.nullcontext():
        yield


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name()


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def core_count() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags() -> list[str]:
    """Those instruction sets of this CPU that decide how fast a convolution can be."""
    return [flag for flag in _CPU_FLAGS if has_cpu_flag(flag)]


def has_cpu_flag(flag: str) -> bool:
    """Whether /proc/cpuinfo has it; False where there is none."""
    return flag in (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()


@functools.lru_cache(maxsize=None)
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    with contextlib.suppress(OSError):
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
        return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    return {}


def why_too_old() -> Optional[str]:
    """Why kernels of ours cannot run on every visible GPU, or None: a problem does not say on which of them it lies."""
    capability = least_capability()
    if capability is None:
        return "no GPU is visible"
    if capability >= _MIN_CAPABILITY:
        return None
    wanted, found = ("{}.{}".format(*pair) for pair in (_MIN_CAPABILITY, capability))
    return f"it needs compute capability {wanted} or later on every visible GPU, one has {found}"


def why_no_float8() -> Optional[str]:
    """Why no kernel can multiply e4m3 on every visible GPU, or None."""
    capability = least_capability()
    if capability is None:
        return "no GPU is visible"
    if capability >= _FLOAT8_CAPABILITY:
        return None
    wanted, found = ("{}.{}".format(*pair) for pair in (_FLOAT8_CAPABILITY, capability))
    return f"e4m3 needs compute capability {wanted} or later on every visible GPU, one has {found}"


@functools.lru_cache(maxsize=None)  # the visible GPUs stay what they are
def least_capability() -> Optional[tuple[int, int]]:
    """The lowest compute capability of the visible GPUs; None where there is none."""
    return min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())), default=None)


def allows_tf32() -> bool:
    """Whether torch's own fp32 convolutions may use TF32 on CUDA. By torch's default they may.

    Asked of `torch.backends.cudnn.conv.fp32_precision`, since `allow_tf32` raises after that one has been set.
    """
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


@functools.lru_cache(maxsize=None)
def second_level_cache_bytes() -> int:
    """One core's, as Linux says; 1 MiB where it does not."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return 2**20
