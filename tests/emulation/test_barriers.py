"""Barriers of a block (PTX ISA 9.7.13.1): who is ordered, what is counted, what bar.red gives."""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from tests.emulation.orders import assert_clean, assert_reported, run
from tests.support.ptx import kernel_text

THREADS = numpy.arange(64)
EXCHANGE = """
st.shared.u32 [%r2], %r0;
{sync}
xor.b32 %r4, %r1, 128;
add.u32 %r4, %r4, %r3;
ld.shared.u32 %r5, [%r4];
st.global.u32 [%d1], %r5;
"""


@pytest.mark.parametrize(
    "sync", ["bar.sync 0;", "barrier.sync 3;", "barrier.sync.aligned 0, 64;", "bar.cta.sync 15, 64;", "bar.sync %r9;"]
)
def test_sync_orders_all(sync):
    assert_clean("mov.u32 %r9, 5;" + EXCHANGE.format(sync=sync), THREADS ^ 32)


def test_threads_that_take_part_are_ordered_and_no_others():
    pairs = "shr.u32 %r9, %r0, 6;\nadd.u32 %r9, %r9, 1;\nbar.sync %r9, 64;"
    threads = numpy.arange(128)
    assert_clean(EXCHANGE.format(sync=pairs), threads ^ 32, threads=128)
    across = EXCHANGE.replace("%r1, 128", "%r1, 256").format(sync=pairs)
    assert_reported(across, "race", threads=128)


PRODUCER = """
setp.ge.u32 %p0, %r0, 32;
@%p0 bra CONSUMER;
st.shared.u32 [%r2], %r0;
{first}
bra END;
CONSUMER:
{second}
ld.shared.u32 %r5, [%r2-128];
st.global.u32 [%d1], %r5;
END:
"""


def test_arrive_hands_on_and_waits_for_nobody():
    assert_clean(PRODUCER.format(first="bar.arrive 1, 64;", second="bar.sync 1, 64;"), [*[-1] * 32, *range(32)])
    # the arrival is before the write
    early = PRODUCER.replace("st.shared.u32 [%r2], %r0;\n{first}", "{first}\nst.shared.u32 [%r2], %r0;")
    assert_reported(early.format(first="bar.arrive 1, 64;", second="bar.sync 1, 64;"), "race")


def test_who_only_arrives_has_seen_nobody():
    body = PRODUCER.format(first="bar.sync 1, 64;", second="bar.arrive 1, 64;")
    assert_reported(body, "race")


@pytest.mark.parametrize(
    "operation, expected",
    [
        ("bar.red.popc.u32 %r5, 0, %p1;", 10),
        ("bar.red.popc.u32 %r5, 0, !%p1;", 54),
        ("barrier.red.popc.u32 %r5, 0, 64, %p1;", 10),
        ("bar.red.and.pred %p2, 0, %p1;\nselp.u32 %r5, 1, 0, %p2;", 0),
        ("bar.red.or.pred %p2, 0, %p1;\nselp.u32 %r5, 1, 0, %p2;", 1),
        ("setp.ge.u32 %p1, %r0, 0;\nbar.red.and.pred %p2, 0, %p1;\nselp.u32 %r5, 1, 0, %p2;", 1),
        ("setp.gt.u32 %p1, %r0, 64;\nbar.red.or.pred %p2, 0, %p1;\nselp.u32 %r5, 1, 0, %p2;", 0),
    ],
)
def test_red(operation, expected):
    body = f"setp.lt.u32 %p1, %r0, 10;\n{operation}\nst.global.u32 [%d1], %r5;"
    assert_clean(body, numpy.full(64, expected))


def test_red_orders_like_sync():
    assert_clean(EXCHANGE.format(sync="bar.red.popc.u32 %r9, 0, %p1;"), THREADS ^ 32)


def test_a_barrier_is_used_again():
    body = """
mov.u32 %r10, 0;
LOOP:
st.shared.u32 [%r2], %r10;
bar.sync 0;
xor.b32 %r4, %r1, 128;
add.u32 %r4, %r4, %r3;
ld.shared.u32 %r5, [%r4];
setp.ne.u32 %p0, %r5, %r10;
@%p0 trap;
{sync}
add.u32 %r10, %r10, 1;
setp.lt.u32 %p1, %r10, 5;
@%p1 bra LOOP;
"""
    assert_clean(body.format(sync="bar.sync 0;"))
    for seed in range(5):
        _, outcome = run(body.format(sync=""), seed=seed)
        assert any(report.startswith(("[race]", "[trap]")) for report in outcome.reports)


def test_half_a_warp():
    body = EXCHANGE.format(sync="setp.lt.u32 %p0, %r0, 48;\n@%p0 bar.sync 0;")
    assert_reported(body, "aligned", "0xffff0000 of the warp are predicated off")
    # a whole warp may be predicated off
    assert_clean("setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 1, 32;")


def test_half_a_warp_at_a_barrier_that_need_not_be_aligned():
    body = """
setp.lt.u32 %p0, %r0, 16;
st.shared.u32 [%r2], %r0;
@%p0 bra LOW;
barrier.sync 1;
bra DONE;
LOW:
barrier.sync 1;
DONE:
xor.b32 %r4, %r1, 64;
add.u32 %r4, %r4, %r3;
ld.shared.u32 %r5, [%r4];
st.global.u32 [%d1], %r5;
"""
    assert_clean(body, THREADS ^ 16)


@pytest.mark.parametrize("count", [48, 33, 16])
def test_counts_are_of_whole_warps(count):
    assert_reported(f"bar.sync 0, {count};", "barrier", "not a multiple of the warp's 32")


def test_counts_agree():
    body = """
setp.lt.u32 %p0, %r0, 32;
selp.u32 %r9, {first}, 64, %p0;
bar.sync 0, %r9;
"""
    assert_clean(body.format(first=64))
    assert_reported(body.format(first=96), "barrier", "expect", threads=64)
    one_names_none = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 0;\n@!%p0 bar.sync 0, 64;"
    assert_reported(one_names_none, "barrier", "0: all")


def test_twice_before_the_others():
    body = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.arrive 1, 96;\n@%p0 bar.arrive 1, 96;\n@!%p0 bar.sync 1, 96;"
    assert_reported(body, "barrier", "arrive at barrier 1 again")


def test_red_meets_no_other_kind():
    body = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.red.popc.u32 %r5, 1, 64, %p1;\n@!%p0 {0}"
    assert_clean(body.format("bar.red.or.pred %p2, 1, 64, %p1;"))
    assert_reported(body.format("bar.sync 1, 64;"), "barrier", "bar.red")
    assert_reported(body.format("bar.arrive 1, 64;"), "barrier", "bar.red")


@pytest.mark.parametrize(
    "text", ["bar.arrive 1;", "bar.red.popc.u32 %r5, 0;", "bar.sync 0, 32, 1;", "bar.red.xor.pred %p1, 0, %p2;"]
)
def test_refused(text):
    with pytest.raises(PtxError):
        Kernel(kernel_text(text + "\nret;"))


@pytest.mark.parametrize("number", [16, 77])
def test_sixteen_barriers(number):
    _, outcome = run(f"mov.u32 %r9, {number};\nbar.sync %r9;")
    assert outcome.faulted
    assert outcome.reports[0].startswith("[barrier]")


def test_threads_that_are_gone_are_not_waited_for():
    gone = "setp.ge.u32 %p0, %r0, 32;\n@%p0 ret;\nst.shared.u32 [%r2], %r0;\nbar.sync 0;\n"
    read = "xor.b32 %r4, %r1, 4;\nadd.u32 %r4, %r4, %r3;\nld.shared.u32 %r5, [%r4];\nst.global.u32 [%d1], %r5;"
    assert_clean(gone + read, [*(numpy.arange(32) ^ 1), *[-1] * 32])


def test_a_warp_without_some_of_its_lanes_counts_as_a_warp():
    """Counts are in whole warps, also where what is left of a warp arrives in two parts."""
    body = """
setp.lt.u32 %p0, %r0, {lanes};
@%p0 exit;
setp.lt.u32 %p1, %r0, 16;
@%p1 bra LOW;
{high}
bra DONE;
LOW:
barrier.sync 1, 64;
DONE:
st.global.u32 [%d1], %r0;
"""
    assert_clean(body.format(lanes=8, high="barrier.sync 1, 64;"), [*[-1] * 8, *range(8, 64)])
    _, outcome = run(
        body.format(lanes=8, high="setp.lt.u32 %p2, %r0, 32;\n@!%p2 barrier.sync 1, 64;\n@%p2 barrier.sync 2, 64;")
    )
    assert outcome.faulted and outcome.reports[0].startswith("[deadlock]")


def test_a_block_that_is_no_whole_number_of_warps():
    body = EXCHANGE.replace("xor.b32 %r4, %r1, 128", "sub.u32 %r4, 156, %r1").format(sync="bar.sync 0;")
    assert_clean(body, 39 - numpy.arange(40), threads=40)


def test_lanes_name_different_barriers():
    body = "and.b32 %r9, %r0, 1;\nbar.sync %r9, 64;"
    assert_reported(body, "barrier", "name different barriers")
