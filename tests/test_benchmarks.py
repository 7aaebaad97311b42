"""The benchmark scripts: the shapes they take from models, the demo, gpu-check's bookkeeping, the Makefile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check, shapes  # noqa: E402
from fused_resnet import bench, provenance  # noqa: E402


def script(*arguments, **environment):
    """Run a script of ours from the repository root, without Triton's interpreter and without xdist's variables."""
    dropped = ("TRITON_INTERPRET", "PYTEST_")  # pytest-benchmark writes nothing inside an xdist worker
    variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env={**variables, **environment},
        capture_output=True, text=True,
    )


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
        found, _ = bench.op_variants(problem, bench.random_operands(problem, "cpu"))
        for name, prepared in found.items():
            assert bench.error_ratio(prepared) <= 1, f"{name}: {problem}"


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


# ---------------------------------------------------------------------------------------------------------- gpu-check


def test_gpu_check_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = script("-m", "benchmarks.gpu_check")
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr


def python(code):
    return (sys.executable, "-c", code)


def test_a_step_passes_by_its_exit_code():
    assert gpu_check.execute(python("print('3 passed')"), 60) == (gpu_check.PASSED, "3 passed")
    assert gpu_check.execute(python("print('no'); raise SystemExit(1)"), 60) == (gpu_check.FAILED, "no")
    assert gpu_check.execute(python("import time; time.sleep(60)"), 1) == (gpu_check.FAILED, "stopped after 1 s")


@pytest.mark.parametrize(
    "output, outcome, judged",
    [
        ("= ERROR SUMMARY: 0 errors", gpu_check.PASSED, gpu_check.PASSED),
        ("= ERROR SUMMARY: 2 errors", gpu_check.FAILED, gpu_check.FAILED),
        ("device not supported", gpu_check.FAILED, gpu_check.NOT_RUN),
    ],
)
def test_a_sanitizer_that_did_not_start_is_not_a_failure(output, outcome, judged):
    result = gpu_check.judge_sanitizer(gpu_check.Result(outcome, "the closing line"), output)
    assert result.outcome == judged
    assert (output if "SUMMARY" in output else "the closing line") in result.detail


def steps(**outcomes):
    return [
        gpu_check.Step(name.replace("_", "-"), 60, lambda _, outcome=outcome: gpu_check.Result(outcome, "said so"))
        for name, outcome in outcomes.items()
    ]


@pytest.mark.parametrize(
    "outcomes, backends",
    [
        ({"tests": "passed", "verify_cuda": "passed", "verify_triton": "passed"}, ["cuda", "triton"]),
        ({"tests": "passed", "verify_cuda": "failed", "verify_triton": "passed"}, ["triton"]),
        ({"tests": "failed", "verify_cuda": "passed", "verify_triton": "passed"}, None),
        ({"verify_cuda": "passed"}, None),
    ],
)
def test_only_what_passed_is_called_verified(tmp_path, outcomes, backends):
    record = gpu_check.run_steps(steps(**outcomes), tmp_path / "check.json", "NVIDIA Test", 60)
    assert json.loads((tmp_path / "check.json").read_text()) == record
    if backends is None:
        assert record["verified"] is None
    else:
        assert record["verified"]["backends"] == backends
        assert record["verified"]["kernels"] == provenance.digests(backends=backends)


def test_a_later_call_keeps_the_other_steps_but_not_for_other_sources(tmp_path, monkeypatch):
    file = tmp_path / "check.json"
    gpu_check.run_steps(steps(tests="passed"), file, "NVIDIA Test", 60)
    record = gpu_check.run_steps(steps(verify_cuda="passed"), file, "NVIDIA Test", 60)
    assert record["verified"]["backends"] == ["cuda"]
    monkeypatch.setattr(gpu_check, "source_digest", lambda: "edited since")
    record = gpu_check.run_steps(steps(verify_triton="passed"), file, "NVIDIA Test", 60)
    assert set(record["steps"]) == {"tests", "verify-cuda", "verify-triton"} and record["verified"] is None


def test_steps_after_the_deadline_are_recorded_as_not_run(tmp_path):
    record = gpu_check.run_steps(steps(tests="passed"), tmp_path / "check.json", "NVIDIA Test", 0)
    assert record["steps"]["tests"]["outcome"] == "not run" and record["steps"]["tests"]["detail"] == "out of time"


def test_gpu_check_writes_at_most_eight_files_and_every_command_parses(tmp_path, monkeypatch):
    """Each benchmark command is handed to the command line with --help, so that a renamed option shows here."""
    from click.testing import CliRunner

    from fused_resnet.__main__ import cli

    commands = []
    monkeypatch.setattr(gpu_check, "execute", lambda command, seconds, **_: commands.append(command))
    for step in gpu_check.all_steps(tmp_path, "resnet50", 10):
        if step.name not in ("build", "sanitizer"):
            step.run(1)
    files = {command[command.index("--out") + 1] for command in commands if "--out" in command}
    assert len(files) == 5
    for command in commands:
        if command[2] == "fused_resnet":
            result = CliRunner().invoke(cli, [*command[3:], "--help"])
            assert result.exit_code == 0, result.output


# ----------------------------------------------------------------------------------------------------------- Makefile


@pytest.mark.parametrize("target", ["demo", "test", "test-full", "lint", "gpu-check", "clean"])
def test_makefile_targets_with_a_given_interpreter_install_nothing(target):
    done = subprocess.run(
        ["make", "-n", target, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout


def test_requirements_are_exact():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert all("==" in line.split(";")[0] for line in lines if line)
