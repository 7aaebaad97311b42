"""What torch's oneDNN is here: its version, and the instructions that it computes with."""

from __future__ import annotations

import functools
import os
import re
from typing import Optional

import torch

from fused_resnet.machine import devices

# Values of ONEDNN_MAX_CPU_ISA that leave AMX out; oneDNN ignores what it does not know.
_WITHOUT_AMX = frozenset(
    "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI AVX512_CORE_BF16 AVX512_CORE_FP16 "
    "AVX10_1_512 AVX10_2_512 AVX10_2".split()
)


def version() -> str:
    """As in "oneDNN v3.12.0"."""
    found = re.search(r"MKL-DNN (v[0-9.]+)", torch.__config__.show())
    return f"oneDNN {found.group(1)}" if found else "oneDNN"


def isa_limit() -> tuple[str, str]:
    """The variable by which oneDNN's instructions are limited, and its value; both empty where none is set."""
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # oneDNN reads the first that is set
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", ""))


def switches() -> tuple[bool, str]:
    """What the process has set of it: whether it computes at all, and in what it may compute fp32 convolutions.

    This is asked at every choice. torch.backends.mkldnn answers the same in eight times the time.
    """
    return torch._C._get_mkldnn_enabled(), _fp32_precision("mkldnn", "conv")


_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", lambda backend, op: "none")


@functools.lru_cache(maxsize=None)
def has_amx() -> bool:
    """Whether oneDNN computes bf16 convolutions with AMX tiles: the processor has them, and no variable forbids it."""
    return bool(
        torch.backends.mkldnn.is_available()
        and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        and isa_limit()[1].upper() not in _WITHOUT_AMX
    )


@functools.lru_cache(maxsize=None)
def why_no_vnni() -> Optional[str]:
    """Why oneDNN's sums of bytes may not be exact here, or None.

    Without VNNI it adds pairs of products in 16 bits, where 2 * 255 * 127 becomes 32767.
    """
    variable, limit = isa_limit()
    if any(map(devices.has_cpu_flag, _flags_with_vnni(limit.upper()))):
        return None
    within = f" within {variable}={limit}" if limit else ""
    return f"this CPU has no VNNI that oneDNN can use{within}, and without it sums of bytes saturate at 16 bits"


def _flags_with_vnni(limit: str) -> tuple[str, ...]:
    """The flags of a processor of which one gives oneDNN VNNI within this limit."""
    if limit in ("SSE41", "AVX", "AVX2", "AVX512_CORE"):
        return ()
    if limit in ("AVX2_VNNI", "AVX2_VNNI_2"):
        return ("avx_vnni",)
    return ("avx512_vnni",) if limit.startswith(("AVX512", "AVX10")) else ("avx512_vnni", "avx_vnni")


def has_bf16() -> bool:
    """Whether oneDNN computes bf16 convolutions on this processor, within its limit."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())
