"""Benchmark records in, one page out: tables that sort, charts, every loss, and where each number comes from.

The page is HTML with everything inside it, or Markdown with the same tables. A file that is no record of ours, or that
cannot be read, is named with the reason. The others are reported all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Optional, Sequence

from fused_resnet import measuring
from fused_resnet.choosing import winners_file
from fused_resnet.measuring import Record
from fused_resnet.reporting import charts

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_NOT_OURS = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError)
_ABOUT = ("all", "add_relu")  # entries of a summary over all rows; the others repeat a part of them


class Cell(NamedTuple):
    """What is shown, the value it sorts by (None: it has none), and whether it is a loss or a failure."""

    text: str
    value: Any = None
    is_bad: bool = False


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Loss(NamedTuple):
    """A problem on which `variant` is slower than `against`, and the file that says so."""

    speedup: float
    variant: str
    against: str
    problem: str
    file: str


class Section(NamedTuple):
    """One file. facts: (name, value) of machine and software. won, level, lost: problems, over all contests."""

    file: str
    title: str
    facts: Sequence[tuple[str, str]]
    summary: Optional[Table]
    tables: Sequence[Table]
    charts: Sequence[charts.Chart]
    losses: Sequence[Loss]
    won: int
    level: int
    remarks: Sequence[str]


class Report(NamedTuple):
    """The sections, and a sentence for each file that gave none."""

    sections: Sequence[Section]
    unusable: Sequence[str]

    @property
    def losses(self) -> list[Loss]:
        """The losses in all files, the worst first."""
        return sorted(loss for section in self.sections for loss in section.losses)


def read(files: Iterable[Path]) -> Report:
    """Read records written by this version or an earlier one."""
    sections, unusable = [], []
    for file in map(Path, files):
        try:
            sections.append(section_of(json.loads(file.read_text(encoding="utf-8")), file.name))
        except OSError as error:
            unusable.append(f"{file}: cannot be read ({error.strerror or error})")
        except _Foreign as error:
            unusable.append(f"{file}: {error}")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            unusable.append(f"{file}: is not JSON ({error})")
        except _NOT_OURS as error:
            unusable.append(f"{file}: looks like a record of ours, but lacks something ({_named(error)})")
    return Report(sections, unusable)


class _Foreign(ValueError):
    """JSON that is no record of a benchmark."""


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ----------------------------------------------------------------------------------------------- records to sections


def section_of(content: Any, file: str) -> Section:
    """A file as a section. ValueError for what is no record; any of _NOT_OURS for one that lacks something."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind is None and isinstance(content, dict) and "schema" in content:
        return _tuned_section(content, file)
    known = ("bench ops", "bench blocks", "bench model", "demo", "gpu-check")
    if kind not in known:
        got = "it names no kind" if kind is None else f"its kind is {kind!r}"
        raise _Foreign(f"is no record of a benchmark: {got} (known kinds are {', '.join(known)})")
    record = _with_names(Record.from_json(content))
    if kind == "gpu-check":
        tables, entries = [_steps_table(record)], []
    elif kind == "bench ops":
        tables, entries = _op_tables(record.rows), measuring.summarise_rows(kind, record.rows)
    else:
        tables, entries = list(map(_network_table, record.rows)), measuring.summarise_rows(kind, record.rows)
        tables += [_accuracy_table(record)] if "accuracy" in record.more else []
    contests = [entry for entry in entries if _is_contest(entry) and entry["where"] in _ABOUT]
    losses = [
        Loss(loss["speedup"], entry["variant"], entry["against"], loss["problem"], file)
        for entry in contests
        for loss in entry["losses"]
    ]
    won = sum(round(entry["share_won"] * entry["problems"]) for entry in contests)
    level = sum(entry["problems"] for entry in contests) - won - len(losses)
    return Section(
        file, _title(record), _facts(record.device, record.environment, record.kernels),
        _summary_table(entries) if entries else None, tables, charts.charts_of(record), losses, won, level,
        _remarks(record),
    )  # fmt: skip


def _with_names(record: Record) -> Record:
    """Each row with a name: an earlier version told the runs of a model apart by their batch alone."""
    model = (record.settings or {}).get("model")
    rows = [{"problem": f"{model}, batch {row.get('batch')}", **row} for row in record.rows]
    return record._replace(rows=rows)


def _is_contest(entry: dict[str, Any]) -> bool:
    """Whether an entry is about us: what `auto` takes, our kernels, our variants of a network."""
    name = entry["variant"]
    ours = name in (measuring.AUTO, measuring.OURS) or measuring.is_ours(name)
    return ours and entry["against"] != measuring.COPY


def _title(record: Record) -> str:
    settings = record.settings or {}
    named = settings.get("models") or settings.get("model") or []
    models = [named] if isinstance(named, str) else named
    return f"{record.kind}: {', '.join(models)}" if models else record.kind


def _facts(device: str, environment: dict[str, Any], kernels: Optional[str] = None) -> list[tuple[str, str]]:
    gpu = environment.get("gpu") or {}

    def listed(source: dict[str, Any], **formats: str) -> str:
        return ", ".join(form.format(source[name]) for name, form in formats.items() if source.get(name))

    facts = {
        "device": device,
        "date": environment["date"].replace("T", " ").replace("+00:00", " UTC"),
        "CPU": f"{listed(environment, cpu='{}', threads='threads: {}')} {' '.join(environment.get('cpu_flags') or [])}",
        "GPU": listed(gpu, name="{}", driver="driver {}", sm_mhz="{} MHz", memory_mhz="memory {} MHz", power_w="{} W"),
        "software": ", ".join(filter(None, (
            listed(environment, torch="torch {}", triton="Triton {}", python="Python {}"),
            listed(gpu, cuda="CUDA {}", cudnn="cuDNN {}"),
        ))),
        "commit": listed({"commit": (environment.get("commit") or "")[:12],
                          "dirty": environment.get("dirty") and "with changes"}, commit="{}", dirty="{}"),
        "kernel sources": kernels or "",
    }  # fmt: skip
    return [(name, value.strip()) for name, value in facts.items() if value.strip()]


def _remarks(record: Record) -> list[str]:
    remarks = [f"not run: {name}: {reason}" for name, reason in
               dict.fromkeys(pair for row in record.rows for pair in row.get("skipped", {}).items())]  # fmt: skip
    for wrong in record.mismatches or []:
        said = wrong.get("raised") or f"error {wrong['error_ratio']} times what is allowed"
        remarks.insert(0, f"WRONG, not timed: {wrong['variant']}: {wrong['problem']}: {said}")
    for name, reason in (record.broken or {}).items():
        remarks.insert(0, f"BROKEN: {name}: {reason}")
    if record.left:
        remarks.append(f"not measured: {len(record.left)}, {record.left[0]} the first")
    if roofs := {row["dtype"]: row["roofline"] for row in record.rows if "roofline" in row}:
        remarks += [
            f"ceilings measured then, {dtype}: copy {roof['gb_per_s']:.4g} GB/s, matmul {roof['tflops']:.4g} TFLOP/s"
            + (f", reading L2 {roof['l2_gb_per_s']:.4g} GB/s" if roof["l2_gb_per_s"] else "")
            for dtype, roof in roofs.items()
        ]
    return remarks


def _tuned_section(content: dict[str, Any], file: str) -> Section:
    """A file of tuned configs: who won, and by how much over what `auto` takes without it."""
    table = winners_file.Table.from_json(content)
    rows = [
        (
            Cell(key), _number(batch), Cell(entry.winner), Cell(_config(entry.candidates[entry.winner].config)),
            _number(entry.candidates[entry.winner].time_us), Cell(entry.default),
            _speedup(_over_default(entry)), Cell(", ".join(entry.candidates)),
        )
        for key, by_batch in table.entries.items() for batch, entry in sorted(by_batch.items())
    ]  # fmt: skip
    columns = ("problem", "batch", "winner", "config", "us", "untuned", "winner vs untuned", "measured")
    newest = table.runs.get(max(table.runs, default=""), {})
    facts = _facts(table.device, {"date": max(table.runs, default="?"), **newest})
    return Section(file, "tuned configs", facts, None, [Table("The fastest of each problem", columns, rows)], [], [], 0,
                   0, [])  # fmt: skip


def _config(config: Optional[dict[str, Any]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items()) if config else "-"


def _over_default(entry: winners_file.Entry) -> Optional[float]:
    default = entry.candidates.get(entry.default)
    return default.time_us / entry.candidates[entry.winner].time_us if default else None


# ------------------------------------------------------------------------------------------------------------ tables


def _speedup(value: Optional[float], is_ours: bool = True) -> Cell:
    """A speed-up, None shown as a dash. Below LOSS_BELOW it is a loss, if it is ours."""
    if value is None:
        return Cell("-")
    is_loss = is_ours and value < measuring.LOSS_BELOW
    return Cell(f"{value:.2f}x{' LOSS' if is_loss else ''}", value, is_loss)


def _number(value: float, digits: int = 4) -> Cell:
    return Cell(f"{value:.{digits}g}" if value < 10**digits else f"{value:.0f}", value)


def _error(value: Optional[float]) -> Cell:
    return Cell("not finite", float("inf"), True) if value is None else Cell(f"{value:.2g}", value)


def _summary_table(entries: Sequence[dict[str, Any]]) -> Table:
    columns = ("variant", "against", "over", "problems", "geometric mean", "all together", "worst", "won", "lost",
               "worst on")  # fmt: skip
    rows = [
        (
            Cell(entry["variant"]), Cell(entry["against"]), Cell(entry["where"]), _number(entry["problems"]),
            *(_speedup(value, _is_contest(entry)) for value in (
                entry["geomean_speedup"], entry["total_us_against"] / entry["total_us"], entry["worst_speedup"])),
            Cell(f"{entry['share_won']:.0%}", entry["share_won"]),
            Cell(str(len(entry["losses"])), len(entry["losses"]), _is_contest(entry) and bool(entry["losses"])),
            Cell(entry["worst_problem"]),
        )
        for entry in entries
    ]  # fmt: skip
    return Table("Summary: speed-ups", columns, rows)


def _op_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One table per operator, batch and dtype: a row per problem, the time of each variant, and how `auto` does."""
    kinds = dict.fromkeys((row["op"], row["batch"], row["dtype"]) for row in rows)
    return [_op_table(kind, [row for row in rows if (row["op"], row["batch"], row["dtype"]) == kind]) for kind in kinds]


def _op_table(kind: tuple[str, int, str], rows: Sequence[dict[str, Any]]) -> Table:
    op, batch, dtype = kind
    names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
    shown = []
    for row in rows:
        variants, chosen = row["variants"], measuring.chosen_by_auto(row)
        times = [_number(variants[name]["median_us"]) if name in variants else Cell("-") for name in names]
        own = variants.get(chosen)
        others = [one["median_us"] for name, one in variants.items() if name not in (chosen, measuring.COPY)]
        versus = min(others) / own["median_us"] if own and others else None
        shown.append(
            (
                Cell(row["problem"]), _number(row["count"]), *times, Cell(chosen),
                _speedup(own["speedup"] if own else None), _speedup(versus),
                _number(own["roofline_percent"], 3) if own else Cell("-"),
                _error(own["error_ratio"]) if own else Cell("wrong", is_bad=True),
            )
        )  # fmt: skip
    columns = ("problem", "times", *(f"{name}, us" for name in names), "auto", f"auto vs {measuring.UNFUSED}",
               "auto vs fastest other", "auto, % of roofline", "auto, error / bound")  # fmt: skip
    return Table(f"{op}, batch {batch}, {dtype}", columns, shown)


def _network_table(run: dict[str, Any]) -> Table:
    columns = ("variant", "ms", "p10", "p90", "images/s", "vs eager NCHW fp32", "vs compile, same dtype",
               "vs fastest rival, same dtype", "rival", "error / largest output")  # fmt: skip
    rows = []
    for name, one in run["variants"].items():
        is_ours, (rival, against) = measuring.is_ours(name), measuring.rival_of(name, run["variants"])
        rows.append(
            (
                Cell(name), *(_number(value, 3) for value in (one["ms"], one["p10"] / 1e3, one["p90"] / 1e3)),
                _number(one["images_per_s"]), _speedup(one["ratio"], is_ours),
                _speedup(one["ratio_to_compile"], is_ours), _speedup(against if rival else None), Cell(rival or "-"),
                _error(one["max_rel_error"]),
            )
        )  # fmt: skip
    return Table(run["problem"], columns, rows)


def _accuracy_table(record: Record) -> Table:
    rows = [
        (Cell(one["variant"]), _number(one["correct"]), _number(one["images"]), _number(one["changed"]))
        for one in record.more["accuracy"]
    ]
    return Table("ResNet-20 on CIFAR-10 images", ("variant", "right", "images", "predictions changed"), rows)


def _steps_table(record: Record) -> Table:
    rows = [
        (
            Cell(name), Cell(step["outcome"], step["outcome"], step["outcome"] == "failed"),
            _number(step["seconds"]), Cell(step["date"]), Cell(step["detail"]),
        )
        for name, step in record.more["steps"].items()
    ]  # fmt: skip
    verified = record.more.get("verified")
    what = f"verified: {', '.join(verified['backends'])}" if verified else "no kernel of ours verified"
    return Table(f"Steps; {what}", ("step", "outcome", "seconds", "date", "what it said"), rows)


# ------------------------------------------------------------------------------------------------------------- pages


def html(report: Report) -> str:
    """The report as one self-contained HTML page."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    drawings, why_none = _drawings(report)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, drawings=drawings, why_no_charts=why_none, colours=charts.COLOURS)


def _drawings(report: Report) -> tuple[list[list[str]], str]:
    """The charts of each section as SVG; without matplotlib none, and the sentence why."""
    try:
        return [[charts.svg(chart, salt=section.file) for chart in section.charts] for section in report.sections], ""
    except ModuleNotFoundError as error:
        return [
            [] for _ in report.sections
        ], f"No charts: {error.name} is not installed (pip install fused_resnet[charts])."


def markdown(report: Report) -> str:
    """The same tables as Markdown, without charts."""
    lines = ["# fused_resnet: benchmark report", ""]
    lines += [f"- not reported: {sentence}" for sentence in report.unusable] + [""] * bool(report.unusable)
    if report.losses:
        lines += [f"{len(report.losses)} losses:", "", *(
            f"- {loss.speedup:.2f}x: {loss.variant} against {loss.against}, {loss.problem} ({loss.file})"
            for loss in report.losses), ""]  # fmt: skip
    for section in report.sections:
        lines += [f"## {section.title}", "", "; ".join(f"{name}: {value}" for name, value in section.facts) + ".", ""]
        for table in filter(None, (section.summary, *section.tables)):
            lines += [f"### {table.title}", "", *_markdown_table(table), ""]
        lines += [f"- {remark}" for remark in section.remarks] + [""] * bool(section.remarks)
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rows = (line(f"**{cell.text}**" if cell.is_bad else cell.text for cell in row) for row in table.rows)
    return [line(table.columns), line("---" for _ in table.columns), *rows]
