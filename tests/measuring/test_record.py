"""The record of a measurement: its file, what it refuses to read, and which file a measurement may go on with."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from fused_resnet import measuring
from fused_resnet.kernels import sources
from fused_resnet.measuring import Record, Run, record

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_UNMEASURED = ("aot", "mutations", "predictions")
FILES = [file for file in sorted(RESULTS.rglob("*.json")) if file.relative_to(RESULTS).parts[0] not in _UNMEASURED]
VARIANTS = {"eager NCHW fp32": {"median_us": 2.0}, "frozen fp32": {"median_us": 1.0}}


def started(kind="bench blocks"):
    return Record.here(kind, "cpu", {"models": ("resnet20",), "image": None})._replace(kernels=sources.source_digest())


class StubSubject(NamedTuple):
    name: str

    def measured(self, budget_s, rounds, progress):
        return {"variants": VARIANTS, "skipped": {}, "given": [budget_s, rounds]}


def subjects(*names):
    return map(StubSubject, names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(RESULTS).as_posix())
def test_every_committed_record_is_read_and_written_again_to_the_byte(file, tmp_path):
    found = Record.from_json(json.loads(file.read_text()))
    assert found.write(tmp_path / "again.json").read_text() == file.read_text()
    assert found.environment["torch"] and (found.rows or found.more["backends"])


def test_only_what_was_not_measured_is_no_record():
    others = [file for file in RESULTS.rglob("*.json") if file not in FILES]
    assert len(FILES) >= 12 and others
    assert all(not {"kind", "device", "environment"} & set(json.loads(file.read_text())) for file in others)


@pytest.mark.parametrize("kind, name", [("bench model", "runs"), ("demo", "runs"), ("bench ops", "rows"),
                                        ("bench blocks", "rows"), ("tune", "rows"), ("verify", None)])  # fmt: skip
def test_rows_are_called_as_their_kind_calls_them(kind, name):
    rows = [] if name is None else [{"batch": 1}]
    found = Record(kind, "a CPU", None, {"torch": "2.13.0"}, rows=rows, more={"passed": True})
    content = found.as_json()
    assert content == {"kind": kind, "device": "a CPU", "environment": {"torch": "2.13.0"}, "passed": True,
                       **({} if name is None else {name: rows})}  # fmt: skip
    assert Record.from_json(content) == found


@pytest.mark.parametrize(
    "change, error",
    [
        ({"kind": None}, "its kind is None"),
        ({"kind": ["bench ops"]}, "its kind is"),
        ({"environment": []}, "its environment is"),
        ({"settings": None}, "its settings is None"),
        ({"left": {}}, "its left is"),
        ({"rows": {}}, "its rows are no list"),
        ({"rows": [1]}, "its rows are no list of dictionaries"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(change, error):
    content = {"kind": "bench ops", "device": "a CPU", "environment": {}, "rows": []}
    with pytest.raises(TypeError, match=error):
        Record.from_json({**content, **change})
    for name in content:
        with pytest.raises(KeyError, match=name):
            Record.from_json({other: value for other, value in content.items() if other != name})
    for wrong in ([], "record", 5):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Record.from_json(wrong)


def test_the_record_is_written_after_each_subject_and_progress_is_told(tmp_path):
    out, told, seen = tmp_path / "blocks.json", [], []

    def progress(fraction, text):
        told.append(fraction)
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)

    found = record.measure(started(), subjects("a", "b"), Run(1.0, out=out), progress)
    assert told == [0.0, 0.5, 1.0] and seen == [0, 1, 2]
    assert json.loads(out.read_text()) == json.loads(json.dumps(found.as_json()))
    assert (found.left, found.broken, found.budget_s, found.mismatches) == ([], {}, 1.0, None)
    assert [(entry["variant"], entry["geomean_speedup"]) for entry in found.summary] == [("frozen fp32", 2.0)]


def test_subjects_share_the_budget_and_those_of_one_name_are_one():
    found = record.measure(started(), subjects("a", "b", "a"), Run(3.0, rounds=7))
    assert [(row["problem"], row["given"]) for row in found.rows] == [("a", [1.5, 7]), ("b", [1.5, 7])]


def test_the_first_subject_is_measured_however_little_time_there_is():
    found = record.measure(started(), subjects("a", "b", "c"), Run(1.0, stop_after_s=1e-9))
    assert [row["problem"] for row in found.rows] == ["a"] and found.left == ["b", "c"]


def test_a_measurement_goes_on_with_its_own_file_alone(tmp_path):
    out = tmp_path / "blocks.json"
    first = record.measure(started(), subjects("a"), Run(1.0, out=out))
    whole = record.measure(started(), subjects("a", "b"), Run(2.0, out=out, resume=True))
    assert [row["problem"] for row in whole.rows] == ["a", "b"] and whole.rows[0] == first.rows[0]
    with pytest.raises(record.CannotGoOn, match="^holds another measurement \\(another kind\\)"):
        record.measure(started("bench model"), subjects("a"), Run(1.0, out=out, resume=True))
    later = started()._replace(environment={**started().environment, "date": "later", "commit": "other"})
    assert set(record.kept_rows(out, later)) == {"a", "b"}  # neither decides what was measured
    assert record.kept_rows(tmp_path / "none.json", later) == {}


@pytest.mark.parametrize("name", ["torch", "triton", "threads"])
def test_another_environment_is_another_measurement(tmp_path, name):
    start = started()
    out = record.measure(start, subjects("a"), Run(1.0)).write(tmp_path / "blocks.json")
    other = start._replace(environment={**start.environment, name: "another"})
    with pytest.raises(record.CannotGoOn, match=f"another {name}"):
        record.kept_rows(out, other)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "bench blocks", "rows": []}'])
def test_a_file_that_is_no_record_is_not_gone_on_with(tmp_path, content):
    (tmp_path / "blocks.json").write_text(content)
    with pytest.raises(record.CannotGoOn, match="^is no record to go on with"):
        record.kept_rows(tmp_path / "blocks.json", started())


def test_networks_are_held_against_every_competitor_and_operators_against_libraries():
    rows = [{"problem": "x", "variants": {**VARIANTS, "compile fp32": {"median_us": 4.0}}}]
    entries = measuring.summarise_rows("bench model", rows)
    assert [entry["against"] for entry in entries] == ["eager NCHW fp32", "the best of compile in fp32"]
    row = {"problem": "y", "op": "conv_bn_act", "device": "cpu", "batch": 1, "dtype": "fp32", "auto": "onednn",
           "variants": {"unfused": {"median_us": 2.0}, "onednn": {"median_us": 1.0}}}  # fmt: skip
    assert ("onednn", measuring.UNFUSED) in {
        (entry["variant"], entry["against"]) for entry in measuring.summarise_rows("bench ops", [row])
    }
