"""Clusters: blocks that are resident together, barrier.cluster, shared memory of other blocks (PTX ISA 9.7.13.4)."""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from tests.emulation.orders import BEGIN, SHARED
from tests.support.ptx import kernel_text

# %r10 the rank, %r11 the neighbour's, %r12 where the neighbour's word of `data` is; %d2 this thread's word of out
RANKS = """
mov.u32 %r10, %cluster_ctarank;
mov.u32 %r13, %cluster_nctarank;
add.u32 %r11, %r10, 1;
rem.u32 %r11, %r11, %r13;
mapa.shared::cluster.u32 %r12, %r2, %r11;
mov.u32 %r14, %ctaid.x;
shl.b32 %r15, %r14, 5;
add.u32 %r15, %r15, %r0;
mul.wide.u32 %d2, %r15, 4;
add.u64 %d2, %d0, %d2;
"""
ARRIVE = "barrier.cluster.arrive{0}.aligned;\n"
WAIT = "barrier.cluster.wait{0}.aligned;\n"
MEET = ARRIVE.format("") + WAIT.format("")


def run(body, grid=4, cluster=2, **options):
    out = numpy.full(32 * grid, -1, numpy.int32)
    kernel = Kernel(kernel_text(BEGIN + RANKS + body + "\nret;", shared=SHARED))
    return out, kernel.run(grid, 32, [out], writable=[out], cluster=cluster, **options)


def assert_clean(body, expected=None, **options):
    for number, schedule in enumerate(SCHEDULES * 2):
        out, outcome = run(body, schedule=schedule, landing=LANDINGS[number % 3], seed=number, **options)
        assert not outcome.reports, outcome.reports
        if expected is not None:
            numpy.testing.assert_array_equal(out, expected)


def assert_reported(body, kind, words="", **options):
    for number, schedule in enumerate(SCHEDULES * 2):
        _, outcome = run(body, schedule=schedule, landing=LANDINGS[number % 3], seed=number, **options)
        found = [report for report in outcome.reports if report.startswith(f"[{kind}]")]
        assert any(words in report for report in found), (schedule, outcome.reports)


def neighbours(grid, cluster):
    """What `EXCHANGE` leaves: the global number of the same thread in the next block of the cluster."""
    blocks = numpy.arange(grid)
    other = blocks // cluster * cluster + (blocks + 1) % cluster
    return (32 * other[:, None] + numpy.arange(32)).reshape(-1)


EXCHANGE = "st.shared.u32 [%r2], %r15;\n{meet}ld.shared::cluster.u32 %r5, [%r12];\nst.global.u32 [%d2], %r5;\n{again}"


@pytest.mark.parametrize("grid, cluster", [(4, 2), (8, 4), (3, 1), (6, 3)])
def test_blocks_read_each_other(grid, cluster):
    assert_clean(EXCHANGE.format(meet=MEET, again=MEET), neighbours(grid, cluster), grid=grid, cluster=cluster)


def test_a_write_into_another_block():
    body = "st.shared::cluster.u32 [%r12], %r15;\n{meet}ld.shared.u32 %r5, [%r2];\nst.global.u32 [%d2], %r5;\n"
    blocks = numpy.arange(4)
    before = blocks // 2 * 2 + (blocks + 1) % 2
    expected = (32 * before[:, None] + numpy.arange(32)).reshape(-1)
    assert_clean(body.format(meet=MEET), expected)
    for seed in range(4):
        _, outcome = run(body.format(meet="bar.sync 0;\n"), seed=seed)
        assert any(report.startswith(("[race]", "[uninitialised]")) for report in outcome.reports)


def test_without_a_barrier():
    # the neighbour has not written yet, or writes while we read, or is gone
    for schedule in SCHEDULES:
        _, outcome = run(EXCHANGE.format(meet="", again=MEET), schedule=schedule)
        assert any(report.startswith(("[race]", "[uninitialised]")) for report in outcome.reports)


def test_relaxed_orders_nothing():
    relaxed = ARRIVE.format(".relaxed") + WAIT.format("")
    assert_reported(EXCHANGE.format(meet=relaxed, again=MEET), "race", "block")
    assert_reported(EXCHANGE.format(meet="fence.acq_rel.cta;\n" + relaxed, again=MEET), "race", "block")
    assert_reported(EXCHANGE.format(meet="fence.acquire.cluster;\n" + relaxed, again=MEET), "race", "block")
    # the ISA's second example: the fence before the arrival releases
    assert_clean(EXCHANGE.format(meet="fence.acq_rel.cluster;\n" + relaxed, again=MEET), neighbours(4, 2))
    spelled = ARRIVE.format(".release") + WAIT.format(".acquire")
    assert_clean(EXCHANGE.format(meet=spelled, again=MEET), neighbours(4, 2))


def test_every_reader_of_another_block_counts():
    """Lanes 0 and 1 of the neighbour read a word. Its owner writes it again, ordered after lane 0's read alone."""
    body = f"""
setp.eq.u32 %p0, %r0, 0;
setp.le.u32 %p1, %r0, 1;
setp.eq.u32 %p2, %r10, 0;
@%p0 st.shared.u32 [%r3], 7;
@%p0 st.shared.u32 [%r3+128], 0;
{MEET}
@%p2 bra OWNER;
sub.u32 %r20, %r12, %r1;
@%p1 ld.shared::cluster.u32 %r5, [%r20];
{{sync}}
@%p0 st.release.cluster.shared::cluster.u32 [%r20+128], 1;
bra END;
OWNER:
@!%p0 bra END;
POLL:
ld.acquire.cluster.shared.u32 %r6, [%r3+128];
setp.ne.u32 %p3, %r6, 1;
@%p3 bra POLL;
st.shared.u32 [%r3], 8;
END:
{MEET}"""
    assert_clean(body.format(sync="bar.warp.sync -1;"))
    assert_reported(body.format(sync=""), "race", "may not have been read yet by block 1 warp 0 lane 1", grid=2)


# Block 0's mbarrier counts the bytes of what lane 0 of block 1 sends to `data`, then all of it reads them.
SEND = f"""
setp.eq.u32 %p0, %r0, 0;
setp.eq.u32 %p2, %r10, 0;
mov.u32 %r20, full;
and.pred %p3, %p0, %p2;
@%p3 mbarrier.init.shared::cta.b64 [%r20], 1;
@%p3 st.shared.v4.u32 [%r3+64], {{{{%r13, %r13, %r13, %r13}}}};
{MEET}
@%p2 bra WAITS;
mapa.shared::cluster.u32 %r21, %r3, %r11;
mapa.shared::cluster.u32 %r22, %r20, %r11;
mov.u32 %r24, 7;
@%p0 {{send}}
bra END;
WAITS:
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {{expected}};
{{wait}}
ld.shared.u32 %r5, [%r3+{{at}}];
st.global.u32 [%d2], %r5;
END:
{MEET}"""
POLL = """LOOP:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r20], 0;
@!%p1 bra LOOP;"""
ASYNC = "shared::cluster.mbarrier::complete_tx::bytes"


def sent(value):
    return numpy.concatenate([numpy.full(32, value), numpy.full(32, -1)])


def test_asynchronous_stores():
    store = f"st.async.weak.{ASYNC}.u32 [%r21+4], %r24, [%r22];"
    assert_clean(SEND.format(send=store, expected=4, wait=POLL, at=4), sent(7), grid=2)
    pair = f"st.async.{ASYNC}.v2.u32 [%r21], {{%r24, %r10}}, [%r22];"
    assert_clean(SEND.format(send=pair, expected=8, wait=POLL, at=4), sent(1), grid=2)
    # what has not been waited for; too few bytes; bytes that nobody waits for
    _, outcome = run(SEND.format(send=store, expected=4, wait="", at=4), grid=2)
    assert any(report.startswith(("[uninitialised]", "[read in flight]")) for report in outcome.reports)
    _, outcome = run(SEND.format(send=store, expected=8, wait=POLL, at=4), grid=2)
    assert outcome.faulted and "4 bytes are missing" in outcome.reports[0]
    # the store's own thread is ordered no more than others
    again = SEND.replace("bra END;", "@%p0 st.shared::cluster.u32 [%r21+4], 9;\nbra END;")
    for landing, kind in (("late", "[write in flight]"), ("early", "[race]")):
        _, outcome = run(again.format(send=store, expected=4, wait=POLL, at=4), grid=2, landing=landing)
        assert any(report.startswith(kind) for report in outcome.reports)


@pytest.mark.parametrize("operation, value", [
    ("add.u32", 9), ("inc.u32", 3), ("dec.u32", 1), ("min.s32", 2), ("max.u32", 7), ("and.b32", 2), ("or.b32", 7),
    ("xor.b32", 5),
])  # fmt: skip
def test_asynchronous_reductions(operation, value):
    """With 2, the cluster's size, and 7."""
    red = f"red.async.relaxed.cluster.{ASYNC}.{operation} [%r21+68], %r24, [%r22];"
    assert_clean(SEND.format(send=red, expected=4, wait=POLL, at=68), sent(value), grid=2)
    _, outcome = run(SEND.format(send=red, expected=8, wait=POLL, at=68), grid=2)
    assert outcome.faulted and "4 bytes are missing" in outcome.reports[0]


def test_where_asynchronous_stores_may_go():
    store = f"st.async.weak.{ASYNC}.u32 [%r21+4], %r24, [%r22];"
    red = f"red.async.relaxed.cluster.{ASYNC}.add.u32 [%r21+68], %r24, [%r22];"
    own = "mapa.shared::cluster.u32 %r22, %r20, %r10;\n@%p0 "
    _, outcome = run(SEND.format(send=own + store, expected=4, wait=POLL, at=4), grid=2)
    assert any("there is no mbarrier" in report or "different blocks" in report for report in outcome.reports)
    alone = (
        "mov.u32 %r20, full;\nsetp.eq.u32 %p0, %r0, 0;\n@%p0 mbarrier.init.shared::cta.b64 [%r20], 1;\nbar.sync 0;\n"
    )
    alone += "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 4;\nmov.u32 %r24, 7;\n@%p0 {0}\n" + POLL
    text = store.replace("%r21", "%r3").replace("%r22", "%r20")
    assert_reported(alone.format(text), "st.async", "one block", grid=1, cluster=1)
    into = "@%p0 st.shared.u32 [%r3+68], 1;\nbar.sync 0;\n" + alone.format(
        red.replace("%r21", "%r3").replace("%r22", "%r20")
    )
    assert_reported("setp.eq.u32 %p0, %r0, 0;\n" + into + "\n" + MEET, "red.async", "own shared memory")


@pytest.mark.parametrize("text", [
    f"st.async.{ASYNC}.v4.b64 [%r0], {{%d0, %d1, %d2, %d3}}, [%r2];", f"st.async.{ASYNC}.b16 [%r0], %h0, [%r2];",
    "st.async.shared::cluster.b32 [%r0], %r1, [%r2];", f"red.async.{ASYNC}.add.u32 [%r0], %r1, [%r2];",
    f"red.async.relaxed.cluster.{ASYNC}.min.u64 [%r0], %d1, [%r2];", "st.async.release.gpu.global.u32 [%d0], %r1;",
])  # fmt: skip
def test_asynchronous_stores_that_ptxas_refuses(text):
    with pytest.raises(PtxError, match="async"):
        Kernel(kernel_text(text + "\nret;"))


def test_a_block_that_has_left():
    """Its shared memory is gone: blocks meet before they exit."""
    body = EXCHANGE.format(meet=MEET, again="")
    slow = "mov.u32 %r20, 0;\nLOOP:\nadd.u32 %r20, %r20, 1;\nsetp.lt.u32 %p0, %r20, 300;\n@%p0 bra LOOP;\n"
    late = body.replace(
        "ld.shared::cluster", "setp.eq.u32 %p1, %r10, 0;\n@!%p1 bra READ;\n" + slow + "READ:\nld.shared::cluster"
    )
    found = [report for seed in range(6) for report in run(late, seed=seed)[1].reports]
    assert any(report.startswith("[exited block]") for report in found)
    assert_clean(late + MEET, neighbours(4, 2))


def test_once_a_thread_each_phase():
    assert_reported(ARRIVE.format("") * 2 + WAIT.format(""), "barrier", "has not waited since")
    assert_reported(WAIT.format(""), "barrier", "has not arrived")


def test_arrive_and_wait_apart():
    body = "st.shared.u32 [%r2], %r15;\n" + ARRIVE.format("") + "mul.lo.u32 %r20, %r0, 3;\n" + WAIT.format("")
    body += "ld.shared::cluster.u32 %r5, [%r12];\nst.global.u32 [%d2], %r5;\n" + MEET
    assert_clean(body, neighbours(4, 2))
    # what is written between the two is not covered
    late = body.replace("st.shared.u32 [%r2], %r15;\n", "").replace("mul.lo", "st.shared.u32 [%r2], %r15;\nmul.lo")
    for seed in range(4):
        _, outcome = run(late, seed=seed)
        assert any(report.startswith(("[race]", "[uninitialised]")) for report in outcome.reports)


def test_many_phases():
    body = f"""
mov.u32 %r20, 0;
LOOP:
add.u32 %r21, %r20, %r15;
st.shared.u32 [%r2], %r21;
{MEET}
ld.shared::cluster.u32 %r5, [%r12];
{MEET}
add.u32 %r20, %r20, 1;
setp.lt.u32 %p0, %r20, 5;
@%p0 bra LOOP;
st.global.u32 [%d2], %r5;
"""
    assert_clean(body, neighbours(4, 2) + 4)
    once = body.replace(MEET, "", 1)
    for seed in range(4):
        assert run(once, seed=seed)[1].reports


def test_threads_that_are_gone_are_not_waited_for():
    body = "setp.ge.u32 %p0, %r0, 16;\n@%p0 ret;\nbarrier.cluster.arrive;\nbarrier.cluster.wait;\n"
    body += "st.global.u32 [%d2], 3;\n"
    assert_clean(body, numpy.where(numpy.arange(128) % 32 < 16, 3, -1))


def test_a_block_that_never_arrives():
    _, outcome = run("setp.eq.u32 %p0, %r10, 1;\n@%p0 bra STAY;\n" + MEET + "bra END;\nSTAY:\nbar.sync 1, 64;\nEND:\n")
    assert outcome.faulted
    (report,) = outcome.reports
    assert report.startswith("[deadlock]") and "waits at barrier.cluster" in report and "waits at a barrier" in report


def test_ranks_and_ids():
    values = {"%cluster_ctarank": "rank", "%cluster_ctaid.x": "x", "%clusterid.x": "id", "%nclusterid.x": "n"}
    expected = {"rank": [0, 1, 2] * 2, "x": [0, 1, 2] * 2, "id": [0] * 3 + [1] * 3, "n": [2] * 6}
    for register, name in values.items():
        out, outcome = run(f"mov.u32 %r5, {register};\nst.global.u32 [%d2], %r5;", grid=6, cluster=3)
        assert not outcome.reports
        numpy.testing.assert_array_equal(out.reshape(6, 32)[:, 0], expected[name])


def test_no_such_rank():
    _, outcome = run("mapa.shared::cluster.u32 %r5, %r2, 2;\nld.shared::cluster.u32 %r6, [%r5];")
    assert outcome.faulted and outcome.reports[0].startswith("[mapa]")


@pytest.mark.parametrize(
    "text", ["barrier.cluster.sync;", "barrier.cluster.arrive.acquire;", "barrier.cluster.wait 0;"]
)
def test_refused(text):
    with pytest.raises(PtxError):
        Kernel(kernel_text(text + "\nret;"))
