"""A problem as something to run: operands like a network's, and how wrong a result for them is.

A batch holds two different images, in an order without a period (`order_of`). An image's output depends on no other
image, so the fp64 reference of two says what the whole output must be: also what lies far from its beginning.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.choosing.case import Case, bound_of
from fused_resnet.operators import affine
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem


def order_of(batch: int) -> Tensor:
    """Which of two images lies at each place of a batch: the parity of the place's set bits, which never repeats."""
    return torch.tensor([bin(place).count("1") % 2 for place in range(batch)], dtype=torch.long)


def in_order(images: Tensor, order: Tensor) -> Tensor:
    return images[order.to(images.device)].contiguous(memory_format=torch.channels_last)


def random_operands(problem: ConvProblem, device: str, seed: int = 0, *, is_extreme: bool = False) -> ConvOperands:
    """Operands with live BN for a problem: random-normal activations, He-scaled weights, vectors in fp32.

    is_extreme: the second image holds values of any size from channel to channel, many of them 0. In fp16 they stay
    small enough for finite results.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    p = problem

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    def images(*shape: int) -> Tensor:
        values = normal(2, *shape)
        if is_extreme:
            largest = 1.0 if p.dtype == torch.float16 else 4.0
            exponents = torch.empty(shape[0], 1, 1, device=device).uniform_(-4.0, largest, generator=generator)
            values[1] *= 10**exponents * (normal(*shape) > -0.5)
        return in_order(values.to(p.dtype), order_of(p.N))

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(p.K, device=device).uniform_(low, high, generator=generator)

    weight = normal(p.K, p.C // p.groups, p.R, p.S, scale=math.sqrt(2 / p.reduction))
    return ConvOperands(
        images(p.C, p.H, p.W),
        weight.to(p.dtype, memory_format=torch.channels_last),
        uniform(0.5, 1.5), uniform(-0.5, 0.5), uniform(-0.5, 0.5), uniform(0.5, 1.5),
        residual=images(p.K, p.P, p.Q) if p.has_residual else None,
    )  # fmt: skip


def folded_operands(operands: ConvOperands, *, has_bias: bool = True) -> ConvOperands:
    """The same operation with BN folded into weight and bias, as `freeze` does; without a bias that it moves away."""
    weight, shift = affine.fold(operands, operands.x.dtype)
    return ConvOperands(operands.x, weight, bias=shift if has_bias else None, residual=operands.residual)


class Prepared(NamedTuple):
    """A variant of an operator: how to run it, and the case of its first two images, by a backend's rules.

    case: None for what is not compared, a copy.
    """

    run: Callable[[], Tensor]
    case: Optional[Case]
    backend: str


def compared_case(problem: ConvProblem, operands: ConvOperands) -> Case:
    """The case of the two images of a batch, or of its one, by which all of its output is compared."""
    images = min(problem.N, 2)
    residual = operands.residual
    first = operands._replace(x=operands.x[:images], residual=None if residual is None else residual[:images])
    return Case(problem._replace(N=images), first)


def error_ratio(prepared: Prepared) -> float:
    """The worst error as a fraction of what the backend is allowed; 0 for a copy.

    Of a convolution, reference.error_bound; an addition rounds once, so any other result counts as infinitely wrong.
    Anything but a number does too.
    """
    case = prepared.case
    if case is None:
        return 0.0
    with torch.no_grad():
        actual = prepared.run()
    if case.problem.op == "add_relu":
        expected = case.expected.to(actual.dtype)
        order = order_of(actual.shape[0]) if actual.shape[0] > 2 else range(actual.shape[0])
        return 0.0 if all(torch.equal(image.cpu(), expected[k]) for image, k in zip(actual, order)) else math.inf
    return worst_error(case, prepared.backend, actual, order_of(actual.shape[0]))


def worst_error(case: Case, backend: str, actual: Tensor, order: Tensor) -> float:
    """The worst error of a batch as a fraction of what the backend is allowed. order: which image of the case lies at
    each place."""
    expected, bound = (tensor.to(actual.device) for tensor in (case.expected, bound_of(case, backend)))
    worst = 0.0
    for image, k in zip(actual, order.tolist()):
        error = (image.double() - expected[k]).abs() / bound[k]
        worst = max(worst, error.nan_to_num(nan=math.inf).max().item())
    return worst


def finite(value: float) -> Optional[float]:
    """JSON has no infinity: None stands for an error without bound."""
    return value if math.isfinite(value) else None
