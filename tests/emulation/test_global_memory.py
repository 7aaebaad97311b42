"""Global memory: bounds, alignment, races inside a block, between blocks and with dependent grids."""

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES, Launch, run_together
from tests.emulation.orders import assert_clean, assert_reported, run
from tests.support.ptx import kernel_text

THREADS = numpy.arange(64)
# %r4 the thread in the grid, %d2 where its word is
IN_GRID = """
mov.u32 %r5, %ctaid.x;
mov.u32 %r6, %ntid.x;
mad.lo.u32 %r4, %r5, %r6, %r0;
mul.wide.u32 %d2, %r4, 4;
add.u64 %d2, %d0, %d2;
"""


# --------------------------------------------------------------------------------------------------- bounds, alignment


@pytest.mark.parametrize(
    "offset, is_inside", [(0, True), (-4, False), (4, False), (1 << 30, False), (-(1 << 40), False)]
)
def test_bounds(offset, is_inside):
    body = f"setp.eq.u32 %p0, %r0, 63;\n@%p0 st.global.u32 [%d1+{offset}], 1;"
    if offset < 0:
        body = body.replace("63", "0")
    _, outcome = run(body)
    assert outcome.faulted != is_inside
    assert all(report.startswith("[out of bounds]") for report in outcome.reports)
    if abs(offset) == 4:
        assert "out" in outcome.reports[0] and "of 256 bytes" in outcome.reports[0]


@pytest.mark.parametrize(
    "access", ["ld.global.u32 %r9, [{0}];", "st.global.u32 [{0}], 1;", "red.global.add.u32 [{0}], 1;"]
)
def test_nobodys_memory(access):
    _, outcome = run("mov.u64 %d9, 4096;\n" + access.format("%d9"))
    assert outcome.faulted and outcome.reports[0].startswith("[out of bounds]")


@pytest.mark.parametrize(
    "access, offset, is_aligned",
    [("u32 %r9", 4, True), ("u32 %r9", 2, False), ("u16 %h1", 2, True), ("u16 %h1", 1, False), ("u8 %r9", 1, True),
     ("v2.u32 {%r9, %r10}", 4, False), ("v2.u32 {%r9, %r10}", 8, True),
     ("v4.u32 {%r9, %r10, %r11, %r12}", 8, False), ("v4.u32 {%r9, %r10, %r11, %r12}", 16, True)],
)  # fmt: skip
def test_alignment(access, offset, is_aligned):
    out = numpy.zeros(64, numpy.int32)
    assert out.ctypes.data % 16 == 0
    kind, register = access.split(" ", 1)
    text = kernel_text(f"ld.param.u64 %d0, [out];\nld.global.{kind} {register}, [%d0+{offset}];\nret;")
    outcome = Kernel(text).run(1, 1, [out])
    assert outcome.faulted != is_aligned
    assert all(report.startswith("[misaligned]") for report in outcome.reports)


def test_shared_bounds_and_alignment():
    for address, kind in (("[%r3+8200]", "out of bounds"), ("[0]", "out of bounds"), ("[%r3+2]", "misaligned")):
        _, outcome = run(f"st.shared.u32 {address}, 1;", threads=1)
        assert outcome.faulted and outcome.reports[0].startswith(f"[{kind}]")


def test_inputs_are_not_written():
    given = numpy.arange(64, dtype=numpy.int32)
    text = kernel_text("ld.param.u64 %d0, [out];\nld.global.u32 %r1, [%d0];\n{0}\nret;")
    assert not Kernel(text.replace("{0}", "")).run(1, 32, [given]).reports
    outcome = Kernel(text.replace("{0}", "st.global.u32 [%d0], %r1;")).run(1, 32, [given])
    assert outcome.faulted and outcome.reports[0].startswith("[read-only]") and "out" in outcome.reports[0]
    numpy.testing.assert_array_equal(given, numpy.arange(64))


# --------------------------------------------------------------------------------------------------------------- races

EXCHANGE = """
st.global.u32 [%d1], %r0;
{sync}
xor.b32 %r7, %r1, {partner};
cvt.u64.u32 %d3, %r7;
add.u64 %d3, %d0, %d3;
ld.global.u32 %r8, [%d3];
{sync}
st.global.u32 [%d1], %r8;
"""


def test_threads_of_a_block():
    assert_clean(EXCHANGE.format(sync="bar.sync 0;", partner=128), THREADS ^ 32)
    assert_reported(EXCHANGE.format(sync="", partner=128), "global race", "without synchronisation")
    assert_reported(EXCHANGE.format(sync="bar.warp.sync -1;", partner=128), "global race")


def test_lanes_of_a_warp():
    assert_clean(EXCHANGE.format(sync="bar.warp.sync -1;", partner=4), THREADS ^ 1)
    assert_reported(EXCHANGE.format(sync="", partner=4), "global race")


def test_overwritten_before_it_was_read():
    body = """
ld.global.u32 %r8, [%d0];
{sync}
setp.eq.u32 %p0, %r0, 7;
@%p0 st.global.u32 [%d0], %r0;
"""
    assert_clean(body.format(sync="bar.sync 0;"))
    assert_reported(body.format(sync=""), "global race")
    assert_reported(body.format(sync="bar.warp.sync -1;"), "global race")


def test_one_value_from_several_threads():
    assert_clean("st.global.u32 [%d0], 5;", [5])
    assert_reported("st.global.u32 [%d0], 5;", "global race", races=2)
    assert_reported("st.global.u32 [%d0], %r0;", "global race", "is overwritten")


def test_bytes_beside_each_other():
    body = "cvt.u64.u32 %d3, %r0;\nadd.u64 %d3, %d0, %d3;\nst.global.u8 [%d3], %r0;"
    out, outcome = run(body)
    assert not outcome.reports
    numpy.testing.assert_array_equal(out.view(numpy.uint8)[:64], THREADS)
    # a word over one of those bytes
    assert_reported(body + "\nsetp.eq.u32 %p0, %r0, 0;\n@%p0 st.global.u32 [%d0+60], 5;", "global race")


def test_blocks():
    own = IN_GRID + "st.global.u32 [%d2], %r4;"
    assert_clean(own, numpy.arange(192), grid=3)
    assert_reported("st.global.u32 [%d1], %r4;".join([IN_GRID, ""]), "global race", "block", grid=3)
    neighbour = IN_GRID + "st.global.u32 [%d2], %r4;\nld.global.u32 %r9, [%d0+{0}];"
    assert_reported(neighbour.format(256), "global race", "block 1", grid=3)


def test_blocks_that_read_what_another_writes():
    body = IN_GRID + "ld.global.u32 %r9, [%d1];\nsetp.eq.u32 %p0, %r5, 1;\n@%p0 st.global.u32 [%d1], %r4;"
    assert_reported(body, "global race", grid=3)


def test_atomics_between_blocks():
    assert_clean("red.global.add.u32 [%d0], 1;", [127], grid=2)
    assert_reported("red.global.add.u32 [%d0], 1;\nld.global.u32 %r9, [%d0];", "global race", grid=2)


def test_constant_loads_of_what_the_kernel_writes():
    body = "st.global.u32 [%d1], %r0;\nbar.sync 0;\nld.global{0}.u32 %r9, [%d1];\nst.global.u32 [%d1], %r9;"
    assert_clean(body.format(""), THREADS)
    for schedule in SCHEDULES:
        _, outcome = run(body.format(".nc"), schedule=schedule)
        assert outcome.reports


# Each block adds up what it has, and the last to finish adds the sums (cuda-samples: threadFenceReduction).
LAST_BLOCK = (
    IN_GRID
    + """
setp.eq.u32 %p0, %r0, 0;
@!%p0 bra END;
add.u32 %r7, %r5, 100;
mul.wide.u32 %d4, %r5, 4;
add.u64 %d4, %d0, %d4;
st.global.u32 [%d4+64], %r7;
{fence}
{ticket}
setp.ne.u32 %p1, %r8, 2;
@%p1 bra END;
{after}
ld.global.u32 %r10, [%d0+64];
ld.global.u32 %r11, [%d0+68];
ld.global.u32 %r12, [%d0+72];
add.u32 %r10, %r10, %r11;
add.u32 %r10, %r10, %r12;
st.global.u32 [%d0+4], %r10;
END:
"""
)


@pytest.mark.parametrize(
    "fence, ticket",
    [("membar.gl;", "atom.global.add.u32 %r8, [%d0], 1;"), ("", "atom.acq_rel.gpu.global.add.u32 %r8, [%d0], 1;")],
)
def test_the_last_block_reads_what_all_wrote(fence, ticket):
    body = LAST_BLOCK.format(fence=fence, ticket=ticket.replace("[%d0], 1", "[%d0], 1"), after="fence.acq_rel.gpu;")
    for schedule in SCHEDULES:
        for landing in LANDINGS:
            out = numpy.zeros(64, numpy.int32)
            outcome = launch(body, out, grid=3, schedule=schedule, landing=landing)
            assert not outcome.reports, outcome.reports
            assert out[1] == 303


@pytest.mark.parametrize(
    "ticket", ["atom.global.add.u32 %r8, [%d0], 1;", "atom.acquire.gpu.global.add.u32 %r8, [%d0], 1;"]
)
def test_the_last_block_without_a_fence_before(ticket):
    body = LAST_BLOCK.format(fence="", ticket=ticket, after="fence.acq_rel.gpu;")
    for schedule in SCHEDULES:
        outcome = launch(body, numpy.zeros(64, numpy.int32), grid=3, schedule=schedule)
        assert any(report.startswith("[global race]") for report in outcome.reports)


def launch(body, out, grid, **options):
    from tests.emulation.orders import BEGIN, SHARED

    kernel = Kernel(kernel_text(BEGIN + body + "\nret;", shared=SHARED))
    return kernel.run(grid, 32, [out], writable=[out], **options)


def test_blocks_that_wait_for_each_other():
    """Block 0 waits for block 1 and the other way round: both must be there at once."""
    body = (
        IN_GRID
        + """
setp.ne.u32 %p0, %r0, 0;
@%p0 bra END;
xor.b32 %r7, %r5, 1;
mul.wide.u32 %d4, %r5, 4;
add.u64 %d4, %d0, %d4;
mul.wide.u32 %d5, %r7, 4;
add.u64 %d5, %d0, %d5;
st.global.u32 [%d4+64], %r5;
st.release.gpu.global.u32 [%d4], 1;
POLL:
ld.{order}.gpu.global.u32 %r8, [%d5];
setp.ne.u32 %p1, %r8, 1;
@%p1 bra POLL;
ld.global.u32 %r9, [%d5+64];
st.global.u32 [%d4+128], %r9;
END:
"""
    )
    for schedule in SCHEDULES:
        out = numpy.zeros(64, numpy.int32)
        outcome = launch(body.format(order="acquire"), out, grid=2, schedule=schedule, max_steps=10**6)
        assert not outcome.reports, outcome.reports
        numpy.testing.assert_array_equal(out[32:34], [1, 0])
        # hardware keeps the order; PTX alone asks for a fence or .acquire
        out = numpy.zeros(64, numpy.int32)
        outcome = launch(body.format(order="relaxed"), out, grid=2, schedule=schedule, races=2)
        assert any(report.startswith("[global race]") for report in outcome.reports)


# ------------------------------------------------------------------------------------------------------ async proxy


@pytest.mark.parametrize(
    "fence, is_enough",
    [
        ("fence.proxy.async;", True),
        ("fence.proxy.async.global;", True),
        ("fence.proxy.async.shared::cta;", False),
        ("", False),
    ],
)
def test_a_proxy_fence_before_a_bulk_load(fence, is_enough):
    body = f"""
st.global.u32 [%d1], %r0;
mov.u32 %r20, full;
setp.ne.u32 %p0, %r0, 0;
@!%p0 mbarrier.init.shared::cta.b64 [%r20], 1;
{fence}
bar.sync 0;
@%p0 bra WAIT;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d0], 256, [%r20];
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r20], 0;
@!%p1 bra WAIT;
ld.shared.u32 %r6, [%r2];
st.global.u32 [%d1], %r6;
"""
    if is_enough:
        assert_clean(body, THREADS)
    else:
        assert_reported(body, "proxy", "out")


# --------------------------------------------------------------------------------------------------- dependent grids

FIRST = """
{launch}
ld.param.u64 %d0, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d1, %r0, 4;
add.u64 %d1, %d0, %d1;
add.u32 %r4, %r0, 7;
st.global.u32 [%d1], %r4;
ret;
"""
SECOND = """
ld.param.u64 %d0, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d1, %r0, 4;
add.u64 %d1, %d0, %d1;
{wait}
ld.global.u32 %r4, [%d1+{at}];
mul.lo.u32 %r4, %r4, 2;
st.global.u32 [%d1+{to}], %r4;
ret;
"""
LAUNCH = "griddepcontrol.launch_dependents;"
WAIT = "griddepcontrol.wait;"


def together(texts, schedule="random", seed=0, overlap=True, landing="late"):
    out = numpy.full(128, -1, numpy.int32)
    launches = [Launch(Kernel(kernel_text(text)), 1, 32, [out]) for text in texts]
    return out, run_together(launches, writable=[out], overlap=overlap, schedule=schedule, seed=seed, landing=landing)


def second(wait, at=0, to=128):
    return SECOND.format(wait=wait, at=at, to=to)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("launch_text", ["", LAUNCH])
def test_a_dependent_grid_waits(overlap, launch_text):
    for schedule in SCHEDULES:
        for seed in range(4):
            out, outcome = together([FIRST.format(launch=launch_text), second(WAIT)], schedule, seed, overlap)
            assert not outcome.reports, outcome.reports
            numpy.testing.assert_array_equal(out[32:64], 2 * (numpy.arange(32) + 7))


def test_a_dependent_grid_that_does_not_wait():
    for schedule in SCHEDULES:
        for seed in range(4):
            _, outcome = together([FIRST.format(launch=LAUNCH), second("")], schedule, seed)
            assert any(report.startswith("[dependent launch]") for report in outcome.reports)
    # in a launch without the attribute, the order of the stream is enough
    out, outcome = together([FIRST.format(launch=LAUNCH), second("")], overlap=False)
    assert not outcome.reports
    numpy.testing.assert_array_equal(out[32:64], 2 * (numpy.arange(32) + 7))


def test_launch_dependents_publishes_nothing():
    late = FIRST.replace("{launch}\n", "").replace("ret;", LAUNCH + "\nret;")
    found = [together([late, second("")], seed=seed)[1].reports for seed in range(8)]
    assert all(any(report.startswith("[dependent launch]") for report in reports) for reports in found)


def test_one_lane_waits_and_the_others_meet_it():
    wait = "setp.eq.u32 %p0, %r0, 0;\n@%p0 griddepcontrol.wait;\n{0}"
    for seed in range(6):
        _, outcome = together([FIRST.format(launch=LAUNCH), second(wait.format("bar.sync 0;"))], seed=seed)
        assert not outcome.reports
        _, outcome = together([FIRST.format(launch=LAUNCH), second(wait.format(""))], seed=seed)
        assert any(report.startswith("[dependent launch]") for report in outcome.reports)


def test_a_chain_whose_middle_never_waits():
    """The third grid waits for the second, which never waited for the first."""
    middle = second("", at=128, to=256).replace("{wait}", "")
    chain = [FIRST.format(launch=LAUNCH), LAUNCH + middle, second(WAIT, at=0, to=384)]
    for seed in range(6):
        _, outcome = together(chain, seed=seed)
        assert any(report.startswith("[dependent launch]") for report in outcome.reports)
        waits = [chain[0], LAUNCH + second(WAIT, at=128, to=256), chain[2]]
        out, outcome = together(waits, seed=seed)
        assert not outcome.reports, outcome.reports
        numpy.testing.assert_array_equal(out[96:], 2 * (numpy.arange(32) + 7))
