"""cpu-check: its random convolutions and networks, its threads, its memory, and what its tables make of a row."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from benchmarks import random_problems
from benchmarks.cpu_check import __main__ as cpu_check
from benchmarks.cpu_check import accuracy, cores, footprint, networks, problems, soak, tables
from benchmarks.data import trained
from fused_resnet import backends, measuring
from fused_resnet.choosing import winners
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.kernels import compiled
from fused_resnet.measuring import Record
from fused_resnet.measuring import agreement as measuring_agreement
from fused_resnet.measuring import networks as measured_networks
from fused_resnet.regions import kernels
from tests.support.networks import small
from tests.support.quantized import by_reference

needs_kernels = pytest.mark.skipif(compiled.load("cpu") is not None, reason=str(compiled.load("cpu")))


# ------------------------------------------------------------------------------------------------ random convolutions


@needs_kernels
def test_random_convolutions_agree_by_every_kernel():
    here = problems.kernels_here()
    report = problems.verify(6, 11, here)
    assert report.passed, str(report)
    assert {name: entry.ok for name, entry in report.backends.items()} == {f"region/{name}": 6 for name in here}


@needs_kernels
@pytest.mark.parametrize("what", ["weights", "bias", "activation"])
def test_a_wrong_convolution_is_found(monkeypatch, what):
    """One that takes something else for one of its operands, or another activation."""
    drawn = next(d for d in (problems.drawn_at(0, i) for i in range(99)) if d.N and d.has_bias)
    region_of = problems.region_of

    def other(drawn, tensors, dtype):
        if what == "activation":
            return region_of(drawn._replace(activation="relu"), tensors, dtype)
        value = getattr(tensors, what)
        changed = [one * 1.5 for one in value] if what == "weights" else value * 1.5
        return region_of(drawn, tensors._replace(**{what: changed}), dtype)

    monkeypatch.setattr(problems, "region_of", other)
    found = list(problems.outcomes(drawn._replace(activation="none"), problems.kernels_here()))
    assert found and all(one.status == "mismatch" and "times what is allowed" in one.detail for one in found)


def test_what_is_expected_of_two_inputs():
    drawn = next(d for d in (problems.drawn_at(0, i) for i in range(99)) if d.N and len(d.windows) == 2)
    drawn = drawn._replace(activation="none")
    tensors = problems.tensors_of(drawn, torch.float32)
    expected, bound = problems.expected_and_bound(drawn, tensors)
    summed = sum(
        F.conv2d(x.double(), weight.double(), None, window.stride, window.padding, window.dilation)
        for x, weight, window in zip(tensors.xs, tensors.weights, drawn.windows)
    )
    for extra in (tensors.bias if tensors.bias is None else tensors.bias.view(-1, 1, 1), tensors.residual):
        summed = summed if extra is None else summed + extra.double()
    torch.testing.assert_close(expected, summed)
    assert bound.shape == expected.shape and (bound > 0).all() and (bound < 1e-3 * drawn.magnitude).all()


def test_the_draw_has_what_it_promises():
    drawn = [problems.drawn_at(3, index) for index in range(300)]
    assert {d.N for d in drawn} == {0, 1, 2, 3, 4, 5}
    assert {d.residual for d in drawn} == {"", "added", "in place"}
    assert {d.activation for d in drawn} == set(problems.ACTIVATIONS)
    assert sum(len(d.windows) == 2 for d in drawn) > 50
    assert any(max(w.stride) > 1 and max(w.dilation) > 1 for d in drawn for w in d.windows)
    assert drawn[7] == problems.drawn_at(3, 7) != problems.drawn_at(4, 7)


# --------------------------------------------------------------------------------------------------- random networks


def test_random_networks_agree_and_have_regions():
    report = networks.verify(2, 1)
    assert report.passed, str(report)
    assert {name.split(",")[0] for name in report.backends} == {"network/fp32", "network/bf16"}
    if compiled.load("cpu") is None and kernels.fastest(torch.float32) is not None:
        assert report.backends["network/fp32, all regions, regions"].ok > 0


def test_a_wrong_network_is_found(monkeypatch):
    class Wrong(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.frozen = frozen

        def plans(self):
            return self.frozen.plans()

        def forward(self, x):
            y = self.frozen(x)
            return y * 1.2 if isinstance(y, torch.Tensor) else (*y[:-1], y[-1] * 1.2)

    freeze = networks.freeze
    monkeypatch.setattr(networks, "freeze", lambda *args, **options: Wrong(freeze(*args, **options)))
    report = networks.verify(1, 0)
    assert not report.passed
    assert all(len(entry.mismatches) == 1 for entry in report.backends.values())


# ---------------------------------------------------------------------------------------------------------- in parts


def test_parts_are_those_of_the_sources(tmp_path, monkeypatch):
    def run_part(file, count, seed, device, kind):
        asked.append((kind, seed))
        random_problems.files.write_json(file, networks.verify(0, seed).as_dict() | {"problems": count})

    asked, out = [], tmp_path / "record.json"
    monkeypatch.setattr(random_problems, "run_part", run_part)
    arguments = ["--kind", "networks", "--device", "cpu", "--problems", "4", "--per-part", "2", "--seed", "1",
                 "--parts", str(tmp_path), "--out", str(out)]  # fmt: skip
    assert random_problems.main(arguments) == random_problems.main(arguments) == 0
    assert asked == [("networks", 1), ("networks", 2)]
    monkeypatch.setattr(random_problems, "engine_digest", lambda: "other")
    assert random_problems.main([*arguments, "--stop-after", "0"]) == 0
    assert asked[2:] == [("networks", 1)] and json.loads(out.read_text())["left"] == 2
    with pytest.raises(SystemExit):
        random_problems.main([*arguments, "--device", "cuda"])


@pytest.mark.full
@pytest.mark.parametrize("kind", random_problems.ENGINE)
def test_a_part_is_a_process_of_its_own(tmp_path, kind):
    file = tmp_path / "part.json"
    assert random_problems.run_part(file, 1, 4, "cpu", kind) is None
    assert json.loads(file.read_text())["problems"] == 1


# -------------------------------------------------------------------------------------------------- threads and cores


def test_a_wrong_byte_of_one_call_is_counted():
    images = [torch.ones(1), torch.full((1,), 2.0)]
    found = soak.soaked(lambda x: x * 2, images, 3, 0.05)
    assert (found["callers"], found["wrong"], found["raised"]) == (3, 0, []) and found["calls"] >= 3
    calls = iter(range(10**9))
    found = soak.soaked(lambda x: x * 2 + (2**-21 if next(calls) == 3 else 0), images, 2, 0.05)
    assert found["wrong"] == 1


def test_what_a_caller_raises_is_kept():
    calls = iter((0, 1))
    found = soak.soaked(lambda x: x + next(calls) if x.sum() < 9 else x, [torch.zeros(1)] * 2, 1, 0.01)
    assert found["raised"] == ["StopIteration: "]


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with cores.threads(before + 2):
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


def test_processors_of_one_core_come_last(tmp_path):
    for processor, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert cores.apart([0, 1, 2, 3], tmp_path) == [0, 1, 2, 3]
    assert cores.apart([0, 2, 3], tmp_path) == [0, 3, 2]
    assert cores.apart([5, 6], tmp_path) == [5, 6]


def test_more_threads_than_processors_are_refused(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(ValueError, match="2 threads need as many processors, and this process may use 1"):
        cores.keep_to(2)


# ------------------------------------------------------------------------------------------------------------- memory


def test_tensors_of_finds_each_storage_once():
    weight, bound, kept = torch.zeros(4), torch.zeros(3), torch.zeros(2)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.again, self.pool = weight, [weight[:2]], {"of": (kept,)}
            self.call = lambda: bound

    found = list(footprint.tensors_of(Module()))
    assert {tensor.untyped_storage().data_ptr() for tensor in found} == {t.data_ptr() for t in (weight, bound, kept)}
    assert len(found) == 3 and footprint.held_bytes([Module()]) == (4 * 9, 0)


def test_the_peak_of_a_call():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second, torch.ones(10)

    assert 8000 <= footprint.peak_bytes(call) < 9000


def test_what_is_too_much():
    row = {"activations": 0.7, "weights": 1.0, "freeze_s": math.nan}
    assert footprint.missed(row) == ["activations 0.70 > 0.6", "freeze_s nan > 3.0"]


# ------------------------------------------------------------------------------------------------------------- tables


def row_of(dtype="bf16", batch=1, threads=1, wrong=(), model="resnet50", **ms):
    names = {"without": f"frozen {dtype} without regions"}
    variants = {names.get(name, f"{name} {dtype}"): {"median_us": 1e3 * value} for name, value in ms.items()}
    name = f"{model} {dtype} batch {batch}"
    return {"problem": name, "model": model, "dtype": dtype, "batch": batch, "threads": threads,
            "variants": variants, "skipped": {}, "wrong": dict(wrong)}  # fmt: skip


@pytest.mark.parametrize(
    "row, ratio, required, verdict",
    [
        (row_of(frozen=8, openvino=14), 1.75, 1.6, tables.OK),
        (row_of(frozen=10, openvino=14), 1.4, 1.6, tables.MISSED),
        (row_of("fp32", 8, frozen=10, openvino=14, onnxruntime=11), 1.1, 1.15, tables.MISSED),  # the better of both
        (row_of("fp32", frozen=10, onnxruntime=10), 1.0, 1.0, tables.OK),
        (row_of(frozen=10), None, 1.6, tables.NO_RIVAL),
        (row_of(openvino=10), None, 1.6, tables.MISSED),
        (row_of(openvino=10, wrong={"frozen bf16": "its error is 1"}), None, 1.6, tables.WRONG),
        (row_of("fp32", frozen=10, onnxruntime=5, openvino=20, wrong={}), 0.5, 1.0, tables.MISSED),
        (row_of(threads=2, frozen=10, openvino=17), 1.7, 1.62, tables.OK),
        (row_of(threads=2, frozen=10, openvino=16), 1.6, 1.62, tables.MISSED),
        (row_of(batch=8, threads=2, frozen=10, openvino=16), 1.6, None, tables.NOT_ASKED),
        (row_of("int8", frozen=5, openvino=11, onnxruntime=4), 2.2, 2.0, tables.OK),  # over OpenVINO alone
        (row_of("int8", 8, frozen=5, openvino=6), 1.2, 1.4, tables.MISSED),
        (row_of("int8", model="resnet18", frozen=5, openvino=4), 0.8, None, tables.NOT_ASKED),
    ],
)
def test_a_row_is_judged(row, ratio, required, verdict):
    one_thread = {"resnet50 bf16 batch 1": 1.8}
    judged = tables.judged("resnet50", row, True, one_thread)
    assert judged["verdict"] == verdict
    for name, value in (("ratio", ratio), ("required", required)):
        assert judged[name] == (value if value is None else pytest.approx(value)), name


def test_without_amx_less_is_asked_of_bf16_and_more_of_fp32():
    asked = {key: tables.required(row_of(*key), False, {}) for key in tables.REQUIRED[True]}
    in_int8 = {("int8", 1): 1.1, ("int8", 8): 1.1}
    assert asked == {("bf16", 1): 1.1, ("bf16", 8): 1.1, ("fp32", 1): 1.1, ("fp32", 8): 1.2, **in_int8}


def test_the_other_table_asks_for_what_we_had():
    slower = tables.judged("networks", row_of(frozen=10, without=9.5, openvino=5), True, {})
    assert slower["verdict"] == tables.MISSED and slower["ratio"] == pytest.approx(0.95)
    assert tables.judged("networks", row_of(frozen=10, without=9.8, openvino=5), True, {})["verdict"] == tables.OK
    assert tables.losses(slower, tables.TABLES["networks"].columns) == [
        "resnet50 bf16 batch 1: 0.95x of frozen without regions", "resnet50 bf16 batch 1: 0.50x of openvino",
    ]  # fmt: skip


def test_the_table_lists_what_is_wrong_missing_and_left():
    row = row_of(frozen=8, openvino=14, wrong={"onnxruntime bf16": "its error is 0.5, and 0.1 is allowed"})
    row["skipped"]["compile bf16"] = "no compiler"
    record = Record.here("cpu-check table", "cpu")._replace(
        rows=[tables.judged("resnet50", row, True, {})], left=["b", "c"], broken={"c": "it raised"}
    )
    text = tables.markdown("resnet50", record)
    assert (
        "| resnet50 | bf16 | 1 | 1 | 8.0 | 14.0 | wrong: its error is 0.5, and 0.1 is allowed | 1.75 | 1.60 | ok |"
        in text
    )
    assert "Wrong, and not timed: resnet50 bf16 batch 1: onnxruntime bf16, its error is 0.5" in text
    assert "Not measured: c: it raised." in text and "Left for want of time: b." in text and "Losses: none." in text
    assert tables.cell(row, "compile") == "no compiler" and tables.cell(row, "tensorrt") == "missing"


def test_a_wrong_rival_is_listed_and_not_timed(monkeypatch):
    """And one that rounds as the plain model does is timed."""
    model, x = small(), (1, 3, 9, 9)
    made = measured_networks.variant_builders

    def with_rivals(model, x, **options):
        builders = made(model, x, **options)
        frozen = fused_resnet.freeze(model, x, tune=False)
        builders["openvino fp32"] = lambda: lambda: frozen(x) * 1.001
        builders["onnxruntime fp32"] = lambda: lambda: frozen(x) * torch.nan
        return builders

    monkeypatch.setattr(measured_networks, "variant_builders", with_rivals)
    dtypes = [torch.float32, torch.bfloat16]
    subject = measuring.NetworkSubject("small", model, x, "cpu", dtypes, ("folded",), (), only_right=True)
    row = subject.measured(1, rounds=1)
    assert set(row["variants"]) == {"eager NCHW fp32", "folded fp32", "folded bf16"}
    assert "its error is 0.001, and" in row["wrong"]["openvino fp32"] and len(row["wrong"]) == 2
    assert "not finite" in row["wrong"]["onnxruntime fp32"]
    assert "wrong" not in subject._replace(only_right=False).measured(1, rounds=1)


def test_how_wrong_a_variant_may_be():
    eps = torch.finfo(torch.float32).eps
    assert measured_networks.most_error(torch.float32, 0.0) == 20 * eps
    assert measured_networks.most_error(torch.float32, None) == pytest.approx(0.004)
    assert measured_networks.most_error(torch.bfloat16, 0.01) == pytest.approx(0.04)
    assert measured_networks.most_error(torch.bfloat16, math.inf) == pytest.approx(0.4)


def test_a_table_of_a_small_network(tmp_path, monkeypatch, capsys):
    asked, bars, out = [], tables.bars, tmp_path / "table.json"
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    monkeypatch.setattr(tables, "keep_to", asked.append)
    monkeypatch.setattr(tables, "bars", lambda options: [bar._replace(baselines=()) for bar in bars(options)])
    monkeypatch.setitem(tables.MODELS, "resnet18", small)
    arguments = ["networks", "--model", "resnet18", "--dtype", "fp32", "--size", "9", "--rounds", "1"]
    code = tables.main([*arguments, "--budget", "1", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert asked == [1] and row["verdict"] in (tables.OK, tables.MISSED) and code == (row["verdict"] == tables.MISSED)
    assert set(row["variants"]) == {"eager NCHW fp32", "frozen fp32", "frozen fp32 without regions"}
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out
    assert tables.ratios_in(out) == {row["problem"]: row["ratio"]} and tables.ratios_in(tmp_path / "none.json") == {}


# ---------------------------------------------------------------------------------------------------- before regions


@needs_kernels
def test_plans_as_before_there_were_regions(monkeypatch):
    model, x = small(), torch.randn(1, 3, 9, 9)
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")

    def regions():
        frozen = fused_resnet.freeze(model, x)
        return sum(isinstance(module, FrozenRegion) for module in frozen.plans()[0].modules())

    with networks.with_all_regions():
        assert regions() > 0
        folder = winners.user_folder()
        with measuring.as_before_regions():
            assert regions() == 0 and winners.user_folder() != folder
            assert "blocked" not in backends.known("conv_bn_act")
        assert regions() > 0 and winners.user_folder() == folder


# ------------------------------------------------------------------------------------------------------------- steps


def test_records_lie_by_processor_and_instructions():
    intel, amd = "Intel(R) Xeon(R) Processor", "AMD EPYC 9R14 96-Core Processor @ 3.7GHz"
    assert cpu_check.folder_of(intel, ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]) == "intel-xeon-amx"
    assert cpu_check.folder_of(amd, ["avx2", "avx512f", "avx512_bf16"]) == "amd-epyc-9r14-avx512-bf16"
    assert cpu_check.folder_of(amd, ["avx2"]) == "amd-epyc-9r14-avx2"
    assert cpu_check.folder_of("aarch64", ["asimd"]) == "aarch64-portable"


def test_steps_and_their_records(tmp_path, monkeypatch, capsys):
    ran = []

    def execute(command, seconds, log):
        ran.append([str(part) for part in command[1:]])
        return cpu_check.Result(cpu_check.PASSED, "1 passed")

    monkeypatch.setattr(cpu_check, "execute", execute)
    monkeypatch.setattr(cpu_check, "cores", lambda: 1)
    assert cpu_check.main(["--out", str(tmp_path), "--problems", "7", "--only", "regions,resnet50-1,resnet50-2"]) == 0
    regions, table = ran
    assert regions[regions.index("--problems") + 1] == regions[regions.index("--per-part") + 1] == "7"
    assert table[table.index("--out") + 1] == str(tmp_path / "resnet50_1_thread.json") and "--resume" in table
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["kind"] == "cpu-check" and "verified" not in record
    assert {name: step["outcome"] for name, step in record["steps"].items()} == {
        "regions": "passed", "resnet50-1": "passed", "resnet50-2": "not run",
    }  # fmt: skip
    assert cpu_check.main(["--out", str(tmp_path), "--only", "speed"]) == 2
    assert "unknown step speed; known ones are rest, environment" in capsys.readouterr().err


def test_every_table_is_a_step(tmp_path):
    setup = cpu_check.Setup(tmp_path, problems=1, networks=1, sanitized=1, soak_s=1.0, row_s=1.0)
    steps = {step.name for step in cpu_check.all_steps(setup)}
    assert {f"{name}-1" for name in tables.TABLES} <= steps


def test_evidence_is_more_of_everything():
    little, much = (cpu_check.parse_arguments(arguments) for arguments in ([], ["--evidence"]))
    assert (little.problems, little.networks, little.sanitized, little.soak) == (300, 50, 30, 10.0)
    assert (much.problems, much.networks, much.sanitized, much.soak) == (20_000, 2_000, 300, 600.0)
    assert cpu_check.parse_arguments(["--evidence", "--problems", "5"]).problems == 5


def test_accuracy_without_weights_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "FOLDER", tmp_path)
    assert cpu_check.main(["--out", str(tmp_path), "--only", "accuracy"]) == 0
    step = json.loads((tmp_path / "check.json").read_text())["steps"]["accuracy"]
    assert (
        step["outcome"] == "not run" and "needs cifar10/resnet20-12fca82f.th under $FUSED_RESNET_DATA" in step["detail"]
    )
    assert accuracy.main(["--out", str(tmp_path / "accuracy.json")]) == 0
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["skipped"]) == 12


# ----------------------------------------------------------------------------------------------------------- accuracy


@pytest.fixture
def a_network(monkeypatch):
    """A network of random weights in the place of the trained ones."""
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    by_reference(monkeypatch)
    torch.manual_seed(0)
    model, inputs = small(), torch.randn(40, 3, 9, 9)
    with torch.no_grad():
        images = accuracy.Images(inputs, model(inputs).argmax(1))

    def made(count):
        return accuracy.Images(*(values[:count] for values in images))

    network = accuracy.Network(lambda: model, made, lambda: (inputs[:16], torch.arange(16, 40)), 10, accuracy.CIFAR)
    monkeypatch.setattr(accuracy, "NETWORKS", {"small": network})
    accuracy.plain_logits.cache_clear()
    yield model
    accuracy.plain_logits.cache_clear()


def test_accuracy_of_a_small_network(a_network, tmp_path, monkeypatch):
    noise = [1e-4]
    monkeypatch.setattr(accuracy, "by_nncf", lambda model, *_: lambda x: model(x) * (1 + noise[0]))
    out = tmp_path / "accuracy.json"
    assert accuracy.main(["--network", "small", "--out", str(out)]) == 1
    exact, rough, quantized = json.loads(out.read_text())["rows"]
    assert (exact["images"], exact["changed"], exact["missed"], exact["top1"]) == (40, 0, [], 1.0)
    assert exact["sqnr_db"] > 90 > rough["sqnr_db"] > 30 and "nncf" not in rough
    assert (quantized["images"], quantized["calibration_images"]) == (24, 16)
    assert (
        quantized["nncf"]["sqnr_db"] == pytest.approx(80, abs=0.1)
        and "NNCF's default 80.0 dB" in quantized["missed"][-1]
    )
    noise[0] = 0.5
    assert accuracy.main(["--network", "small", "--dtype", "int8", "--out", str(out)]) == bool(quantized["missed"][:-1])
    (ahead,) = json.loads(out.read_text())["rows"]
    assert ahead["missed"] == quantized["missed"][:-1]
    assert "| 24 | 100.00 | " in out.with_suffix(".md").read_text()


def test_accuracy_goes_on_with_its_rows(a_network, tmp_path, monkeypatch):
    out, measured = tmp_path / "accuracy.json", []
    of_subject = accuracy.Subject.measured
    monkeypatch.setattr(
        accuracy.Subject, "measured", lambda self, *args: measured.append(self.name) or of_subject(self, *args)
    )
    arguments = ["--network", "small", "--out", str(out), "--resume", "--dtype"]
    for dtypes in (["fp32"], ["fp32", "bf16"]):
        accuracy.main([*arguments, *dtypes])
    assert measured == ["small fp32", "small bf16"]


def test_what_accuracy_misses():
    found = measuring_agreement.Agreement(10_000, 0.92, 1.0, 0.9165, 1.0, 101, 28.9)
    assert accuracy.CIFAR["int8"].missed(found) == [
        "top-1 differs by +0.35 points, more than 0.3", "1.01 % changed, more than 1 %", "28.9 dB, less than 29",
    ]  # fmt: skip
    assert accuracy.CIFAR["int8"].missed(found._replace(fast_top1=0.917, changed=100, sqnr_db=29.0)) == []
    assert accuracy.IMAGENET["fp32"].missed(found._replace(changed=1)) == ["0.01 % changed, more than 0 %"]


def test_images_a_second_beside_mlperfs():
    (line,) = tables.beside_mlperf([row_of("int8", 8, threads=2, frozen=20.0), row_of("bf16", frozen=8.0)])
    assert "int8: 200 at batch 8." in line and "198 by two Xeon Platinum 8592+ (v4.0), 180 by two Xeon 6980P" in line
    assert tables.beside_mlperf([row_of("int8", openvino=8.0), row_of("int8", model="resnet18", frozen=2.0)]) == []


def test_networks_whose_maps_are_zero_and_whose_sums_are_long_are_right():
    """A stage of ReLUs that give nothing but 0; and one where torch's sums in blocks are the more exact ones."""
    for seed, index in ((2027, 40), (2010, 5)):
        found = dict(networks.outcomes(networks.drawn_at(seed, index)))
        assert len(found) == 4 and all(one.status == "ok" for one in found.values()), found
