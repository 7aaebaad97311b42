"""The convolution kernels' forms against the fp64 reference: TMA, row space, split reductions, persistent programs.

On the GPU where there is one of sm_90 or later, else in Triton's interpreter. The pointer form's own: `test_triton.py`.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import launch, row_space
from fused_resnet.kernels.triton.conv.configs import (
    FORMS,
    TritonConfig,
)
from fused_resnet.machine import devices
from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.problem import ACTIVATIONS
from tests.kernels.test_triton import DEVICE, DTYPES, check, launched, needs_triton, operands_of

needs_tma = pytest.mark.skipif(
    not runtime.INTERPRETED and runtime.arch(torch.device(DEVICE)) < 90, reason="TMA needs a GPU of sm_90 or later"
)
pytestmark = [needs_triton, needs_tma]

TILE = TritonConfig(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, GROUP_M=2, num_warps=4, num_stages=2)
HALF_STEP = TILE._replace(BLOCK_K=16)  # two steps a tap

# N, C, H, W, K, filter, stride, padding, dilation, groups: several tiles of rows and of channels, all ragged
POINTWISE = (3, 32, 5, 7, 24, (1, 1), (1, 1), (0, 0), (1, 1), 1)
SHORTCUT = (3, 32, 6, 7, 24, (1, 1), (2, 2), (0, 0), (1, 1), 1)
FILTER = (3, 32, 5, 7, 24, (3, 3), (1, 1), (1, 1), (1, 1), 1)
STRIDED = (3, 32, 6, 8, 24, (3, 3), (2, 2), (1, 1), (1, 1), 1)
VARIANTS = {
    "gemm_tma": (POINTWISE, TILE._replace(form="gemm_tma")),
    "gemm_tma, persistent": (POINTWISE, TILE._replace(form="gemm_tma", persistent=True)),
    "gemm_tma, split": (POINTWISE, HALF_STEP._replace(form="gemm_tma", split_k=2)),
    "gemm_tma, stride 2": (SHORTCUT, TILE._replace(form="gemm_tma")),
    "gemm_tma, stride 2, persistent": (SHORTCUT, TILE._replace(form="gemm_tma", persistent=True)),
    "gemm_tma, stride 2, split": (SHORTCUT, HALF_STEP._replace(form="gemm_tma", split_k=2)),
    "rows_tma": (FILTER, TILE._replace(form="rows_tma")),
    "rows_tma, persistent": (FILTER, TILE._replace(form="rows_tma", persistent=True)),
    "rows_tma, split": (FILTER, HALF_STEP._replace(form="rows_tma", split_k=4)),
    "lines_tma": (FILTER, TILE._replace(form="lines_tma")),
    "lines_tma, stride 2": (STRIDED, HALF_STEP._replace(form="lines_tma")),
    "pointer, split": (FILTER, HALF_STEP._replace(split_k=4)),
    "pointer, pointwise, split": (POINTWISE, HALF_STEP._replace(split_k=2)),
    "pointer": (STRIDED, TILE),
    "pointer, pointwise": (POINTWISE, TILE),
}
variants = pytest.mark.parametrize("case, config", VARIANTS.values(), ids=VARIANTS.keys())


# ------------------------------------------------------------------------------------------------------- values


@variants
def test_values(case, config):
    check(*operands_of(case, torch.float16), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["gemm_tma", "gemm_tma, stride 2", "rows_tma, split", "lines_tma", "lines_tma, stride 2"]
)
def test_dtypes(name, dtype):
    case, config = VARIANTS[name]
    check(*operands_of(case, dtype), config=config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["gemm_tma, split", "lines_tma"])
def test_activations(name, activation):
    case, config = VARIANTS[name]
    check(*operands_of(case, torch.float16), activation, config)


@pytest.mark.parametrize("missing", ["bn_weight", "bn_var", "bias", "residual", "all but x"])
@pytest.mark.parametrize("name", ["gemm_tma", "pointer, split", "rows_tma"])
def test_each_operand_may_be_missing(name, missing):
    case, config = VARIANTS[name]
    operands, window = operands_of(case, torch.float16)
    names = ["bn_weight", "bn_bias", "bn_mean", "bn_var", "bias", "residual"] if missing == "all but x" else [missing]
    check(operands._replace(**dict.fromkeys(names)), window, config=config)


@pytest.mark.parametrize(
    "name", ["gemm_tma, stride 2", "rows_tma", "rows_tma, split", "lines_tma", "lines_tma, stride 2"]
)
def test_non_finite_pixels_stay_in_their_image_and_window(name):
    """In each corner of the middle image: a line, column or image too far would take it where it does not belong."""
    case, config = VARIANTS[name]
    operands, window = operands_of(case, torch.float32)
    for (h, w), bad in zip(itertools.product((0, -1), (0, -1)), (float("nan"), float("inf")) * 2):
        x = operands.x.clone()
        x[1, :, h, w] = bad
        out = check(operands._replace(x=x), window, config=config)
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["rows_tma", "lines_tma", "lines_tma, stride 2"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (2, 6), (6, 2)], ids=str)
def test_maps_as_small_as_the_filter(name, size):
    case, config = VARIANTS[name][0], HALF_STEP._replace(form=name.split(",")[0])
    if "stride 2" in name and (size[0] % 2 or size[1] % 2):
        pytest.skip("stride 2 needs an even map")
    check(*operands_of((2, 16, *size, 8, *case[5:]), torch.float32), config=config)


@st.composite
def drawn(draw):
    """A form with a problem that it computes, and where its tensors lie."""
    form = draw(st.sampled_from(FORMS[1:]))
    stride = 1 if form == "rows_tma" else draw(st.integers(1, 2))
    filter_size = 1 if form == "gemm_tma" else 3
    H, W = (stride * draw(st.integers(1, 5)) for _ in range(2))
    C = 16 * draw(st.integers(1, 3)) if filter_size > 1 or stride > 1 else 8 * draw(st.integers(1, 6))
    N, K = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    case = (N, C, H, W, K, (filter_size,) * 2, (stride,) * 2, (filter_size // 2,) * 2, (1, 1), 1)
    steps = filter_size**2 * -(-C // HALF_STEP.BLOCK_K)
    split_k = draw(st.integers(1, steps)) if form != "lines_tma" else 1
    persistent = form != "lines_tma" and split_k == 1 and draw(st.booleans())
    config = HALF_STEP._replace(form=form, split_k=split_k, persistent=persistent, GROUP_M=draw(st.integers(1, 3)))
    return case, config, draw(st.sets(st.sampled_from(["x", "residual", "out"])))


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=drawn(), dtype=st.sampled_from(DTYPES))
def test_whole_problems(drawn, dtype):
    case, config, in_row_space = drawn
    check_in_row_space(*operands_of(case, dtype), config, in_row_space)


# ---------------------------------------------------------------------------------------------------- row space


def check_in_row_space(operands, window, config, in_row_space) -> torch.Tensor:
    """As `check`, but with the named tensors in row space where the form can read them there; the halo must be zero."""
    operands = operands.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    problem = conv_problem(operands, *window, "relu")
    if "x" in in_row_space and (config.form == "rows_tma" or problem.is_pointwise):
        given = operands._replace(x=row_space.pack(operands.x))
    else:
        given = operands
    if "residual" in in_row_space:
        given = given._replace(residual=row_space.pack(operands.residual))
    N, K, P, Q = problem.output_shape
    rows = row_space.num_rows(N, P, Q) if "out" in in_row_space else N * P * Q
    guard = 64
    memory = torch.full((rows * K + 2 * guard,), float("nan"), dtype=problem.dtype, device=DEVICE)
    out = memory[guard : guard + rows * K].view(rows, K)
    if "out" not in in_row_space:
        out = out.view(N, P, Q, K).permute(0, 3, 1, 2)
    launch.launch(problem, given, out, config)
    assert memory[:guard].isnan().all() and memory[guard + rows * K :].isnan().all(), "written out of bounds"
    if "out" in in_row_space:
        unpacked = row_space.unpack(out, N, P, Q)
        assert torch.equal(row_space.pack(unpacked), out), f"{problem}, {config}: the halo is not zero"
        out = unpacked
    expected = reference.conv_bn_act(problem, operands)
    tf32 = problem.dtype == torch.float32 and devices.allows_tf32() and not runtime.INTERPRETED
    bound = reference.error_bound(problem, operands, expected=expected, eps_acc=2.0 ** (-11 if tf32 else -24))
    worst = ((out.cpu().double() - expected).abs() / bound).max().item()
    assert worst <= 1, f"{problem}, {config}: {worst:.2f} times the bound"
    return out


@pytest.mark.parametrize("in_row_space", [("out",), ("residual",), ("x", "residual", "out")], ids=" ".join)
@variants
def test_every_form_reads_and_writes_row_space(case, config, in_row_space):
    check_in_row_space(*operands_of(case, torch.float16), config, in_row_space)


def test_three_convolutions_that_never_leave_row_space():
    """1x1 -> 3x3 -> 1x1 over three images that share halos; each result is checked, and is the next one's input."""
    x = torch.randn(3, 32, 5, 7, dtype=torch.float16, device=DEVICE)
    for case, form in ((POINTWISE, "gemm_tma"), (FILTER, "rows_tma"), (POINTWISE, "gemm_tma")):
        operands, window = operands_of((*case[:4], 32, *case[5:]), torch.float16, residual=False)
        x = check_in_row_space(operands._replace(x=x), window, TILE._replace(form=form), ("x", "out")) / 16


def test_row_space_there_and_back():
    x = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    rows = row_space.pack(x)
    assert rows.shape == (row_space.num_rows(2, 2, 2), 3) == (18, 3)
    assert rows[0].tolist() == [0.0, 4.0, 8.0] and rows[4].tolist() == [3.0, 7.0, 11.0]
    assert [m for m in range(9) if not rows[m].any()] == [2, 5, 6, 7, 8]
    back = row_space.unpack(rows, 2, 2, 2)
    assert torch.equal(back, x) and back.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ same every time


@pytest.mark.parametrize("name", ["gemm_tma, split", "rows_tma, split", "pointer, split"])
def test_split_reductions_are_deterministic(name):
    case, config = VARIANTS[name]
    operands, window = operands_of(case, torch.float16)
    first, second = (launched(operands, window, "relu", config)[2] for _ in range(2))
    assert torch.equal(first, second)


def test_parts_without_steps_of_their_own():
    """Nine steps in eight parts: two each, so that the last three have nothing to sum."""
    for form in ("pointer", "rows_tma"):
        check(*operands_of((1, 32, 3, 3, 8, *FILTER[5:]), torch.float16), config=TILE._replace(form=form, split_k=8))


# --------------------------------------------------------------------------------------------------- refusals


def test_launch_refuses_what_it_cannot_compute():
    operands, window = operands_of(STRIDED, torch.float16)
    with pytest.raises(ValueError, match="conv_bn_act: .*rows_tma.* cannot compute .*: rows_tma does not compute"):
        check(operands, window, config=TILE._replace(form="rows_tma"))
    each = conv_problem(operands, *window, "relu")
    with pytest.raises(ValueError, match="cannot read x in row space"):
        launch.launch(each, operands._replace(x=row_space.pack(operands.x)), torch.empty(each.output_shape), TILE)


@pytest.mark.skipif(DEVICE != "cpu", reason="moves a CPU tensor's first byte")
def test_an_operand_that_tma_cannot_address_takes_the_pointer_form():
    operands, window = operands_of(POINTWISE, torch.float16, residual=False)
    memory = torch.empty(operands.x.numel() + 1, dtype=torch.float16)
    x = memory[1:].view(3, 5, 7, 32).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16
    check(operands._replace(x=x.copy_(operands.x)), window, config=TILE._replace(form="gemm_tma"))
