"""A stem and its pooling as one step, in bands of lines: the same bits as three steps over whole maps, and in
int8 the bytes of the reference."""

import pytest
import torch

from benchmarks.cpu_check.cores import threads
from fused_resnet.kernels import compiled
from fused_resnet.operators import quantized
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.quantized import Quantized
from fused_resnet.regions import fragment, program
from fused_resnet.regions.exact import run_reference
from fused_resnet.regions.fragment import ConvStep, Fragment, PoolStep
from fused_resnet.regions.program import Pooling, Region, Segment
from tests.support.regions import call, channels_last, int8_kernels, kernels

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

KERNELS = kernels()

# N, C, H, W, K, R, S, stride, padding, and the pooling
STEMS = (
    ((2, 3, 37, 40, 40, 7, 7, (2, 2), (3, 3)), Pooling("max", (3, 3), (2, 2), (1, 1))),  # a ResNet's
    ((3, 3, 11, 9, 16, 3, 3, (1, 1), (1, 1)), Pooling("max", (2, 2), (2, 2))),
    ((1, 40, 9, 18, 33, 3, 3, (1, 1), (1, 2)), Pooling("average", (3, 2), (1, 1), (1, 1), True)),
    ((2, 1, 14, 5, 8, 5, 2, (1, 1), (4, 0)), Pooling("average", (4, 1), (3, 2), (2, 0), False)),
    ((1, 4, 17, 6, 64, 1, 1, (4, 1), (0, 0)), Pooling("max", (1, 2), (2, 1))),  # lines that nothing reads
    ((1, 3, 5, 7, 32, 3, 3, (2, 2), (7, 1)), Pooling("max", (8, 2), (1, 1))),  # one line, from above the input on
    ((0, 3, 16, 16, 8, 7, 7, (2, 2), (3, 3)), Pooling("max", (3, 3), (2, 2), (1, 1))),
)


def operands_of(case, dtype):
    N, C, H, W, K, R, S, stride, padding = case
    x = channels_last(torch.randn(N, C, H, W).to(dtype))
    if N > 1:
        x[1, 0, 1, 2] = torch.inf  # of the second image alone
    return x, (torch.randn(K, C, R, S) / (C * R * S) ** 0.5).to(dtype), torch.randn(K), stride, padding


def in_three_steps(x, weight, bias, stride, padding, pooling, kernel):
    region = Region(weight.dtype)
    y = region.convolve([region.read_for(tuple(x.shape), weight, stride, padding)], bias, activation="relu")
    region.write(region.pool(y, *pooling[:4], count_include_pad=pooling.counts_padding))
    return call(region, [x], kernel)[0]


def in_bands(x, weight, bias, stride, padding, pooling, kernel):
    region = Region(weight.dtype)
    y = region.pooled_stem(tuple(x.shape), weight, stride, padding, bias, pooling, activation="relu")
    region.write(y)
    return call(region, [x], kernel)[0]


@pytest.mark.parametrize("case, pooling", STEMS, ids=str)
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_no_bit_differs(monkeypatch, kernel, dtype, case, pooling):
    """Whatever the lines of a band, the threads, and the images of a wave."""
    operands = operands_of(case, dtype)
    expected = in_three_steps(*operands, pooling, kernel)
    assert case[0] == 0 or expected.count_nonzero() > expected.numel() // 4
    for lines, count, images in ((1, 1, 3), (2, 1, 1), (1, 3, 2), (3, 2, 3), (100, 2, 1), (100, 1, 3)):
        monkeypatch.setattr(Region, "_lines_of_a_band", lambda *_, lines=lines: lines)
        monkeypatch.setattr(Region, "_images_of", lambda *_, images=images: images)
        with threads(count):
            actual = in_bands(*operands, pooling, kernel)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# N, C, H, W, K, R, S, stride, padding, and the maximum's window, stride and padding: with one row in a pixel, or more
STEMS_OF_BYTES = (
    ((2, 3, 37, 40, 40, 7, 7, (2, 2), (3, 3)), ((3, 3), (2, 2), (1, 1))),
    ((3, 3, 11, 9, 16, 3, 3, (1, 1), (1, 1)), ((2, 2), (2, 2), (0, 0))),
    ((1, 3, 40, 9, 16, 3, 3, (2, 2), (0, 1)), ((2, 2), (2, 2), (0, 0))),
    ((2, 1, 50, 33, 70, 5, 11, (5, 3), (2, 7)), ((2, 1), (1, 1), (0, 0))),
    ((1, 2, 40, 30, 33, 2, 16, (2, 1), (1, 0)), ((2, 1), (2, 1), (1, 0))),  # all of a block
    ((1, 4, 45, 30, 33, 1, 5, (3, 1), (0, 2)), ((2, 1), (2, 1), (1, 0))),  # rows that nothing reads
    ((1, 40, 9, 18, 33, 3, 3, (1, 1), (1, 2)), ((2, 2), (1, 1), (1, 1))),
)


@pytest.mark.parametrize("case, window", STEMS_OF_BYTES, ids=str)
@pytest.mark.parametrize("is_signed", (False, True), ids=("u8", "s8"))
def test_no_byte_differs(monkeypatch, is_signed, case, window):
    N, C, H, W, K, R, S, stride, padding = case
    x, how, out = torch.randn(N, C, H, W) * 2, Quantized(0.02, is_signed), Quantized(0.05, False)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = torch.nan, torch.inf
    weight, scales = quantized.quantized_weight(torch.randn(K, C, R, S) / (C * R * S) ** 0.5)
    epilogue = quantized.epilogue_of(how, scales, out, torch.randn(K), activation="relu")
    meta = ConvOperands(x.to("meta"), weight.float().to("meta"))
    problem = conv_problem(meta, stride, padding, (1, 1), 1, "relu")._replace(device="cpu", dtype=torch.int8)
    steps = (ConvStep(problem, 0), PoolStep("max", 1, *window, False))
    whole = Fragment((tuple(x.shape),), steps, (2,), torch.int8, (how, out, out))
    (expected,) = run_reference(whole, {0: weight}, {0: epilogue}, [x])
    assert expected.unique().numel() > 20
    packed = {0: fragment.packings(whole)[0].of([weight])}
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for is_pooled in (True, False):
        monkeypatch.setattr(fragment, "pooled_stems", lambda _, pooled=is_pooled: {0: 1} if pooled else {})
        for lines, count, images in ((1, 1, 3), (2, 3, 1), (100, 1, 2)):
            monkeypatch.setattr(Region, "_lines_of_a_band", lambda *_, lines=lines: lines)
            monkeypatch.setattr(Region, "_images_of", lambda *_, images=images: images)
            region = fragment.compile_fragment(whole, packed, {0: epilogue})
            for kernel in int8_kernels():
                with threads(count):
                    for image in (x, turned, channels_last(x)):
                        (y,) = region([image], region.empty_workspace().fill_(0xA5), kernel)
                        assert torch.equal(y, expected), (kernel, is_pooled, lines)


def test_rows_share_a_pixel_where_they_fit_a_block():
    """In int8 7x7 windows of stride 2 over three channels take four steps in place of seven."""
    for dtype, steps in ((torch.int8, 4), (torch.bfloat16, 7)):
        weight = torch.zeros(64, 3, 7, 7).to(dtype)
        assert program.packed_weights([program.rows_of_window(weight, dtype, 2)], dtype).shape[1] == steps
        assert program.rows_of_window(weight, dtype, 1).shape == (64, 21, 7, 1)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_inputs_are_converted_on_the_way(monkeypatch, kernel, dtype):
    monkeypatch.setattr(Region, "_lines_of_a_band", lambda *_: 2)
    (case, pooling), *_ = STEMS
    x, *operands = operands_of(case, dtype)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    turned = torch.randn(2, 3, 40, 37).to(other).transpose(2, 3)
    assert torch.equal(
        in_bands(turned, *operands, pooling, kernel),
        in_three_steps(channels_last(turned.to(dtype)), *operands, pooling, kernel),
    )


def test_the_maps_before_the_pooling_take_no_memory():
    region = Region(torch.float32)
    pooling = Pooling("max", (3, 3), (2, 2), (1, 1))
    region.write(region.pooled_stem((8, 3, 64, 64), torch.zeros(64, 3, 7, 7), (2, 2), (3, 3), None, pooling))
    assert region.compile().workspace_bytes == 8 * 64 * 4 * 16 * 16


def test_a_band_fits_the_cache(monkeypatch):
    """Or is as much as the weights that it reads."""

    def lines(cache, weights=0):
        monkeypatch.setattr(program, "second_level_cache_bytes", lambda: cache)
        segment = Segment(program.Map((1, 16, 64, 32)), torch.zeros(64, 16, 1, 1))
        return Region(torch.float32)._lines_of_a_band(segment, Pooling("max", (2, 2), (2, 2)), weights)

    line = 2 * 32 * 4 * (64 + 32)  # with whole panels of channels, two lines of either map
    assert [lines(8 * size) for size in (0, line - 1, line, 5 * line + 1)] == [1, 1, 1, 5]
    assert lines(0, 3 * line) == 3


def steps_of(*, residual=False, outputs=(3,), readers=1, window=2, channels=3):
    """Two inputs: a stem of the second, and what pools it."""
    x, weight = torch.empty(2, channels, 12, 12, device="meta"), torch.empty(8, channels, 3, 3, device="meta")
    added = torch.empty(2, 8, 12, 12, device="meta") if residual else None
    problem = conv_problem(ConvOperands(x, weight, residual=added), (1, 1), (1, 1), (1, 1), 1, "relu")
    problem = problem._replace(device="cpu")
    pools = tuple(PoolStep("max", 2, (window, 2), (2, 2), (0, 0), False) for _ in range(readers))
    steps = (ConvStep(problem, 1, 0 if residual else None), *pools)
    shapes = ((2, 8, 12, 12), (2, channels, 12, 12))
    return Fragment(shapes, steps, outputs, torch.float32)


def test_which_stems_are_pooled_in_bands():
    """Those whose result only one pooling reads, by windows of few lines, and whose weights are small."""
    assert fragment.pooled_stems(steps_of()) == {0: 1}
    assert fragment.pooled_stems(steps_of(outputs=(2, 3))) == {}
    assert fragment.pooled_stems(steps_of(residual=True)) == {}
    assert fragment.pooled_stems(steps_of(readers=2, outputs=(3, 4))) == {}
    assert fragment.pooled_stems(steps_of(window=3)) == {0: 1} and fragment.pooled_stems(steps_of(window=4)) == {}
    assert fragment.pooled_stems(steps_of(channels=16)) == {0: 1} and fragment.pooled_stems(steps_of(channels=17)) == {}


def test_the_other_inputs_keep_their_order(monkeypatch):
    monkeypatch.setattr(Region, "_lines_of_a_band", lambda *_: 1)
    whole = steps_of()
    pool = PoolStep("average", 0, (2, 2), (2, 2), (0, 0), False)
    whole = whole._replace(steps=(*whole.steps, pool), outputs=(3, 4))
    weight, bias = torch.randn(8, 3, 3, 3), torch.randn(8)
    region = fragment.compile_fragment(whole, {0: fragment.packings(whole)[0].of([weight])}, {0: bias})
    inputs = [channels_last(torch.randn(shape)) for shape in whole.shapes]
    pooled, average = region(inputs, region.empty_workspace())
    expected = torch.max_pool2d(torch.relu(torch.conv2d(inputs[1], weight, bias, padding=1)), 2)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(average, torch.nn.functional.avg_pool2d(inputs[0], 2))
