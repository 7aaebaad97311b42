"""Reports: records in, one page out. Sums, losses, foreign files, and the page itself in headless Chromium."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fused_resnet import measuring
from fused_resnet.choosing import winners_file
from fused_resnet.cli.main import cli
from fused_resnet.measuring import Record
from fused_resnet.reporting import charts, report

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "date": "2026-11-20T09:48:13+00:00",
    "cpu": "Test CPU",
    "threads": 1,
    "torch": "2.13.0",
    "commit": "f" * 40,
}
ROOF = {"gb_per_s": 4000.0, "tflops": 700.0, "l2_gb_per_s": 6000.0}


def variant(time_us, base_us):
    return {
        "median_us": time_us, "min_us": time_us, "p10": time_us, "p90": time_us, "samples": 3, "tflops": 100 / time_us,
        "gb_per_s": 1000 / time_us, "roofline_percent": 50.0, "error_ratio": 0.5, "speedup": base_us / time_us,
    }  # fmt: skip


def op_row(problem, auto, batch=256, op="conv_bn_act", **times_us):
    names = {"unfused": "unfused", "folded": "eager folded"}
    variants = {names.get(name, name): variant(time_us, times_us["unfused"]) for name, time_us in times_us.items()}
    return {
        "problem": problem, "op": op, "device": "cuda", "batch": batch, "dtype": "fp16", "models": {"resnet50": 2},
        "count": 2, "gflop": 1.0, "mbytes": 10.0, "roofline": ROOF, "least_us": 1.0, "auto": auto, "auto_config": None,
        "auto_source": "", "variants": variants, "not_timed": {}, "failed": {}, "skipped": {"onednn": "not on CUDA"},
    }  # fmt: skip


def op_record():
    rows = [
        op_row("a win <b>", "triton", unfused=40.0, folded=30.0, cudnn=20.0, triton=10.0),
        op_row("a loss", "triton", unfused=40.0, folded=30.0, cudnn=10.0, triton=20.0),
        op_row("level", "cudnn", batch=1, unfused=40.0, folded=30.0, cudnn=20.0, triton=20.0),
        op_row("add_relu x", "cuda", op="add_relu", unfused=30.0, copy=10.0, cuda=10.0),
    ]
    return {"kind": "bench ops", "device": "Test GPU", "settings": {"models": ["resnet50"]}, "environment": ENVIRONMENT,
            "kernels": "0123456789abcdef", "left": [], "rows": rows, "summary": [], "mismatches": []}  # fmt: skip


def earlier_record():
    """`bench model` as version 0.1.0 wrote it: runs without names, no summary, no list of what is left."""

    def one(time_us):
        return {"median_us": time_us, "min_us": time_us, "p10": time_us, "p90": time_us, "samples": 3,
                "ms": time_us / 1e3, "images_per_s": 1e6 / time_us, "ratio": 100 / time_us,
                "ratio_to_compile": 50 / time_us, "max_rel_error": 1e-6}  # fmt: skip

    variants = {"eager NCHW fp32": one(100.0), "compile fp32": one(50.0), "frozen fp32": one(80.0)}
    runs = [{"batch": batch, "variants": variants, "skipped": {"openvino fp32": "openvino is not installed"}}
            for batch in (1, 8)]  # fmt: skip
    return {"kind": "bench model", "device": "Test CPU", "settings": {"model": "resnet50"},
            "environment": {**ENVIRONMENT, "dirty": True}, "runs": runs}  # fmt: skip


def run_report(*arguments):
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


@pytest.fixture
def op_file(tmp_path):
    file = tmp_path / "ops.json"
    file.write_text(json.dumps(op_record()))
    return file


@pytest.fixture
def earlier_file(tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(earlier_record()))
    return file


# --------------------------------------------------------------------------------------------------------- what it says


def test_wins_and_losses_are_counted_against_each_baseline(op_file):
    (section,) = report.read([op_file]).sections
    # our kernels and auto against the best library kernel, three convolutions each; auto on one addition
    assert (section.won, section.level, len(section.losses)) == (3, 2, 2)
    assert {(loss.variant, loss.against, loss.problem, loss.speedup) for loss in section.losses} == {
        (measuring.OURS, "the better of cuDNN fused and unfused", "a loss", 0.5),
        (measuring.AUTO, "the best library kernel", "a loss", 0.5),
    }


def test_the_worst_loss_comes_first(op_file, earlier_file):
    found = report.read([earlier_file, op_file])
    assert [loss.speedup for loss in found.losses] == [0.5, 0.5, 0.625, 0.625]


def test_records_of_earlier_versions_are_read(earlier_file):
    (section,) = report.read([earlier_file]).sections
    assert [table.title for table in section.tables] == ["resnet50, batch 1", "resnet50, batch 8"]
    assert {(loss.variant, loss.against, loss.speedup) for loss in section.losses} == {
        ("frozen fp32", "the best of compile in fp32", 0.625)
    }
    facts = dict(section.facts)
    assert facts["commit"] == "f" * 12 + ", with changes" and facts["date"] == "2026-11-20 09:48:13 UTC"
    assert "not run: openvino fp32: openvino is not installed" in section.remarks


def test_tuned_configs_are_shown_with_what_they_gain():
    found = {"stub": winners_file.Measured({"tile": 64}, 5.0, 0.1), "eager": winners_file.Measured(None, 10.0, 0.1)}
    entries = {"64x56x56 -> 64, 1x1 float32 bias relu": {8: winners_file.Entry("stub", "eager", "2026-11-20", found)}}
    table = winners_file.Table("Test GPU", entries, {"2026-11-20": {**ENVIRONMENT, "kernels": {}}}, {}, {})
    section = report.section_of(table.as_json(), "configs.json")
    (shown,) = section.tables
    row = dict(zip(shown.columns, (cell.text for cell in shown.rows[0])))
    assert (row["winner"], row["config"], row["winner vs untuned"]) == ("stub", "tile 64", "2.00x")
    assert dict(section.facts)["software"] == "torch 2.13.0"


def test_every_committed_benchmark_can_be_reported():
    files = [file for file in (ROOT / "benchmarks" / "results").glob("*/*.json")
             if str(json.loads(file.read_text()).get("kind", "")).startswith("bench ")]  # fmt: skip
    found = report.read(files)
    assert files and len(found.sections) == len(files), found.unusable


def test_a_step_that_failed_is_marked(tmp_path):
    step = {"outcome": "failed", "detail": "stopped after 60 s", "seconds": 60.0, "date": "2026-11-20", "sources": ""}
    record = {"kind": "gpu-check", "device": "Test GPU", "environment": ENVIRONMENT, "steps": {"tests": step}}
    (table,) = report.section_of({**record, "verified": None}, "check.json").tables
    assert table.rows[0][1] == report.Cell("failed", "failed", True) and "no kernel of ours verified" in table.title


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is not JSON"),
        (b'{"kind": "bench ops", ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "it names no kind"),
        (b'{"machine_info": {}, "benchmarks": []}', "it names no kind"),
        (b'{"schema": 99, "entries": {}}', "its schema is 99"),
        (b'{"kind": "weather"}', "its kind is 'weather'"),
        (b'{"kind": ["bench ops"]}', "its kind is"),
        (b'{"kind": "bench ops", "rows": []}', "lacks something (KeyError: 'environment')"),
        (b'{"kind": "bench model", "device": "x", "environment": {"date": "d"}, "runs": [{"variants": {"frozen fp32": '
         b'{"median_us": 0}}}]}', "lacks something"),
        (b'{"kind": "bench blocks", "device": 3, "environment": [], "rows": 5}', "lacks something"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_and_costs_the_others_nothing(tmp_path, op_file, content, reason):
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)
    result = run_report(bad, op_file, tmp_path / "missing.json", "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert f"report: {bad}: " in result.stderr and reason in result.stderr
    assert "missing.json: cannot be read (No such file" in result.stderr
    page = (tmp_path / "page.html").read_text()
    assert html.escape(reason).replace("&#x27;", "&#39;") in page and "a loss" in page


def test_no_usable_file_is_an_error_and_leaves_no_page(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    result = run_report(bad, "--out", tmp_path / "page.html")
    assert result.exit_code == 1 and not (tmp_path / "page.html").exists()


def test_markdown_has_the_same_tables(tmp_path, op_file):
    result = run_report(op_file, "--out", tmp_path / "page.html", "--markdown")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| a loss |")]
    assert len(rows) == 1 and "**0.50x LOSS**" in rows[0]
    assert "- 0.50x: our kernels against the better of cuDNN fused and unfused, a loss (ops.json)" in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.count("|"), []).append(line)
    headings = [line for line in text.splitlines() if re.fullmatch(r"\| (--- \| )*--- \|", line)]
    assert headings and all(len(widths[line.count("|")]) > 1 for line in headings)


def test_without_matplotlib_the_page_says_so(op_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report.html(report.read([op_file]))
    assert "No charts: matplotlib is not installed" in page and "<svg" not in page and "a loss" in page


def test_charts_have_no_names_in_common_and_the_colours_of_the_page():
    drawn = [
        charts.svg(chart, salt) for chart in charts.charts_of(Record.from_json(op_record())) for salt in ("a", "b")
    ]
    assert len(drawn) == 4  # speed-ups and roofline
    names = [set(re.findall(r'id="([^"]+)"', text)) for text in drawn]
    assert all(names) and sum(map(len, names)) == len(set().union(*names))
    for text in drawn:
        references = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
        assert {one or other for one, other in references} <= set(re.findall(r'id="([^"]+)"', text))
        assert not [colour for colour in charts.COLOURS.values() if colour in text] and "var(--ink)" in text
    assert "a win &lt;b&gt;\ntriton: 10.0 us" in drawn[2]


def test_a_chart_is_written_as_png(tmp_path):
    path = charts.save_png(Record.from_json(op_record()), tmp_path / "deep" / "ops.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="kind 'gpu-check' has nothing to draw"):
        charts.save_png(Record("gpu-check", "Test GPU", None, ENVIRONMENT), tmp_path / "none.png")


# --------------------------------------------------------------------------------------------------------- in a browser

# Clicks headings as a reader would and writes what it finds into the page, where --dump-dom shows it.
CLICKS = """
<script>
const said = {errors: window.foundErrors, tables: document.querySelectorAll("table").length};
const title = [...document.querySelectorAll("h3")].find(h => h.textContent.startsWith("conv_bn_act, batch 256"));
const table = title.nextElementSibling.firstElementChild;
const headings = [...table.tHead.rows[0].cells];
const column = name => headings.findIndex(cell => cell.textContent === name);
const shown = name => [...table.tBodies[0].rows].map(row => row.cells[column(name)].textContent);
const click = name => headings[column(name)].querySelector("button").click();
const sort = name => headings[column(name)].getAttribute("aria-sort");
click("triton, us"); said.ascending = shown("triton, us"); said.sort = sort("triton, us");
click("triton, us"); said.descending = shown("triton, us");
click("problem"); said.names = shown("problem"); said.before = sort("triton, us");
const losses = document.querySelector("#losses table");
losses.tHead.rows[0].cells[2].querySelector("button").click();
said.against = [...losses.tBodies[0].rows].map(row => row.cells[2].textContent);
const visible = element => { const box = element.getBoundingClientRect(); return box.width > 100 && box.height > 50; };
said.charts = [...document.querySelectorAll("figure svg")].filter(visible).length;
said.wider = document.documentElement.scrollWidth > document.documentElement.clientWidth;
said.loss = getComputedStyle(document.querySelector("td.bad")).backgroundColor;
said.plain = getComputedStyle(document.querySelector("td:not(.bad)")).backgroundColor;
document.body.insertAdjacentHTML("beforeend", "<pre id=said></pre>");
document.getElementById("said").textContent = JSON.stringify(said);
</script>
"""
LISTEN = """<script>
window.foundErrors = [];
window.addEventListener("error", event => foundErrors.push(String(event.message)), true);
console.error = (...words) => foundErrors.push(words.join(" "));
</script>"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


def chromium(page, folder, *options):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1280,1600", *options,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=120)


@needs_chromium
def test_the_page_loads_sorts_by_click_and_reports_no_error(tmp_path, op_file, earlier_file):
    page = tmp_path / "page.html"
    text = report.html(report.read([op_file, earlier_file]))
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    page.write_text(text.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{CLICKS}</body>"))
    done = chromium(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in done.stderr.decode()
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout.decode()).group(1)))
    assert said["errors"] == []
    assert said["ascending"] == ["10", "20"] and said["descending"] == ["20", "10"]
    assert said["sort"] == "ascending" and said["before"] == "none"
    assert said["names"] == ["a loss", "a win <b>"]
    assert said["against"] == sorted(said["against"]) and len(set(said["against"])) > 1
    assert said["charts"] == 4 and not said["wider"]
    assert said["loss"] != said["plain"]


@needs_chromium
def test_a_screenshot_shows_losses_in_their_colour_on_light_and_on_dark(tmp_path, op_file):
    from PIL import Image

    page = tmp_path / "page.html"
    page.write_text(report.html(report.read([op_file])))
    for scheme, paper, loss in (("1", (255, 255, 255), (254, 226, 226)), ("0", (15, 23, 42), (91, 32, 41))):
        file = tmp_path / f"{scheme}.png"
        chromium(page, tmp_path / "profile", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={file}")
        counts = {colour: count for count, colour in Image.open(file).convert("RGB").getcolors(2**24)}
        assert max(counts, key=counts.get) == paper
        assert counts.get(loss, 0) > 1000
