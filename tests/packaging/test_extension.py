"""The compiled libraries as Python finds, checks and loads them; the CPU kernel; what setup.py decides to build."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.kernels import compiled
from fused_resnet.operators import schemas
from fused_resnet.operators.library import LIBRARY

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_resnet"
LIBRARIES = tuple(schemas.KERNELS)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def built(library: str) -> pytest.MarkDecorator:
    path = PACKAGE / f"_C_{library}.so"
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not built")


needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree, not only the wheel")


# ------------------------------------------------------------------------------------------------ finding and loading


@built("cpu")
def test_cpu_library_loads_and_registers():
    assert compiled.load("cpu") is None
    for name in schemas.KERNELS["cpu"]:
        key = "CompositeExplicitAutograd" if name == "cpu_instruction_set" else "CPU"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{LIBRARY.ns}::{name}", key)


@pytest.mark.parametrize("library", [pytest.param(library, marks=built(library)) for library in LIBRARIES])
def test_library_carries_the_digest_of_these_schemas(library):
    path = PACKAGE / f"_C_{library}.so"
    assert compiled.embedded_digest(path, library) == schemas.digest(library)
    other = next(name for name in LIBRARIES if name != library)
    assert compiled.embedded_digest(path, other) is None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`compiled` with an empty directory instead of the package's, and nothing remembered."""
    monkeypatch.setattr(compiled, "_DIRECTORY", tmp_path)
    compiled.build_record.cache_clear()
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    monkeypatch.setattr(compiled, "_loaded", set())
    yield tmp_path
    compiled.build_record.cache_clear()


@built("cpu")
def test_other_schemas_are_refused_before_loading(fresh):
    content = (PACKAGE / "_C_cpu.so").read_bytes()
    stale = content.replace(schemas.digest("cpu").encode(), b"0123456789abcdef")
    assert stale != content
    (fresh / "_C_cpu.so").write_bytes(stale)
    reason = compiled.load("cpu")
    assert "0123456789abcdef" in reason and schemas.digest("cpu") in reason and "rebuild" in reason
    assert str(fresh) not in "".join(torch.ops.loaded_libraries)


@pytest.mark.parametrize("library", LIBRARIES)
def test_missing_library_without_a_record(fresh, library):
    assert compiled.load(library).startswith("it is not built: rebuild with")
    assert ("FUSED_RESNET_CUDA=1" in compiled.load(library)) == (library == "cuda")


def test_missing_library_says_what_the_build_recorded(fresh):
    record = {"parts": {"cuda": {"built": False, "why": "nvcc was not found", "what_to_do": "install it"}}}
    (fresh / "_build.json").write_text(json.dumps(record))
    assert compiled.load("cuda") == "it was not built: nvcc was not found; install it"


def test_deleted_library_is_not_called_unbuilt(fresh):
    (fresh / "_build.json").write_text(json.dumps({"parts": {"cpu": {"built": True}}}))
    assert "its file is gone" in compiled.load("cpu")


def test_file_that_is_no_library(fresh):
    marker = f"fused_resnet schemas of cpu: {schemas.digest('cpu')}\0"
    (fresh / "_C_cpu.so").write_bytes(b"not ELF " + marker.encode())
    assert "does not load" in compiled.load("cpu")
    (fresh / "_C_cpu.so").write_bytes(b"")
    assert "schema unknown" in compiled.load("cpu")


@built("cuda")
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_cuda_library_beside_a_cpu_torch_is_declined_politely():
    assert "needs a CUDA build of torch" in compiled.load("cuda")


def test_status_names_every_part_and_explains_what_is_missing():
    status = compiled.status()
    assert set(status) == {"_C_cpu", "_C_cuda", "_host_checks"}
    for part in status.values():
        assert part["present"] or part["why"]
        assert not (part["loaded"] and part["why"])


def test_host_checks_of_another_python_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_DIRECTORY", tmp_path)
    (tmp_path / "_host_checks.cpython-39-x86_64-linux-gnu.so").touch()
    part = compiled.status()["_host_checks"]
    assert not part["present"] and "cpython-39-x86_64-linux-gnu.so is for another Python" in part["why"]
    (tmp_path / f"_host_checks{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert compiled.status()["_host_checks"] == {"present": True, "loaded": None, "why": None}


# ------------------------------------------------------------------------------------------------------ cpu_add_relu


def cpu_add_relu(a, b, out=None):
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    out = torch.full_like(a, float("nan")) if out is None else out
    torch.ops.fused_resnet.cpu_add_relu(a, b, out)
    return out


def assert_same_bits(actual, expected):
    """Bit for bit, the sign of zero included; any NaN equals any other."""
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = actual.contiguous().view(as_int) == expected.contiguous().view(as_int)
    assert bool((same | (actual.isnan() & expected.isnan())).all())


def special_pairs(dtype):
    f = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), f.max, -f.max, f.tiny, -f.tiny, f.tiny / 4, -f.tiny / 4]
    values += [-float("inf"), f.eps, 1 + f.eps]
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).to(dtype)
    return pairs[:, 0].clone(), pairs[:, 1].clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_add_relu_on_special_values(dtype):
    a, b = special_pairs(dtype)
    assert_same_bits(cpu_add_relu(a, b), torch.relu(a + b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 1000, 100_003])
def test_cpu_add_relu_equals_torch_bit_for_bit(dtype, size):
    """Sizes around every vector width, and beyond ATen's grain size, where threads share the work."""
    a = torch.randn(size, dtype=torch.float64).mul(50).to(dtype)
    b = torch.randn(size, dtype=torch.float64).mul(50).to(dtype)
    assert_same_bits(cpu_add_relu(a, b), torch.relu(a + b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_add_relu_rounds_every_half_like_torch(dtype):
    """All 2^16 values of a against one b each: ties, subnormals, overflow to infinity."""
    a = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for b in (a.flip(0), a.roll(1), torch.full_like(a, 1.0), torch.full_like(a, 2.0**-9)):
        assert_same_bits(cpu_add_relu(a, b), torch.relu(a + b))


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "one channel": lambda t: t[:, :1].contiguous(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_add_relu_in_any_dense_layout(layout):
    a, b = (LAYOUTS[layout](torch.randn(3, 5, 7, 11)) for _ in range(2))
    out = cpu_add_relu(a, b)
    assert out.stride() == a.stride()
    assert_same_bits(out, torch.relu(a + b))


def test_cpu_add_relu_ignores_strides_of_single_elements():
    a = torch.randn(1, 4, 1, 3)
    b = torch.randn(1, 4, 1, 3).as_strided((1, 4, 1, 3), (999, 3, 77, 1))
    assert_same_bits(cpu_add_relu(a, b), torch.relu(a + b))


def test_cpu_add_relu_in_place():
    a, b = torch.randn(2, 50_000)
    expected = torch.relu(a + b)
    assert_same_bits(cpu_add_relu(a, b, out=a), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_add_relu_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    a, b = torch.randn(2, 300_001)
    try:
        torch.set_num_threads(threads)
        assert_same_bits(cpu_add_relu(a, b), torch.relu(a + b))
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- cpu_max_pool2d


def cpu_max_pool2d(x, kernel_size, stride, padding, like=None):
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    expected = F.max_pool2d(x, kernel_size, stride, padding) if like is None else like
    out = torch.full_like(expected, -123.0, memory_format=torch.channels_last)
    torch.ops.fused_resnet.cpu_max_pool2d(x.contiguous(memory_format=torch.channels_last),
                                          kernel_size, stride, padding, out)  # fmt: skip
    return out, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("C, size, window", [
    (64, (12, 14), ((3, 3), (2, 2), (1, 1))),  # ResNet's
    (37, (9, 5), ((2, 3), (1, 2), (1, 0))),
    (1, (3, 3), ((3, 3), (3, 3), (1, 1))),
    (130, (4, 4), ((4, 4), (1, 1), (2, 2))),
])  # fmt: skip
def test_cpu_max_pool2d_equals_torch(dtype, C, size, window):
    finite = torch.randn(2, C, *size).to(dtype)
    special = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0], dtype=dtype)
    mixed = special[torch.randint(0, len(special), finite.shape)]
    for x in (finite, -finite.abs(), mixed):
        out, expected = cpu_max_pool2d(x, *window)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_cpu_max_pool2d_in_parallel_and_empty():
    x = torch.randn(3, 64, 56, 56)
    torch.testing.assert_close(*cpu_max_pool2d(x, (3, 3), (2, 2), (1, 1)), rtol=0, atol=0)
    assert cpu_max_pool2d(x[:0], (3, 3), (2, 2), (1, 1))[0].shape == (0, 64, 28, 28)


@pytest.mark.parametrize("change, message", [
    (dict(padding=(2, 1)), "padding at most half"),
    (dict(padding=(2**63 - 1, 1)), "padding at most half"),
    (dict(stride=(0, 2)), "must be positive"),
    (dict(kernel_size=(0, 0), padding=(0, 0), like=torch.empty(1, 8, 6, 6)), "window and stride must be positive"),
    (dict(kernel_size=(3,)), "kernel_size must have 2 values, not 1"),
    (dict(like=torch.empty(1, 8, 3, 4)), r"out must have the shape \(1, 8, 3, 3\), not \(1, 8, 3, 4\)"),
    (dict(like=torch.empty(2, 8, 3, 3)), r"out must have the shape \(1, 8, 3, 3\), not \(2, 8, 3, 3\)"),
    (dict(kernel_size=(9, 3)), r"a window of \(9, 3\) does not fit x of \(1, 8, 5, 5\) with padding \(1, 1\)"),
    (dict(like=torch.empty(1, 8, 3, 3, dtype=torch.float64)), "one dtype, not Float and Double"),
])  # fmt: skip
def test_cpu_max_pool2d_refuses_what_would_leave_its_memory(change, message):
    call = dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), like=torch.empty(1, 8, 3, 3)) | change
    with pytest.raises(RuntimeError, match=message):
        cpu_max_pool2d(torch.randn(1, 8, 5, 5), **call)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(b=torch.zeros(4, 6, dtype=torch.float64)), "one dtype, not Float, Double and Float"),
        (dict(b=torch.zeros(6, 4)), r"one shape and one layout, not \(4, 6\) .*, \(6, 4\) with .* and \(4, 6\)"),
        (dict(b=torch.zeros(6, 4).t()), r"one layout, not .* \(6, 1\), \(4, 6\) with strides \(1, 4\) and"),
        (dict(out=torch.zeros(24)), "one shape and one layout"),
        (
            dict(a=torch.zeros(4, 12)[:, ::2], b=torch.zeros(4, 12)[:, ::2], out=torch.zeros(4, 12)[:, ::2]),
            r"dense, not \(4, 6\) with strides \(12, 2\)",
        ),
        (dict(a=torch.zeros(6).expand(4, 6), b=torch.zeros(6).expand(4, 6), out=torch.zeros(6).expand(4, 6)), "dense"),
        (dict.fromkeys(("a", "b", "out"), torch.zeros(4, 6, dtype=torch.int32)), "float64, not Int"),
    ],
)
def test_cpu_add_relu_second_line_of_checks(change, message):
    operands = {"a": torch.zeros(4, 6), "b": torch.zeros(4, 6), "out": torch.zeros(4, 6), **change}
    with pytest.raises(RuntimeError, match=message):
        cpu_add_relu(operands["a"], operands["b"], operands["out"])


# ---------------------------------------------------------------------------------------- the CUDA library without GPU

# With a stand-in for the one symbol a CPU torch lacks the library loads, and its operators can be entered with CPU
# tensors by naming the dispatch key: they unpack every argument, then must refuse the device.
ENTER_CUDA_OPERATORS = """
import ctypes, sys, torch
from fused_resnet.operators import library, schemas
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, w, v = torch.randn(2, 8, 5, 5), torch.randn(16, 8, 3, 3), torch.rand(16)
x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
out = torch.empty(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
good = [x, w, v, v, v, v, 1e-5, v, out, [1, 1], [1, 1], [1, 1], 1, "relu", True, 0, None, out]
def conv(**change):
    names = "x w bw bb bm bv eps bias residual stride padding dilation groups activation tf32 tile partials out".split()
    return "cuda_conv_bn_act", [change.get(name, value) for name, value in zip(names, good)]
def configs(groups, element_bytes, stride=[1, 1], dilation=[1, 1]):
    return "cuda_conv_configs", [[2, 8, 5, 5], [16, 8, 3, 3], stride, [1, 1], dilation, groups, element_bytes, True, 0]
def why_not(groups=1, H=5, padding=[1, 1]):
    return "cuda_conv_why_not", [[2, 8, H, 5], [16, 8, 3, 3], [1, 1], padding, [1, 1], groups, 2]
calls = [
    ("cuda_add_relu", [x, x, x]), ("cuda_add_relu_backward", [x, x, x]), ("cuda_add_relu", [x, w, x]),
    conv(), conv(bw=None, bb=None, bm=None, bv=None, bias=None, residual=None), conv(groups=3), conv(stride=[1]),
    conv(padding=[2**40, 0]), conv(out=x), conv(residual=x), conv(stride=[0, 1]), conv(padding=[0, 0]),
    conv(tile=-1), conv(tile=4), configs(3, 2), configs(1, 8),
    conv(stride=[2, 1], dilation=[4, 1]), configs(1, 2, stride=[2, 1], dilation=[4, 1]),
    why_not(groups=3), why_not(padding=[-1, 0]), why_not(H=2**28), why_not(),
]
assert {name for name, _ in calls} == set(schemas.KERNELS["cuda"])
for name, args in calls:
    key = "CompositeExplicitAutograd" if name in ("cuda_conv_configs", "cuda_conv_why_not") else "CUDA"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet::" + name, key)
    try:
        result = getattr(torch.ops.fused_resnet, name).default.redispatch(cuda, *args)
        print("no error", result)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


@built("cuda")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in is for a torch without CUDA")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the stand-in library")
def test_cuda_operators_unpack_their_arguments_and_check_them(tmp_path):
    stub = tmp_path / "stream.c"
    stub.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 0; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", stub, "-o", tmp_path / "stream.so"], check=True)
    command = [sys.executable, "-c", ENTER_CUDA_OPERATORS, tmp_path / "stream.so", PACKAGE / "_C_cuda.so"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    expected = [
        "b is on another device", "out is on another device", "one shape", "x is on another device",
        "x is on another device", "do not fit 3 groups", "stride must have 2 values, not 1", "padding 1099511627776 is",
        "out must have the shape (2, 16, 5, 5), not (2, 8, 5, 5)", "residual must have the shape (2, 16, 5, 5)",
        "must be positive, not (0, 1)", "out must have the shape (2, 16, 3, 3)",
        "there is no tile -1", "there is no tile 4", "do not fit 3 groups", "elements have 2 or 4 bytes, not 8",
        "the output would be empty: a window of 9x3 over 7x7 pixels", "the output would be empty",
        "do not fit 3 groups", "padding must be at least 0, not (-1, 0)",
        "no error an input of 268435456x5 is too large", "no error ",
    ]  # fmt: skip
    messages = result.stdout.splitlines()
    assert len(messages) == len(expected)
    for message, fragment in zip(messages, expected):
        assert fragment in message


@built("cuda")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_cuda_library_needs_only_the_stream_from_a_cuda_torch():
    """Everything else is in libtorch_cpu, so one library serves every torch of its CUDA major."""

    def symbols(path, which):
        lines = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout.split("\n")
        return {line.split()[-1].partition("@")[0] for line in lines if line}

    wanted = {s for s in symbols(PACKAGE / "_C_cuda.so", "--undefined-only") if "torch" in s}
    cpu_torch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert wanted - symbols(cpu_torch, "--defined-only") == {"aoti_torch_get_current_cuda_stream"}
    assert not [s for s in symbols(PACKAGE / "_C_cuda.so", "--defined-only") if s.startswith("cuda")], "private cudart"


# ------------------------------------------------------------------------------------------------------------ setup.py


@pytest.fixture(scope="module")
def setup_py():
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree, not only the wheel")
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(setup_py, monkeypatch):
    """A machine that has everything, to take things away from."""
    for name in ("FUSED_RESNET_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    tools = object.__new__(setup_py.Toolchain)
    tools.torch, tools.pybind11, tools.ninja = torch, object(), "ninja"
    tools.cxx, tools.nvcc, tools.nvcc_version = "g++", "nvcc", "13.0"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup_py, "_why_no_host_checks", lambda tools: None)
    return tools


def skipped(parts) -> dict:
    return {part.name: part.why for part in parts if not part.is_built}


def test_everything_is_built_where_everything_is_there(setup_py, tools):
    assert skipped(setup_py.plan(tools)) == {}


@pytest.mark.parametrize(
    "missing, parts, why",
    [
        ("cxx", {"cpu", "cuda", "host_checks"}, "C++ compiler"),
        ("ninja", {"cpu", "cuda", "host_checks"}, "ninja"),
        ("torch", {"cpu", "cuda", "host_checks"}, "torch"),
        ("nvcc", {"cuda"}, "nvcc"),
    ],
)
def test_what_is_missing_is_skipped_with_a_reason(setup_py, tools, missing, parts, why):
    setattr(tools, missing, None)
    reasons = skipped(setup_py.plan(tools))
    assert set(reasons) == parts
    assert all(why in reason for reason in reasons.values())


def test_cuda_is_not_built_unasked_beside_a_cpu_torch(setup_py, tools, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not a CUDA build" in skipped(setup_py.plan(tools))["cuda"]
    monkeypatch.setenv("FUSED_RESNET_CUDA", "1")
    assert skipped(setup_py.plan(tools)) == {}


def test_cuda_is_not_built_unasked_with_another_major(setup_py, tools, monkeypatch):
    tools.nvcc_version = "12.8"
    assert "12.8" in skipped(setup_py.plan(tools))["cuda"]


def test_cuda_can_be_declined_and_required(setup_py, tools, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CUDA", "0")
    assert set(skipped(setup_py.plan(tools))) == {"cuda"}
    monkeypatch.setenv("FUSED_RESNET_CUDA", "1")
    tools.nvcc = None
    with pytest.raises(setup_py.SetupError, match="nvcc was not found.*CUDA_HOME"):
        setup_py.plan(tools)
    monkeypatch.setenv("FUSED_RESNET_CUDA", "yes")
    with pytest.raises(setup_py.SetupError, match="0, 1 or unset"):
        setup_py.plan(tools)


def test_arch_list(setup_py, tools, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0; 9.0a+PTX")
    assert setup_py.cuda_archs(tools) == ["8.0", "9.0a+PTX"]
    assert setup_py._gencode(["8.0", "9.0a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    for wrong, why in (("7.5", "too old"), ("Hopper", "not an arch")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(setup_py.SetupError, match=why):
            setup_py.cuda_archs(tools)


def test_summary_is_honest(setup_py, tools):
    tools.nvcc = None
    record = setup_py.BuildParts._record(setup_py.plan(tools), tools)
    text = setup_py.summary(record)
    assert "built    _C_cpu.so" in text
    assert "skipped  _C_cuda.so: nvcc was not found. To have it: install the CUDA toolkit" in text


# ------------------------------------------------------------------------------------------------------- whole builds

EXCLUDED = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "*.egg-info", "*.so", "_build.json", "__pycache__", "results"
)
IN_THE_WHEEL = "import json; from fused_resnet.kernels import compiled; print(json.dumps(compiled.status()))"


@pytest.fixture
def sources(tmp_path):
    shutil.copytree(ROOT, tmp_path / "sources", ignore=EXCLUDED)
    return tmp_path / "sources"


def pip(*args, **env):
    command = [sys.executable, "-m", "pip", *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(sources, out, **env) -> Path:
    pip("wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, sources, FUSED_RESNET_CUDA="0", **env)
    (wheel,) = out.glob("*.whl")
    return wheel


def status_of_installed(wheel, tmp_path) -> dict:
    """Installed beside this environment's torch, used from elsewhere than the sources."""
    target = tmp_path / "site"
    pip("install", "-q", "--no-deps", "--target", target, wheel)
    env = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-c", IN_THE_WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_sources
@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_wheel_is_complete_and_works(sources, tmp_path):
    (sources / "fused_resnet" / "configs").mkdir(exist_ok=True)
    (sources / "fused_resnet" / "configs" / "some_device.json").write_text("{}")
    wheel = build_wheel(sources, tmp_path / "wheels")
    files = set(zipfile.ZipFile(wheel).namelist())
    host_checks = "_host_checks" + sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("__init__.py", "py.typed", "_build.json", "configs/some_device.json", "_C_cpu.so", host_checks):
        assert f"fused_resnet/{name}" in files
    assert not [name for name in files if name.startswith(("csrc", "tests", "build"))]
    status = status_of_installed(wheel, tmp_path)
    assert status["_C_cpu"] == {"present": True, "loaded": True, "why": None}
    assert "FUSED_RESNET_CUDA=0" in status["_C_cuda"]["why"]


@needs_sources
@pytest.mark.full
def test_install_without_a_compiler(sources, tmp_path):
    """A PATH with no compiler: a pure-Python wheel that knows what it lacks, and works without it."""
    wheel = build_wheel(sources, tmp_path / "wheels", PATH=str(tmp_path), CXX="")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    status = status_of_installed(wheel, tmp_path)
    assert all("no C++ compiler was found" in part["why"] for part in status.values())


@needs_sources
@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_rebuilding_compiles_only_what_changed(sources):
    env = {**os.environ, "FUSED_RESNET_CUDA": "0"}

    def build() -> str:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=sources, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert "] compile" in build()
    again = build()
    assert "no work to do" in again and "] compile" not in again
    header = sources / "csrc" / "common" / "checks.h"
    header.write_text(header.read_text() + "\n")
    touched = build()
    assert "cpu/add_relu.cpp" in touched and "host_checks.cpp" not in touched


# Instead of a compiler: writes which files are included, as -MD does, and an empty output.
ONLY_DEPENDENCIES = """#!{python}
import re, sys
from pathlib import Path
options = dict(zip(sys.argv, sys.argv[1:]))
folders = [Path(option[2:]) for option in sys.argv if option.startswith("-I")]
found, left = set(), [Path(options["-c"])] if "-c" in options else []
while left:
    file = left.pop()
    found.add(file)
    named = re.findall('^#include "(.+)"', file.read_text(), re.MULTILINE)
    candidates = (folder / name for name in named for folder in (file.parent, *folders))
    left += [header for header in candidates if header.exists() and header not in found]
if found:
    Path(options["-MF"]).write_text(options["-o"] + ": " + " ".join(map(str, found)))
Path(options["-o"]).touch()
"""


@pytest.fixture
def ninja(setup_py, sources, tools, tmp_path, monkeypatch):
    """All parts as if they had just been built. Called, it says which commands ninja would run now."""
    command = shutil.which("ninja") or pytest.importorskip("ninja").BIN_DIR + "/ninja"
    compiler = tmp_path / "compiler"
    compiler.write_text(ONLY_DEPENDENCIES.replace("{python}", sys.executable))
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(setup_py, "CSRC", sources / "csrc")
    tools.cxx = tools.nvcc = str(compiler)
    tools.pybind11 = types.SimpleNamespace(get_include=lambda: "pybind11")
    targets = setup_py.write_ninja(setup_py.plan(tools), tools, tmp_path)
    subprocess.run([command, "-C", tmp_path, *targets], check=True, capture_output=True)

    def would_run() -> list[str]:
        dry = subprocess.run([command, "-n", "-C", tmp_path, *targets], check=True, capture_output=True, text=True)
        return re.findall(r"^\[\d+/\d+\] (.+)", dry.stdout, re.MULTILINE)

    return would_run


@pytest.fixture
def make(sources):
    """The package as if make had just built it. Called, it says which commands make would run now."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "FUSED_RESNET_CUDA")}
    env = {name: value for name, value in env.items() if not name.startswith(("MAKE", "MFLAGS"))}
    (sources / ".venv").mkdir()
    for stamp in (".installed", ".built"):
        (sources / ".venv" / stamp).touch()

    def would_run() -> list[str]:
        command = ["make", "-n", ".venv/.built"]
        dry = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sources, env=env)
        return [line for line in dry.stdout.splitlines() if not line.startswith("make:")]

    return would_run


@needs_sources
def test_an_edit_anywhere_in_csrc_builds_again(sources, ninja, make):
    """Every file, one after the other: make calls the build, and ninja makes what that file is part of."""
    assert make() == [] and ninja() == []
    files = [file for file in sorted((sources / "csrc").rglob("*")) if file.is_file()]
    assert {file.parent.relative_to(sources / "csrc").as_posix() for file in files} >= {"common", "cpu", "cuda/sm80"}
    libraries = {"cpu": {"_C_cpu.so"}, "cuda": {"_C_cuda.so"}, "host_checks": set(), "common": set()}
    for file in files:
        before = file.stat()
        os.utime(file, (before.st_atime, before.st_mtime + 1e6))
        assert any("pip install" in line for line in make()), file
        commands = ninja()
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        linked = {command.split()[1] for command in commands if command.startswith("link")}
        assert linked >= libraries[file.relative_to(sources / "csrc").parts[0]] and linked, file
        if file.suffix in (".cpp", ".cu"):
            assert len(commands) == 2 and commands[0].endswith(str(file)), commands
    assert make() == [] and ninja() == []
