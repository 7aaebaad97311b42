"""CuTe's layouts of tensor-core operands as numpy indices (CUTLASS 3, cute/atom/mma_traits_sm80.hpp, _sm90_gmma.hpp).

A second source: these formulas are CUTLASS's, proved on GPUs, and share nothing with the emulator's.
"""

import itertools

import numpy
import torch


def offsets(shape, stride):
    """An int array of one axis a mode of the layout, each mode in CuTe's order: its first part counts fastest."""
    return sum(
        _mode(size, step).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        for axis, (size, step) in enumerate(zip(shape, stride))
    )


def _mode(size, step):
    sizes, steps = numpy.atleast_1d(size), numpy.atleast_1d(step)
    indices = itertools.product(*(range(n) for n in reversed(sizes)))
    return numpy.array([sum(i * s for i, s in zip(reversed(index), steps)) for index in indices])


_LANES = (4, 8)
# (thread, value) -> m + 16 k of A, n + 8 k of B, by bytes of an element and k
A = {
    (2, 8): ((_LANES, (2, 2)), ((32, 1), (16, 8))),
    (2, 16): ((_LANES, (2, 2, 2)), ((32, 1), (16, 8, 128))),
    (4, 4): ((_LANES, 2), ((16, 1), 8)),
    (4, 8): ((_LANES, (2, 2)), ((16, 1), (8, 64))),
    (1, 16): ((_LANES, (4, 2)), ((64, 1), (16, 8))),
    (1, 32): ((_LANES, (4, 2, 2)), ((64, 1), (16, 8, 256))),
}
B = {
    (2, 8): ((_LANES, 2), ((16, 1), 8)),
    (2, 16): ((_LANES, (2, 2)), ((16, 1), (8, 64))),
    (4, 4): ((_LANES, 1), ((8, 1), 0)),
    (4, 8): ((_LANES, 2), ((8, 1), 32)),
    (1, 16): ((_LANES, 4), ((32, 1), 8)),
    (1, 32): ((_LANES, (4, 2)), ((32, 1), (8, 128))),
}
C = ((_LANES, (2, 2)), ((32, 1), (16, 8)))
# of a warpgroup: (thread, value) -> m + 64 k of A in registers, m + 64 n of D
WGMMA_A = {
    4: (((4, 8, 4), (2, 2)), ((64, 1, 16), (8, 256))),
    2: (((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512))),
    1: (((4, 8, 4), (4, 2, 2)), ((256, 1, 16), (64, 8, 1024))),
}


def wgmma_d(n):
    return ((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512))


def registers_of(matrix, layout):
    """The 32-bit registers (thread, register) that hold a fragment of a tensor."""
    index = offsets(*layout)
    flat = matrix.T.contiguous().reshape(-1)  # the first coordinate counts fastest
    values = flat.view(torch.uint8).reshape(len(flat), -1)[torch.from_numpy(index)]
    return values.reshape(len(index), -1).contiguous().view(torch.int32)


def matrix_of(registers, layout, rows, dtype):
    """The tensor whose fragments the registers (thread, register) are."""
    index = torch.from_numpy(offsets(*layout))
    flat = torch.empty(index.numel(), dtype=dtype)
    flat[index.reshape(-1)] = registers.contiguous().view(torch.uint8).reshape(-1).view(dtype)
    return flat.reshape(-1, rows).T.contiguous()


SPANS = {"none": 16, "32B": 32, "64B": 64, "128B": 128}
SWIZZLE_CODES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}


class Canonical:
    """A matrix (rows of M or N, k of 32 bytes) in shared memory, in one of the eight canonical layouts for wgmma.

    leading and stride are the descriptor's offsets, in bytes.
    """

    def __init__(self, swizzle, is_mn_major, element_bytes, leading, stride):
        self.swizzle, self.is_mn_major, self.bytes = swizzle, is_mn_major, element_bytes
        self.leading, self.stride = leading, stride

    def addresses(self, rows):
        """Byte offsets (rows, k) of the elements."""
        t, w = 16 // self.bytes, SPANS[self.swizzle] // 16
        lead, step = self.leading // self.bytes, self.stride // self.bytes
        if self.is_mn_major:
            blocks = (step, lead) if w == 1 else (lead, step)  # along M or N, along k
            groups = -(-rows // (t * w))
            shape = ((t, w, groups), (8, 32 // self.bytes // 8))
            strides = ((1, t, blocks[0]), (w * t, blocks[1]))
        else:
            shape, strides = ((8, rows // 8), (t, 2)), ((w * t, step), (1, lead if w == 1 else t))
        return self._swizzled(offsets(shape, strides)[:rows] * self.bytes)

    def _swizzled(self, byte):
        """Swizzle<b, 4, 3>: b bits from bit 7 on are xored into those from bit 4 on."""
        bits = {"none": 0, "32B": 1, "64B": 2, "128B": 3}[self.swizzle]
        return byte ^ (byte >> 3 & ((1 << bits) - 1) << 4)

    def image(self, matrix, size):
        """Shared memory that holds the matrix; what it does not fill is 0xff, NaN or -1."""
        memory = torch.full((size,), 0xFF, dtype=torch.uint8)
        where = torch.from_numpy(self.addresses(len(matrix)))[..., None] + torch.arange(self.bytes)
        memory[where.reshape(-1)] = matrix.contiguous().view(torch.uint8).reshape(-1)
        return memory

    def descriptor(self):
        """All of the 64 bits but the start address."""
        fields = self.leading >> 4 << 16 | self.stride >> 4 << 32
        return fields | SWIZZLE_CODES[self.swizzle] << 62
