"""csrc/ without a GPU: its index maths against formulas, and its kernels' own source run thread by thread on the host.

The emulation takes the kernels as they are written and replaces only the machine: fibers for threads, ldmatrix, mma
and cp.async as the PTX ISA describes them. NaN lies in shared memory and around every buffer.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet import backends, choosing
from fused_resnet.backends import cuda
from fused_resnet.machine import devices
from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS, ConvProblem

checks = pytest.importorskip(
    "fused_resnet._host_checks", reason="_host_checks is not built (it needs a C++ compiler and pybind11)"
)

TILES = range(checks.NUM_TILES)
HALF_DTYPES = ("float16", "bfloat16")
DTYPES = (*HALF_DTYPES, "float32")
# Opt-in shared memory of a block and that of a multiprocessor, KB (CUDA C++ Programming Guide, compute capabilities).
SMEM_KB = {
    "8.0": (163, 164),
    "8.6": (99, 100),
    "8.9": (99, 100),
    "9.0": (227, 228),
    "10.0": (227, 228),
    "12.0": (99, 100),
}
BANKS = 32


def device(arch: str, num_sms: int = 108):
    per_block, per_sm = SMEM_KB[arch]
    return checks.DeviceLimits(num_sms, per_block * 1024, per_sm * 1024, int(arch.replace(".", "")))


# ---------------------------------------------------------------------------------------------------- index maths


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_fast_division(n, d):
    assert checks.fast_divide(n, d) == n // d


@pytest.mark.parametrize("d", [1, 2, 3, 7, 49, 64, 3136, 2**16 - 1, 2**30, 2**30 + 1, 2**31 - 1])
def test_fast_division_at_multiples(d):
    for multiple in {0, 1, 2, (2**31 - 1) // d}:
        for n in (multiple * d - 1, multiple * d, multiple * d + 1):
            if 0 <= n < 2**31:
                assert checks.fast_divide(n, d) == n // d


class Window(NamedTuple):
    """Shapes of one convolution, and the two letters that follow."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1

    def shape(self):
        weight = (self.K, self.R, self.S, self.C // self.groups)
        x = (self.N, self.H, self.W, self.C)
        return checks.ConvShape(x, weight, self.stride, self.padding, self.dilation, self.groups)

    def input_offset(self, m: int, k: int, group: int) -> int:
        """The element of x that row m meets at reduction index k, -1 in the padding: the definition."""
        per_group = self.C // self.groups
        n, p, q = m // (self.P * self.Q), m // self.Q % self.P, m % self.Q
        r, s, c = k // (self.S * per_group), k // per_group % self.S, k % per_group
        h = p * self.stride[0] + r * self.dilation[0] - self.padding[0]
        w = q * self.stride[1] + s * self.dilation[1] - self.padding[1]
        if n >= self.N or r >= self.R or not (0 <= h < self.H and 0 <= w < self.W):
            return -1
        return ((n * self.H + h) * self.W + w) * self.C + group * per_group + c


@st.composite
def windows(draw, most_images=3, most_pixels=9, most_channels=24):
    """Any convolution with a non-empty output, small by default."""
    pair = lambda least, most: (draw(st.integers(least, most)), draw(st.integers(least, most)))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    R, S = pair(1, 4)
    stride, padding, dilation = pair(1, 3), pair(0, 3), pair(1, 2)
    least = [max(1, d * (f - 1) + 1 - 2 * p) for d, f, p in zip(dilation, (R, S), padding)]
    H, W = (draw(st.integers(low, low + most_pixels)) for low in least)
    C = groups * draw(st.sampled_from([c for c in (1, 3, 4, 5, 8, 16, 24, 64, 72) if c <= most_channels]))
    K = groups * draw(st.sampled_from([1, 3, 4, 7, 8, 16, 17, 64, 72, 130]))
    return Window(draw(st.integers(1, most_images)), C, H, W, K, R, S, stride, padding, dilation, groups)


@given(windows(most_images=2**33, most_pixels=5000, most_channels=72), st.data())
def test_input_offset_is_the_definition(window, data):
    """Also far beyond 2^31 elements, and for rows and k past the last, where nothing may be read."""
    shape = window.shape()
    assert (shape.P, shape.Q, shape.reduction) == (window.P, window.Q, window.R * window.S * window.C // window.groups)
    assert shape.num_rows == window.N * window.P * window.Q
    group = data.draw(st.integers(0, window.groups - 1))
    last = shape.num_rows - 1
    origin = data.draw(st.integers(0, last) | st.integers(max(0, last - 300), last))
    row = data.draw(st.integers(0, 255))
    k = data.draw(st.integers(0, shape.reduction + 63))
    assert shape.input_offset(origin, row, k, group) == window.input_offset(origin + row, k, group)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(H=2**28), "height"),
        (dict(padding=(2**28, 0)), "padding"),
        (dict(R=2**27 + 1, dilation=(2, 1), padding=(2**27, 0)), "dilation"),
        (dict(H=2**16, W=2**16), "an output of 65536x65536 is too large"),
        (dict(R=2), "the output would be empty"),
        (dict(S=2, stride=(1, 2)), "the output would be empty"),
        (dict(S=3, stride=(1, 2)), "would be empty: a window of 1x3 over 1x1 pixels"),
        (dict(C=2**30, R=2, H=2), "a sum of 2x1x1073741824 products is too long"),
    ],
)
def test_what_cannot_be_indexed_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        Window(1, 8, 1, 1, 8, 1, 1)._replace(**change).shape()


def test_rows_of_huge_images_do_not_fit_32_bits():
    assert Window(1, 64, 4096, 4096, 64, 3, 3, padding=(1, 1)).shape().spans_fit(8)
    assert not Window(1, 64, 4096, 4096, 64, 3, 3, padding=(1, 1)).shape().spans_fit(1)


@given(windows(most_images=40, most_pixels=20), st.sampled_from(TILES))
def test_blocks_cover_the_output_once(window, tile):
    shape, t = window.shape(), checks.tile(tile)
    columns = window.K // window.groups
    tiles_m, tiles_n = -(-shape.num_rows // t["block_m"]), -(-columns // t["block_n"])
    blocks = tiles_m * tiles_n * window.groups
    origins = [checks.block_origin(shape, b, t["block_m"], t["block_n"]) for b in range(blocks)]
    expected = itertools.product(
        range(0, shape.num_rows, t["block_m"]), range(0, columns, t["block_n"]), range(window.groups)
    )
    assert sorted(origins) == sorted(expected)
    rows = [m for m, _, _ in origins]
    assert rows == sorted(rows), "groups that read the same lines of x run next to each other"


# ------------------------------------------------------------------------------------------ layouts, conflicts, tiles


def banks_of_chunks(positions) -> list[int]:
    return [4 * position % BANKS + word for position in positions for word in range(4)]


@pytest.mark.parametrize("source", [checks.ldmatrix_a, checks.ldmatrix_b])
@pytest.mark.parametrize("step", range(4))
def test_ldmatrix_has_no_bank_conflicts(source, step):
    """Each of the four phases reads eight chunks: all 32 banks, each once."""
    for first_row in (0, 16, 32, 112):
        for phase in range(4):
            sources = [source(lane, step) for lane in range(8 * phase, 8 * phase + 8)]
            banks = banks_of_chunks(checks.chunk_position(first_row + row, chunk) for row, chunk in sources)
            assert sorted(banks) == list(range(BANKS))


def test_copies_have_no_bank_conflicts_and_fill_the_tile():
    for first in range(0, 256, 8):
        row_chunks = [checks.copy_source(thread) for thread in range(first, first + 8)]
        assert len({row for row, _ in row_chunks}) == 1, "eight threads fetch 128 consecutive bytes"
        assert sorted(banks_of_chunks(checks.chunk_position(*rc) for rc in row_chunks)) == list(range(BANKS))
    positions = [checks.chunk_position(*checks.copy_source(thread)) for thread in range(256)]
    assert sorted(positions) == list(range(256))


def test_ldmatrix_reads_every_chunk_of_a_step():
    """A: 16 rows, B: 16 columns, both with the two chunks of the step, each by one lane."""
    for source, step in itertools.product((checks.ldmatrix_a, checks.ldmatrix_b), range(4)):
        read = sorted(source(lane, step) for lane in range(32))
        assert read == sorted(itertools.product(range(16), (2 * step, 2 * step + 1)))


def test_accumulators_cover_16_by_8_once():
    positions = [checks.accumulator_position(lane, i) for lane in range(32) for i in range(4)]
    assert sorted(positions) == list(itertools.product(range(16), range(8)))


@pytest.mark.parametrize("tile", TILES)
def test_staging_is_a_permutation_without_conflicts_on_writes(tile):
    t = checks.tile(tile)
    pitch, columns = t["staging_pitch"], t["block_n"]
    positions = [checks.staging_position(r, c, pitch) for r in range(16) for c in range(columns)]
    assert len(set(positions)) == len(positions)
    # two neighbours are written at once, 8 bytes per lane of a half warp
    assert all(first % 2 == 0 and first + 1 == second for first, second in zip(positions[::2], positions[1::2]))
    for first_column, half, high in itertools.product(range(0, columns, 8), (0, 16), (0, 2)):
        banks = []
        for lane in range(half, half + 16):
            for i in (high, high + 1):
                row, column = checks.accumulator_position(lane, i)
                banks.append(checks.staging_position(row, first_column + column, pitch) % BANKS)
        assert sorted(banks) == list(range(BANKS))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("per_thread", [4, 8])
def test_staging_has_no_conflicts_on_reads(tile, per_thread):
    """A warp reads 16 bytes a thread, eight threads at once, as the stores of fp32 and of half precision do."""
    t = checks.tile(tile)
    chunks = t["block_n"] // per_thread
    for first, quad in itertools.product(range(0, t["threads"], 8), range(0, per_thread, 4)):
        places = [(thread // chunks, thread % chunks * per_thread + quad) for thread in range(first, first + 8)]
        starts = [checks.staging_position(row, column, t["staging_pitch"]) for row, column in places]
        assert all(start % 4 == 0 for start in starts)
        assert sorted(start % BANKS for start in starts) == list(range(0, BANKS, 4))


@pytest.mark.parametrize("arch", SMEM_KB)
def test_legal_tiles_fit_the_device(arch):
    per_block = SMEM_KB[arch][0] * 1024
    for is_aligned in (True, False):
        legal = [tile for tile in TILES if checks.why_illegal(tile, device(arch), is_aligned) is None]
        assert legal, "every device can run every problem"
        for tile in legal:
            t = checks.tile(tile)
            assert t["smem_bytes"] <= per_block and t["threads"] <= 1024
            assert t["live_registers"] <= t["registers"] <= 255
            assert t["registers"] * t["threads"] * t["resident_blocks"] <= 65536
            assert is_aligned or t["any_alignment"]


def test_an_illegal_tile_names_the_hardware():
    small = checks.DeviceLimits(10, 48 * 1024, 64 * 1024, 80)
    reasons = [checks.why_illegal(tile, small, True) for tile in TILES]
    for tile, reason in zip(TILES, reasons):
        assert (reason is None) == (checks.tile(tile)["smem_bytes"] <= 48 * 1024)
        assert reason is None or "shared memory" in reason


@given(
    st.integers(1, 10**7), st.integers(1, 4096), st.integers(1, 40000), st.sampled_from([1, 2, 32, 512]),
    st.sampled_from(sorted(SMEM_KB)), st.booleans(),
)  # fmt: skip
def test_configs_are_every_legal_tile_in_every_number_of_parts(
    rows, columns, reduction_bytes, groups, arch, is_aligned
):
    configs = checks.legal_configs(rows, columns, reduction_bytes, groups, device(arch), is_aligned)
    tiles = [tile for tile in TILES if checks.why_illegal(tile, device(arch), is_aligned) is None]
    stages = -(-reduction_bytes // checks.STAGE_ROW_BYTES)  # no part is empty
    fits = [n for n in range(2, min(checks.MOST_SPLITS, stages) + 1)
            if 4 * n * rows * columns * groups <= checks.MOST_PARTIAL_BYTES]  # fmt: skip
    assert sorted(configs) == sorted(itertools.product(tiles, (1, *fits)))


def likeliest(*size, splits=None):
    """(tile, splits) of the cheapest config, or of the cheapest in so many parts."""
    return next(one for one in checks.legal_configs(*size) if splits in (None, one[1]))


def test_the_likeliest_tile_suits_the_problem():
    """ResNet-50 layers at batch 256 on 108 multiprocessors, and the narrow and small extremes."""

    def choose(rows, columns, reduction, groups=1):
        return checks.tile(likeliest(rows, columns, 2 * reduction, groups, device("8.0"), True, splits=1)[0])

    assert choose(256 * 56 * 56, 64, 576)["block_n"] == 64, "no wider than layer1's filters"
    assert choose(256 * 14 * 14, 1024, 256)["block_n"] == 128
    assert choose(256 * 56 * 56, 4, 36, groups=32)["block_n"] == 16
    few_rows = choose(49, 512, 4608)
    assert few_rows["block_m"] * few_rows["block_n"] <= 64 * 64, "smaller tiles on more multiprocessors"


def test_small_batches_are_split_over_the_device():
    """ResNet-50's 3x3 in layer4 on the 132 multiprocessors of an H200. What fills them anyway is not split."""
    gpu = device("9.0", 132)
    chosen = {batch: likeliest(batch * 49, 512, 2 * 4608, 1, gpu, True) for batch in (1, 2, 4, 8, 64, 256)}
    splits = {batch: one[1] for batch, one in chosen.items()}
    assert splits[256] == splits[64] == 1
    tile = checks.tile(chosen[1][0])
    blocks = splits[1] * -(-49 // tile["block_m"]) * -(-512 // tile["block_n"])
    assert 66 <= blocks <= 132, "half of the multiprocessors at least, and in one round"
    assert splits[1] >= splits[2] >= splits[4] > 1
    assert likeliest(49, 2048, 2 * 512, 1, gpu, True)[1] == 1, "too short to pay for a second kernel"


# (rows of an image, filters of a group, reduction, groups) -> (tile, splits) of batches 1, 8, 32 and 256 in half
# precision on an A100. So they were ranked when its rates were the only ones.
FIRST_ON_AN_A100 = {
    (3136, 64, 64, 1): ((3, 1), (1, 1), (1, 1), (1, 1)),
    (3136, 64, 576, 1): ((3, 1), (1, 1), (1, 1), (1, 1)),
    (3136, 256, 64, 1): ((1, 1), (0, 1), (0, 1), (0, 1)),
    (3136, 64, 256, 1): ((3, 1), (1, 1), (1, 1), (1, 1)),
    (784, 128, 1152, 1): ((2, 4), (1, 1), (0, 1), (0, 1)),
    (784, 128, 512, 1): ((3, 1), (1, 1), (0, 1), (0, 1)),
    (196, 256, 2304, 1): ((2, 6), (2, 1), (0, 1), (1, 1)),
    (196, 1024, 256, 1): ((2, 1), (0, 1), (0, 1), (0, 1)),
    (196, 256, 1024, 1): ((2, 6), (2, 1), (0, 1), (1, 1)),
    (49, 512, 4608, 1): ((2, 12), (1, 3), (1, 1), (0, 1)),
    (49, 2048, 512, 1): ((2, 1), (2, 1), (0, 1), (0, 1)),
    (49, 512, 2048, 1): ((2, 11), (1, 3), (1, 1), (0, 1)),
    (12544, 64, 147, 1): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (3136, 4, 36, 32): ((3, 1), (3, 1), (3, 1), (3, 1)),
    (49, 32, 288, 32): ((3, 1), (3, 1), (3, 1), (3, 1)),
}


@pytest.mark.parametrize("size", FIRST_ON_AN_A100)
def test_what_is_first_on_an_a100(size):
    rows, columns, reduction, groups = size
    gpu = device("8.0", 108)
    first = [likeliest(n * rows, columns, 2 * reduction, groups, gpu, True) for n in (1, 8, 32, 256)]
    assert tuple(first) == FIRST_ON_AN_A100[size]


# RTX 3090, RTX 4090, H200, B200, RTX 5090
GPUS = [("8.6", 82), ("8.9", 128), ("9.0", 132), ("10.0", 148), ("12.0", 170)]


def test_larger_gpus_split_small_batches_more():
    """ResNet-50's 3x3 in layer4, one image; and on twice as large ones of the same kind."""
    splits = [likeliest(49, 512, 2 * 4608, 1, device(*gpu), True)[1] for gpu in GPUS]
    assert splits == sorted(splits) and splits[0] < splits[-1]
    for arch, num_sms in GPUS:
        some, twice = (likeliest(49, 512, 2 * 4608, 1, device(arch, n), True) for n in (num_sms, 2 * num_sms))
        assert twice[1] > some[1] or twice[1] == checks.MOST_SPLITS


@pytest.mark.parametrize("arch, other", [("8.0", "10.0"), ("8.6", "8.9"), ("8.6", "12.0")])
def test_the_rates_of_a_gpu_depend_on_its_capability_alone(arch, other):
    """Those of 8.0 and 10.0 and those of 8.6, 8.9 and 12.0 are alike, with memory and multiprocessors as they are."""
    per_block, per_sm = SMEM_KB[arch]
    limits = [per_block * 1024, per_sm * 1024]
    rank = lambda capability: checks.legal_configs(  # noqa: E731
        784, 128, 2 * 1152, 1, checks.DeviceLimits(100, *limits, capability), True
    )
    assert rank(int(arch.replace(".", ""))) == rank(int(other.replace(".", "")))
    assert rank(80) != rank(86) and rank(80) != rank(90)
    assert rank(87) == rank(86) and rank(103) == rank(100) and rank(121) == rank(120), "the row before"


@pytest.mark.parametrize("arch", SMEM_KB)
def test_two_stages_come_before_three_where_only_they_leave_room_for_a_second_block(arch):
    gpu = device(arch)
    deep, shallow = 1, next(t for t in TILES if checks.tile(t) == checks.tile(1) | {
        "stages": 2, "any_alignment": False, "smem_bytes": checks.tile(t)["smem_bytes"]})  # fmt: skip
    is_small = SMEM_KB[arch][1] == 100
    assert [checks.blocks_per_sm(tile, gpu) for tile in (deep, shallow)] == [1 if is_small else 2, 2]
    for rows, columns, reduction in ((256 * 3136, 64, 576), (256 * 784, 128, 1152), (8 * 49, 512, 4608)):
        configs = checks.legal_configs(rows, columns, 2 * reduction, 1, gpu, True)
        assert (configs.index((shallow, 1)) < configs.index((deep, 1))) == is_small


@given(st.integers(1, 5000), st.integers(1, 40))
def test_splits_cover_the_reduction_once(num_stages, splits):
    ranges = [checks.stage_range(num_stages, splits, split) for split in range(splits)]
    assert list(itertools.chain(*(range(*part) for part in ranges))) == list(range(num_stages))
    lengths = [last - first for first, last in ranges]
    assert max(lengths) - min(lengths) <= 1 and max(lengths) == -(-num_stages // splits)


# ------------------------------------------------------------------------------------------- the kernels themselves


class Emulation(NamedTuple):
    """One run of the convolution kernel on the host."""

    problem: ConvProblem
    operands: ConvOperands
    actual: torch.Tensor

    def assert_close(self) -> None:
        expected = reference.conv_bn_act(self.problem, self.operands)
        eps_acc = 2.0**-11 if self.problem.dtype == torch.float32 else 2.0**-24  # TF32 products
        bound = reference.error_bound(self.problem, self.operands, expected=expected, eps_acc=eps_acc)
        error = (self.actual - expected).abs()
        worst = (error / bound).nan_to_num(math.inf).argmax()
        assert bool((error <= bound).all()), (
            f"{self.problem}: at {np.unravel_index(int(worst), error.shape)} got {self.actual.flatten()[worst]}, "
            f"wanted {expected.flatten()[worst]} within {bound.flatten()[worst]}"
        )


def random_operands(window, dtype, *, vectors="all", vector_dtype="float32", residual=True) -> ConvOperands:
    """Normal values of a size that keeps sums near 1. vectors: a name below, or which of the five are there."""
    as_dtype, of_vectors = getattr(torch, dtype), getattr(torch, vector_dtype)
    x = torch.randn(window.N, window.C, window.H, window.W).to(as_dtype)
    weight = torch.randn(window.K, window.C // window.groups, window.R, window.S)
    weight = (weight / math.sqrt(weight[0].numel())).to(as_dtype)
    present = {"all": (1, 1, 1, 1, 1), "bn": (1, 1, 1, 1, 0), "bias": (0, 0, 0, 0, 1), "none": (0, 0, 0, 0, 0)}
    keep = present[vectors] if isinstance(vectors, str) else vectors
    drawn = [torch.randn(window.K), torch.randn(window.K), torch.randn(window.K), torch.rand(window.K) + 0.1]
    drawn = [v.to(of_vectors) if kept else None for v, kept in zip((*drawn, torch.randn(window.K)), keep)]
    skip = torch.randn(window.N, window.K, window.P, window.Q).to(as_dtype) if residual else None
    return ConvOperands(x, weight, *drawn[:4], 1e-5, drawn[4], skip)


def emulate(window: Window, operands: ConvOperands, activation="relu", *, tile=1, **how) -> Emulation:
    o = operands
    channels_last = lambda t: t.float().permute(0, 2, 3, 1).contiguous().numpy()  # noqa: E731
    given_vectors = {**o.bn_vectors, "bias": o.bias}
    vectors = {name: v.float().numpy() for name, v in given_vectors.items() if v is not None}
    if vectors:
        how["vector_dtype"] = str(next(v for v in given_vectors.values() if v is not None).dtype)[6:]
    if o.residual is not None:
        vectors["residual"] = channels_last(o.residual)
    y = checks.emulate_conv_bn_act(
        channels_last(o.x), channels_last(o.weight), **vectors, eps=o.eps, stride=window.stride,
        padding=window.padding, dilation=window.dilation, groups=window.groups,
        activation=activation, dtype=str(o.x.dtype)[6:], tile=tile, **how,
    )  # fmt: skip
    problem = conv_problem(o, window.stride, window.padding, window.dilation, window.groups, activation)
    return Emulation(problem, o, torch.from_numpy(y).permute(0, 3, 1, 2).double())


def can_run(tile: int, window: Window, dtype: str, misalignment: int = 0) -> bool:
    chunk = 4 if dtype == "float32" else 8
    is_aligned = window.C // window.groups % chunk == 0 and misalignment % chunk == 0
    return is_aligned or checks.tile(tile)["any_alignment"]


def _property(window, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    misalignment = data.draw(st.sampled_from([0, 0, 1, 3, 8]))
    tile = data.draw(st.sampled_from([t for t in TILES if can_run(t, window, dtype, misalignment)]))
    operands = random_operands(
        window, dtype, vectors=data.draw(st.tuples(*[st.booleans()] * 5)),
        vector_dtype=data.draw(st.sampled_from(DTYPES)), residual=data.draw(st.booleans()),
    )  # fmt: skip
    emulate(
        window, operands, data.draw(st.sampled_from(ACTIVATIONS)), tile=tile, misalignment=misalignment,
        splits=data.draw(st.sampled_from([1, 1, 2, 3, 5])),
        copies_land_early=data.draw(st.booleans()), last_warp_first=data.draw(st.booleans()),
    ).assert_close()  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(windows(), st.data())
def test_conv_kernel_on_any_problem(window, data):
    _property(window, data)


@pytest.mark.full
@settings(max_examples=600, deadline=None)
@given(windows(most_images=5, most_pixels=14, most_channels=72), st.data())
def test_conv_kernel_on_any_problem_longer(window, data):
    _property(window, data)


# name -> window; each has something the others lack
WINDOWS = {
    "pointwise": Window(2, 64, 7, 5, 72, 1, 1),
    "3x3, 9 steps of the ring": Window(2, 64, 8, 8, 64, 3, 3, padding=(1, 1)),
    "downsample": Window(2, 32, 9, 7, 136, 1, 1, stride=(2, 2)),
    "stem": Window(1, 3, 17, 15, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
    "several row and column tiles": Window(3, 16, 12, 11, 144, 3, 3, padding=(1, 1)),
    "dilated": Window(1, 24, 9, 9, 40, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "resnext groups": Window(1, 64, 6, 6, 64, 3, 3, padding=(1, 1), groups=8),
    "resnext groups of 4 channels": Window(2, 32, 6, 6, 32, 3, 3, padding=(1, 1), groups=8),
    "depthwise": Window(1, 12, 6, 5, 12, 3, 3, padding=(1, 1), groups=12),
    "asymmetric": Window(1, 8, 9, 6, 8, 1, 4, stride=(3, 1), padding=(0, 3), dilation=(1, 2)),
    "one pixel": Window(1, 8, 1, 1, 8, 1, 1),
    "filter larger than the image": Window(2, 8, 2, 2, 9, 5, 5, padding=(2, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WINDOWS)
def test_conv_kernel(name, dtype):
    window = WINDOWS[name]
    operands = random_operands(window, dtype)
    for tile in TILES:
        if can_run(tile, window, dtype):
            emulate(window, operands, tile=tile).assert_close()


@pytest.mark.parametrize("copies_land_early", [False, True])
@pytest.mark.parametrize("last_warp_first", [False, True])
@pytest.mark.parametrize("tile, splits", [*((tile, 1) for tile in TILES), (2, 4)])
def test_conv_kernel_does_not_depend_on_timing(tile, splits, copies_land_early, last_warp_first):
    window = WINDOWS["3x3, 9 steps of the ring"]
    operands = random_operands(window, "float16")
    usual = emulate(window, operands, tile=tile, splits=splits)
    schedule = {"copies_land_early": copies_land_early, "last_warp_first": last_warp_first}
    other = emulate(window, operands, tile=tile, splits=splits, **schedule)
    assert torch.equal(usual.actual, other.actual)
    usual.assert_close()


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float16") for name in WINDOWS]
    + [(name, dtype) for name in ("3x3, 9 steps of the ring", "stem") for dtype in ("bfloat16", "float32")],
)
def test_split_sums(name, dtype):
    """Every tile in two parts, and in more parts than there are steps: the same sums in another order."""
    window = WINDOWS[name]
    operands = random_operands(window, dtype)
    steps = -(-window.shape().reduction * getattr(torch, dtype).itemsize // checks.STAGE_ROW_BYTES)
    for tile in TILES:
        if can_run(tile, window, dtype):
            for splits in (2, steps + 1):
                emulate(window, operands, tile=tile, splits=splits).assert_close()


# --------------------------------------------------------------------------------------- the backend and its configs

CUDA = backends.known("conv_bn_act")["cuda"]


@pytest.fixture
def emulated_library(monkeypatch):
    """The library's convolution, emulated, for tensors on the CPU; the (tile, splits) of each call that reached it."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine the kernel itself is tested")
    ran = []

    def kernel(*arguments):
        o, (*window, groups, activation, allow_tf32, tile, partials, out) = ConvOperands(*arguments[:9]), arguments[9:]
        assert allow_tf32
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (o.x, o.weight, o.residual, out))
        splits = 1 if partials is None else partials.shape[0]
        assert splits == 1 or (partials.shape == (splits, out.numel()) and partials.dtype == torch.float32)
        ran.append((tile, splits))
        shape = (o.x.shape[0], *o.x.shape[1:], o.weight.shape[0], *o.weight.shape[2:])
        out.copy_(emulate(Window(*shape, *map(tuple, window), groups), o, activation, tile=tile, splits=splits).actual)

    def configs(x, weight, stride, padding, dilation, groups, element_bytes, is_aligned, index):
        window = Window(*x, weight[0], *weight[2:], tuple(stride), tuple(padding), tuple(dilation), groups)
        is_aligned = is_aligned and weight[1] * element_bytes % 16 == 0
        size = (x[0] * window.P * window.Q, weight[0] // groups, window.shape().reduction * element_bytes, groups)
        pairs = checks.legal_configs(*size, device("9.0", 132), is_aligned)
        return list(itertools.chain(*pairs))

    legal_on = cuda.legal_on  # a tensor on the CPU has no index for it
    on_cpu = functools.lru_cache(lambda problem, is_aligned, index: legal_on.__wrapped__(problem, is_aligned, 0))
    monkeypatch.setattr(cuda, "legal_on", on_cpu)
    monkeypatch.setattr(devices, "allows_tf32", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda._choice.cache_clear()
    with torch.library._scoped_library("fused_resnet", "IMPL") as library:
        library.impl("cuda_conv_bn_act", kernel, "CPU")
        library.impl("cuda_conv_configs", configs, "CompositeExplicitAutograd")
        yield ran
    cuda._choice.cache_clear()


SMALL_BATCH = Window(1, 256, 6, 7, 40, 3, 3, padding=(1, 1), stride=(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_of_the_backend_is_right(emulated_library, dtype):
    """The default and what the tuner measures beside it, from operands in any layout to the operator's arguments."""
    operands = random_operands(SMALL_BATCH, dtype)
    problem = conv_problem(operands, SMALL_BATCH.stride, SMALL_BATCH.padding, SMALL_BATCH.dilation, 1, "relu")
    configs, legal = CUDA.configs.worth(problem), CUDA.configs.legal(problem)
    default = legal[0]
    assert default.splits > 1 and default not in configs
    assert set(configs) <= set(legal) and len(set(configs)) == len(configs)
    for tile in TILES:  # alone, and in as many parts as should suit it best
        best = next(config for config in legal if config.tile == tile)
        assert {config for config in (default, *configs) if config.tile == tile} == {best, (tile, 1)}
    for config in (None, *configs):
        selection = choosing.Selection(CUDA, config)
        Emulation(problem, operands, selection.run(problem, operands).double()).assert_close()
        assert emulated_library[-1] == (config or default)


@pytest.mark.parametrize("name, dtype", [(name, "float16") for name in WINDOWS])
def test_every_config_on_every_kind_of_window(emulated_library, name, dtype):
    window = WINDOWS[name]
    operands = random_operands(window, dtype)
    problem = conv_problem(operands, window.stride, window.padding, window.dilation, window.groups, "relu")
    configs = CUDA.configs.worth(problem)
    assert CUDA.configs.legal(problem)[0] not in configs
    for config in (None, *configs):
        Emulation(problem, operands, CUDA.run(problem, operands, config).double()).assert_close()


def test_where_operands_are_not_aligned_a_config_that_needs_it_gives_way(emulated_library):
    """A view into the middle of a tensor: no tile for aligned operands reads it."""
    window = WINDOWS["pointwise"]
    operands = random_operands(window, "float16")
    problem = conv_problem(operands, window.stride, window.padding, window.dilation, 1, "relu")
    rows = operands.x.permute(0, 2, 3, 1).flatten()
    shifted = torch.cat([rows.new_zeros(1), rows])[1:].view(window.N, window.H, window.W, window.C).permute(0, 3, 1, 2)
    for config in CUDA.configs.legal(problem):
        actual = CUDA.run(problem, operands._replace(x=shifted), config).double()
        Emulation(problem, operands, actual).assert_close()
        tile, _ = emulated_library[-1]
        assert checks.tile(tile)["any_alignment"]
        assert not checks.tile(config.tile)["any_alignment"] or emulated_library[-1] == config


def test_what_is_tuned_for_one_batch_is_legal_for_its_neighbours(emulated_library):
    operands = random_operands(SMALL_BATCH, "float16")
    problem = conv_problem(operands, SMALL_BATCH.stride, SMALL_BATCH.padding, SMALL_BATCH.dilation, 1, "relu")
    for batch in (2, 4, 64):
        assert set(CUDA.configs.worth(problem)) <= set(CUDA.configs.legal(problem._replace(N=batch)))


def test_activations_have_the_names_of_python():
    one = np.ones((1, 1, 1, 1), dtype=np.float32)
    with pytest.raises(RuntimeError, match=f"unknown activation gelu; known ones are {', '.join(ACTIVATIONS)}$"):
        checks.emulate_conv_bn_act(one, one, activation="gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("vectors", ["all", "bn", "bias", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_epilogue(activation, vectors, residual):
    window = Window(1, 8, 5, 5, 16, 3, 3, padding=(1, 1))
    for vector_dtype in DTYPES:
        operands = random_operands(window, "bfloat16", vectors=vectors, vector_dtype=vector_dtype, residual=residual)
        operands = operands._replace(x=operands.x * 4)  # relu6 and silu beyond their bends
        for splits in (1, 2):
            emulate(window, operands, activation, tile=2, splits=splits).assert_close()


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e12])
def test_extreme_variance_and_negative_gamma(variance):
    window = Window(1, 8, 4, 4, 8, 3, 3, padding=(1, 1))
    operands = random_operands(window, "bfloat16")
    operands = operands._replace(bn_var=torch.full((8,), variance), bn_weight=-operands.bn_weight.abs())
    emulate(window, operands, "none").assert_close()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile, splits", [(1, 1), (2, 1), (2, 3)])
def test_non_finite_values_stay_where_torch_has_them(tile, splits, dtype, activation):
    window = Window(1, 16, 7, 7, 16, 3, 3, padding=(1, 1))
    operands = random_operands(window, dtype)
    operands.x[0, 3, 1, 1] = math.nan
    operands.x[0, 5, 5, 5] = math.inf
    operands.residual[0, 0, 6, 0] = math.nan
    operands.residual[0, 1, 0, 6] = -math.inf
    run = emulate(window, operands, activation, tile=tile, splits=splits)
    expected = reference.conv_bn_act(run.problem, operands)
    assert torch.equal(run.actual.isnan(), expected.isnan())
    assert torch.equal(run.actual.isinf(), expected.isinf())
    assert expected.isnan().sum() >= 9 * 16, "the test has something to lose"
    bound = reference.error_bound(run.problem, operands, expected=expected, eps_acc=2.0**-11)
    finite = bound.isfinite()
    assert finite.sum() > 200
    assert bool(((run.actual - expected).abs() <= bound)[finite].all())


def test_an_unaligned_problem_needs_a_tile_for_it():
    window = WINDOWS["stem"]
    with pytest.raises(ValueError, match="aligned"):
        emulate(window, random_operands(window, "float16"), tile=0)


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 3e-5, -3e-5, np.nan, np.inf, -np.inf, 6e4, -6e4], dtype=np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misalignment", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 1, 0), (1, 2, 3)])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4099])
def test_add_relu_kernel(dtype, misalignment, size):
    as_dtype = getattr(torch, dtype)
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL)))
    a, b = (np.resize(pairs[:, i], size).astype(np.float32) for i in (0, 1))
    if size > len(pairs):
        a[len(pairs) :], b[len(pairs) :] = np.random.randn(2, size - len(pairs))
    typed_a, typed_b = torch.from_numpy(a).to(as_dtype), torch.from_numpy(b).to(as_dtype)
    for blocks in (1, 3):
        got = checks.emulate_add_relu(a, b, dtype, False, misalignment, blocks)
        expected = torch.relu(typed_a + typed_b).float()
        assert torch.equal(torch.from_numpy(got).nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert not np.signbit(got).any() or np.isnan(got[np.signbit(got)]).all(), "zeros are positive"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misalignment", [(0, 0, 0), (2, 2, 2), (0, 1, 0)])
def test_add_relu_backward_kernel(dtype, misalignment):
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL)))
    grad, out = torch.from_numpy(pairs[:, 0]).to(getattr(torch, dtype)), torch.from_numpy(pairs[:, 1])
    out = out.to(grad.dtype)
    got = checks.emulate_add_relu(grad.float().numpy(), out.float().numpy(), dtype, True, misalignment, 1)
    expected = torch.ops.aten.threshold_backward(grad, out, 0).float()
    assert torch.equal(torch.from_numpy(got).nan_to_num(-1.0), expected.nan_to_num(-1.0))
