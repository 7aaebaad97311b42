"""Convolutions whose tensors pass 2**31 elements and 4 GiB, where an offset of 32 bits ends.

Their batches hold two images in an order without a period (`choosing.cases`). So two images' reference says what all
of the output must be.
"""

from __future__ import annotations

import random
from typing import Optional

import torch

from fused_resnet import backends
from fused_resnet.choosing import cases
from fused_resnet.choosing.case import Case, poisoned_memory, synchronize
from fused_resnet.operators.problem import ConvProblem, parsed_problem
from fused_resnet.testing.compare import Outcome, run

_PROBLEM = "{images}x64x{side}x{side} -> 64, {window} {dtype} bias+add relu"
_IMAGES, _SIDE = 672, 224  # 2.16e9 elements, 4.3e9 bytes
_TENSORS = 6  # of that size at once: x, the residual, the output, and what is made on the way


def large_problems(seed: int, device: str) -> list[ConvProblem]:
    """One of each window that our kernels tell apart, in a dtype of 16 bits that the seed draws."""
    dtype = random.Random(f"large/{seed}").choice(("float16", "bfloat16"))
    kind = torch.device(device).type
    return [
        parsed_problem(_PROBLEM.format(images=_IMAGES, side=_SIDE, window=window, dtype=dtype), kind)
        for window in ("3x3 p1", "1x1")
    ]


def why_too_large(problem: ConvProblem, device: str) -> Optional[str]:
    """Why a device has no room for a large problem, or None. On a CPU nobody asks."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, wanted = torch.cuda.mem_get_info(device)[0], _TENSORS * 2 * problem.N * problem.C * problem.H * problem.W
    return None if free >= wanted else f"it needs {wanted / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"


def check_large(problem: ConvProblem, backend: str, device: str) -> Outcome:
    """As `check`, of values alone: each image of the output against that of the reference."""
    reason = backends.known("conv_bn_act")[backend].why_not(problem) or why_too_large(problem, device)
    if reason is not None:
        return Outcome(backend, "cannot run", reason)
    try:
        operands = cases.folded_operands(cases.random_operands(problem, device))
        with poisoned_memory(torch.empty(problem.output_shape, dtype=problem.dtype, device=device)):
            actual = run(Case(problem, operands), backend)
            synchronize(device)
    except Exception as error:  # the backend said that it can run this
        return Outcome(backend, "mismatch", f"raised {type(error).__name__}: {error}")
    worst = cases.worst_error(cases.compared_case(problem, operands), backend, actual, cases.order_of(problem.N))
    if worst <= 1:
        return Outcome(backend, "ok", worst_error=worst)
    return Outcome(backend, "mismatch", f"an element is wrong by {worst:.3g} times its bound", worst)
