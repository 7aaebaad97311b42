"""One case on one backend: every element within its bound, strides as promised, no input changed."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.choosing.case import Case, bound_of, poisoned_memory, rounding_of, stored_dtype, synchronize
from fused_resnet.operators import detours, layout, reference
from fused_resnet.operators import near_bytes as bounds
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import BYTE_DTYPES, AddReluProblem


class Outcome(NamedTuple):
    """What came of one case on one backend.

    status: "ok", "mismatch" or "cannot run". detail: what differs and where, or the backend's why_not. worst_error:
    the largest error as a fraction of what the reference allows there; 0 for an exact operator, None if not run.
    num_bytes, num_differing: of an output of bytes. All must be the reference's, or within a bound where the backend
    has one.
    """

    backend: str
    status: str
    detail: str = ""
    worst_error: Optional[float] = None
    num_bytes: int = 0
    num_differing: int = 0


def run(case: Case, backend: str) -> Tensor:
    """The public function's result, without gradients. Convolutions of bytes have none: the backend's."""
    with torch.no_grad():
        if isinstance(case.operands, Int8Operands):
            return backends.known(case.problem.op)[backend].run(case.problem, case.operands)
        if isinstance(case.problem, AddReluProblem):
            return functional.add_relu(case.operands.a, case.operands.b, backend=backend)
        p, o = case.problem, case.operands
        return functional.conv_bn_act(
            *o[:6], eps=o.eps, bias=o.bias, residual=o.residual, stride=p.stride, padding=p.padding,
            dilation=p.dilation, groups=p.groups, activation=p.activation, backend=backend,
        )  # fmt: skip


def check(case: Case, backend: str) -> Outcome:
    """Run the case on this backend and hold the result against the reference.

    Beside the values: the output's strides are those promised to torch.compile, no input is written, and new memory
    holds NaN beforehand, so that a place nobody wrote shows. Raises BackendError for an unknown backend only.
    """
    known = backends.known(case.problem.op)
    if backend not in known:
        raise backends.BackendError(f"unknown backend {backend!r}; known ones are {', '.join(known)}.")
    reason = known[backend].why_not(case.problem)
    if reason is not None:
        return Outcome(backend, "cannot run", reason)
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    try:
        shape = case.problem.shape if isinstance(case.problem, AddReluProblem) else case.problem.output_shape
        like = torch.empty(shape, dtype=case.problem.output_dtype, device=case.problem.device)
        with poisoned_memory(like):
            actual = run(case, backend)
            is_addition = isinstance(case.problem, AddReluProblem)
            grad = (
                torch.ops.fused_resnet.add_relu_backward(case.operands.grad, actual, backend) if is_addition else None
            )
            synchronize(actual.device)  # what a kernel did wrong is raised by whatever waits next
    except Exception as error:  # the backend said that it can run this
        return Outcome(backend, "mismatch", f"raised {type(error).__name__}: {error}")
    for name, tensor in before.items():
        if not identical(tensor, case.tensors[name]):
            return Outcome(backend, "mismatch", f"{name} was written to")
    detail = wrong_metadata(case, actual)
    if detail is not None:
        return Outcome(backend, "mismatch", detail)
    if is_addition:
        return exact(case, backend, actual, grad)
    if case.problem.dtype in BYTE_DTYPES:
        compare = near_bytes if known[backend].rounding.near_bytes else same_bytes
        return compare(case, backend, actual.cpu())
    return within_bound(case, backend, actual.cpu().double())


def within_bound(case: Case, backend: str, actual: Tensor) -> Outcome:
    """Whether each element of a convolution's output, in fp64 on the CPU, is within its bound."""
    expected, bound, rounding = case.expected, bound_of(case, backend), rounding_of(backend)
    largest = torch.finfo(case.problem.dtype).max
    error = (actual - expected).abs()
    # an infinite bound comes from an infinite operand: what is finite there (relu(-inf)) has one right value
    agrees = (error <= bound) & bound.isfinite() | (actual == expected) | (actual.isnan() & expected.isnan())
    # what lies within the bound of the largest finite number may round to infinity
    agrees |= actual.isinf() & (actual.sign() == expected.sign()) & (expected.abs() + bound >= largest)
    may_be_nan = expected.isnan()
    if rounding.spreads_nan:
        may_be_nan |= _torch_spreads_nan(case)
        agrees |= may_be_nan & actual.isnan()
    if case.problem.activation == "silu" and stored_dtype(case, backend) is not None:
        may_be_nan |= _overflows_before_silu(case, bound)
        agrees |= may_be_nan & actual.isnan()
    if rounding.winograd:
        may_be_nan |= _winograd_overflows(case)
        agrees |= may_be_nan & (~actual.isfinite() | (actual == 0))
    if rounding.drops_nan and case.problem.activation != "none":
        agrees |= may_be_nan & (actual == 0)  # documented, as `Rounding` says
    finite = expected.isfinite() & actual.isfinite() & bound.isfinite() & ~may_be_nan
    worst = (error / bound)[finite].max().item() if finite.any() else 0.0
    if agrees.all():
        return Outcome(backend, "ok", worst_error=worst)
    place = tuple((~agrees).nonzero()[0].tolist())
    return Outcome(
        backend,
        "mismatch",
        f"{(~agrees).sum()} of {agrees.numel()} elements differ; at (n, k, p, q) = {place}: got {actual[place]:.9g}, "
        f"expected {expected[place]:.9g} +- {bound[place]:.3g}",
        worst,
    )


def _torch_spreads_nan(case: Case) -> Tensor:
    """Where torch's own convolution is not a number although the formula is.

    oneDNN's bf16 kernels for one channel per group read pairs of neighbours and multiply the second by zero. So NaN and
    infinities reach one pixel further (torch 2.13), with AMX others, and others again where a detour is taken. Where no
    window reaches x they cannot, and torch's crashes the process (oneDNN issue 5942).
    """
    p, o = case.problem, case.operands
    spread = torch.zeros(p.output_shape, dtype=torch.bool)
    if p.reads_x and not o.x.isfinite().all():
        for x, weight in ((o.x, o.weight), (layout.channels_last(o.x), layout.channels_last(o.weight))):
            plain = torch.conv2d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)
            spread |= (plain.isnan() | detours.convolution(p, x, weight).isnan()).cpu()
    return spread


def _overflows_before_silu(case: Case, bound: Tensor) -> Tensor:
    """Where a sum that is rounded before SiLU may be -inf. Torch's SiLU of it is NaN, that of the sum itself -0."""
    p: Any = case.problem
    before = reference.conv_bn_act(p._replace(activation="none"), case.operands)
    return before - bound <= -torch.finfo(p.dtype).max


def _winograd_overflows(case: Case) -> Tensor:
    """Where F(4x4, 3x3) may meet what is not finite, as is documented. Its transforms spread NaN over a tile.

    Sums that cancel in the end may overflow on the way: |B| and |A| amplify by up to 100 and 361.
    """
    products = reference.winograd_products(case.problem, case.operands.x.cpu().double(), case.operands.weight.double())
    return ~(products * 2.0**16 < torch.finfo(torch.float32).max)


def exact(case: Case, backend: str, actual: Tensor, grad: Tensor) -> Outcome:
    """Both kernels round once, so there is one right answer: the sum in fp64 is exact enough to round again."""
    expected = case.expected.to(case.problem.dtype)
    expected_grad = case.operands.grad.cpu().masked_fill(expected <= 0, 0)
    for name, got, wanted in (("output", actual.cpu(), expected), ("gradient", grad.cpu(), expected_grad)):
        differs = ~((got == wanted) | (got.isnan() & wanted.isnan()))
        if differs.any():
            place = tuple(differs.nonzero()[0].tolist())
            detail = f"{differs.sum()} of {differs.numel()} elements of the {name} differ; at {place}: got {got[place]}"
            return Outcome(backend, "mismatch", f"{detail}, expected {wanted[place]}")
    return Outcome(backend, "ok", worst_error=0.0)


def same_bytes(case: Case, backend: str, actual: Tensor) -> Outcome:
    """Whether all bytes are those of the int8 contract."""
    expected, differs = case.expected, actual != case.expected
    count, total = int(differs.sum()), differs.numel()
    if not count:
        return Outcome(backend, "ok", worst_error=0.0, num_bytes=total)
    place = tuple(differs.nonzero()[0].tolist())
    detail = f"{count} of {total} bytes differ; at (n, k, p, q) = {place}: got {actual[place]}, not {expected[place]}"
    return Outcome(backend, "mismatch", detail, None, total, count)


def near_bytes(case: Case, backend: str, actual: Tensor) -> Outcome:
    """Whether all bytes are within the bound of a kernel that rounds more often. Those that differ are counted."""
    p, o = case.problem, case.operands.map(Tensor.cpu)
    exact, bound = bounds.exact(p, o), bounds.error_bound(p, o)
    ratio, count, total = (actual - exact).abs() / bound, int((actual != case.expected).sum()), actual.numel()
    worst = ratio.max().item() if total else 0.0
    if worst <= 1:
        return Outcome(backend, "ok", "", worst, total, count)
    place = tuple((ratio > 1).nonzero()[0].tolist())
    detail = (
        f"{int((ratio > 1).sum())} of {total} bytes are too far off; at (n, k, p, q) = {place}: got {actual[place]}, "
        f"expected {exact[place]:.9g} +- {bound[place]:.9g}"
    )
    return Outcome(backend, "mismatch", detail, worst, total, count)


def wrong_metadata(case: Case, actual: Tensor) -> Optional[str]:
    if isinstance(case.problem, AddReluProblem):
        promised = torch.empty_like(case.operands.a)
    else:
        promised = torch.empty(
            case.problem.output_shape, dtype=case.problem.output_dtype, memory_format=torch.channels_last
        )
    for name, got, wanted in (
        ("shape", tuple(actual.shape), tuple(promised.shape)),
        ("dtype", actual.dtype, promised.dtype),
        ("device", actual.device.type, case.problem.device),
        ("strides", actual.stride(), promised.stride()),
    ):
        if got != wanted:
            return f"the output's {name} is {got}, promised was {wanted}"
    return None


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal; a NaN equals a NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
