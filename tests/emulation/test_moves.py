"""Moves, comparisons, selections and addresses of the emulator, by hand and against numpy."""

import math

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.syntax import PtxError
from tests.support.lanes import lanes
from tests.support.ptx import kernel_text

INF, NAN = math.inf, math.nan
WORDS = numpy.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678], numpy.uint32)


def run(body, size=32, cluster=1, grid=1, block=32, shared="", **options):
    out = numpy.zeros(size, numpy.uint32)
    outcome = Kernel(kernel_text(body, shared=shared)).run(
        grid, block, [out], writable=[out], cluster=cluster, **options
    )
    return out.tolist(), outcome


def store(register, index="%tid.x"):
    return f"""  ld.param.u64 %d60, [out];
      mov.u32 %r250, {index};
      mad.wide.u32 %d61, %r250, 4, %d60;
      st.global.b32 [%d61], {register};
      ret;
    """


def test_packing_puts_the_first_register_lowest():
    a, b = numpy.array([0x1111], numpy.uint16), numpy.array([0xF222], numpy.uint16)
    assert lanes("mov.b32 $d, {$a, $b};", a, b, out=numpy.uint32)[0] == 0xF2221111
    assert lanes("mov.b64 $d, {$a, $b, $b, $a};", a, b, out=numpy.uint64)[0] == 0x1111F222F2221111
    word = numpy.array([0x89ABCDEF01234567], numpy.uint64)
    assert lanes("mov.b64 {$e, $d}, $a;", word, out=(numpy.uint32, numpy.uint32))[0][0] == 0x89ABCDEF
    assert lanes("mov.b64 {_, $d, _, _}, $a;", word, out=numpy.uint16)[0] == 0x0123


def test_unpacking_into_the_source_itself():
    word = numpy.array([0x89ABCDEF01234567], numpy.uint64)
    low, high = lanes(
        "mov.b64 %d1, $a; mov.b64 {%r1, %r2}, %d1; mov.b32 {$d, $e}, %r1;", word, out=(numpy.uint16, numpy.uint16)
    )
    assert (low[0], high[0]) == (0x4567, 0x0123)


def test_a_value_read_from_a_narrower_type_has_no_more_bits():
    assert (
        lanes("mov.b32 $d, -1; cvt.u64.u32 $e, $d;", WORDS, out=(numpy.uint32, numpy.uint64))[1].tolist()
        == [2**32 - 1] * 6
    )


@pytest.mark.parametrize("block", [(8, 4, 2), (5, 3, 1)])
def test_special_registers_of_threads(block):
    number = math.prod(block)
    for axis, name in enumerate("xyz"):
        wanted = [index[axis] for index in numpy.ndindex(*block)]
        body = f"""mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z;
          mad.lo.u32 %r4, %r1, {block[1]}, %r2; mad.lo.u32 %r5, %r4, {block[2]}, %r3; mov.u32 %r6, %tid.{name};"""
        out, outcome = run(body + store("%r6", "%r5"), size=number, block=block)
        assert out == wanted and outcome.reports == []


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("laneid", lambda n: n), ("lanemask_eq", lambda n: 1 << n), ("lanemask_lt", lambda n: (1 << n) - 1),
        ("lanemask_le", lambda n: (2 << n) - 1), ("lanemask_gt", lambda n: 2**32 - (2 << n)), ("ntid.x", lambda n: 32),
        ("lanemask_ge", lambda n: 2**32 - (1 << n)), ("nctaid.y", lambda n: 1), ("ctaid.x", lambda n: 0),
        ("cluster_ctarank", lambda n: 0), ("cluster_nctarank", lambda n: 1),
    ],
)  # fmt: skip
def test_special_registers_of_lanes(name, wanted):
    assert run(f"mov.u32 %r1, %{name};" + store("%r1"))[0] == [wanted(lane) for lane in range(32)]


def test_the_number_of_a_warp_may_be_any():
    seen = set()
    for seed in range(8):
        out, _ = run("mov.u32 %r1, %warpid;" + store("%r1"), size=128, block=128, seed=seed)
        assert sorted(set(out)) == [0, 1, 2, 3] and all(len(set(out[w * 32 : w * 32 + 32])) == 1 for w in range(4))
        seen.add(out[0])
    assert len(seen) > 1


COMPARISONS = {
    "eq": numpy.equal, "ne": numpy.not_equal, "lt": numpy.less, "le": numpy.less_equal, "gt": numpy.greater,
    "ge": numpy.greater_equal,
}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("ptx_type", ["u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64", "f16"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name, ptx_type):
    kind = numpy.dtype({"u": "u", "s": "i", "f": "f"}[ptx_type[0]] + str(int(ptx_type[1:]) // 8))
    few = (
        [0.0, -0.0, 1.0, -2.0, INF, -INF, NAN]
        if ptx_type[0] == "f"
        else [0, 1, numpy.iinfo(kind).max, numpy.iinfo(kind).min]
    )
    a, b = (x.ravel() for x in numpy.meshgrid(numpy.array(few, kind), numpy.array(few, kind)))
    codes = f"u{kind.itemsize}"
    text = f"setp.{name}.{ptx_type} %p1|%p2, $a, $b; selp.b32 $d, 1, 0, %p1; selp.b32 $e, 1, 0, %p2;"
    got, opposite = lanes(text, a.view(codes), b.view(codes), out=(numpy.uint32, numpy.uint32))
    unordered = (a != a) | (b != b)
    wanted = COMPARISONS[name](a, b) & ~unordered
    assert got.tolist() == wanted.astype(int).tolist() and opposite.tolist() == (~wanted).astype(int).tolist()
    if ptx_type[0] == "f":
        text = f"setp.{name}u.{ptx_type} %p1, $a, $b; selp.b32 $d, 1, 0, %p1;"
        assert (
            lanes(text, a.view(codes), b.view(codes), out=numpy.uint32).tolist()
            == (wanted | unordered).astype(int).tolist()
        )


def test_unsigned_comparisons_and_nan_tests():
    a, b = WORDS, WORDS[::-1].copy()
    for name, same in UNSIGNED.items():
        got = lanes(f"setp.{name}.u32 %p1, $a, $b; selp.b32 $d, 1, 0, %p1;", a, b, out=numpy.uint32)
        assert got.tolist() == COMPARISONS[same](a, b).astype(int).tolist()
    x, y = numpy.array([1, NAN, INF], numpy.float32), numpy.array([0, 1, NAN], numpy.float32)
    assert lanes("setp.num.f32 %p1, $a, $b; selp.b32 $d, 1, 0, %p1;", x, y, out=numpy.uint32).tolist() == [1, 0, 0]
    assert lanes("setp.nan.f32 %p1, $a, $b; selp.b32 $d, 1, 0, %p1;", x, y, out=numpy.uint32).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "combination, of", [("and", lambda p, c: p & c), ("or", lambda p, c: p | c), ("xor", lambda p, c: p ^ c)]
)
def test_setp_with_another_predicate(combination, of):
    a = numpy.array([1, 1, 2, 2], numpy.float16)
    c = numpy.array([0, 1, 0, 1], numpy.uint32)
    text = f"""setp.ne.u32 %p3, $b, 0; setp.lt.{combination}.f16 %p1|%p2, $a, 0x3e00, %p3;
      selp.b32 $d, 1, 0, %p1; selp.b32 $e, 1, 0, %p2;"""
    first, second = lanes(text, a.view(numpy.uint16), c, out=(numpy.uint32, numpy.uint32))
    less = numpy.array([1, 1, 0, 0])
    assert first.tolist() == of(less, c).tolist() and second.tolist() == of(1 - less, c).tolist()
    negated = lanes(text.replace("%p3;\n", "!%p3;\n"), a.view(numpy.uint16), c, out=(numpy.uint32, numpy.uint32))
    assert negated[0].tolist() == of(less, 1 - c).tolist()


def test_pairs_compare_each_half():
    a = numpy.array([[1, 2], [3, NAN]], numpy.float16).view(numpy.uint32).ravel()
    b = numpy.array([[2, 1], [2, 2]], numpy.float16).view(numpy.uint32).ravel()
    text = "setp.{}.f16x2 %p1|%p2, $a, $b; selp.b32 $d, 1, 0, %p1; selp.b32 $e, 1, 0, %p2;"
    low, high = lanes(text.format("lt"), a, b, out=(numpy.uint32, numpy.uint32))
    assert low.tolist() == [1, 0] and high.tolist() == [0, 0]
    low, high = lanes(text.format("geu"), a, b, out=(numpy.uint32, numpy.uint32))
    assert low.tolist() == [0, 1] and high.tolist() == [1, 1]


@pytest.mark.parametrize(
    "combination, wanted",
    [("and", [[0, 0], [0, 1]]), ("or", [[0, 1], [1, 1]]), ("xor", [[0, 1], [1, 0]])],
)
def test_pairs_with_another_predicate(combination, wanted):
    a = numpy.array([[1, 2], [3, NAN]], numpy.float16).view(numpy.uint32).ravel()
    b = numpy.array([[1, 1], [3, 2]], numpy.float16).view(numpy.uint32).ravel()  # the high halves differ
    text = f"""setp.ne.u32 %p3, $c, 0; setp.neu.{combination}.f16x2 %p1|%p2, $a, $b, %p3;
      selp.b32 $d, 1, 0, %p1; selp.b32 $e, 1, 0, %p2;"""
    got = lanes(text, a, b, numpy.array([0, 1], numpy.uint32), out=(numpy.uint32, numpy.uint32))
    assert [each.tolist() for each in got] == wanted


@pytest.mark.parametrize(
    "text, a, b, wanted",
    [
        ("set.lt.u32.s32 $d, $a, $b;", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("set.lt.u32.u32 $d, $a, $b;", 0xFFFFFFFF, 1, 0),
        ("set.ge.f32.f32 $d, $a, $b;", 0x40000000, 0x3F800000, 0x3F800000),
        ("set.gt.f16x2.f16x2 $d, $a, $b;", 0x40003C00, 0x3C003C00, 0x3C000000),
        ("set.le.bf16x2.bf16x2 $d, $a, $b;", 0x3F803F80, 0x40003F80, 0x3F803F80),
        ("set.gt.u32.f16x2 $d, $a, $b;", 0x40003C00, 0x3C003C00, 0xFFFF0000),
        ("slct.u32.s32 $d, 7, $a, $b;", 5, 0x80000000, 5),
        ("slct.u32.f32 $d, 7, $a, $b;", 5, 0x80000000, 7),
        ("slct.u32.f32 $d, 7, $a, $b;", 5, 0x7FC00000, 5),
        ("slct.ftz.u32.f32 $d, 7, $a, $b;", 5, 0x80000001, 7),
        ("testp.subnormal.f32 %p1, $a; selp.b32 $d, 1, 0, %p1;", 5, 0, 1),
        ("testp.normal.f32 %p1, $b; selp.b32 $d, 1, 0, %p1;", 5, 0x80000000, 1),
        ("testp.infinite.f32 %p1, $b; selp.b32 $d, 1, 0, %p1;", 5, 0xFF800000, 1),
        ("testp.notanumber.f32 %p1, $b; selp.b32 $d, 1, 0, %p1;", 5, 0xFF800000, 0),
        ("setp.eq.ftz.f32 %p1, $a, $b; selp.b32 $d, 1, 0, %p1;", 0x00000001, 0x80000002, 1),
        ("setp.eq.f32 %p1, $a, $b; selp.b32 $d, 1, 0, %p1;", 0x00000001, 0x80000002, 0),
        ("setp.eq.b32 %p1, $a, $b; mov.pred %p2, %p1; selp.b32 $d, $a, 9, !%p2;", 3, 3, 9),
    ],
)
def test_selections_by_hand(text, a, b, wanted):
    sources = (numpy.array([x], numpy.uint32) for x in (a, b))
    assert lanes(text, *sources, out=numpy.uint32).tolist() == [wanted]


def test_logic_of_predicates():
    a, b = numpy.array([0, 0, 1, 1], numpy.uint32), numpy.array([0, 1, 0, 1], numpy.uint32)
    for name, wanted in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        text = f"setp.ne.u32 %p1, $a, 0; setp.ne.u32 %p2, $b, 0; {name}.pred %p3, %p1, %p2; selp.b32 $d, 1, 0, %p3;"
        assert lanes(text, a, b, out=numpy.uint32).tolist() == wanted.tolist()
    text = "setp.ne.u32 %p1, $a, 0; not.pred %p3, %p1; @%p3 mov.u32 $d, 5; @!%p3 mov.u32 $d, 6;"
    assert lanes(text, a, out=numpy.uint32).tolist() == [5, 5, 6, 6]


def test_generic_addresses_and_back():
    body = """mov.u32 %r1, s; cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d2, %d1;
      st.b32 [%d2+4], 77; ld.shared.b32 %r2, [s+4];
      cvta.to.shared.u64 %d3, %d2; cvt.u32.u64 %r3, %d3; sub.u32 %r3, %r3, %r1;
      isspacep.shared %p1, %d2; isspacep.global %p2, %d2; isspacep.shared::cluster %p3, %d2;
      selp.b32 %r4, 100, 0, %p1; selp.b32 %r5, 1000, 0, %p2; selp.b32 %r6, 10000, 0, %p3;
      ld.param.u64 %d5, [out]; isspacep.global %p4, %d5; selp.b32 %r7, 100000, 0, %p4;
      add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; add.u32 %r2, %r2, %r5; add.u32 %r2, %r2, %r6; add.u32 %r2, %r2, %r7;
    """
    out, outcome = run(body + store("%r2"), size=1, block=1, shared=".shared .align 4 .b8 s[64];")
    assert out == [110177] and outcome.reports == []


def test_addresses_in_other_blocks_of_a_cluster():
    body = """mov.u32 %r1, s; mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1;
      mapa.shared::cluster.u32 %r4, %r1, %r3; add.u32 %r5, %r2, 40;
      st.shared::cluster.b32 [%r4], %r5;
      barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
      ld.shared.b32 %r6, [s]; getctarank.shared::cluster.u32 %r7, %r4;
      cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d2, %d1; mapa.u64 %d3, %d2, %r3; getctarank.u64 %r8, %d3;
      mad.lo.u32 %r6, %r7, 100, %r6; mad.lo.u32 %r6, %r8, 1000, %r6;
      barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    options = dict(size=2, grid=2, block=1, cluster=2, shared=".shared .align 4 .b8 s[64];")
    out, outcome = run(body + store("%r6", "%ctaid.x"), **options)
    assert out == [41 + 1100, 40] and outcome.reports == []
    _, outcome = run("mov.u32 %r1, s; mapa.shared::cluster.u32 %r4, %r1, 2; ret;", **options)
    assert outcome.faulted and "rank 2" in outcome.reports[0]


def test_a_cache_policy_is_any_value():
    out = lanes("createpolicy.fractional.L2::evict_last.b64 $d, 1.0;", WORDS, out=numpy.uint64)
    assert len(set(out.tolist())) == 1 and out[0] != 0


REFUSED = """
  mov.b32 %r0, {%h0, %h1, %h2}; mov.u32 %r0, {%h0, %h1}; mov.b128 %d0, %d1; mov.f16 %h0, %h1; mov.b32 %r0;
  mov.b64 {%r0, %r1}, {%r2, %r3}; mov.pred %p0, %r1; setp.lt.b32 %p0, %r0, %r1; setp.lo.s32 %p0, %r0, %r1;
  setp.ltu.u32 %p0, %r0, %r1; setp.lt.pred %p0, %p1, %p2; setp.lt.f16x2 %p0, %r0, %r1; setp.s32 %p0, %r0, %r1;
  setp.lt.and.s32 %p0, %r0, %r1; setp.lt.s32 %p0, %r0, %r1, %p1; setp.lt.ftz.f64 %p0, %fd0, %fd1;
  setp.lt.s32 %r0, %r1, %r2; selp.pred %p0, %p1, %p2, %p3; selp.b32 %r0, %r1, %r2, %r3;
  selp.f16 %h0, %h1, %h2, %p0; slct.u32.u32 %r0, %r1, %r2, %r3; set.lt.b32.s32 %r0, %r1, %r2;
  set.lt.s32 %r0, %r1, %r2; and.pred %p0, %p1, %r0; cvta.u64 %d0, %d1; cvta.global.b64 %d0, %d1;
  mapa.shared.u32 %r0, %r1, %r2; isspacep.global %r0, %d0; createpolicy.fractional.b64 %d0;
  testp.big.f32 %p0, %f0; mov.u32.rn %r0, %r1;
"""


@pytest.mark.parametrize("instruction", REFUSED.strip().rstrip(";").split(";"))
def test_what_the_isa_does_not_have_is_refused(instruction):
    with pytest.raises(PtxError, match=instruction.split()[0].replace(".", r"\.")):
        Kernel(kernel_text(instruction + ";\n ret;"))
