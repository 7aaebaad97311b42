"""A small Triton GEMM that makes wgmma read every layout of shared memory: K-major and M- or N-major, each swizzle.

Imported by the worker alone: in the tests' own process Triton interprets.
"""

import torch
import triton
import triton.language as tl

from fused_resnet.emulation import launches
from fused_resnet.kernels.triton import runtime

BLOCK_M, BLOCK_N = 64, 64
M, N, K = 72, 136, 208  # the last tiles reach beyond the matrices, and there are more steps than stages


@triton.jit
def _gemm(
    a_desc, b_desc, out_ptr, M, N, K, A_IS_K_MAJOR: tl.constexpr, B_IS_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // num_n * BLOCK_M, tl.program_id(0) % num_n * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = a_desc.load([m, k]) if A_IS_K_MAJOR else a_desc.load([k, m]).T
        b = b_desc.load([n, k]).T if B_IS_K_MAJOR else b_desc.load([k, n])
        total = tl.dot(a, b, total, input_precision="tf32")
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total, mask=inside)


def run(arch: int, dtype: torch.dtype, a_is_k_major: bool, b_is_k_major: bool, block_k: int, **how) -> dict:
    """The worst error as a part of what sums in fp32 allow, what was reported, and which wgmma ran."""
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    if dtype == torch.float32:  # as TF32 keeps it, so that the products are exact
        a, b = (t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (a, b))
    out = torch.full((M, N), torch.nan)
    a_memory, b_memory = a if a_is_k_major else a.t().contiguous(), b.t().contiguous() if b_is_k_major else b
    a_block = (BLOCK_M, block_k) if a_is_k_major else (block_k, BLOCK_M)
    b_block = (BLOCK_N, block_k) if b_is_k_major else (block_k, BLOCK_N)
    arguments = (
        runtime.descriptor(a_memory, tuple(a_memory.shape), a_block),
        runtime.descriptor(b_memory, tuple(b_memory.shape), b_block), out, M, N, K,
    )  # fmt: skip
    options = dict(A_IS_K_MAJOR=a_is_k_major, B_IS_K_MAJOR=b_is_k_major, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
                   BLOCK_K=block_k, num_warps=4, num_stages=3)  # fmt: skip
    programs = -(-M // BLOCK_M) * -(-N // BLOCK_N)
    outcome = launches.run(launches.Launch(_gemm, programs, arguments, options), arch, [out], **how)
    wanted, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    worst = ((out.double() - wanted).abs() / (2 * K * 2.0**-24 * magnitude)).max().item()
    return dict(
        worst=worst if worst == worst else float("inf"), reports=outcome.reports[:3], wgmma=outcome.counts.wgmma
    )
