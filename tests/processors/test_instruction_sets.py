"""Narrower processors, as far as variables make them: the CPU backends, plans and their tests within each limit."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resnet
from fused_resnet import BackendError, backends, models, testing
from fused_resnet.backends import onednn
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.kernels import compiled
from fused_resnet.machine import files
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from tests.support import networks

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "FUSED_RESNET_CPU_ISA", "ATEN_CPU_CAPABILITY")
UNLIMITED = {name: value for name, value in os.environ.items() if name not in LIMITS}
NEEDS_LIBRARY = pytest.mark.skipif(compiled.load("cpu") is not None, reason=str(compiled.load("cpu")))


def processor_flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    return set()


def widest_kernels() -> str:
    """What the C++ kernels use on this processor where nothing limits them."""
    wanted = {"avx512": {"avx512f", "avx512bw", "avx512vl"}, "avx2": {"avx2", "fma"}, "portable": set()}
    return next(name for name, flags in wanted.items() if flags <= processor_flags())


# ------------------------------------------------------------------------------------------- the C++ kernels' own limit

# One process a case, forked before the library is loaded. Only the instructions keep a NaN's payload when they round it
# to float16, so its bits show what really ran.
CHOOSE = """
import json, os, sys, torch
import fused_resnet
from fused_resnet.kernels import compiled
for variables in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(variables)
        print(json.dumps(variables), flush=True, file=sys.stderr)
        assert compiled.load("cpu") is None
        nan, out = torch.full((8,), 0x7E55, dtype=torch.int16).view(torch.half), torch.empty(8, dtype=torch.half)
        torch.ops.fused_resnet.cpu_add_relu(nan, nan, out)
        bits = [hex(bits) for bits in set(out.view(torch.int16).tolist())]
        print(json.dumps([*compiled.instruction_set().values(), *bits]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
OWN, ATEN = "FUSED_RESNET_CPU_ISA", "ATEN_CPU_CAPABILITY"
ORDER = ("portable", "avx2", "avx512")
CHOICES = [
    ({}, "avx512", None),
    ({OWN: ""}, "avx512", None),
    ({OWN: "portable"}, "portable", OWN),
    ({OWN: "avx2"}, "avx2", OWN),
    ({OWN: "avx512"}, "avx512", OWN),
    ({ATEN: "default"}, "portable", ATEN),
    ({ATEN: "avx2"}, "avx2", ATEN),
    ({ATEN: "avx512"}, "avx512", ATEN),
    ({ATEN: "avx2", OWN: "avx512"}, "avx512", OWN),
    ({ATEN: "avx2", OWN: "portable"}, "portable", OWN),
    ({ATEN: "avx2", OWN: "AVX512"}, "avx2", ATEN),
]


@NEEDS_LIBRARY
def test_variables_choose_the_kernels_instructions():
    """Ours decides where it names a set, else torch's; neither goes beyond the processor."""
    command = [sys.executable, "-c", CHOOSE, json.dumps([variables for variables, _, _ in CHOICES])]
    env = {**UNLIMITED, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for (variables, allowed, limited_by), line in zip(CHOICES, done.stdout.splitlines(), strict=True):
        name, why, *bits = json.loads(line)
        assert name == min(allowed, widest_kernels(), key=ORDER.index), variables
        is_limited = ORDER.index(allowed) < ORDER.index(widest_kernels())
        widest = "this processor and the kernels have no wider ones"
        assert why == (f"{limited_by}={variables[limited_by]}" if is_limited else widest), variables
        if "f16c" in processor_flags():
            assert bits == ["0x7e00" if name == "portable" else "0x7e55"], variables
    assert [line for line in done.stderr.splitlines() if "ignored" in line] == [
        f"{OWN}=AVX512 is ignored: it may be one of portable, avx2, avx512"
    ]


# -------------------------------------------------------------------------------- backends and plans within each limit

# The variables, the flag of a processor that reaches the limit, and what oneDNN's own line must and must not name.
WITHIN = {
    "nothing": ({}, None, "", None),
    "oneDNN SSE4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, "sse4_1", "SSE4.1", "AVX"),
    "oneDNN AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", "AVX2", "AVX-512"),
    "oneDNN AVX-512": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512f", "AVX-512", "bfloat16|AMX"),
    "oneDNN AVX-512 with bf16": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16", "bfloat16", "float16,|AMX"),
    "ours portable": ({OWN: "portable"}, None, "", None),
    "ours AVX2": ({OWN: "avx2"}, "avx2", "", None),
    "ours AVX-512": ({OWN: "avx512"}, "avx512f", "", None),
    "torch's default": ({ATEN: "default"}, None, "", None),
    "AVX2 everywhere": ({ATEN: "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", "AVX2", "AVX-512"),
}
KERNELS = {"ours portable": "portable", "torch's default": "portable", "ours AVX2": "avx2", "AVX2 everywhere": "avx2"}
TORCHS = {"torch's default": "DEFAULT", "AVX2 everywhere": "AVX2"}
# of 150 random and 300 common problems; oneDNN has fp32 within every limit
AT_LEAST = {"conv_bn_act/eager": 400, "conv_bn_act/onednn": 140, "add_relu/eager": 25, "add_relu/cpu": 20,
            "conv_bn_act/winograd": 60, "conv_bn_act/grouped": 80, "conv_bn_act/direct": 80,
            "conv_bn_act/blocked": 40}  # fmt: skip


def in_a_process_within(variables, command):
    env = {**UNLIMITED, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


@NEEDS_LIBRARY
@pytest.mark.full
@pytest.mark.parametrize("limit", WITHIN)
def test_within(limit, tmp_path):
    variables, flag, names, lacks = WITHIN[limit]
    if backends.onednn_missing(torch.float32) or (flag and flag not in processor_flags()):
        pytest.skip(backends.onednn_missing(torch.float32) or f"this processor has no {flag}")
    output = in_a_process_within(variables, [__file__, str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    # the limit took effect
    onednn_set = re.search(r"onednn_verbose.*,cpu,isa:(.*)", output)[1]
    assert names in onednn_set and not (lacks and re.search(lacks, onednn_set)), onednn_set
    assert record["kernels"] == KERNELS.get(limit, widest_kernels())
    assert record["torch"] == TORCHS.get(limit, record["torch"])
    # all that can run ran, without a mismatch
    for report in record["reports"]:
        assert report["passed"], report
    for name, minimum in AT_LEAST.items():
        assert sum(report["backends"].get(name, {"ok": 0})["ok"] for report in record["reports"]) >= minimum, name
    has_onednn = {short: reason is None for short, reason in record["onednn_missing"].items()}
    assert has_onednn["fp32"] and (has_onednn["bf16"] or "AVX-512" not in onednn_set)
    value = variables.get("ONEDNN_MAX_CPU_ISA")
    for short, reason in record["onednn_missing"].items():
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(short)
        within = f" within ONEDNN_MAX_CPU_ISA={value}" if value else ""
        assert reason in (None, f"this CPU has no {dtype} instructions that oneDNN can use{within}")
        assert record["refused"][short] == reason
    # `auto` took what there is
    # in bf16 without oneDNN: in regions where there is AMX, which oneDNN's limit does not limit
    ours = {"winograd", "grouped", "blocked"} | ({"direct"} if not has_onednn["bf16"] else set())
    for plan in record["plans"]:
        used = set(plan["backends"])
        assert used <= ours | {"onednn" if has_onednn[plan["dtype"]] else "eager"}, plan
        assert plan["error"] <= plan["allowed"] < 0.1, plan
    taken = {used for plan in record["plans"] for used in plan["backends"]}
    assert {"winograd", "grouped", "onednn"} <= taken and (has_onednn["bf16"] or {"direct", "blocked"} & taken)


def record_of_this_process():
    """What `test_within` asserts on."""
    names = ["eager", "onednn", "winograd", "grouped", "direct", "blocked", "cpu"]
    reports = [testing.verify(150, 5, backends=names), testing.verify(300, 11, backends=names[:6], kind="common")]
    return {
        "kernels": compiled.instruction_set()["name"],
        "torch": torch.backends.cpu.get_cpu_capability(),
        "onednn_missing": {short: backends.onednn_missing(dtype) for short, dtype in DTYPES.items()},
        "refused": {short: why_refused(dtype) for short, dtype in DTYPES.items()},
        "reports": [report.as_dict() for report in reports],
        "plans": [plan_of(*which) for which in PLANS],
    }


PLANS = [
    *(("basic", dtype) for dtype in DTYPES),
    *(("bottleneck", dtype) for dtype in DTYPES),
    ("resnet18", "fp32"),
    ("resnet18", "bf16"),
]


def plan_of(name, short):
    """A frozen network's backends, and its error against fp64 beside what support.plans.as_good_as_plain allows."""
    torch.manual_seed(0)
    if name == "resnet18":
        model, x = networks.randomize(models.resnet18(num_classes=10)), torch.randn(2, 3, 65, 64)
    else:
        model = networks.small(BasicBlock) if name == "basic" else networks.small(Bottleneck, groups=2)
        x = torch.randn(2, 3, 17, 16)
    frozen = fused_resnet.freeze(model, x, dtype=DTYPES[short])
    modules = list(frozen.plan(x).modules())
    used = [conv.backend.name for conv in modules if hasattr(conv, "backend")]
    regions = [module for module in modules if isinstance(module, FrozenRegion)]
    used += [region.selection_of(region.convolutions[0]).backend.name for region in regions]
    exact = networks.in_fp64(model, x)
    with torch.no_grad():
        plain = model.to(DTYPES[short])(x.to(DTYPES[short]))
    return {
        "network": name,
        "dtype": short,
        "backends": sorted(set(used)),
        "error": networks.error(frozen(x), exact),
        "allowed": networks.allowed(plain, exact, winograd=networks.has_winograd(frozen.plan(x))),
    }


def why_refused(dtype):
    """What a plan says where oneDNN is asked for by name."""
    model, x = networks.single().to(dtype), torch.randn(1, 16, 8, 8, dtype=dtype)
    try:
        fused_resnet.freeze(model, x, backend="onednn")
    except BackendError as error:
        return re.search(r"cannot run this: (.*)\. Use", str(error))[1]
    return None


def show_onednn_s_instructions():
    """One convolution, of which oneDNN writes what it may use."""
    operands = ConvOperands(torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3))
    problem = conv_problem(operands, (1, 1), (1, 1), (1, 1), 1, "relu")
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        onednn.bind(problem, operands.weight, None)(operands.x)


# ---------------------------------------------------------------------------------------------- tests within each limit


@pytest.mark.full
@pytest.mark.parametrize("limit", ["oneDNN SSE4.1", "oneDNN AVX2", "oneDNN AVX-512", "AVX2 everywhere"])
@pytest.mark.parametrize("where, which", (
    ("tests/freezing/test_values.py tests/freezing/test_memory.py tests/freezing/test_lowering.py "
     "tests/freezing/test_dtypes.py::test_norms_without_statistics_in_bf16 tests/freezing/test_forwards.py",
     "values or fp16 or models or sums or pass or pooling or norms or windows or folding"),
    ("tests/operators/test_detours.py", "gradients_are_right or composite or lower"),
), ids=("plans", "detours"))  # fmt: skip
def test_tests_within(limit, where, which):
    variables, flag, *_ = WITHIN[limit]
    if flag not in processor_flags():
        pytest.skip(f"this processor has no {flag}")
    options = ["-q", "-p", "no:cacheprovider", "-m", "not full", "-k", which]
    output = in_a_process_within(variables, ["-m", "pytest", *options, *where.split()])
    assert int(re.search(r"(\d+) passed", output)[1]) > 20, output


@pytest.mark.full
@NEEDS_LIBRARY
@pytest.mark.parametrize("limit", ["ours portable", "AVX2 everywhere"])
def test_bn_act_within(limit):
    variables, flag, *_ = WITHIN[limit]
    if flag is not None and flag not in processor_flags():
        pytest.skip(f"this processor has no {flag}")
    options = ["-q", "-p", "no:cacheprovider", "-k", "cpu or cancel or threads or mask or double"]
    output = in_a_process_within(variables, ["-m", "pytest", *options, "tests/operators/test_bn_act.py"])
    assert int(re.search(r"(\d+) passed", output)[1]) > 80, output


if __name__ == "__main__":
    show_onednn_s_instructions()
    files.write_json(Path(sys.argv[1]), record_of_this_process())
