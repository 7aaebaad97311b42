"""csrc/ without a GPU: its index maths against formulas, and which tiles it chooses. The emulator runs its kernels."""

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

checks = pytest.importorskip(
    "fused_resnet._host_checks", reason="_host_checks is not built (it needs a C++ compiler and pybind11)"
)

TILES = range(checks.NUM_TILES)
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
