"""What this machine reaches in copying and in multiplying."""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.choosing.timing import Variants, interleaved
from fused_resnet.operators.problem import FLOAT8, ConvProblem, Problem


class Roofline(NamedTuple):
    """What this machine reaches in copying a buffer too large for its caches, and in one large matrix product.

    On CUDA also in reading a buffer that stays in L2 (None elsewhere, and without Triton).
    """

    bytes_per_s: float
    flops_per_s: float
    l2_bytes_per_s: Optional[float] = None

    def time_us(self, problem: Problem) -> float:
        """The least time for a problem whose data starts and ends in main memory."""
        return self.least_us(problem.bytes_moved, problem.flops if isinstance(problem, ConvProblem) else 0)

    def least_us(self, bytes_moved: int, flops: int) -> float:
        return 1e6 * max(bytes_moved / self.bytes_per_s, flops / self.flops_per_s)

    def as_dict(self) -> dict[str, Optional[float]]:
        """GB/s and TFLOP/s, for a record."""
        l2 = self.l2_bytes_per_s
        return {
            "gb_per_s": self.bytes_per_s / 1e9,
            "tflops": self.flops_per_s / 1e12,
            "l2_gb_per_s": None if l2 is None else l2 / 1e9,
        }


@functools.lru_cache(maxsize=None)
def roofline(device: str, dtype: torch.dtype) -> Roofline:
    """Measured once in a process: best of several, about two seconds. Small problems, in caches, can exceed 100 %."""
    from fused_resnet.kernels.triton import cache_read, runtime  # Triton itself

    on_cuda = torch.device(device).type == "cuda"
    source = torch.randn(2**28 if on_cuda else 2**25, device=device)
    n = 8192 if on_cuda else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    target, is_int8 = torch.empty_like(source), dtype == torch.int8
    product = torch.empty_like(a, dtype=torch.int32 if is_int8 else dtype)
    multiply: Callable[..., Tensor] = torch._int_mm if is_int8 else torch.mm
    if dtype == FLOAT8:  # its second factor lies by columns
        one, b, product = torch.ones((), device=device), b.t(), torch.empty_like(a, dtype=torch.bfloat16)
        multiply = functools.partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    calls: Variants = {"copy": lambda: target.copy_(source), "matmul": lambda: multiply(a, b, out=product)}
    l2_bytes = 0
    if on_cuda and runtime.why_not("cuda", torch.float32) is None and not runtime.INTERPRETED:
        cached = source[: 2**22]  # 16 MiB
        sums = torch.empty(8 * torch.cuda.get_device_properties(device).multi_processor_count, device=device)
        l2_bytes = cache_read.bytes_read(cached, sums)
        calls["l2 read"] = lambda: cache_read.launch(cached, sums)
    best = interleaved(calls, device=device, rounds=20, budget_s=2)
    copied = 2 * source.numel() * source.element_size()
    return Roofline(
        copied / best["copy"].min_us * 1e6,
        2 * n**3 / best["matmul"].min_us * 1e6,
        l2_bytes / best["l2 read"].min_us * 1e6 if l2_bytes else None,
    )
