"""csrc/cuda's grouped 3x3 convolution, as nvcc compiles it for sm_80 and sm_90: every tile and width, values that are
not finite, what it declines, and one line broken at a time. bf16, fp32 and whole sweeps are in the second tier.
"""

import math
import shutil

import pytest
import torch

from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.emulation import cuda_launches, library
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from fused_resnet.emulation.operands import operands_of
from fused_resnet.operators import layout, reference
from fused_resnet.operators.operands import VECTORS, ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS, ConvProblem, parsed_problem

pytestmark = [
    pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or ""),
    pytest.mark.skipif(cuda_launches.why_not() is not None, reason=cuda_launches.why_not() or ""),
]

LARGE, SMALL, STRIDED = TILES = cuda_launches.GROUPED_TILES
# tile, window: every width, slabs and strips that are not whole, several tiles for each block
WINDOWS = {
    "groups of 4": (SMALL, "2x64x9x7 -> 64, 3x3 p1 g16"),
    "groups of 8, a slab and a half": (SMALL, "1x104x8x8 -> 104, 3x3 p1 g13"),
    "groups of 16": (LARGE, "1x48x17x15 -> 48, 3x3 p1 g3"),
    "groups of 32": (SMALL, "3x128x7x9 -> 128, 3x3 p1 g4"),
    "groups of 64": (SMALL, "1x128x7x7 -> 128, 3x3 p1 g2"),
    "depthwise": (LARGE, "1x40x18x5 -> 40, 3x3 p1 g40"),
    "pairs": (SMALL, "1x16x5x9 -> 16, 3x3 p1 g8"),
    "stride 2": (STRIDED, "2x64x17x13 -> 64, 3x3 s2 p1 g16"),
    "stride 2, groups of 32": (STRIDED, "1x64x16x19 -> 64, 3x3 s2 p1 g2"),
    "stride 2, depthwise": (STRIDED, "1x72x15x16 -> 72, 3x3 s2 p1 g72"),
    "no padding": (SMALL, "1x16x11x10 -> 16, 3x3 g4"),
    "more padding than the filter": (SMALL, "1x16x3x2 -> 16, 3x3 p(4, 3) g2"),
    "one pixel": (LARGE, "1x8x1x1 -> 8, 3x3 p1 g2"),
}


def problem(window: str, dtype="float16", epilogue="bn+bias+add", activation="relu") -> ConvProblem:
    return parsed_problem(f"{window} {dtype} {epilogue} {activation}", "cpu")


def run(p: ConvProblem, o: ConvOperands, tile: int, arch: int = 80, **how) -> torch.Tensor:
    """The output, of a run that reports nothing."""
    out, outcomes = cuda_launches.conv_bn_act(p, o, arch, tile, **how)
    assert [report for outcome in outcomes for report in outcome.reports] == [], tile
    assert outcomes[0].counts.mma > 0
    return out


def assert_close(p: ConvProblem, o: ConvOperands, actual: torch.Tensor, where=True) -> None:
    expected = reference.conv_bn_act(p, o)
    eps_acc = 2.0**-11 if p.dtype == torch.float32 else 2.0**-24  # TF32 products
    bound = reference.error_bound(p, o, expected=expected, eps_acc=eps_acc)
    right = (actual.double() - expected).abs() <= bound
    assert bool((right | ~torch.as_tensor(where)).all()), p


def check(p: ConvProblem, tile: int, number: int, arch: int = 80) -> None:
    """number: which landing, order and number of multiprocessors."""
    o, ways = operands_of(p), dict(landing=LANDINGS[number % 3], schedule=SCHEDULES[number % 4], seed=number)
    assert_close(p, o, run(p, o, tile, arch, num_sms=(1, 132)[number % 2], races=2, **ways))


@pytest.mark.parametrize("number", range(len(WINDOWS)), ids=list(WINDOWS))
def test_every_window(number):
    tile, window = list(WINDOWS.values())[number]
    check(problem(window), tile, number)


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_dtype_on_every_window(name, dtype, arch):
    tile, window = WINDOWS[name]
    p = problem(window, dtype)
    if p.dtype == torch.float32 and p.C // p.groups > 32:
        pytest.skip("a slab has 32 channels of fp32")
    check(p, tile, len(name) + arch, arch)


def test_the_result_does_not_depend_on_timing_or_on_who_takes_a_tile():
    """One block takes six tiles, or six blocks take one each."""
    p = problem("3x64x7x9 -> 64, 3x3 p1 g8")
    o = operands_of(p)
    ways = zip(LANDINGS, ("in_turn", "backwards", "greedy"), (1, 2, 132))
    outputs = [run(p, o, SMALL, landing=landing, schedule=schedule, num_sms=sms) for landing, schedule, sms in ways]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation):
    """Vectors of every dtype."""
    for number, epilogue in enumerate(["bn+bias+add", "bn", "bias", "add", "plain"]):
        p = problem("1x16x5x5 -> 16, 3x3 p1 g4", "float16", epilogue, activation)
        o = operands_of(p)._replace(x=operands_of(p).x * 4)  # relu6 and silu beyond their bends
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        typed = o._replace(**{name: v.to(dtype) for name in VECTORS if (v := getattr(o, name)) is not None})
        assert_close(p, typed, run(p, typed, SMALL))


@pytest.mark.parametrize("window", [
    "1x24x7x7 -> 24, 3x3 p1 g6", "1x24x7x7 -> 24, 3x3 p1 g24", "1x24x13x7 -> 24, 3x3 s2 p1 g3",
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.full)])
def test_non_finite_values_stay_in_their_group(window, dtype):
    """An mma multiplies several groups at once, and a zero times infinity is NaN."""
    p = problem(window, dtype, activation="none")
    o = operands_of(p)
    o.x[0, 3, 1, 1], o.x[0, 9, 5, 5] = math.nan, math.inf
    o.residual[0, 0, 3, 0], o.residual[0, 1, 0, 3] = math.nan, -math.inf
    expected = reference.conv_bn_act(p, o)
    bound = reference.error_bound(p, o, expected=expected, eps_acc=2.0**-11)
    assert 4 < expected.isnan().sum() < expected.numel() / 3, "the test has something to lose"
    actual = run(p, o, STRIDED if p.stride == (2, 2) else SMALL)
    assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())
    assert_close(p, o, actual, where=bound.isfinite())


@pytest.mark.parametrize("tile", TILES)
def test_x_is_read_once_and_shared_memory_without_conflicts(tile):
    p = problem(f"1x64x32x32 -> 64, 3x3{' s2' * (tile == STRIDED)} p1 g16", epilogue="bias")
    o = operands_of(p)
    _, outcomes = cuda_launches.conv_bn_act(p, o, 80, tile, num_sms=132)
    counts = outcomes[0].counts
    assert counts.shared_load_wavefronts == counts.shared_load_ideal
    pixels, least = counts.cp_async / 8, p.H * p.W
    assert pixels < {LARGE: 1.3, SMALL: 1.6, STRIDED: 1.2}[tile] * least


@pytest.mark.parametrize("elements", [1, 4])
def test_residuals_and_outputs_that_begin_anywhere(elements):
    p = problem("1x24x7x5 -> 24, 3x3 p1 g6")
    o = operands_of(p)

    def shifted(tensor):
        room = torch.full((tensor.numel() + elements,), math.nan, dtype=tensor.dtype)
        return room.as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)

    assert_close(p, o, run(p, o._replace(residual=shifted(o.residual)), SMALL))
    out = torch.full(p.output_shape, math.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    assert_close(p, o, run(p, o, SMALL, out=shifted(out)))
    for name in ("x", "weight"):
        with pytest.raises(ValueError, match="does not start at a multiple of 16 bytes"):
            run(p, o._replace(**{name: shifted(getattr(o, name))}), SMALL)


@pytest.mark.parametrize("window, dtype, why", [
    ("1x64x5x5 -> 64, 3x3 p1", "float16", "one group"),
    ("1x64x5x5 -> 64, 3x3 p1 g4", "uint8", "elements have 1 byte"),
    ("1x24x5x5 -> 24, 3x3 p1 g2", "float16", "12 channels a group, not a power of two up to 64"),
    ("1x256x5x5 -> 256, 3x3 p1 g2", "float16", "128 channels a group, not a power of two up to 64"),
    ("1x128x5x5 -> 128, 3x3 p1 g2", "float32", "64 channels a group, not a power of two up to 32"),
    ("1x16x5x5 -> 32, 3x3 p1 g4", "float16", "4 channels and 8 filters a group, which differ"),
    ("1x12x5x5 -> 12, 3x3 p1 g3", "float16", "12 channels are not a multiple of 8"),
    ("1x16x5x5 -> 16, 5x5 p2 g4", "float16", "a filter of 5x5, not 3x3"),
    ("1x16x9x9 -> 16, 3x3 s3 p1 g4", "float16", "a stride of 3x3"),
    ("1x16x9x9 -> 16, 3x3 s(1, 2) p1 g4", "float16", "a stride of 1x2"),
    ("1x16x9x9 -> 16, 3x3 s2 p1 g4", "float16", "compiled for a stride of 1"),
    ("1x16x9x9 -> 16, 3x3 p2 d2 g4", "float16", "a dilation of 2x2"),
])  # fmt: skip
def test_what_it_declines(window, dtype, why):
    p = problem(window, dtype, "bias+add" if dtype == "uint8" else "bn+bias+add")
    o = (quantized_operands if dtype == "uint8" else operands_of)(p)
    out = layout.channels_last(torch.empty(p.output_shape, dtype=p.dtype))
    with pytest.raises(ValueError, match=why):
        cuda_launches.conv_bn_act(p, o, 80, SMALL, out=out)


def test_it_does_not_split():
    p = problem("1x16x5x5 -> 16, 3x3 p1 g4")
    with pytest.raises(ValueError, match="does not split the reduction"):
        cuda_launches.conv_bn_act(p, operands_of(p), 80, SMALL, 2)


# ------------------------------------------------------------------------------------------------------------- mutants

_KERNEL = "cuda/sm80/grouped.cuh"
# what is broken -> (what it becomes, tile and window on which it shows)
_TWO_TILES = (SMALL, "2x24x9x10 -> 24, 3x3 p1 g6")
BROKEN = {
    "no wait for the tile": ("    wait_copies<1>();\n", "", _TWO_TILES),
    "others' weights": ("((channel ^ filter) & -g) == 0", "true", _TWO_TILES),
    "NaN of other groups": ("if (total == total || ", "if (true || ", _TWO_TILES),
}
MORE_BROKEN = {
    "the tile is read before it is whole": (
        "    sync_block();  // the tile is complete for everyone\n", "", _TWO_TILES,
    ),
    "the next tile overwrites this one": (
        "    sync_block();  // everyone has finished with the stage that is filled next\n", "", _TWO_TILES,
    ),
    "a channel too many": ("&& channel < s.C;", ";", _TWO_TILES),
    "a line too many": ("line >= out.lines", "line > out.lines", _TWO_TILES),
    "a column too many": ("column >= out.columns", "column > out.columns", _TWO_TILES),
    "a filter too many": ("if (channel >= s.K || column", "if (column", _TWO_TILES),
    "the taps of another filter": ("int64_t{k} * kTaps * g", "int64_t{k} * g", _TWO_TILES),
    "the second step reads the first": ("chunk + 2 * step", "chunk", (SMALL, "1x64x7x7 -> 64, 3x3 p1 g2")),
    "a group begins at the slab": ("filter / kWidth * kWidth", "0", (SMALL, "1x64x7x7 -> 64, 3x3 p1 g2")),
    "filters in another order": ("4 * (column / 2) + 2 * (i / 2)", "4 * (column / 2) + 2 * (1 - i / 2)", _TWO_TILES),
    "a strip too few": ("strip_column(strip, 0) < out.columns", "strip_column(strip, 0) + 2 < out.columns", _TWO_TILES),
    "the stride is one": (
        "strip_column(strip, from.row) * Traits::kStride", "strip_column(strip, from.row)",
        (STRIDED, "1x24x9x10 -> 24, 3x3 s2 p1 g6"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BROKEN, *(pytest.param(name, marks=pytest.mark.full) for name in MORE_BROKEN)])
def test_what_is_broken_is_seen(name, tmp_path):
    line, broken, (tile, window) = {**BROKEN, **MORE_BROKEN}[name]
    for folder in ("common", "cuda"):
        shutil.copytree(cuda_launches.CSRC / folder, tmp_path / folder)
    source = (tmp_path / _KERNEL).read_text()
    assert source.count(line) == 1
    (tmp_path / _KERNEL).write_text(source.replace(line, broken))
    assert any(is_noticed(problem(window), tmp_path, tile, landing) for landing in LANDINGS)


def is_noticed(p: ConvProblem, csrc, tile: int, landing: str) -> bool:
    o = operands_of(p)
    o.x[0, 9, 5, 5] = math.inf
    width = max(16, p.C // p.groups)
    text = cuda_launches.grouped_conv_text(p.dtype, 80, ((tile, width),), csrc)
    out, outcomes = cuda_launches.conv_bn_act(p, o, 80, tile, text=text, num_sms=1, landing=landing)
    expected = reference.conv_bn_act(p, o)
    bound = reference.error_bound(p, o, expected=expected, eps_acc=2.0**-24)
    finite = bound.isfinite()
    right = ((out.double() - expected).abs() <= bound)[finite].all() and torch.equal(out.isnan(), expected.isnan())
    return bool(outcomes[0].reports) or not bool(right)
