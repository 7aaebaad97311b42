"""The grouped convolution's tiles without a GPU: where they come first, how many blocks there are."""

import pytest

from fused_resnet.emulation import cuda_launches

checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")

LARGE, SMALL, STRIDED = checks.GROUPED_TILES
KB = 1024
GPUS = {
    "A100": checks.DeviceLimits(108, 163 * KB, 164 * KB, 80),
    "H200": checks.DeviceLimits(132, 227 * KB, 228 * KB, 90),
    "RTX 4090": checks.DeviceLimits(128, 99 * KB, 100 * KB, 89),
}


def shape(N, C, side, groups, stride=1):
    return checks.ConvShape((N, side, side, C), (C, 3, 3, C // groups), (stride,) * 2, (1, 1), (1, 1), groups)


# ResNeXt-50's, and a depthwise one
LAYERS = {
    "layer1": shape(256, 128, 56, 32),
    "layer2, first": shape(256, 256, 56, 32, 2),
    "layer3": shape(256, 512, 14, 32),
    "layer4": shape(256, 1024, 7, 32),
    "layer4, batch 1": shape(1, 1024, 7, 32),
    "depthwise": shape(32, 144, 28, 144),
}


def test_the_emulator_knows_the_same_tiles():
    assert tuple(checks.GROUPED_TILES) == cuda_launches.GROUPED_TILES
    assert not {LARGE, SMALL, STRIDED} & {*range(checks.NUM_TILES), *checks.SM90_TILES}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_comes_before_a_block_for_each_group(name, gpu):
    found = checks.all_configs(LAYERS[name], 2, GPUS[gpu], True)
    first = {STRIDED} if "first" in name else {LARGE, SMALL}
    assert found[0][0] in first and found[0][1] == 1
    assert {tile for tile, _ in found} & set(checks.GROUPED_TILES) == first


def test_small_maps_take_small_tiles():
    assert checks.all_configs(LAYERS["layer4"], 2, GPUS["H200"], True)[0][0] == SMALL


def test_without_alignment_it_is_not_there():
    tiles = {tile for tile, _ in checks.all_configs(LAYERS["layer1"], 2, GPUS["H200"], False)}
    assert tiles and not tiles & set(checks.GROUPED_TILES)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", LAYERS)
def test_each_slab_has_as_many_blocks_and_all_run_at_a_time(name, gpu):
    tile = STRIDED if "first" in name else SMALL
    blocks, slabs, tiles, resident = checks.grouped_blocks(tile, LAYERS[name], 2, GPUS[gpu])
    num_sms = {"A100": 108, "H200": 132, "RTX 4090": 128}[gpu]
    assert blocks % slabs == 0 and blocks <= slabs * tiles
    assert blocks <= max(slabs, resident * num_sms)
    assert blocks == slabs * tiles or blocks + slabs > resident * num_sms, "no room is left"
