"""Order of warps and lanes, divergence, polling, deadlocks by name, limits."""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from tests.emulation.orders import assert_clean, assert_reported, run
from tests.support.ptx import kernel_text

LANES = numpy.arange(32)


# ---------------------------------------------------------------------------------------------------------- divergence


def test_both_sides_of_a_branch():
    body = """
and.b32 %r4, %r0, 1;
setp.eq.u32 %p0, %r4, 0;
@%p0 bra EVEN;
mul.lo.u32 %r5, %r0, 3;
bra DONE;
EVEN:
mul.lo.u32 %r5, %r0, 5;
DONE:
st.global.u32 [%d1], %r5;
"""
    assert_clean(body, numpy.where(LANES % 2, LANES * 3, LANES * 5), threads=32)


def test_loops_of_different_lengths():
    body = """
mov.u32 %r5, 0;
mov.u32 %r6, 0;
LOOP:
setp.ge.u32 %p0, %r6, %r0;
@%p0 bra DONE;
add.u32 %r6, %r6, 1;
add.u32 %r5, %r5, %r6;
bra LOOP;
DONE:
st.global.u32 [%d1], %r5;
"""
    assert_clean(body, LANES * (LANES + 1) // 2, threads=32)


def test_lanes_leave_one_by_one():
    body = """
mov.u32 %r6, 0;
LOOP:
setp.eq.u32 %p0, %r6, %r0;
@%p0 st.global.u32 [%d1], %r6;
@%p0 exit;
add.u32 %r6, %r6, 1;
bra LOOP;
"""
    assert_clean(body, LANES, threads=32)


def test_brx_goes_where_each_lane_says():
    body = """
and.b32 %r4, %r0, 3;
TABLE: .branchtargets A, B, C, A;
brx.idx %r4, TABLE;
A:
mov.u32 %r5, 10;
bra DONE;
B:
mov.u32 %r5, 11;
bra DONE;
C:
mov.u32 %r5, 12;
DONE:
st.global.u32 [%d1], %r5;
"""
    assert_clean(body, numpy.array([10, 11, 12, 10])[LANES % 4], threads=32)


def test_lanes_meet_again_at_an_aligned_instruction():
    body = """
setp.lt.u32 %p0, %r0, 7;
@%p0 bra LOW;
st.shared.u32 [%r2], 1;
bra MEET;
LOW:
st.shared.u32 [%r2], 2;
MEET:
bar.sync 0;
xor.b32 %r4, %r1, 124;
add.u32 %r4, %r4, %r3;
ld.shared.u32 %r5, [%r4];
st.global.u32 [%d1], %r5;
"""
    assert_clean(body, numpy.where(31 - LANES < 7, 2, 1), threads=32)


def test_groups_that_name_different_members():
    body = """
setp.lt.u32 %p0, %r0, 16;
selp.b32 %r4, 0xffff, 0xffff0000, %p0;
redux.sync.add.u32 %r5, %r0, %r4;
st.global.u32 [%d1], %r5;
"""
    assert_clean(body, numpy.where(LANES < 16, 120, 376), threads=32)


def test_who_executes_must_be_a_member():
    assert_reported("redux.sync.add.u32 %r5, %r0, 0xffff;", "membermask", "0xffff0000", threads=32)
    guarded = "setp.lt.u32 %p0, %r0, 16;\n@%p0 redux.sync.add.u32 %r5, %r0, -1;"
    assert_reported(guarded, "membermask", "predicated off", threads=32)


def test_lanes_that_wait_for_each_other_in_different_places():
    body = """
setp.lt.u32 %p0, %r0, 16;
@%p0 bra LOW;
bar.sync 0;
bra DONE;
LOW:
vote.sync.any.pred %p1, %p0, -1;
DONE:
"""
    assert_reported(body, "divergence", "different instructions", threads=32)


def test_a_uniform_branch_is_uniform():
    body = "setp.lt.u32 %p0, %r0, {0};\n@%p0 bra.uni DONE;\nst.global.u32 [%d1], 3;\nDONE:"
    assert_clean(body.format(32), numpy.full(32, -1), threads=32)
    assert_reported(body.format(16), "divergence", ".uni", threads=32)


def test_matrices_want_whole_warps():
    text = "@%p0 ret;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3];"
    write = (
        "and.b32 %r4, %r0, 31;\nshl.b32 %r4, %r4, 2;\nadd.u32 %r4, %r4, %r3;\nst.shared.u32 [%r4], 0;\nbar.sync 0;\n"
    )
    assert_clean(write + "setp.gt.u32 %p0, %r0, 99;\n" + text, threads=32)
    assert_reported(write + "setp.eq.u32 %p0, %r0, 31;\n" + text, "aligned", "0x7fffffff", threads=32)


# -------------------------------------------------------------------------------------------------- waiting and polling

INIT = """
mov.u32 %r20, full;
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r20], 1;
bar.sync 0;
"""
LOAD = """
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d0], 256, [%r20];
"""
WAIT = """
WAIT:
mbarrier.{wait}.parity.shared::cta.b64 %p1, [%r20], 0;
@!%p1 bra WAIT;
"""
READ = "ld.shared.u32 %r6, [%r2];\nst.global.u32 [%d1], 9;\n"


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_a_copy_lands_though_one_lane_polls_and_the_others_wait_for_it(wait):
    body = (
        INIT
        + "@!%p0 bra MEET;\n"
        + LOAD
        + WAIT.format(wait=wait)
        + "MEET:\nbar.warp.sync -1;\n"
        + READ.replace("ld.shared.u32 %r6, [%r2];", "@%p0 ld.shared.u32 %r6, [%r2];")
    )
    assert_clean(body, [9] * 32, threads=32, words=64, max_steps=100_000)


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_a_copy_lands_though_every_warp_polls(wait):
    body = INIT + "@!%p0 bra WAIT;\n" + LOAD + WAIT.format(wait=wait) + READ
    assert_clean(body, [9] * 64, max_steps=100_000)


def test_a_copy_lands_though_another_warp_polls_memory():
    """One warp polls a flag that another sets once its copy is there."""
    flag = "@%p0 st.shared.u32 [%r3+4096], 0;\n"
    body = (
        flag
        + INIT
        + """
setp.ge.u32 %p2, %r0, 32;
@%p2 bra POLL;
@!%p0 bra DONE;
"""
        + LOAD
        + WAIT.format(wait="test_wait")
        + """
st.release.cta.shared.u32 [%r3+4096], 1;
bra DONE;
POLL:
ld.acquire.cta.shared.u32 %r5, [%r3+4096];
setp.ne.u32 %p3, %r5, 1;
@%p3 bra POLL;
DONE:
"""
    )
    assert_clean(body, max_steps=1_000_000)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("landing", LANDINGS)
def test_a_deadlock_names_who_waits_where(schedule, landing):
    body = (
        INIT + "setp.ge.u32 %p2, %r0, 32;\n@%p2 bra OTHER;\n" + WAIT.format(wait="try_wait") + "OTHER:\nbar.sync 1, 64;"
    )
    _, outcome = run(body, schedule=schedule, landing=landing)
    assert outcome.faulted
    (report,) = outcome.reports
    assert report.startswith("[deadlock]")
    assert "warp 0 waits at the mbarrier at shared 9216 for parity 0" in report or "warp 0 polls" in report
    assert "1 arrivals and 0 bytes are missing" in report or "warp 0 polls" in report
    assert "warp 1 waits at a barrier" in report


def test_a_deadlock_of_a_barrier():
    _, outcome = run("setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 1, 64;\n@!%p0 bar.sync 2, 64;")
    assert outcome.faulted
    assert [report.split("]")[0] for report in outcome.reports] == ["[deadlock"]
    assert "warp 0 waits at a barrier" in outcome.reports[0] and "warp 1 waits at a barrier" in outcome.reports[0]


def test_a_deadlock_of_those_who_poll():
    body = INIT + WAIT.format(wait="test_wait")
    _, outcome = run(body, max_steps=10_000_000)
    assert outcome.faulted and outcome.reports[0].startswith("[deadlock]")
    assert "warp 1 polls, line" in outcome.reports[0]


def test_endless_loops_end():
    _, outcome = run("LOOP:\nadd.u32 %r5, %r5, 1;\nbra LOOP;", max_steps=5000)
    assert outcome.faulted and outcome.reports[0].startswith("[too long]")
    assert outcome.counts.warp_instructions <= 5001


def test_no_warp_starves():
    """A warp that spins on plain memory does not keep the other from writing it, unless warps run as far as they go."""
    body = """
setp.eq.u32 %p0, %r0, 0;
@%p0 st.shared.u32 [%r3], 0;
bar.sync 0;
setp.ge.u32 %p1, %r0, 32;
@%p1 bra POLL;
@%p0 st.volatile.shared.u32 [%r3], 1;
bra DONE;
POLL:
ld.volatile.shared.u32 %r5, [%r3];
setp.ne.u32 %p2, %r5, 1;
@%p2 bra POLL;
DONE:
"""
    assert_clean(body, max_steps=100_000)


def test_the_seed_draws_the_order():
    """Who comes last leaves its number. A seed always gives the same."""
    loop = "mov.u32 %r4, 0;\nLOOP:\nadd.u32 %r4, %r4, 1;\nsetp.lt.u32 %p0, %r4, 50;\n@%p0 bra LOOP;\n"
    body = loop + "st.global.u32 [%d0], %r0;"
    last = [run(body, threads=256, seed=seed, races=0)[0][0] // 32 for seed in range(12)]
    assert len(set(last)) > 2
    assert last == [run(body, threads=256, seed=seed, races=0)[0][0] // 32 for seed in range(12)]
    assert run(body, threads=256, schedule="greedy", races=0)[0][0] // 32 == 7


# -------------------------------------------------------------------------------------------------------------- control


def test_trap():
    _, outcome = run("setp.eq.u32 %p0, %r0, 5;\n@%p0 trap;")
    assert outcome.faulted and outcome.reports[0].startswith("[trap]") and "0x20" in outcome.reports[0]


def test_nanosleep_does_nothing_else():
    assert_clean("nanosleep.u32 100;\nst.global.u32 [%d1], %r0;", LANES, threads=32)


@pytest.mark.parametrize("text", ["setmaxnreg.inc.sync.aligned.u32 232;", "setmaxnreg.dec.sync.aligned.u32 24;"])
def test_setmaxnreg(text):
    assert_clean(text, threads=128)


@pytest.mark.parametrize("count", [0, 16, 25, 264, 999])
def test_setmaxnreg_has_its_range(count):
    with pytest.raises(PtxError, match="24 to 256"):
        Kernel(kernel_text(f"setmaxnreg.inc.sync.aligned.u32 {count};\nret;"))


def test_setmaxnreg_is_for_whole_warps():
    assert_reported("setp.lt.u32 %p0, %r0, 9;\n@%p0 setmaxnreg.dec.sync.aligned.u32 40;", "aligned", threads=128)


def test_running_past_the_end():
    text = kernel_text("mov.u32 %r0, 1;")
    try:
        outcome = Kernel(text).run(1, 32, [None])
    except PtxError:
        return  # refused at load is as good
    assert outcome.faulted and outcome.reports[0].startswith("[control]")
