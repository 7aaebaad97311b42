"""Loads, stores and atomics of the emulator."""

import itertools

import numpy
import pytest

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.syntax import PtxError
from tests.support.ptx import kernel_text

SHARED = ".shared .align 16 .b8 s[4096];"
IN_OUT = ".param .u64 in, .param .u64 out"


def run(body, *arrays, parameters=IN_OUT, block=1, grid=1, writable=None, shared=SHARED, **options):
    text = kernel_text(body + "\n  ret;", parameters, shared)
    return Kernel(text).run(
        grid, block, list(arrays), writable=arrays[-1:] if writable is None else writable, **options
    )


def kinds(outcome):
    return [report[1 : report.index("]")] for report in outcome.reports]


POINTERS = "ld.param.u64 %d1, [in]; ld.param.u64 %d2, [out]; mov.u32 %r1, %tid.x;"


@pytest.mark.parametrize(
    "ptx_type, value, wanted",
    [
        ("s8", 0x80, 0xFFFFFF80), ("u8", 0x80, 0x80), ("b8", 0xFF, 0xFF), ("s16", 0xFFFE, 0xFFFFFFFE),
        ("u16", 0xFFFE, 0xFFFE),
        ("b16", 0x8000, 0x8000), ("s32", 0x80000000, 0x80000000),
    ],
)  # fmt: skip
def test_a_load_into_a_wide_register_extends_by_its_type(ptx_type, value, wanted):
    source, out = numpy.array([value], numpy.uint32), numpy.zeros(1, numpy.uint32)
    outcome = run(f"{POINTERS} ld.global.{ptx_type} %r2, [%d1]; st.global.b32 [%d2], %r2;", source, out)
    assert out[0] == wanted and outcome.reports == []


def test_a_signed_load_into_64_bits():
    source, out = numpy.array([-5], numpy.int32), numpy.zeros(1, numpy.int64)
    run(f"{POINTERS} ld.global.s32 %d3, [%d1]; st.global.b64 [%d2], %d3;", source, out)
    assert out[0] == -5


@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
@pytest.mark.parametrize(
    "elements, ptx_type", [(1, "u8"), (2, "u16"), (4, "u8"), (4, "u32"), (2, "u64"), (2, "f32"), (1, "f64")]
)
def test_vectors_through_every_space(space, elements, ptx_type):
    size = int(ptx_type[1:]) // 8
    register = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[size]
    total = elements * size
    source = numpy.arange(32 * total, dtype=numpy.uint8)
    out = numpy.zeros_like(source)
    values = ", ".join(f"{register}{10 + k}" for k in range(elements))
    values = f"{{{values}}}" if elements > 1 else values
    vector = f".v{elements}" if elements > 1 else ""
    name = {"global": "global", "shared": "shared", "local": "local", "generic": ""}[space]
    base = {"global": "%d2", "shared": "%r3", "local": "%d6", "generic": "%d2"}[space]
    there = f"{'.' + name if name else ''}{vector}.{ptx_type}"
    body = f"""{POINTERS} .local .align 16 .b8 l[64];
      mad.wide.u32 %d1, %r1, {total}, %d1; mad.wide.u32 %d2, %r1, {total}, %d2;
      mov.u32 %r2, s; mad.lo.u32 %r3, %r1, {total}, %r2; mov.u64 %d6, l;
      ld.global{vector}.{ptx_type} {values}, [%d1]; st{there} [{base}], {values};
    """
    if space in ("shared", "local"):
        values = values.replace(register + "1", register + "2")
        body += f"ld{there} {values}, [{base}]; st.global{vector}.{ptx_type} [%d2], {values};"
    outcome = run(body, source, out, block=32)
    assert (out == source).all() and outcome.reports == []


def test_a_sink_in_a_vector_is_not_written():
    source, out = numpy.arange(4, dtype=numpy.uint32), numpy.zeros(1, numpy.uint32)
    run(f"{POINTERS} ld.global.v4.u32 {{_, _, %r2, _}}, [%d1]; st.global.u32 [%d2], %r2;", source, out)
    assert out[0] == 2


def test_parameters_by_offset_and_by_generic_address():
    out = numpy.zeros(2, numpy.uint32)
    parameters = ".param .align 8 .b8 in[16], .param .u64 out"
    body = """ld.param.u64 %d2, [out]; ld.param.v2.u32 {%r1, %r2}, [in+8];
      mov.b64 %d3, in; cvta.param.u64 %d4, %d3; ld.u32 %r3, [%d4+4]; add.u32 %r1, %r1, %r3;
      st.global.v2.u32 [%d2], {%r1, %r2};"""
    outcome = run(body, numpy.arange(1, 5, dtype=numpy.uint32).tobytes(), out, parameters=parameters, writable=[out])
    assert out.tolist() == [3 + 2, 4] and outcome.reports == []


@pytest.mark.parametrize(
    "access, kind",
    [
        ("ld.global.u32 %r2, [%d1+4096]", "out of bounds"), ("ld.global.u32 %r2, [%d1+2]", "misaligned"),
        ("ld.global.v2.u32 {%r2, %r3}, [%d1+4]", "misaligned"), ("st.global.u32 [%d1], %r1", "read-only"),
        ("ld.param.u32 %r2, [in+16]", "out of bounds"), ("ld.local.u32 %r2, [64]", "out of bounds"),
        ("ld.shared.u32 %r2, [s+4096]", "out of bounds"), ("ld.shared.u16 %h2, [s+1]", "misaligned"),
        ("ld.u32 %r2, [16]", "out of bounds"), ("atom.local.add.u32 %r2, [0], 1", None),
    ],
)  # fmt: skip
def test_where_nothing_may_be_accessed(access, kind):
    source, out = numpy.zeros(4, numpy.uint32), numpy.zeros(4, numpy.uint32)
    body = f".local .align 4 .b8 l[64]; {POINTERS} {access};"
    if kind is None:
        with pytest.raises(PtxError, match="atom"):
            run(body, source, out)
        return
    outcome = run(body, source, out)
    assert outcome.faulted and kinds(outcome) == [kind]


def test_constant_loads_of_what_the_grid_has_written():
    out = numpy.zeros(8, numpy.uint32)
    body = "ld.param.u64 %d2, [out]; {} ld.global.nc.u32 %r2, [%d2]; st.global.u32 [%d2+4], %r2;"
    assert kinds(run(body.format("st.global.u32 [%d2], 5;"), out, parameters=".param .u64 out")) == ["ld.nc"]
    assert run(body.format(""), out, parameters=".param .u64 out").reports == []


ATOMICS = {
    ("and", "b32"): lambda a, b: a & b, ("or", "b32"): lambda a, b: a | b, ("xor", "b32"): lambda a, b: a ^ b,
    ("exch", "b32"): lambda a, b: b, ("add", "u32"): lambda a, b: (a + b) % 2**32,
    ("add", "s32"): lambda a, b: (a + b) % 2**32,
    ("inc", "u32"): lambda a, b: 0 if a >= b else a + 1, ("dec", "u32"): lambda a, b: b if a == 0 or a > b else a - 1,
    ("min", "u32"): min, ("max", "u32"): max,
    ("min", "s32"): lambda a, b: min((a, b), key=lambda x: x - (x >> 31 << 32)),
    ("max", "s32"): lambda a, b: max((a, b), key=lambda x: x - (x >> 31 << 32)),
}  # fmt: skip
OPERANDS = list(itertools.product([0, 1, 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], repeat=2))


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name, ptx_type", ATOMICS)
def test_integer_atomics(name, ptx_type, space):
    a, b = (numpy.array(each, numpy.uint32) for each in zip(*OPERANDS))
    source, out = numpy.concatenate([a, b]), numpy.zeros(2 * len(a), numpy.uint32)
    address = "%d2" if space == "global" else "%r3"
    body = f"""{POINTERS} mad.wide.u32 %d1, %r1, 4, %d1; mad.wide.u32 %d2, %r1, 4, %d2;
      ld.global.u32 %r10, [%d1]; ld.global.u32 %r11, [%d1+{4 * len(a)}];
      mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
      st.{space}.u32 [{address}], %r10; atom.{space}.{name}.{ptx_type} %r12, [{address}], %r11;
      ld.{space}.u32 %r13, [{address}]; st.global.u32 [%d2], %r13; st.global.u32 [%d2+{4 * len(a)}], %r12;"""
    outcome = run(body, source, out, block=len(a))
    assert out[len(a) :].tolist() == a.tolist()
    assert out[: len(a)].tolist() == [ATOMICS[name, ptx_type](int(x), int(y)) for x, y in OPERANDS]
    assert outcome.reports == []


def test_64_bit_atomics_and_compare_and_swap():
    source, out = numpy.array([2**40, 7], numpy.uint64), numpy.array([2**40 - 1, 7, 9], numpy.uint64)
    body = f"""{POINTERS} ld.global.u64 %d10, [%d1];
      atom.global.max.u64 %d11, [%d2], %d10; atom.global.cas.b64 %d12, [%d2+8], 7, 8;
      atom.global.cas.b64 %d13, [%d2+16], 7, 8;
      red.global.add.u64 [%d2+16], %d12;"""
    assert run(body, source, out).reports == []
    assert out.tolist() == [2**40, 8, 16]
    halves = numpy.array([3, 4], numpy.uint16)
    body = """ld.param.u64 %d2, [out]; mov.u16 %h1, 3; mov.u16 %h2, 9;
      atom.global.cas.b16 %h3, [%d2], %h1, %h2; st.global.u16 [%d2+2], %h3;"""
    run(body, halves, parameters=".param .u64 out")
    assert halves.tolist() == [9, 3]


@pytest.mark.parametrize("space, wanted", [("global", 0), ("shared", 3)])
def test_f32_sums_flush_subnormal_numbers_in_global_memory(space, wanted):
    out = numpy.array([1], numpy.uint32)
    address = "%d2" if space == "global" else "s"
    body = f"""ld.param.u64 %d2, [out]; mov.b32 %r2, 1; st.{space}.u32 [{address}], %r2; mov.b32 %f1, 2;
      atom.{space}.add.f32 %f2, [{address}], %f1; ld.{space}.u32 %r3, [{address}]; st.global.u32 [%d2], %r3;"""
    assert run(body, out, parameters=".param .u64 out").reports == []
    assert out[0] == wanted


@pytest.mark.parametrize("vector", [1, 2, 4])
def test_sums_of_halves(vector):
    start = numpy.array([[1.5, 2.0]] * vector, numpy.float16)
    out = start.copy()
    registers = ", ".join(f"%r{10 + k}" for k in range(vector))
    what = f"{{{registers}}}" if vector > 1 else registers
    moves = " ".join(f"mov.b32 %r{10 + k}, 0x3c01bc00;" for k in range(vector))  # {-1, 1 + 2^-10}
    suffix = f".v{vector}" if vector > 1 else ""
    body = f"ld.param.u64 %d2, [out]; {moves} red.global.gpu.relaxed.add.noftz{suffix}.f16x2 [%d2], {what};"
    assert run(body, out, parameters=".param .u64 out").reports == []
    assert out.tolist() == (start + numpy.array([-1, 1 + 2**-10], numpy.float16)).tolist()


def test_lanes_that_add_to_one_address():
    out = numpy.zeros(1, numpy.float32)
    body = "ld.param.u64 %d2, [out]; mov.u32 %r1, %tid.x; cvt.rn.f32.u32 %f1, %r1; red.global.add.f32 [%d2], %f1;"
    outcome = run(body, out, parameters=".param .u64 out", block=96, grid=3)
    assert out[0] == 3 * 95 * 96 / 2 and outcome.reports == []
    assert outcome.counts.atomics == 9


def test_the_order_of_lanes_in_an_atomic_is_open():
    seen = set()
    for seed in range(6):
        out = numpy.zeros(33, numpy.uint32)
        body = """ld.param.u64 %d2, [out]; mov.u32 %r1, %tid.x; atom.global.add.u32 %r2, [%d2], 1;
          mad.wide.u32 %d3, %r1, 4, %d2; st.global.u32 [%d3+4], %r2;"""
        run(body, out, parameters=".param .u64 out", block=32, seed=seed)
        assert sorted(out[1:].tolist()) == list(range(32))
        seen.add(tuple(out[1:]))
    assert len(seen) > 2


MESSAGE = """ld.param.u64 %d2, [out]; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra reader;
    st.global.u32 [%d2], 42; {send} ret;
  reader: {wait}
    setp.eq.u32 %p2, %r2, 0; @%p2 bra reader;
    ld.global.u32 %r3, [%d2]; st.global.u32 [%d2+8], %r3;"""
SENDS = {
    "st.release.gpu.global.u32 [%d2+4], 1;": True, "st.relaxed.gpu.global.u32 [%d2+4], 1;": False,
    "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%d2+4], 1;": True,
    "red.release.gpu.global.add.u32 [%d2+4], 1;": True,
    "atom.gpu.global.exch.b32 %r9, [%d2+4], 1;": False,
}  # fmt: skip
WAITS = {
    "ld.acquire.gpu.global.u32 %r2, [%d2+4];": True,
    "ld.volatile.global.u32 %r2, [%d2+4]; fence.acq_rel.gpu;": True,
    "atom.acquire.gpu.global.or.b32 %r2, [%d2+4], 0;": True,
}  # fmt: skip


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("send", SENDS)
def test_a_message_between_blocks(send, wait):
    out = numpy.zeros(4, numpy.uint32)
    outcome = run(MESSAGE.format(send=send, wait=wait), out, parameters=".param .u64 out", grid=2, shared="")
    assert out[2] == 42
    assert bool(outcome.reports) == (not (SENDS[send] and WAITS[wait])), outcome.reports


@pytest.mark.parametrize("greedy", ["greedy", "in_turn", "backwards", "random"])
def test_a_poll_in_shared_memory_ends(greedy):
    out = numpy.zeros(1, numpy.uint32)
    body = """ld.param.u64 %d2, [out]; mov.u32 %r1, %tid.x; st.shared.u32 [s], 0; bar.sync 0;
      setp.lt.u32 %p1, %r1, 32; @%p1 bra first;
      st.shared.u32 [s+4], 7; st.release.cta.shared.u32 [s], 1; ret;
    first: ld.acquire.cta.shared.u32 %r2, [s]; setp.eq.u32 %p2, %r2, 0; @%p2 bra first;
      ld.shared.u32 %r3, [s+4]; st.global.u32 [%d2], %r3;"""
    body = body.replace(
        "mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.x; and.b32 %r4, %r1, 31; setp.ne.u32 %p3, %r4, 0; @%p3 bra done;"
    )
    body = body.replace(
        "st.shared.u32 [s], 0; bar.sync 0;", "setp.eq.u32 %p4, %r1, 32; @%p4 st.shared.u32 [s], 0; barrier.sync 0, 64;"
    )
    body = body.replace("%p3 bra done;", "%p3 bra done;") + " ret; done: barrier.sync 0, 64;"
    outcome = run(body, out, parameters=".param .u64 out", block=64, schedule=greedy, max_steps=10**5)
    assert out[0] == 7 and outcome.reports == []


def test_requests_are_counted_by_space():
    # from a sector's begin on
    source, out = (each[-each.ctypes.data % 32 // 4 :][:64] for each in numpy.zeros((2, 72), numpy.uint32))
    body = f"""{POINTERS} mad.wide.u32 %d1, %r1, 4, %d1; mad.wide.u32 %d2, %r1, 4, %d2;
      mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
      ld.global.u32 %r4, [%d1]; st.shared.u32 [%r3], %r4; ld.shared.u32 %r5, [%r3]; st.global.u32 [%d2], %r5;"""
    counts = run(body, source, out, block=64).counts
    assert (counts.global_loads, counts.global_stores, counts.shared_loads, counts.shared_stores) == (2, 2, 2, 2)
    assert counts.parameter_loads == 4 and counts.global_load_sectors == 8


REFUSED = """
  ld.global.f16 %h0, [%d0]; ld.global.b128 %d0, [%d0]; ld.global.pred %p0, [%d0];
  ld.global.v3.u32 {%r0, %r1, %r2}, [%d0]; ld.global.v2.u32 %r0, [%d0]; ld.global.u32 {%r0, %r1}, [%d0];
  ld.shared.v4.u64 {%d0, %d1, %d2, %d3}, [%r0]; ld.global.v8.u16 {%h0, %h1, %h2, %h3, %h4, %h5, %h6, %h7}, [%d0];
  ld.relaxed.global.u32 %r0, [%d0]; ld.global.gpu.u32 %r0, [%d0]; ld.release.gpu.global.u32 %r0, [%d0];
  st.acquire.gpu.global.u32 [%d0], %r0; ld.acquire.gpu.local.u32 %r0, [%d0];
  ld.volatile.global.cg.u32 %r0, [%d0]; ld.shared.nc.u32 %r0, [%r1]; st.const.u32 [%d0], %r0;
  st.param.u32 [%d0], %r0; st.global.nc.u32 [%d0], %r0; st.global.u32 [%d0]; ld.global.u32 %r0, %d0;
  ld.global.u32 %r0, [%d0], %d1; ld.global.L2::cache_hint.u32 %r0, [%d0]; ld.global.wb.u32 %r0, [%d0];
  ld.texture.u32 %r0, [%d0]; atom.global.add.b32 %r0, [%d0], %r1; atom.global.inc.s32 %r0, [%d0], %r1;
  atom.global.cas.u32 %r0, [%d0], %r1, %r2; atom.global.cas.b32 %r0, [%d0], %r1;
  atom.global.add.f16 %h0, [%d0], %h1; atom.global.add.noftz.f32 %f0, [%d0], %f1;
  atom.global.min.f32 %f0, [%d0], %f1; red.global.exch.b32 [%d0], %r0; red.acquire.gpu.global.add.u32 [%d0], %r0;
  atom.const.add.u32 %r0, [%d0], %r1; atom.shared.add.v2.f32 {%f0, %f1}, [%r0], {%f2, %f3};
  red.global.add.v2.u32 [%d0], {%r0, %r1}; red.global.u32 [%d0], %r0; prefetch.global [%d0];
  discard.global.L2 [%d0], 128; ld.mmio.relaxed.gpu.global.u32 %r0, [%d0]; ld.mmio.relaxed.sys.shared.u32 %r0, [%r1];
  ld.mmio.relaxed.sys.global.v2.u32 {%r0, %r1}, [%d0]; ld.volatile.global.L1::evict_last.u32 %r0, [%d0];
  ld.global.cg.L1::evict_last.u32 %r0, [%d0]; ld.shared.L2::64B.u32 %r0, [%r1];
  ld.shared.L2::cache_hint.u32 %r0, [%r1], %d1; ld.global.L2::evict_last.u32 %r0, [%d0];
  atom.global.add.s64 %d1, [%d0], %d2; red.global.add.s64 [%d0], %d2;
  atom.shared.add.L2::cache_hint.u32 %r0, [%r1], %r2, %d1; atom.global.cas.L2::cache_hint.b32 %r0, [%d0], %r1, %r2, %d1;
  fence.acquire.sync_restrict::shared::cta.cluster; fence.release.sync_restrict::shared::cta.cta;
  fence.sync_restrict::shared::cta.cluster; fence.acq_rel; fence.proxy.tensormap;
  fence.proxy.async::generic.release.sync_restrict::shared::cluster.cluster; cp.async.ca.global [%r1], [%d0], 16;
"""


@pytest.mark.parametrize("instruction", REFUSED.strip().rstrip(";").split(";"))
def test_what_the_isa_does_not_have_is_refused(instruction):
    """From `ld.mmio` on, the verdicts are those of ptxas 13.0."""
    with pytest.raises(PtxError, match=instruction.split()[0].replace(".", r"\.")):
        Kernel(kernel_text(instruction + ";\n ret;"))


def test_a_volatile_access_to_local_memory():
    out = numpy.zeros(1, numpy.uint32)
    body = """.local .align 4 .b8 l[4]; ld.param.u64 %d2, [out]; mov.u64 %d6, l;
      st.volatile.local.u32 [%d6], 7; ld.volatile.local.u32 %r2, [%d6]; st.global.u32 [%d2], %r2;"""
    assert run(body, out, parameters=".param .u64 out").reports == [] and out[0] == 7


def test_a_vector_of_atomics_is_in_global_memory():
    out = numpy.zeros(2, numpy.float32)
    body = """ld.param.u64 %d2, [out]; mov.b32 %f1, 0f3f800000; {} red.add.v2.f32 [%d2], {{%f1, %f1}};"""
    assert run(body.format(""), out, parameters=".param .u64 out").reports == [] and out.tolist() == [1, 1]
    shared = "mov.u64 %d3, s; cvta.shared.u64 %d2, %d3; st.v2.f32 [%d2], {{%f1, %f1}};".format()
    assert kinds(run(body.format(shared), out, parameters=".param .u64 out")) == ["atomic"]


def test_hints_are_taken_and_ignored():
    source, out = numpy.array([5], numpy.uint32), numpy.zeros(1, numpy.uint32)
    body = f"""{POINTERS} createpolicy.fractional.L2::evict_last.b64 %d5, 1.0;
      prefetch.global.L2 [%d1]; prefetch.global.L2::evict_last [%d1+1000000];
      ld.global.L1::evict_last.L2::cache_hint.L2::128B.b32 %r2, [%d1], %d5; st.global.L1::no_allocate.b32 [%d2], %r2;"""
    assert run(body, source, out).reports == [] and out[0] == 5
