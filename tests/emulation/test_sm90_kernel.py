"""csrc/cuda's convolution for sm_90a, as nvcc compiles it: every tile on every kind of window, epilogues, blocks that
take several tiles, and one line broken at a time. bf16 is in the second tier.
"""

import itertools
import math
import shutil
from pathlib import Path
from typing import Sequence, Union

import pytest
import torch

from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.emulation import cuda_launches, library
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from fused_resnet.emulation.operands import operands_of
from fused_resnet.operators import layout, quantized, reference
from fused_resnet.operators.operands import VECTORS, ConvOperands, Int8Operands
from fused_resnet.operators.problem import ACTIVATIONS, ConvProblem, parsed_problem

pytestmark = [
    pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or ""),
    pytest.mark.skipif(cuda_launches.why_not() is not None, reason=cuda_launches.why_not() or ""),
]

TILES = cuda_launches.SM90_TILES
_, SQUARE, NARROW, _, _, PAIR = TILES
# each has something the others lack; 16 rows of a warp, 64 of a warpgroup and 128 of a tile all have remainders
WINDOWS = {
    "pointwise": "2x64x7x5 -> 72, 1x1",
    "pointwise, 5 steps of the ring": "3x264x8x9 -> 136, 1x1",
    "3x3, 9 steps of the ring": "2x64x8x8 -> 64, 3x3 p1",
    "downsample": "2x32x9x7 -> 136, 1x1 s2",
    "several row and column tiles": "3x16x12x11 -> 144, 3x3 p1",
    "more rows than are taken together": "17x8x11x12 -> 72, 1x1",
    "channels of a tap end within a stage": "1x72x9x9 -> 40, 3x3 p1",
    "dilated": "1x24x9x9 -> 40, 3x3 p2 d2",
    "asymmetric": "1x8x9x6 -> 8, 1x4 s(3, 1) p(0, 3) d(1, 2)",
    "stride 8": "1x8x33x20 -> 24, 3x5 s(8, 7) p(1, 2)",
    "filters that no chunk divides": "2x16x7x5 -> 33, 3x3 p1",
    "one pixel": "1x8x1x1 -> 8, 1x1",
    "filter larger than the image": "2x8x2x2 -> 9, 5x5 p2",
    "only padding": "1x8x1x2 -> 8, 1x1 s2 p3",
}


def problem(window: str, dtype="float16", epilogue="bn+bias+add", activation="relu") -> ConvProblem:
    return parsed_problem(f"{window} {dtype} {epilogue} {activation}", "cpu")


def run(p: ConvProblem, o: Union[ConvOperands, Int8Operands], tile: int, tiles=TILES, **how) -> torch.Tensor:
    """The output, of a run that reports nothing. tiles: those compiled together."""
    text = cuda_launches.sm90_conv_text(p.dtype, tiles)
    out, outcomes = cuda_launches.conv_bn_act(p, o, 90, tile, text=text, **how)
    assert [report for outcome in outcomes for report in outcome.reports] == [], tile
    assert outcomes[0].counts.wgmma > 0
    return out


def right(p: ConvProblem, o: ConvOperands, actual: torch.Tensor) -> torch.Tensor:
    expected = reference.conv_bn_act(p, o)
    return (actual.double() - expected).abs() <= reference.error_bound(p, o, expected=expected, eps_acc=2.0**-24)


def assert_close(p: ConvProblem, o: ConvOperands, actual: torch.Tensor, where=True) -> None:
    assert bool((right(p, o, actual) | ~torch.as_tensor(where)).all()), p


def check(p: ConvProblem, tile: int, number: int, **how) -> None:
    """number: which landing, order and number of multiprocessors."""
    o, ways = operands_of(p), dict(landing=LANDINGS[number % 3], schedule=SCHEDULES[number % 4], seed=number)
    assert_close(p, o, run(p, o, tile, num_sms=(1, 2, 132)[number % 3], races=2, **ways, **how))


@pytest.mark.parametrize("number", range(len(WINDOWS)), ids=list(WINDOWS))
def test_every_window(number):
    check(problem(list(WINDOWS.values())[number]), TILES[number % len(TILES)], number // len(TILES))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_tile_on_every_window(name, dtype):
    for number, tile in enumerate(TILES):
        check(problem(WINDOWS[name], dtype), tile, number + len(name))


# Of bytes a chunk is 16 channels, and a stage 128. Between them every tile and both signs of x and of the residual.
BYTES = {
    "pointwise": "2x64x7x5 -> 80, 1x1 uint8 bias+add relu",
    "pointwise, 5 steps of the ring": "3x528x8x9 -> 144, 1x1 int8 bias+add none",
    "3x3, 9 steps of the ring": "2x128x8x8 -> 64, 3x3 p1 uint8 bias relu6",
    "downsample": "2x32x9x7 -> 272, 1x1 s2 int8 bias relu",
    "several row and column tiles": "3x16x12x11 -> 144, 3x3 p1 uint8 bias+add none",
    "channels of a tap end within a stage": "1x144x9x9 -> 48, 3x3 p1 uint8 bias+add relu",
    "filters that no chunk divides": "2x16x7x5 -> 33, 3x3 p1 int8 bias+add relu",
    "half a chunk of filters": "1x16x9x6 -> 8, 1x4 s(3, 1) p(0, 3) d(1, 2) uint8 bias+add none",
}


def check_bytes(p: ConvProblem, tile: int, number: int) -> None:
    """Exactly the contract's bytes."""
    o, ways = quantized_operands(p, number), dict(landing=LANDINGS[number % 3], schedule=SCHEDULES[number % 4])
    expected = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
    out = layout.channels_last(~expected)
    actual = run(p, o, tile, num_sms=(1, 2, 132)[number % 3], races=2, seed=number, out=out, **ways)
    assert torch.equal(actual, expected), (p, tile)


@pytest.mark.parametrize("number", range(len(BYTES)), ids=list(BYTES))
def test_bytes(number):
    check_bytes(parsed_problem(list(BYTES.values())[number], "cpu"), TILES[number % len(TILES)], number // len(TILES))


@pytest.mark.full
@pytest.mark.parametrize("name", BYTES)
def test_every_tile_on_bytes(name):
    for number, tile in enumerate(TILES):
        check_bytes(parsed_problem(BYTES[name], "cpu"), tile, number + len(name))


@pytest.mark.parametrize("tile", TILES)
def test_bytes_pass_shared_memory_without_conflicts(tile):
    p = parsed_problem("2x64x8x8 -> 256, 1x1 uint8 bias+add relu", "cpu")
    o = quantized_operands(p)
    out = layout.channels_last(torch.empty(p.output_shape, dtype=torch.uint8))
    text = cuda_launches.sm90_conv_text(p.dtype, TILES)
    _, outcomes = cuda_launches.conv_bn_act(p, o, 90, tile, text=text, out=out)
    counts = outcomes[0].counts
    assert counts.shared_load_wavefronts == counts.shared_load_ideal
    assert counts.shared_store_wavefronts == counts.shared_store_ideal
    assert counts.global_stores == 0, "tensor copies take the output"


def test_the_result_does_not_depend_on_timing_or_on_who_takes_a_tile():
    """One block takes 6 tiles of 9 steps, in a ring of three stages; or six blocks take one each."""
    p = problem(WINDOWS["several row and column tiles"])
    o = operands_of(p)
    ways = zip(LANDINGS, ("in_turn", "backwards", "greedy"), (1, 2, 132))
    outputs = [run(p, o, NARROW, landing=landing, schedule=schedule, num_sms=sms) for landing, schedule, sms in ways]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_blocks_that_share_their_filters_find_the_same():
    """Three tiles of rows are one cluster and a half: the last block has no rows."""
    p = problem("3x72x12x11 -> 144, 3x3 p1")
    o = operands_of(p)
    ways = zip(LANDINGS, ("in_turn", "backwards", "greedy"), (1, 2, 132))
    outputs = [
        run(p, o, PAIR, landing=landing, schedule=schedule, num_sms=sms, races=2) for landing, schedule, sms in ways
    ]
    assert all(torch.equal(run(p, o, SQUARE), other) for other in outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", ["bn+bias", "bn", "bias", "bn+bias+add", "bias+add", "add", "plain"])
def test_epilogue(activation, epilogue):
    """Vectors of every dtype."""
    p = problem("1x8x5x5 -> 16, 3x3 p1", "float16", epilogue, activation)
    o = operands_of(p)._replace(x=operands_of(p).x * 4)  # relu6 and silu beyond their bends
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16), len(activation)):
        typed = o._replace(**{name: v.to(dtype) for name in VECTORS if (v := getattr(o, name)) is not None})
        assert_close(p, typed, run(p, typed, TILES[number % len(TILES)]))


@pytest.mark.parametrize("tile", TILES)
def test_outputs_and_residuals_pass_shared_memory_without_conflicts(tile):
    p = problem("2x64x8x8 -> 256, 1x1")
    o = operands_of(p)
    _, outcomes = cuda_launches.conv_bn_act(p, o, 90, tile, text=cuda_launches.sm90_conv_text(p.dtype, TILES))
    counts = outcomes[0].counts
    assert counts.matrix_loads == counts.matrix_stores > 0
    assert counts.shared_load_wavefronts == counts.shared_load_ideal
    assert counts.shared_store_wavefronts == counts.shared_store_ideal
    assert counts.global_stores == counts.cp_async == 0, "tensor copies bring the residual and take the output"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values_stay_where_torch_has_them(activation):
    p = problem("1x16x7x7 -> 16, 3x3 p1", activation=activation)
    o = operands_of(p)
    o.x[0, 3, 1, 1], o.x[0, 5, 5, 5] = math.nan, math.inf
    o.residual[0, 0, 6, 0], o.residual[0, 1, 0, 6] = math.nan, -math.inf
    expected = reference.conv_bn_act(p, o)
    bound = reference.error_bound(p, o, expected=expected, eps_acc=2.0**-24)
    assert expected.isnan().sum() >= 9 * 16 and bound.isfinite().sum() > 200, "the test has something to lose"
    actual = run(p, o, NARROW)
    assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())
    assert_close(p, o, actual, where=bound.isfinite())


def test_a_weight_that_is_not_finite_stays_in_its_tap():
    """A stage has 64 channels, of which 8 exist: what lies behind them is zero, not the next tap's NaN."""
    p = problem("1x8x3x3 -> 8, 1x3 p(0, 1)", epilogue="plain", activation="none")
    o = operands_of(p)
    o.weight[3, 0, 0, 2] = math.nan
    assert torch.equal(run(p, o, NARROW).isnan(), reference.conv_bn_act(p, o).isnan())


@pytest.mark.parametrize("elements", [1, 4])
def test_residuals_and_outputs_that_begin_anywhere(elements):
    p = problem("2x64x7x5 -> 72, 3x3 p1")
    o = operands_of(p)

    def shifted(tensor):
        room = torch.full((tensor.numel() + elements,), math.nan, dtype=tensor.dtype)
        return room.as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)

    assert_close(p, o, run(p, o._replace(residual=shifted(o.residual)), SQUARE))
    out = torch.full(p.output_shape, math.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    assert_close(p, o, run(p, o, NARROW, out=shifted(out)))
    for name in ("x", "weight"):
        with pytest.raises(ValueError, match="does not start at a multiple of 16 bytes"):
            run(p, o._replace(**{name: shifted(getattr(o, name))}), NARROW)


@pytest.mark.parametrize("window, dtype, arch, why", [
    ("1x8x5x5 -> 8, 3x3 p1", "float32", 90, "elements have 4 bytes"),
    ("1x12x5x5 -> 8, 3x3 p1", "float16", 90, "12 channels are not a multiple of 8"),
    ("1x24x5x5 -> 8, 3x3 p1", "uint8", 90, "24 channels are not a multiple of 16"),
    ("1x16x5x5 -> 8, 3x3 p1 g2", "float16", 90, "2 groups"),
    ("1x8x0x9 -> 8, 1x1 p1", "float16", 90, "an input without pixels"),
    ("1x8x9x9 -> 8, 1x1 s9", "float16", 90, "a stride of 9"),
    ("1x8x9x9 -> 8, 1x1 s2147483647", "float16", 90, "a stride of 2147483647"),
    ("1x8x5x5 -> 8, 1x1 p129", "float16", 90, "a window's corner at -129"),
    ("1x8x5x5 -> 8, 1x1 p128", "float16", 90, "a window's corner at 128"),
    ("1x8x140x5 -> 8, 2x1 d130", "float16", 90, "a window's corner at -130"),
    ("1x8x300x5 -> 8, 3x1 p(128, 0) d128", "float16", 90, "a tap 256 pixels from its window's corner"),
    ("1x8x5x5 -> 8, 3x3 p1", "float16", 80, "compute capability 9.0 only"),
    ("1x8x5x5 -> 8, 3x3 p1", "float16", 100, "compute capability 9.0 only"),
])  # fmt: skip
def test_what_it_declines(window, dtype, arch, why):
    is_byte = dtype == "uint8"
    p = problem(window, dtype, "bias+add" if is_byte else "bn+bias+add")
    o = (quantized_operands if is_byte else operands_of)(p)
    out = layout.channels_last(torch.empty(p.output_shape, dtype=p.dtype))
    with pytest.raises(ValueError, match=why):
        cuda_launches.conv_bn_act(p, o, arch, NARROW, out=out)


def test_it_does_not_split():
    p = problem(WINDOWS["pointwise"])
    with pytest.raises(ValueError, match="does not split the reduction"):
        cuda_launches.conv_bn_act(p, operands_of(p), 90, NARROW, 2)


def test_the_widest_windows_that_maps_can_describe():
    """Padding, dilation and offsets at their limits."""
    for number, window in enumerate(("1x8x3x2 -> 8, 1x1 s8 p127", "1x8x300x3 -> 8, 2x1 s8 p127 d255")):
        check(problem(window), NARROW, number)


# ------------------------------------------------------------------------------------------------------------- mutants

_KERNEL, _EPILOGUE = "cuda/sm90/conv_bn_act.cuh", "cuda/sm90/epilogue.cuh"
_TMA, _WGMMA, _MAPS = "cuda/sm90/tma.cuh", "cuda/sm90/wgmma.cuh", "cuda/sm90/tensor_maps.h"
# header, what is broken, what it becomes
BROKEN = {
    "no wait for a stage's bytes": (_KERNEL, "wait_stage<Traits>(memory.full(place->stage), place->parity);", ""),
    "the other phase of empty stages": (_KERNEL, "place.parity ^ 1)", "place.parity)"),
    "the 64-byte swizzle": (_WGMMA, "uint64_t{1} << 62", "uint64_t{2} << 62"),
    "the output is not fenced for the copy": (_EPILOGUE, "fence_async_proxy();\n", ";\n"),
}
MORE_BROKEN = {
    "the other phase of full stages": (_KERNEL, "(place->stage), place->parity", "(place->stage), place->parity ^ 1"),
    "no wait for an empty stage": (_KERNEL, "wait_stage<Traits>(memory.empty(place.stage), place.parity ^ 1);", ""),
    "eight rows are 512 bytes": (_WGMMA, "1024 >> 4", "512 >> 4"),
    "two groups of products in flight": (_KERNEL, "wait_wgmma<1>", "wait_wgmma<2>"),
    "no wait for the last products": (_KERNEL, "wait_wgmma<0>();", ""),
    "no fence before the products": (_KERNEL, "fence_wgmma();", ""),
    "a stage is free while it is read": (_KERNEL, "      wait_wgmma<1>();\n", ""),
    "the last stage is never free": (_KERNEL, "  pin(sums);\n  release(memory, before, lane);", ""),
    "one arrival too few": (_KERNEL, "kConsumers * Traits::kCluster)", "kConsumers * Traits::kCluster - 1)"),
    "one arrival too many": (_KERNEL, "kConsumers * Traits::kCluster)", "kConsumers * Traits::kCluster + 1)"),
    "fewer bytes than arrive": (_KERNEL, "(full, Traits::kStageBytes)", "(full, Traits::kStageBytes - 16)"),
    "the ring's parity stays": (_KERNEL, "stage = 0, parity ^= 1;", "stage = 0;"),
    "barriers are used before they are made": (_KERNEL, "    sync_block();\n", ""),
    "no wait for the residual": (_KERNEL, "    rows.wait_residual(parity);\n", ""),
    "the residual's other phase": (_KERNEL, "rows.wait_residual(parity)", "rows.wait_residual(parity ^ 1)"),
    "the residual's phase stays": (_KERNEL, "advance(), parity ^= 1) {", "advance()) {"),
    "fewer bytes of the residual than arrive": (_EPILOGUE, "kPanels * kPanelBytes)", "kPanels * kPanelBytes - 16)"),
    "one panel of the residual too few": (
        _EPILOGUE, "panel < kPanels; ++panel) {\n        copy", "panel + 1 < kPanels; ++panel) {\n        copy",
    ),
    "the residual arrives before the last tile has left": (_EPILOGUE, "      wait_stores_read();\n", ""),
    "the block ends before its output has left": (_KERNEL, "thread == 0) wait_stores();", "thread == 0) {}"),
    "stores are in no group": (_EPILOGUE, "      commit_stores();\n", ""),
    "no barrier before the output leaves": (_EPILOGUE, "    sync_warpgroup(barrier);\n", ""),
    "no barrier behind the scales": (_KERNEL, "    sync_warpgroup(barrier);\n    rows.wait", "    rows.wait"),
    "the staged rows' other swizzle": (_EPILOGUE, "(line % kRowChunks)", "(line / 2 % kRowChunks)"),
    "a tap's row and column exchanged": (
        _KERNEL, "t * s.dilation_w, r * s.dilation_h", "r * s.dilation_h, t * s.dilation_w",
    ),
}  # fmt: skip

# of tiles whose blocks share their filters
BROKEN_CLUSTERS = {
    "the filters go to this block alone": (_KERNEL, "(1 << Traits::kCluster) - 1)", "1 << walk.rank())"),
    "all blocks bring the same filters": (_KERNEL, "tap, k + first, full", "tap, k, full"),
    "a stage is free once one block has read it": (_KERNEL, "lane < Traits::kCluster) arrive", "lane < 1) arrive"),
    "arrivals of one block are counted": (_KERNEL, "kConsumers * Traits::kCluster)", "kConsumers)"),
    "blocks do not meet before they write to each other": (_KERNEL, "    sync_cluster();\n", ""),
    "a block ends while others write to it": (_KERNEL, "1) sync_cluster();", "1) {}"),
    "the next tile is the next block's": (_KERNEL, "(num_grid_blocks()) / Traits::kCluster", "(num_grid_blocks())"),
}
# where no copy takes the output: 33 filters are no whole chunks
BROKEN_ELEMENTS = {
    "rows are written before all are staged": (_EPILOGUE, "    sync_warpgroup(barrier);\n", ""),
    "one row too many": (_EPILOGUE, "m + row < rows ?", "m + row <= rows ?"),
    "one column too many": (_EPILOGUE, "e < num_columns) to[", "e <= num_columns) to["),
}


@pytest.mark.parametrize("name", [*BROKEN, *(pytest.param(name, marks=pytest.mark.full) for name in MORE_BROKEN)])
def test_what_is_broken_is_seen(name, tmp_path):
    windows = (WINDOWS["several row and column tiles"], "1x72x9x9 -> 40, 3x2 p1 d(2, 1)")
    assert is_seen({**BROKEN, **MORE_BROKEN}[name], windows, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", BROKEN_CLUSTERS)
def test_what_is_broken_of_clusters_is_seen(name, tmp_path):
    windows = ("4x136x12x11 -> 144, 3x3 p1", "5x264x12x11 -> 264, 1x1")
    assert is_seen(BROKEN_CLUSTERS[name], windows, tmp_path, PAIR)


@pytest.mark.full
@pytest.mark.parametrize("name", BROKEN_ELEMENTS)
def test_what_is_broken_of_single_elements_is_seen(name, tmp_path):
    assert is_seen(BROKEN_ELEMENTS[name], (WINDOWS["filters that no chunk divides"],), tmp_path)


def is_seen(edit: tuple[str, str, str], windows: Sequence[str], csrc: Path, tile: int = NARROW) -> bool:
    """On any of the windows, in any landing."""
    header, line, broken = edit
    for folder in ("common", "cuda"):
        shutil.copytree(cuda_launches.CSRC / folder, csrc / folder)
    source = (csrc / header).read_text()
    assert source.count(line) == 1
    (csrc / header).write_text(source.replace(line, broken))
    ways = itertools.product(map(problem, windows), LANDINGS)
    return any(is_noticed(p, csrc, landing, tile) for p, landing in ways)


def is_noticed(p: ConvProblem, csrc: Path, landing: str, tile: int) -> bool:
    o = operands_of(p)
    text = cuda_launches.sm90_conv_text(p.dtype, (tile,), csrc)
    out, outcomes = cuda_launches.conv_bn_act(p, o, 90, tile, text=text, num_sms=1, landing=landing)
    return bool(outcomes[0].reports) or not bool(right(p, o, out).all())
