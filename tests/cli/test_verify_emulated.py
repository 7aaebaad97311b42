"""`fused-resnet verify --emulate`: what it draws and reports, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fused_resnet import backends, testing
from fused_resnet.cli import main
from fused_resnet.emulation import cuda_launches, library
from fused_resnet.emulation import verify as emulated
from tests.support.scripts import ROOT

needs_library = pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")


def run(*arguments):
    return CliRunner().invoke(main.cli, [str(argument) for argument in arguments])


def stub(monkeypatch, outcome, real=()):
    """Kernels answer at once, but for some that are checked."""
    check = emulated.check

    def stubbed(seed, index, arch, name, *, kind):
        return check(seed, index, arch, name, kind=kind) if name in real else outcome._replace(backend=name)

    monkeypatch.setattr(emulated, "why_not", lambda kernels: None)
    monkeypatch.setattr(emulated, "check", stubbed)


def test_the_report_as_json(monkeypatch):
    stub(monkeypatch, testing.Outcome("", "ok", "", 0.25))
    result = run("verify", "--emulate", "sm_80", "--problems", 8, "--seed", 1, "--kernel", "cuda", "--json")
    record = json.loads(result.stdout)
    assert (
        result.exit_code == 0 and record["passed"] and (record["device"], record["problems"]) == ("emulated sm_80", 8)
    )
    kernels = record["backends"]
    assert set(kernels) == {"cuda/conv_bn_act", "cuda/add_relu"}
    assert sum(entry["ok"] for entry in kernels.values()) == 8 and kernels["cuda/conv_bn_act"]["worst_error"] == 0.25


def test_bytes_that_differ_are_counted(monkeypatch):
    kinds = []
    monkeypatch.setattr(emulated, "why_not", lambda kernels: None)

    def check(seed, index, arch, name, *, kind):
        kinds.append(kind)
        return testing.Outcome(name, *(("mismatch", "3 differ", None, 50, 3) if index else ("ok", "", 0.0, 1000, 0)))

    monkeypatch.setattr(emulated, "check", check)
    command = ("verify", "--dtype", "int8", "--emulate", "sm_90", "--kernel", "cuda")
    result = run(*command, "--problems", 1)
    assert result.exit_code == 0 and "0 of 1,000" in result.output and "no mismatch" in result.output
    result = run(*command, "--problems", 2)
    assert result.exit_code == 1 and "3 of 1,050" in result.output and set(kinds) == {"int8"}


def test_int8_has_problems_of_its_own():
    result = run("verify", "--dtype", "int8", "--common")
    assert result.exit_code == 2 and "--dtype draws problems of its own" in result.output


def test_where_no_kernel_of_bytes_runs_that_is_no_success(monkeypatch):
    for name, backend in backends.known("conv_int8").items():
        monkeypatch.setitem(backends.record.REGISTRY["conv_int8"], name, backend._replace(why_not=lambda p: "no GPU"))
    result = run("verify", "--dtype", "int8", "--problems", 2)
    assert result.exit_code == 1 and "nothing ran on cpu" in result.output and "no GPU" in result.output


def test_a_mismatch_fails_and_says_how_to_see_it_again(monkeypatch):
    stub(monkeypatch, testing.Outcome("", "mismatch", "a race"))
    result = run("verify", "--emulate", "sm_90", "--problems", 1, "--seed", 1, "--kernel", "cuda/conv_bn_act")
    assert result.exit_code == 1
    assert (
        "MISMATCH cuda/conv_bn_act: check(1, 0, 90, 'cuda/conv_bn_act'" in result.output and "a race" in result.output
    )


def test_a_kernel_that_never_ran_fails(monkeypatch):
    stub(monkeypatch, testing.Outcome("", "cannot run", "too large"))
    result = run("verify", "--emulate", "sm_90", "--problems", 1, "--seed", 1, "--kernel", "gemm_tma")
    assert result.exit_code == 1 and "'gemm_tma' could not run any" in result.output and "too large" in result.output


def test_the_last_line_says_which_kernels_never_ran_and_why(monkeypatch):
    """Before whatever else it might be, a problem is one that sm_80 has no TMA for."""
    stub(monkeypatch, testing.Outcome("", "ok", "", 0.25), real=emulated.KERNELS[1:4])
    last = run("verify", "--emulate", "sm_80", "--problems", 8, "--seed", 1).output.strip().splitlines()[-1]
    assert last == "never ran: triton/gemm_tma, triton/rows_tma, triton/lines_tma (sm_80 has no TMA)"


def test_a_kernel_for_which_no_problem_was_drawn(monkeypatch):
    stub(monkeypatch, testing.Outcome("", "ok", "", 0.25))
    result = run("verify", "--emulate", "sm_90", "--problems", 1, "--seed", 0, "--kernel", "add_relu")
    assert result.exit_code == 1 and "1 problem, seed 0, emulated sm_90: nothing was compared" in result.output
    assert "never ran: triton/add_relu, cuda/add_relu (no problem of theirs was drawn)" in result.output
    assert "no mismatch" not in result.output


@pytest.mark.parametrize("arguments, reason", (
    (["--emulate", "sm_70"], "sm_80"),
    (["--emulate", "sm_90", "--kernel", "gemm"], "unknown kernel 'gemm'"),
    (["--kernel", "cuda"], "it needs --emulate"),
    (["--emulate", "sm_90", "--backend", "triton"], "name them with --kernel"),
))  # fmt: skip
def test_what_is_refused(arguments, reason):
    result = run("verify", *arguments)
    assert result.exit_code == 2 and reason in result.output


def test_without_the_library_it_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PATH", tmp_path / "_ptx.so")
    result = run("verify", "--emulate", "sm_90")
    assert result.exit_code == 1 and "is not built" in result.output and "pip install" in result.output
    library.PATH.write_bytes(b"of a version without a digest")
    result = run("verify", "--emulate", "sm_90")
    assert result.exit_code == 1 and "the interface unknown" in result.output and "pip install" in result.output
    part = json.loads(run("info", "--json").output)["parts"]["_ptx"]
    assert part["present"] and "the interface unknown" in part["why"]


def test_names_of_kernels():
    assert emulated.chosen_kernels(()) == emulated.KERNELS
    assert emulated.chosen_kernels(("add_relu",)) == ("triton/add_relu", "cuda/add_relu")
    assert emulated.chosen_kernels(("triton/pointer", "cuda/add_relu")) == ("triton/pointer", "cuda/add_relu")
    assert len(emulated.chosen_kernels(("triton",))) == 5 and "gemm_tma" in emulated.known_names()


@needs_library
def test_interpreted_kernels_cannot_be_compiled():
    """As in a process with TRITON_INTERPRET=1."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fused_resnet", "verify", "--emulate", "sm_90", "--kernel", "triton"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr


@needs_library
@pytest.mark.skipif(cuda_launches.why_not() is not None, reason=cuda_launches.why_not() or "")
def test_additions_by_nvcc():
    """The one that compiles in seconds: in this process, which interprets Triton."""
    report = emulated.verify(range(60), 3, 80, ("cuda/add_relu",))
    entry = report.backends["cuda/add_relu"]
    assert report.passed and entry.ok > 0, report.as_dict()
