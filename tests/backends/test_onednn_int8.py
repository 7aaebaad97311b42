"""oneDNN's convolutions of bytes: within their bound, where it has VNNI, and never unasked."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fused_resnet import backends, testing
from fused_resnet.backends import onednn_int8
from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.machine import devices, onednn
from fused_resnet.operators.problem import parsed_problem
from tests.support.scripts import ROOT

BACKEND = backends.known("conv_int8")["onednn"]
SAMPLE = parsed_problem("1x64x9x9 -> 64, 3x3 p1 uint8 bias relu", "cpu")
WRONG = "oneDNN computes padding around s8 wrongly in groups other than depthwise ones"
needs_vnni = pytest.mark.skipif(BACKEND.why_not(SAMPLE) is not None, reason=str(BACKEND.why_not(SAMPLE)))
WINDOWS = (
    "2x70x6x5 -> 40, 3x3 p1",
    "1x64x9x7 -> 33, 1x1 s2",
    "1x3x15x13 -> 16, 7x7 s2 p3",
    "2x96x7x9 -> 96, 3x3 s2 p1 g8",
    "1x128x6x7 -> 128, 3x3 p1 g32",
    "2x48x9x8 -> 48, 3x3 s(1, 2) p(1, 0) g48",  # depthwise
    "1x40x9x8 -> 40, 5x5 s2 p2 d(1, 2) g40",
    "2x47x17x4 -> 15, 5x7 s3 p2",  # one column, with a stride across it
    "1x7x1x3 -> 64, 3x3 s(3, 1) p(1, 3) d(1, 2)",  # stride above the filter's rows
    "3x20x1x1 -> 1, 1x1",
    "1x10x11x7 -> 1, 3x3 s3",  # a residual of one channel, which is channels_last in whatever strides
)


@needs_vnni
@pytest.mark.parametrize("window", WINDOWS)
def test_every_byte_is_within_its_bound(window):
    for seed, (dtype, epilogue, activation) in enumerate(
        (dtype, epilogue, activation)
        for dtype in ("uint8", "int8")
        for epilogue in ("bias", "bias+add")
        for activation in ("none", "relu", "relu6")
    ):
        p = parsed_problem(f"{window} {dtype} {epilogue} {activation}", "cpu")
        outcome = testing.check(testing.Case(p, quantized_operands(p, seed)), "onednn")
        if dtype == "int8" and window.endswith(("g8", "g32")):
            assert outcome.detail == WRONG
            continue
        assert outcome.status == "ok" and outcome.num_bytes > 0, (p, outcome)
        assert outcome.num_differing <= outcome.num_bytes / 100


@needs_vnni
def test_random_problems():
    report = testing.verify(60, seed=14, backends=["onednn"], kind="int8")
    entry = report.backends["conv_int8/onednn"]
    assert report.passed, report
    assert entry.ok > 50 and set(entry.cannot_run) <= {WRONG} and 0.9 < entry.worst_error <= 1


@needs_vnni
def test_a_byte_two_steps_off_is_a_mismatch(monkeypatch):
    case = testing.Case(SAMPLE, quantized_operands(SAMPLE, 0))

    def run(problem, operands):
        out = BACKEND.run(problem, operands)
        out[0, 3, 2, 1] += 2 if out[0, 3, 2, 1] < 100 else -2
        return out

    monkeypatch.setitem(backends.record.REGISTRY["conv_int8"], "onednn", BACKEND._replace(run=run))
    outcome = testing.check(case, "onednn")
    assert outcome.status == "mismatch" and "1 of 5184 bytes are too far off; at (n, k, p, q) = (0, 3, 2, 1)" in (
        outcome.detail
    )


@needs_vnni
def test_the_bound_is_of_this_backend_alone(monkeypatch):
    """A byte that is a step off is a mismatch of any other one."""
    case = testing.Case(SAMPLE, quantized_operands(SAMPLE, 0))
    exact = BACKEND._replace(name="exact", rounding=backends.Rounding())
    monkeypatch.setitem(backends.record.REGISTRY["conv_int8"], "exact", exact)
    outcome, bounded = testing.check(case, "exact"), testing.check(case, "onednn")
    assert (outcome.status == "ok") == (bounded.num_differing == 0)
    near = [name for name, one in backends.known("conv_int8").items() if one.rounding.near_bytes]
    assert near == ["onednn"]


def test_what_it_cannot_run():
    assert "the tensors are on cuda" in BACKEND.why_not(SAMPLE._replace(device="cuda"))


@needs_vnni
def test_what_onednn_computes_wrongly():
    p = parsed_problem("1x8x4x10 -> 32, 3x3 p3 g8 int8 bias relu", "cpu")
    assert BACKEND.why_not(p) == WRONG
    assert BACKEND.why_not(p._replace(C=1, groups=1)) == WRONG
    assert BACKEND.why_not(p._replace(C=36, K=34, groups=2)) == WRONG  # with AMX
    for right in (p._replace(padding=(0, 0)), p._replace(K=8), p._replace(dtype=torch.uint8), p._replace(groups=1)):
        assert BACKEND.why_not(right) is None


@pytest.mark.parametrize(
    "limit, flags, has_vnni",
    [
        (None, ("avx512_vnni",), True),
        (None, ("avx_vnni",), True),
        (None, ("avx512f", "avx2", "amx_tile"), False),
        ("ALL", ("avx_vnni",), True),
        ("avx512_core_vnni", ("avx512_vnni",), True),
        ("AVX512_CORE_VNNI", ("avx_vnni",), False),
        ("AVX512_CORE_AMX", ("avx512_vnni", "avx_vnni"), True),
        ("AVX512_CORE", ("avx512_vnni", "avx_vnni"), False),
        ("AVX2_VNNI", ("avx512_vnni",), False),
        ("AVX2_VNNI", ("avx_vnni",), True),
        ("AVX2", ("avx512_vnni", "avx_vnni"), False),
        ("SSE41", ("avx512_vnni", "avx_vnni"), False),
    ],
)
def test_vnni_is_asked_of_the_processor_and_the_limit(limit, flags, has_vnni, monkeypatch):
    monkeypatch.setattr(devices, "has_cpu_flag", lambda flag: flag in flags)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    reason = onednn.why_no_vnni.__wrapped__()
    within = "" if limit is None else f" within ONEDNN_MAX_CPU_ISA={limit}"
    missing = f"this CPU has no VNNI that oneDNN can use{within}, and without it sums of bytes saturate at 16 bits"
    assert reason == (None if has_vnni else missing)
    monkeypatch.setattr(onednn, "why_no_vnni", onednn.why_no_vnni.__wrapped__)
    assert onednn_int8.why_not(SAMPLE) == reason


# One process a limit, forked before oneDNN has read it: whether the backend is declined, and whether the largest sums
# of three kinds of convolutions come out right.
LIMITED = """
import json, os, sys, torch
from fused_resnet.backends import onednn_int8
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import parsed_problem
from fused_resnet.operators.quantized import Epilogue
for limit in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ["ONEDNN_MAX_CPU_ISA"] = limit
        for window in ("1x64x9x9 -> 64, 1x1", "1x64x9x9 -> 32, 3x3", "1x64x9x9 -> 64, 3x3 g4"):
            p = parsed_problem(window + " uint8 bias relu", "cpu")
            x = torch.full((1, 64, 9, 9), 255, dtype=torch.uint8)
            weight = torch.full((p.K, 64 // p.groups, p.R, p.S), 127, dtype=torch.int8)
            total = 255 * 127 * p.reduction
            epilogue = Epilogue(torch.full((p.K,), 200 / total), torch.zeros(p.K), 0.0, 0.0, 255.0, torch.uint8)
            y = onednn_int8.run(p, Int8Operands(x, weight, epilogue))
            print(json.dumps([limit, onednn_int8.why_not(p), bool((y == 200).all())]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
LIMITS = ("AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX", "ALL")


@pytest.mark.full
@pytest.mark.skipif(not devices.has_cpu_flag("avx2"), reason="oneDNN's limits are those of x86 with AVX2")
def test_it_is_declined_exactly_where_sums_saturate():
    variables = {name: value for name, value in os.environ.items() if name != "DNNL_MAX_CPU_ISA"}
    command = [sys.executable, "-c", LIMITED, json.dumps(LIMITS)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3 * len(LIMITS)
    for limit, reason, is_right in found:
        assert (reason is None) == is_right, (limit, reason)
        assert reason is None or reason.startswith("this CPU has no VNNI")
        assert reason is not None or limit not in ("AVX2", "AVX512_CORE")
