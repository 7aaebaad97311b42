"""Tensor maps in global memory, and those that a kernel makes itself (PTX ISA 5.5.8, 9.7.9.28, 9.7.13.16).

What a copy by such a map brings in comes from numpy, as in test_tensor_copies.py.
"""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from tests.emulation.test_tensor_copies import LANDINGS, box_of, im2col_map, map_of, numbers, swizzle
from tests.support.ptx import kernel_text

SHARED = ".shared .align 1024 .b8 tile[2048];\n.shared .align 128 .b8 made[128];\n.shared .align 8 .b64 full;"
PARAMETERS = ".param .u64 maps, .param .u64 out, .param .u64 tensor"
BEGIN = """
ld.param.u64 %d0, [maps];
ld.param.u64 %d1, [out];
ld.param.u64 %d3, [tensor];
mov.u32 %r0, %tid.x;
mov.u32 %r1, tile;
mov.u32 %r5, made;
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
bar.sync 0;
"""
COPY = (
    "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0, {8, 2}], [full];\n"
)
FULL = "W:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0;\n@!%p1 bra W;\n"
DUMP = """
shl.b32 %r2, %r0, 4;
add.u32 %r3, %r1, %r2;
cvt.u64.u32 %d2, %r2;
add.u64 %d2, %d1, %d2;
ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r3];
st.global.v4.u32 [%d2], {%r10, %r11, %r12, %r13};
"""
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%d0], 128;\n"
RELEASE = "fence.proxy.tensormap::generic.release.gpu;\n"
BARRIER = "bar.sync 0;\n"
BYTES = 512  # of a box, which 32 threads dump


def load(num_bytes=BYTES):
    return f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {num_bytes};\n" + COPY


def aligned(content, alignment=64):
    room = numpy.zeros(len(content) + alignment, numpy.uint8)
    begin = -room.ctypes.data % alignment
    memory = room[begin : begin + len(content)]
    memory[:] = numpy.frombuffer(content, numpy.uint8)
    return memory


def run(text, maps, tensor, writable=(), **options):
    out = numpy.full(BYTES, 0xEE, numpy.uint8)
    kernel = Kernel(kernel_text(BEGIN + text + "\nret;", parameters=PARAMETERS, shared=SHARED))
    outcome = kernel.run(1, 32, [maps, out, tensor], writable=[out, *writable], **options)
    return out, outcome.reports


def assert_reported(text, maps, tensor, kind, words="", landings=LANDINGS, **options):
    for landing in landings:
        found = run(text, maps, tensor, landing=landing, **options)[1]
        assert any(r.startswith(f"[{kind}]") and words in r for r in found), (landing, found)


def assert_loads(text, maps, tensor, expected, writable=()):
    before = maps.copy()
    for landing in LANDINGS:
        maps[:] = before
        out, reports = run(text, maps, tensor, writable, landing=landing)
        assert not reports, reports
        numpy.testing.assert_array_equal(out, expected.view(numpy.uint8).reshape(-1))


@pytest.fixture
def tensor():
    return numbers(16, 64)


@pytest.fixture
def expected(tensor):
    return box_of(tensor, (8, 2), (32, 8))


def test_a_map_in_global_memory(tensor, expected):
    """One that the host put there needs no fence, whether the kernel may write there or not."""
    content = map_of(tensor, (32, 8)).encoded
    for writable in ((), ("maps",)):
        maps = aligned(content)
        assert_loads(load() + FULL + DUMP, maps, tensor, expected, [maps] if writable else [])


def test_a_map_in_constant_memory(tensor, expected):
    content = ", ".join(map(str, map_of(tensor, (32, 8)).encoded))
    shared = SHARED + f"\n.const .align 64 .b8 fixed[128] = {{{content}}};"
    text = BEGIN + "mov.u64 %d0, fixed;\ncvta.const.u64 %d0, %d0;\n" + load() + FULL + DUMP + "\nret;"
    out = numpy.zeros(BYTES, numpy.uint8)
    kernel = Kernel(kernel_text(text, parameters=PARAMETERS, shared=shared))
    outcome = kernel.run(1, 32, [out, out, tensor], writable=[out])
    assert not outcome.reports
    numpy.testing.assert_array_equal(out, expected.view(numpy.uint8).reshape(-1))


def test_where_no_map_is(tensor):
    good = map_of(tensor, (32, 8)).encoded
    assert_reported(load() + FULL, aligned(bytes(128)), tensor, "tensor map", "no tensor map")
    assert_reported("add.u64 %d0, %d0, 32;\n" + load(), aligned(bytes(32) + good), tensor, "tensor map", "aligned")
    in_shared = "cvt.u64.u32 %d0, %r5;\ncvta.shared.u64 %d0, %d0;\n"
    assert_reported(in_shared + load(), aligned(good), tensor, "tensor map", "neither a parameter nor")
    assert_reported("mov.u64 %d0, 0;\n" + load(), aligned(good), tensor, "tensor map", "cvta.param")


# ---- a map that the kernel writes into global memory

REPLACE = "@%p0 tensormap.replace.tile.global_address.global.b1024.b64 [%d0], %d3;\n"


def test_a_map_that_the_grid_has_written(tensor, expected):
    """The writer releases, threads meet, and the one that copies acquires: each of the three may be missing."""
    other = numbers(16, 64) * 0
    maps = aligned(map_of(other, (32, 8)).encoded)
    memory = {"memory": {"other": other}}

    def outcome(text):
        maps[:] = aligned(map_of(other, (32, 8)).encoded)
        return run(text + load() + FULL + DUMP, maps, tensor, [maps], **memory)

    out, reports = outcome(REPLACE + RELEASE + BARRIER + ACQUIRE)
    assert not reports, reports
    numpy.testing.assert_array_equal(out, expected.view(numpy.uint8).reshape(-1))
    for text in (REPLACE + BARRIER + ACQUIRE, REPLACE + RELEASE + BARRIER, ACQUIRE + REPLACE + RELEASE + BARRIER):
        assert any(r.startswith("[proxy]") for r in outcome(text)[1]), text
    by_another = REPLACE.replace("%p0", "%p3") + RELEASE + "{}" + ACQUIRE
    begin = "setp.eq.u32 %p3, %r0, 31;\n"
    assert not outcome(begin + by_another.format(BARRIER))[1]
    assert any("race" in r for r in outcome(begin + by_another.format(""))[1])


def test_a_map_in_flight_does_not_change(tensor):
    """9.7.9.25.1: the descriptor is not modified before the copy completes."""
    maps = aligned(map_of(tensor, (32, 8)).encoded)
    assert_reported(load() + REPLACE + FULL, maps, tensor, "copy in flight", landings=("late",), writable=[maps])
    assert not run(load() + FULL + REPLACE, maps, tensor, [maps])[1]


# ---- a map made in shared memory

FILL = "shl.b32 %r6, %r0, 2;\nadd.u32 %r6, %r5, %r6;\nst.shared.u32 [%r6], 0;\n" + BARRIER
PUBLISH = (
    "bar.warp.sync 0xffffffff;\n"
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d0], [%r5], 128;\n"
    "bar.warp.sync 0xffffffff;\n"
)
FIELD = "@%p0 tensormap.replace.tile.{}.shared::cta.b1024.{} [%r5], {};\n"


def fields(**changes):
    """All fields of a 2-dimensional map of a (16, 64) tensor of f16; `changes` by name, with ordinals as box_dim_0."""
    values = {
        "global_address": "%d3", "rank": 1, "box_dim_0": 32, "box_dim_1": 8, "global_dim_0": 64, "global_dim_1": 16,
        "global_stride_0": 128, "element_stride_0": 1, "element_stride_1": 1, "elemtype": 6, "interleave_layout": 0,
        "swizzle_mode": 0, "fill_mode": 0,
    }  # fmt: skip
    values.update(changes)
    text = ""
    for name, value in values.items():
        if value is None:
            continue
        field, _, ordinal = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
        kind = "b64" if field in ("global_address", "global_stride") else "b32"
        text += FIELD.format(field, kind, f"{ordinal}, {value}" if ordinal else value)
    return text


def made(**changes):
    return FILL + fields(**changes) + PUBLISH + ACQUIRE


def test_a_map_made_of_zeros(tensor, expected):
    maps = aligned(bytes(128))
    assert_loads(made() + load() + FULL + DUMP, maps, tensor, expected, [maps])
    assert maps.tobytes() == map_of(tensor, (32, 8)).encoded


def test_each_field_is_replaced(tensor):
    """Against what numpy makes of the changed box, size, stride, type, swizzle and fill."""
    maps = aligned(bytes(128))

    def check(expected, **changes):
        assert_loads(made(**changes) + load(expected.nbytes) + FULL + DUMP, maps, tensor, expected, [maps])

    check(box_of(tensor, (8, 2), (64, 4)), box_dim_0=64, box_dim_1=4)
    check(box_of(tensor[:5, :24], (8, 2), (32, 8)), global_dim_0=24, global_dim_1=5)
    check(box_of(tensor[::2], (8, 2), (32, 8)), global_dim_1=8, global_stride_0=256)
    check(box_of(tensor, (8, 2), (32, 16))[::2], element_stride_1=2, box_dim_1=16)
    check(box_of(tensor[:5], (8, 2), (32, 8), numpy.uint16(0x7FFF).view(numpy.float16)), global_dim_1=5, fill_mode=1)
    plain = box_of(tensor, (8, 2), (32, 8)).view(numpy.uint8).reshape(-1)
    check(swizzle(plain, 64), swizzle_mode=2)
    words = box_of(tensor.view(numpy.uint32), (8, 2), (16, 8))
    check(words, elemtype=2, global_dim_0=32, box_dim_0=16)


def test_a_field_that_is_missing(tensor):
    for name, words in (
        ("global_address", "its address"), ("box_dim_1", "its box"), ("global_dim_0", "dimension 0 has size 0"),
        ("element_stride_1", "element stride 0"), ("rank", "it has 1 dimensions"),
    ):  # fmt: skip
        maps = aligned(bytes(128))
        text = made(**{name: None}) + load() + FULL
        assert_reported(text, maps, tensor, "tensor map", words, writable=[maps])


def test_what_is_replaced_is_a_tiled_map(tensor):
    maps = aligned(im2col_map(numbers(2, 4, 4, 16), lower=(0, 0), upper=(0, 0), pixels=16, channels=16).encoded)
    assert_reported(REPLACE, maps, tensor, "tensor map", "of an im2col map", writable=[maps])
    maps = aligned(bytes(range(128)))
    assert_reported(REPLACE, maps, tensor, "tensor map", "neither a tensor map", writable=[maps])
    maps = aligned(bytes(192))
    assert_reported(REPLACE.replace("[%d0]", "[%d0+32]"), maps, tensor, "misaligned", writable=[maps])


def test_a_made_map_is_published(tensor):
    """Without the second half of the pair, or with one for another place."""
    maps = aligned(bytes(128))
    whole = made()
    missing = whole.replace(ACQUIRE, "")
    assert_reported(missing + load() + FULL, maps, tensor, "proxy", "no fence.proxy.tensormap", writable=[maps])
    elsewhere = "mov.u64 %d8, 4096;\n" + ACQUIRE.replace("%d0", "%d8")
    assert_reported(elsewhere, maps, tensor, "out of bounds")


CP_FENCEPROXY = "tensormap.cp_fenceproxy.{}.tensormap::generic.{}.gpu.sync.aligned [%d0], [made], {};"


@pytest.mark.parametrize("line, words", [
    ("tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [made], 1;", "no text says where their slices"),
    ("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [made], 4;", "not modelled"),
    ("tensormap.replace.tile.swizzle_atomicity.shared::cta.b1024.b32 [made], 1;", "sm_100a"),
    ("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [made], 8;", "not modelled"),
    ("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [made], 13;", "not modelled"),
    ("tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [made], 2;", "not modelled"),
    ("tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [made], %r0;", ""),
    ("tensormap.replace.tile.global_address.shared::cta.b1024.b32 [made], %r0;", "its type"),
    ("tensormap.replace.tile.rank.shared::cta.b1024.b64 [made], %d0;", "its type"),
    ("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [made], 5, %r0;", "its ordinal"),
    ("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [made], 4, %d0;", "its ordinal"),
    ("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [made], %r0;", ""),
    ("tensormap.replace.im2col.rank.shared::cta.b1024.b32 [made], %r0;", "it is .tile"),
    ("tensormap.replace.tile.rank.shared::cluster.b1024.b32 [made], %r0;", "shared::cluster"),
    (CP_FENCEPROXY.format("shared::cta.global", "release", 128), ""),
    (CP_FENCEPROXY.format("global.shared::cta", "release", 64), "128"),
    (CP_FENCEPROXY.format("global.shared::cta", "acquire", 128), ""),
    ("fence.proxy.tensormap::generic.acquire.gpu [%d0], 64;", "128"),
    ("fence.proxy.tensormap::generic.acquire.gpu;", ""),
    ("fence.proxy.tensormap::generic.release;", ""),
])  # fmt: skip
def test_what_does_not_exist_is_refused(line, words):
    with pytest.raises(PtxError, match=words or "supported"):
        Kernel(kernel_text(BEGIN + line + "\nret;", parameters=PARAMETERS, shared=SHARED))
