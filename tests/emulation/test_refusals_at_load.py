"""What is refused at load: instructions that the .target lacks, and registers that do not fit.

ptxas 13.0 gives the same verdict on each line, for both targets and for both registers.
"""

import re

import pytest

from fused_resnet.emulation import Kernel, PtxError
from tests.support.ptx import kernel_text


def registers(prefix, count):
    return "{" + ", ".join(f"%{prefix}{k}" for k in range(count)) + "}"


# an sm that lacks it, one that has it, the instruction; <f4> is a vector of four registers
TARGETS = """
80 90 ld.shared::cluster.u32 %r0, [%r1];
75 80 ld.global.L2::cache_hint.u32 %r0, [%d0], %d1;
75 80 ld.global.L2::256B.u32 %r0, [%d0];
80 90 st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r0], %r1, [%r2];
80 90 mapa.shared::cluster.u32 %r0, %r1, %r2;
80 90 elect.sync %r0|%p0, -1;
80 90 griddepcontrol.wait;
80 90 stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r0], {%r1};
75 80 cvt.rn.bf16.f32 %h0, %f0;
80 89 cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;
80 89 cvt.rn.f16x2.e5m2x2 %r0, %h0;
80 90 cvt.rn.bf16.s32 %h0, %r0;
80 90 cvt.rzi.s32.bf16 %r0, %h0;
80 90 cvt.rn.bf16.f16 %h0, %h1;
80 90 cvt.rni.bf16.bf16 %h0, %h1;
80 90 cvt.rn.tf32.f32 %r0, %f0;
80 90 cvt.ftz.f32.bf16 %f0, %h0;
75 80 cp.async.ca.shared.global [%r0], [%d0], 16;
80 90 cp.async.bulk.commit_group;
75 80 mbarrier.init.shared.b64 [%r0], 1;
80 90 mbarrier.try_wait.parity.shared.b64 %p0, [%r0], 0;
80 90 mbarrier.arrive.expect_tx.shared.b64 %d0, [%r0], 16;
80 90 mbarrier.arrive.shared.b64 %d0, [%r0], 2;
80 90 mbarrier.arrive.release.cluster.shared.b64 %d0, [%r0];
80 90 mbarrier.arrive.relaxed.cta.shared.b64 %d0, [%r0];
80 90 fence.acq_rel.cluster;
80 90 fence.proxy.async;
80 90 fence.mbarrier_init.release.cluster;
80 90 barrier.cluster.arrive;
80 90 atom.relaxed.cluster.global.add.u32 %r0, [%d0], 1;
80 90 red.global.add.noftz.bf16 [%d0], %h0;
80 90 red.global.add.v2.f32 [%d0], {%f0, %f1};
75 80 redux.sync.add.u32 %r0, %r1, -1;
75 80 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 <f4>, <r4>, <r2>, <f4>;
80 89 mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 <f4>, <r4>, <r2>, <f4>;
80 90 mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 <fd4>, <fd2>, {%fd6}, <fd4>;
75 80 mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd0,%fd1}, {%fd4}, {%fd6}, {%fd8,%fd9};
80 90 add.bf16 %h0, %h1, %h2;
80 90 mul.bf16x2 %r0, %r1, %r2;
80 90 ex2.approx.ftz.bf16 %h0, %h1;
80 90 tanh.approx.bf16 %h0, %h1;
80 90 setp.eq.bf16 %p0, %h0, %h1;
75 80 fma.rn.bf16 %h0, %h1, %h2, %h3;
75 80 abs.bf16 %h0, %h1;
75 80 max.f16 %h0, %h1, %h2;
75 80 max.NaN.f32 %f0, %f1, %f2;
80 86 max.xorsign.abs.f32 %f0, %f1, %f2;
80 90 max.u16x2 %r0, %r1, %r2;
80 90 max.relu.s32 %r0, %r1, %r2;
90 100 ld.global.v8.b32 {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7}, [%d0];
90 100 ld.global.v4.b64 {%d0,%d1,%d2,%d3}, [%d4];
"""


@pytest.mark.parametrize("line", TARGETS.strip().splitlines())
def test_the_least_target(line):
    lacking, having, text = line.split(" ", 2)
    text = re.sub(r"<(\w+)(\d)>", lambda vector: registers(vector[1], int(vector[2])), text)
    with pytest.raises(PtxError, match=f"needs .target sm_{having}"):
        Kernel(kernel_text(text + "\nret;", target=f"sm_{lacking}"))
    Kernel(kernel_text(text + "\nret;", target=f"sm_{having}"))


def test_the_first_target_counts():
    text = kernel_text("griddepcontrol.wait;\nret;", target="sm_90, debug")
    Kernel(text)
    with pytest.raises(PtxError, match="sm_90"):
        Kernel(text.replace("sm_90", "sm_89"))


# {}: a register that does not fit, and one that does
WIDTHS = """
%d0 %r0 add.u32 %r1, %r2, {};
%h0 %r0 add.u32 %r1, {}, %r3;
%d0 %r0 add.u32 {}, %r2, %r3;
%h0 %r0 ld.global.u32 {}, [%d1];
%r0 %d0 ld.global.f64 {}, [%d1];
%h0 %r0 cvt.u64.u32 %d0, {};
%r0 %d0 cvt.u64.u32 {}, %r1;
%r0 %d0 mul.wide.u32 {}, %r2, %r3;
%r0 %d0 mad.wide.u32 %d1, %r2, %r3, {};
%d0 %r0 setp.eq.u32 %p1, %r1, {};
%d0 %r0 selp.u32 {}, %r1, %r2, %p1;
%d0 %r0 shl.b32 %r1, %r2, {};
%d0 %r0 shl.b64 %d1, %d2, {};
%d0 %r0 mov.u32 {}, %r2;
%d0 %r0 mov.u32 {}, %tid.x;
%d0 %r0 shfl.sync.bfly.b32 {}, %r2, 1, 31, -1;
%h0 %r0 st.global.u32 [%d1], {};
%d0 %r0 bar.sync {};
%d0 %r0 mbarrier.init.shared.b64 [%r1], {};
%r0 %d0 mbarrier.arrive.shared.b64 {}, [%r1];
%d0 %r0 prmt.b32 %r1, %r2, %r3, {};
%h0 %r0 bfe.u32 %r1, %r2, {}, %r4;
%r0 %h0 fma.rn.f16 {}, %h2, %h3, %h4;
%d0 %r0 popc.b64 {}, %d1;
%d0 %r0 vote.sync.ballot.b32 {}, %p1, -1;
%r0 %d0 match.any.sync.b64 %r1, {}, -1;
%r0 %d0 atom.global.cas.b64 %d1, [%d2], {}, %d3;
%d0 %r0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{{}}}, [%r1];
"""


@pytest.mark.parametrize("line", WIDTHS.strip().splitlines())
def test_registers_fit_the_type(line):
    wrong, right, text = line.split(" ", 2)
    with pytest.raises(PtxError, match="operand . has .* bits; wanted"):
        Kernel(kernel_text(text.format(wrong) + "\nret;"))
    Kernel(kernel_text(text.format(right) + "\nret;"))


@pytest.mark.parametrize(
    "text",
    ["ld.global.u16 %r0, [%d0];", "ld.global.s8 %d1, [%d0];", "st.global.u8 [%d0], %r0;", "cvt.u16.u32 %r0, %r1;",
     "cvt.rn.f16.f32 %r0, %f0;", "ld.global.f32 %r0, [%d0];", "mov.b64 {%r0, %r1}, %d0;", "mov.b32 %f0, %r0;"],
)  # fmt: skip
def test_wider_registers_where_they_may_be(text):
    Kernel(kernel_text(text + "\nret;"))
