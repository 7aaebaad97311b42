"""Every kernel of ours as its compiler makes it for sm_80 and sm_90, at odd sizes, in all ways of landing and turns.

The first tier has every form, dtype, activation, residual and layout, in pairs; the second draws random problems.
"""

import importlib.util
import itertools
import sys

import pytest

from fused_resnet.emulation import library
from tests.support.emulated import Worker, wgmma_with_registers
from tests.support.ptx import kernel_text

_HAS_TRITON = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or ""),
    pytest.mark.skipif(not _HAS_TRITON, reason="needs Triton's compiler"),
]


@pytest.fixture(scope="module")
def worker():
    with Worker() as one:
        yield one


@pytest.fixture(scope="module")
def cuda():
    from fused_resnet.emulation import cuda_launches

    if reason := cuda_launches.why_not():
        pytest.skip(reason)


REGISTER_A = "Triton's issue 9433: a wgmma that reads A from registers"


def check(answer, worst=1.0):
    assert answer["reports"] == []
    assert answer["worst"] <= worst, answer


# --------------------------------------------------------------------------------------------------------- convolutions

# BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages, form, split_k, persistent. Whether the output and the
# residual lie in row space. More steps of the reduction than stages, so that every wait and parity is tried.
TRITON = (
    (80, "1x64x9x11 -> 64, 3x3 p1 float16 bn+add silu", (64, 32, 32, 8, 4, 3)),
    (80, "1x32x13x11 -> 40, 3x3 s2 p1 bfloat16 bn relu", (64, 32, 32, 8, 4, 4)),
    (80, "1x32x7x9 -> 48, 3x3 p1 float32 bias+add relu6", (32, 32, 32, 8, 4, 3)),
    (80, "2x128x7x9 -> 72, 1x1 float16 bias+add none", (64, 64, 32, 8, 4, 3)),
    (80, "1x20x9x9 -> 52, 1x1 float16 bn+bias relu", (64, 32, 32, 8, 4, 3)),
    (80, "1x64x7x7 -> 33, 1x1 s2 float32 bias silu", (32, 32, 32, 8, 4, 3)),
    (80, "1x32x9x7 -> 64, 3x3 p1 g8 float16 bias relu6", ()),
    (80, "1x3x23x21 -> 64, 7x7 s2 p3 bfloat16 bias relu", ()),
    (80, "1x256x5x5 -> 64, 1x1 float16 bias+add relu", (64, 64, 64, 8, 4, 3, "pointer", 2)),
    (80, "1x64x5x5 -> 40, 3x3 p1 bfloat16 bn+add relu6", (64, 64, 64, 8, 4, 3, "pointer", 4), True),
    (90, "1x64x9x11 -> 64, 3x3 p1 bfloat16 bn+add relu", (64, 64, 64, 8, 4, 3)),
    (90, "2x128x7x9 -> 72, 1x1 float16 bias+add silu", (128, 64, 32, 8, 4, 3)),
    (90, "1x32x9x7 -> 64, 3x3 p1 g4 float32 bn none", ()),
    (90, "1x32x7x5 -> 40, 3x3 p1 float32 bn+add relu", (32, 32, 32, 8, 4, 3), True),
    (90, "2x256x7x9 -> 136, 1x1 float16 bias+add relu", (64, 64, 64, 8, 4, 3, "gemm_tma")),
    (90, "2x72x7x9 -> 64, 1x1 bfloat16 bn relu6", (64, 32, 16, 8, 4, 3, "gemm_tma")),
    (90, "2x128x12x10 -> 64, 1x1 s2 bfloat16 bias+add none", (64, 64, 32, 8, 4, 3, "gemm_tma")),
    (90, "2x256x9x9 -> 64, 1x1 bfloat16 bias+add silu", (64, 64, 64, 8, 4, 3, "gemm_tma"), True),
    (90, "3x128x9x9 -> 136, 1x1 float16 bias relu", (128, 64, 32, 8, 4, 3, "gemm_tma", 1, True)),
    (90, "1x512x5x5 -> 64, 1x1 float16 bias+add relu6", (64, 64, 64, 8, 4, 3, "gemm_tma", 2)),
    (90, "2x64x9x7 -> 64, 3x3 p1 float16 bn+add relu6", (64, 64, 64, 8, 4, 3, "rows_tma")),
    (90, "1x64x9x9 -> 72, 3x3 p1 bfloat16 bias+add relu", (64, 32, 32, 8, 4, 4, "rows_tma"), True),
    (90, "3x64x9x9 -> 72, 3x3 p1 float16 bias silu", (128, 64, 64, 8, 4, 3, "rows_tma", 1, True), True),
    (90, "1x64x9x9 -> 64, 3x3 p1 bfloat16 bias none", (64, 64, 64, 8, 4, 3, "rows_tma", 2)),
    (90, "2x64x9x7 -> 72, 3x3 p1 float16 bias+add relu", (64, 64, 64, 8, 4, 3, "lines_tma")),
    (90, "2x64x10x6 -> 64, 3x3 s2 p1 bfloat16 bn relu6", (64, 32, 32, 8, 4, 3, "lines_tma")),
    (90, "1x64x9x7 -> 40, 3x3 p1 bfloat16 bias+add none", (64, 32, 32, 8, 4, 3, "lines_tma"), True),
    (90, "1x64x8x6 -> 72, 3x3 s2 p1 float16 bias silu", (64, 64, 64, 8, 4, 3, "lines_tma")),
)  # fmt: skip


@pytest.mark.parametrize(
    "number", range(len(TRITON)), ids=[f"sm_{case[0]} {case[1]}".replace(" ", "_") for case in TRITON]
)
def test_triton_convolutions(worker, number):
    arch, problem, config, *rest = TRITON[number]
    answer = worker.ask(
        "conv_triton", problem=problem, config=config, arch=arch, number=number, in_row_space=bool(rest)
    )
    check(answer)
    is_tma = len(config) > 6 and config[6] != "pointer"
    assert answer["register_a"] == 0, REGISTER_A
    assert (answer["bulk_copies"] > 0) == is_tma
    if arch == 90 and " g" not in problem and "float32" not in problem:
        assert answer["wgmma"] > 0 and answer["mma"] == 0
    elif arch == 80:
        assert answer["mma"] > 0 and answer["wgmma"] == 0


FACTORS = {
    "form": ("pointer", "gemm_tma", "rows_tma", "lines_tma"),
    "dtype": ("float16", "bfloat16", "float32"),
    "activation": ("none", "relu", "relu6", "silu"),
    "vectors": ("bn", "bias"),
    "residual": ("with a residual", "without"),
    "layout": ("row space", "compact"),
}


def values_of(case):
    """In the order of FACTORS."""
    _, problem, config, *rest = case
    *_, dtype, epilogue, activation = problem.split()
    vectors, is_added = epilogue.split("+")[0], epilogue.endswith("add")
    form = config[6] if len(config) > 6 else "pointer"
    return form, dtype, activation, vectors, FACTORS["residual"][not is_added], FACTORS["layout"][not rest]


def test_triton_cases_have_all_pairs():
    """Each value of a factor meets each of another at least once. Forms with TMA are for half precision."""
    wanted = {pair for two in itertools.combinations(FACTORS.values(), 2) for pair in itertools.product(*two)}
    found = {pair for case in TRITON for pair in itertools.combinations(values_of(case), 2)}
    assert wanted - found == {(form, "float32") for form in FACTORS["form"][1:]}


def test_a_register_operand_would_be_seen():
    """What the check on Triton's issue 9433 looks for."""
    from fused_resnet.emulation.parser import parse

    sums = ", ".join(f"%f{i}" for i in range(4))
    op = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{sums}}},"
    texts = (f"{op} {{%r0, %r1, %r2, %r3}}, %d0, 1, 1, 1, 0;", f"{op} %d1, %d0, 1, 1, 1, 0, 0;")
    assert [wgmma_with_registers(parse(kernel_text(text))) for text in texts] == [1, 0]


# -------------------------------------------------------------------------------------------------------------- chains

# N, C, H, W, K, L: tiles that end amid images, channels that fill no tile. And the config
CHAINS = (
    (90, "float16", (1, 64, 9, 11, 80, 64), "relu", (128, 64, 4, 2, True)),
    (90, "bfloat16", (3, 32, 4, 5, 80, 48), "silu", (64, 64, 4, 3, True)),
    (90, "float16", (5, 16, 1, 9, 48, 0), "relu6", (64, 64, 4, 2, True)),
    (80, "float16", (1, 64, 5, 7, 96, 64), "relu", (64, 64, 4, 2, False)),
    (80, "bfloat16", (2, 48, 3, 5, 80, 0), "none", (32, 64, 4, 2, False)),
)
# ResNet-50's and Wide-50-2's widths, inside a stage and to the next
STAGES = (
    (90, "float16", (4, 64, 9, 13, 256, 64), "relu", (128, 64, 4, 3, True)),
    (90, "bfloat16", (1, 128, 9, 13, 512, 256), "relu", (64, 64, 4, 2, True)),
    (90, "float16", (1, 256, 9, 13, 512, 256), "relu", (64, 64, 4, 2, True)),
    (80, "float16", (1, 128, 9, 13, 512, 128), "relu", (64, 64, 4, 2, False)),
)


def check_chain(worker, case, number):
    arch, dtype, shape, activation, config = case
    answer = worker.ask(
        "chain", dtype=dtype, shape=shape, activation=activation, config=config, arch=arch, number=number
    )
    check(answer)
    assert answer["halo"] and answer["register_a"] == 0, REGISTER_A
    assert (answer["bulk_copies"] > 0) == (answer["wgmma"] > 0) == (answer["mma"] == 0) == (arch == 90)


@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_chains(worker, number):
    check_chain(worker, CHAINS[number], number)


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(STAGES)))
def test_chains_of_real_widths(worker, number):
    check_chain(worker, STAGES[number], number + 5)


# ----------------------------------------------------------------------------------------------------------------- CUDA

# Channels of 64 are copied in 16 bytes, four of half precision in 8, 5 element by element.
ALIGNED, EIGHT, SINGLE = "64x8x9 -> 72, 3x3 p1", "16x9x9 -> 32, 3x3 p1 g4", "5x9x11 -> 40, 3x3 s2 p1"
CUDA = (
    *((f"1x{ALIGNED} float16 bn+add {activation}", tile, 1 + 2 * (tile % 2))
      for tile, activation in enumerate(("relu", "silu", "relu6", "none", "relu"))),
    *((f"2x{EIGHT} float16 bias {activation}", tile, splits)
      for tile, activation, splits in ((1, "relu", 1), (3, "relu6", 2))),
    *((f"1x{SINGLE} float16 bn+bias+add {activation}", tile, splits)
      for tile, activation, splits in ((1, "silu", 1), (3, "relu", 1))),
    ("2x64x7x5 -> 96, 1x1 float16 bias+add relu", 0, 2),
)  # fmt: skip
# dtypes that share the code above: one tile of each kind of copy
SOME = ((2, 16), (3, 16), (3, 0))
OTHER_DTYPES = (
    (f"1x{ALIGNED} bfloat16 bn+add relu", 2, 2), (f"1x{SINGLE} bfloat16 bias silu", 3, 1),
    (f"1x{ALIGNED} float32 bn+add relu6", 2, 3), (f"1x{SINGLE} float32 bias none", 3, 2),
)  # fmt: skip


@pytest.mark.parametrize(
    "number", range(len(CUDA)), ids=[f"{case[0]} tile {case[1]}".replace(" ", "_") for case in CUDA]
)
def test_cuda_convolutions(worker, cuda, number):
    problem, tile, splits = CUDA[number]
    answer = worker.ask("conv_cuda", problem=problem, tile=tile, splits=splits, arch=80, number=number, instances=[])
    check(answer)
    assert answer["mma"] > 0


@pytest.mark.parametrize("number", range(len(OTHER_DTYPES)))
def test_cuda_convolutions_in_other_dtypes(worker, cuda, number):
    problem, tile, splits = OTHER_DTYPES[number]
    arguments = dict(problem=problem, tile=tile, splits=splits, arch=80, number=number, instances=SOME)
    check(worker.ask("conv_cuda", **arguments))


@pytest.mark.full
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_every_cuda_instance(worker, cuda, dtype, arch):
    number = itertools.count()
    for problem, tile, splits in CUDA:
        if "g4" not in problem or dtype != "float32":  # four channels of fp32 are 16 bytes
            answer = worker.ask("conv_cuda", problem=problem.replace("float16", dtype), tile=tile, splits=splits,
                                arch=arch, number=next(number), instances=[])  # fmt: skip
            check(answer)


# -------------------------------------------------------------------------------------------------------- other kernels


@pytest.mark.parametrize("dtype, maker, arch", (
    ("float16", "triton", 80), ("bfloat16", "triton", 90), ("float32", "triton", 90),
    ("float16", "cuda", 80), ("bfloat16", "cuda", 80), ("float32", "cuda", 80),
))  # fmt: skip
def test_add_relu(worker, request, maker, dtype, arch):
    if maker != "triton":
        request.getfixturevalue("cuda")
    answer = worker.ask("add_relu", maker=maker, dtype=dtype, numel=4099, arch=arch, number=len(dtype) + arch)
    assert answer == dict(exact=True, reports=[])


@pytest.mark.parametrize("dtype, shape, activation, nchw, has_residual, arch", (
    ("float16", (2, 20, 7, 5), "silu", False, True, 80), ("bfloat16", (2, 20, 7, 5), "relu", True, True, 90),
    ("float32", (1, 64, 9, 9), "relu6", False, False, 90), ("float16", (1, 33, 9, 9), "none", True, False, 80),
))  # fmt: skip
def test_affine_act(worker, dtype, shape, activation, nchw, has_residual, arch):
    answer = worker.ask("affine_act", dtype=dtype, shape=shape, activation=activation, nchw=nchw,
                        has_residual=has_residual, arch=arch, number=arch + nchw)  # fmt: skip
    check(answer)


@pytest.mark.parametrize("dtype, shape, activation, nchw, has_residual, training, arch", (
    ("float32", (1, 20, 19, 23), "relu", False, True, True, 90),
    ("bfloat16", (3, 5, 33, 35), "relu6", True, True, True, 80),
    ("float16", (2, 33, 7, 5), "none", False, False, True, 80),
    ("bfloat16", (2, 20, 7, 5), "relu", False, False, False, 90),
))  # fmt: skip
def test_bn_act(worker, dtype, shape, activation, nchw, has_residual, training, arch):
    answer = worker.ask("bn_act", dtype=dtype, shape=shape, activation=activation, nchw=nchw, has_residual=has_residual,
                        training=training, arch=arch, number=arch + nchw)  # fmt: skip
    check(answer)
    assert answer["same_mask"]


@pytest.mark.parametrize("dtype, shape, window, stride, padding, activation, has_bias, arch", (
    ("float16", (1, 64, 13, 11), 3, 2, 1, "relu", True, 80), ("bfloat16", (2, 20, 7, 9), 2, 2, 0, "none", False, 90),
    ("float32", (1, 3, 9, 8), 3, 1, 1, "relu6", True, 90),
))  # fmt: skip
def test_max_pool(worker, dtype, shape, window, stride, padding, activation, has_bias, arch):
    answer = worker.ask("max_pool", dtype=dtype, shape=shape, window=window, stride=stride, padding=padding,
                        activation=activation, has_bias=has_bias, arch=arch, number=arch + window)  # fmt: skip
    assert answer == dict(exact=True, reports=[])


# ------------------------------------------------------------------------------------------------------ random problems


def random_problems(worker, names, arch, indices, kind="any"):
    """How many were run; each as `fused-resnet verify --emulate` runs it."""
    ran = 0
    for index, name in itertools.product(indices, names):
        answer = worker.ask("random_problem", seed=7, index=index, arch=arch, name=name, kind=kind)
        assert answer["status"] != "mismatch", (index, name, answer["detail"])
        assert answer["register_a"] == 0, (index, name, REGISTER_A)
        ran += answer["status"] == "ok"
    return ran


@pytest.mark.full
@pytest.mark.parametrize("arch", (80, 90))
def test_random_problems_on_cuda_kernels(worker, cuda, arch):
    assert random_problems(worker, ("cuda/conv_bn_act", "cuda/add_relu"), arch, range(100)) > 50


@pytest.mark.full
@pytest.mark.parametrize("arch", (80, 90))
def test_random_problems_on_triton_kernels(worker, arch):
    assert random_problems(worker, ("triton/add_relu", "triton/pointer"), arch, range(200, 225)) > 12


@pytest.mark.full
def test_random_problems_on_kernels_with_tma(worker):
    """The kind that they are for: 1x1 and 3x3 filters, channels in sixteens."""
    names = ("triton/gemm_tma", "triton/rows_tma", "triton/lines_tma")
    assert random_problems(worker, names, 90, range(300, 420), "common") > 20
