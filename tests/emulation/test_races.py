"""Races in shared memory: each fault beside its corrected twin, under every schedule (PTX ISA 8)."""

import numpy
import pytest

from tests.emulation.orders import assert_clean, assert_reported, run

EXCHANGE = """
st.shared.u32 [%r2], %r0;
{sync}
xor.b32 %r4, %r0, {partner};
shl.b32 %r4, %r4, 2;
add.u32 %r4, %r4, %r3;
ld.shared.u32 %r5, [%r4];
st.global.u32 [%d1], %r5;
"""
THREADS = numpy.arange(64)


def exchange(sync, partner):
    return EXCHANGE.format(sync=sync, partner=partner)


def test_warps_exchange():
    assert_clean(exchange("bar.sync 0;", 63), THREADS ^ 63)
    # who reads first finds nothing, and who writes then has not been seen to wait
    assert_reported(exchange("", 63), "race", "warp")


def test_lanes_exchange():
    assert_clean(exchange("bar.warp.sync -1;", 1), THREADS ^ 1)
    assert_reported(exchange("", 1), "intra-warp race", "lane")


def test_shfl_orders_nothing():
    assert_reported(exchange("shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;", 1), "intra-warp race")
    assert_reported(exchange("vote.sync.any.pred %p0, %p1, -1;", 1), "intra-warp race")


def test_bar_warp_sync_orders_its_members_only():
    half = """
setp.lt.u32 %p0, %r0, 16;
@%p0 bra LOW;
bar.warp.sync 0xffff0000;
bra DONE;
LOW: bar.warp.sync 0x0000ffff;
DONE:
"""
    assert_clean(exchange(half, 1), THREADS[:32] ^ 1, threads=32)
    assert_reported(exchange(half, 16), "intra-warp race", threads=32)


def test_overwritten_before_it_was_read():
    body = """
st.shared.u32 [%r2], %r0;
bar.sync 0;
xor.b32 %r4, %r1, 128;
add.u32 %r4, %r4, %r3;
ld.shared.u32 %r5, [%r4];
{sync}
st.shared.u32 [%r2], %r5;
"""
    assert_clean(body.format(sync="bar.sync 0;"))
    assert_reported(body.format(sync=""), "race", "may not have been read yet")
    lanes = body.replace("128", "4")
    assert_clean(lanes.format(sync="bar.warp.sync -1;"))
    assert_reported(lanes.format(sync=""), "intra-warp race", "may not have been read yet")


def test_every_reader_counts():
    """All lanes of a warp read one word. Who writes it must be ordered after each of them."""
    body = """
setp.eq.u32 %p0, %r0, 0;
@%p0 st.shared.u32 [%r3], 7;
bar.sync 0;
ld.shared.u32 %r5, [%r3];
{sync}
setp.eq.u32 %p1, %r0, 5;
@%p1 st.shared.u32 [%r3], 8;
st.global.u32 [%d1], %r5;
"""
    assert_clean(body.format(sync="bar.warp.sync -1;"), numpy.full(32, 7), threads=32)
    only_low = """
setp.lt.u32 %p2, %r0, 31;
@!%p2 bra LAST;
bar.warp.sync 0x7fffffff;
LAST:
"""
    assert_reported(body.format(sync=only_low), "intra-warp race", "lane 31", threads=32)


# Lanes 0, 1 and 2 read a word at times of their own, none after another; lane 3 then writes it.
APART = """
setp.eq.u32 %p0, %r0, 0;
@%p0 st.shared.u32 [%r3], 7;
bar.sync 0;
setp.lt.u32 %p1, %r0, 4;
@!%p1 bra END;
setp.eq.u32 %p1, %r0, 0;
setp.eq.u32 %p2, %r0, 1;
setp.eq.u32 %p3, %r0, 2;
setp.eq.u32 %p4, %r0, 3;
fence.acq_rel.cta;
@%p2 fence.acq_rel.cta;
@%p3 fence.acq_rel.cta;
@%p1 ld.shared.u32 %r5, [%r3];
@%p2 ld.shared.u32 %r5, [%r3];
@%p3 ld.shared.u32 %r5, [%r3];
{sync}
@%p4 st.shared.u32 [%r3], 8;
END:
"""


def with_lane_3(mask):
    """A barrier for lane 3 and those of the mask."""
    return f"shr.u32 %r9, {mask}, %r0;\nand.b32 %r9, %r9, 1;\nsetp.eq.u32 %p5, %r9, 1;\n@!%p5 bra ON{mask};\n" + (
        f"bar.warp.sync {mask};\nON{mask}:\n"
    )


@pytest.mark.parametrize("mask, left", [(9, "lane 1"), (10, "lane 0"), (11, "lane 2"), (13, "lane 1"), (14, "lane 0")])
def test_readers_that_have_not_seen_each_other_all_count(mask, left):
    assert_reported(
        APART.format(sync=with_lane_3(mask)), "intra-warp race", "may not have been read yet", left, threads=32
    )
    assert_clean(APART.format(sync=with_lane_3(15)), threads=32)


def test_of_two_reads_by_one_lane_the_later_counts():
    """Lane 1 reads, meets lane 3, and reads again. Lane 3 then meets lane 0, whose read lane 1 has not seen."""
    again = with_lane_3(10) + "@%p2 ld.shared.u32 %r5, [%r3];\n" + with_lane_3(9)
    body = APART.replace("@%p3 ld.shared.u32 %r5, [%r3];\n", "")
    assert_reported(body.format(sync=again), "intra-warp race", "lane 1", threads=32)
    assert_clean(body.format(sync=again + with_lane_3(11)), threads=32)


def test_bytes_beside_each_other_do_not_race():
    body = """
add.u32 %r4, %r3, %r0;
st.shared.u8 [%r4], %r0;
{sync}
and.b32 %r5, %r1, 63;
add.u32 %r5, %r5, %r3;
{load}
st.global.u32 [%d1], %r6;
"""
    expected = [sum((4 * (t % 16) + k) << 8 * k for k in range(4)) for t in range(64)]
    assert_clean(body.format(sync="bar.sync 0;", load="ld.shared.u32 %r6, [%r5];"), expected)
    assert_reported(body.format(sync="", load="ld.shared.u32 %r6, [%r5];"), "race")
    own = body.format(sync="", load="ld.shared.u8 %r6, [%r4];")
    assert_clean(own, THREADS)


def test_halves_of_a_word():
    body = """
shl.b32 %r4, %r0, 1;
add.u32 %r4, %r4, %r3;
st.shared.u16 [%r4], %r0;
bar.sync 0;
and.b32 %r5, %r1, 127;
add.u32 %r5, %r5, %r3;
ld.shared.u32 %r6, [%r5];
{sync}
st.shared.u32 [%r5], %r6;
bar.sync 0;
ld.shared.u16 %r7, [%r4];
st.global.u32 [%d1], %r7;
"""
    # two threads write each word again, the same value: a race only where PTX alone is asked
    assert_clean(body.format(sync="bar.sync 0;"), THREADS)
    assert_reported(body.format(sync="bar.sync 0;"), "race", races=2)
    assert_reported(body.format(sync=""), "race")


def test_uninitialised():
    assert_clean("st.shared.u32 [%r2], %r0;\nld.shared.u32 %r5, [%r2];\nst.global.u32 [%d1], %r5;", THREADS)
    assert_reported("ld.shared.u32 %r5, [%r2];", "uninitialised", "which nobody wrote")
    # three bytes of a word are not the word
    three = "st.shared.u8 [%r2], %r0;\nst.shared.u16 [%r2+2], %r0;\nld.shared.u32 %r5, [%r2];"
    assert_reported(three, "uninitialised")


def test_what_nobody_wrote_is_poison():
    out, outcome = run("ld.shared.u32 %r5, [%r2];\nst.global.u32 [%d1], %r5;", races=0)
    assert not outcome.reports
    assert (out == -1).all()  # a NaN in any format
    out, _ = run("ld.shared.u32 %r5, [%r2];\nst.global.u32 [%d1], %r5;", races=0, landing="random")
    assert len(set(out)) > 32


def test_registers_and_predicates_begin_with_anything():
    body = "st.global.u32 [%d1], %r77;\n@%p7 st.global.u32 [%d1], 5;"
    outs = [run(body, seed=seed)[0] for seed in range(3)]
    assert any((outs[0] != other).any() for other in outs[1:])
    assert len(set(outs[0])) > 16
    numpy.testing.assert_array_equal(outs[0], run(body, seed=0)[0])


FLAG = """
setp.ge.u32 %p0, %r0, 32;
@%p0 bra READER;
setp.ne.u32 %p1, %r0, 0;
@%p1 bra END;
st.shared.u32 [%r3], 42;
{write}
bra END;
READER:
setp.ne.u32 %p1, %r0, 32;
@%p1 bra END;
POLL:
{read}
setp.ne.u32 %p2, %r5, 1;
@%p2 bra POLL;
{after}
ld.shared.u32 %r6, [%r3];
st.global.u32 [%d0], %r6;
END:
"""
BEGIN_FLAG = "setp.eq.u32 %p3, %r0, 0;\n@%p3 st.shared.u32 [%r3+64], 0;\nbar.sync 0;\n"


@pytest.mark.parametrize(
    "write, read, after",
    [
        ("st.release.cta.shared.u32 [%r3+64], 1;", "ld.acquire.cta.shared.u32 %r5, [%r3+64];", ""),
        (
            "fence.acq_rel.cta;\nst.relaxed.cta.shared.u32 [%r3+64], 1;",
            "ld.relaxed.cta.shared.u32 %r5, [%r3+64];",
            "fence.acq_rel.cta;",
        ),
        (
            "membar.cta;\nst.volatile.shared.u32 [%r3+64], 1;",
            "ld.volatile.shared.u32 %r5, [%r3+64];",
            "membar.cta;",
        ),
    ],
)
def test_a_flag_in_shared_memory(write, read, after):
    assert_clean(BEGIN_FLAG + FLAG.format(write=write, read=read, after=after), [42])


@pytest.mark.parametrize(
    "write, read, after",
    [
        ("st.relaxed.cta.shared.u32 [%r3+64], 1;", "ld.acquire.cta.shared.u32 %r5, [%r3+64];", ""),
        ("st.release.cta.shared.u32 [%r3+64], 1;", "ld.relaxed.cta.shared.u32 %r5, [%r3+64];", ""),
        ("st.shared.u32 [%r3+64], 1;", "ld.acquire.cta.shared.u32 %r5, [%r3+64];", ""),
    ],
)
def test_a_flag_that_orders_nothing(write, read, after):
    assert_reported(BEGIN_FLAG + FLAG.format(write=write, read=read, after=after), "race")


def test_atomics_do_not_race_with_each_other():
    body = """
setp.eq.u32 %p0, %r0, 0;
@%p0 st.shared.u32 [%r3], 0;
bar.sync 0;
{add}
bar.sync 0;
ld.shared.u32 %r5, [%r3];
st.global.u32 [%d1], %r5;
"""
    assert_clean(body.format(add="red.shared.add.u32 [%r3], 1;"), numpy.full(64, 64))
    plain = "ld.shared.u32 %r4, [%r3];\nadd.u32 %r4, %r4, 1;\nst.shared.u32 [%r3], %r4;"
    assert_reported(body.format(add=plain), "race")
    assert_reported(body.format(add="red.shared.add.u32 [%r3], 1;\nld.shared.u32 %r4, [%r3];"), "race")


@pytest.mark.parametrize("fence, is_enough", [
    ("fence.proxy.async.shared::cta;", True), ("fence.proxy.async;", True), ("fence.proxy.async.global;", False),
    ("fence.mbarrier_init.release.cluster;", False), ("membar.cta;", False), ("", False),
])  # fmt: skip
def test_a_proxy_fence_before_a_bulk_store(fence, is_enough):
    """The async proxy reads what threads wrote through the generic one (PTX ISA 8.6)."""
    body = f"""
st.shared.u32 [%r2], %r0;
{fence}
bar.sync 0;
setp.ne.u32 %p0, %r0, 0;
@%p0 bra END;
cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r3], 256;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
END:
"""
    if is_enough:
        assert_clean(body, THREADS)
    else:
        assert_reported(body, "proxy", "fence.proxy.async")


def test_a_fence_covers_what_its_lane_has_seen():
    """One lane's fence does not make the writes of others visible, unless it was ordered after them."""
    body = """
st.shared.u32 [%r2], %r0;
{before}
setp.ne.u32 %p0, %r0, 0;
@!%p0 fence.proxy.async.shared::cta;
{after}
@%p0 bra END;
cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r3], 256;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
END:
"""
    assert_clean(body.format(before="bar.sync 0;", after=""), THREADS)
    assert_reported(body.format(before="", after="bar.sync 0;"), "proxy")


LOAD = """
setp.ne.u32 %p0, %r0, 0;
mov.u32 %r20, full;
@!%p0 mbarrier.init.shared::cta.b64 [%r20], 1;
{use}
{fence}
bar.sync 0;
@%p0 bra WAIT;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d0], 256, [%r20];
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r20], 0;
@!%p1 bra WAIT;
ld.shared.u32 %r6, [%r2];
"""


def test_a_bulk_load_over_generic_writes():
    write = "st.shared.u32 [%r2], %r0;"
    assert_clean(LOAD.format(use=write, fence="fence.proxy.async.shared::cta;"))
    assert_reported(LOAD.format(use=write, fence=""), "proxy", "overwritten through the async proxy")


def test_a_bulk_load_over_generic_reads_is_for_the_strict():
    read = "st.shared.u32 [%r2], %r0;\nfence.proxy.async.shared::cta;\nld.shared.u32 %r5, [%r2];"
    assert_clean(LOAD.format(use=read, fence=""))
    assert_reported(LOAD.format(use=read, fence=""), "proxy", "after the read", races=2)
    assert_clean(LOAD.format(use=read, fence="fence.proxy.async.shared::cta;"), races=2)


def test_data_only_when_asked():
    assert_clean(exchange("", 63), races=0)
