"""The memory consistency model (PTX ISA 8): scopes, release and acquire patterns, what is morally strong.

The verdicts are those of the model's text, worked out by hand for each program. None depends on the order of warps.
"""

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from tests.emulation.orders import assert_clean as assert_clean_block
from tests.emulation.orders import assert_reported as assert_reported_block
from tests.support.ptx import kernel_text

# %d0: where `out` is. Words 0 and 1 are flags, the data lie from word 8 on, results from word 40 on.
BEGIN = "ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmul.wide.u32 %d1, %r0, 4;\n"
BEGIN += "add.u64 %d1, %d0, %d1;\n"


def run(body, grid=2, block=1, cluster=1, **options):
    out = numpy.zeros(128, numpy.int32)
    kernel = Kernel(kernel_text(BEGIN + body + "\nret;"))
    outcome = kernel.run(grid, block, [out], writable=[out], cluster=cluster, max_steps=10**6, **options)
    return out, outcome


def reports(body, **options):
    """For every order: whether it is clean, or has a race. Nothing else may be found."""
    found = []
    for number, schedule in enumerate(SCHEDULES):
        out, outcome = run(body, schedule=schedule, landing=LANDINGS[number % 3], seed=number, **options)
        kinds = {report.split("]")[0][1:] for report in outcome.reports}
        assert kinds <= {"global race"}, outcome.reports
        found.append((bool(kinds), out))
    return found


def assert_clean(body, word=None, value=None, **options):
    for is_race, out in reports(body, **options):
        assert not is_race
        assert word is None or out[word] == value


def assert_race(body, **options):
    assert all(is_race for is_race, _ in reports(body, **options))


def message(send, wait, after=""):
    """Block 0 writes and sends, block 1 polls and reads."""
    return f"""
setp.ne.u32 %p0, %r1, 0;
@%p0 bra READER;
st.global.u32 [%d0+32], 42;
{send}
bra END;
READER:
{wait}
setp.eq.u32 %p1, %r2, 0;
@%p1 bra READER;
{after}
ld.global.u32 %r3, [%d0+32];
st.global.u32 [%d0+160], %r3;
END:"""


RELEASE, ACQUIRE = "st.release.gpu.global.u32 [%d0], 1;", "ld.acquire.gpu.global.u32 %r2, [%d0];"
STORE, LOAD = "st.relaxed.gpu.global.u32 [%d0], 1;", "ld.relaxed.gpu.global.u32 %r2, [%d0];"
FENCE = "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    "send, wait, after",
    [
        (RELEASE, ACQUIRE, ""),
        (RELEASE.replace("gpu", "sys"), ACQUIRE, ""),
        (FENCE + STORE, LOAD, FENCE),
        ("fence.release.gpu;" + STORE, LOAD, "fence.acquire.gpu;"),
        ("fence.sc.gpu;" + STORE, LOAD, "membar.gl;"),
        ("membar.sys;" + STORE.replace("relaxed.gpu", "volatile"), LOAD.replace("relaxed.gpu", "volatile"), FENCE),
        ("atom.release.gpu.global.exch.b32 %r9, [%d0], 1;", "atom.acquire.gpu.global.or.b32 %r2, [%d0], 0;", ""),
        (FENCE + "red.relaxed.gpu.global.add.u32 [%d0], 1;", ACQUIRE, ""),
    ],
)
def test_patterns_that_synchronise(send, wait, after):
    assert_clean(message(send, wait, after), 40, 42)


@pytest.mark.parametrize(
    "send, wait, after",
    [
        # a scope that does not hold the other block: of the release, of the acquire, of a fence, of the accesses
        (RELEASE.replace("gpu", "cta"), ACQUIRE, ""),
        (RELEASE, ACQUIRE.replace("gpu", "cta"), ""),
        (RELEASE.replace("gpu", "cluster"), ACQUIRE, ""),
        (FENCE.replace("gpu", "cta") + STORE, ACQUIRE, ""),
        ("membar.cta;" + STORE, ACQUIRE, ""),
        (RELEASE, LOAD, FENCE.replace("gpu", "cta")),
        (RELEASE, LOAD, FENCE.replace("gpu", "cluster")),
        (FENCE + STORE.replace("gpu", "cta"), ACQUIRE, ""),
        (RELEASE, LOAD.replace("gpu", "cta"), FENCE),
        # a relaxed read or write, and no fence
        (RELEASE, LOAD, ""),
        (STORE, ACQUIRE, ""),
        (STORE + FENCE, ACQUIRE, ""),
        # a fence of the other side
        ("fence.acquire.gpu;" + STORE, ACQUIRE, ""),
        (RELEASE, LOAD, "fence.release.gpu;"),
    ],
)
def test_patterns_that_do_not(send, wait, after):
    assert_race(message(send, wait, after))


def test_the_scope_of_a_cluster():
    near = message(RELEASE.replace("gpu", "cluster"), ACQUIRE.replace("gpu", "cluster"))
    assert_clean(near, 40, 42, cluster=2)
    assert_race(near)
    assert_race(near.replace("release.cluster", "release.cta"), cluster=2)


# Block 0 has 32 threads that write; its thread 0 sends. Thread 0 of block 1 polls, and 32 threads read.
MANY = """
setp.ne.u32 %p2, %r0, 0;
setp.ne.u32 %p0, %r1, 0;
@%p0 bra READER;
st.global.u32 [%d1+32], %r0;
{before}
@!%p2 st.release.gpu.global.u32 [%d0], 1;
bra END;
READER:
@%p2 bra MEET;
POLL:
ld.acquire.gpu.global.u32 %r2, [%d0];
setp.eq.u32 %p1, %r2, 0;
@%p1 bra POLL;
MEET:
{after}
ld.global.u32 %r3, [%d1+32];
st.global.u32 [%d1+160], %r3;
END:"""


def test_a_release_is_of_what_its_thread_has_seen():
    barrier = "bar.warp.sync -1;"
    assert_clean(MANY.format(before=barrier, after=barrier), 71, 31, block=32)
    assert_race(MANY.format(before="", after=barrier), block=32)


def test_an_acquire_is_for_its_thread():
    assert_race(MANY.format(before="bar.warp.sync -1;", after=""), block=32)


# Block 0 sends 1, block 1 makes 2 of it. Block 2 waits until that has happened, and only then acquires.
RELAY = """
setp.eq.u32 %p0, %r1, 1;
@%p0 bra RELAY;
setp.eq.u32 %p0, %r1, 2;
@%p0 bra READER;
st.global.u32 [%d0+32], 42;
st.release.gpu.global.u32 [%d0], 1;
bra END;
RELAY:
ld.relaxed.gpu.global.u32 %r2, [%d0];
setp.ne.u32 %p1, %r2, 1;
@%p1 bra RELAY;
{0}
st.relaxed.gpu.global.u32 [%d0+4], 1;
bra END;
READER:
ld.relaxed.gpu.global.u32 %r2, [%d0+4];
setp.ne.u32 %p1, %r2, 1;
@%p1 bra READER;
ld.acquire.gpu.global.u32 %r2, [%d0];
ld.global.u32 %r3, [%d0+32];
st.global.u32 [%d0+160], %r3;
END:"""


def test_atomics_pass_on_what_was_released_and_stores_do_not():
    """Observation order goes through atomic operations (8.9.2); a store's readers have read nothing before it."""
    assert_clean(RELAY.format("atom.relaxed.gpu.global.exch.b32 %r9, [%d0], 2;"), 40, 42, grid=3)
    assert_clean(RELAY.format("red.relaxed.gpu.global.add.u32 [%d0], 1;"), 40, 42, grid=3)
    store = "st.relaxed.gpu.global.u32 [%d0], 2;"
    assert_race(RELAY.format(store), grid=3)
    assert_clean(RELAY.format("fence.acq_rel.gpu;" + store), 40, 42, grid=3)


def test_a_strong_write_behind_a_release_at_the_same_place():
    """8.8: a release operation on M, then a strong write on M. Elsewhere it is no pattern."""
    again = "st.release.gpu.global.u32 [{0}], 0;\nst.relaxed.gpu.global.u32 [%d0], 1;"
    assert_clean(message(again.format("%d0"), ACQUIRE), 40, 42)
    assert_race(message(again.format("%d0+4"), ACQUIRE))


def test_a_strong_read_before_an_acquire_at_the_same_place():
    """8.8: a strong read on M, then an acquire operation on M. Elsewhere it is no pattern."""
    assert_clean(message(RELEASE, LOAD, ACQUIRE), 40, 42)
    assert_race(message(RELEASE, LOAD, ACQUIRE.replace("%d0", "%d0+4")))
    overwritten = message(RELEASE, LOAD, "st.relaxed.gpu.global.u32 [%d0], 7;\n" + ACQUIRE)
    assert_clean(overwritten, 40, 42)


def test_a_cas_that_fails_writes_nothing():
    cas = "atom.release.gpu.global.cas.b32 %r9, [%d0], {0}, 1;\n"
    assert_clean(message(cas.format(0), ACQUIRE), 40, 42)
    assert_race(message(cas.format(7) + STORE, ACQUIRE))
    # so it does not conflict with a read
    reads = "setp.eq.u32 %p0, %r1, 0;\n@%p0 ld.global.u32 %r2, [%d0];\n@!%p0 atom.global.cas.b32 %r9, [%d0], {0}, 1;"
    assert_clean(reads.format(7))
    assert_race(reads.format(0))


@pytest.mark.parametrize("scope, cluster, is_enough", [
    ("cta", 1, False), ("cta", 2, False), ("cluster", 1, False), ("cluster", 2, True), ("gpu", 1, True),
    ("sys", 1, True),
])  # fmt: skip
def test_atomics_that_do_not_include_each_other_are_a_race(scope, cluster, is_enough):
    body = f"red.relaxed.{scope}.global.add.u32 [%d0], 1;"
    if is_enough:
        assert_clean(body, 0, 2, cluster=cluster)
    else:
        assert_race(body, cluster=cluster)


def test_one_narrow_scope_is_enough_for_a_race():
    body = "setp.eq.u32 %p0, %r1, 0;\n@%p0 red.relaxed.cta.global.add.u32 [%d0], 1;\n"
    assert_race(body + "@!%p0 red.global.add.u32 [%d0], 1;")
    assert_clean(body.replace(".cta", ".gpu") + "@!%p0 red.global.add.u32 [%d0], 1;", 0, 2)


def test_accesses_that_overlap_in_part_are_not_morally_strong():
    body = "setp.eq.u32 %p0, %r1, 0;\n@%p0 red.global.add.u32 [%d0+4], 1;\n@!%p0 red.global.add.{0};"
    assert_clean(body.format("u32 [%d0+4], 1"), 1, 2)
    assert_race(body.format("u64 [%d0], 1"))
    # a packed type is a pair of its halves (8.2.5)
    halves = "mov.b32 %r9, 0;\nmov.b16 %h1, 0;\nsetp.eq.u32 %p0, %r1, 0;\n@%p0 red.global.add.noftz.f16x2 [%d0], %r9;\n"
    assert_clean(halves + "@!%p0 red.global.add.noftz.f16 [%d0], %h1;")
    assert_race(halves + "@!%p0 red.global.add.u32 [%d0], 0;")


def test_a_weak_read_is_not_forgotten_for_a_strong_one():
    """Both come before a strong write of another thread: the weak one races with it."""
    body = "setp.eq.u32 %p0, %r1, 0;\n{0}\n@%p0 ld.relaxed.gpu.global.u32 %r3, [%d0];\n@!%p0 " + STORE
    assert_clean(body.format(""))
    assert_race(body.format("@%p0 ld.global.u32 %r2, [%d0];"))


SHARED_WORD = """
setp.eq.u32 %p0, %r0, 0;
@%p0 st.shared.u32 [%r3], 0;
bar.sync 0;
setp.ge.u32 %p1, %r0, 32;
{0}
"""


def test_the_same_in_shared_memory():
    strong = "@!%p1 ld.relaxed.cta.shared.u32 %r6, [%r3];\n@%p1 red.shared.add.u32 [%r3], 1;"
    assert_clean_block(SHARED_WORD.format(strong))
    assert_reported_block(SHARED_WORD.format("@!%p1 ld.shared.u32 %r6, [%r3];\n" + strong), "race")
    partly = "@!%p1 red.shared.add.u32 [%r3], 1;\n@%p1 red.shared.{0};"
    assert_clean_block(SHARED_WORD.format(partly.format("add.u32 [%r3], 1")))
    wide = SHARED_WORD.replace("@%p0 st.shared.u32 [%r3], 0;", "@%p0 st.shared.v2.u32 [%r3], {{0, 0}};")
    assert_reported_block(wide.format(partly.format("add.u64 [%r3], 1")), "race")


def test_bulk_reductions_and_reds_are_of_two_proxies():
    body = """
st.shared.u32 [%r2], 1;
fence.proxy.async;
bar.sync 0;
setp.eq.u32 %p0, %r0, 0;
@!%p0 bra OTHERS;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d0], [%r3], 16;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
OTHERS:
{0}
setp.eq.u32 %p1, %r0, 32;
@%p1 red.global.add.u32 [%d0], 1;
"""
    assert_clean_block(body.format("bar.sync 1;"))
    assert_reported_block(body.format(""), "global race")
