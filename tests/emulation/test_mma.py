"""mma.sync: fragments by CuTe's layouts, values by fp64, and what is refused."""

import pytest
import torch

from fused_resnet.emulation import Kernel, PtxError
from tests.emulation import cute
from tests.support.ptx import kernel_text

DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "f32": torch.float32, "s8": torch.int8,
    "u8": torch.uint8, "s32": torch.int32, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
FORMS = [
    *(f"m16n8k{k}.{d}.f16.f16.{d}" for k in (8, 16) for d in ("f32", "f16")),
    *(f"m16n8k{k}.f32.bf16.bf16.f32" for k in (8, 16)),
    *(f"m16n8k{k}.f32.tf32.tf32.f32" for k in (4, 8)),
    *(f"m16n8k{k}.s32.{a}.{b}.s32" for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")),
    *(f"m16n8k{k}.{d}.{a}.{b}.{d}" for k in (16, 32) for d in ("f32", "f16") for a in ("e4m3", "e5m2")
      for b in ("e4m3", "e5m2")),
]  # fmt: skip
MODIFIERS = "mma.sync.aligned.{shape}.row.col.{types}"


def registers(prefix, first, count):
    return "{" + ", ".join(f"%{prefix}{first + j}" for j in range(count)) + "}"


def mma_text(op, a, b, c, guard="", before=""):
    """One warp: registers of A, B and C from [in], one row of them a lane; D to [out]."""
    loads = "\n".join(f"ld.global.b32 %r{j}, [%d0+{4 * j}];" for j in range(a + b + c))
    stores = "\n".join(f"st.global.b32 [%d1+{4 * j}], %r{100 + j};" for j in range(c))
    operands = ", ".join(registers("r", *part) for part in ((100, c), (0, a), (a, b), (a + b, c)))
    return kernel_text(
        f"""
        ld.param.u64 %d0, [in];
        ld.param.u64 %d1, [out];
        mov.u32 %r200, %tid.x;
        mad.wide.u32 %d0, %r200, {4 * (a + b + c)}, %d0;
        mad.wide.u32 %d1, %r200, {4 * c}, %d1;
        {loads}
        {before}
        {guard} {op} {operands};
        {stores}
        ret;""",
        parameters=".param .u64 in, .param .u64 out",
    )


def run(form, a, b, c, op=None, **options):
    """D for matrices A (16, k), B (k, 8) and C (16, 8), and the outcome."""
    shape, d_type, *_ = form.split(".")
    key = (a.element_size(), int(shape.split("k")[1]))
    fragments = [cute.registers_of(a, cute.A[key]), cute.registers_of(b.T, cute.B[key]), cute.registers_of(c, cute.C)]
    given = torch.cat(fragments, dim=1).contiguous()
    out = torch.zeros_like(fragments[2])
    op = op or MODIFIERS.format(shape=shape, types=form.split(".", 1)[1])
    text = mma_text(op, *(fragment.shape[1] for fragment in fragments))
    outcome = Kernel(text).run(1, 32, [given, out], writable=[out], **options)
    return cute.matrix_of(out, cute.C, 16, DTYPES[d_type]), outcome


def draw(form, seed=0):
    shape, d_type, a_type, b_type, _ = form.split(".")
    k, generator = int(shape.split("k")[1]), torch.Generator().manual_seed(seed)

    def matrix(rows, columns, name):
        dtype = DTYPES[name]
        if not dtype.is_floating_point:
            low = 0 if name == "u8" else -100
            return torch.randint(low, 200 if name == "u8" else 100, (rows, columns), generator=generator).to(dtype)
        values = torch.randn(rows, columns, generator=generator)
        if name == "tf32":
            values = (values.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return values.to(dtype)

    return matrix(16, k, a_type), matrix(k, 8, b_type), matrix(16, 8, d_type)


def expected(a, b, c):
    """Exact integers, or fp64 and one rounding: torch rounds fp64 to 16 bits by way of fp32, numpy does not."""
    exact = a.double() @ b.double() + c.double()
    return torch.from_numpy(exact.numpy().astype(torch.empty(0, dtype=c.dtype).numpy().dtype))


@pytest.mark.parametrize("form", FORMS)
def test_values_and_fragments(form):
    a, b, c = draw(form)
    d, outcome = run(form, a, b, c)
    assert outcome.reports == []
    assert torch.equal(d, expected(a, b, c))
    assert outcome.counts.mma == 1 and outcome.counts.tensor_multiply_adds == 16 * 8 * a.shape[1]


def test_each_element_has_its_place():
    """A and B with one element each: the product has one, in the right row and column."""
    form = "m16n8k32.s32.s8.s8.s32"
    zero = torch.zeros(16, 8, dtype=torch.int32)
    for m, n, k in [(0, 0, 0), (15, 7, 31), (3, 5, 17), (9, 1, 6), (8, 4, 16)]:
        a, b = torch.zeros(16, 32, dtype=torch.int8), torch.zeros(32, 8, dtype=torch.int8)
        a[m, k], b[k, n] = -128, 127
        d, _ = run(form, a, b, zero)
        assert d.nonzero().tolist() == [[m, n]] and d[m, n] == -128 * 127


def test_low_bits_of_tf32_are_ignored():
    form = "m16n8k8.f32.tf32.tf32.f32"
    a, b, c = draw(form)
    noise = [(x.view(torch.int32) | 0x1ABC).view(torch.float32) for x in (a, b)]
    assert torch.equal(run(form, *noise, c)[0], expected(a, b, c))


def test_integer_sums_wrap_or_saturate():
    form = "m16n8k16.s32.u8.u8.s32"
    a, b = torch.full((16, 16), 255, dtype=torch.uint8), torch.full((16, 8), 255, dtype=torch.uint8)
    c = torch.full((16, 8), 2**31 - 10, dtype=torch.int32)
    total = 2**31 - 10 + 16 * 255 * 255
    assert (run(form, a, b, c)[0] == total - 2**32).all()
    saturating = "mma.sync.aligned.m16n8k16.row.col.satfinite.s32.u8.u8.s32"
    assert (run(form, a, b, c, saturating)[0] == 2**31 - 1).all()
    signed = (torch.full((16, 16), -128, dtype=torch.int8), torch.full((16, 8), 127, dtype=torch.int8))
    assert (run(form, *signed, -c, saturating.replace("u8", "s8"))[0] == -(2**31)).all()


def test_special_values():
    """Infinity times zero, infinities of two signs and NaN give the canonical NaN; a sum may overflow."""
    form = "m16n8k16.f32.f16.f16.f32"
    a, b, c = torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8)
    a[0, 0] = torch.inf
    a[1, :2], b[:2, 0] = torch.tensor([torch.inf, -torch.inf]), 1
    c[2, 0], c[3, 0] = torch.nan, torch.inf
    d = run(form, a.half(), b.half(), c)[0]
    assert d[0, 0] == torch.inf and d[3, 0] == torch.inf
    for place in ((0, 1), (1, 0), (2, 0)):
        assert d[place].view(torch.int32) == 0x7FFFFFFF
    assert d[4:].abs().max() == 0
    large = torch.full((16, 16), 256.0).half()
    overflown = run("m16n8k16.f16.f16.f16.f16", large, large[:, :8], torch.zeros(16, 8).half())[0]
    assert (overflown == torch.inf).all()


@pytest.mark.parametrize(
    "op, sizes",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32", (4, 2, 4)),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16", (4, 2, 4)),
        ("mma.sync.aligned.m16n8k16.row.col.bf16.bf16.bf16.bf16", (4, 2, 2)),
        ("mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32", (4, 2, 4)),
        ("mma.sync.aligned.m16n8k4.row.col.f32.f16.f16.f32", (1, 1, 4)),
        ("mma.sync.aligned.m16n8k16.col.col.f32.f16.f16.f32", (4, 2, 4)),
        ("mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32", (4, 2, 4)),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", (2, 2, 4)),
        ("mma.sync.aligned.m16n8k16.row.col.kind::f8f6f4.f32.f16.f16.f32", (4, 2, 4)),
        ("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", (4, 2, 4)),
        ("mma.sync.m16n8k16.row.col.f32.f16.f16.f32", (4, 2, 4)),
        ("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32", (2, 1, 2)),
        ("mma.sync.aligned.m8n8k16.row.col.f32.e4m3.e4m3.f32", (1, 1, 2)),
        ("mma.sync.aligned.m8n8k4.col.row.f16.f16.f16.f32", (2, 2, 8)),
        ("mma.sync.aligned.m8n8k4.row.f32.f16.f16.f32", (2, 2, 8)),
        ("mma.sync.aligned.m8n8k32.row.col.s32.u4.s4.s32", (1, 1, 2)),
        ("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", (4, 2, 4)),
        ("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", (4, 2, 4)),
    ],
)
def test_what_the_isa_has_not_is_refused_at_load(op, sizes):
    """The same verdicts as ptxas 13.0 gives, but for .s4, .b1, .sp and kinds, which the emulator does not know."""
    with pytest.raises(PtxError, match="line .*mma"):
        Kernel(mma_text(op, *sizes))


@pytest.mark.parametrize(
    "guard, before",
    [
        ("@%p0", "setp.lt.u32 %p0, %r200, 16;"),
        ("", "setp.ge.u32 %p0, %r200, 16; @%p0 exit;"),
    ],
    ids=["predicated off", "exited"],
)
def test_absent_lanes_are_reported(guard, before):
    op, given, out = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", torch.zeros(32, 10), torch.zeros(32, 4)
    outcome = Kernel(mma_text(op, 4, 2, 4, guard, before)).run(1, 32, [given, out], writable=[out])
    assert outcome.faulted and any(report.startswith("[aligned]") for report in outcome.reports)
    whole = before.replace("16", "32")
    assert Kernel(mma_text(op, 4, 2, 4, guard, whole)).run(1, 32, [given, out], writable=[out]).reports == []
