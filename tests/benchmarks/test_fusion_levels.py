"""Bounds of fusion levels: bytes by hand, what pays, and that a level which allows more is never slower."""

import json
import math

import pytest
import torch

from benchmarks import fusion_levels
from benchmarks.fusion_levels import H200, LEVELS, kernels_of, total

ENDLESS = H200._replace(memory=math.inf, l2=math.inf, flops=math.inf, l2_of_one_sm=math.inf)


@pytest.fixture(scope="module")
def net():
    return fusion_levels.network("resnet50", 32, torch.float16)


def test_the_network_is_the_models(net):
    assert len(net.convs) == 53 and sum(conv.problem.flops for conv in net.convs) == pytest.approx(
        32 * 8.174e9, rel=1e-3
    )
    problem = net.blocks[3]["downsample"].problem  # layer2.0
    assert (problem.C, problem.H, problem.K, problem.stride, problem.activation) == (256, 56, 512, (2, 2), "none")


def test_bytes_of_one_convolution_by_hand(net):
    expand = net.blocks[1]["conv3"]  # 64 to 256 channels at 56x56, with a residual
    kernel = fusion_levels.one_conv(expand, H200._replace(cluster=2))
    rows, columns = map(int, kernel.tile.split("x"))
    pixels, tiles = 32 * 56 * 56, -(-32 * 56 * 56 // rows) * (256 // columns)
    assert kernel.memory_bytes == 2 * (pixels * (64 + 256 + 256) + 64 * 256) and kernel.tiles == tiles
    assert kernel.l2_bytes == 2 * (tiles * (rows + columns / 2) * 64 + 2 * pixels * 256)
    assert kernel.flops == 2 * pixels * 64 * 256


def test_passes_by_hand(net):
    last, layer1 = net.blocks[0], [kernel for kernel in kernels_of(net, "unfused", H200) if "layer1.0." in kernel.name]
    assert [kernel.name.removeprefix("layer1.0.") for kernel in layer1] == [
        "conv1", "conv1 bn", "conv1 relu", "conv2", "conv2 bn", "conv2 relu",
        "downsample.0", "downsample.0 bn", "conv3", "conv3 bn", "conv3 add", "conv3 relu",
    ]  # fmt: skip
    out = last["conv3"].output_bytes
    assert [kernel.memory_bytes for kernel in layer1[-3:]] == [2 * out, 3 * out, 2 * out]


def test_a_chain_reads_its_slab_once_and_its_weights_once_a_tile(net):
    block, following = net.blocks[4], net.blocks[5]["conv1"]  # layer2: 128, 512, 128 channels at 28x28
    kernel = fusion_levels.chain(block, following, H200)
    rows = int(kernel.tile.split()[-2])
    weights, pixels = 2 * (9 * 128 * 128 + 2 * 128 * 512), 32 * 28 * 28
    moved = 2 * pixels * (512 + 512 + 128)
    assert kernel.memory_bytes == 2 * pixels * 128 + weights + moved
    assert kernel.l2_bytes == -(-pixels // rows) * (2 * 128 * (rows + 60) + weights) + moved
    assert fusion_levels.chain(net.blocks[3], net.blocks[4]["conv1"], H200) is None  # its 3x3 has a stride


@pytest.mark.parametrize("batch", (1, 256))
def test_a_level_that_allows_more_is_never_slower(batch):
    net = fusion_levels.network("resnet50", batch, torch.float16)
    times = [total(kernels_of(net, level, H200), H200) for level in LEVELS]
    assert times == sorted(times, reverse=True) and times[0] > 1.3 * times[2]


def test_every_convolution_is_in_one_kernel(net):
    """Whatever the rates: also where all ways take no time."""
    for rates in (H200, H200._replace(cluster=2), ENDLESS):
        for level in ("per-conv", "shift"):
            found = sum(kernel.flops for kernel in kernels_of(net, level, rates))
            assert found == sum(conv.problem.flops for conv in net.convs) + net.tail[-1].flops


def test_few_tiles_leave_multiprocessors_idle():
    kernel = fusion_levels.Kernel("conv", "layer4", 0, 0, 790e12, tiles=133)
    assert kernel.seconds(H200) == pytest.approx(2 * 132 / 133)
    assert kernel._replace(tiles=1, flops=0, l2_bytes=64 * 1.83e9).seconds(H200) == pytest.approx(1)


def test_a_network_without_bottlenecks_is_refused(tmp_path, capsys):
    assert fusion_levels.main(["--model", "resnet18", "--out", str(tmp_path)]) == 2
    assert "resnet18 has other blocks" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_record(tmp_path):
    assert fusion_levels.main(["--batch", "1,32", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "h200_fusion_resnet50.json").read_text())
    assert [(row["batch"], row["level"]) for row in record["rows"]] == [(n, level) for n in (1, 32) for level in LEVELS]
    assert all(row["measured_images_per_s"] is None for row in record["rows"])
    assert sum(stage["us"] for stage in record["rows"][-1]["stages"].values()) == pytest.approx(
        32e6 / record["rows"][-1]["with_l2_images_per_s"]
    )
    assert "Nothing here was measured" in (tmp_path / "h200_fusion_resnet50.md").read_text()
