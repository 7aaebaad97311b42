"""explain: rows against what runs, bytes and roofline by hand, reasons word for word, nothing computed or changed."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fused_resnet
from fused_resnet import backends, choosing, models
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import choice, timing, winners
from fused_resnet.measuring import rooflines
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.operators.problem import ConvProblem
from tests.support import networks
from tests.support.tuned_files import entry

ROOF = rooflines.Roofline(bytes_per_s=1e10, flops_per_s=1e11)


def explain(model, x, **options):
    return fused_resnet.explain(model, x, roofline=ROOF, **options)


def problem(C, H, K, R, **options):
    """A square 3x3 or 1x1 convolution of two images in fp32 with live BN, as in `networks`."""
    stride = options.pop("stride", 1)
    epilogue = {"activation": "relu", "has_bn": True, "has_bias": False, "has_residual": False, **options}
    padding = (R // 2, R // 2)
    return ConvProblem(2, C, H, H, K, R, R, (stride, stride), padding, (1, 1), 1, dtype=torch.float32, device="cpu",
                       **epilogue)  # fmt: skip


BLOCK = (  # networks.single(): 16 -> 8 channels, stride 2, with a projection
    ("conv1", problem(16, 9, 8, 3, stride=2)),
    ("downsample.0", problem(16, 9, 8, 1, stride=2, activation="none")),
    ("conv2", problem(8, 5, 8, 3, has_residual=True)),
)


@pytest.mark.parametrize("form", ("plain", "fused"))
def test_rows_of_a_block(form):
    block = networks.single()
    if form == "fused":
        fused_resnet.fuse(block)
    kinds, state = [type(module) for module in block.modules()], {k: v.clone() for k, v in block.state_dict().items()}
    found = explain(block, torch.randn(2, 16, 9, 9))
    assert (found.model, found.form, found.example) == ("BasicBlock", form, "2x16x9x9 float32 on cpu")
    assert [(row.name, row.problem) for row in found.rows] == list(BLOCK)
    assert {row.backend for row in found.rows} == {"cpu_pass"} and found.left_alone == ()
    assert {row.source for row in found.rows} == {choice.FIXED_ORDER}
    assert [type(module) for module in block.modules()] == kinds
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in state.items())


def test_rows_are_what_runs(monkeypatch):
    """The problems that a real forward asks the backends for, one after the other."""
    model, x = fused_resnet.fuse(networks.small(Bottleneck)), torch.randn(2, 3, 20, 20)
    rows = explain(model, x).rows
    asked, real = [], backends.known("conv_bn_act")["cpu_pass"]
    run = lambda problem, *rest, **options: asked.append(problem) or real.run(problem, *rest, **options)  # noqa: E731
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "cpu_pass", real._replace(run=run))
    with torch.no_grad():
        model(x)
    assert [row.problem for row in rows] == asked and len(asked) == 16


class Watched(nn.Module):
    """Notes the class of the tensors that come by."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        self.note(type(x))
        return x


def test_nothing_is_computed_and_no_statistic_moves():
    seen = []
    model = nn.Sequential(networks.small(), Watched(seen.append)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    found = explain(model, torch.randn(2, 3, 20, 20))
    assert {row.source for row in found.rows} == {"its BN is in training mode, so both run as they are"}
    assert {row.backend for row in found.rows} == {None}
    assert seen and Tensor not in seen
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_bytes_flops_and_roofline_by_hand():
    row, eager = (
        explain(fused_resnet.fuse(networks.single(), backend=backend), torch.randn(2, 16, 9, 9)).rows[2]
        for backend in ("auto", "eager")
    )
    x = residual = out = 2 * 8 * 5 * 5
    weight = 8 * 8 * 9
    assert row.problem.bytes_moved == 4 * (x + weight + residual + out)
    # conv: x, w, out; BN: out twice; add: out, residual, out; ReLU: out twice
    assert eager.bytes_moved == row.problem.bytes_unfused == 4 * (x + weight + out + 2 * out + 3 * out + 2 * out)
    # conv: x, w, out; all that follows: out, residual, out
    assert row.bytes_moved == 4 * (x + weight + out + 3 * out)
    assert row.problem.flops == 2 * out * 72
    assert row.least_us == pytest.approx(max(1e6 * row.problem.bytes_moved / 1e10, 1e6 * row.problem.flops / 1e11))


def test_frozen_rows_are_the_plans():
    model, x = networks.small(Bottleneck), torch.randn(2, 3, 20, 20)
    frozen = fused_resnet.freeze(model, x)
    found = explain(frozen, x, measure=True)
    planned = [module for module in frozen.plan(x).modules() if hasattr(module, "selection")]
    assert found.form == "frozen" and len(found.rows) == len(planned) == 16
    assert {row.problem for row in found.rows} == {conv.problem for conv in planned}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(row.name for row in found.rows) == sorted(names)
    assert all(row.time_us > 0 for row in found.rows) and found.totals["time_us"] > 0
    assert all(row.bytes_moved == row.problem.bytes_moved for row in found.rows if row.backend == "onednn")
    half = fused_resnet.freeze(model, x, dtype=torch.bfloat16)
    assert {row.problem.dtype for row in explain(half, x).rows} == {torch.bfloat16}


def test_measured_times_are_those_of_the_calls(monkeypatch):
    """A clock that only the slow backend moves."""
    now = [0.0]
    real = backends.known("conv_bn_act")["cpu_pass"]

    def run(problem, operands, **options):
        now[0] += 7.0 if problem.has_residual else 3.0
        return real.run(problem, operands, **options)

    monkeypatch.setattr("fused_resnet.explaining.calls._now_us", lambda device: now[0])
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "cpu_pass", real._replace(run=run))
    found = explain(networks.single(), torch.randn(2, 16, 9, 9), measure=True)
    assert [row.time_us for row in found.rows] == [3.0, 3.0, 7.0] and found.totals["time_us"] == 13.0


def test_why_not_is_the_backends_own_sentence():
    for chosen in ("cpu_pass", "eager"):
        for row in explain(fused_resnet.fuse(networks.single(), backend=chosen), torch.randn(2, 16, 9, 9)).rows:
            others = backends.known("conv_bn_act")
            assert set(row.why_not) == set(others) - {chosen}
            for name, why in row.why_not.items():
                reason = others[name].why_not(row.problem)
                assert why == reason or reason is None and why.startswith("it could run this, but")


def test_a_backend_asked_for_by_name():
    found = explain(fused_resnet.fuse(networks.single(), backend="eager"), torch.randn(2, 16, 9, 9))
    assert {row.source for row in found.rows} == {choice.BY_NAME}
    found = explain(fused_resnet.fuse(networks.single(), backend="cuda"), torch.randn(2, 16, 9, 9))
    reason = "cuda was asked for by name and cannot run this: it runs on NVIDIA GPUs, the tensors are on cpu"
    assert {(row.backend, row.source) for row in found.rows} == {(None, reason)}
    assert {row.why_not["eager"] for row in found.rows} == {"it could run this, but cuda was asked for by name"}


def test_a_measured_choice_shows_its_config_and_where_it_is_from(monkeypatch):
    eager, source = backends.known("conv_bn_act")["eager"], "configs/this_cpu.json, tuned for batch 2"
    chosen = choosing.Selection(eager, backends.EagerConfig("NCHW"), source)
    monkeypatch.setattr(choosing, "select", lambda problem, backend, **where: chosen)
    found = explain(networks.single(), torch.randn(2, 16, 9, 9))
    assert {(row.backend, row.source, row.config["layout"]) for row in found.rows} == {("eager", source, "NCHW")}
    assert f"eager: 3 of 3: {source}" in str(found) and found.as_dict()["rows"][0]["config"] == {"layout": "NCHW"}


class Patched(BasicBlock):
    """A subclass with a forward of its own that torch.fx cannot follow."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_what_is_left_alone_and_why():
    model = nn.Sequential(networks.single(), networks.randomize(Patched(8, 8)), nn.Conv2d(8, 4, 1))
    found = explain(model, torch.randn(2, 16, 9, 9))  # control flow that reads values: fake tensors cannot follow
    assert [row.name for row in found.rows if row.backend is None] == ["1.conv1", "1.conv2", "2"]
    (entry,) = [entry for entry in found.left_alone if entry.name == "1"]
    assert "torch.fx cannot trace its forward" in entry.reason
    assert found.rows[3].source == entry.reason
    assert "nothing that could be fused follows it" in found.rows[-1].source
    assert f"left alone: 1: {entry.reason}" in str(found)


class Batchwise(nn.Module):
    """A norm that uses the statistics of the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.batch_norm(self.conv(x), None, None, training=True)


def test_a_frozen_convolution_without_its_norm_is_named():
    model = nn.Sequential(Batchwise(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 6, 6)
    found = explain(fused_resnet.freeze(model, x), x)
    names = [row.name for row in found.rows]
    reasons = dict(found.left_alone)
    assert names == ["0.conv", "1"] == list(reasons)
    assert reasons["0.conv"].startswith("without its norm: its batch_norm uses the batch's statistics")
    assert reasons["1"] == "without its norm: the BatchNorm2d keeps no running statistics"


def test_other_convolutions_have_no_row():
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 2), nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.Conv1d(8, 2, 3))
    assert [row.name for row in explain(model, torch.randn(1, 4, 6, 6)).rows] == ["1"]


def test_many_left_alone_for_one_reason_are_one_line():
    model = nn.Sequential(*(networks.randomize(Patched(8, 8)) for _ in range(5)))
    (line,) = [line for line in str(explain(model, torch.randn(2, 8, 5, 5))).splitlines() if "left alone" in line]
    assert line.startswith("left alone: 0, 1, 2 and 2 more: torch.fx cannot trace its forward")


def test_a_child_that_was_hooked_after_fusing():
    block = fused_resnet.fuse(networks.single())
    block.conv1.register_forward_hook(lambda *_: None)
    rows = {row.name: row for row in explain(block, torch.randn(2, 16, 9, 9)).rows}
    assert rows["conv1"].backend is None and rows["conv1"].source == "Conv2d has hooks"


def test_names_survive_autocast_and_compile():
    model, x = fused_resnet.fuse(networks.single()), torch.randn(2, 16, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        rows = explain(model, x).rows
    assert [row.name for row in rows] == [name for name, _ in BLOCK]
    assert {row.problem.dtype for row in rows} == {torch.bfloat16}
    assert explain(torch.compile(model), x).rows == explain(model, x).rows


class Detector(nn.Module):
    """Takes a list of images, which torch.fx cannot trace as a whole."""

    def __init__(self):
        super().__init__()
        self.backbone = networks.single()

    def forward(self, images):
        if isinstance(images, torch.Tensor):
            raise TypeError("a list is wanted")
        return [self.backbone(image) for image in images]


def test_examples_that_are_no_tensor():
    images = [torch.randn(2, 16, 9, 9), torch.randn(2, 16, 5, 7)]
    names = [f"backbone.{name}" for name, _ in BLOCK]
    assert [row.name for row in explain(Detector().eval(), images).rows] == names * 2
    frozen = fused_resnet.freeze(Detector().eval(), images)
    found = explain(frozen, images)
    assert sorted(row.name for row in found.rows) == sorted(names * 2)
    assert {row.problem.H for row in found.rows if row.name == "backbone.conv1"} == {9, 5}


def test_printed_and_as_json():
    found = explain(networks.single(), torch.randn(2, 16, 9, 9))
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [row["name"] for row in record["rows"]] == [name for name, _ in BLOCK]
    assert sum(row["share"] for row in record["rows"]) == pytest.approx(1)
    assert record["rooflines"] == {"float32": {"gb_per_s": 10.0, "tflops": 0.1}}
    for key in ("bytes_moved", "bytes_least", "bytes_unfused", "flops", "least_us"):
        assert record["totals"][key] == pytest.approx(sum(row[key] for row in record["rows"]))
    assert record["totals"]["time_us"] is None
    lines = str(found).splitlines()
    assert "plain, shown as fused_resnet.fuse would make it; input 2x16x9x9 float32 on cpu; 3 convolutions" in lines[0]
    assert [line.split()[0] for line in lines[4:8]] == ["conv1", "downsample.0", "conv2", "all"]
    assert f"cpu_pass: 3 of 3: {choice.FIXED_ORDER}" in lines
    assert any(line.startswith("not onednn: 3 of 3: it takes only a bias") for line in lines)


def test_a_model_without_convolutions():
    found = fused_resnet.explain(nn.Linear(3, 2), torch.randn(4, 3))
    assert found.rows == () and found.rooflines == {} and "0 convolutions" in str(found)
    json.dumps(found.as_dict())


@pytest.mark.parametrize(
    "model, example, error, message",
    (
        (torch.relu, torch.ones(1), TypeError, "explain: expected an nn.Module, got builtin"),
        (networks.single(), "picture.png", TypeError, "explain: example_input must hold a tensor, got str"),
        (networks.single(), torch.ones(2, 16, 9, 9, device="meta"), TypeError, "is on meta but the model is on cpu"),
        (
            networks.single(),
            torch.ones(2, 5, 9, 9),
            ValueError,
            "explain: the model cannot take 2x5x9x9 float32 on cpu: ",
        ),
    ),
    ids=("no module", "no tensor", "device", "shape"),
)
def test_bad_input(model, example, error, message):
    with pytest.raises(error, match=message):
        explain(model, example)


def test_roofline_is_measured_once(monkeypatch):
    measured = []

    def interleaved(calls, **_):
        measured.append(list(calls))
        return dict.fromkeys(calls, timing.Stats(1.0, 1.0, 1.0, 1.0, 1))

    monkeypatch.setattr(rooflines, "interleaved", interleaved)
    rooflines.roofline.cache_clear()
    for _ in range(2):
        fused_resnet.explain(networks.single(), torch.randn(2, 16, 9, 9))
    rooflines.roofline.cache_clear()
    assert measured == [["copy", "matmul"]]


class _Functions(nn.Module):
    """Convolutions whose weight is an attribute, is computed, and is that of a transposed one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        x = F.conv2d(F.conv2d(x, self.conv.weight, self.conv.bias), self.weight * x.mean())
        return torch.convolution(x, self.weight, None, (1, 1), (0, 0), (1, 1), True, (0, 0), 1)


@pytest.mark.parametrize("form", ("itself", "exported"))
def test_convolutions_that_are_called_as_functions_are_named(form):
    model, x = _Functions().eval(), torch.randn(1, 3, 9, 9)
    if form == "exported":
        model = torch.export.export(model, (x,)).module()
    explanation = explain(fused_resnet.freeze(model, x), x)
    assert [row.name for row in explanation.rows] == ["conv"]
    (computed, reason), (transposed, other_reason) = explanation.left_alone
    assert computed.startswith("conv2d") and reason == "its weight or bias is computed"
    assert transposed.startswith("conv") and other_reason == "it is transposed"


def test_pruned_weights_are_explained_too():
    """A pruned weight has a history, which deepcopy refuses, and is made anew in each call, so it has no name."""
    model, x = networks.single(), torch.randn(2, 16, 9, 9)
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    assert sorted(row.name for row in explain(model, x).rows) == ["conv2", "convolution 1", "downsample.0"]
    assert not model.conv1.weight.is_leaf  # and the model is as it was


def test_a_measured_choice_says_against_what_when_and_what_was_wrong(tuned_files):
    """And who was not chosen says why: slower, or wrong on this machine."""
    model, x = models.create("resnet20").eval(), torch.randn(2, 3, 32, 32)
    frozen = fused_resnet.freeze(model, x)
    first = explain(frozen, x).rows[0].problem
    found = entry("eager", "2026-11-30T06:00:00+00:00", eager=(None, 10.0), onednn=(None, 12.5))
    tuned_files.add(tuned_files.user, first, found)
    wrong = winners.checks_of(first, {"winograd": {"error_ratio": 3.0}, "grouped": {"why": "it ended the process"}})
    winners.keep(winners.Table.empty(tuned_files.device)._replace(checks=wrong))
    explanation = explain(fused_resnet.freeze(model, x), x)
    row = explanation.rows[0]
    assert row.problem == first and row.backend == "eager"
    assert row.measured.when == found.run and row.measured.times_us == {"eager": 10.0, "onednn": 12.5}
    assert "slower when both were measured (2026-11-30)" in row.why_not["onednn"]
    if backends.known("conv_bn_act")["winograd"].why_not(first) is None:
        assert row.why_not["winograd"] == "it is wrong here: its error is 3 times what is allowed"
    text = str(explanation)
    assert "10  onednn 12" in text.replace("      ", "  ").replace("    ", "  ")
    assert f"wrong here, and never chosen: grouped on {first}: it ended the process" in text
    assert explanation.as_dict()["rows"][0]["measured"]["batch"] == 2
    assert json.loads(json.dumps(explanation.as_dict())) == explanation.as_dict()
