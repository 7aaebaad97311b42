"""Operands of bottleneck_chain, and its errors as parts of their bounds."""

import torch

from fused_resnet.operators import layout, reference
from fused_resnet.operators.describe import chain_problem
from fused_resnet.operators.operands import ChainOperands


def chain_operands(shape, dtype, seed=0) -> ChainOperands:
    """Values around 1 in every map. shape: N, C, H, W, K, L. Biases of half precision are fp32."""
    N, C, H, W, K, L = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    o = ChainOperands(
        normal(N, C, H, W), normal(N, K, H, W), normal(C, C, 3, 3, scale=(9 * C) ** -0.5), normal(C),
        normal(K, C, 1, 1, scale=C**-0.5), normal(K),
        *((normal(L, K, 1, 1, scale=K**-0.5), normal(L)) if L else ()),
    )  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    return o.map(lambda t: layout.channels_last(t.to(dtype)) if t.dim() == 4 else t.to(wide))


def errors_of(o: ChainOperands, activation: str, outputs, stored=None) -> list[float]:
    """The largest error of y and of reduced, as a part of the bound; infinite for NaN. stored: as the bound has it."""
    problem = chain_problem(o, activation)
    expected = reference.bottleneck_chain(problem, o)
    bounds = reference.bottleneck_chain_bound(problem, o, stored=stored)
    parts = []
    for output, right, bound in zip(outputs, expected, bounds):
        if right is not None:
            worst = ((output.double() - right).abs() / bound).max().item()
            parts.append(worst if worst == worst else float("inf"))
    return parts
