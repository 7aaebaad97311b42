"""1x1 convolutions of stride 1 as matrix products: in NHWC a map is a matrix, a row for each pixel.

In bf16 on AMX a product is faster than oneDNN's convolution, most of all for the gradient of the weight
(benchmarks/LOG.md). Nothing is copied, and what autograd keeps is the same.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from fused_resnet.machine import onednn
from fused_resnet.operators import layout


def pays(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> bool:
    """Whether products compute conv(x), whose call may be bypassed, and are faster. weight: as it would compute."""
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return False
    is_theirs = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu"
    if not is_theirs or x.dim() != 4 or weight.shape[1] != x.shape[1] or 1 in (weight.shape[0], x.shape[1]):
        return False
    is_a_matrix = layout.is_nhwc(x) and x.is_contiguous(memory_format=torch.channels_last)
    return is_a_matrix and x.shape[0] > 0 and x.shape[2] * x.shape[3] > 1 and onednn.has_amx()


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight), in channels_last. Without gradients no view: a node of autograd's may not give one."""
    if not torch.is_grad_enabled():
        N, _, H, W = x.shape
        y = torch.empty((N, weight.shape[0], H, W), dtype=x.dtype, memory_format=torch.channels_last)
        torch.mm(_as_matrix(x), _as_matrix(weight).t(), out=_as_matrix(y))
        return y
    return _as_map(_as_matrix(x) @ _as_matrix(weight).t(), x)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The gradients of x and of the weight."""
    rows = _as_matrix(grad)
    grad_x = _as_map(rows @ _as_matrix(weight), x) if needs_x else None
    grad_weight = _as_map(rows.t() @ _as_matrix(x), weight) if needs_weight else None
    return grad_x, grad_weight


def _as_matrix(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    N, _, H, W = like.shape
    return rows.view(N, H, W, -1).permute(0, 3, 1, 2)
