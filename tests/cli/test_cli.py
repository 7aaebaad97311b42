"""The command line: info, verify and bench with tiny settings, JSON, errors and exit codes.

explain has a file beside this one; tune and report are tested with what they call.
"""

import json
import os
import re
import subprocess
import sys
from typing import Callable, NamedTuple

import click
import pytest
import torch
from click.testing import CliRunner

import fused_resnet
from fused_resnet import measuring, testing
from fused_resnet.choosing import timing, winners, winners_file
from fused_resnet.cli import console, info, main
from fused_resnet.kernels import compiled, sources
from fused_resnet.machine import onednn
from fused_resnet.measuring import environment
from fused_resnet.operators import detours

TINY = ["--rounds", "1", "--device", "cpu"]
NO_PLACE = (str(sources.ROOT), os.uname().nodename)


def run(*arguments):
    return CliRunner().invoke(main.cli, [str(argument) for argument in arguments])


def json_of(*arguments, exit_code=0):
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return json.loads(result.stdout)


def check_environment(record, kind):
    assert record["kind"] == kind
    assert record["environment"]["torch"] == torch.__version__
    text = json.dumps(record)
    assert not any(place in text for place in NO_PLACE)


# --------------------------------------------------------------------------------------------------------------- info


def test_info_as_json():
    record = json_of("info")
    assert record["versions"]["fused_resnet"] == fused_resnet.__version__
    entries = {(entry["op"], entry["backend"], entry["device"]): entry for entry in record["backends"]}
    assert entries["conv_bn_act", "eager", "cpu"]["dtypes"]["float32"] is None
    assert entries["conv_bn_act", "onednn", "cpu"]["auto"] is True
    assert "NVIDIA" in entries["conv_bn_act", "cudnn", "cpu"]["dtypes"]["float16"]
    assert {"_C_cpu", "_C_cuda", "_host_checks", "_ptx"} <= set(record["parts"])
    assert record["provenance"]["sentence"].startswith("kernels ")


def test_info_holds_what_a_bug_report_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FUSED_RESNET_TUNED", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME_GROWN", "not of interest")
    winners.forget()
    entry = winners_file.Entry("eager", "onednn", "today", {"eager": winners_file.Measured(None, 5.0, 0.1)})
    name = winners.device_id("cpu")
    entries = {"64x56x56 -> 64, 1x1 float32 bias relu": {1: entry, 8: entry}}
    winners.merge(tmp_path / "tuning", winners_file.Table(name, entries, {"today": {}}, {}, {}))
    record = json_of("info")
    user = record["tuning"]["cpu"]["files"][-1]
    assert record["tuning"]["cpu"]["device"] == name and record["tuning"]["cpu"]["used"] is True
    assert (user["exists"], user["entries"], user["winners"]) == (True, 2, {"eager": 2})
    assert record["folders"]["cache"] == str(tmp_path) and record["packages"]["matplotlib"]
    assert record["variables"]["OMP_NUM_THREADS"] == "1" and "HOME_GROWN" not in record["variables"]
    assert record["commit"] == environment.environment()["commit"] and "parts" in record["build"]
    text = run("info").output
    assert "2 in " in text and "(eager 2)" in text and f"FUSED_RESNET_CACHE_DIR={tmp_path}" in text.replace("\n", "")
    winners.forget()


def test_info_does_not_name_the_user(monkeypatch):
    monkeypatch.setenv("HOME", str(sources.ROOT.parent))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(sources.ROOT / "triton"))
    record = json_of("info")
    assert record["folders"]["package"] == f"~/{sources.ROOT.name}/fused_resnet"
    assert record["variables"]["TRITON_CACHE_DIR"] == f"~/{sources.ROOT.name}/triton"


def test_info_for_people():
    result = run("info")
    assert result.exit_code == 0
    for expected in ("conv_bn_act", "auto: fp32", "_C_cuda", "Provenance: kernels", "oneDNN bf16"):
        assert expected in result.output
    if kernels := compiled.instruction_set():
        assert f"  C++ kernels: {kernels['name']} ({kernels['why']})\n" in result.output


def test_info_names_no_bf16_fault_where_onednn_has_no_bf16(monkeypatch):
    monkeypatch.setattr(onednn, "has_bf16", lambda: False)
    applying = [fault["what"] for fault in json_of("info")["library_faults"] if fault["applies"]]
    assert applying == [fault.what for fault in detours.FAULTS if not fault.needs_bf16] and len(applying) == 2
    assert not any("bf16" in what for what in applying)


def test_info_says_which_faults_of_libraries_apply(monkeypatch):
    monkeypatch.setattr(onednn, "has_bf16", lambda: True)
    amx = "stride is higher than the filter"
    for has_amx in (True, False):
        monkeypatch.setattr(onednn, "has_amx", lambda answer=has_amx: answer)
        found = {fault["what"]: fault for fault in json_of("info")["library_faults"]}
        assert [fault["applies"] for what, fault in found.items() if amx in what] == [has_amx]
        text = " ".join(run("info").output.split())
        assert (amx in text) is has_amx
        assert "(oneDNN issue 5942); instead: the windows are laid side by side" in text
    shown = [fault for fault in found.values() if fault["seen"] is not None]
    assert shown and all(f"({fault['source']}, {'' if fault['seen'] else 'not '}seen here)" in text for fault in shown)


def test_info_has_a_line_for_each_backend_and_a_reason_once(monkeypatch):
    """Both devices, nothing folded at 100 columns."""
    reasons = {"cpu": "it runs on NVIDIA GPUs, the tensors are on cpu", "cuda": "no library", "no": "not this dtype"}
    names = ("float32", "float16", "bfloat16", "float64")
    record = info.collect_info()
    record["backends"] = [
        {"op": "conv_bn_act", "backend": backend, "device": device, "auto": auto, "dtypes": dict(zip(names, values))}
        for backend, device, auto, values in (
            ("onednn", "cpu", True, (None, reasons["no"], None, reasons["no"])),
            ("onednn", "cuda", False, (reasons["cuda"],) * 4),
            ("cuda", "cpu", False, (reasons["cpu"],) * 4),
            ("cuda", "cuda", False, (None, None, reasons["no"], reasons["cuda"])),
            ("mixed", "cpu", False, (reasons["no"], reasons["no"], reasons["no"], reasons["cpu"])),
            ("mixed", "cuda", True, (None, None, None, None)),
        )
    ]
    monkeypatch.setattr(info, "collect_info", lambda: record)
    lines = run("info").output.splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines if line.startswith("  conv_bn_act")]
    assert rows == [
        ["conv_bn_act", "onednn", "auto: fp32, bf16; no: fp16, fp64 (1)", "no (2)"],
        ["conv_bn_act", "cuda", "no (3)", "fp32, fp16; no: bf16 (1), fp64 (2)"],
        ["conv_bn_act", "mixed", "no: fp32, fp16, bf16 (1), fp64 (3)", "auto: fp32, fp16, bf16, fp64"],
    ]
    assert [line for line in lines if re.match(r"\(\d\) ", line)] == [
        f"(1) {reasons['no']}", f"(2) {reasons['cuda']}", f"(3) {reasons['cpu']}",
    ]  # fmt: skip
    assert max(len(line.rstrip()) for line in lines if line.startswith("  conv_bn_act")) <= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_info_says_why_there_is_no_gpu():
    why = json_of("info")["devices"]["cuda"]["why"]
    assert why is not None and why in run("info").output


# ------------------------------------------------------------------------------------------------------------- verify


def test_verify_as_json():
    record = json_of("verify", "--problems", 6, "--seed", 3, "--device", "cpu", "--backend", "eager")
    assert record["passed"] is True and (record["problems"], record["seed"]) == (6, 3)
    assert sum(entry["ok"] for entry in record["backends"].values()) == 6
    assert set(record["backends"]) <= {"conv_bn_act/eager", "add_relu/eager"}


def test_verify_shows_what_did_not_run():
    result = run("verify", "--problems", 4, "--device", "cpu", "--backend", "eager", "--backend", "cudnn")
    assert "4 problems" in result.output and "it runs on NVIDIA GPUs" in result.output
    assert result.exit_code == 1 and "'cudnn' could not run any" in result.output


def test_verify_fails_on_a_mismatch(monkeypatch):
    wrong = lambda case, backend: testing.Outcome(backend, "mismatch", "got 1, expected 2", 3.0)  # noqa: E731
    monkeypatch.setattr(testing.report, "check", wrong)
    record = json_of("verify", "--problems", 2, "--device", "cpu", "--backend", "eager", exit_code=1)
    assert record["passed"] is False
    result = run("verify", "--problems", 2, "--device", "cpu", "--backend", "eager")
    assert result.exit_code == 1
    assert result.output.count("MISMATCH") == 2 and "got 1, expected 2" in result.output


# -------------------------------------------------------------------------------------------------------------- bench


def test_bench_ops(tmp_path):
    out = tmp_path / "ops.json"
    record = json_of("bench", "ops", "--model", "resnet20", "--batch", 2, "--out", out, *TINY)
    check_environment(record, "bench ops")
    assert json.loads(out.read_text()) == record and record["left"] == []
    rows = {op: [row for row in record["rows"] if row["op"] == op] for op in ("conv_bn_act", "add_relu")}
    assert len(rows["conv_bn_act"]) == 9 and sum(row["count"] for row in rows["conv_bn_act"]) == 19
    for row in rows["conv_bn_act"]:
        assert {"unfused", "eager folded", "onednn"} <= set(row["variants"])
        one = row["variants"]["onednn"]
        assert one["tflops"] == pytest.approx(row["gflop"] * 1e3 / one["median_us"], rel=1e-6)
        assert one["gb_per_s"] == pytest.approx(row["mbytes"] * 1e3 / one["median_us"], rel=1e-6)
        assert one["roofline_percent"] == pytest.approx(100 * row["least_us"] / one["median_us"])
        assert one["speedup"] == pytest.approx(row["variants"]["unfused"]["median_us"] / one["median_us"])
        assert 0 < one["error_ratio"] <= 1
        assert "NVIDIA" in row["skipped"]["cudnn"] and row["roofline"]["l2_gb_per_s"] is None
    contests = {(entry["variant"], entry["against"]) for entry in record["summary"]}
    assert {
        ("eager folded", "unfused"), ("onednn", "unfused"), ("onednn", "eager folded"), ("auto", "copy"),
        ("auto", "the best library kernel"),
    } <= contests  # fmt: skip


def test_bench_ops_adds_as_often_as_the_blocks_do():
    """A ResNet-20 has three stages of three blocks; each addition is held against a copy of as many bytes."""
    record = json_of("bench", "ops", "--model", "resnet20", "--batch", 2, *TINY)
    additions = [row for row in record["rows"] if row["op"] == "add_relu"]
    assert [(row["problem"], row["count"]) for row in additions] == [
        ("add_relu 2x16x32x32 float32", 3), ("add_relu 2x32x16x16 float32", 3), ("add_relu 2x64x8x8 float32", 3),
    ]  # fmt: skip
    assert all({"unfused", "copy", "cpu", "eager folded"} <= set(row["variants"]) for row in additions)
    assert all(one["error_ratio"] == 0 for row in additions for one in row["variants"].values())
    assert additions[0]["mbytes"] == pytest.approx(3 * 2 * 16 * 32 * 32 * 4 / 1e6) and additions[0]["gflop"] == 0


def test_models_batches_and_dtypes_share_one_table():
    """What two models have in common is measured once and counted for both; the first dtype and batch come first."""
    record = json_of("bench", "ops", "--model", "resnet20,resnet32", "--batch", "2,1", "--dtype", "fp32,bf16", *TINY)
    kinds = list(dict.fromkeys((row["dtype"], row["batch"]) for row in record["rows"]))
    assert kinds == [("fp32", 2), ("fp32", 1), ("bf16", 2), ("bf16", 1)]
    names = [row["problem"] for row in record["rows"]]
    assert len(set(names)) == len(names) == 4 * 12
    shared = next(row for row in record["rows"] if row["problem"] == "2x16x32x32 -> 16, 3x3 p1 float32 bias relu")
    assert shared["models"] == {"resnet20": 3, "resnet32": 5} and shared["count"] == 8
    places = {entry["where"] for entry in record["summary"] if entry["variant"] == "auto"}
    assert places == {"all", "add_relu", *(f"batch {batch}, {dtype}" for dtype, batch in kinds)}


class StubSubject(NamedTuple):
    name: str
    measured: Callable[..., dict]


def one_more_row(monkeypatch):
    """Let each call measure one subject; returns what was asked for in order."""
    asked = []

    def measured(subject, *_):
        asked.append(subject.name)
        row = {
            "op": subject.problem.op,
            "device": "cpu",
            "batch": 1,
            "dtype": "fp32",
            "models": {},
            "count": 1,
            "auto": "eager",
        }
        variants = {name: {"median_us": 1.0} for name in ("unfused", "eager folded")}
        return {**row, "variants": variants, "not_timed": {}, "failed": {}, "skipped": {}}

    monkeypatch.setattr(measuring.OperatorSubject, "measured", measured)
    return asked


def test_a_measurement_stops_and_goes_on(tmp_path, monkeypatch):
    asked, out = one_more_row(monkeypatch), tmp_path / "ops.json"
    command = ["bench", "ops", "--model", "resnet20", "--out", out, "--stop-after", 1e-9, *TINY]
    first = json_of(*command)
    assert (len(first["rows"]), len(first["left"])) == (1, 11) and json.loads(out.read_text()) == first
    second = json_of(*command, "--resume")
    assert second["rows"][0] == first["rows"][0] and (len(second["rows"]), len(second["left"])) == (2, 10)
    whole = json_of(*command[:-4], "--rounds", 1, "--device", "cpu", "--resume", "--stop-after", 1e9)
    assert len(whole["rows"]) == 12 == len(asked) == len(set(asked)) and whole["left"] == []
    assert json_of(*command, "--resume")["rows"] == whole["rows"] and len(asked) == 12  # nothing is left to do


def test_a_problem_that_raises_costs_the_others_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    row = {"op": "add_relu", "device": "cpu", "batch": 1, "dtype": "fp32", "models": {}, "count": 1,
           "auto": "eager", "variants": {}, "not_timed": {}, "failed": {}, "skipped": {}}  # fmt: skip
    subjects = [StubSubject("a", lambda *_: row), StubSubject("b", broken), StubSubject("c", lambda *_: row)]
    monkeypatch.setattr(measuring, "op_subjects", lambda *_, **__: subjects)
    command = ["bench", "ops", "--model", "resnet20", "--out", tmp_path / "ops.json", *TINY]
    record = json_of(*command, exit_code=1)
    assert [row["problem"] for row in record["rows"]] == ["a", "c"] and record["left"] == ["b"]
    assert record["broken"] == {"b": "RuntimeError: CUDA error: an illegal memory access"}
    assert json.loads((tmp_path / "ops.json").read_text()) == record


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda record: record["settings"].update(image=64), "another measurement (other image)"),
        (lambda record: record.update(kernels="edited since"), "another measurement (another kernels)"),
        (lambda record: record["environment"].update(torch="1.0"), "another measurement (another torch)"),
        (lambda record: record.pop("settings"), "no record to go on with (KeyError: 'settings')"),
    ],
)
def test_only_the_same_measurement_goes_on(tmp_path, monkeypatch, change, message):
    one_more_row(monkeypatch)
    out = tmp_path / "ops.json"
    command = ["bench", "ops", "--model", "resnet20", "--out", out, *TINY]
    record = json_of(*command)
    change(record)
    out.write_text(json.dumps(record))
    result = run(*command, "--resume")
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert json.loads(out.read_text()) == record


def test_resume_needs_a_file():
    assert "--resume needs --out" in run("bench", "ops", "--model", "resnet20", "--resume", *TINY).output


def test_bench_ops_for_people_lists_losses(monkeypatch):
    stats = {"median_us": 1.0, "min_us": 1.0, "p10": 1.0, "p90": 1.0, "samples": 1, "tflops": 1.0, "gb_per_s": 1.0}
    stats |= {"roofline_percent": 50.0, "error_ratio": 0.5}
    variants = {"unfused": {**stats, "speedup": 1.0}, "onednn": {**stats, "median_us": 4.0, "speedup": 0.25}}
    row = {
        "op": "conv_bn_act", "device": "cpu", "batch": 1, "dtype": "fp32", "models": {"resnet20": 1}, "count": 1,
        "roofline": {"gb_per_s": 1.0, "tflops": 1.0, "l2_gb_per_s": 2.0}, "auto": "onednn", "variants": variants,
        "skipped": {"cudnn": "no GPU"}, "not_timed": {"triton": 7.0}, "failed": {"cuda": "RuntimeError: broken"},
    }  # fmt: skip
    monkeypatch.setattr(measuring, "op_subjects", lambda *_, **__: [StubSubject("the problem", lambda *_: row)])
    result = run("bench", "ops", "--model", "resnet20", *TINY)
    assert result.exit_code == 1  # triton is wrong
    for expected in ("0.25x LOSS", "LOSS 0.25x the problem", "1 lost", "WRONG", "RuntimeError: broken", "no GPU",
                     "onednn (auto)", "reading L2 2 GB/s"):  # fmt: skip
        assert expected in result.output


def test_bench_blocks(tmp_path):
    chart = tmp_path / "blocks.png"
    record = json_of(
        "bench", "blocks", "--model", "resnet20", "--dtype", "fp32", "--image", 16, "--chart", chart, *TINY
    )
    check_environment(record, "bench blocks")
    assert [row["problem"] for row in record["rows"]] == [
        "resnet20 layer1.2, BasicBlock 1x16x16x16", "resnet20 layer2.2, BasicBlock 1x32x8x8",
        "resnet20 layer3.2, BasicBlock 1x64x4x4",
    ]  # fmt: skip
    for row in record["rows"]:
        names = {"eager NCHW fp32", "eager NHWC fp32", "fused fp32", "folded fp32", "frozen fp32"}
        assert names <= set(row["variants"])
        assert ("compile fp32" in row["variants"]) != ("compile fp32" in row["skipped"])
        assert all(one["max_rel_error"] < 1e-4 for one in row["variants"].values())
    against = {entry["against"] for entry in record["summary"]}
    assert against <= {"eager NCHW fp32", "the best of compile in fp32"} and "eager NCHW fp32" in against
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_bench_model():
    record = json_of(
        "bench", "model", "--model", "resnet20", "--batch", "1,3", "--dtype", "fp32,bf16", "--threads", 1,
        "--baseline", "eager", "--baseline", "folded", "--baseline", "cudnn", *TINY,
    )  # fmt: skip
    check_environment(record, "bench model")
    assert record["environment"]["threads"] == 1
    assert [run["batch"] for run in record["runs"]] == [1, 3]
    for measured in record["runs"]:
        variants = measured["variants"]
        names = {f"{kind} {dtype}" for kind in ("eager NHWC", "folded", "frozen") for dtype in ("fp32", "bf16")}
        assert set(variants) == {"eager NCHW fp32"} | names
        assert variants["frozen fp32"]["max_rel_error"] < 1e-4 < variants["frozen bf16"]["max_rel_error"] < 0.3
        assert set(measured["skipped"]) == {"cudnn fp32", "cudnn bf16"}
        one = variants["frozen fp32"]
        assert one["ratio"] == pytest.approx(variants["eager NCHW fp32"]["median_us"] / one["median_us"])
        assert one["images_per_s"] == pytest.approx(measured["batch"] * 1e6 / one["median_us"])
        assert one["ratio_to_compile"] is None


def test_bench_train(tmp_path):
    command = ["bench", "train", "--model", "resnet20", "--batch", 4, "--dtype", "fp32,bf16", "--image", 16]
    record = json_of(*command, "--no-compile", "--out", tmp_path / "train.json", *TINY)
    check_environment(record, "bench train")
    (row,) = record["runs"]
    kinds = ("eager NHWC", "fused", "fused, less kept")
    names = {f"{kind} {dtype}" for kind in kinds for dtype in ("fp32", "bf16")}
    assert set(row["variants"]) == {"eager NCHW fp32", *names} and row["skipped"] == {}
    for name, one in row["variants"].items():
        assert one["images_per_s"] == pytest.approx(4e6 / one["median_us"]) and one["saved_mb"] > 0, name
        assert one["max_rel_error"] < (0.5 if "bf16" in name else 1e-3), name
        assert one["saved_ratio"] == pytest.approx(one["saved_mb"] / row["variants"][
            f"eager NHWC {name.split()[-1]}"]["saved_mb"])  # fmt: skip
    assert row["variants"]["fused bf16"]["saved_mb"] < 0.6 * row["variants"]["fused fp32"]["saved_mb"]
    for dtype in ("fp32", "bf16"):
        eager, fused, less = (row["variants"][f"{kind} {dtype}"] for kind in kinds)
        assert fused["fusion_alone"] == less["fusion_alone"] == fused["ratio_to_eager"] != less["ratio_to_eager"]
        assert less["saved_mb"] <= fused["saved_mb"]
    shown = run(*command, "--no-compile", *TINY).output
    assert "alone" in shown and "kept MB" in shown and "fused bf16" in shown


def test_bench_model_with_torch_compile_for_people():
    result = run(
        "bench", "model", "--model", "resnet20", "--batch", 1, "--dtype", "fp32", "--image", 8,
        "--baseline", "compile", "--baseline", "openvino", *TINY,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "compile fp32" in result.output and "frozen fp32" in result.output
    assert "resnet20, batch 1, 8 px" in result.output


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench", "ops", "--model", "resnet51"], "unknown model 'resnet51'; known ones are resnet18, "),
        (["bench", "ops", "--dtype", "fp8"], "unknown dtype 'fp8'; known ones are fp32, fp16, bf16."),
        (["bench", "model", "--dtype", "fp32,int8"], "unknown dtype 'int8'"),
        (["bench", "model", "--baseline", "mxnet"], "unknown baseline 'mxnet'; known ones are eager, "),
        (["bench", "model", "--backend", "best"], "unknown backend 'best'; known ones are auto, "),
        (["bench", "model", "--batch", "1,x"], "'1,x' is not a list of numbers"),
        (["bench", "model", "--batch", "0"], "at least one image"),
        (["bench", "ops", "--budget", "0"], "x>0"),
        (["bench", "ops", "--device", "tpu"], "unknown device 'tpu'; known ones are cpu, cuda and cuda:N."),
        (["bench", "ops", "--device", "cpu:foo"], "unknown device 'cpu:foo'"),
        (["verify", "--device", "cpu:1"], "unknown device 'cpu:1'"),
        (["verify", "--device", "cuda:-1"], "unknown device 'cuda:-1'"),
        (["bench", "model", "--device", "mps"], "unknown device 'mps'"),
        (["verify", "--backend", "best"], "unknown backend 'best'; known ones are "),
        (["verify", "--problems", "0"], "x>=1"),
        (["benchmark"], "No such command"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what_is_known(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said_and_not_a_crash():
    result = run("verify", "--device", "cuda")
    assert result.exit_code == 2 and ("without CUDA" in result.output or "no CUDA device" in result.output)


@pytest.mark.parametrize("device, why", (("cuda", None), ("cuda:1", None), ("cuda:2", "no"), ("cuda:9", "no"),
                                         ("cuda:128", "no"), ("cuda:256", "no"), ("cpu:0", None)))  # fmt: skip
def test_a_device_is_one_of_those_torch_finds(device, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    convert = console.Device().convert
    if why is None:
        assert convert(device, None, None) == device.removesuffix(":0")
    else:
        with pytest.raises(click.UsageError, match=f"there is no device '{device}'; the last one is cuda:1"):
            convert(device, None, None)


@pytest.mark.parametrize("device, index", (("cuda", 0), ("cuda:1", 1)))
def test_benchmarks_run_on_the_device_asked_for(device, index, monkeypatch):
    """torch.cuda.set_device refuses a plain "cuda". Until the command ends cuDNN takes what is fastest."""
    chosen, before = [], torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with click.Context(click.Command("bench")):
        console.prepare(device, threads=None)
        assert chosen == [index] and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is before


def test_interrupted_is_130_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleaved", interrupted)
    out = tmp_path / "ops.json"
    arguments = ["bench", "ops", "--model", "resnet20", "--out", str(out), *TINY]
    assert main.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "ops.json"
    assert main.main(["bench", "ops", "--model", "resnet20", "--out", str(out), *TINY]) == 1
    assert "fused-resnet: " in capsys.readouterr().err


def test_exit_codes_of_main(capsys):
    assert main.main(["--version"]) == 0
    assert fused_resnet.__version__ in capsys.readouterr().out
    assert main.main(["bench", "ops", "--model", "nope"]) == 2
    assert main.main(["verify", "--problems", "3", "--device", "cpu", "--backend", "cudnn"]) == 1


def test_json_is_alone_on_stdout():
    """Progress goes to stderr, also through `python -m`, so that stdout can be piped."""
    command = [sys.executable, "-m", "fused_resnet", "verify", "--problems", "2", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sources.ROOT)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["problems"] == 2
    reasons = [reason for entry in record["backends"].values() for reason in entry["cannot_run"]]
    assert any("NVIDIA" in reason for reason in reasons)
