"""Tensor copies: boxes, swizzles, im2col, stores, reductions (PTX ISA 5.5, 9.7.9.27).

What is expected comes from numpy by the formulas of the ISA's figures and of CuTe's Swizzle<B, 4, 3>.
"""

import itertools

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError, TensorMap
from tests.support.ptx import kernel_text

LANDINGS = ("late", "early", "random")
BYTES = 8192
SHARED = f".shared .align 1024 .b8 tile[{BYTES}];\n.shared .align 8 .b64 full;"
PARAMETERS = ".param .align 64 .b8 map[128], .param .u64 out"
FULL = "W:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0;\n@!%p1 bra W;\n"
FENCE = "fence.proxy.async.shared::cta;\n"
CLOSE = "@%p0 cp.async.bulk.commit_group;\n@%p0 cp.async.bulk.wait_group.read 0;\n"

BEGIN = """
ld.param.u64 %d1, [out];
mov.u64 %d0, map;
cvta.param.u64 %d0, %d0;
mov.u32 %r0, %tid.x;
mov.u32 %r1, tile;
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
"""
# Each byte of the tile is copied from or to `out` by thread 0 to 31, four bytes at a time.
LOOP = """
shl.b32 %r2, %r0, 2;
{name}:
setp.lt.u32 %p2, %r2, {count};
@!%p2 bra {name}_END;
add.u32 %r3, %r1, %r2;
cvt.u64.u32 %d2, %r2;
add.u64 %d2, %d1, %d2;
{body}
add.u32 %r2, %r2, 128;
bra {name};
{name}_END:
"""
DUMP = "ld.shared.u32 %r4, [%r3];\nst.global.u32 [%d2], %r4;"
FILL = "ld.global.u32 %r4, [%d2];\nst.shared.u32 [%r3], %r4;"


def loop(body, name, count):
    return LOOP.format(body=body, name=name, count=count)


def launch(text, arguments, writable, **options):
    kernel = Kernel(kernel_text(BEGIN + text + "\nret;", parameters=PARAMETERS, shared=SHARED))
    return kernel.run(options.pop("grid", 1), 32, arguments, writable=writable, **options)


def load_text(rank, coordinates, num_bytes, mode="tile", offsets="", wait=FULL, expect=None, place="%r1"):
    at = ", ".join(str(c) for c in coordinates)
    extra = f", {{{', '.join(str(o) for o in offsets)}}}" if offsets else ""
    copy = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.{mode}.mbarrier::complete_tx::bytes"
    return f"""
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {num_bytes if expect is None else expect};
@%p0 {copy} [{place}], [%d0, {{{at}}}], [full]{extra};
{wait}
""" + loop(DUMP, "DUMP", num_bytes)


def loaded(tensor_map, rank, coordinates, num_bytes, landing="late", **text):
    """The bytes that lie in shared memory after a load."""
    out = numpy.full(BYTES, 0xEE, numpy.uint8)
    body = load_text(rank, coordinates, num_bytes, **text)
    outcome = launch(body, [tensor_map, out], [out], landing=landing)
    assert not outcome.reports, outcome.reports
    return out[:num_bytes]


def swizzle(tile, span):
    """CuTe's Swizzle<log2(span / 16), 4, 3>, on bytes: where the byte at `at` goes."""
    at = numpy.arange(tile.size)
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    placed = numpy.empty_like(tile)
    placed[at ^ ((at >> 7 & bits) << 4)] = tile
    return placed


def box_of(tensor, start, box, fill=0):
    """A box of a tensor whose last axis is the innermost; start and box innermost first."""
    axes = [s + numpy.arange(b) for s, b in zip(start[::-1], box[::-1])]
    result = numpy.full([len(a) for a in axes], fill, tensor.dtype)
    inside = [(a >= 0) & (a < n) for a, n in zip(axes, tensor.shape)]
    result[numpy.ix_(*inside)] = tensor[numpy.ix_(*[a[i] for a, i in zip(axes, inside)])]
    return result


def numbers(*shape, dtype=numpy.float16):
    return numpy.random.default_rng(sum(shape)).integers(1, 2000, shape).astype(dtype)


def map_of(tensor, box, **options):
    return TensorMap(tensor, tensor.shape[::-1], tensor.strides[::-1][1:], box, **options)


# ---------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_swizzles(span, landing):
    row = (span or 64) // 2
    tensor = numbers(40, 72)
    for start in ((8, 3), (-5, -2), (72 - row + 3, 35)):
        expected = box_of(tensor, start, (row, 24))
        got = loaded(map_of(tensor, (row, 24), swizzle=span), 2, start, expected.nbytes, landing)
        numpy.testing.assert_array_equal(got, swizzle(expected.view(numpy.uint8).reshape(-1), span))


def test_a_swizzle_by_hand():
    """Row 1 of a 128-byte swizzle: its chunk 0 lies at chunk 1, chunk 1 at chunk 0, chunk 6 at chunk 7."""
    tensor = numpy.repeat(numpy.arange(64, dtype=numpy.uint16), 8).reshape(8, 64)  # chunk c of row r is 8 r + c
    got = loaded(map_of(tensor, (64, 8), swizzle=128), 2, (0, 0), 1024).view(numpy.uint16)[::8].reshape(8, 8)
    assert got[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert got[1].tolist() == [9, 8, 11, 10, 13, 12, 15, 14]
    assert got[7].tolist() == [63, 62, 61, 60, 59, 58, 57, 56]


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("lines", [1, 2, 7])
def test_a_tile_between_multiples_of_the_pattern(span, lines):
    """CUDA's programming guide: row y of 128 bytes has its chunk x at ((y + offset) % 8) ^ x, by lines before it."""
    tensor, begin = numbers(8 * 128 // span, span // 2), 128 * lines
    text = loop("st.shared.u32 [%r3], 0;", "ZERO", begin) + FENCE
    text += load_text(2, (0, 0), begin + 1024, expect=1024, place=f"%r1+{begin}")
    out = numpy.full(BYTES, 0xEE, numpy.uint8)
    outcome = launch(text, [map_of(tensor, tensor.shape[::-1], swizzle=span), out], [out])
    assert not outcome.reports
    chunks, found = tensor.view(numpy.uint8).reshape(8, 8, 16), out[begin : begin + 1024].reshape(8, 8, 16)
    for y, x in itertools.product(range(8), range(8)):
        numpy.testing.assert_array_equal(found[y, x ^ ((y + lines) % 8 & span // 16 - 1)], chunks[y, x])


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.float16, numpy.float32, numpy.float64])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_ranks_and_types(rank, dtype):
    inner = 16
    tensor = numbers(*(5, 4, 6, 3)[: rank - 1], inner * 3, dtype=dtype)
    box = (inner, 2, 3, 2, 2)[:rank]
    for start in ((inner, 1, 0, 1, 0)[:rank], (-3, -1, 4, 2, 4)[:rank]):
        expected = box_of(tensor, start, box)
        got = loaded(map_of(tensor, box), rank, start, expected.nbytes)
        numpy.testing.assert_array_equal(got, expected.view(numpy.uint8).reshape(-1))


def test_a_stride_of_zero_repeats():
    """As CUTLASS gives a batch of one, and what is broadcast."""
    tensor = numbers(8, 32)
    made = TensorMap(tensor, (32, 8, 3), (64, 0), (32, 8, 1))
    for image in (0, 2):
        got = loaded(made, 3, (0, 0, image), tensor.nbytes)
        numpy.testing.assert_array_equal(got, tensor.view(numpy.uint8).reshape(-1))


def test_a_map_within_a_struct():
    """Its place is where the bytes before it end."""
    tensor, out = numbers(40, 72), numpy.full(BYTES, 0xEE, numpy.uint8)
    expected = box_of(tensor, (8, 3), (32, 16))
    text = BEGIN.replace("cvta.param.u64 %d0, %d0;", "add.u64 %d0, %d0, 64;\ncvta.param.u64 %d0, %d0;")
    body = text + load_text(2, (8, 3), expected.nbytes) + "\nret;"
    kernel = Kernel(kernel_text(body, parameters=PARAMETERS.replace("map[128]", "map[256]"), shared=SHARED))
    outcome = kernel.run(1, 32, [[bytes(64), map_of(tensor, (32, 16)), bytes(64)], out], writable=[out])
    assert outcome.reports == []
    numpy.testing.assert_array_equal(out[: expected.nbytes], expected.view(numpy.uint8).reshape(-1))


def test_nan_outside():
    tensor = numbers(6, 32)
    got = loaded(map_of(tensor, (32, 8), fill="nan"), 2, (8, 2), 512).view(numpy.float16).reshape(8, 32)
    expected = box_of(tensor, (8, 2), (32, 8), fill=numpy.nan)
    numpy.testing.assert_array_equal(got, expected)


def test_element_strides_skip():
    """ceil(box / stride) elements of a dimension are loaded, stride apart; the innermost has none."""
    tensor = numbers(5, 11, 32)
    got = loaded(map_of(tensor, (16, 7, 2), element_strides=(1, 3, 1)), 3, (8, 2, 1), 16 * 3 * 2 * 2)
    expected = tensor[1:3, 2:9:3, 8:24]
    numpy.testing.assert_array_equal(got.view(numpy.float16).reshape(2, 3, 16), expected)


def test_a_box_outside_counts_in_whole():
    """The bytes that lie outside of the tensor count at the mbarrier."""
    tensor = numbers(4, 32)
    assert (loaded(map_of(tensor, (32, 8)), 2, (0, 100), 512) == 0).all()


def reports(text, tensor_map, out=None, landing="late", also=(), **options):
    out = numpy.zeros(BYTES, numpy.uint8) if out is None else out
    return launch(text, [tensor_map, out], [out, *also], landing=landing, **options).reports


def assert_reported(text, tensor_map, kind, words="", landings=LANDINGS, **options):
    for landing in landings:
        found = reports(text, tensor_map, landing=landing, **options)
        assert any(r.startswith(f"[{kind}]") and words in r for r in found), (landing, found)


def test_a_load_without_a_wait():
    tensor_map = map_of(numbers(8, 32), (32, 8))
    body = load_text(2, (0, 0), 512, wait="bar.sync 0;")
    assert_reported(body, tensor_map, "read in flight", landings=("late",))
    assert_reported(body, tensor_map, "race", landings=("early",))


def test_bytes_that_do_not_match():
    tensor_map = map_of(numbers(8, 32), (32, 8))
    assert_reported(load_text(2, (0, 4), 512, expect=256), tensor_map, "deadlock", "-256 bytes")


def test_a_misaligned_tile():
    assert_reported(load_text(2, (0, 0), 512, place="%r1+64"), map_of(numbers(8, 32), (32, 8)), "misaligned")


def test_the_map_suits_the_instruction():
    assert_reported(load_text(3, (0, 0, 0), 512), map_of(numbers(8, 32), (32, 8)), "tensor map", "dimensions")
    tiled = map_of(numbers(2, 4, 4, 32), (32, 4, 2, 1))
    assert_reported(load_text(4, (0, 0, 0, 0), 512, mode="im2col", offsets=(0, 0)), tiled, "tensor map", "im2col")
    not_a_map = load_text(2, (0, 0), 512).replace("[%d0, ", "[%d1, ")
    assert_reported(not_a_map, map_of(numbers(8, 32), (32, 8)), "tensor map")


def test_a_row_narrower_than_the_swizzle_is_refused():
    tensor_map = map_of(numbers(8, 32), (32, 8), swizzle=64)
    tensor_map.structure.swizzle = 128
    assert_reported(load_text(2, (0, 0), 512), tensor_map, "tensor map", "not understood")


def test_the_tile_before_must_have_been_read():
    """Write after read: threads read the tile, then a copy fills it again."""
    again = """
{sync}
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0, {{0, 0}}], [full];
V:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 1;
@!%p1 bra V;
"""
    tensor_map, first = map_of(numbers(8, 32), (32, 8)), load_text(2, (0, 0), 512)
    assert_reported(first + again.format(sync=""), tensor_map, "intra-warp race", "may not have been read")
    for landing in LANDINGS:
        assert not reports(first + again.format(sync="bar.sync 0;"), tensor_map, landing=landing)
    # the reads were through the generic proxy: Triton fences them too, hardware is said not to need it
    assert_reported(first + again.format(sync="bar.sync 0;"), tensor_map, "proxy", races=2)
    fenced = again.format(sync=FENCE + "bar.sync 0;")
    assert not reports(first + fenced, tensor_map, races=2)


def test_generic_writes_need_a_fence():
    tensor_map = map_of(numbers(8, 32), (32, 8))
    body = (
        loop("st.shared.u32 [%r3], %r0;", "FILL", 512)
        + "{}"
        + load_text(2, (0, 0), 512).replace("{", "{{").replace("}", "}}")
    )
    assert_reported(body.format(""), tensor_map, "proxy")
    for landing in LANDINGS:
        assert not reports(body.format(FENCE), tensor_map, landing=landing)


def test_a_tensor_that_the_kernel_itself_writes():
    tensor = numbers(8, 32)
    body = "ld.global.u64 %d6, [%d1];\n@%p0 st.global.u32 [%d6], %r0;\n{}"
    out = numpy.zeros(BYTES, numpy.uint8)
    out[:8] = numpy.frombuffer(numpy.uint64(tensor.ctypes.data).tobytes(), numpy.uint8)

    def found(fence, landing):
        text = body.replace("{}", fence) + load_text(2, (0, 0), 512)
        return reports(text, map_of(tensor, (32, 8)), out=out.copy(), landing=landing, also=(tensor,))

    for landing in LANDINGS:
        assert any(r.startswith("[proxy]") for r in found("", landing))
        assert not found("fence.proxy.async.global;\n", landing)


# --------------------------------------------------------------------------------------------------------------- im2col


def im2col(tensor, coordinates, offsets, lower, upper, pixels, channels, steps, fill=0):
    """Pixels of the bounding box, W fastest, from one image into the next; the offsets move where they are read.

    tensor: (N, [D, [H,]] W, C). Everything else innermost first, without channels where there are none.
    """
    spatial = tensor.shape[1:-1][::-1]
    c, base, n = coordinates[0], coordinates[1:-1], coordinates[-1]
    ranges = [range(low, size + high, step) for low, high, size, step in zip(lower, upper, spatial, steps)]
    places = [p[::-1] for p in itertools.product(*[list(r) for r in ranges[::-1]])]
    start = places.index(tuple(base))
    rows = []
    for k in range(start, start + pixels):
        image, place = n + k // len(places), places[k % len(places)]
        read = [p + o for p, o in zip(place, offsets)]
        row = numpy.full(channels, fill, tensor.dtype)
        if image < tensor.shape[0] and all(0 <= r < s for r, s in zip(read, spatial)):
            got = tensor[(image, *read[::-1])][c : c + channels]
            row[: len(got)] = got
        rows.append(row)
    return numpy.stack(rows)


def im2col_map(tensor, **options):
    return TensorMap.im2col(tensor, tensor.shape[::-1], tensor.strides[::-1][1:], **options)


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("span", [0, 64])
def test_im2col_of_a_3_by_3_filter(span, landing):
    """Padding 1: the bounding box is as large as the image, and each tap moves it."""
    tensor = numbers(2, 5, 7, 48)
    corners = dict(lower=(-1, -1), upper=(-1, -1), pixels=40, channels=32)
    tensor_map = im2col_map(tensor, swizzle=span, **corners)
    for s, r, start in ((0, 0, (0, -1, -1, 0)), (2, 1, (16, 2, 3, 0)), (1, 2, (32, 5, -1, 1)), (2, 2, (0, 4, 3, 1))):
        expected = im2col(tensor, start, (s, r), steps=(1, 1), **corners)
        got = loaded(tensor_map, 4, start, expected.nbytes, landing, mode="im2col", offsets=(s, r))
        numpy.testing.assert_array_equal(got, swizzle(expected.view(numpy.uint8).reshape(-1), span))


def test_im2col_by_hand():
    """One image of 2 x 2 pixels, padding 1, tap (1, 1): its pixels are read in order, then those of the next image."""
    tensor = numpy.zeros((2, 2, 2, 8), numpy.float16)
    tensor[..., 0] = numpy.arange(1, 9).reshape(2, 2, 2)
    tensor_map = im2col_map(tensor, lower=(-1, -1), upper=(-1, -1), pixels=12, channels=8)
    first = loaded(tensor_map, 4, (0, -1, -1, 0), 192, mode="im2col", offsets=(1, 1)).view(numpy.float16)[::8]
    assert first.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    # tap (0, 0) of the same: only the last pixel of each image lies inside
    corner = loaded(tensor_map, 4, (0, -1, -1, 0), 192, mode="im2col", offsets=(0, 0)).view(numpy.float16)[::8]
    assert corner.tolist() == [0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(3, 9, 16), (2, 4, 5, 16), (2, 3, 4, 3, 16)])
@pytest.mark.parametrize("step", [1, 2])
def test_im2col_of_one_to_three_dimensions(shape, step):
    tensor = numbers(*shape)
    spatial = len(shape) - 2
    corners = dict(lower=(-1,) * spatial, upper=(0,) * spatial, pixels=17, channels=16)
    steps = (1, *(step,) * spatial, 1)
    start, offsets = (0, *(-1,) * spatial, 0), (1,) * spatial
    expected = im2col(tensor, start, offsets, steps=steps[1:-1], fill=numpy.nan, **corners)
    tensor_map = im2col_map(tensor, element_strides=steps, fill="nan", **corners)
    got = loaded(tensor_map, spatial + 2, start, expected.nbytes, mode="im2col", offsets=offsets)
    numpy.testing.assert_array_equal(got.view(numpy.float16).reshape(17, 16), expected)


def test_im2col_limits():
    tensor_map = im2col_map(numbers(2, 4, 4, 16), lower=(0, 0), upper=(0, 0), pixels=16, channels=16)
    for start, offsets, words in (((0, 4, 0, 0), (0, 0), "bounding box"), ((0, 0, 0, 0), (256, 0), "8 bits")):
        assert_reported(load_text(4, start, 512, mode="im2col", offsets=offsets), tensor_map, "tensor map", words)
    assert not reports(load_text(4, (0, 3, 3, 0), 512, mode="im2col", offsets=(255, 0)), tensor_map)


# --------------------------------------------------------------------------------------------------- stores, reductions


def store_text(rank, coordinates, num_bytes, mode="tile", what="cp.async", how="", fence=FENCE, close=CLOSE):
    at = ", ".join(str(c) for c in coordinates)
    return (
        loop(FILL, "FILL", num_bytes)
        + fence
        + f"bar.sync 0;\n@%p0 {what}.bulk.tensor.{rank}d.global.shared::cta{how}.{mode}.bulk_group "
        + f"[%d0, {{{at}}}], [%r1];\n"
        + close
    )


def stored(tensor, tensor_map, tile, rank, start, landing="late", **text):
    outcome = launch(
        store_text(rank, start, tile.nbytes, **text), [tensor_map, tile], [tensor], memory={}, landing=landing
    )
    assert not outcome.reports, outcome.reports
    return tensor


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("span", [0, 128])
def test_a_store_is_clipped(span, landing):
    tile = numbers(8, 64)
    for start in ((8, 2), (48, 7)):
        tensor = numpy.zeros((12, 80), numpy.float16)
        placed = swizzle(tile.view(numpy.uint8).reshape(-1), span).view(numpy.float16)
        stored(tensor, map_of(tensor, (64, 8), swizzle=span), placed, 2, start, landing)
        expected = numpy.zeros((20, 144), numpy.float16)
        expected[start[1] : start[1] + 8, start[0] : start[0] + 64] = tile
        numpy.testing.assert_array_equal(tensor, expected[:12, :80])


@pytest.mark.parametrize("landing", LANDINGS)
def test_all_lanes_may_issue_one_store(landing):
    """As a warp does in CUTLASS's epilogues. By the text each lane's copy is its own, and two write one place."""
    tensor, tile = numpy.zeros((12, 80), numpy.float16), numbers(8, 16)
    text = store_text(2, (8, 2), tile.nbytes).replace("@%p0 cp.async", "cp.async")
    reports = [launch(text, [map_of(tensor, (16, 8)), tile], [tensor], memory={}, landing=landing, races=races).reports
               for races in (1, 2)]  # fmt: skip
    assert reports[0] == [] and "which a bulk copy is writing" in reports[1][0]
    numpy.testing.assert_array_equal(tensor[2:10, 8:24], tile)


def test_a_store_of_im2col_pixels():
    tensor = numpy.zeros((2, 3, 4, 16), numpy.float16)
    tile = numbers(16, 16)
    tensor_map = im2col_map(tensor, lower=(0, 0), upper=(0, 0), pixels=16, channels=16)
    stored(tensor, tensor_map, tile, 4, (0, 1, 2, 0), mode="im2col_no_offs")
    expected = numpy.zeros((24, 16), numpy.float16)
    expected[9:24] = tile[:15]
    numpy.testing.assert_array_equal(tensor.reshape(24, 16), expected)


def test_a_reduction_into_a_tensor():
    for landing in LANDINGS:
        tensor, tile = numbers(12, 80, dtype=numpy.float32), numbers(8, 16, dtype=numpy.float32)
        before = tensor.copy()
        stored(tensor, map_of(tensor, (16, 8)), tile, 2, (72, 6), landing, what="cp.reduce.async", how=".add")
        before[6:12, 72:80] += tile[:6, :8]
        numpy.testing.assert_array_equal(tensor, before)


def test_an_im2col_box_of_a_store_stays_inside():
    """9.7.9.27.1.1: its lower corner is not negative, its upper one not positive; a load's may be."""
    tensor, tile = numpy.zeros((2, 3, 4, 16), numpy.float16), numbers(8, 16)
    text = store_text(4, (0, 1, 1, 0), 256, mode="im2col_no_offs")
    for lower, upper, is_legal in (((0, 0), (0, 0), True), ((-1, 0), (0, 0), False), ((0, 0), (0, 1), False)):
        tensor_map = im2col_map(tensor, lower=lower, upper=upper, pixels=8, channels=16)
        found = reports(text, tensor_map, out=tile, also=(tensor,))
        assert [r for r in found if "bounding box" in r and r.startswith("[tensor map]")] if not is_legal else not found
        assert not reports(load_text(4, (0, 1, 1, 0), 256, mode="im2col", offsets=(0, 0)), tensor_map)


@pytest.mark.parametrize(
    "op, dtype, is_legal",
    [
        ("add", numpy.float32, True), ("add", numpy.float16, True), ("add", numpy.uint64, True),
        ("add", numpy.float64, False), ("add", numpy.int64, False), ("add", numpy.int16, False),
        ("min", numpy.int64, True), ("max", numpy.float16, True), ("max", numpy.float32, False),
        ("inc", numpy.uint32, True), ("dec", numpy.int32, False),
        ("xor", numpy.int32, True), ("and", numpy.uint64, True), ("or", numpy.float32, False),
        ("and", numpy.uint16, False),
    ],
)  # fmt: skip
def test_the_table_of_reductions(op, dtype, is_legal):
    """9.7.9.27.1.3: which operation there is for which type of the tensor."""
    inner = 32 // numpy.dtype(dtype).itemsize
    tensor, tile = numbers(4, inner, dtype=dtype), numbers(2, inner, dtype=dtype)
    text = store_text(2, (0, 0), tile.nbytes, what="cp.reduce.async", how=f".{op}")
    found = reports(text, map_of(tensor, (inner, 2)), out=tile, also=(tensor,))
    assert not found if is_legal else any(r.startswith("[tensor map]") and "no such reduction" in r for r in found)


def test_stores_report():
    tensor, tile = numpy.zeros((12, 64), numpy.float16), numbers(8, 64)
    tensor_map = map_of(tensor, (64, 8))

    def assert_fault(kind, words="", start=(0, 0), options=None, **text):
        found = reports(store_text(2, start, 1024, **text), tensor_map, out=tile, also=(tensor,), **(options or {}))
        assert any(r.startswith(f"[{kind}]") and words in r for r in found), found

    for landing in LANDINGS:
        mode = {"landing": landing}
        assert not reports(store_text(2, (0, 0), 1024), tensor_map, out=tile, also=(tensor,), **mode)
        assert_fault("proxy", fence="", options=mode)
        assert_fault("exit", close="", options=mode)
        assert_fault("tensor map", "negative", start=(-1, 0), options=mode)
        late = "@%p0 cp.async.bulk.commit_group;\n@%p0 st.shared.u32 [tile], %r0;\n" + CLOSE
        assert_fault("overwritten in flight", close=late, options=mode)
    read_only = launch(store_text(2, (0, 0), 1024), [tensor_map, tile], [tile])
    assert any(r.startswith("[read-only]") for r in read_only.reports)


def test_two_blocks_store_to_one_place():
    tensor, tile = numpy.zeros((12, 64), numpy.float16), numbers(8, 64)
    text = "mov.u32 %r9, %ctaid.x;\nadd.u32 %r9, %r9, {};\n"
    moved = store_text(2, (0, "%r9"), 1024)
    found = reports(text.format(0) + moved, map_of(tensor, (64, 8)), out=tile, also=(tensor,), grid=2)
    assert any(r.startswith("[global race]") for r in found)
    apart = text.replace("add.u32 %r9, %r9, {}", "shl.b32 %r9, %r9, 3")
    assert not reports(apart + moved, map_of(tensor, (64, 8)), out=tile, also=(tensor,), grid=2)


def test_a_prefetch_changes_nothing():
    tensor = numbers(8, 32)
    prefetch = "@%p0 cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%d0, {0, 0}];\n"
    assert not reports(prefetch + load_text(2, (0, 0), 512), map_of(tensor, (32, 8)))
    assert_reported(prefetch.replace("2d", "1d").replace(", 0}", "}"), map_of(tensor, (32, 8)), "tensor map")
    outside = prefetch.replace("{0, 0}", "{-4, -2}")  # as a load's, and unlike a store's
    assert not reports(outside + load_text(2, (-4, -2), 512), map_of(tensor, (32, 8)))


def test_multicast():
    """Each block of a pair loads half of the rows, into both."""
    body = """
mov.u32 %r10, %cluster_ctarank;
mov.u32 %r12, %ctaid.x;
mul.wide.u32 %d5, %r12, 1024;
add.u64 %d1, %d1, %d5;
shl.b32 %r11, %r10, 3;
mad.lo.u32 %r6, %r10, 512, %r1;
mov.u16 %h0, {ranks};
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 1024;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r7, full;
@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster \
[%r6], [%d0, {{0, %r11}}], [%r7], %h0;
"""
    after = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    tensor = numbers(16, 32)
    for landing in LANDINGS:
        out = numpy.zeros(2048, numpy.uint8)
        text = body.format(ranks=3) + FULL + loop(DUMP, "DUMP", 1024) + after
        outcome = launch(text, [map_of(tensor, (32, 8)), out], [out], grid=2, cluster=2, landing=landing)
        assert not outcome.reports, outcome.reports
        numpy.testing.assert_array_equal(out.view(numpy.float16).reshape(2, 16, 32), numpy.stack([tensor, tensor]))
    text = body.format(ranks=1) + FULL + after
    assert_reported(text, map_of(tensor, (32, 8)), "deadlock", grid=2, cluster=2)


def test_a_destination_in_shared_cta_is_the_block_s_own():
    """By .shared::cluster a block fills the other's tile, and by .shared::cta it must not."""
    body = """
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r10, %cluster_ctarank;
xor.b32 %r10, %r10, 1;
mapa.shared::cluster.u32 %r6, %r1, %r10;
mov.u32 %r7, full;
mapa.shared::cluster.u32 %r8, %r7, %r10;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
@%p0 cp.async.bulk.tensor.2d.SPACE.global.tile.mbarrier::complete_tx::bytes [%r6], [%d0, {0, 0}], [%r8];
"""
    after = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    tensor_map = map_of(numbers(8, 32), (32, 8))
    text = body + FULL + after
    assert not reports(text.replace("SPACE", "shared::cluster"), tensor_map, grid=2, cluster=2)
    other = text.replace("SPACE", "shared::cta")
    assert_reported(other, tensor_map, "out of bounds", "another block", grid=2, cluster=2)


LOAD = "cp.async.bulk.tensor.{}.shared::cluster.global.{}mbarrier::complete_tx::bytes [%r1], [%d0, {{{}}}], [full]{};"


@pytest.mark.parametrize(
    "line",
    [
        LOAD.format("2d", "im2col.", "0, 0", ", {0}"),
        LOAD.format("4d", "im2col.", "0, 0, 0, 0", ", {0}"),
        LOAD.format("3d", "im2col.", "0, 0, 0", ""),
        LOAD.format("2d", "tile.", "0, 0, 0", ""),
        LOAD.format("6d", "tile.", "0, 0", ""),
        LOAD.format("2d", "tile::gather4.", "0, 0", ""),
        LOAD.format("3d", "im2col::w.", "0, 0, 0", ", {0, 0}"),
        LOAD.format("2d", "tile.cta_group::2.", "0, 0", ""),
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d0, {0, 0}], [%r1];",
        "cp.async.bulk.tensor.2d.global.shared::cta.tile [%d0, {0, 0}], [%r1];",
        "cp.async.bulk.tensor.2d.global.shared::cta.mbarrier::complete_tx::bytes [%r1], [%d0, {0, 0}], [full];",
        "cp.async.bulk.tensor.2d.shared::cta.global.bulk_group [%d0, {0, 0}], [%r1];",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r1], [%d0, {0, 0}], [full], %h0;",
    ],
)
def test_what_does_not_exist_is_refused(line):
    with pytest.raises(PtxError):
        Kernel(kernel_text(BEGIN + line + "\nret;", parameters=PARAMETERS, shared=SHARED))
