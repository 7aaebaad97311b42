"""Convolutions over blocked activations, by each micro-kernel that runs here: every element within its error bound.

Workspaces hold NaN before a call: a halo or a channel that is not written shows.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cpu_check.cores import threads
from fused_resnet.backends import winograd
from fused_resnet.kernels import compiled
from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.regions import layout
from fused_resnet.regions.program import Region, Segment
from tests.support.regions import call, channels_last, fastest, kernels

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

KERNELS = kernels()

# N, C, H, W, K, R, S, stride, padding, dilation
CASES = (
    (1, 64, 14, 14, 64, 3, 3, (1, 1), (1, 1), (1, 1)),  # in row space: rows of a tile lie in the halo
    (3, 37, 7, 7, 45, 3, 3, (1, 1), (1, 1), (1, 1)),
    (3, 70, 1, 1, 33, 1, 1, (1, 1), (0, 0), (1, 1)),
    (2, 5, 1, 1, 8, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 3, 23, 19, 40, 7, 7, (2, 2), (3, 3), (1, 1)),  # a stem
    (2, 33, 14, 15, 70, 3, 3, (2, 2), (1, 1), (1, 1)),
    (1, 40, 9, 9, 96, 1, 1, (2, 2), (0, 0), (1, 1)),
    (2, 33, 11, 6, 34, 3, 3, (1, 1), (2, 2), (2, 2)),
    (1, 17, 9, 23, 32, 3, 2, (2, 3), (2, 1), (1, 2)),
    (1, 32, 5, 40, 31, 1, 5, (1, 1), (0, 2), (1, 1)),
    (1, 8, 6, 5, 1, 6, 5, (1, 1), (0, 0), (1, 1)),  # one output
    (0, 16, 7, 7, 32, 3, 3, (1, 1), (1, 1), (1, 1)),
    # by phases
    (2, 70, 14, 13, 34, 3, 3, (2, 2), (1, 1), (1, 1)),
    (1, 35, 13, 14, 33, 1, 1, (2, 2), (0, 0), (1, 1)),
    (3, 16, 20, 9, 40, 3, 2, (3, 2), (2, 1), (1, 2)),
    (1, 33, 11, 12, 32, 3, 3, (2, 2), (3, 3), (2, 2)),
)


def draw(case, dtype):
    N, C, H, W, K, R, S, *window = case
    x = channels_last(torch.randn(N, C, H, W).to(dtype))
    weight, bias = (torch.randn(K, C, R, S) / (C * R * S) ** 0.5).to(dtype), torch.randn(K)
    return x, weight, bias, window


def problem_of(x, weight, bias, window, activation, residual=None):
    operands = ConvOperands(x, weight, bias=bias, residual=residual)
    return conv_problem(operands, *window, x.shape[1] // weight.shape[1], activation), operands


def convolve(kernel, x, weight, bias, window, activation="relu", residual=None, in_place=False):
    region = Region(x.dtype)
    read = region.read(tuple(x.shape))
    added = None if residual is None else region.read(tuple(residual.shape))
    y = region.convolve(
        [Segment(read, weight, *window, x.shape[1] // weight.shape[1])],
        bias,
        activation=activation,
        residual=added,
        in_place=in_place,
    )
    region.write(y)
    return call(region, [x] if residual is None else [x, residual], kernel)[0]


def assert_within_bound(actual, problem, operands):
    expected = reference.conv_bn_act(problem, operands)
    assert actual.shape == expected.shape and actual.is_contiguous(memory_format=torch.channels_last)
    excess = (actual.double() - expected).abs() - reference.error_bound(problem, operands, expected=expected)
    assert not actual.isnan().any() and (excess <= 0).all(), excess.max()


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_every_element_is_within_its_bound(kernel, dtype, case, activation):
    x, weight, bias, window = draw(case, dtype)
    problem, operands = problem_of(x, weight, bias, window, activation)
    y = convolve(kernel, x, weight, bias, window, activation)
    assert_within_bound(y, problem, operands)
    residual = channels_last(torch.randn(problem.output_shape).to(dtype))
    problem, operands = problem_of(x, weight, bias, window, activation, residual)
    for in_place in (False, True):
        y = convolve(kernel, x, weight, bias, window, activation, residual, in_place)
        assert_within_bound(y, problem, operands)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_silu_is_as_exact_as_its_dtype(kernel, dtype):
    """For each number by itself, two units in the last place of fp32 at most: 4e-37 is where its exponential ends."""
    points = torch.cat([torch.linspace(-100, 100, 2801), torch.randn(980) * 10 ** torch.linspace(-6, 3, 980)])
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, -1e38, 0.0, 3e38])
    x = channels_last(torch.cat([points, ends]).view(1, 1, 1, -1).to(dtype))
    y = convolve(kernel, x, torch.ones(3, 1, 1, 1).to(dtype), None, ((1, 1), (0, 0), (1, 1)), "silu")
    expected = (x.double() * x.double().sigmoid()).expand_as(y)
    error, rounding = (y.double() - expected).abs(), 0 if dtype == torch.float32 else 2.0**-8
    assert (error <= (2.0**-22 + rounding) * expected.abs() + 4e-37)[..., : len(points)].all()
    whole = F.silu(x[..., -len(ends) :].float()).to(dtype).expand(1, 3, 1, -1)
    torch.testing.assert_close(y[..., -len(ends) :], whole, rtol=0, atol=0, equal_nan=True)


def has_phases(case):
    N, C, H, W, K, R, S, *window = case
    region = Region(torch.float32)
    region.convolve([Segment(region.read((N, C, H, W)), torch.zeros(K, C, R, S), *window)], None)
    return len(region._maps) == 3


def test_small_maps_are_read_by_phases_where_the_stride_is_larger():
    assert [case for case in CASES if has_phases(case)] == [CASES[5], CASES[6], CASES[8], *CASES[-4:]]


# N, C, H, W, K, R, S, stride, padding, dilation, groups
GROUPED = (
    (1, 128, 14, 14, 128, 3, 3, (1, 1), (1, 1), (1, 1), 32),
    (2, 64, 12, 14, 64, 3, 3, (2, 2), (1, 1), (1, 1), 8),  # by phases
    (2, 256, 9, 5, 256, 3, 3, (1, 1), (1, 1), (1, 1), 4),
    (1, 120, 7, 30, 120, 3, 3, (2, 2), (1, 1), (1, 1), 5),  # of 24, which lie in two panels
    (3, 40, 6, 5, 60, 1, 1, (1, 1), (0, 0), (1, 1), 20),
    (1, 140, 5, 6, 70, 3, 2, (1, 2), (2, 1), (2, 1), 10),
    (1, 66, 4, 4, 99, 3, 3, (1, 1), (1, 1), (1, 1), 33),
)


@pytest.mark.parametrize("case", GROUPED, ids=str)
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_groups(kernel, dtype, case):
    *whole, groups = case
    x, weight, bias, window = draw(whole, dtype)
    weight = weight[:, : weight.shape[1] // groups]
    problem, operands = problem_of(x, weight, bias, window, "relu")
    assert problem.groups == groups
    plain = convolve(kernel, x, weight, bias, window)
    assert_within_bound(plain, problem, operands)
    residual = channels_last(torch.randn(problem.output_shape).to(dtype))
    problem, operands = problem_of(x, weight, bias, window, "none", residual)
    assert_within_bound(convolve(kernel, x, weight, bias, window, "none", residual), problem, operands)
    with threads(3):
        assert torch.equal(convolve(kernel, x, weight, bias, window), plain)


@pytest.mark.parametrize("dtype", [*layout.DTYPES, torch.int8], ids=str)
def test_a_panel_of_groups_reads_their_blocks_alone(dtype):
    """Where groups divide a panel, the blocks of a panel's channels; where they are larger, those of one group."""
    lanes = layout.lanes(dtype)
    for C, groups in ((128, 32), (512, 32), (256, 8), (256, 4)):
        first, count = layout.blocks_of_panels(C, C, groups, dtype)
        read = max(C // groups, layout.PANEL)
        assert count == -(-read // lanes)
        assert first == [panel * layout.PANEL // read * read // lanes for panel in range(C // layout.PANEL)]
    assert layout.blocks_of_panels(96, 48, 1, dtype) == ([0, 0, 0], -(-48 // lanes))


# N, C, H, W, K, R, S, stride, padding: of windows whose rows fit a block, two blocks, or nothing that is worth it
STEMS = (
    (2, 3, 21, 20, 40, 7, 7, (2, 2), (3, 3)),
    (1, 3, 9, 33, 16, 3, 3, (2, 2), (1, 1)),
    (3, 1, 5, 6, 8, 5, 5, (1, 1), (2, 2)),
    (1, 4, 8, 9, 33, 4, 8, (4, 3), (0, 5)),
    (2, 10, 6, 7, 32, 3, 3, (1, 2), (1, 1)),
    (1, 64, 5, 5, 32, 3, 3, (1, 1), (1, 1)),
    (0, 3, 8, 8, 8, 7, 7, (2, 2), (3, 3)),
)


@pytest.mark.parametrize("case", STEMS, ids=str)
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_stems_read_their_input_by_the_rows_of_the_window(kernel, dtype, case):
    x, weight, bias, window = draw((*case, (1, 1)), dtype)
    problem, operands = problem_of(x, weight, bias, window, "relu")
    region = Region(dtype)
    segment = region.read_for(tuple(x.shape), weight, *window[:2])
    assert (segment.weight.shape[3] == 1) == (case != STEMS[5])
    region.write(region.convolve([segment], bias, activation="relu"))
    assert_within_bound(call(region, [x], kernel)[0], problem, operands)


# N, C, H, W, K, padding
WINOGRAD = (
    (1, 32, 14, 14, 64, (1, 1)),
    (3, 64, 7, 9, 32, (0, 1)),
    (2, 32, 2, 5, 32, (2, 1)),
    (0, 32, 8, 8, 32, (1, 1)),
)


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize("case", WINOGRAD, ids=str)
@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
def test_winograd_over_blocks(dtype, case, activation):
    """The other maps of the region, and the halo that the next convolution needs, are left as they are."""
    N, C, H, W, K, padding = case
    window = ((1, 1), padding, (1, 1))
    x, weight, bias, _ = draw((N, C, H, W, K, 3, 3, *window), dtype)
    problem, operands = problem_of(x, weight, bias, window, activation)
    residual = channels_last(torch.randn(problem.output_shape).to(dtype))
    added, with_residual = problem_of(x, weight, bias, window, activation, residual)
    region, points = Region(dtype), winograd.pack(problem, weight)
    read, sums = region.read((N, C, H, W)), region.read(problem.output_shape)
    y = region.winograd(read, points, padding, bias, activation=activation)
    region.write(y)
    region.write(region.convolve([Segment(y, torch.eye(K).view(K, K, 1, 1), (1, 1), (1, 1))], None))
    region.write(region.winograd(read, points, padding, bias, activation=activation, replaced=sums))
    with threads(2):
        plain, framed, summed = call(region, [x, residual], fastest(dtype))
    for actual, p, o in ((plain, problem, operands), (summed, added, with_residual)):
        expected = reference.conv_bn_act(p, o)
        bound = reference.error_bound(p, o, expected=expected, winograd=True)
        assert ((actual.double() - expected).abs() <= bound).all()
    assert torch.equal(framed[:, :, 1:-1, 1:-1], plain) and framed.count_nonzero() == plain.count_nonzero()


def test_winograd_refuses_other_channels():
    region = Region(torch.float32)
    for C, K in ((16, 32), (32, 16), (64, 32)):
        with pytest.raises(ValueError, match=r"winograd: channels must be multiples of 32.* meets a map of"):
            region.winograd(region.read((1, C, 4, 4)), torch.zeros(36, K // 16, 32, 16), (1, 1), None)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_without_a_bias(kernel, dtype):
    x, weight, _, window = draw(CASES[0], dtype)
    problem, operands = problem_of(x, weight, None, window, "none")
    assert_within_bound(convolve(kernel, x, weight, None, window, "none"), problem, operands)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
@pytest.mark.parametrize("width", range(1, 34))
def test_maps_of_every_width(kernel, dtype, width):
    """Lines that are no whole number of tiles, and tiles that begin earlier to end with a line."""
    case = (1, 9, 2, width, 33, 1, 3, (1, 1), (0, 1), (1, 1))
    x, weight, bias, window = draw(case, dtype)
    problem, operands = problem_of(x, weight, bias, window, "relu")
    assert_within_bound(convolve(kernel, x, weight, bias, window), problem, operands)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
@pytest.mark.parametrize("case", [(3, 40, 14, 14, 100, 3, 3, (1, 1), (1, 1), (1, 1)),
                                  (1, 300, 3, 5, 600, 1, 1, (1, 1), (0, 0), (1, 1))], ids=str)  # fmt: skip
def test_threads_change_no_bit(kernel, dtype, case):
    """The first splits its pixels among threads, the second its output channels."""
    x, weight, bias, window = draw(case, dtype)
    results = []
    for count in (1, 2, 3, 16):
        with threads(count):
            results.append(convolve(kernel, x, weight, bias, window))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_nan_stays_where_its_windows_are(kernel, dtype):
    x, weight, bias, window = draw((2, 16, 12, 12, 32, 3, 3, (1, 1), (1, 1), (1, 1)), dtype)
    right = convolve(kernel, x, weight, bias, window)
    x[0, 3, 5, 5] = torch.nan
    y = convolve(kernel, x, weight, bias, window)
    assert y[0, :, 4:7, 4:7].isnan().all()
    y[0, :, 4:7, 4:7] = right[0, :, 4:7, 4:7]
    assert torch.equal(y, right)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_no_channel_beside_the_output_is_infinite(kernel, dtype):
    """Infinity times the zeros of the last panel would reach all outputs of the next convolution."""
    x = channels_last(torch.tensor([torch.inf, 1, 1, 1]).view(1, 4, 1, 1).expand(2, 4, 3, 5).to(dtype))
    first, second = -torch.ones(8, 4, 1, 1).to(dtype), torch.ones(6, 8, 1, 1).to(dtype)
    region = Region(dtype)
    y = region.convolve([Segment(region.read(tuple(x.shape)), first)], None, activation="relu")
    region.write(region.convolve([Segment(y, second)], torch.ones(6)))
    assert torch.equal(call(region, [x], kernel)[0], torch.ones(2, 6, 3, 5).to(dtype))


def test_copies_of_maps_of_two_sizes_are_refused():
    region = Region(torch.float32)
    with pytest.raises(ValueError, match=r"copy: maps of \(1, 16, 4, 4\), \(1, 16, 4, 5\) do not lie side by side"):
        region.copy([region.read((1, 16, 4, 4)), region.read((1, 16, 4, 5))])


def test_what_does_not_fit_together_is_refused():
    region, weight = Region(torch.float32), torch.randn(32, 16, 1, 1)
    x, y = region.read((1, 16, 4, 4)), region.read((1, 32, 4, 4))
    for segments, bias, options, sentence in (
        ([Segment(x, weight[:, :8])], None, {}, r"a weight of \(32, 8, 1, 1\) meets a map of 16 channels"),
        ([Segment(x, weight[:, :4], groups=2)], None, {}, r"\(32, 4, 1, 1\) of 2 groups meets a map of 16 channels"),
        ([Segment(x, weight[:31, :8], groups=2)], None, {}, r"of 2 groups meets a map"),
        ([Segment(x, weight), Segment(x, weight[:31])], None, {}, r"segments give \(1, 32, 4, 4\) and \(1, 31, 4, 4\)"),
        ([Segment(x, weight)], torch.ones(17), {}, r"a bias of \(17,\) is added to 32 channels"),
        ([Segment(x, weight)], None, dict(activation="gelu"), "none, relu, relu6, silu, not gelu"),
        ([Segment(x, weight)], None, dict(residual=x), r"a residual of \(1, 16, 4, 4\) is added to \(1, 32, 4, 4\)"),
        ([Segment(x, weight)], None, dict(in_place=True), "there must be a residual"),
        ([Segment(y, torch.randn(32, 32, 1, 1))], None, dict(residual=y, in_place=True), "that no segment reads"),
    ):
        with pytest.raises(ValueError, match=sentence):
            region.convolve(segments, bias, **options)


@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_denormals_are_flushed_inside_and_the_callers_mode_comes_back(kernel, dtype):
    tiny = torch.finfo(dtype).tiny / 2
    x = channels_last(torch.full((1, 32, 4, 4), tiny).to(dtype))
    weight = torch.full((32, 32, 1, 1), 2.0**20).to(dtype)
    assert x.max() > 0
    y = convolve(kernel, x, weight, None, ((1, 1), (0, 0), (1, 1)))
    assert (y == 0).all()
    region = Region(dtype)
    read, points = region.read((1, 32, 4, 4)), torch.full((36, 2, 32, 16), 2.0**20)
    region.write(region.winograd(read, points, (1, 1), None))
    assert (call(region, [x], kernel)[0] == 0).all()
    half = torch.tensor([torch.finfo(torch.float32).tiny]) / 2
    assert half.item() > 0 and (half * 2).item() == torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
def test_weights_lie_in_the_order_of_their_use(dtype):
    K, C, R, S = 40, 50, 2, 3
    weight = torch.randn(K, C, R, S).to(dtype)
    packed = layout.pack_weight(weight, dtype)
    lanes = layout.lanes(dtype)
    assert packed.shape == (2, -(-C // lanes) * R * S, 2, 16, lanes) and packed.is_contiguous()
    for k, c, r, s in ((0, 0, 0, 0), (39, 49, 1, 2), (17, 33, 0, 2), (31, 15, 1, 0)):
        step = (c // lanes * R + r) * S + s
        pair = lanes // 16
        found = packed[k // 32, step, k % 32 // 16, c % lanes // pair, k % 16 * pair + c % pair]
        assert found == weight[k, c, r, s]
    assert packed[1, :, 1].count_nonzero() == 0  # outputs 48 to 63
