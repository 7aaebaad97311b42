"""The Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, tensor cores, NaN kept.

Compiled in processes of their own, since TRITON_INTERPRET turns this one's kernels into interpreter objects.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

_WORKS_HERE = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not _WORKS_HERE, reason="needs Triton with its NVIDIA tools")

IS_TRITON_3_6 = _WORKS_HERE and importlib.metadata.version("triton").startswith("3.6.")
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
    return json.loads(python(environment, "-m", "fused_resnet.kernels.triton.aot", "--json", *arguments))


def check(report: dict, dtype: str) -> None:
    """What holds for a kernel with pointers that sums the whole reduction, or walks flat memory."""
    found, arch, name = report["instructions"], report["arch"], report["problem"]
    label = f"sm_{arch} {name} {report['config']}: {found}"
    # Triton 3.6.0 keeps 8 bytes of one 1x1 kernel on the stack for sm_100; 3.7.1 none of any
    most = 8 if IS_TRITON_3_6 and arch == 100 and "1x1" in name else 0
    assert report["stack_bytes"] <= most and found.get("spill", 0) <= most // 4, label
    assert report["registers"] <= 255 and report["shared_bytes"] <= 99 * 1024, label
    assert "max" not in found, f"{label}: a maximum that drops NaN"
    if name.endswith(" training"):
        assert ("max.NaN" in found) == (report["kernel"] == "_forward_kernel"), label
        assert ("LDG.128" in found) != report["kernel"].startswith("_join"), label
        assert ("STG.128" in found) == (report["kernel"] in ("_forward_kernel", "_backward_kernel")), label
        return
    if "relu" in name or report["kernel"] == "_add_relu_kernel":
        assert "max.NaN" in found, label
    if "relu6" in name:
        assert "min.NaN" in found, label
    if report["kernel"] == "_affine_act_kernel" and "-> 52" in name:
        return  # rows of 52 channels or 196 pixels begin where no vector may
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
    """ResNet-50's, ResNeXt's and CIFAR's convolutions in fp16, add_relu's and bn_act's kernels, a stem's pooling."""
    reports = compiled(compiler_environment, "--arch", str(arch), "--dtype", "float16")
    assert {report["kernel"] for report in reports} == {
        "_pointwise_bn_act_kernel", "_conv_bn_act_kernel", "_add_relu_kernel", "_add_relu_backward_kernel",
        "_max_pool_kernel", "_affine_act_kernel", "_moments_kernel", "_join_moments_kernel", "_forward_kernel",
        "_products_kernel", "_join_products_kernel", "_backward_kernel",
    }  # fmt: skip
    for report in reports:
        check(report, "float16")


_CHAINS = """
import json, sys, torch
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.chain import shift
from fused_resnet.operators.problem import ChainProblem

reports = []
for C, size, K, L in json.loads(sys.argv[2]):
    problem = ChainProblem(32, C, size, size, K, L, "relu", getattr(torch, sys.argv[3]), "cuda")
    configs = [config for config in shift.configs(problem, int(sys.argv[1])) if config.tma == (sys.argv[1] == "90")]
    reports += [aot.compile_chain(problem, int(sys.argv[1]), config)._asdict() for config in configs]
print(json.dumps(reports))
"""
# C, side, K, L: layer1 of ResNet-50, to layer2, layer2, to layer3; the last block of a network; layer2 of Wide-50-2
CHAINS = ((64, 56, 256, 64), (64, 56, 256, 128), (128, 28, 512, 128), (128, 28, 512, 256))
OTHER_CHAINS = ((64, 56, 256, 0), (256, 28, 512, 256))


@pytest.mark.parametrize(
    "arch, chains, dtype",
    [
        (90, CHAINS[:1], "float16"), (80, CHAINS[3:], "float16"),
        pytest.param(90, CHAINS[1:] + OTHER_CHAINS, "float16", marks=pytest.mark.full),
        pytest.param(90, CHAINS, "bfloat16", marks=pytest.mark.full),
        pytest.param(80, CHAINS + OTHER_CHAINS, "float16", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_chains(compiler_environment, arch, chains, dtype):
    """No spills. On sm_90 TMA inside all loops, and wgmma that reads nothing from registers (Triton's issue 9433)."""
    for report in json.loads(python(compiler_environment, "-c", _CHAINS, str(arch), json.dumps(chains), dtype)):
        found, label = report["instructions"], f"sm_{arch} {report['problem']} {report['config']}"
        assert report["stack_bytes"] == 0 and "spill" not in found and "max" not in found, label
        assert report["registers"] <= 255 and report["shared_bytes"] <= (227 if arch == 90 else 99) * 1024, label
        dots, register_dots, copies = report["loops"]
        is_last = report["problem"].count("->") == 1
        assert dots == (2 if is_last else 3), label
        if arch == 90:
            assert "HGMMA" in found and "HMMA" not in found and "UTMALDG" in found and "LDGSTS" not in found, label
            assert (register_dots, copies) == (0, 4 if is_last else 5), label  # the 3x3's two, weights, the residual
        else:
            assert "HMMA" in found and "LDGSTS" in found and "UTMALDG" not in found, label


_POOLINGS = """
import json, sys, torch
from fused_resnet.kernels.triton import aot
from fused_resnet.operators.problem import MaxPoolProblem

stem = MaxPoolProblem(32, 64, 112, 112, 3, 3, (2, 2), (1, 1), "relu", True, torch.bfloat16, "cuda")
problems = (
    stem, stem._replace(dtype=torch.float32), stem._replace(R=13, S=13, stride=(1, 1), padding=(6, 6)),
    stem._replace(N=2**15, activation="relu6"), stem._replace(H=7, W=7, R=7, S=7, padding=(0, 0), has_bias=False),
)
print(json.dumps([aot.compile_max_pool(problem, int(sys.argv[1]))._asdict() for problem in problems]))
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_poolings(compiler_environment, arch):
    """In other dtypes, with large windows, one output for an image, and more than 2**31 elements."""
    for report in json.loads(python(compiler_environment, "-c", _POOLINGS, str(arch))):
        check(report, report["problem"].split()[4])
        assert report["stack_bytes"] == 0 and report["registers"] <= 64, report


_OTHER_DTYPES = """
import itertools, json, torch
from fused_resnet.kernels.triton import aot
reports = []
for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
    torch.backends.cudnn.conv.fp32_precision = precision
    pointwise, _, filtered = itertools.islice(aot.problems(dtype), 3)
    for problem in (pointwise, filtered):
        reports.append((str(dtype)[6:], precision, aot.compile_launches(problem, 90)[0]._asdict()))
print(json.dumps(reports))
"""


def test_bfloat16_tf32_and_full_fp32(compiler_environment):
    for dtype, precision, report in json.loads(python(compiler_environment, "-c", _OTHER_DTYPES)):
        report["config"] = dict(enumerate(report["config"])) | {"BLOCK_M": report["config"][0]}
        if (dtype, precision) == ("float32", "ieee"):
            assert "FFMA" in report["instructions"] and not TENSOR_CORES[90] & set(report["instructions"])
            assert report["stack_bytes"] <= (24 if IS_TRITON_3_6 else 0)  # which takes 1.5 times the registers
        else:
            check(report, dtype)


_SPLIT = """
import json, sys, torch
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.conv.configs import TritonConfig

p = ConvProblem(1, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1), (1, 1), 1, "relu", False, True, False, torch.float16, "cuda")
found = {}
for split_k in (1, 4):
    config = TritonConfig(64, 32, 32, 8, 4, 3, split_k=split_k)
    found[split_k] = aot.compile_launches(p, int(sys.argv[1]), config)[0]._asdict()
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_a_split_reduction_is_loaded_as_wide_as_a_whole_one(compiler_environment, arch):
    """Its first step is where its part begins, and still a multiple of the step."""
    whole, split = json.loads(python(compiler_environment, "-c", _SPLIT, str(arch))).values()
    assert split["instructions"]["LDGSTS"] >= whole["instructions"]["LDGSTS"] > 0, (whole, split)
    assert "LDG.U16" not in split["instructions"], split
    assert split["stack_bytes"] == 0 and split["registers"] <= whole["registers"] + 16, (whole, split)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_configs(compiler_environment, arch, dtype):
    for report in compiled(compiler_environment, "--arch", str(arch), "--dtype", dtype, "--all-configs"):
        if report["kernel"] in ("_pointwise_bn_act_kernel", "_conv_bn_act_kernel") and report["config"]["split_k"] == 1:
            check(report, dtype)
        else:
            label = f"sm_{arch} {report['problem']} {report['config']}"
            assert report["stack_bytes"] == 0 and "max" not in report["instructions"], label


_INT8 = """
import json, sys
from fused_resnet.operators.problem import parsed_problem
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.conv.configs import configs, default_config

arch, found = int(sys.argv[1]), []
for text in (
    "32x64x56x56 -> 256, 1x1 {} bias+add relu", "32x128x28x28 -> 128, 3x3 p1 {} bias relu",
    "32x256x56x56 -> 512, 1x1 s2 {} bias none", "32x3x224x224 -> 64, 7x7 s2 p3 {} bias relu",
):
    for dtype in sys.argv[3].split(","):
        p = parsed_problem(text.format(dtype), "cuda")
        chosen = {config.form: config for config in configs(p, arch)[::-1]}  # the first of each form
        for config in {default_config(p), *chosen.values()} if sys.argv[2] == "all" else [default_config(p)]:
            found.append((dtype, aot.compile_launches(p, arch, config)[0]._asdict()))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "arch, which",
    [(80, "default"), (90, "default"), *(pytest.param(a, "all", marks=pytest.mark.full) for a in (80, 90))],
)
def test_bytes(compiler_environment, arch, which):
    """s8 tensor cores, no spills; on sm_90 no wgmma reads u8 from registers (Triton's issue 9433)."""
    for dtype, report in json.loads(python(compiler_environment, "-c", _INT8, str(arch), which, "uint8,int8")):
        found, loops = report["instructions"], report["loops"]
        assert report["stack_bytes"] == 0 and "spill" not in found, report
        by_wgmma = arch == 90 and dtype == "int8"
        assert ("IGMMA" in found, "IMMA" in found) == (by_wgmma, not by_wgmma), report
        assert not by_wgmma or loops[1] == 0, "A comes from shared memory"
        if "x3x224x224" not in report["problem"]:
            assert "LDGSTS" in found or "UTMALDG" in found, report


@pytest.mark.parametrize(
    "arch, which",
    [(89, "default"), (90, "default"), *(pytest.param(a, "all", marks=pytest.mark.full) for a in (89, 90))],
)
def test_e4m3(compiler_environment, arch, which):
    """Tensor cores of e4m3, and no spills, although a step's sums lie beside all sums."""
    for _, report in json.loads(python(compiler_environment, "-c", _INT8, str(arch), which, "float8_e4m3fn")):
        found, loops = report["instructions"], report["loops"]
        assert report["stack_bytes"] == 0 and "spill" not in found, report
        assert ("QGMMA" in found, "QMMA" in found) == (arch == 90, arch == 89), report
        assert arch < 90 or loops[1] == 0, "A comes from shared memory"


_FORMS = """
import itertools, json, sys, torch
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.conv.configs import TritonConfig, configs

def problem(C, size, K, filter_size=1, stride=1, residual=False, dtype=torch.float16):
    return ConvProblem(
        256, C, size, size, K, filter_size, filter_size, (stride,) * 2, (filter_size // 2,) * 2, (1, 1), 1,
        "relu", False, True, residual, dtype, "cuda",
    )

gemm, filtered = TritonConfig(128, 128, 64, 8, 8, 4, "gemm_tma"), TritonConfig(128, 64, 64, 8, 4, 4, "rows_tma")
split = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4)
cases = {
    "gemm": (problem(64, 56, 256, residual=True), gemm, False),
    "gemm into row space": (problem(256, 56, 64), gemm._replace(BLOCK_N=64, num_warps=4), True),
    "gemm, persistent": (problem(512, 28, 128), gemm._replace(persistent=True), False),
    "gemm, split": (problem(2048, 7, 512)._replace(N=1), gemm._replace(split_k=4, **split), False),
    "gemm, stride 2": (problem(256, 56, 512, stride=2), gemm, False),
    "gemm, many sums": (problem(1024, 14, 512), gemm._replace(BLOCK_N=256, num_stages=3), False),
    "rows": (problem(64, 56, 64, 3), filtered, False),
    "rows, bf16": (problem(128, 28, 128, 3, dtype=torch.bfloat16), filtered, False),
    "rows that stay": (problem(64, 56, 64, 3, residual=True), filtered._replace(persistent=True), True),
    "rows, split": (problem(256, 14, 256, 3)._replace(N=1), filtered._replace(split_k=8, **split), False),
    "lines": (problem(512, 7, 512, 3), gemm._replace(form="lines_tma"), False),
    "lines, stride 2": (problem(128, 56, 128, 3, stride=2), gemm._replace(form="lines_tma"), True),
}
if sys.argv[2] == "all":
    legal = [(p, config) for p, *_ in cases.values() for config in configs(p, int(sys.argv[1]))]
    cases = {f"{p} {'x'.join(map(str, config))}": (p, config, False) for p, config in legal[::3]}
reports = {
    name: [r._asdict() | {"loops": r.loops._asdict()} for r in
           aot.compile_launches(p, int(sys.argv[1]), config, row_space_output=in_row_space)]
    for name, (p, config, in_row_space) in cases.items()
}
print(json.dumps(reports))
"""


def check_form(name: str, kernels: list[dict], arch: int) -> None:
    """No spill; where TMA brings the operands, the tensor cores read both of them where it left them."""
    for report in kernels:
        found, label = report["instructions"], f"sm_{arch} {name}: {report}"
        # sm_100, Triton 3.7.1: the split gemm keeps 8 bytes on the stack with 72 registers, everything else nothing
        assert report["stack_bytes"] <= (8 if arch == 100 and "split" in name else 0), label
        assert report["registers"] <= 255 and report["shared_bytes"] <= 227 * 1024, label
        assert "max" not in found, f"{label}: a maximum that drops NaN"
    assert "max.NaN" in kernels[-1]["instructions"], name
    first, loops = kernels[0], kernels[0]["loops"]
    assert TENSOR_CORES[arch] & set(first["instructions"]), f"{name}: no tensor cores"
    if first["kernel"].endswith("_tma_kernel"):
        assert loops["dots"] > 0 and loops["register_dots"] == 0, f"{name}: {loops}, an operand goes through registers"
        assert loops["tma_copies"] >= 2 * loops["dots"], f"{name}: {loops}, the loop does not fetch ahead"
        assert "UTMALDG" in first["instructions"] and "HMMA" not in first["instructions"], f"{name}: {first}"


@pytest.mark.parametrize("arch", [90, 100])
def test_tma_forms(compiler_environment, arch):
    """Every form, persistent and split, from and into row space: pipelined TMA, no operand through registers."""
    reports = json.loads(python(compiler_environment, "-c", _FORMS, str(arch), "some"))
    for name, kernels in reports.items():
        check_form(name, kernels, arch)
        assert kernels[0]["kernel"].endswith("_tma_kernel"), name
        assert [k["kernel"] for k in kernels[1:]] == ["sum_parts_kernel"] * ("split" in name), name


@pytest.mark.full
@pytest.mark.parametrize("arch", [90])
def test_a_sample_of_the_search_space(compiler_environment, arch):
    """Every third config that is worth measuring for those problems; benchmarks/aot_table.py compiles all of them."""
    reports = json.loads(python(compiler_environment, "-c", _FORMS, str(arch), "all"))
    assert len(reports) > 30
    for name, kernels in reports.items():
        check_form(name, kernels, arch)


_TTGIR = """
tt.func @kernel() {
  ttng.async_tma_copy_global_to_local %x[%i, %j] %a, %bar, %true : !tt.tensordesc<tensor<64x64xf16>>
  %r:2 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %zero) -> (tensor<64x64xf32>) : i32 {
    scf.if %p {
      ttng.async_tma_copy_global_to_local %x[%i, %j] %a, %bar, %true : !tt.tensordesc<tensor<64x64xf16>>
    } else {
    }
    %d = ttng.warp_group_dot %a, %b, %acc {inputPrecision = 0 : i32} : FIRST * !ttg.memdesc<64x64xf16, #shared, #smem>
  }
  %e = ttng.warp_group_dot %a, %b, %acc {inputPrecision = 0 : i32} : tensor<1xf16> * !ttg.memdesc<64x64xf16, #shared>
}
"""


@pytest.mark.parametrize(
    "first, register_dots",
    [
        ("!ttg.memdesc<64x64xf16, #shared, #smem, mutable>", 0),
        ("tensor<64x64xf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>>", 1),
    ],
    ids=["shared memory", "registers"],
)
def test_loop_facts(first, register_dots):
    """What stands before and behind the loop does not count, what stands in a branch within it does."""
    from fused_resnet.kernels.triton import aot

    assert aot.loop_facts(_TTGIR.replace("FIRST", first)) == (1, register_dots, 1)


_ONES = """
import json, torch
from fused_resnet.operators.problem import AddReluProblem, ConvProblem
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.conv.configs import TritonConfig

def problem(N, C, H, W, K, filter_size, groups=1):
    return ConvProblem(
        N, C, H, W, K, *filter_size, (1, 1), (filter_size[0] // 2, filter_size[1] // 2), (1, 1), groups,
        "relu", True, True, True, torch.float16, "cuda",
    )

reports = [
    aot.compile_launches(problem(1, 1, 1, 1, 1, (1, 1)), 90)[0],
    aot.compile_launches(problem(1, 1, 1, 1, 1, (3, 3)), 90)[0],
    aot.compile_launches(problem(1, 16, 1, 9, 1, (1, 3)), 90)[0],
    aot.compile_launches(problem(2, 6, 5, 1, 6, (3, 1), groups=6), 90)[0],
    aot.compile_launches(problem(2, 16, 1, 1, 1, (3, 3)), 90, TritonConfig(64, 16, 16, 8, 4, 2, "rows_tma"))[0],
    aot.compile_launches(problem(2, 16, 2, 1, 1, (3, 3)), 90, TritonConfig(64, 16, 16, 8, 4, 2, "lines_tma"))[0],
    aot.compile_add_relu(AddReluProblem((1,), True, torch.float16, "cuda"), 90),
    aot.compile_add_relu(AddReluProblem((2**16, 2**16), True, torch.float16, "cuda"), 90, backward=True),
]
print(json.dumps([report.stack_bytes for report in reports]))
"""


def test_sizes_that_change_the_types_of_arguments_compile(compiler_environment):
    """An argument of 1 is a constant to Triton and one above 2**31 has 64 bits; the interpreter hides both."""
    assert json.loads(python(compiler_environment, "-c", _ONES)) == [0] * 8


_SPECIALISATION = """
import torch
from triton.runtime import driver
from fused_resnet.operators import ConvOperands
from fused_resnet.kernels.triton import aot, precompile
from fused_resnet.kernels.triton.conv import configs, launch

driver.set_active(precompile._Driver(90))

def check(each):
    # what Triton's launcher hands to its compiler, and looks up in its caches
    _, _, _, backend, bind = each.kernel.create_binder()
    bound, specialization, _ = bind(*each.arguments, **each.options)
    _, signature, constants, attributes = each.kernel._pack_args(backend, each.options, bound, specialization, None)
    attributes = {path: hints for path, hints in attributes.items() if hints}
    assert (signature, constants, attributes) == aot.specialise(each.kernel, each.arguments, each.options)[:3], each

kernels = set()
for problem in aot.problems(torch.float16):
    problem = problem._replace(N=1)
    tensor = torch.zeros(1, 64, 1, 1, dtype=torch.float16)  # 64-byte aligned, as PyTorch's allocators give them
    vector = torch.zeros(64)
    some = ConvOperands(tensor, tensor, vector, bias=vector)
    every = ConvOperands(tensor, tensor, vector, vector, vector, vector, bias=vector, residual=tensor)
    legal = [one for one, _ in configs.search_space(problem, 90) if not configs.why_illegal(problem, one, 90)]
    one_of_each = {(config.form, config.split_k > 1): config for config in legal}
    for config in (configs.default_config(problem), *one_of_each.values()):
        for operands in (some, every):
            for each in launch.prepare(problem, operands, tensor, config):
                check(each)
                kernels.add(each.kernel.__name__)
assert len(kernels) == 6, kernels
"""


def test_specialised_as_the_launcher_would(compiler_environment):
    """Types, constants and alignment hints, also of the fields of the epilogue, against Triton's own launcher."""
    python(compiler_environment, "-c", _SPECIALISATION)


_LAUNCHED = """
import json, re, sys, torch
from triton.runtime import driver
from fused_resnet.kernels.triton import precompile
from fused_resnet.operators import ConvOperands, ConvProblem
from fused_resnet.kernels.triton.conv import launch
from fused_resnet.kernels.triton.conv.configs import TritonConfig

driver.set_active(precompile._Driver(90))
problem = ConvProblem(
    1, 64, 8, 8, 64, 1, 1, (1, 1), (0, 0), (1, 1), 1, "relu", True, True, True, torch.float16, "cuda"
)
memory, vector = torch.zeros(4096 + 8, dtype=torch.float16), torch.zeros(64)
x, weight, one_off = memory[:4096].view(1, 64, 8, 8), memory[:4096].view(64, 64, 1, 1), memory[1:4097].view(1, 64, 8, 8)
full = ConvOperands(x, weight, vector, vector, vector, vector, bias=vector, residual=x)
calls = {
    "all": (full, x),
    "none": (ConvOperands(x, weight), x),
    "residual one element off": (full._replace(residual=one_off), x),
    "output one element off": (full, one_off),
}
reports = {}
for split in (1, 2):
    for name, (operands, out) in calls.items():
        for each in launch.prepare(problem, operands, out, TritonConfig(64, 64, 32, 8, 4, 2, split_k=split)):
            kernel = each.kernel.warmup(*each.arguments, grid=(each.num_programs,), **each.options)
            entry = re.search(r"tt[.]func public .*", kernel.asm["ttir"])[0]
            pointers = re.findall(r"!tt[.]ptr<\\w+>( [{]tt[.]divisibility = 16 : i32[}])?", entry)
            wide = len(re.findall(r"ld[.]global[.]v4|st[.]global[.]v4", kernel.asm["ptx"]))
            reports[f"{each.kernel.__name__}, {split}, {name}"] = [len(pointers), pointers.count(""), wide]
print(json.dumps(reports))
"""


def test_pointers_within_the_epilogue_keep_their_alignment(compiler_environment):
    """In a launch of real tensors: [pointers, those not known to be aligned, 16-byte accesses] of each kernel."""
    reports = json.loads(python(compiler_environment, "-c", _LAUNCHED))
    assert len(reports) == 12
    for name, (pointers, unaligned, _) in reports.items():
        # x and weight, of which the second kernel has neither; out; four vectors of BN, bias and residual
        expected = (1 if "sum" in name else 3) + (0 if "none" in name else 6) + (", 2, " in name)
        assert (pointers, unaligned) == (expected, "off" in name), f"{name}: {pointers} pointers, {unaligned} unaligned"
    whole, residual_off, output_off = (
        reports[f"_pointwise_bn_act_kernel, 1, {name}"][2]
        for name in ("all", "residual one element off", "output one element off")
    )
    assert whole > residual_off > 0 and whole > output_off > 0, reports


_IN_A_ROW = """
import json, re, torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fused_resnet.operators import ConvOperands, ConvProblem
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.conv import launch
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.kernels.triton.conv.gemm_tma import _gemm_tma_kernel
from fused_resnet.kernels.triton.conv.pointer import _pointwise_bn_act_kernel
from fused_resnet.kernels.triton.conv.epilogue import Epilogue, sum_parts_kernel


@triton.jit
def pointwise(
    x, w, bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual, out, partial, M, K, P, Q, C,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, WHOLE_STEPS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    epilogue = Epilogue(bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual, out, partial)
    _pointwise_bn_act_kernel(
        x, w, epilogue, M, K, P, Q, C, ACTIVATION, INPUT_PRECISION, ROWS, RESIDUAL, OUT, WHOLE_STEPS, SPLIT_K,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )


@triton.jit
def gemm(
    x, w, bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual, out, partial, M, K, P, Q, C, num_tiles,
    ACTIVATION: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, SPLIT_K: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    epilogue = Epilogue(bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual, out, partial)
    _gemm_tma_kernel(
        x, w, epilogue, M, K, P, Q, C, num_tiles, ACTIVATION, INPUT_PRECISION, ROWS, RESIDUAL, OUT, SPLIT_K,
        PERSISTENT, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )


@triton.jit
def sum_parts(
    bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual, out, partial, M, K, P, Q,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    epilogue = Epilogue(bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual, out, partial)
    sum_parts_kernel(epilogue, M, K, P, Q, ACTIVATION, ROWS, RESIDUAL, OUT, SPLIT_K, BLOCK_M, BLOCK_N)


FLAT = {_pointwise_bn_act_kernel: pointwise, _gemm_tma_kernel: gemm, sum_parts_kernel: sum_parts}


def code(kernel, arguments, options):
    signature, constants, attributes, compiler_options = aot.specialise(kernel, arguments, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiler_options)
    sass = re.findall(r"/[*][0-9a-f]{4,}[*]/ +(.*?);", aot._dump(compiled.asm["cubin"], "-sass"))
    assert len(sass) > 100
    return sass, compiled.metadata.shared


x, vector = torch.empty(1, 128, 14, 14, dtype=torch.float16, device="meta"), torch.empty(128, device="meta")
weight = torch.empty(128, 128, 1, 1, dtype=torch.float16, device="meta")
full = ConvOperands(x, weight, vector, vector, vector, vector, bias=vector, residual=x)
same = []
for config in (TritonConfig(64, 64, 32, 8, 4, 3, split_k=2), TritonConfig(64, 64, 64, 8, 4, 3, "gemm_tma")):
    for o in (full, ConvOperands(x, weight, bias=vector)):
        has_bn, has_residual = o.bn_mean is not None, o.residual is not None
        problem = ConvProblem(
            1, 128, 14, 14, 128, 1, 1, (1, 1), (0, 0), (1, 1), 1, "relu", has_bn, True, has_residual, x.dtype, "cuda"
        )
        for kernel, _, arguments, options in launch.prepare(problem, o, x, config):
            row = [part for one in arguments for part in (one if isinstance(one, Epilogue) else [one])]
            same.append(code(kernel, arguments, options) == code(FLAT[kernel], row, options))
print(json.dumps(same))
"""


def test_an_epilogue_costs_what_its_fields_in_a_row_would(compiler_environment, tmp_path):
    """The same machine code, to the letter, from kernels that take the fields one by one."""
    (tmp_path / "in_a_row.py").write_text(_IN_A_ROW)  # a file, since Triton reads the source of what it compiles
    environment = dict(compiler_environment, PYTHONPATH=os.pathsep.join(sys.path))
    assert json.loads(python(environment, str(tmp_path / "in_a_row.py"))) == [True] * 6


def test_interpreted_kernels_are_refused():
    environment = dict(os.environ, TRITON_INTERPRET="1")
    command = [sys.executable, "-m", "fused_resnet.kernels.triton.aot", "--arch", "90"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "unset it" in result.stderr


def test_table(compiler_environment):
    """One line per kernel: where, what, registers, instructions."""
    command = ["-m", "fused_resnet.kernels.triton.aot", "--arch", "90", "--only", "32x256x56x56 float16"]
    forward, backward = python(compiler_environment, *command).splitlines()
    assert forward.startswith("sm_90") and " regs " in forward and "max.NaN" in forward
    assert backward.startswith("sm_90") and "max.NaN" not in backward
