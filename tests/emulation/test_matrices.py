"""ldmatrix, stmatrix and movmatrix: who gets which element, by CuTe's copy atoms, and what is refused."""

import numpy
import pytest

from fused_resnet.emulation import Kernel, PtxError
from tests.support.ptx import kernel_text

SHARED = ".shared .align 128 .b8 sm[1024];"
PARAMETERS = ".param .u64 in, .param .u64 out"
# Copies this thread's 16 bytes of [in] to row tid of sm, and leaves the address in %r1.
FILL = """
ld.param.u64 %d0, [in];
ld.param.u64 %d1, [out];
mov.u32 %r0, %tid.x;
mad.wide.u32 %d0, %r0, 16, %d0;
mad.wide.u32 %d1, %r0, 16, %d1;
mov.u32 %r1, sm;
mad.lo.u32 %r1, %r0, 16, %r1;
ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d0];
"""


def names(count, first=20):
    return ", ".join(f"%r{first + j}" for j in range(count))


def load_text(op, count, address="[%r1]", sync="bar.warp.sync -1;", guard="", before=""):
    stores = "\n".join(f"st.global.b32 [%d1+{4 * j}], %r{20 + j};" for j in range(count))
    return kernel_text(
        f"""{FILL} {before}
        st.shared.v4.b32 [%r1], {{%r10, %r11, %r12, %r13}};
        cvt.u64.u32 %d3, %r1;
        cvta.shared.u64 %d3, %d3;
        {sync}
        {guard} {op} {{{names(count)}}}, {address};
        {stores}
        ret;""",
        PARAMETERS, SHARED,
    )  # fmt: skip


def run(text, data, **options):
    out = numpy.zeros((32, 4), dtype=numpy.uint32)
    outcome = Kernel(text).run(1, 32, [data, out], writable=[out], **options)
    return out, outcome


def fragments(data, transposed):
    """What lanes hold of four matrices: two neighbouring elements of row l / 4, of its transpose if so asked."""
    matrices = data.reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    pairs = numpy.ascontiguousarray(matrices).view(numpy.uint32)  # (matrix, row, pair)
    return pairs.reshape(4, 32).T


@pytest.fixture
def data():
    return numpy.arange(256, dtype=numpy.uint16) * 257 + 3


@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(data, count, transposed, space):
    op = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}{space}.b16"
    out, outcome = run(load_text(op, count, "[%r1]" if space else "[%d3]"), data)
    assert outcome.reports == []
    assert (out[:, :count] == fragments(data, transposed)[:, :count]).all()
    assert outcome.counts.matrix_loads == 1


def test_rows_may_lie_anywhere(data):
    """Lane l's address is that of row l: with the rows backwards, so are the matrices."""
    backwards = "mov.u32 %r2, sm; sub.u32 %r3, 31, %r0; mad.lo.u32 %r2, %r3, 16, %r2;"
    out, outcome = run(load_text("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 4, "[%r2]", before=backwards), data)
    assert outcome.reports == []
    assert (out == fragments(data.reshape(32, 8)[::-1].copy(), False)).all()


@pytest.mark.parametrize("stride, conflicts", [(16, 1), (128, 8)])
def test_bank_conflicts_are_counted(stride, conflicts):
    """Eight rows of one matrix are one pass if they fill the 32 banks, and eight passes at a pitch of 128 bytes."""
    text = kernel_text(
        f"""mov.u32 %r0, %tid.x;
        mov.u32 %r1, sm;
        and.b32 %r2, %r0, 7;
        mad.lo.u32 %r1, %r2, {stride}, %r1;
        mov.b32 %r3, 0;
        st.shared.v4.b32 [%r1], {{%r3, %r3, %r3, %r3}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r4}}, [%r1];
        ret;""",
        shared=SHARED,
    )  # fmt: skip
    counts = Kernel(text).run(1, 8 * 4, [None]).counts
    assert (counts.shared_load_wavefronts, counts.shared_load_ideal) == (conflicts, 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(data, count, transposed):
    op = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    text = kernel_text(
        f"""{FILL}
        mov.b32 %r14, 0;
        st.shared.v4.b32 [%r1], {{%r14, %r14, %r14, %r14}};
        bar.warp.sync -1;
        {op} [%r1], {{{names(count, 10)}}};
        bar.warp.sync -1;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r1];
        st.global.v4.b32 [%d1], {{%r20, %r21, %r22, %r23}};
        ret;""",
        PARAMETERS, SHARED,
    )  # fmt: skip
    given = fragments(data, transposed)
    out, outcome = run(text, numpy.ascontiguousarray(given))
    assert outcome.reports == []
    rows = data.reshape(32, 8).copy()
    rows[8 * count :] = 0
    assert (out.view(numpy.uint16).reshape(32, 8) == rows).all()
    assert outcome.counts.matrix_stores == 1


def test_movmatrix(data):
    text = kernel_text(
        f"""{FILL} movmatrix.sync.aligned.m8n8.trans.b16 %r20, %r10;
        st.global.b32 [%d1], %r20;
        ret;""",
        PARAMETERS, SHARED,
    )  # fmt: skip
    out, outcome = run(text, numpy.ascontiguousarray(fragments(data, False)))
    assert outcome.reports == []
    assert (out[:, 0] == fragments(data, True)[:, 0]).all()


@pytest.mark.parametrize(
    "op, operands",
    [
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8", "{%r1, %r2}, [%r3]"),
        ("ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32", "{%r1}, [%r3]"),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16", "{%r1}, [%r3]"),
        ("ldmatrix.sync.aligned.m8n8.x3.shared.b16", "{%r1, %r2, %r4}, [%r3]"),
        ("ldmatrix.aligned.m8n8.x1.shared.b16", "{%r1}, [%r3]"),
        ("stmatrix.sync.aligned.m16n8.x1.trans.shared.b8", "[%r3], {%r1}"),
        ("stmatrix.sync.aligned.m8n8.x1.global.b16", "[%r3], {%r1}"),
        ("movmatrix.sync.aligned.m8n8.b16", "%r1, %r2"),
    ],
)
def test_what_sm_90_has_not_is_refused_at_load(op, operands):
    """ptxas 13.0 refuses each of them for sm_90a."""
    with pytest.raises(PtxError, match="matrix"):
        Kernel(kernel_text(f"{op} {operands}; ret;"))


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"


def kinds(outcome):
    return {report[1 : report.index("]")] for report in outcome.reports}


def test_rows_must_be_written_and_ordered(data):
    """Without bar.warp.sync another lane's row is a race; with it, it is not."""
    backwards = "mov.u32 %r2, sm; xor.b32 %r3, %r0, 1; mad.lo.u32 %r2, %r3, 16, %r2;"
    assert kinds(run(load_text(LDMATRIX, 4, "[%r2]", sync="", before=backwards), data)[1]) == {"intra-warp race"}
    assert kinds(run(load_text(LDMATRIX, 4, "[%r2]", before=backwards), data)[1]) == set()


def test_rows_must_be_aligned_and_inside(data):
    assert kinds(run(load_text(LDMATRIX, 4, "[%r1+8]"), data)[1]) == {"misaligned"}
    assert kinds(run(load_text(LDMATRIX, 4, "[%r1+1024]"), data)[1]) & {"out of bounds", "uninitialised"}
    assert kinds(run(load_text("ldmatrix.sync.aligned.m8n8.x4.b16", 4, "[%d0]"), data)[1]) == {"out of bounds"}


@pytest.mark.parametrize(
    "guard, before", [("@%p0", "setp.lt.u32 %p0, %r0, 16;"), ("", "setp.ge.u32 %p0, %r0, 16; @%p0 exit;")]
)
def test_absent_lanes_are_reported(data, guard, before):
    assert "aligned" in kinds(run(load_text(LDMATRIX, 4, guard=guard, before=before, sync=""), data)[1])
    whole = before.replace("16", "32")
    assert kinds(run(load_text(LDMATRIX, 4, guard=guard, before=whole, sync="bar.warp.sync -1;"), data)[1]) == set()
