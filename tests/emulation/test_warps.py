"""Instructions that lanes of a warp execute together: who takes part, what they give, what they order."""

import itertools

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.syntax import PtxError
from tests.support.lanes import lanes, outcome_of
from tests.support.ptx import kernel_text

U32 = numpy.uint32
LANES = numpy.arange(32, dtype=U32)
SHARED = ".shared .align 16 .b8 s[256];"


def run(body, block=32, shared=SHARED, **options):
    out = numpy.zeros(block, U32)
    text = f"""ld.param.u64 %d60, [out]; mov.u32 %r250, %tid.x; mad.wide.u32 %d61, %r250, 4, %d60;
      mov.u32 %r0, %laneid; {body}
      st.global.b32 [%d61], %r100; ret;"""
    outcome = Kernel(kernel_text(text, shared=shared)).run(1, block, [out], writable=[out], **options)
    return out.tolist(), outcome


def kinds(outcome):
    return sorted({report[1 : report.index("]")] for report in outcome.reports})


def source(mode, lane, b, c):
    """The lane that shfl reads, as CUDA's guide describes it: segments of a width, and clamping at their ends."""
    width = 32 - (c >> 8 & 31)
    first = lane // width * width
    wanted = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first + b % width}[mode]
    inside = wanted >= first if mode == "up" else wanted < first + width
    if mode == "bfly":  # may read from an earlier segment
        inside = wanted < first + width
    return (wanted, 1) if inside else (lane, 0)


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode, width):
    values = LANES * 1000 + 7
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 2, 3, 5, 8, 15, 16, 31):
        text = f"shfl.sync.{mode}.b32 $d|%p1, $a, {b}, {c}, -1; selp.b32 $e, 1, 0, %p1;"
        got, in_range = lanes(text, values, out=(U32, U32))
        wanted = [source(mode, lane, b, c) for lane in range(32)]
        assert got.tolist() == [int(values[lane]) for lane, _ in wanted]
        assert in_range.tolist() == [inside for _, inside in wanted]


def test_a_shuffle_by_other_offsets_in_each_lane():
    got = lanes("shfl.sync.idx.b32 $d, $a, $b, 31, -1;", LANES * 3, LANES[::-1].copy(), out=U32)
    assert got.tolist() == (LANES[::-1] * 3).tolist()


def test_a_shuffle_from_a_lane_that_takes_no_part():
    body = """setp.lt.u32 %p1, %r0, 16; mov.u32 %r100, 0; @!%p1 bra done;
      shfl.sync.down.b32 %r100, %r0, {}, 31, 0xffff;
    done:"""
    out, outcome = run(body.format(0))
    assert out == [*range(16)] + [0] * 16 and outcome.reports == []
    seen = [run(body.format(1), seed=seed) for seed in (1, 2)]
    assert kinds(seen[0][1]) == ["shfl"] and "lane 15 takes the value of lane 16" in seen[0][1].reports[0]
    assert seen[0][0][:15] == [*range(1, 16)] and seen[0][0][15] != seen[1][0][15]


@pytest.mark.parametrize(
    "pattern, votes",
    [(0xFFFFFFFF, (1, 1, 1)), (0, (0, 0, 1)), (0x00010000, (0, 1, 0)), (0xFFFFFFFE, (0, 1, 0))],
)
def test_votes(pattern, votes):
    bits = pattern >> LANES & 1
    for mode, wanted in zip(("all", "any", "uni"), votes):
        text = f"setp.ne.u32 %p1, $a, 0; vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 $d, 1, 0, %p2;"
        assert lanes(text, bits.astype(U32), out=U32).tolist() == [wanted] * 32
    text = "setp.ne.u32 %p1, $a, 0; vote.sync.ballot.b32 $d, {}%p1, -1;"
    assert lanes(text.format(""), bits.astype(U32), out=U32).tolist() == [pattern] * 32
    assert lanes(text.format("!"), bits.astype(U32), out=U32).tolist() == [pattern ^ 0xFFFFFFFF] * 32


def test_votes_of_members_only():
    body = """and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 1; setp.lt.u32 %p2, %r0, 8; mov.u32 %r100, 0;
      @%p1 bra odd;
      vote.sync.ballot.b32 %r100, %p2, 0x55555555; bra done;
    odd: vote.sync.ballot.b32 %r100, %p2, 0xaaaaaaaa;
    done:"""
    out, outcome = run(body)
    assert out == [0x55, 0xAA] * 16 and outcome.reports == []


def test_two_groups_at_one_instruction():
    body = """setp.lt.u32 %p1, %r0, 16; selp.b32 %r1, 0xffff, 0xffff0000, %p1;
      redux.sync.add.u32 %r100, %r0, %r1;"""
    out, outcome = run(body)
    assert out == [sum(range(16))] * 16 + [sum(range(16, 32))] * 16 and outcome.reports == []


def test_matches():
    values = (LANES % 3).astype(numpy.uint64) << numpy.uint64(32)
    wanted = [sum(1 << j for j in range(32) if j % 3 == lane % 3) for lane in range(32)]
    assert lanes("match.any.sync.b64 $d, $a, -1;", values, out=U32).tolist() == wanted
    assert lanes("cvt.u32.u64 %r1, $a; match.any.sync.b32 $d, %r1, -1;", values, out=U32).tolist() == [2**32 - 1] * 32
    text = "match.all.sync.b64 $d|%p1, $a, -1; selp.b32 $e, 1, 0, %p1;"
    assert [x.tolist() for x in lanes(text, values, out=(U32, U32))] == [[0] * 32, [0] * 32]
    assert [x.tolist() for x in lanes(text, values * 0, out=(U32, U32))] == [[2**32 - 1] * 32, [1] * 32]


REDUCTIONS = {
    ("add", "u32"): lambda x: x.sum(dtype=U32), ("add", "s32"): lambda x: x.sum(dtype=U32), ("min", "u32"): numpy.min,
    ("max", "u32"): numpy.max, ("min", "s32"): lambda x: x.view(numpy.int32).min().view(U32),
    ("max", "s32"): lambda x: x.view(numpy.int32).max().view(U32), ("and", "b32"): numpy.bitwise_and.reduce,
    ("or", "b32"): numpy.bitwise_or.reduce, ("xor", "b32"): numpy.bitwise_xor.reduce,
}  # fmt: skip


@pytest.mark.parametrize("name, ptx_type", REDUCTIONS)
def test_reductions(name, ptx_type):
    values = numpy.random.default_rng(1).integers(0, 2**32, 32, dtype=U32)
    got = lanes(f"redux.sync.{name}.{ptx_type} $d, $a, -1;", values, out=U32)
    assert got.tolist() == [int(REDUCTIONS[name, ptx_type](values))] * 32


def test_an_elected_leader_is_the_lowest_or_by_the_text_any_member_but_always_the_same():
    leaders = {1: set(), 2: set()}
    for seed, races in itertools.product(range(12), (1, 2)):
        text = """elect.sync $d|%p1, -1; selp.b32 $e, 1, 0, %p1;
          elect.sync %r5|%p2, -1; setp.ne.u32 %p3, %r5, $d; @%p3 trap;"""
        (leader, chosen), outcome = outcome_of(text, LANES, out=(U32, U32), seed=seed, races=races)
        assert len(set(leader.tolist())) == 1 and outcome.reports == []
        assert chosen.tolist() == [int(lane == leader[0]) for lane in range(32)]
        leaders[races].add(int(leader[0]))
    assert leaders[1] == {0} and len(leaders[2]) > 3
    body = """mov.u32 %r100, 99; setp.gt.u32 %p1, %r0, 3; setp.lt.u32 %p2, %r0, 7; and.pred %p3, %p1, %p2;
      @!%p3 bra done;
      elect.sync %r100|_, 0x70;
    done:"""
    assert {run(body, seed=seed)[0][5] for seed in range(16)} == {4}
    assert {run(body, seed=seed, races=2)[0][5] for seed in range(16)} == {4, 5, 6}


def test_the_active_mask():
    body = """setp.lt.u32 %p1, %r0, 5; mov.u32 %r100, 0;
      @%p1 activemask.b32 %r100;"""
    assert run(body)[0] == [31] * 5 + [0] * 27
    assert run("activemask.b32 %r100;", block=48)[0] == [2**32 - 1] * 32 + [0xFFFF] * 16


EXCHANGE = """mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 4, %r1; xor.b32 %r3, %r0, 1; mad.lo.u32 %r4, %r3, 4, %r1;
  st.shared.u32 [%r2], %r0; {} ld.shared.u32 %r100, [%r4];"""
ORDER = {
    "bar.warp.sync -1;": True, "bar.sync 0;": True, "": False, "shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;": False,
    "vote.sync.ballot.b32 %r9, %p0, -1;": False, "redux.sync.add.u32 %r9, %r0, -1;": False,
    "activemask.b32 %r9;": False, "membar.cta;": False,
}  # fmt: skip


@pytest.mark.parametrize("between", ORDER)
def test_only_barriers_order_memory(between):
    out, outcome = run("setp.eq.u32 %p0, %r0, 0;" + EXCHANGE.format(between))
    assert out == [lane ^ 1 for lane in range(32)]
    assert kinds(outcome) == ([] if ORDER[between] else ["intra-warp race"])


def test_a_read_must_be_over_before_another_lane_overwrites():
    body = EXCHANGE.format("bar.warp.sync -1;") + "{} st.shared.u32 [%r2], 0;"
    assert run(body.format("bar.warp.sync -1;"))[1].reports == []
    assert kinds(run(body.format(""))[1]) == ["intra-warp race"]


def test_a_barrier_of_some_lanes_orders_those_only():
    body = """setp.lt.u32 %p1, %r0, 16; mov.u32 %r100, 7; mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 4, %r1;
      st.shared.u32 [%r2], %r0; xor.b32 %r3, %r0, {partner}; mad.lo.u32 %r4, %r3, 4, %r1;
      @!%p1 bra high;
      bar.warp.sync 0xffff; bra both;
    high: bar.warp.sync 0xffff0000;
    both: ld.shared.u32 %r100, [%r4];"""
    out, outcome = run(body.replace("{partner}", "8"))
    assert out == [lane ^ 8 for lane in range(32)] and outcome.reports == []
    assert kinds(run(body.replace("{partner}", "16"))[1]) == ["intra-warp race"]


def test_lanes_that_are_not_members():
    assert kinds(run("bar.warp.sync 0xffff; mov.u32 %r100, 0;")[1]) == ["membermask"]
    assert kinds(run("shfl.sync.idx.b32 %r100, %r0, 0, 31, 0x7fffffff;")[1]) == ["membermask"]
    body = "setp.lt.u32 %p1, %r0, 5; mov.u32 %r100, 0; @%p1 vote.sync.ballot.b32 %r100, %p1, -1;"
    assert kinds(run(body)[1]) == ["membermask"]


def test_members_that_never_come():
    body = """setp.lt.u32 %p1, %r0, 16; mov.u32 %r100, 0; @!%p1 bra other;
      shfl.sync.idx.b32 %r100, %r0, 0, 31, -1; bra done;
    other: vote.sync.ballot.b32 %r100, %p1, -1;
    done:"""
    assert run(body)[1].faulted


def test_members_that_have_exited_are_not_waited_for():
    body = """setp.lt.u32 %p1, %r0, 8; @!%p1 ret; redux.sync.add.u32 %r100, %r0, -1;"""
    out, outcome = run(body)
    assert out[:8] == [28] * 8 and outcome.reports == []


REFUSED = """
  shfl.down.b32 %r0, %r1, 1, 31; shfl.sync.down.b32 %r0, %r1, 1, 31; shfl.sync.down.f32 %f0, %f1, 1, 31, -1;
  shfl.sync.b32 %r0, %r1, 1, 31, -1; vote.all.pred %p0, %p1, -1; vote.sync.all.b32 %r0, %p1, -1;
  vote.sync.ballot.pred %p0, %p1, -1; vote.sync.some.pred %p0, %p1, -1; match.any.sync.b32 %r0|%p0, %r1, -1;
  match.any.sync.b16 %r0, %h1, -1; match.sync.b32 %r0, %r1, -1; elect.sync %r0, -1; elect %r0|%p0, -1;
  redux.sync.add.b32 %r0, %r1, -1; redux.sync.xor.u32 %r0, %r1, -1; redux.sync.add.f32 %f0, %f1, -1;
  activemask.u32 %r0; bar.warp.sync; bar.warp.arrive -1;
"""


@pytest.mark.parametrize("instruction", REFUSED.strip().rstrip(";").split(";"))
def test_what_the_isa_does_not_have_is_refused(instruction):
    with pytest.raises(PtxError, match=instruction.split()[0].replace(".", r"\.")):
        Kernel(kernel_text(instruction + ";\n ret;"))
