"""The figure of the degradation experiment: curves by depth as in He et al. 2015, figure 6, and gradients by layer."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from fused_resnet.reporting.charts import COLOURS, Chart, finish

# the paper's, by depth
_DEPTHS = {20: "#d97706", 32: "#0891b2", 44: "#16a34a", 56: "#b91c1c", 110: "#1e293b"}
# He et al. 2015, table 6: test errors of ResNets on CIFAR-10 after 64,000 steps, in percent
PAPER = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}

Rows = Sequence[dict[str, Any]]


def charts_of(rows: Rows) -> list[Chart]:
    """Curves of plain networks, those of ResNets, errors by depth beside the paper's, and gradients by layer."""
    kinds = {"plain networks": False, "ResNets": True}
    parts = {name: [row for row in rows if row["has_shortcuts"] is wanted] for name, wanted in kinds.items()}
    highest = 100 * max(point["error"] for row in rows for point in row["points"])
    lowest = 100 * min(point["error"] for row in rows for point in [*row["points"], *row["tests"]])
    limits = max(0.0, lowest - 5), min(100.0, highest + 2)
    found = [_curves(name, part, limits) for name, part in parts.items() if part]
    found.append(_by_depth(parts))
    if all("gradients" in point for row in rows for point in row["points"]):
        found.append(_gradients(rows))
    return found


def _curves(name: str, rows: Rows, limits: tuple[float, float]) -> Chart:
    """Each run a thin line, training error; tests dashed where there are several."""

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        for row in rows:
            colour = _DEPTHS.get(row["depth"], COLOURS["faint"])
            steps, errors = zip(*((point["step"], 100 * point["error"]) for point in row["points"]))
            label = f"{row['depth']} layers" if row["seed"] == rows[0]["seed"] else None
            axis.plot(steps, errors, color=colour, linewidth=1.2, label=label)
            if row["tests"]:
                steps, errors = zip(*((test["step"], 100 * test["error"]) for test in row["tests"]))
                axis.plot(steps, errors, color=colour, linewidth=1.6, linestyle=(0, (3, 1.5)), marker=".")
        axis.set_ylim(*limits)
        axis.grid(True, axis="y", color=COLOURS["rule"], linewidth=0.5)
        axis.legend(frameon=False, fontsize=9, loc="lower left", labelcolor=COLOURS["ink"])
        what = "training" + (", dashed: test" if any(row["tests"] for row in rows) else "")
        seeds = len({row["seed"] for row in rows})
        finish(axis, name, "step" + (f"; {seeds} seeds, a line each" if seeds > 1 else ""), f"error, % ({what})")

    return Chart(name, 5.6, 3.9, draw)


def _by_depth(parts: Mapping[str, Rows]) -> Chart:
    """The end of each run over its depth, and the paper's ResNets, whose training was some 160 times as long."""

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        for (name, rows), marker, colour in zip(parts.items(), "so", ("loss", "ours")):
            depths = [row["depth"] for row in rows]
            axis.plot(depths, [100 * row["train_error"] for row in rows], marker, color=COLOURS[colour],
                      markersize=6, label=f"{name}, training", alpha=0.8)  # fmt: skip
            tested = [row for row in rows if row["test_error"] is not None]
            if tested:
                axis.plot([row["depth"] for row in tested], [100 * row["test_error"] for row in tested], marker,
                          color=COLOURS[colour], markersize=6, fillstyle="none", label=f"{name}, test")  # fmt: skip
        axis.plot(list(PAPER), list(PAPER.values()), "D-", color=COLOURS["others"], markersize=4.5, linewidth=1,
                  label="He et al. 2015, table 6: ResNets, test")  # fmt: skip
        axis.set_ylim(0, None)
        axis.set_xticks(list(PAPER))
        axis.grid(True, axis="y", color=COLOURS["rule"], linewidth=0.5)
        axis.legend(frameon=False, fontsize=8.5, labelcolor=COLOURS["ink"])
        finish(axis, "at the end, beside the paper's 64,000 steps", "layers", "error, %")

    return Chart("by depth", 5.6, 3.9, draw)


def _gradients(rows: Rows) -> Chart:
    """For each network, the norms of its convolutions' gradients from the first to the last, a mean over points."""

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        axis.set_yscale("log")
        first = rows[0]["seed"]
        for row in (row for row in rows if row["seed"] == first):
            norms = [sum(values) / len(values) for values in zip(*(point["gradients"] for point in row["points"]))]
            places = [index / max(1, len(norms) - 1) for index in range(len(norms))]
            style = "-" if row["has_shortcuts"] else (0, (3, 1.5))
            axis.plot(places, norms, color=_DEPTHS.get(row["depth"], COLOURS["faint"]), linewidth=1.2, linestyle=style,
                      label=row["network"])  # fmt: skip
        axis.grid(True, axis="y", color=COLOURS["rule"], linewidth=0.5)
        axis.legend(frameon=False, fontsize=8.5, labelcolor=COLOURS["ink"], ncols=2)
        finish(axis, "gradients by depth", f"layer, from the first to the last (seed {first})", "norm of the gradient")

    return Chart("gradients", 5.6, 3.9, draw)
