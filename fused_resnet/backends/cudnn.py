"""cuDNN's fused convolutions: bias, residual and ReLU in one call.

There is no config for cuDNN's algorithm. Torch keeps, in a thread, the one that a convolution's first call took. Where
plans are captured and measured that call times them all (`cuda_graphs.best_algorithms`), cuDNN's first guess too.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_resnet.backends.record import NEEDS_FOLDED_BN, Auto, Backend, Rounding, rounds_bias, why_not_nvidia
from fused_resnet.operators.layout import all_channels_last
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


def why_not(problem: ConvProblem) -> Optional[str]:
    reason = why_not_nvidia(problem)
    if reason is not None:
        return reason
    if problem.has_bn:
        return NEEDS_FOLDED_BN
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if problem.dtype == torch.float64:
        return "float64 is not supported (float32, float16, bfloat16 are)"
    if problem.activation != "relu":
        return f"it fuses only ReLU, not {problem.activation}"
    return None


def pays(problem: ConvProblem) -> bool:
    """Dense windows over channels in eights. For the others cuDNN may have no fused engine, and raise.

    Fused stems, with three channels in channels_last, were reported to take 17 times as long (pytorch issue 68506).
    """
    return problem.groups == 1 and problem.dilation == (1, 1) and problem.C % 8 == 0 and problem.K % 8 == 0


def run(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    o = all_channels_last(operands)
    bias = None if o.bias is None else o.bias.to(o.x.dtype)
    window = (problem.stride, problem.padding, problem.dilation, problem.groups)
    if o.residual is None:
        return torch.cudnn_convolution_relu(o.x, o.weight, bias, *window)
    return torch.cudnn_convolution_add_relu(o.x, o.weight, o.residual, 1.0, bias, *window)


BACKEND = Backend(
    "cudnn",
    why_not,
    run,
    auto=Auto(("cuda",), pays),
    takes_bn=False,
    rounding=Rounding(rounds_bias, drops_nan=True),
    origin="library",
)
