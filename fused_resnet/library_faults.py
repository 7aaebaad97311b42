"""ATen's convolution and its gradients on a CPU, right where the libraries below are wrong.

oneDNN, which ATen calls, computes some windows wrongly, by up to 1e38 and otherwise each time (`FAULTS`). The same
sums come out right, and as fast, over an x whose windows lie side by side (`SideBySide`): no window then overlaps
another, passes pixels by or leaves the image. The rules ask for the shape alone where narrower instruction sets have
the fault too, since such shapes are rare and the copy is of at most what the convolution reads.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.problem import ConvProblem

_HALF_PRECISION = (torch.bfloat16, torch.float16)
# Values of ONEDNN_MAX_CPU_ISA that leave AMX out; oneDNN ignores what it does not know.
_WITHOUT_AMX = frozenset(
    "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI AVX512_CORE_BF16 AVX512_CORE_FP16 "
    "AVX10_1_512 AVX10_2_512 AVX10_2".split()
)


@functools.lru_cache(maxsize=None)
def onednn_has_amx() -> bool:
    """Whether oneDNN computes bf16 convolutions with AMX tiles: the processor has them, and no variable forbids it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return bool(
        torch.backends.mkldnn.is_available()
        and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        and limit.upper() not in _WITHOUT_AMX
    )


class SideBySide(NamedTuple):
    """A convolution's windows laid side by side in one dimension or both, and the problem that reads them so.

    Along a dimension, x'[o * taps + t] = x[o * stride + t * dilation - padding], zero outside of x, and x' is read with
    stride `taps`, without padding and dilation. laid: per dimension of x its number, its size, and these positions.
    """

    laid: tuple[tuple[int, int, tuple[int, ...]], ...]
    problem: ConvProblem

    def input(self, x: Tensor) -> Tensor:
        """x' of x. Differentiable."""
        return functools.reduce(lambda value, axis: _gathered(value, *axis), self.laid, x)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient with respect to x from that with respect to x'. Differentiable."""
        return functools.reduce(lambda value, axis: _scattered(value, *axis), reversed(self.laid), grad)


def _gathered(x: Tensor, dim: int, size: int, positions: tuple[int, ...]) -> Tensor:
    if x.stride(1) == 1:  # channels_last, which in this order took 1/8 to 1/18 of the time (EPYC Zen 4, 2026-11)
        return _gathered_in_order(x.permute(0, 2, 3, 1), dim - 1, size, positions).permute(0, 3, 1, 2)
    return _gathered_in_order(x, dim, size, positions)


def _gathered_in_order(x: Tensor, dim: int, size: int, positions: tuple[int, ...]) -> Tensor:
    inside, sources = _inside(size, positions)
    taken = x.index_select(dim, sources)
    if len(inside) == len(positions):
        return taken
    shape = list(x.shape)
    shape[dim] = len(positions)
    return x.new_zeros(shape).index_copy(dim, inside, taken)


def _scattered(grad: Tensor, dim: int, size: int, positions: tuple[int, ...]) -> Tensor:
    inside, sources = _inside(size, positions)
    shape = list(grad.shape)
    shape[dim] = size
    return grad.new_zeros(shape).index_add(dim, sources, grad.index_select(dim, inside))


def _inside(size: int, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which positions lie inside a dimension, and these positions."""
    inside = [index for index, position in enumerate(positions) if 0 <= position < size]
    return torch.tensor(inside, dtype=torch.long), torch.tensor([positions[i] for i in inside], dtype=torch.long)


# ----------------------------------------------------------------------------------------------------- the operations


def conv2d(problem: ConvProblem, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """F.conv2d of this problem's window. Differentiable in any mode, and its derivatives are right too."""
    detour = forward_detour(problem)
    p, x = (problem, x) if detour is None else (detour.problem, detour.input(x))
    return F.conv2d(x, weight, bias, p.stride, p.padding, p.dilation, p.groups)


def conv2d_backward(
    problem: ConvProblem, grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The gradients of F.conv2d with respect to x and the weight, None where not needed. Differentiable."""

    def gradients(detour: Optional[SideBySide], *mask: bool) -> tuple[Optional[Tensor], Optional[Tensor]]:
        p, read = (problem, x) if detour is None else (detour.problem, detour.input(x))
        grad_read, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, read, weight, None, p.stride, p.padding, p.dilation, False, [0, 0], p.groups, [*mask, False]
        )
        return grad_read if detour is None or grad_read is None else detour.input_gradient(grad_read), grad_weight

    for_x, for_weight = forward_detour(problem), _weight_gradient_detour(problem)
    if for_x == for_weight or not needs_weight:
        return gradients(for_x, needs_x, needs_weight)
    grad_x = gradients(for_x, True, False)[0] if needs_x else None
    return grad_x, gradients(for_weight, False, True)[1]


# ---------------------------------------------------------------------------------------------------------- the rules


def forward_detour(problem: ConvProblem) -> Optional[SideBySide]:
    """The windows of a convolution that oneDNN would compute wrongly, or None for all others."""
    axes = _wrong_axes(problem)
    return _side_by_side(problem, axes) if axes else None


def _weight_gradient_detour(problem: ConvProblem) -> Optional[SideBySide]:
    """The same for the gradient with respect to the weight, and for what is differentiated of that again."""
    p, axes = problem, _wrong_axes(problem)
    if p.device == "cpu" and p.dtype in _HALF_PRECISION:
        if p.dilation[0] > 1 and p.stride[0] == 1:
            axes |= {0}
        if _has_idle_tap(p.W, p.Q, p.S, p.stride[1], p.padding[1], p.dilation[1]):
            axes |= {1}
    return _side_by_side(problem, axes) if axes else None


def _wrong_axes(problem: ConvProblem) -> frozenset[int]:
    """The dimensions, 0 for rows and 1 for columns, in which oneDNN computes this problem wrongly."""
    p = problem
    if p.device != "cpu":
        return frozenset()
    if not p.reads_x:
        return frozenset((0, 1))
    passes_rows_by = p.R * p.S > 1 and p.stride[0] > p.R
    rows = passes_rows_by and p.dtype in _HALF_PRECISION and onednn_has_amx()
    # in bf16; from packed weights in fp32 too, with one channel
    columns = p.Q == 1 and p.stride[1] > 1 and p.S > 1
    return frozenset(axis for axis, is_wrong in enumerate((rows, columns)) if is_wrong)


def _has_idle_tap(size: int, outputs: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether some tap of the filter meets padding alone."""
    return any(
        not any(0 <= output * stride + tap * dilation - padding < size for output in range(outputs))
        for tap in range(taps)
    )


def _side_by_side(problem: ConvProblem, axes: frozenset[int]) -> SideBySide:
    p, laid = problem, []
    for axis in sorted(axes):
        size, outputs, taps = ((p.H, p.P, p.R), (p.W, p.Q, p.S))[axis]
        stride, padding, dilation = p.stride[axis], p.padding[axis], p.dilation[axis]
        positions = tuple(o * stride + t * dilation - padding for o in range(outputs) for t in range(taps))
        laid.append((2 + axis, size, positions))
        # of a single window any stride will do, and oneDNN gets 1 right
        window = {"stride": taps if outputs > 1 else 1, "padding": 0, "dilation": 1}
        changes: dict[str, Any] = {"HW"[axis]: len(positions)}
        for name, value in window.items():
            changes[name] = (value, getattr(p, name)[1]) if axis == 0 else (getattr(p, name)[0], value)
        p = p._replace(**changes)
    return SideBySide(tuple(laid), p)
