"""As much of the CUDA driver's API as the golden kernels need, by ctypes: modules, memory, launches, tensor maps."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy

from benchmarks.gpu_check.golden.kernels import POISON, Golden, Map

_ERROR_NO_BINARY_FOR_GPU, _ERROR_INVALID_PTX, _ERROR_UNSUPPORTED_PTX_VERSION = 209, 218, 222
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_FLOAT16 = 6  # CU_TENSOR_MAP_DATA_TYPE_FLOAT16
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_*
_PTX_ALONE = (_ERROR_NO_BINARY_FOR_GPU, _ERROR_INVALID_PTX, _ERROR_UNSUPPORTED_PTX_VERSION)


class DriverError(RuntimeError):
    """A call that failed. costs_context: it may have left nothing in this process that can go on."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.costs_context = not (call.startswith("cuTensorMap") or code in _PTX_ALONE)


class Driver:
    """The first GPU. library: libcuda.so.1, or what stands for it in a test."""

    def __init__(self, library: Any) -> None:
        self._library = library
        device, context = c_int(), c_void_p()
        self._call("cuInit", c_uint32(0))
        self._call("cuDeviceGet", byref(device), c_int(0))
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._call("cuCtxSetCurrent", context)
        major, minor = (self._attribute(which, device) for which in (_MAJOR, _MINOR))
        self.capability = 10 * major + minor

    def _attribute(self, which: int, device: c_int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(which), device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = c_char_p()
            self._library.cuGetErrorName(c_int(code), byref(text))
            raise DriverError(name, code, (text.value or b"").decode() or f"error {code}")

    def run(self, kernel: Golden, given: numpy.ndarray) -> bytes:
        """What a kernel leaves of its poisoned output."""
        text, module, function = c_char_p(kernel.text.encode()), c_void_p(), c_void_p()
        self._call("cuModuleLoadData", byref(module), text)
        self._call("cuModuleGetFunction", byref(function), module, c_char_p(kernel.name.encode()))
        out = numpy.full(kernel.out_bytes, POISON, numpy.uint8)
        buffers = [self._copied(array) for array in (given, out)]
        arguments: list[Any] = list(buffers)
        if kernel.tensor_map is not None:
            arguments.append(self._encoded(kernel.tensor_map, buffers[0]))
        places = (c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        one = c_uint32(1)
        self._call("cuLaunchKernel", function, one, one, one, c_uint32(kernel.threads), one, one, c_uint32(0),
                   c_void_p(), places, c_void_p())  # fmt: skip
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH_v2", c_void_p(out.ctypes.data), buffers[1], ctypes.c_size_t(out.nbytes))
        for buffer in buffers:
            self._call("cuMemFree_v2", buffer)
        self._call("cuModuleUnload", module)
        return out.tobytes()

    def _copied(self, array: numpy.ndarray) -> c_uint64:
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), ctypes.c_size_t(array.nbytes))
        self._call("cuMemcpyHtoD_v2", address, c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        return address

    def _encoded(self, tensor_map: Map, address: c_uint64) -> Any:
        """The 128 bytes of a CUtensorMap, which the driver wants at a multiple of 64."""
        memory = (ctypes.c_uint8 * 192)()
        encoded = (ctypes.c_uint8 * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
        rank = len(tensor_map.sizes)
        begin = (byref(encoded), c_int(_FLOAT16), c_uint32(rank), address,
                 (c_uint64 * rank)(*tensor_map.sizes), (c_uint64 * (rank - 1))(*tensor_map.strides))  # fmt: skip
        # element strides; no interleaving, the swizzle, no promotion into L2, zeros outside
        end = ((c_uint32 * rank)(*tensor_map.steps), c_int(0), c_int(_SWIZZLES[tensor_map.swizzle]), c_int(0), c_int(0))
        if not tensor_map.pixels:
            self._call("cuTensorMapEncodeTiled", *begin, (c_uint32 * rank)(*tensor_map.box), *end)
            return encoded
        corners = ((c_int * (rank - 2))(*corner) for corner in (tensor_map.lower, tensor_map.upper))
        sizes = (c_uint32(tensor_map.channels), c_uint32(tensor_map.pixels))
        self._call("cuTensorMapEncodeIm2col", *begin, *corners, *sizes, *end)
        return encoded
