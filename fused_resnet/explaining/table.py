"""An explanation as values, as plain dictionaries, and as the text that `print` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch

from fused_resnet import backends
from fused_resnet.choosing.winners import Measurement
from fused_resnet.fusing import convert
from fused_resnet.measuring import rooflines
from fused_resnet.operators.problem import FLOAT8, ConvProblem, dtype_name
from fused_resnet.quantizing.scales import Effect

_COLUMNS = (
    "convolution", "problem", "backend", "MB unfused", "MB moved", "MB least", "GFLOP", "least us", "share", "time us",
    "measured us", "against",
)  # fmt: skip


class Row(NamedTuple):
    """One convolution, as often as the model calls it.

    name: the module whose weight it reads. problem: what is asked for; of a plain convolution the convolution alone.
    backend: who computes it, None where torch's own module does. source: why that one; without a backend, why none.
    config: the kernel's tile, where the backend has several. why_not: a sentence for each other backend.
    bytes_moved: what this way of computing moves when no cache helps. Torch's own is a pass over memory for each of
    convolution, BN, addition and activation, a kernel one for all; problem.bytes_moved is the least.
    least_us: the roofline's time for that least. time_us: measured, median of a few runs of the model, if asked for.
    measured: what was measured for this problem when the choice was made, against what, and what was wrong.
    region: the name of the call that it is part of (`RegionRow`), if there is one. Its bytes and its roofline are those
    of the convolution by itself.
    scales: in int8 and e4m3, how x, the residual and the result are kept. not_int8: why not, in a model frozen so.
    effect: what int8 does to it by itself, as the scales say.
    """

    name: str
    problem: ConvProblem
    backend: Optional[str]
    source: str
    config: Optional[dict[str, Any]]
    why_not: dict[str, str]
    least_us: float
    time_us: Optional[float]
    measured: Optional[Measurement] = None
    region: Optional[str] = None
    scales: Optional[dict[str, str]] = None
    not_int8: Optional[str] = None
    effect: Optional[Effect] = None

    @property
    def bytes_moved(self) -> int:
        backend = None if self.backend is None else backends.known("conv_bn_act")[self.backend]
        if backend is None or backend.origin == "torch":
            return self.problem.bytes_unfused
        return self.problem.bytes_of_two_passes if backend.after_aten else self.problem.bytes_moved


class RegionRow(NamedTuple):
    """Convolutions of a frozen plan that run as one call. Each is a row, too, with a share of time_us by arithmetic.

    by_winograd: how many are computed by Winograd. kernel: the micro-kernel of the others. source: why they run
    together, and against what that was measured. bytes_converted: of inputs and outputs, from NHWC to blocks and back.
    bytes_workspace: for the maps between them. bytes_moved: inputs, weights and outputs once; least_us: the roofline's
    time for that and for flops. time_us: as a row's. bytes_gated: what its gates read and write of maps.
    """

    name: str
    convolutions: int
    by_winograd: int
    kernel: str
    source: str
    bytes_converted: int
    bytes_workspace: int
    bytes_moved: int
    flops: int
    least_us: float
    time_us: Optional[float]
    gates: int = 0
    bytes_gated: int = 0

    @property
    def calls(self) -> str:
        """On a GPU each is a kernel, and no maps are the region's own."""
        return "as one call" if self.bytes_workspace else "as a kernel each"

    def __str__(self) -> str:
        winograd = f", {self.by_winograd} of them by Winograd" if self.by_winograd else ""
        gates = f", {self.gates} gates over {self.bytes_gated / 1e6:.2f} MB of maps" if self.gates else ""
        reached = "" if self.time_us is None else f", {100 * self.least_us / self.time_us:.0f} % of the roofline"
        return (
            f"{self.name}: {self.convolutions} convolutions {self.calls} by {self.kernel}{winograd}{gates}: "
            f"{self.source}; "
            f"{self.bytes_converted / 1e6:.2f} MB converted at its seams, {self.bytes_workspace / 1e6:.2f} MB of "
            f"workspace{reached}"
        )


class Explanation(NamedTuple):
    """What `explain` returns: print it, or `as_dict()` for JSON.

    form: "plain", "fused" or "frozen". rows: in the order of the calls. left_alone: modules that look like residual
    blocks, or parts of a plain model, and why they are not fused. rooflines: measured here, by dtype. regions: of
    a frozen model, the convolutions that run as one call.
    """

    model: str
    form: str
    example: str
    rows: tuple[Row, ...]
    left_alone: tuple[convert.LeftAlone, ...]
    rooflines: dict[torch.dtype, rooflines.Roofline]
    regions: tuple[RegionRow, ...] = ()

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the rows. bytes_unfused: with a pass over memory for each step of each row. What a region moves,
        and its roofline, count in place of those of its rows."""
        times = [row.time_us for row in self.rows]
        apart = [row for row in self.rows if row.region is None]
        within = sum(region.bytes_moved for region in self.regions)
        least_us = sum(row.least_us for row in apart) + sum(region.least_us for region in self.regions)
        return {
            "flops": sum(row.problem.flops for row in self.rows),
            "bytes_unfused": sum(row.problem.bytes_unfused for row in self.rows),
            "bytes_moved": sum(row.bytes_moved for row in apart) + within,
            "bytes_least": sum(row.problem.bytes_moved for row in apart) + within,
            "least_us": least_us,
            "time_us": None if None in times else sum(time for time in times if time is not None),
        }

    @property
    def rows_least_us(self) -> float:
        """The roofline's time for all rows, each by itself."""
        return sum(row.least_us for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for json.dumps. share: of the roofline's time for all rows; a
        region's, of that for all calls."""
        totals = self.totals
        return {
            "model": self.model,
            "form": self.form,
            "example": self.example,
            "rooflines": {
                dtype_name(dtype): {"gb_per_s": roof.bytes_per_s / 1e9, "tflops": roof.flops_per_s / 1e12}
                for dtype, roof in self.rooflines.items()
            },
            "rows": [_row_as_dict(row, self.rows_least_us) for row in self.rows],
            "totals": totals,
            "left_alone": [entry._asdict() for entry in self.left_alone],
            "regions": [{**one._asdict(), "share": one.least_us / totals["least_us"]} for one in self.regions],
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _row_as_dict(row: Row, total_us: float) -> dict[str, Any]:
    return {
        "name": row.name,
        "problem": str(row.problem),
        "backend": row.backend,
        "source": row.source,
        "config": row.config,
        "why_not": row.why_not,
        "flops": row.problem.flops,
        "bytes_unfused": row.problem.bytes_unfused,
        "bytes_moved": row.bytes_moved,
        "bytes_least": row.problem.bytes_moved,
        "least_us": row.least_us,
        "share": row.least_us / total_us,
        "time_us": row.time_us,
        "measured": row.measured and row.measured._asdict(),
        "region": row.region,
        "scales": row.scales,
        "not_int8": row.not_int8,
        "effect": row.effect and row.effect._asdict(),
    }


def _lines(explanation: Explanation) -> list[str]:
    e, totals = explanation, explanation.totals
    form = "plain, shown as fused_resnet.fuse would make it" if e.form == "plain" else e.form
    lines = [f"{e.model}, {form}; input {e.example}; {len(e.rows)} convolutions"]
    for dtype, roof in e.rooflines.items():
        ceiling = f"{roof.bytes_per_s / 1e9:.3g} GB/s copy, {roof.flops_per_s / 1e12:.3g} TFLOP/s matmul"
        lines.append(f"roofline of this device in {dtype_name(dtype)}: {ceiling}")
    cells: list[tuple[str, ...]] = [_COLUMNS]
    cells += [_cells(row, e.rows_least_us) for row in e.rows]
    cells += [_cells_of_region(region, e) for region in e.regions]
    mb = (f"{totals[name] / 1e6:.1f}" for name in ("bytes_unfused", "bytes_moved", "bytes_least"))
    time_us = "-" if totals["time_us"] is None else f"{totals['time_us']:.0f}"
    cells.append(
        ("all", "", "", *mb, f"{totals['flops'] / 1e9:.2f}", f"{totals['least_us']:.0f}", "100 %", time_us, "", "")
    )
    lines += ["", *_aligned(cells, left=3), ""]
    lines += [f"{backend or 'none'}: {n} of {len(e.rows)}: {source}"
              for (backend, source), n in Counter((row.backend, row.source) for row in e.rows).items()]  # fmt: skip
    lines += map(str, e.regions)
    lines += [f"{_quantized_name(row)}: {row.name}: {_kept(row.scales, row.effect)}" for row in e.rows if row.scales]
    wanted = next((_quantized_name(row) for row in e.rows if row.scales), "int8")
    lines += [f"not {wanted}: {names}: {why}" for names, why in _by_reason((row.name, row.not_int8) for row in e.rows)]
    reasons = Counter(reason for row in e.rows for reason in row.why_not.items())
    lines += [f"not {backend}: {n} of {len(e.rows)}: {why}" for (backend, why), n in reasons.items()]
    lines += dict.fromkeys(
        f"wrong here, and never chosen: {name} on {row.problem}: {why}"
        for row in e.rows
        if row.measured
        for name, why in row.measured.wrong.items()
    )
    return lines + [f"left alone: {names}: {why}" for names, why in _by_reason(e.left_alone)]


def _quantized_name(row: Row) -> str:
    return "e4m3" if row.problem.dtype == FLOAT8 else "int8"


def _kept(scales: dict[str, str], effect: Optional[Effect]) -> str:
    parts = [f"{name} {how}" for name, how in scales.items()]
    if effect is not None:
        parts += [] if effect.sqnr_db is None else [f"SQNR by itself {effect.sqnr_db:.1f} dB"]
        parts.append(f"{100 * effect.clipped:.2f} % clipped")
    return ", ".join(parts)


def _by_reason(entries: Iterable[tuple[str, Optional[str]]]) -> list[tuple[str, str]]:
    """(names, reason), a pair for each reason."""
    found: dict[str, list[str]] = {}
    for name, reason in entries:
        if reason is not None:
            found.setdefault(reason, []).append(name)
    return [(_few(names), reason) for reason, names in found.items()]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _cells(row: Row, total_us: float) -> tuple[str, ...]:
    mb = (f"{n / 1e6:.2f}" for n in (row.problem.bytes_unfused, row.bytes_moved, row.problem.bytes_moved))
    gflop, share = f"{row.problem.flops / 1e9:.3f}", f"{100 * row.least_us / total_us:.1f} %"
    time_us = "-" if row.time_us is None else f"{row.time_us:.0f}"
    measured = _measured(row)
    return (
        row.name, str(row.problem), row.backend or "none", *mb, gflop, f"{row.least_us:.0f}", share, time_us, *measured,
    )  # fmt: skip


def _cells_of_region(region: RegionRow, explanation: Explanation) -> tuple[str, ...]:
    """As a convolution's, beside those of its own convolutions."""
    r, unfused = region, sum(row.problem.bytes_unfused for row in explanation.rows if row.region == region.name)
    mb = (f"{n / 1e6:.2f}" for n in (unfused, r.bytes_moved, r.bytes_moved))
    share = f"{100 * r.least_us / explanation.totals['least_us']:.1f} %"
    time_us = "-" if r.time_us is None else f"{r.time_us:.0f}"
    return (
        r.name, f"{r.convolutions} convolutions {r.calls}", r.kernel, *mb, f"{r.flops / 1e9:.3f}",
        f"{r.least_us:.0f}", share, time_us, "-", "-",
    )  # fmt: skip


def _measured(row: Row) -> tuple[str, str]:
    """What the choice was measured to take, and the fastest of the others."""
    times = {} if row.measured is None else dict(row.measured.times_us)
    own = times.pop(row.backend or "", None)
    other = min(times, key=times.__getitem__, default=None)
    return "-" if own is None else f"{own:.0f}", "-" if other is None else f"{other} {times[other]:.0f}"


def _aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Columns of text; the first `left` of them aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
