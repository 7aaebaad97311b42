"""Residual blocks and stages as one call, against the same modules in fp64."""

import pytest
import torch
from torch import nn

from benchmarks.cpu_check.cores import threads
from fused_resnet.kernels import compiled
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.regions.program import Region, Segment
from tests.support import networks
from tests.support.regions import add_block, call, channels_last, fastest, kernels

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

KERNELS = {name: dtype for name, dtype in kernels().items() if name in {fastest(d) for d in kernels().values()}}
BLOCKS = {
    "basic, in place": lambda: networks.single(BasicBlock, stride=1, channels=16),
    "basic, projected": lambda: networks.single(BasicBlock, stride=2, channels=40),
    "bottleneck, in place": lambda: networks.single(Bottleneck, stride=1, channels=4),
    "bottleneck, projected": lambda: networks.single(Bottleneck, stride=2, channels=9),
    "bottleneck, dilated": lambda: networks.single(Bottleneck, stride=1, channels=33, dilation=2),
    "a stage of both": lambda: nn.Sequential(
        networks.single(Bottleneck, stride=1, channels=4),
        networks.single(BasicBlock, stride=1, channels=16),
        networks.single(Bottleneck, stride=2, channels=17),
    ),
}


def in_one_call(model, x, kernel):
    region = Region(x.dtype)
    y = region.read(tuple(x.shape))
    for block in model if isinstance(model, nn.Sequential) else [model]:
        y = add_block(region, y, block)
    region.write(y)
    return call(region, [x], kernel)[0]


@pytest.mark.parametrize("shape", [(3, 16, 7, 7), (1, 16, 19, 13), (2, 16, 1, 1), (0, 16, 8, 8)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_it_is_the_modules(kernel, dtype, name, shape):
    model, x = BLOCKS[name](), channels_last(torch.randn(shape).to(dtype))
    exact = networks.in_fp64(model, x)
    with torch.no_grad():
        plain = model.to(dtype)(x)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(in_one_call(model.float(), x, kernel))
    assert torch.equal(*results) and results[0].shape == exact.shape
    if shape[0] > 0:
        assert exact.count_nonzero() > exact.numel() // 4
        assert networks.error(results[0], exact) <= networks.allowed(plain, exact)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_a_workspace_may_be_used_again(kernel, dtype):
    """One call leaves what the next may find: other numbers in every halo and every map."""
    model = BLOCKS["a stage of both"]()
    region = Region(dtype)
    y = region.read((2, 16, 9, 9))
    for block in model:
        y = add_block(region, y, block)
    region.write(y)
    compiled_region = region.compile()
    workspace = compiled_region.empty_workspace()
    images = [channels_last(torch.randn(2, 16, 9, 9).to(dtype)) for _ in range(3)]
    alone = [compiled_region([x], torch.empty_like(workspace).fill_(0xFF), kernel)[0] for x in images]
    again = [compiled_region([x], workspace, kernel)[0] for x in images]
    assert all(torch.equal(*pair) for pair in zip(alone, again)) and not torch.equal(alone[0], alone[1])


def test_maps_that_live_at_different_times_share_their_place():
    region = Region(torch.float32)
    y = region.read((1, 64, 16, 16))
    sizes = []
    for _ in range(4):
        y = add_block(region, y, networks.randomize(BasicBlock(64, 64)))
        sizes.append(region.compile().workspace_bytes)
    one_map = 64 * 4 * (18 * 17 + 1)  # 17 pixels a line, and the halo
    assert sizes == [2 * one_map] * 4


@pytest.mark.parametrize("images", [(1, 5), (2, 1), (3, 2), (5, 4)], ids=str)
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_images_by_waves_give_the_same_bytes(monkeypatch, kernel, dtype, images):
    """Some images at a time in the first blocks, another number of them after that, and the last with what is left."""
    model, x = BLOCKS["a stage of both"](), channels_last(torch.randn(5, 16, 11, 9).to(dtype))
    results = []
    for sizes in ((5, 5), images):
        monkeypatch.setattr(Region, "_images_of", lambda self, steps, sizes=sizes: sizes[steps[0].size != (11, 9)])
        results.append(in_one_call(model, x, kernel))
    assert torch.equal(*results) and results[0].count_nonzero() > results[0].numel() // 4


def test_waves_take_less_memory(monkeypatch):
    def workspace(images):
        region = Region(torch.float32)
        y = region.read((8, 64, 16, 16))
        for _ in range(3):
            y = add_block(region, y, networks.randomize(BasicBlock(64, 64)))
        region.write(y)
        monkeypatch.setattr(Region, "_images_of", lambda self, steps: images)
        return region.compile().workspace_bytes

    assert workspace(2) * 4 == workspace(8)


def test_a_wave_has_as_many_images_as_fit_the_cache(monkeypatch):
    """All of them where they fit, or where the weights are larger than the maps."""
    from fused_resnet.regions import program

    def sizes(N, C, side, cache):
        monkeypatch.setattr(program, "second_level_cache_bytes", lambda: cache)
        region = Region(torch.float32)
        y = region.read((N, C, side, side))
        y = region.convolve([Segment(y, torch.zeros(C, C, 1, 1))], None)
        region.write(y)
        with threads(1):
            return {wave.images for wave in region._waves()}

    assert sizes(8, 64, 16, 2**30) == {8}
    assert sizes(8, 64, 16, 2**18) == {1}
    assert sizes(8, 512, 2, 2**18) == {8} and sizes(7, 512, 2, 2**18) == {7}
    assert sizes(0, 64, 16, 2**18) == {1}


@pytest.mark.parametrize("kernel", [name for name in kernels() if name.endswith("fp32")])
def test_an_average_of_many_pixels_keeps_its_digits(kernel):
    """A running sum over 4,000 pixels would be wrong in the sixth."""
    region = Region(torch.float32)
    x = torch.rand(2, 33, 40, 100) + 0.5
    x[1] = 0.1  # whose roundings all go one way
    region.write(region.pool(region.read(tuple(x.shape)), "average", (40, 100), (1, 1)))
    expected = x.double().mean((2, 3), keepdim=True)
    (y,) = call(region, [channels_last(x)], kernel)
    assert ((y.double() - expected) / expected).abs().max() < 1e-6
