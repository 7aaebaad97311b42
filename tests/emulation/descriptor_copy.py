"""A small Triton kernel that makes its tensor maps itself, by tensormap.replace.

Imported by the worker alone: in the tests' own process Triton interprets.
"""

import torch
import triton
import triton.language as tl

from fused_resnet.emulation import launches

BLOCK_M, BLOCK_N = 16, 64
M, N = 40, 144  # the last tiles reach beyond the matrix


@triton.jit
def _double(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK_M, BLOCK_N])
    y = tl.make_tensor_descriptor(y_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    values = x.load([m, n])
    y.store([m, n], values + values)


def run(arch: int, **how) -> dict:
    """Whether y is twice x, what was reported, and whether the kernel made its maps."""
    x, y = torch.randn(M, N).half(), torch.full((M, N), torch.nan, dtype=torch.float16)
    grid = (-(-M // BLOCK_M), -(-N // BLOCK_N))
    options = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4)
    launch = launches.Launch(_double, grid, (x, y, M, N), options)
    makes_maps = "tensormap.replace" in launches.compiled(launch, arch).text
    outcome = launches.run(launch, arch, [y], **how)
    return dict(is_right=torch.equal(y, 2 * x), reports=outcome.reports[:3], makes_maps=makes_maps)
