"""explain: who runs each convolution of a model, why nobody else, and how far its memory traffic is from the least.

A plain or fused model is run on fake tensors, which have shapes and no values, and the calls that pass by are noted.
A frozen one shows its plan.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.backends import choice
from fused_resnet.explaining import calls
from fused_resnet.freezing.freeze import FrozenModel, FrozenParts
from fused_resnet.fusing import convert
from fused_resnet.measuring import timing
from fused_resnet.operators.problem import ConvProblem, dtype_name

_COLUMNS = (
    "convolution", "problem", "backend", "MB unfused", "MB moved", "MB least", "GFLOP", "least us", "share", "time us"
)  # fmt: skip


class Row(NamedTuple):
    """One convolution, as often as the model calls it.

    name: the module whose weight it reads. problem: what is asked for; of a plain convolution the convolution alone.
    backend: who computes it, None where torch's own module does. source: why that one; without a backend, why none.
    config: the kernel's tile, where the backend has several. why_not: a sentence for each other backend.
    bytes_moved: what this way of computing moves when no cache helps. Eager makes one pass over memory for each of
    convolution, BN, addition and activation, a kernel one for all; problem.bytes_moved is the least.
    least_us: the roofline's time for that least. time_us: measured, median of a few runs of the model, if asked for.
    """

    name: str
    problem: ConvProblem
    backend: Optional[str]
    source: str
    config: Optional[dict[str, Any]]
    why_not: dict[str, str]
    least_us: float
    time_us: Optional[float]

    @property
    def bytes_moved(self) -> int:
        one_pass = self.backend not in (None, "eager")
        return self.problem.bytes_moved if one_pass else bytes_unfused(self.problem)


class Explanation(NamedTuple):
    """What `explain` returns: print it, or `as_dict()` for JSON.

    form: "plain", "fused" or "frozen". rows: in the order of the calls. left_alone: modules that look like residual
    blocks, or parts of a plain model, and why they are not fused. rooflines: measured here, by dtype.
    """

    model: str
    form: str
    example: str
    rows: tuple[Row, ...]
    left_alone: tuple[convert.LeftAlone, ...]
    rooflines: dict[torch.dtype, timing.Roofline]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the rows. bytes_unfused: with a pass over memory for each step of each row."""
        times = [row.time_us for row in self.rows]
        return {
            "flops": sum(row.problem.flops for row in self.rows),
            "bytes_unfused": sum(bytes_unfused(row.problem) for row in self.rows),
            "bytes_moved": sum(row.bytes_moved for row in self.rows),
            "bytes_least": sum(row.problem.bytes_moved for row in self.rows),
            "least_us": sum(row.least_us for row in self.rows),
            "time_us": None if None in times else sum(time for time in times if time is not None),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for json.dumps. share: of the roofline's time for all rows."""
        totals = self.totals
        return {
            "model": self.model,
            "form": self.form,
            "example": self.example,
            "rooflines": {
                dtype_name(dtype): {"gb_per_s": roof.bytes_per_s / 1e9, "tflops": roof.flops_per_s / 1e12}
                for dtype, roof in self.rooflines.items()
            },
            "rows": [_row_as_dict(row, totals["least_us"]) for row in self.rows],
            "totals": totals,
            "left_alone": [entry._asdict() for entry in self.left_alone],
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def bytes_unfused(problem: ConvProblem) -> int:
    """The bytes of conv, BN, addition and activation as a pass over memory each, which reads and writes its tensors."""
    extra_passes = problem.has_bn + problem.has_residual + (problem.activation != "none")
    return problem.bytes_moved + 2 * extra_passes * math.prod(problem.output_shape) * problem.dtype.itemsize


def explain(
    model: nn.Module, example_input: Any, *, measure: bool = False, roofline: Optional[timing.Roofline] = None
) -> Explanation:
    """A row for every convolution that `model(example_input)` calls. The model is not changed.

    model: plain, which shows what `fused_resnet.fuse` would make of it; fused, as it is; or frozen, as planned for
    this input. In training mode too. example_input: what the model takes, as a rule a tensor; only its shape, dtype
    and device matter. Where fake tensors cannot follow the model (its control flow reads values), it is run once.

    measure: also time every convolution, over a few runs of the model; wall time, on CUDA with the launch.
    roofline: what the device reaches; default, measured now (`timing.roofline`, some seconds, once per dtype).

    Raises TypeError for what is no model or lies on another device, ValueError when the model cannot take the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: expected an nn.Module, got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    device = _device_of(model, example_input)
    if isinstance(model, (FrozenModel, FrozenParts)):
        form, name = "frozen", type(model.unfreeze()).__name__
        found, left_alone = calls.planned(model, example_input, measure)
    else:
        form = "fused" if convert.fused_convs(model) else "plain"
        name = getattr(model, "plain_class", type(model)).__name__
        model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        if form == "plain":
            convert.fuse(model)
        left_alone = convert.left_alone(model)
        found = calls.recorded(model, example_input, left_alone, device, measure)
    dtypes = dict.fromkeys(call.problem.dtype for call in found)
    rooflines = {dtype: roofline or _roofline(str(device), dtype) for dtype in dtypes}
    rows = tuple(_judged(call, rooflines[call.problem.dtype]) for call in found)
    return Explanation(name, form, calls.shown(example_input), rows, tuple(left_alone), rooflines)


def _device_of(model: nn.Module, example: Any) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(f"explain: example_input must hold a tensor, got {type(example).__name__}.")
    device = next((p.device for p in model.parameters()), getattr(model, "device", tensors[0].device))
    for tensor in tensors:
        if tensor.device != device:
            raise TypeError(f"explain: example_input is on {tensor.device} but the model is on {device}.")
    return device


@functools.lru_cache(maxsize=None)
def _roofline(device: str, dtype: torch.dtype) -> timing.Roofline:
    return timing.roofline(device, dtype)


# ----------------------------------------------------------------------------------------------------------- judging


def _judged(call: calls.Call, roofline: timing.Roofline) -> Row:
    problem, selection, source = call.problem, call.selection, call.source
    if selection is None and call.backend is not None:
        try:
            selection = backends.select(problem, call.backend)
        except backends.BackendError:
            reason = backends.known(problem.op)[call.backend].why_not(problem)
            source = f"{call.backend} was asked for by name and cannot run this: {reason}"
    chosen = None if selection is None else selection.backend.name
    others = {
        other.name: other.why_not(problem) or _why_not_chosen(problem, other, selection, call.backend)
        for other in backends.known(problem.op).values()
        if other.name != chosen
    }
    config = getattr(selection, "config", None)
    return Row(
        call.name, problem, chosen, source if selection is None else selection.source,
        None if config is None else config._asdict(), others, roofline.time_us(problem), call.time_us,
    )  # fmt: skip


def _why_not_chosen(
    problem: ConvProblem, other: backends.Backend, selection: Optional[backends.Selection], asked: Optional[str]
) -> str:
    """Why a backend that could run this does not."""
    if selection is None:
        cause = "the convolution is not fused" if asked is None else f"{asked} was asked for by name"
        return f"it could run this, but {cause}"
    if asked == "auto" and selection.source.startswith(choice.FIXED_ORDER) and problem.device not in other.auto:
        return f"it could run this, but on {problem.device} auto takes it only where it was measured to be faster"
    return f"it could run this, but {selection.backend.name} was chosen: {selection.source}"


# ----------------------------------------------------------------------------------------------------------- showing


def _row_as_dict(row: Row, total_us: float) -> dict[str, Any]:
    return {
        "name": row.name,
        "problem": str(row.problem),
        "backend": row.backend,
        "source": row.source,
        "config": row.config,
        "why_not": row.why_not,
        "flops": row.problem.flops,
        "bytes_unfused": bytes_unfused(row.problem),
        "bytes_moved": row.bytes_moved,
        "bytes_least": row.problem.bytes_moved,
        "least_us": row.least_us,
        "share": row.least_us / total_us,
        "time_us": row.time_us,
    }


def _lines(explanation: Explanation) -> list[str]:
    e, totals = explanation, explanation.totals
    form = "plain, shown as fused_resnet.fuse would make it" if e.form == "plain" else e.form
    lines = [f"{e.model}, {form}; input {e.example}; {len(e.rows)} convolutions"]
    for dtype, roof in e.rooflines.items():
        ceiling = f"{roof.bytes_per_s / 1e9:.3g} GB/s copy, {roof.flops_per_s / 1e12:.3g} TFLOP/s matmul"
        lines.append(f"roofline of this device in {dtype_name(dtype)}: {ceiling}")
    cells: list[tuple[str, ...]] = [_COLUMNS]
    cells += [_cells(row, totals["least_us"]) for row in e.rows]
    mb = (f"{totals[name] / 1e6:.1f}" for name in ("bytes_unfused", "bytes_moved", "bytes_least"))
    time_us = "-" if totals["time_us"] is None else f"{totals['time_us']:.0f}"
    cells.append(("all", "", "", *mb, f"{totals['flops'] / 1e9:.2f}", f"{totals['least_us']:.0f}", "100 %", time_us))
    lines += ["", *_aligned(cells, left=3), ""]
    lines += [f"{backend or 'none'}: {n} of {len(e.rows)}: {source}"
              for (backend, source), n in Counter((row.backend, row.source) for row in e.rows).items()]  # fmt: skip
    reasons = Counter(reason for row in e.rows for reason in row.why_not.items())
    lines += [f"not {backend}: {n} of {len(e.rows)}: {why}" for (backend, why), n in reasons.items()]
    left_alone: dict[str, list[str]] = {}
    for name, reason in e.left_alone:
        left_alone.setdefault(reason, []).append(name)
    return lines + [f"left alone: {_few(names)}: {reason}" for reason, names in left_alone.items()]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _cells(row: Row, total_us: float) -> tuple[str, ...]:
    mb = (f"{n / 1e6:.2f}" for n in (bytes_unfused(row.problem), row.bytes_moved, row.problem.bytes_moved))
    gflop, share = f"{row.problem.flops / 1e9:.3f}", f"{100 * row.least_us / total_us:.1f} %"
    time_us = "-" if row.time_us is None else f"{row.time_us:.0f}"
    return (row.name, str(row.problem), row.backend or "none", *mb, gflop, f"{row.least_us:.0f}", share, time_us)


def _aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Columns of text; the first `left` of them aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
