"""What a run counts: small kernels whose sectors, wavefronts and products are known by hand."""

import pytest
import torch

from fused_resnet.emulation import Kernel, TensorMap
from tests.emulation import wgmma_programs as programs
from tests.support.ptx import kernel_text

TWO = ".param .u64 x, .param .u64 out"
BEGIN = "ld.param.u64 %d0, [x];\nld.param.u64 %d1, [out];\nmov.u32 %r0, %tid.x;\n"
SHARED = ".shared .align 1024 .b8 sm[32768];"


def counts(body, grid=1, block=32, words=4096, shared="", **how):
    """The counts of a kernel: its thread is in %r0, an input at %d0, an output at %d1, each of so many words."""
    x, out = torch.arange(words, dtype=torch.int32), torch.zeros(words, dtype=torch.int32)
    text = kernel_text(f"{BEGIN}{body}\nret;", parameters=TWO, shared=shared)
    outcome = Kernel(text).run(grid, block, [x, out], writable=[out], races=0, **how)
    assert not outcome.faulted, outcome.reports
    return outcome.counts


# ------------------------------------------------------------------------------------------------------ global memory


@pytest.mark.parametrize(
    "name, bytes_apart, load, sectors",
    [
        ("coalesced", 4, "ld.global.u32 %r1, [%d2];", 4),
        ("stride 2", 8, "ld.global.u32 %r1, [%d2];", 8),
        ("stride 8", 32, "ld.global.u32 %r1, [%d2];", 32),
        ("broadcast", 0, "ld.global.u32 %r1, [%d2];", 1),
        ("one word late", 4, "ld.global.u32 %r1, [%d2+4];", 5),
        ("bytes", 1, "ld.global.u8 %r1, [%d2];", 1),
        ("16 bytes a lane", 16, "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d2];", 16),
    ],
)
def test_sectors_of_a_load(name, bytes_apart, load, sectors):
    found = counts(f"mul.wide.u32 %d2, %r0, {bytes_apart}; add.u64 %d2, %d2, %d0;\n{load}")
    assert (found.global_loads, found.global_load_sectors, found.distinct_load_sectors) == (1, sectors, sectors)
    assert found.global_store_sectors == 0


def test_what_two_warps_and_two_blocks_read_is_distinct_once():
    body = "and.b32 %r1, %r0, 31; mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %d2, %d0; ld.global.u32 %r2, [%d2];"
    found = counts(body, grid=2, block=64)
    assert (found.global_loads, found.global_load_sectors, found.distinct_load_sectors) == (4, 16, 4)
    found = counts(body, grid=2, block=64, blocks=[1])
    assert (found.global_loads, found.global_load_sectors, found.distinct_load_sectors) == (2, 8, 4)


def test_lanes_that_a_guard_leaves_out_touch_nothing():
    body = "mul.wide.u32 %d2, %r0, 4; add.u64 %d2, %d2, %d1; setp.lt.u32 %p0, %r0, {}; @%p0 st.global.u32 [%d2], %r0;"
    found = counts(body.replace("{}", "8"))
    assert (found.global_stores, found.global_store_sectors, found.distinct_store_sectors) == (1, 1, 1)
    found = counts(body.replace("{}", "0"))
    assert (found.global_stores, found.global_store_sectors) == (0, 0)


# ------------------------------------------------------------------------------------------------------ shared memory


@pytest.mark.parametrize(
    "name, bytes_apart, vector, wavefronts, ideal",
    [
        ("dense", 4, 1, 1, 1),
        ("broadcast", 0, 1, 1, 1),
        ("2-way", 8, 1, 2, 1),
        ("4-way", 16, 1, 4, 1),
        ("32-way", 128, 1, 32, 1),
        ("a column, padded", 132, 1, 1, 1),
        ("8 bytes, dense", 8, 2, 2, 2),
        ("16 bytes, dense", 16, 4, 4, 4),
        ("16 bytes, a column", 128, 4, 32, 4),  # each quarter of a warp: 8 lanes on the same four banks
        ("16 bytes, a column, padded", 144, 4, 4, 4),
    ],
)
@pytest.mark.parametrize("is_store", [False, True])
def test_wavefronts(name, bytes_apart, vector, wavefronts, ideal, is_store):
    registers = {1: "%r4", 2: "{%r4, %r5}", 4: "{%r4, %r5, %r6, %r7}"}[vector]
    kind = "shared" + {1: "", 2: ".v2", 4: ".v4"}[vector] + ".u32"
    access = f"st.{kind} [%r1], {registers};" if is_store else f"ld.{kind} {registers}, [%r1];"
    found = counts(f"mov.u32 %r2, sm; mad.lo.u32 %r1, %r0, {bytes_apart}, %r2; {access}", shared=SHARED)
    loads = (found.shared_loads, found.shared_load_wavefronts, found.shared_load_ideal)
    stores = (found.shared_stores, found.shared_store_wavefronts, found.shared_store_ideal)
    assert (stores if is_store else loads) == (1, wavefronts, ideal)
    assert (loads if is_store else stores) == (0, 0, 0)


@pytest.mark.parametrize("pitch, wavefronts", [(16, 4), (128, 32), (64, 16), (144, 4)])
def test_wavefronts_of_ldmatrix(pitch, wavefronts):
    """Four matrices of eight rows of 16 bytes, the rows so far apart."""
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r1];"
    found = counts(f"mov.u32 %r2, sm; mad.lo.u32 %r1, %r0, {pitch}, %r2; {load}", shared=SHARED)
    assert (found.matrix_loads, found.shared_load_wavefronts, found.shared_load_ideal) == (1, wavefronts, 4)


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("valid, sectors", [(16, 16), (0, 0)])
def test_cp_async(valid, sectors):
    """16 bytes a lane; lanes whose source is empty fill with zeros and read nothing."""
    found = counts(
        f"""mov.u32 %r2, sm; mad.lo.u32 %r1, %r0, 16, %r2; mul.wide.u32 %d2, %r0, 16; add.u64 %d2, %d2, %d0;
        cp.async.cg.shared.global [%r1], [%d2], 16, {valid}; cp.async.commit_group; cp.async.wait_group 0;""",
        shared=SHARED,
    )
    assert (found.global_load_sectors, found.distinct_load_sectors) == (sectors, sectors)
    assert (found.shared_store_wavefronts, found.shared_store_ideal) == (4, 4)
    assert found.global_loads == found.bulk_copies == 0
    assert (found.cp_async, found.waits) == (1, 2)  # the commit moves nothing


BULK = """
setp.eq.u32 %p0, %r0, 0; mov.u32 %r1, sm; mov.u32 %r2, full;
@%p0 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {bytes};
{copy}
WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r2], 0; @!%p1 bra WAIT;
"""
FULL = SHARED + ".shared .align 8 .b64 full;"


def test_a_bulk_copy():
    copy = "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 512, [%r2];"
    found = counts(BULK.format(bytes=512, copy=copy), shared=FULL)
    assert (found.bulk_copies, found.bulk_bytes) == (1, 512)
    assert (found.global_load_sectors, found.distinct_load_sectors, found.global_loads) == (16, 16, 0)


@pytest.mark.parametrize("row, sectors", [(0, 64), (8, 32), (16, 0)])
def test_a_tensor_copy(row, sectors):
    """A box of 16 rows of 64 fp16 of a map of 16 rows: all its bytes arrive, the rows that exist are read."""
    x, out = torch.zeros(16, 256, dtype=torch.float16), torch.zeros(4, dtype=torch.int32)
    descriptor = TensorMap(x, [256, 16], [512], [64, 16], swizzle=128)
    copy = f"""@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    [%r1], [%d0, {{64, {row}}}], [%r2];"""
    body = BULK.format(bytes=2048, copy=copy)
    text = kernel_text(
        f"mov.b64 %d0, x; cvta.param.u64 %d0, %d0; mov.u32 %r0, %tid.x;\n{body}\nret;",
        parameters=".param .align 64 .b8 x[128], .param .u64 out", shared=FULL,
    )  # fmt: skip
    outcome = Kernel(text).run(1, 32, [descriptor, out], writable=[out], races=0)
    assert not outcome.faulted, outcome.reports
    found = outcome.counts
    assert (found.bulk_copies, found.bulk_bytes) == (1, 2048)
    assert (found.global_load_sectors, found.distinct_load_sectors) == (sectors, sectors)


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize(
    "shape, types, registers, multiply_adds",
    [
        ("m16n8k16", "f32.f16.f16.f32", (4, 4, 2, 4), 2048),
        ("m16n8k8", "f32.bf16.bf16.f32", (4, 2, 1, 4), 1024),
        ("m16n8k8", "f32.tf32.tf32.f32", (4, 4, 2, 4), 1024),
    ],
)
def test_mma(shape, types, registers, multiply_adds):
    d, a, b, c = registers
    operands = ", ".join(
        programs.names(kind, first, count)
        for kind, first, count in (("f", 0, d), ("r", 8, a), ("r", 16, b), ("f", 8, c))
    )
    zeros = "".join(
        f"mov.b32 %r{8 + j}, 0; mov.b32 %f{j}, 0f00000000; mov.b32 %f{8 + j}, 0f00000000;" for j in range(12)
    )
    found = counts(f"{zeros}\nmma.sync.aligned.{shape}.row.col.{types} {operands};", block=64)
    assert (found.mma, found.tensor_multiply_adds) == (2, 2 * multiply_adds)


@pytest.mark.parametrize("n, a_in_registers", [(8, False), (64, False), (64, True)])
def test_wgmma(n, a_in_registers):
    """m64nNk16 on four warps: an instruction each, together 64 * n * 16 products."""
    a, b = torch.zeros(64, 16, dtype=torch.float16), torch.zeros(n, 16, dtype=torch.float16)
    operands = programs.Operands(
        a, b, programs.layout_for("none", False, 2, 64), programs.layout_for("none", False, 2, n)
    )
    sums, first = programs.names("f", 0, n // 2), programs.names("r", 0, 4) if a_in_registers else "%d20"
    trans = "0" if a_in_registers else "0, 0"
    body = f"""{operands.descriptors}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {sums}, {first}, %d21, 1, 1, 1, {trans};
    wgmma.commit_group.sync.aligned;"""
    _, outcome = programs.run(programs.program(body, operands.size, sums=n // 2), operands.image, sums=n // 2, races=0)
    assert not outcome.faulted, outcome.reports
    found = outcome.counts
    assert (found.wgmma, found.tensor_multiply_adds) == (4, 64 * n * 16)


# ----------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "name, text",
    [
        ("integer", "add.u32 %r1, %r0, 1;"),
        ("integer", "lop3.b32 %r1, %r0, %r0, %r0, 0x80;"),
        ("floating", "add.f32 %f1, %f0, %f0;"),
        ("floating", "fma.rn.f32 %f1, %f0, %f0, %f0;"),
        ("half", "fma.rn.f16x2 %r1, %r0, %r0, %r0;"),
        ("conversion", "cvt.rn.f32.u32 %f1, %r0;"),
        ("special", "ex2.approx.f32 %f1, %f0;"),
        ("special", "rcp.approx.ftz.f32 %f1, %f0;"),
        ("move", "selp.b32 %r1, %r0, 1, %p1;"),
        ("compare", "setp.eq.u32 %p0, %r0, 1;"),
        ("exchange", "shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffffffff;"),
        ("barriers", "bar.sync 0;"),
        ("fences", "membar.cta;"),
        ("parameter_loads", "ld.param.u64 %d3, [x];"),
        ("atomics", "atom.global.add.u32 %r1, [%d1], 1;"),
    ],
)
def test_classes(name, text):
    setup = "mov.b32 %f0, 0f3f800000; setp.eq.u32 %p1, %r0, 1;\n"
    before, after = counts(setup), counts(setup + text)
    changed = {field for field in before._fields if getattr(before, field) != getattr(after, field)}
    assert name in changed
    assert getattr(after, name) == getattr(before, name) + 1
    assert after.warp_instructions == before.warp_instructions + 1
    assert after.thread_instructions == before.thread_instructions + 32
    memory = {field for field in changed if "sectors" in field}
    assert changed - memory == {name, "warp_instructions", "thread_instructions"}
