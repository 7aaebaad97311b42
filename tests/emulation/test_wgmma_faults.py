"""What a program may do wrong around wgmma: each fault is reported, and its corrected twin is not.

Every twin's D is the right product besides. What hardware would punish gives other data when work lands late.
"""

import pytest
import torch

from tests.emulation import cute
from tests.emulation.test_wgmma import COMMIT, matrices, op
from tests.emulation.wgmma_programs import MADE_READY, Operands, kinds, layout_for, names, program, run

TYPES, N = "f32.f16.f16", 8
A, B, _ = matrices(TYPES, N)
OPERANDS = Operands(A, B, layout_for("128B", False, 2, 64), layout_for("128B", False, 2, N))
FRAGMENTS = cute.registers_of(A, cute.WGMMA_A[2])
WANTED = (A.double() @ B.double().T).float()
FENCE = "wgmma.fence.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
MMA = op(TYPES, N, scale_d="1")
FROM_REGISTERS = op(TYPES, N, a=names("r", 0, 4), scale_d="1", tail=", 1, 1, 0")
WIDER = op(TYPES, 16, scale_d="1")
WARP = "shr.u32 %r200, %r250, 5;"


def execute(body, after=WAIT, threads=128, made_ready=MADE_READY, sums=4, **options):
    text = program(OPERANDS.descriptors + body, OPERANDS.size, sums, after=after, made_ready=made_ready)
    out, outcome = run(text, OPERANDS.image, FRAGMENTS, sums, threads, **options)
    return cute.matrix_of(out[:, :4], cute.wgmma_d(8), 64, torch.float32), outcome


def check_twins(wrong, right, kind, factor=1, **options):
    """The fault is reported and nothing else is; the twin gives `factor` times the product."""
    outcome = execute(wrong, **options)[1]
    assert kinds(outcome) == {kind}, outcome.reports
    for landing in ("late", "early", "random"):
        for seed in range(2):
            d, outcome = execute(right, landing=landing, seed=seed)
            assert outcome.reports == []
            assert torch.equal(d, factor * WANTED)


def test_a_fence_comes_first():
    check_twins(f"{MMA} {COMMIT}", f"{FENCE} {MMA} {COMMIT}", "wgmma fence")


@pytest.mark.parametrize("scale_d", ["0", "1"])
def test_a_fence_comes_between_an_access_of_d_and_a_product(scale_d):
    mma = op(TYPES, N, scale_d=scale_d)
    for access in ("add.f32 %f1, %f1, 0f00000000;", "add.f32 %f99, %f2, %f2;", "ld.global.f32 %f1, [%d2];"):
        check_twins(f"{FENCE} {access} {mma} {COMMIT}", f"{access} {FENCE} {mma} {COMMIT}", "wgmma fence")


@pytest.mark.parametrize("added", [0, 1])
def test_copies_and_constants_of_d_may_come_behind_the_fence(added):
    """As LLVM puts Triton's, where ptxas adds a fence (C7519); the strict mode goes by the text."""
    value = "0f3f800000" if added else "0f00000000"
    constants = " ".join(f"mov.b32 %f{j}, {value};" for j in range(4))
    copies = " ".join(f"mov.b32 %f{j}, %f90;" for j in range(4))
    for body in (f"{FENCE} {constants}", f"add.f32 %f90, %f0, {value}; {FENCE} {copies}"):
        d, outcome = execute(f"{body} {MMA} {COMMIT}")
        assert outcome.reports == []
        torch.testing.assert_close(d, WANTED + added)
        assert kinds(execute(f"{body} {MMA} {COMMIT}", races=2)[1]) == {"wgmma fence"}


def test_a_fence_comes_between_an_access_of_a_and_a_product():
    access = "add.u32 %r1, %r1, 0;"
    wrong, right = (f"{part} {FROM_REGISTERS} {COMMIT}" for part in (FENCE + access, access + FENCE))
    check_twins(wrong, right, "wgmma fence")


def test_products_of_one_shape_follow_each_other_without_a_fence():
    """Their accesses of D are ordered; those of another shape are not, waited for or not."""
    other = op("f32.tf32.tf32", N, scale_d="0", tail=", 1, 1")
    check_twins(f"{FENCE} {other} {MMA} {COMMIT}", f"{FENCE} {MMA} {MMA} {COMMIT}", "wgmma wait", factor=2)
    waited = f"{FENCE} {other} {COMMIT} {WAIT}"
    zero = op(TYPES, N, scale_d="0")
    check_twins(f"{waited} {zero} {COMMIT}", f"{waited} {FENCE} {zero} {COMMIT}", "wgmma fence")


@pytest.mark.parametrize("access", ["add.f32 %f0, %f0, %f0;", "mov.b32 %f98, %f0;", "mov.b32 %f0, 0f3f800000;"])
def test_d_waits(access):
    wrong = f"{FENCE} {MMA} {COMMIT} {access}"
    assert kinds(execute(wrong)[1]) == {"wgmma wait"}
    assert execute(f"{FENCE} {MMA} {COMMIT} {WAIT} {access}", after="")[1].reports == []


def test_d_is_garbage_before_the_wait():
    """Copied too early, D is wrong when products land late, and right when they land at once."""
    copies = " ".join(f"mov.b32 %f{90 + j}, %f{j};" for j in range(4))
    back = " ".join(f"mov.b32 %f{j}, %f{90 + j};" for j in range(4))
    late, early = (execute(f"{FENCE} {MMA} {COMMIT} {copies} {WAIT} {back}", "", landing=when)[0] for when in
                   ("late", "early"))  # fmt: skip
    assert late.isnan().all() and torch.equal(early, WANTED)


def test_a_in_registers_waits():
    """Triton's issue 9433: A is overwritten, for the next step of the loop, while a product still reads it."""
    overwrite = " ".join(f"mov.b32 %r{j}, 0;" for j in range(4))
    wrong = f"{FENCE} {FROM_REGISTERS} {COMMIT} {overwrite}"
    d, outcome = execute(wrong)
    assert kinds(outcome) == {"wgmma wait"} and not torch.equal(d, WANTED)
    assert kinds(execute(f"{FENCE} {FROM_REGISTERS} {COMMIT} mov.b32 %r20, %r0;")[1]) == {"wgmma wait"}
    d, outcome = execute(f"{FENCE} {FROM_REGISTERS} {COMMIT} {WAIT} {overwrite}", after="")
    assert outcome.reports == [] and torch.equal(d, WANTED)


def test_a_in_registers_may_be_read_again():
    d, outcome = execute(f"{FENCE} {FROM_REGISTERS} {FROM_REGISTERS} {COMMIT}")
    assert outcome.reports == [] and torch.equal(d, 2 * WANTED)
    # the text of wgmma.fence excepts accumulators only, though two reads disturb nothing
    assert kinds(execute(f"{FENCE} {FROM_REGISTERS} {FROM_REGISTERS} {COMMIT}", races=2)[1]) == {"wgmma fence"}
    assert execute(f"{FENCE} {FROM_REGISTERS} {FENCE} {FROM_REGISTERS} {COMMIT}", races=2)[1].reports == []


def test_d_in_flight_is_no_a():
    """Two products in a chain (as in attention) need a wait, and then a fence, between them."""
    into_others = MMA.replace("%f0, %f1, %f2, %f3", "%f10, %f11, %f12, %f13").replace("1, 1, 0, 0", "1, 1, 0")
    chained = into_others.replace("%d20", names("f", 0, 4))
    begin = f"{FENCE} {MMA} {COMMIT}"
    assert kinds(execute(f"{begin} {chained} {COMMIT}")[1]) == {"wgmma wait"}
    assert kinds(execute(f"{begin} {WAIT} {chained} {COMMIT}")[1]) == {"wgmma fence"}
    assert execute(f"{begin} {WAIT} {FENCE} {chained} {COMMIT}")[1].reports == []


def test_d_of_another_shape_waits():
    assert kinds(execute(f"{FENCE} {MMA} {WIDER} {COMMIT}", sums=8)[1]) >= {"wgmma wait"}


def test_a_warp_does_not_end_before_its_products():
    assert kinds(execute(f"{FENCE} {MMA} {COMMIT} ret;", after="")[1]) == {"exit"}
    assert kinds(execute(f"{FENCE} {MMA}", after=f"{WAIT} ret;")[1]) == {"exit"}  # not committed


def test_many_products_may_be_in_flight():
    """Three hundred into one D, more than eight bits can count."""
    d, outcome = execute(f"{FENCE} {MMA * 300} {COMMIT}")
    assert outcome.reports == []
    assert torch.allclose(d, 300 * WANTED, rtol=1e-4, atol=1e-3)


def test_wait_group_leaves_the_last_groups():
    """A wait that allows one of three groups makes the first two's D ready."""
    second = MMA.replace("%f0, %f1, %f2, %f3", "%f10, %f11, %f12, %f13")
    third = MMA.replace("%f0, %f1, %f2, %f3", "%f20, %f21, %f22, %f23")
    zeros = " ".join(f"mov.b32 %f{j}, 0f00000000;" for j in (*range(10, 14), *range(20, 24)))
    begin = f"{zeros} {FENCE} {MMA} {COMMIT} {second} {COMMIT} {third} {COMMIT}"
    add = "add.f32 %f{0}, %f{0}, %f1{0};"
    sums = " ".join(add.format(j) for j in range(4))
    d, outcome = execute(f"{begin} wgmma.wait_group.sync.aligned 1; {sums}")
    assert outcome.reports == [] and torch.equal(d, 2 * WANTED)
    assert kinds(execute(f"{begin} wgmma.wait_group.sync.aligned 2; {sums}")[1]) == {"wgmma wait"}


# ---- warpgroups


def test_all_four_warps_take_part():
    alone = f"{WARP} setp.ne.u32 %p2, %r200, 0; @%p2 ret; {FENCE} {MMA} {COMMIT}"
    assert kinds(execute(alone)[1]) == {"warpgroup"}
    last = f"{WARP} setp.eq.u32 %p2, %r200, 3; @%p2 bra LAST; {FENCE} LAST: {MMA} {COMMIT}"
    assert "warpgroup" in kinds(execute(last)[1])
    assert kinds(execute(f"{FENCE} {MMA} {COMMIT}", threads=64)[1]) == {"warpgroup"}
    assert kinds(execute(f"{FENCE} {MMA} {COMMIT}", threads=128)[1]) == set()


def test_a_warp_that_never_comes_is_a_deadlock():
    waits = f"{WARP} setp.eq.u32 %p2, %r200, 3; @%p2 bar.sync 1, 64; {FENCE} {MMA} {COMMIT}"
    outcome = execute(waits)[1]
    assert outcome.faulted and kinds(outcome) == {"deadlock"}
    assert any("wgmma.wait_group" in report for report in outcome.reports)


@pytest.mark.parametrize(
    "change",
    ["add.s64 %d20, %d20, %d30;", "add.s64 %d21, %d21, %d30;", "setp.eq.u32 %p1, %r200, 0;"],
    ids=["A", "B", "scale-d"],
)
def test_warps_agree(change):
    """The descriptors and scale-d are the same in all four warps (a start that differs by one warp's rows is not)."""
    begin = f"{WARP} setp.eq.u32 %p1, %r200, %r200; cvt.u64.u32 %d30, %r200; shl.b64 %d30, %d30, 1;"
    product = f"{FENCE} {op(TYPES, N)} {COMMIT}"
    assert "warpgroup" in kinds(execute(f"{begin} {change} {product}")[1])
    d, outcome = execute(f"{begin} mov.b64 %d30, 0; {change if 'd30' in change else ''} {product}")
    assert outcome.reports == [] and torch.equal(d, WANTED)


@pytest.mark.parametrize("what", [FENCE, MMA, COMMIT, WAIT])
def test_lanes_predicated_off_are_reported(what):
    body = f"{FENCE} {MMA} {COMMIT} {WAIT}"
    begin = "and.b32 %r201, %r250, 1; setp.eq.u32 %p3, %r201, 0;"
    outcome = execute(begin + body.replace(what, f"@%p3 {what}"), after="")[1]
    assert outcome.faulted and kinds(outcome) == {"aligned"}
    every = begin.replace("%r201, 0", "%r201, %r201")
    assert execute(every + body.replace(what, f"@%p3 {what}"), after="")[1].reports == []


# ---- shared memory


def test_operands_are_made_ready():
    product = f"{FENCE} {MMA} {COMMIT}"
    assert kinds(execute(product, made_ready="bar.sync 0;")[1]) == {"proxy"}
    assert kinds(execute(product, made_ready="fence.proxy.async;")[1]) >= {"race"}
    assert kinds(execute(product, made_ready=MADE_READY)[1]) == set()


OVERWRITE = "mov.b32 %r210, 0; mad.lo.u32 %r211, %r250, 4, %r251; st.shared.b32 [%r211], %r210;"


def test_operands_stay_until_the_product_is_waited_for():
    """Also for the other warps of the warpgroup: the barrier is what tells them."""
    product = f"{FENCE} {MMA} {COMMIT}"
    d, outcome = execute(f"{product} bar.sync 0; {OVERWRITE}", schedule="in_turn")
    assert "overwritten in flight" in kinds(outcome) and not torch.equal(d, WANTED)
    d, outcome = execute(f"{product} {WAIT} bar.sync 0; {OVERWRITE}")
    assert outcome.reports == [] and torch.equal(d, WANTED)


@pytest.mark.parametrize("schedule", ["random", "in_turn", "greedy", "backwards"])
def test_one_thread_may_release_for_its_warpgroup(schedule):
    """As in CUTLASS's pipelines: one thread that has waited arrives, and a producer overwrites what four warps read.

    The other three may lag behind: what one has waited for is over for all.
    """
    body = f"""
    setp.eq.u32 %p4, %r250, 0;
    setp.ge.u32 %p5, %r250, 128;
    mov.u32 %r220, bar;
    @%p4 mbarrier.init.shared.b64 [%r220], 1;
    bar.sync 0;
    @%p5 bra PRODUCER;
    {FENCE} {MMA} {COMMIT} {WAIT}
    @%p4 mbarrier.arrive.shared.b64 _, [%r220];
    bra END;
    PRODUCER:
    mbarrier.try_wait.parity.shared.b64 %p6, [%r220], 0;
    @!%p6 bra PRODUCER;
    sub.u32 %r250, %r250, 128;
    {OVERWRITE.replace("%r250, 4", "%r250, 256")}
    ret;
    END:"""
    fill = "setp.ge.u32 %p7, %r250, 128;"
    for landing in ("late", "random"):
        text = program(OPERANDS.descriptors + body, OPERANDS.size, after="", made_ready=fill + MADE_READY)
        text = text.replace("mad.wide.u32 %d1, %r250", "and.b32 %r249, %r250, 127; mad.wide.u32 %d1, %r249")
        text = text.replace(".visible", ".shared .align 8 .b64 bar;\n.visible")
        out, outcome = run(text, OPERANDS.image, FRAGMENTS, 4, 160, schedule=schedule, landing=landing)
        assert outcome.reports == []
        assert torch.equal(cute.matrix_of(out, cute.wgmma_d(8), 64, torch.float32), WANTED)
