"""The benchmark scripts: the shapes they take from models, and the demo."""

import json

import pytest

from benchmarks import shapes
from fused_resnet import measuring
from tests.support.scripts import script


def test_shapes_come_from_the_models():
    convs = shapes.convs("resnet18")
    # the stem, layer1 with and without the addition, and five in each later stage: the stride-2 one, the main path
    # before its sum, the projection, which takes the sum, and the second block with and without the addition
    assert (len(convs), sum(count for _, count in convs)) == (1 + 2 + 3 * 5, 20)
    assert [name for name, _, _ in shapes.blocks("resnet20")] == ["layer1.2", "layer2.2", "layer3.2"]


@pytest.mark.parametrize("model", shapes.STAGED_MODELS)
def test_every_conv_of_the_benchmarks_is_right_on_this_machine(model):
    """The shapes proved right are the shapes timed; layer4's, so that the fp64 reference stays short."""
    last = [problem for problem, _ in shapes.convs(model) if problem.H <= 7]
    assert last
    for problem in last:
        found, _ = measuring.op_variants(problem, measuring.random_operands(problem, "cpu"))
        for name, prepared in found.items():
            assert measuring.error_ratio(prepared) <= 1, f"{name}: {problem}"


@pytest.mark.full
def test_pytest_benchmark_files(tmp_path):
    out = tmp_path / "benchmark.json"
    done = script(
        "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "benchmarks/bench_ops.py",
        "benchmarks/bench_blocks.py", "benchmarks/bench_models.py", "--model", "resnet20",
        "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    groups = {entry["group"] for entry in json.loads(out.read_text())["benchmarks"]}
    assert {"resnet20, batch 1", "BasicBlock (64, 8, 8)", "1x64x8x8 -> 64, 3x3 p1 float32 bias+add relu"} <= groups


# --------------------------------------------------------------------------------------------------------------- demo


@pytest.mark.full
@pytest.mark.parametrize("compile_option", [[], ["--no-compile"]], ids=["compile", "no compile"])
def test_demo_from_end_to_end(tmp_path, compile_option):
    done = script(
        "-m", "benchmarks.demo", "--out", tmp_path, "--model", "resnet20", "--image", 32, "--batches", "1,2",
        "--images", 100, "--budget", 0.1, "--threads", 1, *compile_option,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "demo.json").read_text())
    accuracy = {row["variant"]: row for row in record["accuracy"]}
    assert accuracy["eager"]["correct"] >= 85 and accuracy["eager"]["changed"] == 0
    assert accuracy["fused"]["changed"] == accuracy["frozen fp32"]["changed"] == 0
    assert accuracy["frozen bf16"]["changed"] <= 3
    assert [run["batch"] for run in record["runs"]] == [1, 2]
    for run in record["runs"]:
        assert {"eager NCHW fp32", "folded fp32", "frozen fp32", "frozen bf16"} <= set(run["variants"])
        assert ("compile fp32" in {**run["variants"], **run["skipped"]}) == (not compile_option)
    markdown = (tmp_path / "demo.md").read_text()
    assert "| frozen bf16" in markdown and "eager | " + f"{accuracy['eager']['correct']} of 100" in markdown
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in ("demo.json", "demo.md", "demo.png"):
        assert name in done.stdout.replace("\n", "")


@pytest.mark.full
def test_demo_goes_on_without_a_compiler(tmp_path):
    done = script(
        "-m", "benchmarks.demo", "--out", tmp_path, "--model", "resnet20", "--image", 16, "--batches", "1",
        "--images", 10, "--budget", 0.1, "--threads", 1,
        CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "demo.json").read_text())["runs"]
    assert "compile fp32" in run["skipped"] and "frozen fp32" in run["variants"]
    assert "not run: compile fp32" in done.stdout
