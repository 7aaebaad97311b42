"""The degradation experiment in twenty steps: runs, record, verdict and figure."""

import json

import pytest

from fused_resnet.recipes import degradation
from fused_resnet.reporting import charts
from tests.support.scripts import script

SAMPLE = "benchmarks/data/cifar10/cifar10_sample.npz"


def row(network, seed, error):
    return {"network": network, "seed": seed, "train_error": error}


def test_the_verdict():
    good = [row("plain20", 0, 0.6), row("plain56", 0, 0.8), row("resnet56", 0, 0.6)]
    assert degradation.verdict(good)["is_decisive"]
    for bad in ([row("plain20", 1, 0.8), row("plain56", 1, 0.8), row("resnet56", 1, 0.6)],
                [row("plain20", 1, 0.6), row("plain56", 1, 0.7), row("resnet56", 1, 0.7)]):  # fmt: skip
        found = degradation.verdict([*good, *bad])
        assert not found["is_decisive"] and set(found["seeds"]) == {"0", "1"}
    assert not degradation.verdict(good[:2])["is_decisive"], "nothing was compared"


def test_the_full_form_is_the_papers(tmp_path):
    experiment = degradation.full(164, [0], tmp_path, None, "cuda")
    assert experiment.networks == (
        *(f"plain{depth}" for depth in (20, 32, 44, 56)), *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    )  # fmt: skip
    assert experiment.settings[:5] == (164, 128, 0.1, 1e-4, 0.9) and experiment.settings.gradients
    short = degradation.full(2, [0], tmp_path, None, "cuda").settings
    assert (short.epochs, short.warm_up, short.milestones) == (2, 0.2, (0.5, 0.75))


@pytest.mark.full
def test_twenty_steps(tmp_path):
    """One command: three networks, two at a time, a record and a figure. A second call takes what is there."""
    arguments = ("examples/degradation.py", "--short", "--data", SAMPLE, "--test", SAMPLE, "--device", "cpu", "--out",
                 tmp_path / "out")  # fmt: skip
    done = script(*arguments, "--steps", 20, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "degradation.json").read_text())
    assert [one["network"] for one in record["rows"]] == list(degradation.SHORT_NETWORKS)
    assert record["summary"] == degradation.verdict(record["rows"])
    assert record["settings"]["command"].startswith("python examples/degradation.py --short --data cifar10_sample.npz")
    assert str(tmp_path) not in json.dumps(record)
    for one, layers in zip(record["rows"], (19, 55, 55)):
        assert [point["step"] for point in one["points"]] == [20] and one["train_error"] == one["points"][0]["error"]
        assert len(one["points"][0]["gradients"]) == layers
        assert one["test_error"] == one["tests"][-1]["error"] and one["seconds"] > 0
    assert (tmp_path / "out" / "degradation.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"{100 * one['train_error']:.1f} %" in done.stdout for one in record["rows"])
    again = script(*arguments, "--steps", 20, "--seeds", 1)
    assert again.returncode == 0, again.stderr
    kept = json.loads((tmp_path / "out" / "degradation.json").read_text())
    assert [one["points"] for one in kept["rows"]] == [one["points"] for one in record["rows"]]
    assert [one["seconds"] for one in kept["rows"]] == [one["seconds"] for one in record["rows"]]


def test_the_figure():
    """A chart of each kind of network, of the ends, and of gradients; without gradients three."""
    points = [{"step": step, "error": 0.9 - step / 100, "gradients": [0.1, 0.2]} for step in (10, 20)]
    tests = [{"step": 20, "error": 0.7}]
    rows = [
        {"depth": depth, "has_shortcuts": has, "network": f"{has}{depth}", "seed": 0, "train_error": 0.7,
         "test_error": 0.7, "points": points, "tests": tests}
        for depth, has in ((20, False), (56, False), (56, True))
    ]  # fmt: skip
    record = charts.Record("degradation", "cpu", None, {}, rows=rows)
    found = charts.charts_of(record)
    assert [chart.title for chart in found] == ["plain networks", "ResNets", "by depth", "gradients"]
    drawn = [charts.svg(chart) for chart in found]
    assert "56 layers" in drawn[0] and "He et al. 2015" in drawn[2] and "norm of the gradient" in drawn[3]
    without = [{**one, "points": [{"step": 1, "error": 0.9}]} for one in rows]
    assert len(charts.charts_of(record._replace(rows=without))) == 3


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        degradation.perform(degradation.short(tmp_path / "absent", None, "cpu"), tmp_path / "out", "")
    assert not (tmp_path / "out").exists()
    done = script("examples/degradation.py", "--data", tmp_path / "absent", "--out", tmp_path / "out")
    assert done.returncode == 1 and "Error: images: there is no file or folder" in done.stderr
