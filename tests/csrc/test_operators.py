"""What csrc registers: the CPU's addition and pooling, the CUDA operators as far as they go without a GPU."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.kernels import compiled
from tests.support.libraries import PACKAGE, built

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def cpu_affine_act(y, vectors, eps=1e-5, residual=None, activation="relu"):
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    out = y.clone()
    torch.ops.fused_resnet.cpu_affine_act(out, *vectors, eps, residual, activation)
    return out


def batch_norm_act(y, vectors, eps, residual, activation):
    """In fp64, rounded once."""
    weight, bias, mean, var = (None if v is None else v.double() for v in vectors)
    mean = torch.zeros(y.shape[1], dtype=torch.float64) if mean is None else mean
    var, eps = (torch.ones_like(mean), 0.0) if var is None else (var, eps)
    out = F.batch_norm(y.double(), mean, var, weight, bias, False, 0.0, eps)
    out = out if residual is None else out + residual.double()
    return {"none": lambda v: v, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}[activation](out).to(y.dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 37, 5, 9), (3, 5, 1, 1), (2, 1, 3, 3), (1, 17, 1, 40)])
def test_cpu_affine_act_equals_batch_norm(shape, dtype, layout):
    """Sizes around every vector width; each vector missing once; vectors in the dtype of y too."""
    C, tolerance = shape[1], 4 * torch.finfo(dtype).eps
    y = torch.randn(shape).mul(3).to(dtype).contiguous(memory_format=layout)
    residual = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    vectors = [torch.randn(C), torch.randn(C), torch.randn(C), torch.rand(C) + 0.1]
    for missing, activation in itertools.product(range(5), ("none", "relu", "relu6", "silu")):
        some = [None if i == missing else v.to(dtype) if i == 2 else v for i, v in enumerate(vectors)]
        for added in (None, residual):
            out = cpu_affine_act(y, some, residual=added, activation=activation)
            expected = batch_norm_act(y, some, 1e-5, added, activation)
            assert out.stride() == y.stride()
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=("nchw", "nhwc"))
def test_cpu_affine_act_keeps_nan_and_infinities_where_they_are(layout):
    y = torch.randn(2, 19, 3, 5).contiguous(memory_format=layout)
    y[0, 3, 1, 2], y[1, 18, 2, 4], y[0, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
    vectors = [torch.rand(19) + 0.5, torch.randn(19), torch.randn(19), torch.rand(19) + 0.1]
    out = cpu_affine_act(y, vectors)
    assert (
        out.isnan().nonzero().tolist() == [[0, 3, 1, 2]] and out[1, 18, 2, 4] == float("inf") and out[0, 0, 0, 0] == 0
    )


def test_cpu_affine_act_in_parallel_and_empty():
    vectors = [torch.rand(64) + 0.5, torch.randn(64), torch.randn(64), torch.rand(64) + 0.1]
    for layout in (torch.contiguous_format, torch.channels_last):
        y = torch.randn(3, 64, 56, 56).contiguous(memory_format=layout)
        torch.testing.assert_close(cpu_affine_act(y, vectors), batch_norm_act(y, vectors, 1e-5, None, "relu"))
        assert cpu_affine_act(y[:0], vectors).shape == (0, 64, 56, 56)


@pytest.mark.parametrize("change, message", [
    (dict(y=torch.ones(2, 8, 6)), "y must have 4 dimensions, not 3"),
    (dict(y=torch.ones(1, 8, 5, 10)[..., ::2]), r"y must be channels_last in memory, not \(1, 8, 5, 5\) with"),
    (dict(y=torch.ones(1, 8, 5, 5, dtype=torch.float64)), "dtype must be float32 or bfloat16, not Double"),
    (dict(vectors=[torch.ones(7), None, None, None]), r"weight must be .* 8 channels, not \(7\)"),
    (dict(vectors=[None, None, torch.ones(16)[::2], None]), "mean must be a contiguous vector"),
    (dict(vectors=[None, None, None, torch.ones(8, dtype=torch.float64)]), "var must be float32, not Double"),
    (dict(residual=torch.ones(1, 8, 5, 4)), "residual must have y's shape, layout and dtype"),
    (dict(residual=torch.ones(1, 8, 5, 5).bfloat16()), "residual must have y's shape, layout and dtype"),
    (dict(residual=torch.ones(1, 8, 5, 5).to(memory_format=torch.channels_last)), "y's shape, layout and dtype"),
    (dict(activation="gelu"), "unknown activation gelu; known ones are none, relu, relu6, silu"),
])  # fmt: skip
def test_cpu_affine_act_refuses_what_would_leave_its_memory(change, message):
    call = dict(y=torch.ones(1, 8, 5, 5), vectors=[None, None, None, None]) | change
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_resnet.cpu_affine_act(call["y"], *call["vectors"], 1e-5, call.get("residual"),
                                              call.get("activation", "relu"))  # fmt: skip


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
x8, w8, out8 = (t.to(torch.int8) for t in (x, w, out))
bytes_in = [x8, w8, v, v, out8, 1.0, -128.0, 127.0, [1, 1], [1, 1], [1, 1], 1, 0, None, out8]
def int8(**change):
    names = "x w multiplier bias residual scale low high stride padding dilation groups tile partials out".split()
    return "cuda_conv_int8", [change.get(name, value) for name, value in zip(names, bytes_in)]
def configs(groups, element_bytes, stride=[1, 1], dilation=[1, 1]):
    return "cuda_conv_configs", [[2, 8, 5, 5], [16, 8, 3, 3], stride, [1, 1], dilation, groups, element_bytes, True, 0]
def why_not(groups=1, H=5, padding=[1, 1]):
    return "cuda_conv_why_not", [[2, 8, H, 5], [16, 8, 3, 3], [1, 1], padding, [1, 1], groups, 2]
calls = [
    ("cuda_add_relu", [x, x, x]), ("cuda_add_relu_backward", [x, x, x]), ("cuda_add_relu", [x, w, x]),
    conv(), conv(bw=None, bb=None, bm=None, bv=None, bias=None, residual=None), conv(groups=3), conv(stride=[1]),
    conv(padding=[2**40, 0]), conv(out=x), conv(residual=x), conv(stride=[0, 1]), conv(padding=[0, 0]),
    conv(tile=-1), conv(tile=99), configs(3, 2), configs(1, 8),
    conv(stride=[2, 1], dilation=[4, 1]), configs(1, 2, stride=[2, 1], dilation=[4, 1]),
    why_not(groups=3), why_not(padding=[-1, 0]), why_not(H=2**28), why_not(),
    int8(), int8(residual=None), int8(x=x), int8(w=w), int8(multiplier=v.double()), int8(bias=v[:3]), int8(residual=x),
    int8(out=x), int8(tile=99), int8(tile=96), int8(groups=3), int8(padding=[0, 0]),
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
        "there is no tile -1", "there is no tile 99", "do not fit 3 groups", "elements have 1, 2 or 4 bytes, not 8",
        "the output would be empty: a window of 9x3 over 7x7 pixels", "the output would be empty",
        "do not fit 3 groups", "padding must be at least 0, not (-1, 0)",
        "no error an input of 268435456x5 is too large", "no error ",
        "x is on another device", "x is on another device", "x must be uint8 or int8", "weight must be int8",
        "multiplier must be float32", "x is on another device", "residual must be uint8 or int8",
        "out must be uint8 or int8", "there is no tile 99", "there is no tile 96 among 5 from 0",
        "do not fit 3 groups", "out must have the shape (2, 16, 3, 3)",
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
