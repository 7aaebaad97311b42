"""cpu-check's sanitizers: what counts as a finding, memory that nobody may touch, and three broken kernels."""

import json
import shutil

import pytest
import torch

from benchmarks.cpu_check import __main__ as cpu_check
from benchmarks.cpu_check import problems, sanitized, sanitizers
from benchmarks.gpu_check.isolated import Result
from fused_resnet.kernels import compiled
from fused_resnet.regions.program import CompiledRegion, StepKind
from tests.support.scripts import ROOT

needs_kernels = pytest.mark.skipif(compiled.load("cpu") is not None, reason=str(compiled.load("cpu")))

ADDRESS = f"""
regions ...
=================================================================
==4711==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x7f42 at pc 0x7f51 bp 0x7ffc sp 0x7ffb
WRITE of size 64 at 0x7f42 thread T5
    #0 0x7f51 in fused_resnet::blocked::run() {ROOT}/csrc/cpu/blocked/fma.h:12
    #1 0x7f52 in at::parallel_for /somewhere/else.h:3
"""
UNDEFINED = f"{ROOT}/csrc/cpu/max_pool.cpp:56:23: runtime error: signed integer overflow: 2 * 9223372036854775807\n"
RACE = f"""
WARNING: ThreadSanitizer: data race (pid=4711)
  Write of size 4 at 0x7b10 by thread T2:
    #0 max_pool_rows {ROOT}/csrc/cpu/max_pool.cpp:65 (_C_cpu.so+0x1234)
"""


@pytest.mark.parametrize(
    "output, first, place",
    [
        (ADDRESS, "ERROR: AddressSanitizer: heap-buffer-overflow", "csrc/cpu/blocked/fma.h:12"),
        (UNDEFINED, "csrc/cpu/max_pool.cpp:56:23: runtime error: signed integer overflow", ""),
        (RACE, "WARNING: ThreadSanitizer: data race", "csrc/cpu/max_pool.cpp:65"),
    ],
    ids=["address", "undefined", "race"],
)
def test_what_is_a_finding(output, first, place):
    (found,) = sanitizers.findings(output * 2)
    assert found.startswith(first) and place in found
    assert str(ROOT) not in found and "else.h" not in found


def test_a_clean_run_has_no_finding():
    output = 'regions ...\n{"passed": true, "problems": 3, "instruction_set": "avx2"}\n'
    assert sanitizers.findings(output) == []
    assert sanitizers.reported(output)["problems"] == 3 and sanitizers.reported("ended") == {}


@pytest.mark.parametrize(
    "outcome, findings, passed",
    [("passed", "", True), ("passed", RACE, False), ("failed", "", False), ("failed", ADDRESS, False)],
    ids=["clean", "a race in a process that ends well", "a wrong result", "an access"],
)
def test_each_instruction_set_counts(tmp_path, monkeypatch, outcome, findings, passed):
    """The widest that is there runs first and is clean; what the narrower one finds is not lost."""

    def run(name, folder, limit_s, *arguments, **variables):
        if variables.get("FUSED_RESNET_CPU_ISA") == "portable":
            return Result(outcome, "the end"), findings + '{"instruction_set": "portable"}'
        return Result("passed", "the end"), '{"instruction_set": "avx2"}'

    monkeypatch.setattr(sanitizers, "why_not", lambda name: None)
    monkeypatch.setattr(sanitizers, "build", lambda *_: Result("passed", ""))
    monkeypatch.setattr(sanitizers, "run", run)
    file = tmp_path / "sanitizers.json"
    assert sanitizers.main(["--only", "thread", "--out", str(file)]) == (0 if passed else 1)
    record = json.loads(file.read_text())
    assert record["passed"] is passed
    assert [row["instruction_set"] for row in record["rows"]] == ["avx2", "portable"]
    assert [row["outcome"] == "passed" for row in record["rows"]] == [True, passed]


def test_a_compiler_without_sanitizers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitizers, "_library", lambda cxx, name: name)
    assert cpu_check.main(["--out", str(tmp_path), "--only", "sanitizers"]) == 0
    (step,) = json.loads((tmp_path / "check.json").read_text())["steps"].values()
    assert step["outcome"] == "not run" and "has no libasan.so" in step["detail"]
    assert sanitizers.main([]) == 1
    assert "not run" in capsys.readouterr().out


@needs_kernels
def test_nothing_is_written_between_maps_that_lie_apart():
    drawn = next(d for d in (problems.drawn_at(0, i) for i in range(99)) if d.N > 1 and d.residual and d.threads == 2)
    for name, dtype in problems.kernels_here().items():
        tensors = problems.tensors_of(drawn, dtype)
        inputs = [*tensors.xs, tensors.residual]
        compact = problems.region_of(drawn, tensors, dtype).compile()
        with sanitized.maps_apart():
            region = problems.region_of(drawn, tensors, dtype).compile()
        workspace = CompiledRegion.empty_workspace(region).fill_(0xFF)
        (y,), (expected,) = region(inputs, workspace, name), compact(inputs, compact.empty_workspace(), name)
        assert torch.equal(y, expected)
        assert len(region.gaps) > 2 and all((workspace[at : at + sanitized.GAP] == 0xFF).all() for at in region.gaps)


@needs_kernels
def test_chains_have_every_kind_of_step():
    """In each dtype all that it has: a new kind is to be run under sanitizers, too."""
    of_int8 = {StepKind.WRITE_MEANS, StepKind.WRITE_LINEAR, StepKind.MEANS, StepKind.LINEAR}
    for dtype, others in ((torch.float32, of_int8), (torch.bfloat16, of_int8), (torch.int8, {StepKind.WINOGRAD})):
        drawn = [sanitized.chain_at(0, index, dtype) for index in range(8)]
        for kind in set(StepKind) - others:
            assert sum(kind in chain.region.kinds for chain in drawn) >= 3, (dtype, kind)


@needs_kernels
def test_chains_run_in_bands_and_are_the_same_by_all_kernels():
    report = sanitized.chains(3, 5)
    assert report.passed, str(report)
    here = sanitized.micro_kernels_here()
    assert set(here.values()) == {torch.float32, torch.bfloat16, torch.int8}
    assert {name: entry.ok for name, entry in report.backends.items()} == {f"chain/{name}": 3 for name in here}


@needs_kernels
def test_a_kernel_of_other_bytes_is_found(monkeypatch):
    """One that a chain is given to with another weight."""
    chain_at, seen = sanitized.chain_at, []

    def other(seed, index, dtype):
        chain = chain_at(seed, index, dtype)
        seen.append(dtype)
        if seen.count(torch.int8) == 2 and dtype == torch.int8:
            chain.compiled.weights[1].mul_(-1)
        return chain

    monkeypatch.setattr(sanitized, "chain_at", other)
    found = [name for name, entry in sanitized.chains(1, 5).backends.items() if entry.mismatches]
    assert len(found) == 1 and found[0].endswith(("int8", "int8_emulated", "vnni"))


# ------------------------------------------------------------------------------------------------------ broken kernels

POOLING = "csrc/cpu/max_pool.cpp"
BROKEN = {
    "one pixel past the map": (
        "address,undefined", "(row * s.Q + q) * s.C;", "(row * s.Q + q + 1) * s.C;", "heap-buffer-overflow",
    ),
    "signed overflow": (
        "address,undefined", "% s.P * s.stride_h -", "% s.P * s.stride_h * INT64_MAX -", "signed integer overflow",
    ),
    "shares that overlap": (
        "thread", "run(x, out, s, begin, end)", "run(x, out, s, std::max<int64_t>(begin - 1, 0), end)", "data race",
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_reported(tmp_path, what):
    """The pooling alone: what is compiled and run for it takes a few seconds."""
    name, right, wrong, report = BROKEN[what]
    if (why := sanitizers.why_not(name)) is not None:
        pytest.skip(why)
    files = ["setup.py", "fused_resnet/__init__.py", "fused_resnet/operators/schemas.py"]
    root, folder = tmp_path / "source", tmp_path / "build"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    source = (root / POOLING).read_text()
    assert source.count(right) == 1
    (root / POOLING).write_text(source.replace(right, wrong))
    folder.mkdir()
    assert sanitizers.build(name, folder, 300, root, ("cpu/dispatch.cpp", "cpu/max_pool.cpp")).outcome == "passed"
    result, output = sanitizers.run(name, folder, 120, "--parts", "poolings", "--problems", "8")
    found = sanitizers.findings(output, root)
    assert result.outcome == "failed" and report in found[0] and POOLING in found[0], output
