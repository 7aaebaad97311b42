"""ATen's convolution and its gradients on a CPU, right where the libraries below are wrong.

oneDNN, which ATen calls, computes some windows wrongly, by up to 1e38 and otherwise each time. The same sums come out
right over an x whose windows lie side by side, or that has channels of zeros (`Detour`). The rules are for oneDNN 3.12,
whose sources explain them. Where all instruction sets have a fault, they ask for the shape alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.machine import onednn
from fused_resnet.operators.problem import ConvProblem

_HALF_PRECISION = (torch.bfloat16, torch.float16)


class Detour(NamedTuple):
    """The same convolution over another x and filter, as a problem of its own.

    laid: per dimension of x in which the windows lie side by side its number, its size, and positions: x'[i] =
    x[positions[i]], zero outside of x. position o * taps + t is o * stride + t * dilation - padding, so that x' is read
    with stride `taps`, without padding and dilation. spare_channels: so many of zeros follow each group's own.
    """

    laid: tuple[tuple[int, int, tuple[int, ...]], ...]
    spare_channels: int
    problem: ConvProblem

    def input(self, x: Tensor) -> Tensor:
        """x' of x. Differentiable."""
        read = functools.reduce(lambda value, axis: _gathered(value, *axis), self.laid, x)
        if not self.spare_channels:
            return read
        groups = read.unflatten(1, (self.problem.groups, -1))
        return F.pad(groups, (0, 0, 0, 0, 0, self.spare_channels)).flatten(1, 2)

    def filter(self, weight: Tensor) -> Tensor:
        """The filter that reads x'."""
        return F.pad(weight, (0, 0, 0, 0, 0, self.spare_channels)) if self.spare_channels else weight

    def gradients(self, x: Optional[Tensor], weight: Optional[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """The gradients of x and the weight from those of x' and its filter. Differentiable."""
        kept = self.problem.C // self.problem.groups - self.spare_channels
        if x is not None:
            if self.spare_channels:
                x = x.unflatten(1, (self.problem.groups, -1))[:, :, :kept].flatten(1, 2)
            x = functools.reduce(lambda value, axis: _scattered(value, *axis), reversed(self.laid), x)
        return x, weight if weight is None else weight[:, :kept]


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


def convolution(
    problem: ConvProblem, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, *, is_differentiated: bool = False
) -> Tensor:
    """F.conv2d of this problem's window. is_differentiated: ATen's own derivatives of the result must be right too."""
    detour, p = forward_detour(problem), problem
    if is_differentiated:
        detour = _detour(p, _wrong_axes(p) | _axes_of_wrong_weight_gradients(p))
    if detour is not None:
        p, x, weight = detour.problem, detour.input(x), detour.filter(weight)
    return F.conv2d(x, weight, bias, p.stride, p.padding, p.dilation, p.groups)


def convolution_backward(
    problem: ConvProblem, grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The gradients of F.conv2d with respect to x and the weight, None where not needed. Differentiable."""

    def gradients(detour: Optional[Detour], *mask: bool) -> tuple[Optional[Tensor], Optional[Tensor]]:
        p, read, filter = problem, x, weight
        if detour is not None:
            p, read, filter = detour.problem, detour.input(x), detour.filter(weight)
        grad_read, grad_filter, _ = torch.ops.aten.convolution_backward(
            grad, read, filter, None, p.stride, p.padding, p.dilation, False, [0, 0], p.groups, [*mask, False]
        )
        return (grad_read, grad_filter) if detour is None else detour.gradients(grad_read, grad_filter)

    # what is differentiated once more is a forward convolution
    again = _wrong_axes(problem) if torch.is_grad_enabled() else frozenset()
    for_x, for_weight = _detour(problem, again), _detour(problem, again | _axes_of_wrong_weight_gradients(problem))
    if for_x == for_weight or not needs_weight:
        return gradients(for_x, needs_x, needs_weight)
    grad_x = gradients(for_x, True, False)[0] if needs_x else None
    return grad_x, gradients(for_weight, False, True)[1]


# ---------------------------------------------------------------------------------------------------------- the rules


def forward_detour(problem: ConvProblem) -> Optional[Detour]:
    """How to compute a convolution that oneDNN would compute wrongly, or None for all others."""
    p, axes = problem, _wrong_axes(problem)
    if not axes and p.dilation == (1, 1) and not _spare_channels(p):
        return None  # quickly, since this is asked at every call
    return _detour(p, axes)


def _wrong_axes(problem: ConvProblem) -> frozenset[int]:
    """The dimensions, 0 for rows and 1 for columns, whose windows must lie side by side.

    One column: the rows of x that oneDNN copies are not as far apart as it reads them (pytorch issue 169688). That is
    in bf16, and from packed weights of one channel in fp32. Rows that the stride passes by: on AMX their buffer is too
    small, and what lies behind is overwritten (oneDNN PR 5494). Windows that lie in the padding whole end the process
    (oneDNN issue 5942).
    """
    p = problem
    if p.device != "cpu" or p.stride == (1, 1) and p.reads_x:
        return frozenset()
    if not p.reads_x:
        return frozenset((0, 1))
    is_sampling = p.R == p.S == 1 and p.padding == (0, 0)  # as a projection shortcut does
    rows = p.stride[0] > p.R and not is_sampling and p.dtype in _HALF_PRECISION and onednn.has_amx()
    columns = p.Q == 1 and p.stride[1] > 1 and p.S > 1
    return frozenset(axis for axis, is_wrong in enumerate((rows, columns)) if is_wrong)


def _axes_of_wrong_weight_gradients(problem: ConvProblem) -> frozenset[int]:
    """The same for the gradient with respect to the weight, in bf16.

    Rows: where they are dilated; seen from 28 columns on, asked for at any width. Columns: where one of the filter's
    meets padding alone.
    """
    p = problem
    if p.device != "cpu" or p.dtype not in _HALF_PRECISION:
        return frozenset()
    rows = p.R > 1 and p.dilation[0] > 1 and p.stride[0] == 1
    columns = _has_idle_tap(p.W, p.Q, p.S, p.stride[1], p.padding[1], p.dilation[1])
    return frozenset(axis for axis, is_wrong in enumerate((rows, columns)) if is_wrong)


def _spare_channels(problem: ConvProblem) -> int:
    """How many channels to add on AMX where oneDNN counts columns of the filter as channels.

    Its packed filter has the channels of each column filled up to 32, which it then does not reckon with.
    """
    p, channels = problem, problem.C // problem.groups
    if p.dtype not in _HALF_PRECISION or channels >= 32 or p.device != "cpu":
        return 0
    if p.dilation[1] != 1 or not onednn.has_amx():
        return 0
    # a filter of one column: its rows
    whole = channels < 16 and _fills_blocks(channels, p.S if p.S > 1 else p.R)
    is_tiled = p.groups == 1 and p.stride[1] > 1 and p.padding[1] == 0
    parts = (part for part in range(2, p.S + 1) if not (p.W % part or p.S % part or p.stride[1] % part))
    return 32 - channels if whole or is_tiled and any(_fills_blocks(channels, part) for part in parts) else 0


def _fills_blocks(channels: int, columns: int) -> bool:
    return channels < 32 and channels % 2 == 0 and channels * columns > 32 and channels * columns % 32 == 0


def may_be_wrong(dtype: torch.dtype, weight: tuple, out: tuple, stride: tuple, dilation: tuple) -> bool:
    """Whether torch's own convolution in this dtype on a CPU, of one, two or three dimensions, may be one of those.

    weight, out: shapes. For convolutions that take no detour, so the rule is a wide one.
    """
    channels, taps = weight[1], weight[2:]
    if dtype not in _HALF_PRECISION:
        return False
    if out[-1] == 1 and stride[-1] > 1 and taps[-1] > 1 or any(t == 1 < d for t, d in zip(taps, dilation)):
        return True
    passes_by = any(step > tap for step, tap in zip(stride[:-1], taps[:-1])) and max(taps) > 1
    return onednn.has_amx() and (passes_by or any(_fills_blocks(channels, tap) for tap in taps))


def _undilated(problem: ConvProblem) -> ConvProblem:
    p = problem
    if p.dilation == (1, 1) or p.device != "cpu":
        return p
    dilation = (p.dilation[0] if p.R > 1 else 1, p.dilation[1] if p.S > 1 else 1)
    return p if dilation == p.dilation else p._replace(dilation=dilation)


def _has_idle_tap(size: int, outputs: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether some tap of the filter meets padding alone."""
    return any(
        not any(0 <= output * stride + tap * dilation - padding < size for output in range(outputs))
        for tap in range(taps)
    )


def _detour(problem: ConvProblem, axes: frozenset[int]) -> Optional[Detour]:
    """With the windows side by side in these dimensions, and spare channels where those are needed then.

    A tap that is alone is never dilated: what that changes is nothing but oneDNN's choice, which may end the process.
    """
    p, laid = _undilated(problem), []
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
    spare = _spare_channels(p)
    if not (laid or spare or p is not problem):
        return None
    return Detour(tuple(laid), spare, p._replace(C=p.C + spare * p.groups))


# ---------------------------------------------------------------------------------------------------------- for people


class Fault(NamedTuple):
    """A known fault of a library below, for `fused-resnet info`.

    what: wrong results, of which problems; source: where it is reported, or found. instead: what is done here.
    needs_amx: whether it needs AMX. needs_bf16: whether it needs bf16 convolutions of oneDNN's. example: (operation, x,
    weight, stride, padding, dilation) that shows it, or None where trying would end the process.
    """

    what: str
    source: str
    instead: str
    needs_amx: bool = False
    needs_bf16: bool = True
    example: Optional[tuple] = None


_LAID = "the windows are laid side by side"
FAULTS = (
    Fault("bf16 convolutions to one column with a stride across it are wrong", "pytorch issue 169688", _LAID,
          example=("forward", (2, 16, 18, 4), (32, 16, 3, 4), (1, 4), (2, 0), (1, 1))),
    Fault("bf16 convolutions whose stride is higher than the filter are wrong, and write past their memory",
          "oneDNN PR 5494", _LAID, needs_amx=True),
    Fault("bf16 convolutions of fewer than 32 channels are wrong where columns of the filter times channels fill "
          "blocks of 32", "found by random problems", "channels of zeros are added", needs_amx=True,
          example=("forward", (2, 8, 9, 27), (16, 8, 3, 8), (1, 2), (1, 2), (1, 1))),
    Fault("gradients of bf16 weights are wrong where rows are dilated", "found by random problems", _LAID,
          example=("weight gradient", (2, 24, 19, 32), (32, 24, 3, 3), (1, 1), (2, 1), (2, 1))),
    Fault("gradients of bf16 weights are wrong in columns that meet padding alone", "found by random problems", _LAID,
          example=("weight gradient", (2, 24, 12, 2), (16, 24, 3, 4), (1, 3), (1, 3), (1, 1))),
    Fault("a convolution of padding alone ends the process", "oneDNN issue 5942", _LAID, needs_bf16=False),
    Fault("int8 convolutions of signed bytes with padding are wrong in groups other than depthwise ones",
          "found by random problems", "oneDNN does not compute them", needs_bf16=False),
    Fault("bf16 depthwise convolutions read one pixel too many, times zero", "found by random problems",
          "nothing: NaN and infinities may reach one pixel further"),
)  # fmt: skip


def known_faults() -> list[dict[str, Any]]:
    """One row for each of FAULTS.

    Its text, whether it applies to this processor, and whether its example shows it here (None: not tried).
    """
    found = []
    for fault in FAULTS:
        applies = (
            torch.backends.mkldnn.is_available()
            and (onednn.has_amx() or not fault.needs_amx)
            and (onednn.has_bf16() or not fault.needs_bf16)
        )
        seen = _is_seen(*fault.example) if applies and fault.example is not None else None
        texts = {"what": fault.what, "source": fault.source, "instead": fault.instead}
        found.append({"library": onednn.version(), **texts, "applies": applies, "seen": seen})
    return found


def _is_seen(operation: str, x_shape: tuple, weight_shape: tuple, stride, padding, dilation) -> bool:
    """Whether torch's own operation in bf16 is far from the same in fp32."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=random).bfloat16() for shape in (x_shape, weight_shape))
    x = x.contiguous(memory_format=torch.channels_last)

    def result(dtype: torch.dtype) -> Tensor:
        out = F.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding, dilation)
        if operation == "forward":
            return out.float()
        operands = (torch.ones_like(out), x.to(dtype), weight.to(dtype), None)
        rest = (False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(*operands, stride, padding, dilation, *rest)[1].float()

    with torch.no_grad():
        right = result(torch.float32)
        return not bool(((result(torch.bfloat16) - right).abs() <= 0.1 * (right.abs() + right.abs().mean())).all())
