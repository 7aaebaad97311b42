"""setmaxnreg: a block's pool of registers (PTX ISA 9.7.19.5). Every fault has its corrected twin.

What is expected is counted by hand: 65536 registers, shared by the threads that the directives allow.
"""

import pytest
import torch

from fused_resnet.emulation import Kernel, PtxError
from tests.support.ptx import kernel_text

BEGIN = """
mov.u32 %r0, %tid.x;
shr.u32 %r1, %r0, 7;
setp.eq.u32 %p0, %r1, 0;
setp.eq.u32 %p1, %r1, 1;
shr.u32 %r2, %r0, 5;
setp.eq.u32 %p2, %r2, 3;
"""
HEAD = ".maxntid 384\n.minnctapersm 1"  # 65536 / 384 is 170: in eights, 168 a thread
INC, DEC = "setmaxnreg.inc.sync.aligned.u32 {};\n", "setmaxnreg.dec.sync.aligned.u32 {};\n"
BARRIER = "bar.sync %r1, 128;\n"  # of a warpgroup


def reports(body, threads=384, head=HEAD, **options):
    text = kernel_text(BEGIN + body + "\nret;", parameters="").replace("k()", f"k()\n{head}")
    return Kernel(text).run(1, threads, [], **options).reports


def specialised(released, wanted):
    """The first warpgroup gives registers up, the two others take them."""
    return f"@%p0 bra PRODUCER;\n{INC.format(wanted)}bra END;\nPRODUCER:\n{DEC.format(released)}END:"


SCHEDULES = ("random", "in_turn", "greedy", "backwards")


@pytest.mark.parametrize("released, wanted, is_enough", [(40, 232, True), (24, 240, True), (40, 240, False)])
def test_a_warpgroup_releases_what_two_others_take(released, wanted, is_enough):
    """168 - 40 registers suffice for two warpgroups that want 64 more each, and not for 72."""
    for schedule in SCHEDULES:
        found = reports(specialised(released, wanted), schedule=schedule)
        assert is_enough != any("[deadlock]" in r and "setmaxnreg.inc for registers" in r for r in found), found
        assert not is_enough or not found


def test_nobody_releases_any():
    assert any("[deadlock]" in r for r in reports(INC.format(176)))
    assert not reports(INC.format(168))


@pytest.mark.parametrize("head, most", [
    (".maxnreg 96", 96), (".maxnreg 92", 96), (".maxntid 128\n.minnctapersm 1", 256),
    (".reqntid 128\n.minnctapersm 4", 128), (".reqntid 128\n.minnctapersm 5", 96),
])  # fmt: skip
def test_what_a_thread_has_at_launch(head, most):
    """The pool is empty, so that only what the thread has can be asked for."""
    assert not reports(INC.format(most), threads=128, head=head)
    assert not reports(DEC.format(most - 8) + BARRIER + INC.format(most), threads=128, head=head)
    if most < 256:
        assert any("[deadlock]" in r for r in reports(INC.format(most + 8), threads=128, head=head))
        assert any(f"has {most} registers" in r for r in reports(DEC.format(most + 8), threads=128, head=head))


def test_neither_action_goes_the_wrong_way():
    for text, words in ((DEC.format(176), "has 168"), (INC.format(160), "has 168")):
        found = reports(text)
        assert found and all(r.startswith("[setmaxnreg]") and words in r for r in found)
    assert not reports(DEC.format(168))


def test_without_a_number_at_launch_it_may_have_no_effect():
    for head in ("", ".maxntid 384"):
        assert not reports(INC.format(240), head=head)
        assert any("may have no effect" in r for r in reports(INC.format(240), head=head, races=2))
    assert not reports(INC.format(168), races=2)


def test_the_warpgroup_meets_between_two():
    """With bar.sync between them, and else not: then some warp is ahead of another."""
    twice = DEC.format(160) + "{}" + INC.format(168)
    for schedule in SCHEDULES:
        assert not reports(twice.format(BARRIER), schedule=schedule)
        found = reports(twice.format(""), schedule=schedule)
        assert any(r.startswith("[setmaxnreg]") and "not waited for" in r for r in found)


def test_all_warps_of_a_warpgroup_execute_the_same_one():
    other = f"@%p2 bra OTHER;\n{DEC.format(160)}bra END;\nOTHER:\n{DEC.format(160)}END:"
    assert any("executed line" in r for r in reports(other, schedule="in_turn"))
    missing = f"@%p2 bra END;\n{DEC.format(160)}END:"
    for schedule in SCHEDULES:
        assert any(r.startswith("[setmaxnreg]") and "exit" in r for r in reports(missing, schedule=schedule))
    assert any("no whole warpgroup" in r for r in reports(DEC.format(160), threads=96))


@pytest.mark.parametrize("line", [INC.format(168), "wgmma.fence.sync.aligned;"])
def test_it_needs_a_target_of_one_architecture(line):
    """sm_90 promises what later architectures have too; this they have not, and sm_90a has."""
    Kernel(kernel_text(line + "ret;", parameters=""))
    for target in ("sm_90", "sm_80"):
        with pytest.raises(PtxError, match=f"needs .target sm_90a, the text has {target}"):
            Kernel(kernel_text(line + "ret;", parameters="", target=target))


def test_values_outlive_a_change():
    """Registers of the PTX are values: what ptxas keeps in a register stays there."""
    out = torch.full((384,), -1, dtype=torch.int32)
    body = "ld.param.u64 %d0, [out];\nmul.wide.u32 %d1, %r0, 4;\nadd.u64 %d1, %d0, %d1;\nmov.u32 %r5, %r0;\n"
    text = kernel_text(BEGIN + body + specialised(40, 232) + "\nst.global.u32 [%d1], %r5;\nret;")
    kernel = Kernel(text.replace("out)", f"out)\n{HEAD}", 1))
    assert kernel.run(1, 384, [out], writable=[out]).reports == []
    assert torch.equal(out, torch.arange(384, dtype=torch.int32))
