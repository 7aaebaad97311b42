"""cp.async, bulk copies and bulk groups (PTX ISA 9.7.9.25). Every fault has its corrected twin."""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from tests.support.ptx import kernel_text

LANDINGS = ("late", "early", "random")
SHARED = ".shared .align 128 .b8 data[1024];\n.shared .align 128 .b8 more[1024];\n.shared .align 8 .b64 full;"
PARAMETERS = ".param .u64 x, .param .u64 out"
BEGIN = """
ld.param.u64 %d8, [x];
ld.param.u64 %d9, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d10, %r0, 16;
add.u64 %d0, %d8, %d10;
add.u64 %d1, %d9, %d10;
mov.u32 %r1, data;
mov.u32 %r2, more;
shl.b32 %r3, %r0, 4;
add.u32 %r4, %r1, %r3;
xor.b32 %r5, %r4, 16;
setp.eq.u32 %p0, %r0, 0;
setp.ne.u32 %p7, %r0, %r0;
"""
COPY = "cp.async.cg.shared.global [%r4], [%d0], 16;\n"
COMMIT = "cp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"
STORE = "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];\nst.global.v4.u32 [%d1], {%r10, %r11, %r12, %r13};\n"
NEIGHBOUR = STORE.replace("[%r4]", "[%r5]")
BARRIER = "bar.sync 0;\n"


def source(words=128):
    return numpy.arange(1, words + 1, dtype=numpy.int32)


def fill_in(body, *values):
    """The values in place of {}, one after the other."""
    for value in values:
        body = body.replace("{}", str(value), 1)
    return body


def run(body, x, threads, size, target="sm_90a", also=(), **options):
    out = numpy.full(size, -7, numpy.int32)
    text = kernel_text(BEGIN + body + "\nret;", parameters=PARAMETERS, shared=SHARED, target=target)
    x = x.copy()
    outcome = Kernel(text).run(
        options.pop("grid", 1), threads, [x, out], writable=[out, *([x] if also else [])], **options
    )
    return x, out, outcome


def assert_clean(body, expected=None, x=None, threads=32, size=128, seeds=3, **options):
    x = source() if x is None else x
    for landing in LANDINGS:
        for seed in range(seeds):
            _, out, outcome = run(body, x, threads, size, landing=landing, seed=seed, **options)
            assert not outcome.reports, outcome.reports
            if expected is not None:
                numpy.testing.assert_array_equal(out, expected, err_msg=landing)


def assert_reported(body, kind, words="", threads=32, size=128, seeds=3, landings=LANDINGS, x=None, **options):
    x = source() if x is None else x
    for landing in landings:
        found = []
        for seed in range(seeds):
            found += run(body, x, threads, size, landing=landing, seed=seed, **options)[2].reports
        assert any(r.startswith(f"[{kind}]") and words in r for r in found), (landing, found)


# ------------------------------------------------------------------------------------------------------------ cp.async


def test_a_copy_is_seen_by_its_thread_after_its_wait():
    assert_clean(COPY + COMMIT + WAIT + STORE, source())
    assert_clean(COPY + "cp.async.wait_all;\n" + STORE, source(), target="sm_80")


def test_without_a_wait():
    assert_reported(COPY + COMMIT + STORE, "read in flight")
    assert_reported(COPY + COMMIT + "cp.async.wait_group 1;\n" + STORE, "read in flight")
    assert_reported(COPY + WAIT + STORE, "read in flight")  # never committed
    late = run(FILL + COPY + COMMIT + STORE, source(), 32, 128, landing="late")[1]
    assert (late == -1).all(), "what was there before is gone until the copy lands"


def test_another_thread_needs_a_barrier_too():
    assert_reported(COPY + COMMIT + WAIT + NEIGHBOUR, "intra-warp race")
    expected = source().reshape(16, 2, 4)[:, ::-1].reshape(-1)
    assert_clean(COPY + COMMIT + WAIT + BARRIER + NEIGHBOUR, expected)
    assert_reported(COPY + COMMIT + BARRIER + WAIT + NEIGHBOUR, "intra-warp race")


def test_older_groups_are_over_first():
    second = COPY.replace("%r4", "%r6").replace("%d0", "%d2")
    begin = "add.u32 %r6, %r4, 512;\nadd.u64 %d2, %d0, 512;\n"
    body = begin + COPY + COMMIT + second + COMMIT + "cp.async.wait_group {};\n" + STORE.replace("%r4", "{}") + WAIT
    assert_clean(fill_in(body, 1, "%r4"), source(), x=source(256))
    assert_clean(fill_in(body, 0, "%r6"), source(256)[128:], x=source(256))
    assert_reported(fill_in(body, 1, "%r6"), "read in flight", x=source(256))


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("valid", [0, 2, 4, 7, 16])
def test_src_size_fills_with_zeros(size, valid):
    if valid > size:
        valid = size
    level = "cg" if size == 16 else "ca"
    body = f"""
st.shared.v4.u32 [%r4], {{%r0, %r0, %r0, %r0}};
mov.u32 %r7, {valid};
cp.async.{level}.shared.global [%r4], [%d0], {size}, %r7;
cp.async.wait_all;
{STORE}"""
    expected = numpy.repeat(numpy.arange(32, dtype=numpy.int32), 4).view(numpy.uint8).reshape(32, 16).copy()
    expected[:, :size] = 0
    expected[:, :valid] = source().view(numpy.uint8).reshape(32, 16)[:, :valid]
    assert_clean(body, expected.reshape(-1).view(numpy.int32))


def test_src_size_beyond_cp_size():
    assert_reported(COPY.replace("16;", "16, 17;"), "cp.async", "17 bytes")


def test_ignore_src_is_a_predicate():
    zeros = numpy.zeros(128, numpy.int32)
    for predicate, expected in (("%p7", source()), ("!%p7", zeros)):
        assert_clean(COPY.replace("16;", f"16, {predicate};") + COMMIT + WAIT + STORE, expected)
    first = numpy.concatenate([zeros[:4], source()[4:]])
    assert_clean(COPY.replace("16;", "16, %p0;") + COMMIT + WAIT + STORE, first)


def test_a_source_of_no_bytes_may_lie_anywhere():
    body = "add.u64 %d0, %d0, {};\n" + COPY.replace("16;", "16, {};") + COMMIT + WAIT + STORE
    assert_clean(fill_in(body, 1 << 20, 0), numpy.zeros(128, numpy.int32))
    assert_reported(fill_in(body, 1 << 20, 4), "out of bounds")
    assert_reported(fill_in(body, 4, 0), "misaligned")


def test_a_misaligned_destination():
    assert_reported("add.u32 %r4, %r4, 8;\n" + COPY, "misaligned")


def test_two_copies_to_one_place():
    assert_reported(COPY + COPY + COMMIT + WAIT, "write in flight")
    assert_clean(COPY + COMMIT + WAIT + COPY + COMMIT + WAIT + STORE, source())


def test_a_buffer_that_others_still_read():
    again = COPY + COMMIT + WAIT + BARRIER + NEIGHBOUR + "{}" + COPY + COMMIT + WAIT
    assert_reported(fill_in(again, ""), "intra-warp race", "may not have been read")
    assert_clean(fill_in(again, BARRIER))


def test_writing_a_source_in_flight():
    body = COPY + COMMIT + "{}st.global.u32 [%d0], %r0;\n" + WAIT
    assert_reported(fill_in(body, ""), "copy in flight", also=("x",))
    assert_clean(fill_in(body, WAIT), also=("x",))


def test_a_source_that_another_thread_wrote():
    body = (
        "xor.b32 %r7, %r3, 16;\ncvt.u64.u32 %d2, %r7;\nadd.u64 %d2, %d8, %d2;\nst.global.u32 [%d2], %r0;\n{}"
        + COPY
        + COMMIT
        + WAIT
    )
    assert_reported(fill_in(body, ""), "global race", also=("x",))
    assert_clean(fill_in(body, BARRIER), also=("x",))


def test_exit_before_the_wait():
    assert_reported(COPY + COMMIT, "exit", "cp.async")
    assert_reported(COPY, "exit", "cp.async")


ARRIVALS = """
@%p0 mbarrier.init.shared::cta.b64 [full], {count};
bar.sync 0;
{copy}
cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [full];
{also}
{wait}
{store}
"""
FULL = "W:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0;\n@!%p1 bra W;\n"
SWAPPED = source().reshape(16, 2, 4)[:, ::-1].reshape(-1)


def test_copies_arrive_at_an_mbarrier():
    """Whoever waits for the phase sees the copies of all threads."""
    noinc = dict(count=32, noinc=".noinc", also="", copy=COPY, store=NEIGHBOUR)
    assert_clean(ARRIVALS.format(wait=FULL, **noinc), SWAPPED)
    assert_reported(ARRIVALS.format(wait="", **noinc), "read in flight", landings=("late", "random"))
    assert_reported(ARRIVALS.format(wait="", **noinc), "race", landings=("early",))


def test_an_arrival_that_raises_the_pending_count_is_beside_the_thread_s_own():
    also = "mbarrier.arrive.shared::cta.b64 _, [full];"
    body = ARRIVALS.format(count=32, noinc="", also=also, copy=COPY, store=NEIGHBOUR, wait=FULL)
    assert_clean(body, SWAPPED)
    assert_reported(body.replace(also, ""), "deadlock")


def test_an_arrival_releases_the_copies_and_nothing_else():
    copy = COPY + "add.u32 %r6, %r4, 512;\nst.shared.v4.u32 [%r6], {%r0, %r0, %r0, %r0};\n"
    store = NEIGHBOUR.replace("[%r5]", "[%r5+512]")
    body = dict(count=32, noinc=".noinc", also="", copy=copy, store=store, wait=FULL)
    assert_reported(ARRIVALS.format(**body), "intra-warp race")
    body["also"] = BARRIER
    assert_clean(ARRIVALS.format(**body))


def test_too_many_arrivals_of_copies():
    body = ARRIVALS.format(count=31, noinc=".noinc", also="", copy=COPY, store="", wait=FULL)
    assert_reported(body, "mbarrier phase", landings=("early",))
    assert_reported(body, "exit", landings=("late",))


def test_wait_group_beside_an_mbarrier():
    both = ARRIVALS.format(count=32, noinc=".noinc", also=COMMIT + WAIT, copy=COPY, wait="", store=STORE)
    assert_clean(both, source())
    assert_reported(both.replace(WAIT, ""), "read in flight", landings=("late",))


# --------------------------------------------------------------------------------------------------------- bulk copies

INIT = "@%p0 mbarrier.init.shared::cta.b64 [full], 1;\nbar.sync 0;\n"
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {};\n"
BULK = "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d8], {}, [full];\n"
LOAD = INIT + EXPECT.format(512) + BULK.format(512)


def test_a_bulk_copy_is_seen_by_who_waits_for_its_phase():
    assert_clean(LOAD + FULL + STORE, source())
    to_block = LOAD.replace("shared::cluster.global", "shared::cta.global")
    assert_clean(to_block + FULL + STORE, source())
    assert_reported(LOAD + STORE + FULL, "read in flight", landings=("late",))
    assert_reported(LOAD + STORE + FULL, "race", landings=("early",))


def test_bytes_that_do_not_match():
    assert_reported(INIT + EXPECT.format(528) + BULK.format(512) + FULL, "deadlock", "16 bytes are missing")
    assert_reported(INIT + EXPECT.format(496) + BULK.format(512) + FULL, "deadlock", "-16 bytes")


def test_a_bulk_copy_is_of_16_bytes():
    assert_reported(INIT + BULK.format(504), "misaligned")
    assert_reported(INIT + BULK.format(512).replace("[%r1]", "[%r1+8]"), "misaligned")
    assert_reported(INIT + BULK.format(496).replace("[%d8]", "[%d8+8]"), "misaligned")
    assert_reported(INIT + BULK.format(528), "out of bounds")


def test_a_bulk_copy_that_nobody_waits_for():
    assert_reported(LOAD, "exit", "nobody has waited", landings=("late",))


def test_generic_writes_before_a_bulk_copy_need_a_proxy_fence():
    body = FILL + "{}" + BARRIER + LOAD + FULL + STORE
    assert_reported(fill_in(body, ""), "proxy")
    assert_clean(fill_in(body, FENCE), source())


def test_a_bulk_copy_on_an_mbarrier_that_is_gone():
    gone = LOAD + "@%p0 mbarrier.inval.shared::cta.b64 [full];\n"
    assert_reported(gone, "mbarrier", landings=("late",))


def test_a_prefetch_changes_nothing():
    prefetch = "cp.async.bulk.prefetch.L2.global [%d8], 512;\n"
    assert_clean(prefetch + LOAD + FULL + STORE, source())
    assert_reported(prefetch.replace("512", "504"), "misaligned")
    assert_reported(prefetch.replace("[%d8]", "[%d8+8]"), "misaligned")


FILL = "st.shared.v4.u32 [%r4], {%r0, %r0, %r0, %r0};\n"
FENCE = "fence.proxy.async.shared::cta;\n"
OUT = "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d9], [%r1], 512;\n"
CLOSE = "@%p0 cp.async.bulk.commit_group;\n"
READ = "@%p0 cp.async.bulk.wait_group.read 0;\n"
DONE = "@%p0 cp.async.bulk.wait_group 0;\n"
ROWS = numpy.repeat(numpy.arange(32, dtype=numpy.int32), 4)


def test_a_bulk_store():
    assert_clean(FILL + FENCE + BARRIER + OUT + CLOSE + READ, ROWS)
    assert_clean(FILL + FENCE + BARRIER + OUT + CLOSE + DONE, ROWS, races=2)
    assert_reported(FILL + BARRIER + OUT + CLOSE + READ, "proxy")
    assert_reported(FILL + FENCE + OUT + CLOSE + READ, "intra-warp race")


def test_its_source_is_in_flight_until_the_wait():
    again = FILL + FENCE + BARRIER + OUT + CLOSE + "{}" + BARRIER + "st.shared.u32 [%r4], %r0;\n" + DONE
    assert_reported(fill_in(again, ""), "overwritten in flight")
    assert_clean(fill_in(again, READ), ROWS)
    assert_clean(fill_in(again, DONE), ROWS)
    assert_reported(fill_in(again, "@%p0 cp.async.bulk.wait_group.read 1;\n"), "overwritten in flight")
    no_barrier = fill_in(again, READ).replace(READ + BARRIER, READ)
    assert_reported(no_barrier, "intra-warp race")


def test_what_it_writes_is_seen_after_the_whole_wait_only():
    body = FILL + FENCE + BARRIER + OUT + CLOSE + "{}" + "@%p0 ld.global.u32 %r9, [%d9];\n" + DONE
    assert_reported(fill_in(body, READ), "copy in flight")
    assert_clean(fill_in(body, DONE), ROWS)
    others = FILL + FENCE + BARRIER + OUT + CLOSE + DONE + "{}ld.global.u32 %r9, [%d1];\n"
    assert_reported(fill_in(others, ""), "global race")
    assert_clean(fill_in(others, BARRIER), ROWS)


def test_exit_before_the_store_s_wait():
    assert_reported(FILL + FENCE + BARRIER + OUT + CLOSE, "exit", "waited")
    assert_reported(FILL + FENCE + BARRIER + OUT, "exit", "no group")
    assert_reported(FILL + FENCE + BARRIER + OUT + CLOSE + READ, "exit", races=2)


def test_a_store_into_what_is_not_writable():
    assert_reported(FILL + FENCE + BARRIER + OUT.replace("%d9", "%d8") + CLOSE + READ, "read-only")


def test_from_block_to_block():
    """Block 0 copies into block 1, whose mbarrier counts the bytes."""
    body = """
mov.u32 %r20, %cluster_ctarank;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
{fill}
{fence}
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
setp.ne.u32 %p2, %r20, 0;
@%p2 bra OTHER;
mapa.shared::cluster.u32 %r21, %r2, 1;
mov.u32 %r23, full;
mapa.shared::cluster.u32 %r22, %r23, 1;
@%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r21], [%r1], 512, [{mbarrier}];
bra END;
OTHER:
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
{wait}
add.u32 %r4, %r4, 1024;
{store}
END:
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
    right = dict(fill=FILL, fence=FENCE, mbarrier="%r22", wait=FULL, store=STORE)
    assert_clean(body.format(**right), ROWS, grid=2, cluster=2)
    assert_reported(body.format(**{**right, "fence": ""}), "proxy", grid=2, cluster=2)
    assert_reported(
        body.format(**{**right, "wait": ""}), "read in flight", grid=2, cluster=2, landings=("late",), seeds=8
    )
    assert_reported(body.format(**{**right, "mbarrier": "full"}), "mbarrier", "different blocks", grid=2, cluster=2)


def test_a_copy_from_shared_to_shared_memory_is_to_another_block():
    """9.7.9.25.4.1: the destination has to be in a different block, here it is the block's own."""
    body = """
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
FILL FENCE
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r20, %cluster_ctarank;
xor.b32 %r20, %r20, {};
mapa.shared::cluster.u32 %r21, %r2, %r20;
mov.u32 %r23, full;
mapa.shared::cluster.u32 %r22, %r23, %r20;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
@%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r21], [%r1], 512, [%r22];
WAIT
add.u32 %r4, %r4, 1024;
STORE
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
    for name, text in (("FILL", FILL), ("FENCE", FENCE), ("WAIT", FULL), ("STORE", STORE)):
        body = body.replace(name, text, 1)
    assert_clean(fill_in(body, 1), grid=2, cluster=2)
    assert_reported(fill_in(body, 0), "bulk copy", "must be in another block", grid=2, cluster=2)


def test_a_destination_in_shared_cta_is_the_block_s_own():
    """The same bytes by the same addresses: .shared::cluster reaches the other block, .shared::cta must not."""
    body = """
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r20, %cluster_ctarank;
xor.b32 %r20, %r20, 1;
mapa.shared::cluster.u32 %r21, %r1, %r20;
mov.u32 %r23, full;
mapa.shared::cluster.u32 %r22, %r23, %r20;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
@%p0 cp.async.bulk.{}.global.mbarrier::complete_tx::bytes [%r21], [%d8], 512, [%r22];
WAIT
STORE
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
""".replace("WAIT", FULL).replace("STORE", STORE)
    assert_clean(fill_in(body, "shared::cluster"), source(), grid=2, cluster=2)
    assert_reported(fill_in(body, "shared::cta"), "out of bounds", "another block", grid=2, cluster=2)


def test_blocks_reduce_into_one_of_them():
    """Both blocks of a pair add their rows into block 1, whose mbarrier counts the bytes of both."""
    body = """
mov.u32 %r20, %cluster_ctarank;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 1024;
add.u32 %r6, %r4, 1024;
st.shared.v4.u32 [%r6], {one, one, one, one};
fill
fence.proxy.async.shared::cta;
barrier.cluster.arrive;
barrier.cluster.wait;
mapa.shared::cluster.u32 %r21, %r2, 1;
mov.u32 %r23, full;
mapa.shared::cluster.u32 %r22, %r23, 1;
@%p0 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 [%r21], [%r1], 512, [%r22];
setp.ne.u32 %p2, %r20, 1;
@%p2 bra END;
wait
ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r6];
st.global.v4.u32 [%d1], {%r10, %r11, %r12, %r13};
END:
barrier.cluster.arrive;
barrier.cluster.wait;
"""
    body = body.replace("one", "%r30").replace("@%p0 mbarrier.init", "mov.u32 %r30, 1;\n@%p0 mbarrier.init", 1)
    body = body.replace("fill", FILL)
    assert_clean(body.replace("wait\nld", FULL + "ld"), 2 * ROWS + 1, grid=2, cluster=2)
    for kind, landing in (("exit", "late"), ("race", "early")):
        assert_reported(body.replace("wait\nld", "ld"), kind, grid=2, cluster=2, seeds=8, landings=(landing,))


def test_a_copy_to_a_block_that_has_exited():
    body = """
mov.u32 %r20, %cluster_ctarank;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
barrier.cluster.arrive;
barrier.cluster.wait;
setp.ne.u32 %p2, %r20, 0;
@%p2 bra OTHER;
mov.u16 %h0, 3;
mov.u32 %r7, full;
@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%d8], 512, [%r7], %h0;
{wait}
OTHER:
{other}
"""
    everyone = FULL.replace("W", "V")
    assert_clean(body.format(wait=FULL, other=everyone), grid=2, cluster=2)
    assert_reported(body.format(wait=FULL, other=""), "exit", "has exited", grid=2, cluster=2, landings=("late",))


def test_multicast_writes_and_counts_in_each_block():
    body = """
mov.u32 %r20, %cluster_ctarank;
mul.wide.u32 %d11, %r20, 512;
add.u64 %d1, %d1, %d11;
@%p0 mbarrier.init.shared::cta.b64 [full], 1;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
setp.eq.u32 %p3, %r20, 1;
and.pred %p3, %p3, %p0;
mov.u16 %h0, {ranks};
mov.u32 %r7, full;
@%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%d8], 512, [%r7], %h0;
{wait}
{store}
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
    right = dict(ranks=3, wait=FULL, store=STORE)
    assert_clean(body.format(**right), numpy.tile(source(), 2), size=256, grid=2, cluster=2)
    assert_reported(body.format(**{**right, "ranks": 2}), "deadlock", size=256, grid=2, cluster=2)
    assert_reported(body.format(**{**right, "ranks": 7}), "out of bounds", size=256, grid=2, cluster=2)


# ---------------------------------------------------------------------------------------------------------- reductions


def reduce_in_global(op, old, values):
    """What 32 threads' rows of shared memory, reduced into `old`, give."""
    text = kernel_text(
        BEGIN
        + "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d0];\nst.shared.v4.u32 [%r4], {%r10, %r11, %r12, %r13};\n"
        + FENCE
        + BARRIER
        + f"@%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%d9], [%r1], 512;\n"
        + CLOSE
        + DONE
        + "ret;",
        parameters=PARAMETERS,
        shared=SHARED,
    )
    out = old.copy()
    outcome = Kernel(text).run(2, 32, [values, out], writable=[out])  # two blocks: once each
    assert not outcome.reports
    return out


def numbers(dtype, seed):
    generator = numpy.random.default_rng(seed)
    count = 512 // numpy.dtype(dtype).itemsize
    if numpy.dtype(dtype).kind == "f":
        return generator.integers(-64, 64, count).astype(dtype)
    info = numpy.iinfo(dtype)
    return generator.integers(info.min, info.max, count, dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    "op, dtype, formula",
    [
        ("add.u32", numpy.uint32, lambda a, b: a + b + b),
        ("add.s32", numpy.int32, lambda a, b: a + b + b),
        ("add.u64", numpy.uint64, lambda a, b: a + b + b),
        ("add.f32", numpy.float32, lambda a, b: a + b + b),
        ("add.f64", numpy.float64, lambda a, b: a + b + b),
        ("add.noftz.f16", numpy.float16, lambda a, b: a + b + b),
        ("min.s64", numpy.int64, numpy.minimum),
        ("max.u64", numpy.uint64, numpy.maximum),
        ("max.s32", numpy.int32, numpy.maximum),
        ("min.f16", numpy.float16, numpy.minimum),
        ("and.b32", numpy.uint32, lambda a, b: a & b),
        ("or.b64", numpy.uint64, lambda a, b: a | b),
        ("xor.b32", numpy.uint32, lambda a, b: a),
    ],
)
def test_reductions(op, dtype, formula):
    old, values = numbers(dtype, 1), numbers(dtype, 2)
    with numpy.errstate(over="ignore"):
        numpy.testing.assert_array_equal(reduce_in_global(op, old, values), formula(old, values))


def test_increments_wrap():
    old = numpy.tile(numpy.array([0, 3, 4, 9], numpy.uint32), 32)
    values = numpy.full(128, 4, numpy.uint32)
    numpy.testing.assert_array_equal(reduce_in_global("inc.u32", old, values), numpy.tile([2, 0, 1, 1], 32))
    numpy.testing.assert_array_equal(reduce_in_global("dec.u32", old, values), numpy.tile([3, 1, 2, 3], 32))


def test_additions_of_fp32_flush_subnormals():
    tiny = numpy.full(128, 2.0**-130, numpy.float32)
    assert (reduce_in_global("add.f32", tiny, tiny) == 0).all()
    # normal numbers whose sum is subnormal: 2.5 - 1 - 1 times the least normal number
    least = numpy.full(128, 2.0**-126, numpy.float32)
    assert (reduce_in_global("add.f32", least * numpy.float32(2.5), -least) == 0).all()
    half = numpy.full(256, 2.0**-20, numpy.float16)
    numpy.testing.assert_array_equal(reduce_in_global("add.noftz.f16", half, half), half * 3)


def test_bf16():
    old = numpy.full(256, 0x3F80, numpy.uint16)  # 1 + 2 ** -8 + 2 ** -8: twice a tie, to even
    values = numpy.full(256, 0x3B80, numpy.uint16)
    assert (reduce_in_global("add.noftz.bf16", old, values) == 0x3F80).all()


def test_a_reduction_is_in_flight_too():
    body = (
        FILL
        + FENCE
        + BARRIER
        + OUT.replace("cp.async", "cp.reduce.async").replace("bulk_group", "bulk_group.add.u32")
        + CLOSE
    )
    assert_reported(body + READ + "@%p0 ld.global.u32 %r9, [%d9];\n" + DONE, "copy in flight")
    assert_clean(body + DONE + "@%p0 ld.global.u32 %r9, [%d9];\n", ROWS - 7)


@pytest.mark.parametrize(
    "line",
    [
        "cp.async.cg.shared.global [%r4], [%d0], 8;",
        "cp.async.ca.shared.global [%r4], [%d0], 12;",
        "cp.async.ca.shared.global [%r4], [%d0], %r0;",
        "cp.async.shared.global [%r4], [%d0], 16;",
        "cp.async.ca.global.L3::64B.shared [%r4], [%d0], 16;",
        "cp.async.wait_group %r0;",
        "cp.async.bulk.global.shared::cta [%d9], [%r1], 512;",
        "cp.async.bulk.shared::cluster.global [%r1], [%d8], 512;",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%d9], [%r1], 512, %h0;",
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r1], [%r2], 16, [full], %h0;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%d9], [%r1], 512;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s64 [%d9], [%r1], 512;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.and.u32 [%d9], [%r1], 512;",
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.f32 "
        "[%r1], [%r2], 16, [full];",
        "cp.async.bulk.wait_group.write 0;",
        # the destination's space comes first
        "cp.async.bulk.global.shared::cta.mbarrier::complete_tx::bytes [%r1], [%d8], 512, [full];",
        "cp.async.bulk.shared::cta.global.bulk_group [%d9], [%r1], 512;",
        "cp.async.bulk.shared::cta.shared::cluster.mbarrier::complete_tx::bytes [%r1], [%r2], 16, [full];",
        # multicast is to .shared::cluster
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r1], [%d8], 512, [full], %h0;",
    ],
)
def test_what_does_not_exist_is_refused(line):
    with pytest.raises(PtxError):
        Kernel(kernel_text(BEGIN + line + "\nret;", parameters=PARAMETERS, shared=SHARED))
