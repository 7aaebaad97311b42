"""cuBLASLt's matrix product with a bias and a ReLU: pointwise convolutions."""

from __future__ import annotations

import os
from typing import Optional, cast

import torch
from torch import Tensor

from fused_resnet.backends.record import NEEDS_FOLDED_BN, Backend, Rounding, rounds_bias, why_not_nvidia
from fused_resnet.operators.layout import all_channels_last
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, dtype_name


def why_not(problem: ConvProblem) -> Optional[str]:
    """None where torch takes cuBLASLt's bias epilogue, else why it does not.

    It takes it for a dense bias vector and more than one channel on either side. Otherwise it would run a plain GEMM,
    and the bias and the ReLU after it.
    """
    reason = why_not_nvidia(problem)
    if reason is not None:
        return reason
    if problem.has_bn:
        return NEEDS_FOLDED_BN
    if os.environ.get("DISABLE_ADDMM_CUDA_LT", "0") not in ("", "0"):
        return "DISABLE_ADDMM_CUDA_LT is set"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype_name(problem.dtype)} is not supported (float16, bfloat16 are)"
    if not problem.is_pointwise or problem.groups > 1:
        return "it is a matrix product: 1x1 convolutions with stride 1, no padding and one group"
    if not problem.has_bias or problem.has_residual or problem.activation != "relu":
        return "its epilogue is a bias and a ReLU, no more and no less"
    return "it needs more than one channel on either side" if min(problem.C, problem.K) == 1 else None


def run(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    p, o = problem, all_channels_last(operands)
    rows = o.x.permute(0, 2, 3, 1).view(-1, p.C)
    y = torch._addmm_activation(cast(Tensor, o.bias).to(p.dtype), rows, o.weight.view(p.K, p.C).t())
    return y.view(p.N, p.P, p.Q, p.K).permute(0, 3, 1, 2)


BACKEND = Backend("cublaslt", why_not, run, takes_bn=False, rounding=Rounding(rounds_bias), origin="library")
