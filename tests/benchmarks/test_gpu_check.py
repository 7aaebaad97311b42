"""gpu-check: its commands and their limits, its budget and its record, and the tuned configs that it runs once each."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.gpu_check import budget, isolated, nan_stays, read_bytes, run_configs, steps
from fused_resnet import backends
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import winners, winners_file
from fused_resnet.kernels import compiled, sources
from fused_resnet.measuring import verified
from fused_resnet.tuning import tuner
from tests.support.scripts import script


def test_gpu_check_without_a_gpu():
    done = script("-m", "benchmarks.gpu_check")
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr


def python(code):
    return (sys.executable, "-c", code)


@pytest.mark.parametrize(
    "code, limit_s, outcome, detail",
    [
        ("print('3 passed')", 60, isolated.PASSED, "3 passed"),
        ("print('no'); raise SystemExit(1)", 60, isolated.FAILED, "no"),
        ("print('begun'); import time; time.sleep(60)", 1, isolated.FAILED, "stopped after 1 s; last it said: "),
        ("import os; print('begun', flush=True); os.kill(os.getpid(), 11)", 60, isolated.FAILED,
         "ended by SIGSEGV; last it said: "),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) + b'\\ndone')", 60, isolated.PASSED, "done"),
        ("print('x' * 100_000)", 60, isolated.PASSED, "x" * 300),
        ("pass", 60, isolated.PASSED, "no output"),
    ],
)  # fmt: skip
def test_a_command_passes_by_its_exit_code(tmp_path, code, limit_s, outcome, detail):
    result = isolated.execute(python(code), limit_s, tmp_path / "log.txt")
    assert result.outcome == outcome
    assert result.detail.startswith(detail) if detail.endswith(": ") else result.detail.splitlines()[0] == detail


def test_a_noisy_command_does_not_fill_the_log(tmp_path):
    log = tmp_path / "log.txt"
    for text in (
        "print('x' * 99 + chr(10), end='', flush=True)\nfor _ in range(5000): print('y' * 99)",
        "print('next')",
    ):
        assert isolated.execute(python(text), 60, log).outcome == isolated.PASSED
    lines = log.read_text().splitlines()
    assert isolated.LOGGED_CHARACTERS <= log.stat().st_size < isolated.LOGGED_CHARACTERS + 1000
    assert lines[0] == "x" * 99 and "[the rest of this command is left out]" in lines and lines[-1] == "next"


def test_a_command_whose_file_stands_still_is_stopped(tmp_path, monkeypatch):
    """One that writes all the while is not, though it takes longer."""
    monkeypatch.setattr(isolated, "PATIENCE_S", 0.5)
    file = tmp_path / "journal.jsonl"
    watched = isolated.Watched(file, 2.5)
    write = f"import time\nfor _ in range(6): print('a', file=open({str(file)!r}, 'a')); time.sleep(0.7)\n"
    assert isolated.executed(python(write), 60, watched=watched)[0].outcome == isolated.PASSED
    result, _ = isolated.executed(python("import time; time.sleep(60)"), 60, watched=watched)
    assert result.outcome == isolated.FAILED
    assert result.detail.startswith("stopped: journal.jsonl stood still for 2 s")


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_hanging_step_is_killed_with_all_that_it_started(monkeypatch, capfd):
    monkeypatch.setattr(isolated, "PATIENCE_S", 0.5)
    started = time.monotonic()
    result = isolated.execute(python(STUBBORN), 2)
    assert result.outcome == isolated.FAILED and "stopped after 2 s" in result.detail
    assert time.monotonic() - started < 30
    child = Path("/proc") / capfd.readouterr().out.split()[0] / "stat"
    for _ in range(100):  # the kernel takes a moment; a zombie is as good as gone
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


@pytest.mark.parametrize(
    "output, outcome, judged",
    [
        ("= ERROR SUMMARY: 0 errors", isolated.PASSED, isolated.PASSED),
        ("= ERROR SUMMARY: 2 errors", isolated.FAILED, isolated.FAILED),
        ("= RACECHECK SUMMARY: 1 hazard displayed", isolated.FAILED, isolated.FAILED),
        ("device not supported", isolated.FAILED, isolated.NOT_RUN),
    ],
)
def test_a_sanitizer_that_did_not_start_is_not_a_failure(output, outcome, judged):
    result = steps.judge_sanitizer(isolated.Result(outcome, "the closing line"), output)
    assert result.outcome == judged
    assert (output if "SUMMARY" in output else "the closing line") in result.detail


def steps_of(**outcomes):
    return [
        budget.Step(name.replace("_", "-"), 0, 60, 1, lambda _, outcome=outcome: isolated.Result(outcome, "said so"))
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
    done = budget.run_steps(steps_of(**outcomes), tmp_path / "check.json", "NVIDIA Test", 60)
    record = json.loads((tmp_path / "check.json").read_text())
    assert (record["kind"], record["device"], record["steps"]) == ("gpu-check", "NVIDIA Test", done)
    if backends is None:
        assert record["verified"] is None
    else:
        assert record["verified"]["backends"] == backends
        assert record["verified"]["kernels"] == verified.gpu_kernels(backends=backends)


def test_a_later_call_keeps_the_other_steps_but_not_for_other_sources(tmp_path, monkeypatch):
    file = tmp_path / "check.json"
    budget.run_steps(steps_of(tests="passed"), file, "NVIDIA Test", 60)
    budget.run_steps(steps_of(verify_cuda="passed"), file, "NVIDIA Test", 60)
    assert json.loads(file.read_text())["verified"]["backends"] == ["cuda"]
    all_of_them = steps_of(tests="passed", verify_cuda="passed", ops="passed")
    assert [step.name for step in budget.chosen(all_of_them, ["rest"], file)] == ["ops"]
    assert [step.name for step in budget.chosen(all_of_them, ["rest", "tests"], file)] == ["tests", "ops"]
    monkeypatch.setattr(sources, "source_digest", lambda: "edited since")
    assert len(budget.chosen(all_of_them, ["rest"], file)) == 3
    budget.run_steps(steps_of(verify_triton="passed"), file, "NVIDIA Test", 60)
    record = json.loads(file.read_text())
    assert set(record["steps"]) == {"tests", "verify-cuda", "verify-triton"} and record["verified"] is None


def test_a_step_that_raises_costs_only_itself(tmp_path):
    def broken(_):
        raise FileNotFoundError("no such tool")

    all_of_them = [budget.Step("first", 0, 60, 1, broken), *steps_of(tests="passed")]
    done = budget.run_steps(all_of_them, tmp_path / "check.json", "NVIDIA Test", 60)
    assert done["first"]["outcome"] == "failed" and "no such tool" in done["first"]["detail"]
    assert done["tests"]["outcome"] == "passed"


@pytest.mark.parametrize("content", [b"", b'{"steps": 5}', b"[]", b"\xff"])
def test_an_unreadable_check_is_begun_anew(tmp_path, content):
    (tmp_path / "check.json").write_bytes(content)
    done = budget.run_steps(steps_of(tests="passed"), tmp_path / "check.json", "NVIDIA Test", 60)
    assert set(done) == {"tests"} == set(json.loads((tmp_path / "check.json").read_text())["steps"])


def test_the_time_is_split_by_share_and_what_cannot_be_done_in_it_is_not_begun(tmp_path):
    given = {}

    def noted(name):
        return lambda seconds: given.update({name: seconds}) or isolated.Result(isolated.PASSED, "")

    all_of_them = [
        budget.Step("rigid", 1, 5, 0, noted("rigid")),
        budget.Step("elastic", 1, 1000, 3, noted("elastic")),  # 3/4 of the 100 s but 20 s for what must follow
        budget.Step("rigid too", 20, 1000, 0, noted("rigid too")),
        budget.Step("needy", 80, 1000, 1, noted("needy")),
        budget.Step("dear", 500, 1000, 0, noted("dear")),
    ]
    budget.run_steps(all_of_them[:-1], tmp_path / "check.json", "NVIDIA Test", 100)
    assert given["rigid"] == 5 and given["elastic"] == pytest.approx(60, abs=1)
    assert given["rigid too"] == pytest.approx(100, abs=2) and given["needy"] == pytest.approx(100, abs=3)
    done = budget.run_steps(all_of_them[-1:], tmp_path / "check.json", "NVIDIA Test", 100)
    assert "dear" not in given and done["dear"]["outcome"] == "not run"
    assert done["dear"]["detail"] == "it needs 500 s, and 100 s were left"


def test_the_first_part_keeps_nothing_for_the_second(tmp_path):
    given = {}

    def step(name, needs_s, share, part):
        note = lambda seconds: given.update({name: seconds}) or isolated.Result(isolated.PASSED, "")  # noqa: E731
        return budget.Step(name, needs_s, 1000, share, note, part)

    some = [step("convs", 10, 3, 1), step("model", 10, 2, 1), step("rigid", 20, 0, 1), step("tests", 90, 0, 2)]
    budget.run_steps(some, tmp_path / "check.json", "NVIDIA Test", 120)
    assert given["convs"] == pytest.approx(60, abs=1) and given["tests"] == pytest.approx(120, abs=2)


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setattr(winners, "device_id", lambda device: "NVIDIA Test")
    return steps.Setup(tmp_path, "cuda", "resnet50", 10, tmp_path / "configs")


def test_a_first_call_does_what_only_a_gpu_can_say(setup):
    """Its least fits into 540 s, with a slow start."""
    first, rest = steps.all_steps(setup)[:9], steps.all_steps(setup)[9:]
    assert [step.name for step in first] == [
        "environment", "build", "forms", "golden", "racecheck", "convs", "model", "read-bytes", "nan-stays",
    ]  # fmt: skip
    assert {step.part for step in first} == {1} and {step.part for step in rest} == {2}
    assert sum(step.needs_s for step in first) <= 420


def test_gpu_check_writes_eight_files_beside_the_golden_one_and_every_command_parses(setup, monkeypatch):
    """Each command of ours is handed to the command line with --help, so that a renamed option shows here."""
    from click.testing import CliRunner

    from fused_resnet.cli.main import cli

    commands = []

    def noted(command, seconds, log=None, watched=None, **_):
        commands.append(command)
        return isolated.Result(isolated.PASSED, ""), ""

    monkeypatch.setattr(steps, "executed", noted)
    monkeypatch.setattr(steps, "execute", lambda *arguments, **variables: noted(*arguments, **variables)[0])
    for step in steps.all_steps(setup):
        step.run(100)
    files = {command[command.index("--out") + 1] for command in commands if "--out" in command}
    assert len(files) == 4  # beside check.json, log.txt, configs.json and journal.jsonl
    (golden,) = [command for command in commands if "benchmarks.gpu_check.golden" in command]
    assert golden[-1] == str(setup.out / "golden.json")
    ours = [command for command in commands if command[2] == "fused_resnet"]
    assert {command[3] for command in ours} == {"info", "verify", "tune", "bench"}
    for command in ours:
        result = CliRunner().invoke(cli, [*command[3:], "--help"])
        assert result.exit_code == 0, result.output


def test_every_command_that_is_no_verb_of_ours_finds_its_module(setup, monkeypatch):
    """They run on a GPU only, where a module that has moved would cost the step."""
    commands = []

    def noted(command, *_, **__):
        commands.append(command)
        return isolated.Result(isolated.FAILED, ""), ""

    monkeypatch.setattr(steps, "executed", noted)
    monkeypatch.setattr(steps, "execute", lambda *arguments, **variables: noted(*arguments, **variables)[0])
    monkeypatch.setattr(steps.shutil, "which", lambda *_, **__: "a tool")
    (setup.out / "configs.json").write_text("{}")
    steps.build(setup, 60)
    steps.sanitize_configs(setup, 60)
    steps.sanitize_forms(setup, "racecheck", 60)
    steps.every_form(setup, 60)
    steps.nan_stays(setup, 60)
    steps.golden(setup, 60)
    steps.read_bytes_of_cudnn(setup, 60)
    load, _, *ours = commands
    done = script(*load[1:])
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    modules = {command[command.index("-m") + 1] for command in ours}
    names = ("run_configs", "run_forms", "nan_stays", "golden", "read_bytes")
    assert modules == {f"benchmarks.gpu_check.{name}" for name in names}
    assert all(importlib.util.find_spec(module) for module in modules)


def test_each_form_runs_in_a_process_of_its_own_and_one_failure_counts(setup, monkeypatch):
    commands, listed, said = [], ["triton rows_tma float16", "cuda tile0 float32"], {}

    def answered(command, seconds, log=None, watched=None, **_):
        commands.append(command)
        if "--list" in command:
            return isolated.Result(isolated.PASSED, "listed"), "a warning\n" + "\n".join(listed)
        form = command[command.index("--form") + 1]
        return isolated.Result(said.get(form, isolated.PASSED), "1 of 1 right"), ""

    monkeypatch.setattr(steps, "executed", answered)
    monkeypatch.setattr(steps, "execute", lambda *arguments, **variables: answered(*arguments, **variables)[0])
    assert steps.every_form(setup, 60) == isolated.Result(isolated.PASSED, "2 forms are right")
    assert ("--backend", "cuda", "--form", "tile0", "--dtype", "float32") in [command[3:] for command in commands]
    said["rows_tma"] = isolated.FAILED
    result = steps.every_form(setup, 60)
    assert result == isolated.Result(isolated.FAILED, "triton rows_tma float16: 1 of 1 right")
    listed.clear()
    assert steps.every_form(setup, 60).outcome == isolated.FAILED  # nothing of ours ran


def test_a_form_of_triton_is_held_against_the_reference():
    """In Triton's interpreter, where legal configs are those of an H200."""
    module = ("-m", "benchmarks.gpu_check.run_forms", "--device", "cpu", "--backend", "triton")
    listed = script(*module, "--list", TRITON_INTERPRET="1")
    forms = {tuple(line.split()[1:]) for line in listed.stdout.splitlines()}
    assert {(form, dtype) for form in ("pointer", "gemm_tma", "rows_tma", "lines_tma")
            for dtype in ("float16", "bfloat16")} | {("pointer", "float32")} == forms  # fmt: skip
    ran = script(*module, "--form", "gemm_tma", "--dtype", "float16", TRITON_INTERPRET="1")
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == "1 of 1 right", ran.stdout + ran.stderr
    assert script(*module, "--form", "no_such_form", TRITON_INTERPRET="1").returncode == 1


@pytest.mark.parametrize("adds_what_was_there, wrong", [(False, 0), (True, 8)])
def test_a_nan_that_outlives_its_image_is_counted(adds_what_was_there, wrong):
    x, out = torch.zeros(2, 4), torch.zeros(2, 4)

    def replay():
        return out.copy_(x + 0 * out if adds_what_was_there else x)

    assert nan_stays.remaining(x, replay) == wrong


def test_a_build_is_for_the_gpu_that_is_there(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert steps.arch_of_this_gpu() == {"TORCH_CUDA_ARCH_LIST": "9.0"}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert steps.arch_of_this_gpu() == {}


def test_a_benchmark_goes_on_with_its_file_and_replaces_another_measurement(setup, monkeypatch):
    commands, answers = [], []

    def answered(command, seconds, log=None, watched=None, **_):
        commands.append(command)
        result, output, left = answers.pop(0)
        (setup.out / "ops.json").write_text(json.dumps({"left": left}))
        return isolated.Result(result, "closing"), output

    monkeypatch.setattr(steps, "executed", answered)
    monkeypatch.setattr(steps, "execute", lambda *arguments, **variables: answered(*arguments, **variables)[0])
    answers += [(isolated.PASSED, "", ["second", "third"])]
    result = steps.benchmark(setup, "ops", ("ops",), 100)
    assert result.outcome == isolated.NOT_RUN and "2 left, second the first" in result.detail
    answers += [(isolated.FAILED, "Error: --resume: ops.json holds another", []), (isolated.PASSED, "", [])]
    assert steps.benchmark(setup, "ops", ("ops",), 100) == isolated.Result(isolated.PASSED, "closing")
    assert ["--resume" in command for command in commands] == [True, True, False]
    assert commands[0][commands[0].index("--stop-after") + 1] == "75"


def test_the_tuner_is_begun_again_after_a_failure_and_unfinished_it_has_not_passed(setup, monkeypatch):
    answers = ["has left the GPU unusable", "stopped: the journal stood still", "tuned"]
    given = []

    def answered(command, seconds, log=None, watched=None, **_):
        given.append((seconds, float(command[-1])))
        assert watched.file == tuner.journal_path("cuda")
        said = answers.pop(0)
        failed = "unusable" in said or "stopped" in said
        return isolated.Result(isolated.FAILED if failed else isolated.PASSED, said), said

    monkeypatch.setattr(steps, "executed", answered)
    assert steps.tune(setup, "1", "fp16", 400) == isolated.Result(isolated.PASSED, "tuned")
    assert [seconds for seconds, _ in given] == pytest.approx([400, 400, 400], abs=1)  # all that is left, each time
    assert given[0][1] == pytest.approx(0.85 * 400 / 60, abs=0.1)
    answers += ["3 convolutions are left: give"]  # a healthy process has had all the time
    assert steps.tune(setup, "1", "fp16", 100) == isolated.Result(
        isolated.NOT_RUN, "the time was up: 3 convolutions are left; --only tune goes on"
    )
    assert not answers
    answers += ["has left the GPU unusable"] * 9
    assert steps.tune(setup, "1", "fp16", 400).outcome == isolated.FAILED and len(answers) == 4
    assert steps.tune(setup, "1", "fp16", 10).outcome == isolated.NOT_RUN  # not begun


COUNTED = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","a kernel","dram__bytes_read.sum","Mbyte","{}"
"0","7","a kernel","dram__bytes_write.sum","Mbyte","102.5"
"1","7","another","dram__bytes_read.sum","byte","1,024"
==PROF== Disconnected
"""


@pytest.mark.parametrize("fused_mb, said", [(105, "does not read z: 105 MB"), (206, "reads z: 206 MB")])
def test_what_ncu_counts_says_whether_z_is_read(setup, monkeypatch, fused_mb, said):
    megabytes = {"plain": 104, "fused": fused_mb}

    def answered(command, seconds, log=None, **_):
        return isolated.Result(isolated.PASSED, ""), COUNTED.format(megabytes[command[-1]])

    monkeypatch.setattr(steps, "executed", answered)
    monkeypatch.setattr(steps.shutil, "which", lambda *_, **__: "ncu")
    result = steps.read_bytes_of_cudnn(setup, 60)
    assert result.outcome == isolated.PASSED and said in result.detail
    assert read_bytes.bytes_of(COUNTED.format("1.5")) == {
        "dram__bytes_read.sum": 1501024.0, "dram__bytes_write.sum": 102.5e6,
    }  # fmt: skip


def test_without_an_ncu_that_may_count_nothing_is_said(setup, monkeypatch):
    monkeypatch.setattr(steps.shutil, "which", lambda *_, **__: None)
    assert steps.read_bytes_of_cudnn(setup, 60) == isolated.Result(isolated.NOT_RUN, "ncu is not installed")
    monkeypatch.setattr(steps.shutil, "which", lambda *_, **__: "ncu")
    output = "==ERROR== ERR_NVGPUCTRPERM - no permission to access NVIDIA GPU Performance Counters\nmore"
    monkeypatch.setattr(steps, "executed", lambda *_, **__: (isolated.Result(isolated.FAILED, "more"), output))
    result = steps.read_bytes_of_cudnn(setup, 60)
    assert result.outcome == isolated.NOT_RUN and "ERR_NVGPUCTRPERM" in result.detail


DEADLY = """
import os, signal
from fused_resnet import backends
from fused_resnet.backends.record import REGISTRY
from fused_resnet.cli.main import cli

def run(problem, operands):
    os.kill(os.getpid(), signal.SIGSEGV)

eager = backends.known("conv_bn_act")["eager"]
why_not = lambda problem: None if problem.R == 1 and not problem.has_residual else "not this one"
REGISTRY["conv_bn_act"]["deadly"] = eager._replace(name="deadly", run=run, why_not=why_not)
cli()
"""


@pytest.mark.full
def test_the_tuner_goes_on_after_a_candidate_that_kills_it(tmp_path, tuned_files, monkeypatch):
    """Twice it may take its process with it; the third process leaves it out."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.setattr(steps, "CLI", (sys.executable, str(tmp_path / "deadly.py")))
    monkeypatch.setenv("PYTHONPATH", str(sources.ROOT))
    on_cpu = steps.Setup(tmp_path, "cpu", "resnet20", 1, tmp_path / "configs")
    result = steps.tune(on_cpu, "1", "fp32", 500, "--rounds", "1", "--conv", "2x16x8x8 -> 16, 1x1 float32 bias relu")
    assert result.outcome == isolated.PASSED, result.detail
    log, journal = ((tmp_path / name).read_text() for name in ("log.txt", "journal.jsonl"))
    assert log.count("Fatal Python error: Segmentation fault") == 2
    assert "the process ended twice while it ran" in journal and (tmp_path / "configs.json").exists()


def test_what_the_tuner_found_out_goes_along_to_another_machine(setup, monkeypatch, tuned_files):
    journal = tuner.journal_path("cuda")

    def answered(command, seconds, log=None, watched=None, **_):
        journal.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a") as file:
            file.write("found\n")
        return isolated.Result(isolated.PASSED, "tuned"), "tuned"

    monkeypatch.setattr(steps, "executed", answered)
    steps.tune(setup, "1", "fp16", 100)
    assert (setup.out / "journal.jsonl").read_text() == "found\n"
    journal.unlink()  # another machine
    steps.bring_back(setup)
    steps.tune(setup, "1", "fp16", 100)
    assert journal.read_text() == (setup.out / "journal.jsonl").read_text() == "found\nfound\n"

    (setup.out / "configs.json").write_text("winners")
    assert setup.winners == setup.configs / "NVIDIA_Test.json"
    steps.bring_back(setup)
    assert setup.winners.read_text() == "winners"
    (setup.out / "configs.json").write_text("older")
    steps.bring_back(setup)
    assert setup.winners.read_text() == "winners"


def test_a_library_of_other_sources_is_not_what_is_verified(monkeypatch):
    monkeypatch.setattr(compiled, "load", lambda library: None)
    monkeypatch.setattr(compiled, "built_digest", lambda patterns: sources.kernel_digest(patterns))
    assert steps.why_not_this_library() is None
    monkeypatch.setattr(compiled, "built_digest", lambda patterns: None)  # _build.json was left behind
    assert "compiled from kernels None by _build.json" in steps.why_not_this_library()


def test_random_problems_are_shared_between_processes_and_one_failure_counts(setup, monkeypatch):
    """A share with nothing that the backend can run does not, unless all are such."""
    commands, said = [], {}

    def answered(command, seconds, log=None, watched=None, **_):
        commands.append(command)
        closing = said.get(command[command.index("--seed") + 1], "no mismatch")
        return isolated.Result(isolated.PASSED if closing == "no mismatch" else isolated.FAILED, closing), closing

    monkeypatch.setattr(steps, "executed", answered)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    idle = "verify: backend 'cublaslt' could not run any of these problems."
    said.update({"0": idle, "1": "MISMATCH"})
    result = steps.verify(setup, "cublaslt", 10, 60, "--common")
    assert result == isolated.Result(isolated.FAILED, "seed 1: MISMATCH")
    assert len(commands) == 4 and {command[command.index("--problems") + 1] for command in commands} == {"3"}
    assert all("--common" in command for command in commands)
    assert [command[command.index("--seed") + 1] for command in commands if "--large" in command] == ["0"]
    said["1"] = "no mismatch"
    assert steps.verify(setup, "cublaslt", 10, 60) == isolated.Result(isolated.PASSED, "no mismatch")
    said.update(dict.fromkeys("0123", idle))
    assert steps.verify(setup, "cublaslt", 10, 60) == isolated.Result(isolated.NOT_RUN, idle)
    assert steps.verify(setup, "triton", 10, 60).outcome == isolated.FAILED  # our own must run


@pytest.mark.full
def test_gpu_check_from_end_to_end_on_a_cpu(tmp_path):
    done = script(
        "-m", "benchmarks.gpu_check", "--device", "cpu", "--model", "resnet20", "--problems", 2, "--budget", 600,
        "--only", "environment,build,golden,tests,sanitizer,verify-eager,tune,ops", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "check.json").read_text())
    outcomes = {name: step["outcome"] for name, step in record["steps"].items()}
    assert outcomes == {
        "environment": "passed", "build": "not run", "golden": "not run", "tests": "not run", "sanitizer": "not run",
        "verify-eager": "passed", "tune": "passed", "ops": "passed",
    }  # fmt: skip
    assert record["verified"] is None
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        "check.json", "configs.json", "journal.jsonl", "log.txt", "ops.json",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ tuned configs

GROUPED = "32x8x8 -> 32, 3x3 p1 g8 float32 bias relu"


def tuned_table(config, settings=", 3 threads, torch 2.13.0+cpu, oneDNN 3.11.2"):
    measured = winners_file.Measured(config, 5.0, 0.1)
    entry = winners_file.Entry(
        "stub", "eager", "today", {"stub": measured, "eager": winners_file.Measured(None, 9.0, 0.1)}
    )
    return winners_file.Table("a device", {GROUPED + settings: {1: entry, 32: entry}}, {"today": {}}, {}, {})


class StubConfig(NamedTuple):
    scale: int


@pytest.fixture
def stub(monkeypatch):
    """A backend with two configs, of which one is wrong and one breaks with it."""

    def run(problem, operands, config):
        if config.scale == 3:
            raise RuntimeError("illegal address")
        return backends.known("conv_bn_act")["eager"].run(problem, operands) * config.scale

    configs = [StubConfig(1), StubConfig(2), StubConfig(3)]
    backend = backends.Backend("stub", lambda problem: None, run, configs=backends.Configs(lambda problem: configs))
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "stub", backend)


@pytest.mark.parametrize(
    "scale, outcome, why", [(1, "right", ""), (2, "wrong", "by "), (3, "wrong", "RuntimeError: illegal address"),
                            (4, "not run", "there is no such config")],
)  # fmt: skip
def test_each_tuned_config_is_run_once(stub, scale, outcome, why):
    ((problem, name, config),) = run_configs.configs_of(tuned_table({"scale": scale}), "cpu", ["stub", "eager"])
    assert (str(problem), name, config) == (f"2x{GROUPED}", "stub", {"scale": scale})
    found, said = run_configs.run(problem, name, config, "cpu")
    assert found == outcome and said.startswith(why)


@pytest.mark.parametrize("scale, exit_code", [(1, 0), (2, 1), (4, 0)])
def test_a_wrong_config_is_the_exit_code(stub, scale, exit_code, tmp_path, monkeypatch, capsys):
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(tuned_table({"scale": scale}, settings="").as_json()))
    monkeypatch.setattr(sys, "argv", ["run_configs", str(file), "--device", "cpu", "--backend", "stub"])
    assert run_configs.main() == exit_code
    assert f"{int(exit_code)} wrong" in capsys.readouterr().out
