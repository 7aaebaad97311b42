"""The bits that bn_act keeps of its activation: whether the gradient passes it, for each output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.operators import layout
from fused_resnet.operators.problem import BnActProblem


def packed(problem: BnActProblem, y: Tensor) -> Tensor:
    """The mask of an output, `problem.mask_shape`, by ATen. At NaN the gradient passes, as in torch."""
    if not problem.has_mask:
        return torch.empty(problem.mask_shape, dtype=torch.uint8, device=y.device)
    stops = y <= 0 if problem.activation == "relu" else (y <= 0) | (y >= 6)
    rows, length = problem.rows
    in_rows = (stops.permute(0, 2, 3, 1) if problem.is_nhwc else stops).reshape(rows, length).logical_not()
    eights = F.pad(in_rows.to(torch.uint8), (0, -length % 8)).view(*problem.mask_shape, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=y.device)).sum(-1, dtype=torch.uint8)


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as booleans, in the shape of the output, that of `like`. `like` also lies in memory as x did."""
    N, C, H, W = like.shape
    eights = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (eights & 1).bool().flatten(1)
    if layout.is_nhwc(like):
        return bits[:, :C].reshape(N, H, W, C).permute(0, 3, 1, 2)
    return bits[:, : H * W].reshape(N, C, H, W)
