"""The Triton kernels against the fp64 reference: on the GPU where there is one, else in Triton's interpreter."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fused_resnet.kernels.triton import add_relu, cache_read, interpreter, runtime
from fused_resnet.kernels.triton.conv import configs, launch
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.machine import devices
from fused_resnet.operators import reference
from fused_resnet.operators.describe import add_relu_problem, conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS, AddReluProblem, ConvProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
_MISSING = runtime.why_not(DEVICE, torch.float32)
needs_triton = pytest.mark.skipif(_MISSING is not None, reason=f"Triton kernels: {_MISSING}")
needs_interpreter = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")

# Three tiles of rows in groups of two, several of channels, one of each ragged: the program order has every case.
SMALL_TILES = TritonConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP_M=2, num_warps=4, num_stages=2)

# N, C, H, W, K, filter, stride, padding, dilation, groups
CASES = {
    "pointwise": (2, 64, 5, 7, 40, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, odd channels": (2, 27, 5, 7, 13, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, one channel": (3, 1, 4, 3, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, groups": (2, 24, 5, 4, 8, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "pointwise, padded": (1, 16, 3, 4, 8, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    "shortcut": (2, 32, 7, 6, 24, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x3": (2, 16, 6, 7, 20, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, two steps a tap": (1, 96, 4, 3, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, odd channels": (2, 11, 5, 6, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, stride 2": (2, 16, 7, 8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stem": (1, 3, 15, 13, 8, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "asymmetric": (2, 16, 9, 8, 12, (3, 2), (1, 2), (2, 0), (2, 1), 1),
    "asymmetric, odd channels": (1, 5, 8, 9, 6, (2, 3), (2, 1), (0, 2), (1, 3), 1),
    "dilated": (1, 16, 9, 9, 8, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "groups": (2, 32, 5, 4, 36, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "groups, odd channels": (1, 12, 5, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "depthwise": (2, 7, 5, 6, 7, (3, 3), (1, 1), (1, 1), (1, 1), 7),
    "padding wider than the image": (1, 16, 2, 1, 8, (3, 3), (1, 1), (4, 5), (1, 1), 1),
    "filter as large as the image": (2, 16, 4, 3, 8, (4, 3), (1, 1), (0, 0), (1, 1), 1),
}


def operands_of(case, dtype, *, residual=True, bias=True, vectors=torch.float32) -> tuple[ConvOperands, tuple]:
    N, C, H, W, K, filter_size, *window = case
    x = torch.randn(N, C, H, W, dtype=dtype, device=DEVICE)
    weight = torch.randn(K, C // window[-1], *filter_size, dtype=dtype, device=DEVICE)
    o = ConvOperands(
        x, weight,
        torch.randn(K).to(DEVICE, vectors), torch.randn(K).to(DEVICE, vectors), torch.randn(K).to(DEVICE, vectors),
        (torch.rand(K) + 0.1).to(DEVICE, vectors), bias=torch.randn(K).to(DEVICE, vectors) if bias else None,
    )  # fmt: skip
    if residual:
        shape = conv_problem(o, *window, "none").output_shape
        o = o._replace(residual=torch.randn(shape, dtype=dtype, device=DEVICE))
    return o, tuple(window)


def launched(operands, window, activation="relu", config=None) -> tuple[ConvProblem, ConvOperands, torch.Tensor]:
    operands = operands.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    problem = conv_problem(operands, *window, activation)
    assert launch.why_not(problem) is None
    N, K, P, Q = problem.output_shape
    guard, size = 64, N * K * P * Q  # poison before, in and behind the output
    memory = torch.full((size + 2 * guard,), float("nan"), dtype=problem.dtype, device=DEVICE)
    out = memory[guard : guard + size].view(N, P, Q, K).permute(0, 3, 1, 2)
    launch.launch(problem, operands, out, config)
    assert memory[:guard].isnan().all() and memory[guard + size :].isnan().all(), f"{problem}: written out of bounds"
    return problem, operands, out


def check(operands, window, activation="relu", config=None) -> torch.Tensor:
    """Launch, and hold every element to the reference and its bound; non-finite ones must be the same."""
    problem, operands, out = launched(operands, window, activation, config)
    expected = reference.conv_bn_act(problem, operands)
    tf32 = problem.dtype == torch.float32 and devices.allows_tf32() and not runtime.INTERPRETED
    bound = reference.error_bound(problem, operands, expected=expected, eps_acc=2.0 ** (-11 if tf32 else -24))
    got, finite = out.cpu().double(), expected.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{problem}: non-finite values in other places"
    assert torch.equal(got[~finite].nan_to_num(nan=7.0), expected[~finite].nan_to_num(nan=7.0)), str(problem)
    error = (got - expected).abs()[finite]
    worst = (error / bound[finite]).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{problem}, {config}: {worst:.2f} times the bound"
    return out


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values(case, dtype):
    check(*operands_of(case, dtype))


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["pointwise", "3x3"])
def test_activations(case, activation):
    operands, window = operands_of(CASES[case], torch.float16)
    out = check(operands, window, activation)
    reached = {"none": out.min() < -1, "relu": out.min() == 0, "relu6": out.max() == 6, "silu": (out < 0).any()}
    assert reached[activation]


@needs_triton
@pytest.mark.parametrize("missing", ["bn_weight", "bn_bias", "bn_mean", "bn_var", "bias", "residual", "all but x"])
@pytest.mark.parametrize("case", ["pointwise, odd channels", "3x3"])
def test_each_operand_may_be_missing(case, missing):
    operands, window = operands_of(CASES[case], torch.float32)
    names = ["bn_weight", "bn_bias", "bn_mean", "bn_var", "bias", "residual"] if missing == "all but x" else [missing]
    check(operands._replace(**dict.fromkeys(names)), window)


@needs_triton
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_vectors(dtype, vectors):
    check(*operands_of(CASES["shortcut"], dtype, vectors=vectors))


@needs_triton
@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e-3, 1e8, 1e30])
def test_variance_and_negative_gamma(variance):
    operands, window = operands_of(CASES["3x3"], torch.float32)
    operands = operands._replace(bn_var=torch.full_like(operands.bn_var, variance), bn_weight=-operands.bn_weight.abs())
    check(operands, window)
    check(operands._replace(eps=1e-3), window)


@needs_triton
def test_shift_that_cancels():
    """conv + bias - mean nearly vanishes: what is left must not be the rounding error of a large shift."""
    operands, window = operands_of(CASES["pointwise"], torch.float32, residual=False)
    check(operands._replace(bias=operands.bias + 1e4, bn_mean=operands.bn_mean + 1e4), window, "none")


@needs_triton
@pytest.mark.parametrize(
    "case, activation",
    [*(("pointwise", activation) for activation in ACTIVATIONS), ("3x3", "relu"), ("3x3, odd channels", "relu")],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_values_go_where_they_belong(case, bad, activation):
    operands, window = operands_of(CASES[case], torch.float32)
    # an infinite bn_weight is left out: whether it meets the sum or each part of it is the implementation's choice,
    # and torch's own CPU and CUDA batch norms choose differently
    for name in ("x", "residual", "bn_bias", *(["bn_weight"] if bad != bad else [])):
        tensor = getattr(operands, name).clone()
        tensor[(0,) * tensor.dim()] = bad
        out = check(operands._replace(**{name: tensor}), window, activation)
        assert out.isfinite().any()
        if bad != bad:
            assert out.isnan().any()


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_many_small_tiles(case):
    check(*operands_of(case, torch.float16), config=SMALL_TILES)


def search_spaces():
    """One problem per branch of `configs`, with several of the largest tiles in every dimension."""
    for dtype, size in ((torch.float32, 8), (torch.float16, 21)):
        for name, case in {
            "pointwise": (2, 128, 13, size, 136, (1, 1), (1, 1), (0, 0), (1, 1), 1),
            "filter": (1, 64, 11, 13, 72, (1, 2), (1, 1), (0, 1), (1, 1), 1),
            "masked": (1, 44, 11, 13, 72, (1, 2), (1, 1), (0, 1), (1, 1), 1),
            "groups": (1, 64, 9, 17, 96, (2, 1), (1, 1), (1, 0), (1, 1), 2),
        }.items():
            problem = conv_problem(*on_meta(case, dtype), "relu")
            for config in configs.configs(problem):
                yield pytest.param(case, dtype, config, id=f"{name}-{dtype}-{'x'.join(map(str, config))}")


def on_meta(case, dtype):
    N, C, H, W, K, filter_size, *window = case
    weight = torch.empty(K, C // window[-1], *filter_size, dtype=dtype, device="meta")
    return (ConvOperands(torch.empty(N, C, H, W, dtype=dtype, device="meta"), weight), *window)


@needs_triton
@pytest.mark.parametrize("case, dtype, config", list(search_spaces()))
def test_every_config(case, dtype, config):
    check(*operands_of(case, dtype), config=config)


@st.composite
def drawn_problems(draw):
    groups = draw(st.integers(1, 3))
    C, K = groups * draw(st.integers(1, 18)), groups * draw(st.integers(1, 18))
    N, H, W = draw(st.integers(1, 2)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    return N, C, H, W, K, pair(1, 3), pair(1, 3), pair(0, 2), pair(1, 2), groups


@needs_triton
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    case=drawn_problems(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    missing=st.sets(st.sampled_from(["bn_weight", "bn_bias", "bn_mean", "bn_var", "bias", "residual"])),
    small=st.booleans(),
)
def test_whole_problems(case, dtype, activation, missing, small):
    try:
        operands, window = operands_of(case, dtype)
    except ValueError:  # a filter that does not fit
        assume(False)
    check(operands._replace(**dict.fromkeys(missing)), window, activation, SMALL_TILES if small else None)


@needs_triton
def test_strides_of_dimensions_of_size_one_are_not_read():
    operands, window = operands_of((1, 16, 1, 5, 1, (1, 3), (1, 1), (0, 1), (1, 1), 1), torch.float32)
    x = operands.x.contiguous(memory_format=torch.channels_last)
    odd = x.as_strided(x.shape, (7, 1, 3, 16))
    assert odd.is_contiguous(memory_format=torch.channels_last) and odd.stride() != x.stride()
    expected = launched(operands, window)[2]
    problem = conv_problem(operands, *window, "relu")
    out = torch.full_like(expected, float("nan"))
    residual = operands.residual.contiguous(memory_format=torch.channels_last)
    weight = operands.weight.contiguous(memory_format=torch.channels_last)
    launch.launch(problem, operands._replace(x=odd, weight=weight, residual=residual), out)
    assert torch.equal(out, expected)


@needs_triton
def test_empty_batch_launches_nothing():
    operands, window = operands_of((0, 16, 4, 4, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1), torch.float32)
    assert launched(operands, window)[2].shape == (0, 8, 4, 4)


# ------------------------------------------------------------------------------------------- 64-bit offsets


@pytest.fixture
def touched(monkeypatch):
    """Run only the last program of each launch, and record the addresses it would touch instead of touching them."""
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype
    from triton.runtime.interpreter import interpreter_builder as builder

    def load(ptrs, mask, other, *_):
        record(ptrs, mask)
        dtype = ptrs.get_element_ty()
        return TensorHandle(np.zeros(ptrs.data.shape, _get_np_dtype(dtype)), dtype)

    def record(ptrs, mask):
        for address in np.broadcast_to(ptrs.data, mask.data.shape)[mask.data][[0, -1]] if mask.data.any() else ():
            addresses.append(int(address))

    addresses, last = [], {}
    monkeypatch.setattr(builder, "create_masked_load", load, raising=False)
    monkeypatch.setattr(builder, "create_masked_store", lambda ptrs, value, mask, *_: record(ptrs, mask), raising=False)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (last["program"], 0, 0)))

    def run(problem, config) -> tuple[list[int], dict[str, int]]:
        tensors = {name: torch.zeros(1, dtype=problem.dtype) for name in ("x", "weight", "residual", "out")}
        operands = ConvOperands(tensors["x"], tensors["weight"], residual=tensors["residual"])
        (each,) = launch.prepare(problem, operands, tensors["out"], config)
        last["program"] = each.num_programs - 1
        runtime.start(*each._replace(num_programs=1), like=tensors["out"])
        return addresses, {name: tensor.data_ptr() for name, tensor in tensors.items()}

    return run


def _large(N, C, size, K, filter_size) -> ConvProblem:
    return ConvProblem(
        N, C, size, size, K, filter_size, filter_size, (1, 1), (filter_size // 2,) * 2, (1, 1), 1,
        "relu", False, False, True, torch.float16, "cpu",
    )  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("filter_size", [1, 3])
def test_activations_beyond_2_to_the_31_elements(touched, filter_size):
    problem = _large(1400, 64, 224, 64, filter_size)
    elements = problem.N * problem.H * problem.W * problem.C
    assert elements > 2**32
    addresses, base = touched(problem, TritonConfig(64, 64, 64, 8, 4, 2))
    for name in ("x", "residual", "out"):
        assert base[name] + 2 * (elements - 1) in addresses, f"the last element of {name} is not touched"


@needs_interpreter
@pytest.mark.parametrize("filter_size", [1, 3])
def test_weights_beyond_2_to_the_31_elements(touched, filter_size):
    C = 2**16 if filter_size == 1 else 2**14
    problem = _large(1, C, 1, C * 2, filter_size)
    elements = problem.K * problem.reduction
    assert elements > 2**31
    addresses, base = touched(problem, TritonConfig(1, 16, 2**14, 8, 4, 2))
    assert base["weight"] + 2 * (elements - 1) in addresses


def test_what_32_bit_numbers_cannot_hold_is_refused():
    assert "4294967296 output pixels are too many" in launch.why_not(_large(2**16, 8, 256, 8, 1))
    assert "8388608 channels are too many" in launch.why_not(_large(1, 2**23, 1, 8, 1))


# ---------------------------------------------------------------------------------------------- add_relu


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7, 2), (2, 8, 16, 16)], ids=str)
def test_add_relu(shape, dtype):
    a, b = torch.randn(2, *shape, device=DEVICE).to(dtype)
    out = torch.full_like(a, float("nan"))
    problem = add_relu_problem(a, b)
    add_relu.launch(problem, a, b, out)
    assert torch.equal(out, torch.relu(a + b))

    grad, grad_input = torch.randn_like(a), torch.full_like(a, float("nan"))
    add_relu.launch_backward(problem, grad, out, grad_input)
    assert torch.equal(grad_input, torch.ops.aten.threshold_backward(grad, out, 0))


@needs_triton
def test_add_relu_walks_any_dense_layout():
    a, b = torch.randn(2, 2, 6, 5, 4, device=DEVICE).to(memory_format=torch.preserve_format)
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    out = torch.full_like(a, float("nan"))
    add_relu.launch(add_relu_problem(a, b), a, b, out)
    assert out.stride() == a.stride() and torch.equal(out, torch.relu(a + b))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_non_finite_in_place_and_empty(dtype):
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([nan, inf, -inf, inf, 1.0, -0.0, 0.0, 3.0], dtype=dtype, device=DEVICE)
    b = torch.tensor([1.0, inf, -inf, -inf, nan, -0.0, -0.0, -7.0], dtype=dtype, device=DEVICE)
    expected, problem = torch.relu(a + b), add_relu_problem(a, b)
    add_relu.launch(problem, a, b, b)
    torch.testing.assert_close(b, expected, rtol=0, atol=0, equal_nan=True)

    grad = torch.tensor([2.0, inf, inf, nan, nan, inf, 1.0, 1.0], dtype=dtype, device=DEVICE)
    expected = torch.ops.aten.threshold_backward(grad, b, 0)
    add_relu.launch_backward(problem, grad, b, grad)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)

    empty = torch.empty(0, 3, dtype=dtype, device=DEVICE)
    add_relu.launch(add_relu_problem(empty, empty), empty, empty, empty)


# ----------------------------------------------------------------------------------- choices and refusals


@pytest.mark.parametrize(
    "device, dtype, reason",
    [
        ("cpu", torch.float64, "float64 is not supported (float32, float16, bfloat16 are)"),
        ("xpu", torch.float32, "device 'xpu' is not supported (cuda is)"),
    ],
)
@needs_triton
def test_why_not(device, dtype, reason):
    assert runtime.why_not(device, dtype) == reason
    assert add_relu.why_not(AddReluProblem((4,), True, dtype, device)) == reason


@pytest.mark.parametrize(
    "hip, capability, reason",
    [
        ("6.4", (9, 0), "it is not supported on ROCm"),
        (None, (7, 5), "it needs compute capability 8.0 or later on every visible GPU, one has 7.5"),
        (None, (9, 0), "Triton does not work on this machine (RuntimeError: no compiler)"),
    ],
)
def test_why_not_on_a_gpu(monkeypatch, hip, capability, reason):
    monkeypatch.setattr(runtime, "IMPORT_ERROR", None)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices, "least_capability", lambda: capability)

    class Broken:
        @property
        def runtime(self):
            raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(runtime, "triton", Broken())
    runtime._driver_error.cache_clear()
    try:
        assert runtime.why_not("cuda", torch.bfloat16) == reason
    finally:
        runtime._driver_error.cache_clear()


def test_an_interpreter_that_this_numpy_breaks_is_not_used():
    assert "Triton 3.6.0 does not run with numpy 2.5.2: install numpy<2.4" in runtime._interpreter_error(
        "3.6.0", "2.5.2"
    )
    fine = (("3.6.0", "2.3.5"), ("3.7.1", "2.5.2"), ("3.10.0+git1", "2.4.0rc1"))
    assert [runtime._interpreter_error(*versions) for versions in fine] == [None] * 3


_ON_A_CPU = """
from fused_resnet.kernels.triton import add_relu, runtime
from fused_resnet.kernels.triton.conv import launch
import torch
print(runtime.why_not("cpu", torch.float32))
"""


@pytest.mark.parametrize(
    "before, reason",
    [
        ("", "on a CPU it runs only in the interpreter: set TRITON_INTERPRET=1"),
        ("import sys; sys.modules['triton'] = None", "Triton is not installed"),
        ("import sys; sys.modules['triton.language'] = None", "Triton cannot be imported (ModuleNotFoundError: "),
    ],
    ids=["not interpreted", "absent", "broken"],
)
def test_the_kernels_import_without_a_working_triton(before, reason):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", before + _ON_A_CPU]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(reason)


def test_tf32_follows_torch():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision, allowed in (("ieee", False), ("tf32", True)):
            conv.fp32_precision = precision
            assert devices.allows_tf32() is allowed
    finally:
        conv.fp32_precision = before


def test_input_precision_reaches_the_kernel(monkeypatch):
    for allowed, expected in ((True, "tf32"), (False, "ieee")):
        monkeypatch.setattr(devices, "allows_tf32", lambda allowed=allowed: allowed)
        for dtype in DTYPES:
            operands, *window = on_meta(CASES["3x3"], dtype)
            problem = conv_problem(operands, *window, "relu")
            (each,) = launch.prepare(problem, operands, operands.x, SMALL_TILES)
            assert each.options["INPUT_PRECISION"] == (expected if dtype == torch.float32 else "ieee")


# ------------------------------------------------------------------------- what the interpreter would hide


@needs_interpreter
def test_the_interpreter_rounds_to_bfloat16_as_a_gpu_does():
    """Interpreted launches round ties to even and carry into the exponent, and leave the interpreter as it was."""
    from triton.runtime.interpreter import interpreter_builder

    values = torch.cat([torch.randn(1000), torch.tensor([1.00390625, 1.01171875, 1.998046875, 3.3895e38, 1e-40, -0.0])])
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    # the values arrive as the fp32 bias of as many channels, so that only the store rounds them
    operands = ConvOperands(torch.zeros_like(one), one.expand(values.numel(), 1, 1, 1), bias=values)
    out = launched(operands, ((1, 1), (0, 0), (1, 1), 1), "none")[2]
    assert torch.equal(out.flatten(), values.bfloat16())
    assert not {"cast_impl", "create_dot"} & set(vars(interpreter_builder))


@needs_interpreter
def test_the_interpreter_multiplies_bfloat16_values():
    bits = torch.randn(64).bfloat16()
    assert np.array_equal(interpreter._from_bits(bits.view(torch.int16).numpy().view(np.uint16)), bits.float().numpy())


def test_a_cache_is_read_as_often_as_is_counted():
    if not runtime.INTERPRETED:
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)")
    source, out = torch.randn(3 * cache_read.BLOCK), torch.full((5,), math.nan)
    cache_read.launch(source, out)
    torch.testing.assert_close(out, source.sum().expand(5), atol=1e-2, rtol=1e-4)
    assert cache_read.bytes_read(source, out) == 5 * 3 * cache_read.BLOCK * 4
