"""Kernels compiled ahead of time: found again by a launch, and a compiler that ends costs one config."""

import os
import subprocess
import sys

import pytest
import torch

from fused_resnet.kernels import compiled, sources
from fused_resnet.kernels.triton import carried, precompile, runtime
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from tests.support.tuned_files import problem

CONFIGS = [TritonConfig(32, 32, 32, 8, 4, stages) for stages in (2, 3, 4)]


def test_a_config_that_ends_the_compiler_costs_itself_alone(monkeypatch):
    started = []

    def work(self, problem, configs):
        started.append(len(configs))
        return ([None], "the compiler ended: Segmentation fault") if len(configs) == 3 else (["bad"], "")

    monkeypatch.setattr(precompile.Precompiler, "_work", work)
    with precompile.Precompiler(90, workers=1) as compiler:
        results = compiler.submit(problem(device="cuda"), CONFIGS).result()
    assert list(results.items()) == list(zip(CONFIGS, (None, "the compiler ended: Segmentation fault", "bad")))
    assert started == [3, 1]


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    for config in json.loads(line)["configs"]:
        if config["num_stages"] == 3:
            print("ptxas fatal: no", file=sys.stderr)
            os._exit(7)
        if config["num_stages"] == 4:
            time.sleep(60)
        print("a library speaks")
        print(json.dumps({"seconds": 1, "why": str(os.getpid())}), flush=True)
"""


@pytest.fixture
def pretended(monkeypatch):
    """Workers that compile nothing and say who they are: 3 stages end them, 4 take too long."""
    popen, started = subprocess.Popen, []

    def start(command, **how):
        started.append(popen([sys.executable, "-c", WORKER], **how))
        return started[-1]

    monkeypatch.setattr(precompile.subprocess, "Popen", start)
    monkeypatch.setattr(precompile, "_STARTUP_S", 20.0)
    monkeypatch.setattr(precompile, "_CONFIG_S", 1.0)
    return started


def test_a_worker_serves_several_problems(pretended):
    with precompile.Precompiler(90, workers=1) as compiler:
        first, second = (compiler.submit(problem(device="cuda"), CONFIGS[:1]) for _ in range(2))
        assert first.result() == second.result() == {CONFIGS[0]: str(pretended[0].pid)}
    assert len(pretended) == 1 and pretended[0].wait(10) is not None


def test_a_worker_that_ends_or_hangs_is_replaced(pretended):
    again = CONFIGS[0]._replace(BLOCK_M=64)
    with precompile.Precompiler(90, workers=1) as compiler:
        results = compiler.submit(problem(device="cuda"), [*CONFIGS, again]).result()
        after = compiler.submit(problem(device="cuda"), CONFIGS[:1]).result()
    assert results[CONFIGS[1]] == "the compiler ended: ptxas fatal: no"
    assert results[CONFIGS[2]] == "the compiler did not end"
    pids = [str(process.pid) for process in pretended]
    assert [results[CONFIGS[0]], results[again], after[CONFIGS[0]]] == [pids[0], pids[2], pids[2]]
    assert len(pids) == 3 and all(process.wait(10) is not None for process in pretended)


def test_what_still_compiles_is_ended(monkeypatch):
    """While the threads that wait for the processes take them off the list."""

    class Process:
        def kill(self):
            compiler._running.discard(self)
            killed.append(self)

    killed = []
    with precompile.Precompiler(90, workers=1) as compiler:
        compiler._running.update(running := [Process(), Process(), Process()])
    assert set(killed) == set(running)


def test_carried_kernels_serve_only_what_they_were_compiled_for(tmp_path, monkeypatch):
    if runtime.triton_version() is None:
        pytest.skip("Triton is not installed")
    assert "holds no fused_resnet.json" in carried.why_not_carried(tmp_path, 90)
    for arch in (100, 90):
        carried.write_manifest(tmp_path, arch)
    assert carried.why_not_carried(tmp_path, 90) is None and carried.why_not_carried(tmp_path, 100) is None
    assert "sm_90, sm_100, this GPU is sm_80" in carried.why_not_carried(tmp_path, 80)
    monkeypatch.setattr(compiled, "built_digest", lambda patterns: "other")
    assert "other kernel sources" in carried.why_not_carried(tmp_path, 90)
    monkeypatch.setattr(carried, "triton_version", lambda: "2.0.0")
    assert "this is 2.0.0" in carried.why_not_carried(tmp_path, 90)
    with pytest.raises(ValueError, match="use another folder"):
        carried.write_manifest(tmp_path, 90)


@pytest.mark.full
def test_kernels_are_compiled_without_a_gpu_and_found_again(tmp_path):
    """Compiled twice, the second time from the cache: nothing is added. A tile that Triton refuses is reported."""
    if runtime.triton_version() is None:
        pytest.skip("Triton is not installed")
    one = problem(device="cuda", dtype=torch.float16)
    bad = CONFIGS[0]._replace(BLOCK_M=33)
    with precompile.Precompiler(90, tmp_path, workers=1) as compiler:
        first = compiler.submit(one, [*CONFIGS[:2], bad]).result()
        folders = sorted(path.name for path in tmp_path.iterdir())
        again = compiler.submit(one, CONFIGS[:2]).result()
    assert first[CONFIGS[0]] is None and first[CONFIGS[1]] is None and "does not compile" in first[bad]
    assert again == dict.fromkeys(CONFIGS[:2]) and sorted(path.name for path in tmp_path.iterdir()) == folders
    assert len(list(tmp_path.glob("*/*.cubin"))) == 2


@pytest.mark.full
def test_what_is_compiled_ahead_is_what_a_launch_looks_up(tmp_path):
    """Real tensors, aligned as torch aligns them, through the launcher: no new kernel. In a process of its own, since
    Triton must not be interpreted; the driver is replaced there too, and nothing is started."""
    if runtime.triton_version() is None:
        pytest.skip("Triton is not installed")
    one = problem(device="cuda", dtype=torch.float16, has_residual=True)
    configs = [CONFIGS[0], CONFIGS[0]._replace(split_k=2)]
    with precompile.Precompiler(90, tmp_path, workers=1) as compiler:
        assert set(compiler.submit(one, configs).result().values()) == {None}
    script = f"""
import torch
from triton.runtime import driver
from fused_resnet import measuring
from fused_resnet.kernels.triton import precompile
from fused_resnet.kernels.triton.conv import launch
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.operators.problem import parsed_problem
driver.set_active(precompile._Driver(90))
problem = parsed_problem({str(one)!r}, "cuda")
operands = measuring.folded_operands(measuring.random_operands(problem._replace(device="cpu"), "cpu"))
out = torch.empty(problem.output_shape, dtype=torch.float16)
for config in {list(map(tuple, configs))}:
    for each in launch.prepare(problem, operands, out, TritonConfig(*config)):
        each.kernel.warmup(*each.arguments, grid=(each.num_programs,), **each.options)
"""
    before = sorted(tmp_path.rglob("*"))
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3  # whole, in parts, and their sum
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=sources.ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert sorted(tmp_path.rglob("*")) == before
