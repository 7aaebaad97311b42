"""wgmma: canonical layouts and fragments by CuTe's formulas, values by fp64, all types, and what is refused."""

import pytest
import torch

from fused_resnet.emulation import Kernel, PtxError
from tests.emulation import cute
from tests.emulation.test_mma import DTYPES, draw
from tests.emulation.wgmma_programs import Operands, descriptor, kinds, layout_for, names, program, run

COMMIT = "wgmma.commit_group.sync.aligned;"


def matrices(types, n, seed=0):
    """A (64, k), B (n, k) and D (64, n)."""
    d_type, a_type, b_type = types.split(".")
    k = 32 // DTYPES[a_type].itemsize
    form = f"m16n8k{k}.{types}.{d_type}"
    a = torch.cat([draw(form, seed + part)[0] for part in range(4)])
    b = torch.cat([draw(form, seed + 10 + part)[1].T for part in range(n // 8)]).contiguous()
    halves = [[draw(form, seed + 100 + 8 * part + row)[2] for part in range(n // 8)] for row in range(4)]
    return a, b, torch.cat([torch.cat(row, dim=1) for row in halves])


def op(types, n, *, a="%d20", scale_d="%p1", tail=None):
    d_type, a_type, b_type = types.split(".")
    size = DTYPES[a_type].itemsize
    if tail is None:
        floats = ", 1, 1" if d_type != "s32" else ""
        tail = floats + (", 0, 0" if size == 2 else "")
    sums = n // 4 if d_type == "f16" else n // 2
    shape = f"m64n{n}k{32 // size}"
    return f"wgmma.mma_async.sync.aligned.{shape}.{types} {names('f', 0, sums)}, {a}, %d21, {scale_d}{tail};"


def load_sums(sums):
    """D's first values, from behind the fragments of A: registers %f0- as the thread's row of [fragments + 2048]."""
    lines = [f"mad.wide.s32 %d5, %r250, {4 * sums - 16}, %d1;"]
    return "\n".join([*lines, *(f"ld.global.b32 %f{j}, [%d5+{2048 + 4 * j}];" for j in range(sums))])


def multiply(types, a, b, d, a_layout, b_layout, *, tail=None, registers_a=False, scale_d=True, **options):
    """A (64, k) times the transpose of B (n, k), plus D (64, n), by one wgmma; and the outcome."""
    n, operands = len(b), Operands(a, b, a_layout, b_layout)
    sums = cute.registers_of(d, cute.wgmma_d(n))
    fragments = cute.registers_of(a, cute.WGMMA_A[a.element_size()])
    given = torch.cat([fragments.reshape(-1), sums.reshape(-1)])
    body = f"""
    {operands.descriptors}
    setp.eq.u32 %p1, {int(scale_d)}, 1;
    {load_sums(sums.shape[1])}
    wgmma.fence.sync.aligned;
    {op(types, n, a=names("r", 0, 4) if registers_a else "%d20", tail=tail)}
    {COMMIT}"""
    out, outcome = run(program(body, operands.size, sums.shape[1]), operands.image, given, sums.shape[1], **options)
    return cute.matrix_of(out, cute.wgmma_d(n), 64, d.dtype), outcome


def product(types, n, a_layout, b_layout, *, scale_d=True, seed=0, **options):
    """D of random matrices, what it should be, and the outcome."""
    a, b, d = matrices(types, n, seed)
    exact = a.double() @ b.double().T + (d.double() if scale_d else 0)
    wanted = torch.from_numpy(exact.numpy().astype(torch.empty(0, dtype=d.dtype).numpy().dtype))
    got, outcome = multiply(types, a, b, d, a_layout, b_layout, scale_d=scale_d, **options)
    return got, wanted, outcome


def check(types, n, a_layout, b_layout, **options):
    d, wanted, outcome = product(types, n, a_layout, b_layout, **options)
    assert outcome.reports == []
    assert torch.equal(d, wanted)
    assert outcome.counts.tensor_multiply_adds == 64 * n * 32 // DTYPES[types.split(".")[1]].itemsize


SWIZZLES = list(cute.SPANS)


@pytest.mark.parametrize("b_mn_major", [False, True])
@pytest.mark.parametrize("a_mn_major", [False, True])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_the_eight_canonical_layouts(swizzle, a_mn_major, b_mn_major):
    other = SWIZZLES[(SWIZZLES.index(swizzle) + 1) % 4]
    a_layout = layout_for(swizzle, a_mn_major, 2, 64)
    for n in (8, 72, 256) if swizzle == "128B" else (24, 64):
        b_layout = layout_for(other, b_mn_major, 2, n)
        check("f32.bf16.bf16", n, a_layout, b_layout, tail=f", 1, 1, {int(a_mn_major)}, {int(b_mn_major)}", seed=n)


TYPES = [
    "f32.f16.f16", "f16.f16.f16", "f32.bf16.bf16", "f32.tf32.tf32", "s32.s8.s8", "s32.u8.s8", "s32.s8.u8", "s32.u8.u8",
    "f32.e4m3.e4m3", "f32.e5m2.e4m3", "f16.e4m3.e5m2", "f16.e5m2.e5m2",
]  # fmt: skip


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("types", TYPES)
def test_types(types, landing):
    size = DTYPES[types.split(".")[1]].itemsize
    for n, registers_a, scale_d in ((8, False, True), (48, True, True), (32, True, False)):
        a_layout, b_layout = layout_for("128B", False, size, 64), layout_for("64B", False, size, n)
        check(types, n, a_layout, b_layout, registers_a=registers_a, scale_d=scale_d, landing=landing, seed=n,
              tail=", 1, 1, 0" if registers_a and size == 2 else None)  # fmt: skip


@pytest.mark.parametrize("scale_a", [1, -1])
@pytest.mark.parametrize("scale_b", [1, -1])
def test_scales_negate(scale_a, scale_b):
    layouts = layout_for("128B", False, 2, 64), layout_for("32B", False, 2, 16)
    d, wanted, _ = product("f32.f16.f16", 16, *layouts, tail=f", {scale_a}, {scale_b}, 0, 0", scale_d=False)
    assert torch.equal(d, scale_a * scale_b * wanted)


def test_integer_sums_saturate():
    a, b = torch.full((64, 32), 255, dtype=torch.uint8), torch.full((8, 32), 255, dtype=torch.uint8)
    operands = Operands(a, b, layout_for("none", False, 1, 64), layout_for("none", False, 1, 8))
    for satfinite, wanted in ((".satfinite", 2**31 - 1), ("", 2**31 - 5 + 32 * 255 * 255 - 2**32)):
        body = f"""{operands.descriptors}
        mov.b32 %f0, {2**31 - 5}; mov.b32 %f1, %f0; mov.b32 %f2, %f0; mov.b32 %f3, %f0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k32{satfinite}.s32.u8.u8 {names("f", 0, 4)}, %d20, %d21, 1;
        {COMMIT}"""
        out, outcome = run(program(body, operands.size), operands.image)
        assert outcome.reports == [] and (out == wanted).all()


@pytest.mark.parametrize("registers_a", [False, True])
@pytest.mark.parametrize("n", [8, 48])
def test_bits(n, registers_a):
    """.b1: D = A and B, counted along k = 256; what is expected comes of the bits as fp64 numbers."""
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randint(0, 256, (rows, 32), generator=generator, dtype=torch.uint8) for rows in (64, n))
    bits = [(m[..., None] >> torch.arange(8) & 1).reshape(len(m), 256).double() for m in (a, b)]
    operands = Operands(a, b, layout_for("128B", False, 1, 64), layout_for("32B", False, 1, n))
    of_a = names("r", 0, 4) if registers_a else "%d20"
    body = f"""{operands.descriptors}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k256.s32.b1.b1.and.popc {names("f", 0, n // 2)}, {of_a}, %d21, 0;
    {COMMIT}"""
    fragments = cute.registers_of(a, cute.WGMMA_A[1])
    out, outcome = run(program(body, operands.size, n // 2), operands.image, fragments, n // 2)
    assert outcome.reports == [] and outcome.counts.tensor_multiply_adds == 64 * n * 256
    assert torch.equal(cute.matrix_of(out, cute.wgmma_d(n), 64, torch.int32), (bits[0] @ bits[1].T).int())


@pytest.mark.parametrize("swizzle, lines", [("128B", 1), ("128B", 5), ("64B", 3), ("32B", 1)])
def test_a_base_offset_moves_the_pattern(swizzle, lines):
    """The pattern begins `lines` times 128 bytes behind a multiple of 1024; the descriptor says so, or is wrong."""
    a, b, d = matrices("f32.f16.f16", 8)
    a_layout, b_layout = layout_for(swizzle, False, 2, 64), layout_for("128B", False, 2, 8)
    operands = Operands(a, b, a_layout, b_layout)
    image = torch.cat([torch.full((128 * lines,), 0xFF, dtype=torch.uint8), operands.image[: operands.b_at]])
    image = torch.cat([image, torch.full((-len(image) % 1024,), 0xFF, dtype=torch.uint8)])
    b_at, image = len(image), torch.cat([image, operands.image[operands.b_at :]])

    def multiplied(base_offset, start):
        encoded = a_layout.descriptor() | base_offset << 49
        body = f"""{descriptor("%d20", encoded, start)} {descriptor("%d21", b_layout.descriptor(), b_at)}
        wgmma.fence.sync.aligned; {op("f32.f16.f16", 8, scale_d="0")} {COMMIT}"""
        out, outcome = run(program(body, len(image)), image)
        return cute.matrix_of(out, cute.wgmma_d(8), 64, torch.float32), outcome

    got, outcome = multiplied(lines, 128 * lines)
    assert outcome.reports == [] and torch.equal(got, (a.double() @ b.double().T).float())
    for base_offset, start in ((0, 128 * lines), (lines, 0), (lines ^ 2, 128 * lines)):
        assert "descriptor" in kinds(multiplied(base_offset, start)[1])


def test_a_base_offset_is_of_swizzles():
    a, b, _ = matrices("f32.f16.f16", 8)
    layout = layout_for("none", False, 2, 64)
    operands = Operands(a, b, layout, layout_for("none", False, 2, 8))
    product_text = f"wgmma.fence.sync.aligned; {op('f32.f16.f16', 8, scale_d='0')} {COMMIT}"
    for base_offset, found in ((0, set()), (1, {"descriptor"})):
        changed = descriptor("%d20", layout.descriptor() | base_offset << 49)
        outcome = run(program(operands.descriptors + changed + product_text, operands.size), operands.image)[1]
        assert kinds(outcome) == found


def test_a_tile_is_walked_along_k_within_the_pattern():
    """The start moves by 32 bytes within the rows of the 128-byte pattern: four products of k = 16 make one of 64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (64, 8))
    tiles = []
    for tile in (a, b):  # rows of 128 bytes, chunks of 16 exchanged by row % 8
        chunks = tile.view(torch.uint8).reshape(len(tile), 8, 16)
        order = torch.arange(8)[None, :] ^ (torch.arange(len(tile)) % 8)[:, None]
        tiles.append(torch.stack([chunks[row, order[row]] for row in range(len(tile))]).reshape(-1))
    bits = cute.Canonical("128B", False, 2, 16, 1024).descriptor()
    steps = "\n".join(
        descriptor("%d20", bits, 32 * step) + descriptor("%d21", bits, 8192 + 32 * step)
        + op("f32.bf16.bf16", 8, scale_d="1") for step in range(4)
    )  # fmt: skip
    out, outcome = run(program(f"wgmma.fence.sync.aligned; {steps} {COMMIT}", 9216), torch.cat(tiles))
    assert outcome.reports == []
    d = cute.matrix_of(out, cute.wgmma_d(8), 64, torch.float32)
    assert torch.allclose(d, (a.double() @ b.double().T).float(), rtol=0, atol=4 * 2**-20)


A_DESCRIPTOR = "%d20, %d21, %p1"
D4 = names("f", 0, 4)


@pytest.mark.parametrize(
    "text",
    [
        f"m64n8k16.f32.f16.f16 {D4}, {A_DESCRIPTOR}, 5, 1, 0, 0",
        f"m64n8k16.f32.f16.f16 {D4}, {A_DESCRIPTOR}, 1, 1, 6, 0",
        f"m64n8k16.f32.f16.f16 {D4}, {A_DESCRIPTOR}, 1, 1",
        f"m64n8k16.f32.f16.f16 {D4}, {names('r', 0, 4)}, %d21, %p1, 1, 1, 0, 0",
        f"m64n8k16.f32.f16.bf16 {D4}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n8k16.f16.bf16.bf16 {names('f', 0, 2)}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n8k8.f32.f16.f16 {D4}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n8k8.f32.tf32.tf32 {D4}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n12k16.f32.f16.f16 {names('f', 0, 6)}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n264k16.f32.f16.f16 {names('f', 0, 132)}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n40k32.s32.s8.s8 {names('f', 0, 20)}, {A_DESCRIPTOR}",
        f"m64n8k32.s32.s8.s8 {D4}, {A_DESCRIPTOR}, 1, 1",
        f"m64n8k32.s32.s8.e4m3 {D4}, {A_DESCRIPTOR}",
        f"m64n16k16.f32.f16.f16 {D4}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n8k16.f32.f16.f16 {D4}, %d20, %d21, 2, 1, 1, 0, 0",
        f"m64n8k16.f32.f16.f16 {{%f0, %f1, %f0, %f2}}, {A_DESCRIPTOR}, 1, 1, 0, 0",
        f"m64n8k16.f32.f16.f16 {D4}, {{%r0, %f1, %r2, %r3}}, %d21, %p1, 1, 1, 0",
        f"m64n8k256.s32.b1.b1.xor.popc {D4}, {A_DESCRIPTOR}",
        f"m64n8k256.s32.b1.b1.and {D4}, {A_DESCRIPTOR}",
        f"m64n8k256.satfinite.s32.b1.b1.and.popc {D4}, {A_DESCRIPTOR}",
        f"m64n40k256.s32.b1.b1.and.popc {names('f', 0, 20)}, {A_DESCRIPTOR}",
        f"m64n8k256.s32.b8.b8 {D4}, {A_DESCRIPTOR}",
    ],
)
def test_what_the_isa_has_not_is_refused_at_load(text):
    with pytest.raises(PtxError, match="wgmma"):
        Kernel(program(f"wgmma.mma_async.sync.aligned.{text};", 1024))
    with pytest.raises(PtxError, match="wgmma"):
        Kernel(program("wgmma.wait_group.sync.aligned;", 1024))


def test_a_sparse_a_is_refused_by_name():
    sparse = f"wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {D4}, %d20, %d21, %r0, 0, %p1, 1, 1, 0, 0;"
    with pytest.raises(PtxError, match="a sparse A is not modelled"):
        Kernel(program(sparse, 1024))


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda bits: bits | 1 << 46, "descriptor"),  # reserved
        (lambda bits: bits | 1 << 49, "descriptor"),  # a base offset where the pattern begins at a multiple of its size
        (lambda bits: bits + (128 >> 4), "descriptor"),  # the start lies in the pattern's second row
        (lambda bits: bits + (112 >> 4), "descriptor"),  # 32 bytes from there leave the row
        (lambda bits: bits + (1 << 16 >> 4), "out of bounds"),
        (lambda bits: bits, None),
    ],
)
def test_descriptors_are_checked(change, kind):
    a, b, _ = matrices("f32.f16.f16", 8)
    layout = cute.Canonical("128B", False, 2, 16, 1024)
    operands = Operands(a, b, layout, layout)
    body = f"""{operands.descriptors}
    {descriptor("%d20", layout.descriptor())} sub.s64 %d22, %d20, %d10; mov.b64 %d23, {change(layout.descriptor()):#x};
    sub.s64 %d23, %d23, %d22; add.s64 %d20, %d20, %d23;
    wgmma.fence.sync.aligned;
    {op("f32.f16.f16", 8, scale_d="1")}
    {COMMIT}"""
    outcome = run(program(body, operands.size), operands.image)[1]
    assert kind in kinds(outcome) if kind else outcome.reports == []
