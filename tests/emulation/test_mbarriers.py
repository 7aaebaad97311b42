"""mbarriers: phases, counts, bytes, and what an arrival hands on (PTX ISA 9.7.13.15).

Every fault has its corrected twin. A program is right in all landing modes, or reported in all of them.
"""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from tests.support.ptx import kernel_text

SHARED = ".shared .align 16 .b8 data[256];\n.shared .align 8 .b64 full;\n.shared .align 8 .b64 empty;"
LANDINGS = ("late", "early", "random")

BEGIN = """
ld.param.u64 %d0, [out];
mov.u32 %r0, %tid.x;
mov.u32 %r1, data;
mov.u32 %r2, full;
mov.u32 %r3, empty;
mul.wide.u32 %d1, %r0, 4;
add.u64 %d1, %d0, %d1;
setp.eq.u32 %p0, %r0, 0;
"""


def init(count=1, barrier="full"):
    return f"@%p0 mbarrier.init.shared::cta.b64 [{barrier}], {count};\nbar.sync 0;\n"


def wait(parity, barrier="full", name="W", order=""):
    return f"{name}:\nmbarrier.try_wait.parity{order}.shared::cta.b64 %p1, [{barrier}], {parity};\n@!%p1 bra {name};\n"


def run(body, threads=32, grid=1, **options):
    out = numpy.full(threads * grid, -1, numpy.int32)
    text = kernel_text(BEGIN + body + "\nret;", shared=SHARED)
    outcome = Kernel(text).run(grid, threads, [out], writable=[out], **options)
    return out, outcome


def assert_clean(body, expected=None, threads=32, **options):
    for landing in LANDINGS:
        for seed in range(3):
            out, outcome = run(body, threads, landing=landing, seed=seed, **options)
            assert not outcome.reports, outcome.reports
            assert not outcome.faulted
            if expected is not None:
                numpy.testing.assert_array_equal(out, expected)


def assert_reported(body, kind, words="", threads=32, seeds=3, **options):
    for landing in LANDINGS:
        found = [
            r for seed in range(seeds) for r in run(body, threads, landing=landing, seed=seed, **options)[1].reports
        ]
        assert any(r.startswith(f"[{kind}]") and words in r for r in found), (landing, found)


# Warp 0 writes, warp 1 reads; the arrival is by lane `who` of warp 0 or by all of it.
def message(arrive, wait_text, count, before=""):
    return (
        init(count)
        + f"""
setp.ge.u32 %p2, %r0, 32;
@%p2 bra READER;
shl.b32 %r4, %r0, 2;
add.u32 %r4, %r4, %r1;
st.shared.u32 [%r4], %r0;
{before}
{arrive}
bra END;
READER:
{wait_text}
sub.u32 %r5, %r0, 32;
shl.b32 %r4, %r5, 2;
add.u32 %r4, %r4, %r1;
ld.shared.u32 %r6, [%r4];
st.global.u32 [%d1], %r6;
END:
"""
    )


ARRIVE = "mbarrier.arrive.shared::cta.b64 %d2, [full];"
ONE_ARRIVES = "@%p0 mbarrier.arrive.shared::cta.b64 %d2, [full];"
EXPECTED = numpy.concatenate([numpy.full(32, -1), numpy.arange(32)])


def test_an_arrival_hands_on_what_its_thread_wrote():
    assert_clean(message(ARRIVE, wait(0), 32), EXPECTED, threads=64)


@pytest.mark.parametrize("schedule", ["random", "in_turn", "greedy", "backwards"])
def test_every_schedule_is_right(schedule):
    assert_clean(message(ARRIVE, wait(0), 32), EXPECTED, threads=64, schedule=schedule)


def test_without_a_wait_is_a_race():
    assert_reported(message(ARRIVE, "", 32), "race", "is read without synchronisation", threads=64, seeds=8)


def test_an_arrival_of_one_lane_releases_what_this_lane_has_seen():
    assert_reported(message(ONE_ARRIVES, wait(0), 1), "race", threads=64)
    assert_clean(message(ONE_ARRIVES, wait(0), 1, before="bar.warp.sync 0xffffffff;"), EXPECTED, threads=64)


def test_relaxed_arrivals_and_waits_order_nothing():
    relaxed = "mbarrier.arrive.relaxed.cta.shared::cta.b64 %d2, [full];"
    assert_reported(message(relaxed, wait(0), 32), "race", threads=64)
    assert_reported(message(ARRIVE, wait(0, order=".relaxed.cta"), 32), "race", threads=64)
    spelled = "mbarrier.arrive.release.cta.shared::cta.b64 %d2, [full];"
    assert_clean(message(spelled, wait(0, order=".acquire.cta"), 32), EXPECTED, threads=64)


def test_relaxed_with_fences():
    """The last example of PTX ISA 9.7.13.4: the fence is the release, or the acquire."""
    relaxed = "mbarrier.arrive.relaxed.{0}.shared::cta.b64 %d2, [full];"
    before, after = (
        "fence.release.sync_restrict::shared::cta.cluster;",
        "fence.acquire.sync_restrict::shared::cluster.cluster;",
    )
    waits = wait(0, order=".relaxed.cluster")
    assert_clean(message(relaxed.format("cluster"), waits + after, 32, before=before), EXPECTED, threads=64)
    assert_clean(message(relaxed.format("cta"), wait(0), 32, before="fence.acq_rel.cta;"), EXPECTED, threads=64)
    assert_clean(message(ARRIVE, waits + "fence.acq_rel.cta;", 32), EXPECTED, threads=64)
    for body in (
        message(relaxed.format("cluster"), waits, 32, before=before),
        message(relaxed.format("cluster"), waits + after, 32),
        message(relaxed.format("cluster"), waits + after, 32, before="fence.acquire.cta;"),
        message(ARRIVE, waits + before, 32),
        message(relaxed.format("cluster"), wait(0), 32, before="fence.acq_rel.cta;"),
    ):
        assert_reported(body, "race", threads=64)


def test_a_wait_for_the_phase_before_passes_at_once():
    assert_clean(init() + wait(1) + "st.global.u32 [%d1], %r0;", numpy.arange(32))


def test_nobody_arrives():
    assert_reported(init(2) + ONE_ARRIVES + wait(0), "deadlock", "1 arrivals and 0 bytes are missing")
    assert_clean(init(1) + ONE_ARRIVES + wait(0))


def test_the_wrong_parity_waits_for_ever():
    twice = init(1) + ONE_ARRIVES + wait(0) + "bar.sync 0;" + ONE_ARRIVES + wait(1, name="V")
    assert_clean(twice)
    assert_reported(twice + wait(0, name="U"), "deadlock")


def test_a_wait_whose_result_is_ignored_proves_nothing():
    once = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0;"
    assert_reported(message(ARRIVE, once, 32), "race", threads=64, seeds=8)


def test_test_wait_polls():
    body = wait(0).replace("try_wait", "test_wait")
    for schedule in ("random", "greedy", "backwards"):
        assert_clean(message(ARRIVE, body, 32), EXPECTED, threads=64, schedule=schedule)


def test_states():
    body = (
        init(3)
        + """
@!%p0 bra END;
mbarrier.arrive.noComplete.shared::cta.b64 %d2, [full], 1;
mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %d3, [full], 1;
mbarrier.pending_count.b64 %r4, %d2;
mbarrier.pending_count.b64 %r5, %d3;
mbarrier.test_wait.shared::cta.b64 %p2, [full], %d3;
mbarrier.arrive.shared::cta.b64 %d4, [full];
mbarrier.test_wait.shared::cta.b64 %p3, [full], %d3;
selp.u32 %r6, 100, 0, %p2;
selp.u32 %r7, 10, 0, %p3;
add.u32 %r6, %r6, %r7;
mad.lo.u32 %r4, %r4, 1000, %r6;
mad.lo.u32 %r4, %r5, 10000, %r4;
st.global.u32 [%d1], %r4;
END:
"""
    )
    # pending before the arrivals: 3, then 2; the phase is open, then complete
    assert_clean(body, numpy.concatenate([[23010], numpy.full(31, -1)]))


def test_a_state_that_no_arrival_returned():
    body = init() + ONE_ARRIVES + "mov.u64 %d3, {};\n@%p0 mbarrier.test_wait.shared::cta.b64 %p1, [full], %d3;"
    assert_reported(body.replace("{}", "5"), "mbarrier", "state")
    assert_clean(body.replace("{}", "%d2"))


def test_a_state_is_of_its_mbarrier():
    both = init(2) + init(2, "empty") + "@!%p0 bra END;\nmbarrier.arrive.shared::cta.b64 %d2, [full];\n{}\nEND:"
    assert_reported(both.format("mbarrier.test_wait.shared::cta.b64 %p1, [empty], %d2;"), "mbarrier", "state")
    assert_clean(both.format("mbarrier.test_wait.shared::cta.b64 %p1, [full], %d2;"))


def test_only_states_without_completion_have_a_count():
    body = init(2) + "@!%p0 bra END;\n{}\nmbarrier.pending_count.b64 %r4, %d2;\nst.global.u32 [%d1], %r4;\nEND:"
    assert_clean(body.format("mbarrier.arrive.noComplete.shared::cta.b64 %d2, [full], 1;"), [2, *[-1] * 31])
    assert_reported(body.format("mbarrier.arrive.shared::cta.b64 %d2, [full];"), "mbarrier", ".noComplete")


def test_no_complete_must_not_complete():
    body = init(2) + "@%p0 mbarrier.arrive.noComplete.shared::cta.b64 %d2, [full], {};"
    assert_reported(body.format(2), "mbarrier", "noComplete")
    assert_clean(body.format(1))


def test_arrive_drop_takes_part_no_more():
    phase = "mbarrier.arrive.shared::cta.b64 _, [full];"
    body = (
        init(2)
        + f"@!%p0 bra END;\nmbarrier.arrive_drop.shared::cta.b64 %d2, [full];\n{phase}\n{wait(0)}{phase}\n"
        + wait(1, name="V")
        + "st.global.u32 [%d1], %r0;\nEND:"
    )
    assert_clean(body, numpy.concatenate([[0], numpy.full(31, -1)]))
    assert_reported(body.replace("arrive_drop", "arrive"), "deadlock")


def test_counts():
    for count in (0, 1 << 20):
        assert_reported(init(count), "mbarrier count")
    assert_clean(init((1 << 20) - 1))
    three = "@%p0 mbarrier.arrive.shared::cta.b64 _, [full], {};"
    assert_reported(init(2) + three.format(3), "mbarrier count", "3 arrivals")
    assert_reported(init(2) + three.format(0), "mbarrier count")
    assert_clean(init(2) + three.format(2) + wait(0))


def test_bytes_hold_the_phase_back():
    expect = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {};\n"
    complete = "@%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [full], {};\n"
    assert_clean(init() + expect.format(64) + complete.format(64) + wait(0))
    assert_reported(init() + expect.format(64) + complete.format(48) + wait(0), "deadlock", "16 bytes are missing")
    assert_reported(init() + expect.format(1 << 20), "mbarrier count", "expect-tx")
    assert_reported(init() + complete.format(1 << 20), "mbarrier count", "complete-tx")
    assert_reported(
        init() + 2 * expect.format(1 << 19).replace("arrive.", "").replace("_, ", ""), "mbarrier count", "1048576 bytes"
    )
    alone = "@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [full], 32;\n"
    assert_clean(init() + alone + ONE_ARRIVES + complete.format(32) + wait(0))


def test_complete_tx_publishes_nothing():
    text = """
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 4;
bar.warp.sync 0xffffffff;
st.shared.u32 [%r4], %r0;
@%p0 mbarrier.complete_tx.shared::cta.b64 [full], 4;
"""
    assert_reported(message(text, wait(0), 1), "race", threads=64)


def test_each_phase_is_waited_for_before_the_next_arrival():
    twice = init() + "@!%p0 bra END;\n" + ARRIVE + "{}" + ARRIVE + wait(1, name="V") + "END:"
    assert_reported(twice.format(""), "mbarrier phase")
    assert_clean(twice.format(wait(0)))


def test_initialised_twice_and_invalidated():
    again = init() + "{}" + init(1)
    assert_reported(again.format(""), "mbarrier", "lives at shared")
    assert_clean(again.format("@%p0 mbarrier.inval.shared::cta.b64 [full];\n") + ONE_ARRIVES + wait(0))


def test_invalidated_without_synchronisation():
    """Whoever invalidates it comes after all that use it."""
    body = init(64) + ARRIVE + "{}@%p0 mbarrier.inval.shared::cta.b64 [full];"
    assert_clean(body.format("bar.sync 0;\n"), threads=64)
    one_waits = f"@!%p0 bra END;\n{wait(0)}"
    assert_clean(body.format(one_waits) + "END:", threads=64)
    waits = init(1) + ONE_ARRIVES + wait(0) + "{}@%p0 mbarrier.inval.shared::cta.b64 [full];"
    assert_clean(waits.format("bar.sync 0;\n"), threads=64)
    found = [r for seed in range(8) for r in run(waits.format(""), 64, seed=seed)[1].reports]
    assert any(report.startswith("[race]") and "may not have been read yet" in report for report in found)


def test_no_mbarrier_there():
    assert_reported("bar.sync 0;" + ONE_ARRIVES, "mbarrier", "there is no mbarrier")
    gone = init() + "@%p0 mbarrier.inval.shared::cta.b64 [full];\nbar.sync 0;\n" + ONE_ARRIVES
    assert_reported(gone, "mbarrier", "there is no mbarrier")


def test_invalidated_under_a_waiting_warp():
    body = (
        init()
        + "setp.ge.u32 %p2, %r0, 32;\n@%p2 bra WAITS;\n{}"
        + "@%p0 mbarrier.inval.shared::cta.b64 [full];\nbra END;\nWAITS:\n"
        + wait(0)
        + "END:"
    )
    assert_reported(body.format(""), "mbarrier", threads=64, seeds=8)


def test_used_without_synchronisation_with_its_init():
    body = "@%p0 mbarrier.init.shared::cta.b64 [full], 64;\n{}\n" + ARRIVE
    everyone = dict(threads=64, schedule="in_turn", seeds=8)
    assert_reported(body.format("fence.mbarrier_init.release.cluster;"), "race", "mbarrier.init", **everyone)
    assert_clean(body.format("bar.sync 0;"), threads=64)
    relaxed = "fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;\n"
    assert_clean(body.format(relaxed), threads=64)
    unfenced = relaxed.split("\n", 1)[1]
    assert_reported(body.format(unfenced), "race", "mbarrier.init", threads=64)


def test_one_lane_s_init_is_known_to_its_converged_warp():
    """Instructions of a warp that has not diverged are issued in order: only the strict mode wants a barrier."""
    body = "@%p0 mbarrier.init.shared::cta.b64 [full], 32;\n{}\n" + ARRIVE
    assert_clean(body.format(""))
    assert_reported(body.format(""), "race", "mbarrier.init", races=2)
    assert_clean(body.format("bar.warp.sync 0xffffffff;"), races=2)
    apart = body.format("@%p0 bra AHEAD;") + "\nAHEAD:"
    assert_reported(apart, "race", "mbarrier.init")
    assert_clean(apart.replace("@%p0 bra", "bar.warp.sync 0xffffffff;\n@%p0 bra"))


def test_fences_of_two_makers():
    """A later fence of another thread for its own mbarrier takes nothing away from the first."""
    phase = "barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;\n"
    fence = "fence.mbarrier_init.release.cluster;\n"
    body = f"""
setp.eq.u32 %p1, %r0, 32;
@%p0 mbarrier.init.shared::cta.b64 [full], 64;
@%p0 {fence}{phase}
@%p1 mbarrier.init.shared::cta.b64 [empty], 64;
@%p1 {fence}
{ARRIVE}
"""
    assert_clean(body, threads=64)
    assert_reported(body.replace(f"@%p0 {fence}", ""), "race", "mbarrier.init", threads=64)


def test_its_bytes_are_its_own():
    load, store = "@%p0 ld.shared.u32 %r4, [full];", "@%p0 st.shared.u32 [full+4], %r0;"
    for access in (load, store):
        assert_reported(init() + access, "mbarrier", "part of an mbarrier")
    freed = init() + "@%p0 mbarrier.inval.shared::cta.b64 [full];\n"
    assert_clean(freed + store)


def test_a_parity_is_0_or_1():
    assert_reported(init() + wait(3), "mbarrier", "parity")


def test_one_lane_waits_while_the_others_are_at_a_warp_barrier():
    """A spinning lane of a diverged warp must not keep copies or other warps from going on."""
    text = "@!%p3 bra TOGETHER;\n" + wait(0) + "TOGETHER:\nbar.warp.sync 0xffffffff;\n"
    body = message(ARRIVE, "setp.eq.u32 %p3, %r0, 32;\n" + text, 32)
    for schedule in ("random", "in_turn", "greedy", "backwards"):
        assert_clean(body, EXPECTED, threads=64, schedule=schedule, max_steps=100_000)


def test_generic_addresses():
    body = (
        init()
        + "cvta.shared.u64 %d5, full;\n"
        + "@%p0 mbarrier.arrive.b64 _, [%d5];\n"
        + wait(0).replace(".shared::cta", "").replace("[full]", "[%d5]")
        + "st.global.u32 [%d1], %r0;"
    )
    assert_clean(
        body.replace("cvta.shared.u64 %d5, full", "mov.u64 %d5, full;\ncvta.shared.u64 %d5, %d5"), numpy.arange(32)
    )
    assert_reported(init() + "@%p0 mbarrier.arrive.b64 _, [%d0];", "out of bounds")


CLUSTER = (
    """
mov.u32 %r10, %cluster_ctarank;
mov.u32 %r11, %ctaid.x;
mad.lo.u32 %r12, %r11, 32, %r0;
mul.wide.u32 %d1, %r12, 4;
add.u64 %d1, %d0, %d1;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
setp.eq.u32 %p4, %r10, 0;
mapa.shared::cluster.u32 %r13, %r2, 1;
mapa.shared::cluster.u32 %r14, %r1, 1;
@!%p4 bra WAITS;
@%p0 st.shared::cluster.u32 [%r14], 42;
@%p0 mbarrier.arrive.release.{scope}.shared::cluster.b64 _, [%r13];
bra END;
WAITS:
"""
    + wait(0, order=".acquire.{scope}")
    + """
ld.shared.u32 %r6, [data];
st.global.u32 [%d1], %r6;
END:
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
)
IN_CLUSTER = numpy.concatenate([numpy.full(32, -1), numpy.full(32, 42)])


def test_an_arrival_at_another_block():
    assert_clean(CLUSTER.format(scope="cluster"), IN_CLUSTER, grid=2, cluster=2)
    assert_clean(CLUSTER.format(scope="cta"), IN_CLUSTER, grid=2, cluster=2)


def test_strict_mode_wants_the_scope_of_a_cluster():
    assert_reported(CLUSTER.format(scope="cta"), "mbarrier scope", grid=2, cluster=2, races=2)
    assert_clean(CLUSTER.format(scope="cluster"), IN_CLUSTER, grid=2, cluster=2, races=2)


def test_a_wait_is_for_the_own_block():
    body = CLUSTER.format(scope="cluster").replace("[full], 0", "[%r13], 0")
    remote = body.replace("setp.eq.u32 %p4, %r10, 0;", "setp.eq.u32 %p4, %r10, 1;")
    assert_reported(remote, "out of bounds", grid=2, cluster=2)


@pytest.mark.parametrize(
    "line",
    [
        "mbarrier.arrive.shared::cluster.b64 %d2, [full];",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p1, [full], 0;",
        "mbarrier.arrive.noComplete.shared::cta.b64 %d2, [full];",
        "mbarrier.arrive.expect_tx.shared::cta.b64 %d2, [full];",
        "mbarrier.arrive.sys.shared::cta.b64 %d2, [full];",
        "mbarrier.arrive.shared::cta.b64 [full];",
        "mbarrier.arrive.release.shared::cta.b64 %d2, [full];",
        "mbarrier.arrive.cluster.shared::cta.b64 %d2, [full];",
        "mbarrier.arrive.noComplete.relaxed.cta.shared::cta.b64 %d2, [full], 1;",
        "mbarrier.arrive.noComplete.release.cluster.shared::cta.b64 %d2, [full], 1;",
        "mbarrier.try_wait.parity.acquire.shared::cta.b64 %p1, [full], 0;",
        "mbarrier.expect_tx.relaxed.shared::cta.b64 [full], 16;",
        "mbarrier.try_wait.parity.release.cta.shared::cta.b64 %p1, [full], 0;",
        "mbarrier.finish.shared::cta.b64 [full];",
    ],
)
def test_what_does_not_exist_is_refused(line):
    """ptxas 13.0 refuses each of them, too."""
    with pytest.raises(PtxError):
        Kernel(kernel_text(BEGIN + line + "\nret;", shared=SHARED))
