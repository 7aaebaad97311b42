"""sm_90a's tiles without a GPU: what they take of a multiprocessor, who computes which, what is declined."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_resnet.emulation import cuda_launches

checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")

TILES = checks.SM90_TILES
KB = 1024
H200 = checks.DeviceLimits(132, 227 * KB, 228 * KB, 90)
OTHERS = {
    80: checks.DeviceLimits(108, 163 * KB, 164 * KB, 80),
    100: checks.DeviceLimits(148, 227 * KB, 228 * KB, 100),
    120: checks.DeviceLimits(170, 99 * KB, 100 * KB, 120),
}


def shape(N, C, H, W, K, R=1, S=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return checks.ConvShape((N, H, W, C), (K, R, S, C // groups), stride, padding, dilation, groups)


def configs(problem, gpu=H200, element_bytes=2, is_aligned=True):
    return checks.all_configs(problem, element_bytes, gpu, is_aligned)


def test_the_emulator_knows_the_same_tiles():
    assert tuple(TILES) == cuda_launches.SM90_TILES and TILES[0] == cuda_launches.FIRST_SM90_TILE
    assert not set(TILES) & set(range(checks.NUM_TILES))


@pytest.mark.parametrize("tile", TILES)
def test_as_many_blocks_as_a_tile_counts_on_fit_a_multiprocessor(tile):
    t = checks.sm90_tile(tile)
    assert t["resident_blocks"] * (t["smem_bytes"] + KB) <= 228 * KB
    consumers = t["block_m"] // 64
    assert t["threads"] == 128 * (1 + consumers)
    # what setmaxnreg moves was given out at launch, and is counted in eights
    assert t["resident_blocks"] * t["threads"] * t["registers"] <= 65536
    moved = t["producer_registers"] + consumers * t["consumer_registers"]
    assert moved <= t["registers"] * (1 + consumers)
    for registers in (t["registers"], t["producer_registers"], t["consumer_registers"]):
        assert registers % 8 == 0 and 24 <= registers <= 256
    assert t["consumer_registers"] >= t["block_n"] // 2 + 32, "sums, and some to work with"


@given(st.integers(1, 70), st.integers(1, 9))
def test_every_tile_is_taken_once(rows, columns):
    places = [checks.sm90_tile_place(rows, columns, index) for index in range(rows * columns)]
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]


def test_what_runs_at_a_time_reads_few_rows_and_filters():
    """132 neighbours of a grid of 1568 x 8 tiles: no more than about the square of what they compute."""
    places = [checks.sm90_tile_place(1568, 8, index) for index in range(16 * 8 * 3, 16 * 8 * 3 + 132)]
    rows, columns = {row for row, _ in places}, {column for _, column in places}
    assert len(rows) + len(columns) <= 16 + 4 + 8


LAYERS = {
    "layer1 3x3": shape(256, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    "layer1 expand": shape(256, 64, 56, 56, 256),
    "layer2 3x3": shape(256, 128, 28, 28, 128, 3, 3, padding=(1, 1)),
    "layer3 downsample": shape(256, 512, 28, 28, 1024, stride=(2, 2)),
    "layer3 3x3": shape(256, 256, 14, 14, 256, 3, 3, padding=(1, 1)),
    "layer4 3x3": shape(256, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_preferred_where_it_fits(name):
    """At batch 256. Its tiles are all there, in one part each, beside sm80's."""
    found = configs(LAYERS[name])
    assert found[0][0] in TILES
    assert sorted(config for config in found if config[0] in TILES) == [(tile, 1) for tile in TILES]
    assert {tile for tile, _ in found} == {*range(checks.NUM_TILES), *TILES}


def test_the_likeliest_tile_suits_the_problem():
    assert checks.sm90_tile(configs(LAYERS["layer1 3x3"])[0][0])["block_n"] == 64, "no wider than the filters"
    assert checks.sm90_tile(configs(LAYERS["layer3 3x3"])[0][0])["block_n"] >= 128
    tile, splits = configs(shape(1, 512, 7, 7, 512, 3, 3, padding=(1, 1)))[0]
    assert tile in range(checks.NUM_TILES) and splits > 1, "batch 1 is split over the device"


@pytest.mark.parametrize("gpu", OTHERS)
def test_other_gpus_have_none(gpu):
    assert not {tile for tile, _ in configs(LAYERS["layer3 3x3"], OTHERS[gpu])} & set(TILES)


@pytest.mark.parametrize("problem, element_bytes, is_aligned", [
    (LAYERS["layer3 3x3"], 4, True),
    (shape(1, 24, 56, 56, 64, 3, 3, padding=(1, 1)), 1, True),
    (LAYERS["layer3 3x3"], 2, False),
    (shape(1, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)), 2, True),
    (shape(1, 64, 56, 56, 64, 3, 3, padding=(1, 1), groups=32), 2, True),
    (shape(1, 8, 300, 300, 8, 1, 1, (9, 9)), 2, True),
])  # fmt: skip
def test_what_it_declines_is_left_to_sm80(problem, element_bytes, is_aligned):
    assert checks.sm90_why_not(problem, element_bytes, is_aligned)
    found = configs(problem, H200, element_bytes, is_aligned)
    assert found and not {tile for tile, _ in found} & set(TILES)


@pytest.mark.parametrize("problem, why", [
    (shape(2**31, 8, 1, 1, 8), "2147483648 rows of the output"),
    (shape(2**20, 8, 32, 32, 2**20), "the output has too many tiles"),
    (shape(1, 2**20, 1024, 1024, 8), "a stride of 2^40 bytes"),
])  # fmt: skip
def test_sizes_beyond_what_coordinates_hold(problem, why):
    assert checks.sm90_why_not(problem, 2, True) == why
