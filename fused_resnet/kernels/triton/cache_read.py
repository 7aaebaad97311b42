"""How fast a GPU reads its L2 cache: a kernel that does nothing else. The second ceiling after main memory.

out[p] = sum of a buffer that fits into L2, read whole by every program p.
"""

from __future__ import annotations

from torch import Tensor

from fused_resnet.kernels.triton.runtime import jit, start, tl

BLOCK = 4096  # 128 bytes in flight a thread, with fp32 and 4 warps


@jit
def _cache_read_kernel(source_ptr, out_ptr, num_blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(num_blocks):
        # each program starts elsewhere, so that they do not all wait for the same line; .cg leaves L1 out
        block = (program + step) % num_blocks
        total += tl.load(source_ptr + block * BLOCK + lanes, cache_modifier=".cg")
    tl.store(out_ptr + program, tl.sum(total))


def launch(source: Tensor, out: Tensor) -> None:
    """Read `source` once per element of `out`. source: fp32, dense, a multiple of BLOCK elements; out: fp32, dense."""
    arguments = (source, out, source.numel() // BLOCK)
    start(_cache_read_kernel, out.numel(), arguments, {"BLOCK": BLOCK, "num_warps": 4}, like=source)


def bytes_read(source: Tensor, out: Tensor) -> int:
    return source.numel() * source.element_size() * out.numel()
