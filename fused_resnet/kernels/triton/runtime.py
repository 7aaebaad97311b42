"""Triton itself: the one guarded import, what it cannot do here, and how a kernel is started.

Without Triton the kernel files still import: `jit` is then the identity, and `why_not` says what is missing.
"""

from __future__ import annotations

import functools
from typing import Optional, Sequence

import numpy
import torch
from torch import Tensor

from fused_resnet.machine import devices
from fused_resnet.machine.errors import one_line
from fused_resnet.operators.problem import dtype_name

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor

    IMPORT_ERROR = None
except Exception as error:  # a broken installation raises whatever its shared library or its LLVM raises
    triton = tl = TensorDescriptor = None
    IMPORT_ERROR = error

    def jit(fn):
        return fn


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@jit
def _probe_kernel():
    pass


# Decided when kernels are decorated, by TRITON_INTERPRET at that moment: changing the variable later changes nothing.
INTERPRETED = IMPORT_ERROR is None and type(_probe_kernel).__name__ == "InterpretedFunction"


def why_not(device: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype] = _DTYPES) -> Optional[str]:
    """Why no kernel of ours for these dtypes can run on tensors of this device type and dtype, or None."""
    if isinstance(IMPORT_ERROR, ModuleNotFoundError) and IMPORT_ERROR.name == "triton":
        return "Triton is not installed"
    if IMPORT_ERROR is not None:
        return f"Triton cannot be imported ({one_line(IMPORT_ERROR)})"
    if dtype not in dtypes:
        return f"{dtype_name(dtype)} is not supported ({', '.join(map(dtype_name, dtypes))} are)"
    if INTERPRETED and device in ("cpu", "cuda"):
        return _interpreter_error(triton.__version__, numpy.__version__)
    if device == "cpu":
        return "on a CPU it runs only in the interpreter: set TRITON_INTERPRET=1"
    if device != "cuda":
        return f"device {device!r} is not supported (cuda is)"
    if torch.version.hip is not None:
        return "it is not supported on ROCm"
    return devices.why_too_old() or _driver_error()


@functools.lru_cache(maxsize=None)
def _interpreter_error(triton_version: str, numpy_version: str) -> Optional[str]:
    """Triton 3.6's interpreter takes an array of one element for a number, which numpy 2.4 no longer allows."""
    is_old, is_new = _release(triton_version) < (3, 7), _release(numpy_version) >= (2, 4)
    if not (is_old and is_new):
        return None
    return f"the interpreter of Triton {triton_version} does not run with numpy {numpy_version}: install numpy<2.4"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.lru_cache(maxsize=None)
def _driver_error() -> Optional[str]:
    """Triton compiles its CUDA driver module on first use, which fails without a C compiler or a CUDA driver."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton does not work on this machine ({one_line(error)})"
    return None


@functools.lru_cache(maxsize=None)
def arch(device: torch.device) -> int:
    """The compute capability times ten. Where nothing is compiled, in the interpreter, that of an H100."""
    if INTERPRETED or device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=None)
def num_sms(device: torch.device) -> int:
    """Programs of a persistent kernel. Two in the interpreter, which runs them one after another; else an H100's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if INTERPRETED else 132


def descriptor(tensor: Tensor, shape: tuple[int, int], block: tuple[int, int]):
    """A tensor's memory as a dense matrix of which TMA brings blocks; what lies outside it reads as zero."""
    return TensorDescriptor(tensor, list(shape), [shape[1], 1], list(block))


def start(kernel, num_programs: int, arguments: tuple, options: dict, *, like: Tensor) -> None:
    """Run `num_programs` programs of a kernel on the device of `like`, on its current stream."""
    grid = (num_programs,)
    if INTERPRETED:
        from fused_resnet.kernels.triton.interpreter import gpu_arithmetic

        with gpu_arithmetic():
            kernel[grid](*arguments, **options)
    elif like.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(like.device):
            kernel[grid](*arguments, **options)


def triton_version() -> Optional[str]:
    """None where Triton is not installed."""
    return triton.__version__ if IMPORT_ERROR is None else None
