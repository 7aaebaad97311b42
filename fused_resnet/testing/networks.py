"""How far a network is from itself in fp64, and how far it may be: what tests and benchmarks judge whole models by."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

LUCK = 2 * torch.finfo(torch.float32).eps


def randomize(model: nn.Module) -> nn.Module:
    """Norms as after training, in eval mode: no vector is neutral, some gammas are negative."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.weight[::3].neg_()
                    module.bias.normal_(0, 0.3)
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def in_fp64(model: nn.Module, x: Tensor) -> Tensor:
    """What the model would answer without rounding."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of the exact result; where that is 0, 0 or infinity."""
    difference, size = (tensor.square().mean().sqrt().item() for tensor in (actual.double() - exact, exact))
    return difference / size if size else math.inf * difference if difference else 0.0


def allowed(plain: Tensor, exact: Tensor, *, winograd: bool = False) -> float:
    """What the same arithmetic in another order may make of the error of a plain result: four times as much.

    In fp32 the plain one may be right by luck, so it counts as two units in the last place at least. A small network,
    200 seeds, then makes 0.25 to 3.1 times that error. Winograd amplifies a rounding in fp32 by up to ten: 3.0 to 6.0
    times the error in four draws of a network with 1,198 such convolutions. A mistake is a thousand times worse.
    """
    of_plain = error(plain, exact)
    return 4 * (10 if winograd else 1) * (max(of_plain, LUCK) if plain.dtype == torch.float32 else of_plain)


def has_winograd(plan: nn.Module) -> bool:
    """Whether a plan has a convolution in fp32 by Winograd."""
    convs = [module for module in plan.modules() if hasattr(module, "backend")]
    return any(conv.backend.rounding.winograd and conv.problem.dtype == torch.float32 for conv in convs)
