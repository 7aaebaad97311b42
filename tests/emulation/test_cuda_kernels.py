"""csrc/cuda's kernels, as nvcc compiles them: every tile on every kind of window, what travels unharmed through the
epilogue, views that begin anywhere, and every config of the backend. fp32 and bf16 are in the second tier.
"""

import functools
import itertools
import math

import pytest
import torch

from fused_resnet import backends, choosing
from fused_resnet.backends import cuda
from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.emulation import cuda_launches, library
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from fused_resnet.emulation.operands import operands_of
from fused_resnet.machine import devices
from fused_resnet.operators import layout, quantized, reference
from fused_resnet.operators.describe import conv_int8_problem, conv_problem
from fused_resnet.operators.operands import VECTORS, ConvOperands, Int8Operands
from fused_resnet.operators.problem import ACTIVATIONS, ConvProblem, parsed_problem
from fused_resnet.operators.quantized import Epilogue

pytestmark = [
    pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or ""),
    pytest.mark.skipif(cuda_launches.why_not() is not None, reason=cuda_launches.why_not() or ""),
]

TILES = range(cuda_launches.NUM_TILES)
DTYPES = ("float16", pytest.param("bfloat16", marks=pytest.mark.full), pytest.param("float32", marks=pytest.mark.full))
SPECIAL = (0.0, -0.0, 1.0, -1.0, 3e-5, -3e-5, math.nan, math.inf, -math.inf, 6e4, -6e4)
# each has something the others lack
WINDOWS = {
    "pointwise": "2x64x7x5 -> 72, 1x1",
    "3x3, 9 steps of the ring": "2x64x8x8 -> 64, 3x3 p1",
    "downsample": "2x32x9x7 -> 136, 1x1 s2",
    "stem": "1x3x17x15 -> 64, 7x7 s2 p3",
    "several row and column tiles": "3x16x12x11 -> 144, 3x3 p1",
    "dilated": "1x24x9x9 -> 40, 3x3 p2 d2",
    "resnext groups": "1x64x6x6 -> 64, 3x3 p1 g8",
    "resnext groups of 4 channels": "2x32x6x6 -> 32, 3x3 p1 g8",
    "depthwise": "1x12x6x5 -> 12, 3x3 p1 g12",
    "asymmetric": "1x8x9x6 -> 8, 1x4 s(3, 1) p(0, 3) d(1, 2)",
    "one pixel": "1x8x1x1 -> 8, 1x1",
    "filter larger than the image": "2x8x2x2 -> 9, 5x5 p2",
}


def problem(window: str, dtype="float16", epilogue="bn+bias+add", activation="relu") -> ConvProblem:
    return parsed_problem(f"{window} {dtype} {epilogue} {activation}", "cpu")


def tiles_for(p: ConvProblem) -> list[int]:
    is_aligned = p.C // p.groups * p.dtype.itemsize % 16 == 0
    return list(TILES if is_aligned else cuda_launches.ANY_ALIGNMENT)


def run(p: ConvProblem, o: ConvOperands, tile: int, splits: int = 1, **how) -> torch.Tensor:
    """The output, of a run that reports nothing."""
    out, outcomes = cuda_launches.conv_bn_act(p, o, 80, tile, splits, **how)
    assert [report for outcome in outcomes for report in outcome.reports] == [], (tile, splits)
    return out


def assert_close(p: ConvProblem, o: ConvOperands, actual: torch.Tensor, where=True) -> None:
    expected = reference.conv_bn_act(p, o)
    eps_acc = 2.0**-11 if p.dtype == torch.float32 else 2.0**-24  # TF32 products
    bound = reference.error_bound(p, o, expected=expected, eps_acc=eps_acc)
    right = (actual.double() - expected).abs() <= bound
    assert bool((right | ~torch.as_tensor(where)).all()), p


@pytest.mark.parametrize("number", range(len(WINDOWS)), ids=list(WINDOWS))
def test_every_window(number):
    """On one tile; in one part, in two, or in more parts than there are steps."""
    p = problem(list(WINDOWS.values())[number])
    tiles = tiles_for(p)
    check_tile(p, tiles[number % len(tiles)], (1, 2, steps_of(p) + 1)[number % 3], number)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_tile_on_every_window(name, dtype):
    p = problem(WINDOWS[name], dtype)
    ways = itertools.product(tiles_for(p), (1, 2, steps_of(p) + 1))
    for number, (tile, splits) in enumerate(ways):
        check_tile(p, tile, splits, number)


def steps_of(p: ConvProblem) -> int:
    return -(-p.reduction * p.dtype.itemsize // 128)


def check_tile(p: ConvProblem, tile: int, splits: int, number: int) -> None:
    o, how = operands_of(p), dict(landing=LANDINGS[number % 3], schedule=SCHEDULES[number % 4], seed=number)
    assert_close(p, o, run(p, o, tile, splits, **how))


@pytest.mark.parametrize("tile, splits", [*((tile, 1) for tile in TILES), (2, 4)])
def test_the_result_does_not_depend_on_timing(tile, splits):
    p = problem(WINDOWS["3x3, 9 steps of the ring"])
    o = operands_of(p)
    ways = zip(LANDINGS, ("in_turn", "backwards", "greedy"))
    outputs = [run(p, o, tile, splits, landing=landing, schedule=schedule) for landing, schedule in ways]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", ["bn+bias", "bn", "bias", "bn+bias+add", "bias+add", "add", "plain"])
def test_epilogue(activation, epilogue):
    """Vectors of every dtype."""
    p = problem("1x8x5x5 -> 16, 3x3 p1", "float16", epilogue, activation)
    o = operands_of(p)._replace(x=operands_of(p).x * 4)  # relu6 and silu beyond their bends
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        typed = o._replace(**{name: v.to(dtype) for name in VECTORS if (v := getattr(o, name)) is not None})
        assert_close(p, typed, run(p, typed, 2, 1 + number % 2))


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e12])
def test_extreme_variance_and_negative_gamma(variance):
    p = problem("1x8x4x4 -> 8, 3x3 p1", activation="none")
    o = operands_of(p)
    o = o._replace(bn_var=torch.full((8,), variance), bn_weight=-o.bn_weight.abs())
    assert_close(p, o, run(p, o, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_where_torch_has_them(dtype, activation):
    p = problem("1x16x7x7 -> 16, 3x3 p1", dtype, activation=activation)
    o = operands_of(p)
    o.x[0, 3, 1, 1], o.x[0, 5, 5, 5] = math.nan, math.inf
    o.residual[0, 0, 6, 0], o.residual[0, 1, 0, 6] = math.nan, -math.inf
    expected = reference.conv_bn_act(p, o)
    bound = reference.error_bound(p, o, expected=expected, eps_acc=2.0**-11)
    assert expected.isnan().sum() >= 9 * 16 and bound.isfinite().sum() > 200, "the test has something to lose"
    for tile, splits in ((1, 1), (2, 1), (2, 3)):
        actual = run(p, o, tile, splits)
        assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())
        assert_close(p, o, actual, where=bound.isfinite())


def shifted(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values in memory that begins so many elements further on."""
    tensor = tensor if tensor.dim() == 4 else tensor.contiguous()
    room = torch.full((tensor.numel() + elements,), math.nan, dtype=tensor.dtype)
    return room.as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)


@pytest.mark.parametrize("elements", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_views_that_begin_anywhere(name, elements):
    p = problem("2x64x7x5 -> 72, 3x3 p1")
    o = operands_of(p)
    moved = o._replace(**{name: shifted(getattr(o, name), elements)})
    tiles = TILES if elements == 8 or name == "residual" else cuda_launches.ANY_ALIGNMENT
    for number, tile in enumerate(tiles):
        assert_close(p, o, run(p, moved, tile, 1 + number % 2))
    if tiles != TILES:
        with pytest.raises(ValueError, match="16-byte aligned channels only"):
            run(p, moved, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 1, 0), (1, 2, 3)])
def test_addition_and_its_gradient(dtype, shifts):
    """Bit for bit, also at sizes that are no multiple of a chunk. Zeros are positive."""
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)))
    for size in (1, 7, 8, 9, 4099):
        values = torch.cat([pairs, torch.randn(max(0, size - len(pairs)), 2)])[:size].to(getattr(torch, dtype))
        a, b, out = (shifted(t, n) for t, n in zip((values[:, 0], values[:, 1], torch.empty(size).to(values)), shifts))
        assert cuda_launches.run_add_relu(a, b, out, 80).reports == []
        expected = torch.relu(a + b)
        assert torch.equal(out.nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert not out[~out.isnan()].signbit().any()
        assert cuda_launches.run_add_relu(a, b, out.fill_(math.nan), 80, backward=True).reports == []
        expected = torch.ops.aten.threshold_backward(a, b, 0)
        assert torch.equal(out.nan_to_num(-1.0), expected.nan_to_num(-1.0))


# --------------------------------------------------------------------------------------- the backend and its configs

CUDA = backends.known("conv_bn_act")["cuda"]
SMALL_BATCH = "1x256x6x7 -> 40, 3x3 s(2, 1) p1"


@pytest.fixture
def emulated_library(monkeypatch):
    """The library's convolution, emulated, for tensors on the CPU; the (tile, splits) of each call that reached it."""
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine the kernel itself is tested")
    ran = []

    def kernel(*arguments):
        o, (*window, groups, activation, allow_tf32, tile, partials, out) = ConvOperands(*arguments[:9]), arguments[9:]
        assert allow_tf32
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (o.x, o.weight, o.residual, out))
        splits = 1 if partials is None else partials.shape[0]
        assert splits == 1 or (partials.shape == (splits, out.numel()) and partials.dtype == torch.float32)
        ran.append((tile, splits))
        p = conv_problem(o, *map(tuple, window), groups, activation)
        out.copy_(run(p, layout.all_channels_last(o), tile, splits))

    def of_bytes(x, weight, multiplier, bias, residual, factor, low, high, *arguments):
        (*window, groups, tile, partials, out), is_signed = arguments, low < 0
        tensors = [t for t in (x, weight, residual, out) if t is not None]
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
        splits = 1 if partials is None else partials.shape[0]
        assert splits == 1 or (partials.shape == (splits, out.numel()) and partials.dtype == torch.int32)
        ran.append((tile, splits))
        o = Int8Operands(x, weight, Epilogue(multiplier, bias, factor, low, high, out.dtype), residual)
        activation = "none" if is_signed else "relu"
        p = conv_int8_problem(o, *map(tuple, window), groups, activation)
        _, outcomes = cuda_launches.conv_bn_act(p, o, 80, tile, splits, out=out)
        assert [report for outcome in outcomes for report in outcome.reports] == []

    def configs(x, weight, stride, padding, dilation, groups, element_bytes, is_aligned, index):
        per_filter = weight[1] * weight[2] * weight[3]
        shape = checks.ConvShape((x[0], *x[2:], x[1]), (weight[0], *weight[2:], weight[1]), tuple(stride),
                                 tuple(padding), tuple(dilation), groups)  # fmt: skip
        is_aligned = is_aligned and weight[1] * element_bytes % 16 == 0
        gpu = checks.DeviceLimits(132, 227 * 1024, 228 * 1024, 90)
        size = (shape.num_rows, weight[0] // groups, per_filter * element_bytes, groups)
        return list(itertools.chain(*checks.legal_configs(*size, gpu, is_aligned)))

    legal_on = cuda.legal_on  # a tensor on the CPU has no index for it
    on_cpu = functools.lru_cache(lambda problem, is_aligned, index: legal_on.__wrapped__(problem, is_aligned, 0))
    monkeypatch.setattr(cuda, "legal_on", on_cpu)
    monkeypatch.setattr(devices, "allows_tf32", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda._choice.cache_clear()
    with torch.library._scoped_library("fused_resnet", "IMPL") as scoped:
        scoped.impl("cuda_conv_bn_act", kernel, "CPU")
        scoped.impl("cuda_conv_int8", of_bytes, "CPU")
        scoped.impl("cuda_conv_configs", configs, "CompositeExplicitAutograd")
        yield ran
    cuda._choice.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_of_the_backend_is_right(emulated_library, dtype):
    """The default and what the tuner measures beside it, from operands in any layout to the operator's arguments."""
    p = problem(SMALL_BATCH, dtype)
    o = operands_of(p)
    o = o._replace(x=o.x.contiguous())
    configs, legal = CUDA.configs.worth(p), CUDA.configs.legal(p)
    default = legal[0]
    assert default.splits > 1 and default not in configs
    assert set(configs) <= set(legal) and len(set(configs)) == len(configs)
    for tile in TILES:  # alone, and in as many parts as should suit it best
        best = next(config for config in legal if config.tile == tile)
        assert {config for config in (default, *configs) if config.tile == tile} == {best, (tile, 1)}
    for config in (None, *configs):
        assert_close(p, o, choosing.Selection(CUDA, config).run(p, o))
        assert emulated_library[-1] == (config or default)


@pytest.mark.parametrize("dtype, activation", [("uint8", "relu6"), ("int8", "none")])
def test_bytes_reach_the_operator(emulated_library, dtype, activation):
    """From operands in any layout, with the default and with a split config."""
    p = parsed_problem(f"{SMALL_BATCH} {dtype} bias+add {activation}", "cpu")
    o = quantized_operands(p)
    o = o._replace(x=o.x.contiguous(), residual=o.residual.contiguous())
    expected = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
    for config in (None, cuda.CudaConfig(3, 2)):
        out = cuda.INT8.run(p, o) if config is None else cuda.INT8.run(p, o, config=config)
        assert torch.equal(out, expected) and out.dtype == p.output_dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert emulated_library[-1] == (3, 2) and len(emulated_library) == 2


def test_where_operands_are_not_aligned_a_config_that_needs_it_gives_way(emulated_library):
    """A view into the middle of a tensor: no tile for aligned operands reads it."""
    p = problem(WINDOWS["pointwise"])
    o = operands_of(p)
    moved = o._replace(x=shifted(o.x, 1))
    for config in CUDA.configs.legal(p):
        assert_close(p, o, CUDA.run(p, moved, config))
        tile, _ = emulated_library[-1]
        assert tile in cuda_launches.ANY_ALIGNMENT
        assert config.tile not in cuda_launches.ANY_ALIGNMENT or emulated_library[-1] == config


def test_what_is_tuned_for_one_batch_is_legal_for_its_neighbours(emulated_library):
    p = problem(SMALL_BATCH)
    for batch in (2, 4, 64):
        assert set(CUDA.configs.worth(p)) <= set(CUDA.configs.legal(p._replace(N=batch)))
