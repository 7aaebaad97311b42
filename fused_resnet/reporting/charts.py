"""Charts of benchmark records: speed-ups as bars, operators under the measured roofline. Needs matplotlib.

The same drawing goes into a PNG, in these colours, and into a page as SVG, where they become the page's own.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

from fused_resnet import measuring
from fused_resnet.measuring import Record

# CSS variable: the colour in a PNG. All different, so that an SVG's colours can be exchanged for the variables.
COLOURS = {
    "ink": "#1e293b",
    "faint": "#64748b",
    "rule": "#cbd5e1",
    "paper": "#ffffff",
    "ours": "#0f766e",
    "others": "#94a3b8",
    "loss": "#b91c1c",
}


class Bar(NamedTuple):
    """One bar: its speed-up, the text beside it, and the speed-ups that it is the geometric mean of, if any."""

    name: str
    speedup: float
    text: str
    ours: bool = False
    is_loss: bool = False
    parts: Sequence[float] = ()


class Point(NamedTuple):
    """An operator under the roofline: flops per byte of main memory, TFLOP/s, whether it is ours, what to say of it."""

    intensity: float
    tflops: float
    ours: bool
    hint: str


class Chart(NamedTuple):
    """A drawing for a figure of this size in inches. hints: what a page says of the marks with gid hint0, hint1 ..."""

    title: str
    width: float
    height: float
    draw: Callable[[Any], None]
    hints: Sequence[str] = ()


# ------------------------------------------------------------------------------------------------- records to charts


def charts_of(record: Record) -> list[Chart]:
    """The charts of a record of a benchmark, the demo or the degradation experiment; none of another kind."""
    if record.kind == "degradation":
        from fused_resnet.reporting import degradation  # which draws with what stands here

        return degradation.charts_of(record.rows)
    if record.kind == "bench ops":
        return [*_op_speedups(record.rows), *_rooflines(record.rows)]
    return [_network_chart(row) for row in record.rows if "variants" in row]


def run_title(run: dict[str, Any]) -> str:
    return run.get("problem") or f"batch {run['batch']}"


def _network_chart(run: dict[str, Any]) -> Chart:
    bars = []
    for name, one in run["variants"].items():
        rival, against = measuring.rival_of(name, run["variants"])
        is_loss = min(one["ratio"], against) < measuring.LOSS_BELOW
        text = f"{one['ratio']:.2f}x, {one['ms']:.3g} ms"
        if against < measuring.LOSS_BELOW:
            text += f", LOSS {against:.2f}x to {rival}"
        bars.append(Bar(name, one["ratio"], text, measuring.is_ours(name), is_loss))
    return bar_chart(run_title(run), bars, "speed-up over eager NCHW fp32")


def _op_speedups(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Per dtype: the geometric mean of each variant over eager unfused, every problem a dot."""
    charts = []
    for dtype, group in _convolutions(rows).items():
        group, bars = measuring.with_auto(group), []
        for entry in measuring.summarise(group, measuring.UNFUSED):
            name = entry["variant"]
            parts = [row["variants"][name]["speedup"] for row in group if name in row["variants"]]
            text = f"{entry['geomean_speedup']:.2f}x"
            is_loss = entry["geomean_speedup"] < measuring.LOSS_BELOW
            bars.append(Bar(name, entry["geomean_speedup"], text, name not in measuring.THEIRS, is_loss, parts))
        title = f"{dtype}: {len(group)} convolutions"
        charts.append(
            bar_chart(title, bars, f"speed-up over {measuring.UNFUSED}: geometric mean, and each convolution")
        )
    return charts


def _rooflines(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Per dtype: what `auto` chose for each convolution, and the fastest of the others."""
    charts = []
    for dtype, group in _convolutions(rows).items():
        points = []
        for row in group:
            chosen, variants = measuring.chosen_by_auto(row), row["variants"]
            others = {name: one["median_us"] for name, one in variants.items() if name != chosen}
            points += [_point(row, name, False) for name in sorted(others, key=others.__getitem__)[:1]]
            points += [_point(row, chosen, True)] if chosen in variants else []
        charts.append(roofline_chart(f"{dtype}: convolutions under the roofline", points, group[0]["roofline"]))
    return charts


def _convolutions(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of convolutions by dtype."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["op"] == "conv_bn_act":
            groups.setdefault(row["dtype"], []).append(row)
    return groups


def _point(row: dict[str, Any], name: str, is_auto: bool) -> Point:
    one = row["variants"][name]
    reached = f"{one['median_us']:.1f} us, {one['tflops']:.3g} TFLOP/s, {one['gb_per_s']:.4g} GB/s"
    hint = f"{row['problem']}\n{name}: {reached}"
    return Point(row["gflop"] / row["mbytes"] * 1e3, one["tflops"], is_auto, hint)


# ----------------------------------------------------------------------------------------------------------- drawing


def bar_chart(title: str, bars: Sequence[Bar], xlabel: str) -> Chart:
    """Horizontal bars and a line at 1; what ends left of it is a loss. Bars with parts start at 1, on a log scale."""
    is_log = any(bar.parts for bar in bars)

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        ends = [1.0, *(value for bar in bars for value in (bar.speedup, *bar.parts))]
        for position, bar in enumerate(bars):
            _draw_bar(axis, position, bar, 1.0 if is_log else 0.0)
        axis.axvline(1, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=3)
        if is_log:
            axis.set_xscale("log", base=2)
            axis.set_xlim(min(ends) / 1.15, max(ends) * 1.15)
            axis.xaxis.set_major_formatter("{x:g}x")
        else:
            axis.set_xlim(0, max(ends) * 1.02)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=9.5)
        finish(axis, title, xlabel, "")
        axis.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axis.spines["left"].set_visible(False)

    longest, widest = (max((len(getattr(bar, name)) for bar in bars), default=0) for name in ("name", "text"))
    return Chart(title, 3.4 + 0.075 * (longest + widest), 1.05 + 0.33 * len(bars), draw)


def _draw_bar(axis: Any, position: int, bar: Bar, start: float) -> None:
    colour = COLOURS["loss" if bar.speedup < measuring.LOSS_BELOW else "ours" if bar.ours else "others"]
    axis.barh(position, bar.speedup - start, left=start, height=0.66, color=colour, alpha=0.5 if bar.parts else 1.0)
    for part in bar.parts:
        dot = COLOURS["loss" if part < measuring.LOSS_BELOW else "ink"]
        axis.plot([part], [position], ".", markersize=4.5, color=dot, zorder=4)
    axis.annotate(
        bar.text, (1.0, position), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
        va="center", fontsize=9.5, color=COLOURS["loss" if bar.is_loss else "ink"],
        fontweight="bold" if bar.ours or bar.is_loss else "normal", annotation_clip=False,
    )  # fmt: skip


def roofline_chart(title: str, points: Sequence[Point], roof: dict[str, Any]) -> Chart:
    """Flops a second over flops per byte, log-log, below min(bandwidth * intensity, peak) as measured on this machine.

    In GFLOP/s where the peak is below one TFLOP/s.
    """
    unit, factor = ("TFLOP/s", 1.0) if roof["tflops"] >= 1 else ("GFLOP/s", 1e3)

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axis = figure.add_subplot()
        axis.set_xscale("log")
        axis.set_yscale("log")
        peak, bandwidth = roof["tflops"] * factor, roof["gb_per_s"] / 1e3 * factor
        knee = peak / bandwidth
        lowest = min(knee, *(point.intensity for point in points)) / 2
        highest = max(knee, *(point.intensity for point in points)) * 2
        axis.plot([lowest, knee, highest], [lowest * bandwidth, peak, peak], color=COLOURS["ink"], linewidth=1.4)
        label = f"copy {roof['gb_per_s']:.4g} GB/s, matmul {peak:.4g} {unit}"
        if roof.get("l2_gb_per_s"):
            l2 = roof["l2_gb_per_s"] / 1e3 * factor
            axis.plot([lowest, peak / l2], [lowest * l2, peak], color=COLOURS["faint"], linewidth=1, linestyle="--")
            label += f", L2 {roof['l2_gb_per_s']:.4g} GB/s (dashed)"
        axis.annotate(label, (0.015, 0.97), xycoords="axes fraction", va="top", fontsize=9, color=COLOURS["ink"])
        for index, point in enumerate(points):
            axis.plot(
                [point.intensity], [point.tflops * factor], "o" if point.ours else "D",
                markersize=6.5 if point.ours else 4.5, color=COLOURS["ours" if point.ours else "others"],
                markeredgecolor=COLOURS["paper"], markeredgewidth=0.6, zorder=3 + point.ours, gid=f"hint{index}",
            )  # fmt: skip
        for marker, colour, name in (("o", "ours", "chosen by auto"), ("D", "others", "fastest of the others")):
            axis.plot([], [], marker, color=COLOURS[colour], markersize=5, label=name)
        reached = [point.tflops * factor for point in points]
        axis.set_xlim(lowest, highest)
        axis.set_ylim(min(peak, *reached) / 2.5, max(peak, *reached) * 3)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_locator(NullLocator())
        axis.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=COLOURS["ink"])
        axis.grid(True, which="major", color=COLOURS["rule"], linewidth=0.5, zorder=0)
        finish(axis, title, "flops per byte of main memory", unit)

    return Chart(title, 6.6, 4.4, draw, [point.hint for point in points])


def finish(axis: Any, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=11, loc="left", color=COLOURS["ink"], fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=9, color=COLOURS["faint"])
    axis.set_ylabel(ylabel, fontsize=9, color=COLOURS["faint"])
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(COLOURS["rule"])
    axis.tick_params(colors=COLOURS["faint"], which="both", labelsize=9)


# ------------------------------------------------------------------------------------------------------------- files


def save_png(record: Record, path: Path, columns: int = 2) -> Path:
    """All charts of a record in one PNG. ValueError where the record has none."""
    from matplotlib.figure import Figure

    charts = charts_of(record)
    if not charts:
        raise ValueError(f"a record of kind {record.kind!r} has nothing to draw.")
    columns = min(columns, len(charts))
    rows = [charts[start : start + columns] for start in range(0, len(charts), columns)]
    heights = [max(chart.height for chart in row) for row in rows]
    width = max(chart.width for chart in charts) * columns
    figure = Figure(figsize=(width, sum(heights) + 0.35), layout="constrained", facecolor=COLOURS["paper"])
    parts = figure.subfigures(len(rows), columns, height_ratios=heights, squeeze=False)
    for row, row_parts in zip(rows, parts):
        for chart, part in zip(row, row_parts):
            chart.draw(part)
    environment = record.environment
    caption = f"{record.device}, torch {environment['torch']}, {environment['date'][:10]}"
    figure.suptitle(caption, fontsize=9, color=COLOURS["faint"], x=0.01, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def svg(chart: Chart, salt: str = "") -> str:
    """The chart as an <svg> element to stand in a page: text as text, and colours as the page's CSS variables.

    Identifiers are made from the chart's title and `salt`; charts in one page must differ in one of them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt + chart.title, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(chart.width, chart.height), layout="constrained")
        chart.draw(figure)
        figure.patch.set_visible(False)
        for axis in figure.axes:
            axis.patch.set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    for index, hint in enumerate(chart.hints):
        text = text.replace(f'<g id="hint{index}">', f"<g><title>{html.escape(hint)}</title>")
    # names such as axes_1, to which nothing refers, the next chart has too
    referred = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", text)
    return re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 inherit", text)
