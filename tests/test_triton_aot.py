"""The Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, tensor cores, NaN kept.

Compiled in processes of their own, since TRITON_INTERPRET turns this one's kernels into interpreter objects.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

_WORKS_HERE = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not _WORKS_HERE, reason="needs Triton with its NVIDIA tools")

TENSOR_CORES = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}


@pytest.fixture(scope="module")
def compiler_environment(tmp_path_factory):
    """A clean environment with a Triton cache of its own, so that everything is compiled now."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return dict(environment, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


def python(environment, *arguments) -> str:
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def compiled(environment, *arguments) -> list[dict]:
    return json.loads(python(environment, "-m", "fused_resnet.triton_kernels.aot", "--json", *arguments))


def check(report: dict, dtype: str) -> None:
    found, arch, name = report["instructions"], report["arch"], report["problem"]
    label = f"sm_{arch} {name} {report['config']}: {found}"
    assert report["stack_bytes"] == 0 and "spill" not in found, label
    assert report["registers"] <= 255 and report["shared_bytes"] <= 99 * 1024, label
    assert "max" not in found, f"{label}: a maximum that drops NaN"
    if "relu" in name or report["kernel"] == "_add_relu_kernel":
        assert "max.NaN" in found, label
    if "relu6" in name:
        assert "min.NaN" in found, label
    if report["config"] is None:
        assert "LDG.128" in found and "STG.128" in found, label
        return
    assert TENSOR_CORES[arch] & set(found), f"{label}: no tensor cores"
    channels = int(name.split("x")[1]) // (32 if " g32 " in name else 1)
    if channels % 16 == 0:
        assert "LDGSTS" in found and "STG.128" in found, f"{label}: not pipelined, or narrow stores"
    if dtype != "float32" and report["config"]["BLOCK_M"] >= 64 and arch >= 90:
        assert "HMMA" not in found, f"{label}: the previous generation's tensor cores"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_default_configs(compiler_environment, arch):
    """ResNet-50's, ResNeXt's and CIFAR's convolutions in fp16, and both add_relu kernels."""
    reports = compiled(compiler_environment, "--arch", str(arch), "--dtype", "float16")
    assert {report["kernel"] for report in reports} == {
        "_pointwise_bn_act_kernel", "_conv_bn_act_kernel", "_add_relu_kernel", "_add_relu_backward_kernel",
    }  # fmt: skip
    for report in reports:
        check(report, "float16")


_OTHER_DTYPES = """
import itertools, json, torch
from fused_resnet.triton_kernels import aot
reports = []
for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
    torch.backends.cudnn.conv.fp32_precision = precision
    pointwise, _, filtered = itertools.islice(aot.problems(dtype), 3)
    for problem in (pointwise, filtered):
        reports.append((str(dtype)[6:], precision, aot.compile_conv(problem, 90)._asdict()))
print(json.dumps(reports))
"""


def test_bfloat16_tf32_and_full_fp32(compiler_environment):
    for dtype, precision, report in json.loads(python(compiler_environment, "-c", _OTHER_DTYPES)):
        report["config"] = dict(enumerate(report["config"])) | {"BLOCK_M": report["config"][0]}
        if (dtype, precision) == ("float32", "ieee"):
            assert "FFMA" in report["instructions"] and not TENSOR_CORES[90] & set(report["instructions"])
            assert report["stack_bytes"] == 0
        else:
            check(report, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_configs(compiler_environment, arch, dtype):
    for report in compiled(compiler_environment, "--arch", str(arch), "--dtype", dtype, "--all-configs"):
        check(report, dtype)


_ONES = """
import json, torch
from fused_resnet.problem import AddReluProblem, ConvProblem
from fused_resnet.triton_kernels import aot

def problem(N, C, H, W, K, filter_size, groups=1):
    return ConvProblem(
        N, C, H, W, K, *filter_size, (1, 1), (filter_size[0] // 2, filter_size[1] // 2), (1, 1), groups,
        "relu", True, True, True, torch.float16, "cuda",
    )

reports = [
    aot.compile_conv(problem(1, 1, 1, 1, 1, (1, 1)), 90),
    aot.compile_conv(problem(1, 1, 1, 1, 1, (3, 3)), 90),
    aot.compile_conv(problem(1, 16, 1, 9, 1, (1, 3)), 90),
    aot.compile_conv(problem(2, 6, 5, 1, 6, (3, 1), groups=6), 90),
    aot.compile_add_relu(AddReluProblem((1,), True, torch.float16, "cuda"), 90),
    aot.compile_add_relu(AddReluProblem((2**16, 2**16), True, torch.float16, "cuda"), 90, backward=True),
]
print(json.dumps([report.stack_bytes for report in reports]))
"""


def test_sizes_that_change_the_types_of_arguments_compile(compiler_environment):
    """An argument of 1 is a constant to Triton and one above 2**31 has 64 bits; the interpreter hides both."""
    assert json.loads(python(compiler_environment, "-c", _ONES)) == [0] * 6


_SPECIALISATION = """
import itertools, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fused_resnet.problem import ConvOperands
from fused_resnet.triton_kernels import aot, conv_bn_act

backend = make_backend(GPUTarget("cuda", 90, 32))
for problem in aot.problems(torch.float16):
    problem = problem._replace(N=1)
    tensor = torch.zeros(64, dtype=torch.float16)  # 64-byte aligned, as PyTorch's allocators give them
    operands = ConvOperands(tensor, tensor, tensor.float(), bias=tensor.float())
    kernel, _, arguments, options = conv_bn_act.prepare(problem, operands, tensor, conv_bn_act.default_config(problem))
    signature, constants, attributes, _ = aot.specialise(kernel, arguments, options)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, launched, _ = bind(*arguments, **options)
    assert len(launched) == len(signature)
    for position, (name, (kind, hint)) in enumerate(zip(signature, launched)):
        assert signature[name] == kind, (name, signature[name], kind)
        divisible = isinstance(hint, str) and "D" in hint
        assert ((position,) in attributes) == divisible, (name, hint, attributes)
"""


def test_specialised_as_the_launcher_would(compiler_environment):
    """Types, constants and alignment hints against Triton's own argument binder."""
    python(compiler_environment, "-c", _SPECIALISATION)


def test_interpreted_kernels_are_refused():
    environment = dict(os.environ, TRITON_INTERPRET="1")
    command = [sys.executable, "-m", "fused_resnet.triton_kernels.aot", "--arch", "90"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "unset it" in result.stderr


def test_table(compiler_environment):
    """One line per kernel: where, what, registers, instructions."""
    command = ["-m", "fused_resnet.triton_kernels.aot", "--arch", "90", "--only", "32x256x56x56 float16"]
    forward, backward = python(compiler_environment, *command).splitlines()
    assert forward.startswith("sm_90") and " regs " in forward and "max.NaN" in forward
    assert backward.startswith("sm_90") and "max.NaN" not in backward
