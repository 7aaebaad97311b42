"""What a mutant of each kind looks like, and which are drawn."""

import importlib.util

import pytest

from fused_resnet.emulation import library

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, whose kernels it breaks", allow_module_level=True)

from benchmarks import mutations

OR = "or.b64 %rd1, %rd2,"
LINES = {
    "cp.async wait deleted": ("cp.async.wait_group 1;", ""),
    "cp.async wait one group later": ("cp.async.wait_group \t1;", "cp.async.wait_group \t2;"),
    "cp.async commit deleted": ("cp.async.commit_group ;", ""),
    "cp.async without its mask": (
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;",
    ),
    "wgmma wait deleted": ("wgmma.wait_group.sync.aligned 0;", ""),
    "wgmma wait one group later": ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
    "wgmma commit deleted": ("wgmma.commit_group.sync.aligned;", ""),
    "wgmma fence deleted": ("wgmma.fence.sync.aligned;", ""),
    "proxy fence deleted": ("fence.proxy.async.shared::cta;", ""),
    "barrier deleted": ("\tbar.sync 0;", ""),
    "warp barrier deleted": ("bar.warp.sync 0xffffffff;", ""),
    "mbarrier wait deleted": ("@!complete bra.uni waitLoop;", ""),
    "mbarrier count": ("@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;", "@%p1 mbarrier.init.shared::cta.b64 [%r1], 2;"),
    "expected bytes halved": (
        "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 8192;",
        "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 4096;",
    ),
    "expected bytes more": (
        "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 64;",
        "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 80;",
    ),
    "expected bytes deleted": ("mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 64;", ""),
    "parity kept": ("xor.b32 %r5, %r5, %r2;", "mov.b32 %r5, %r5;"),
    "descriptor of another swizzle": (f"{OR} 4611686293305294848;", f"{OR} 9223372311732682752;"),
    "descriptor of another stride": (f"{OR} 4611686293305294848;", f"{OR} 4611686155866341376;"),
    "descriptor 32 bytes on": (f"{OR} 4611686293305294848;", f"{OR} 4611686293305294850;"),
    "TMA coordinates swapped": (
        "cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1, {%r2, %r3}], [%r4];",
        "cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1, {%r3, %r2}], [%r4];",
    ),
    "TMA copy deleted": ("@%p1 cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1, {%r2, %r3}], [%r4];", ""),
    "ldmatrix 16 bytes on": ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];",
                             "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2+16];"),
    "shared access 16 bytes on": ("st.shared.b32 [ %r1 + 32 ], %r2;", "st.shared.b32 [%r1+48], %r2;"),
    "global access 16 bytes on": ("ld.global.b32 %r2, [%rd1];", "ld.global.b32 %r2, [%rd1+16];"),
    "swizzle bits": ("xor.b32 %r1, %r2, 64;", "xor.b32 %r1, %r2, 96;"),
    "mask of less": ("setp.lt.s32 %p1, %r1, %r2;", "setp.le.s32 %p1, %r1, %r2;"),
    "mask of more": ("setp.ge.u32 %p1, %r1, %r2;", "setp.gt.u32 %p1, %r1, %r2;"),
    "guard turned": ("\t@%p1 st.global.b32 [%rd1], %r1;", "\t@!%p1 st.global.b32 [%rd1], %r1;"),
    "choice turned": ("selp.b32 %r1, %r2, %r3, %p1;", "selp.b32 %r1, %r3, %r2, %p1;"),
    "sum of one more": ("add.s32 %r1, %r2, -1;", "add.s32 %r1, %r2, 0;"),
    "shift of one more": ("shl.b32 %r1, %r2, 3;", "shl.b32 %r1, %r2, 4;"),
    "maximum lost": ("max.f32 %f1, %f2, 0f00000000;", "mov.b32 %f1, %f2;"),
}  # fmt: skip


def test_every_kind_has_a_line():
    assert LINES.keys() == mutations.PTX.keys()


@pytest.mark.parametrize("kind", LINES)
def test_a_mutant_of_each_kind(kind):
    line, expected = LINES[kind]
    assert mutations.PTX[kind](line) == expected
    assert mutations.PTX[kind]("mov.u32 %r1, %r2;") == "mov.u32 %r1, %r2;"


def test_mutants_of_source_are_one_edit_each_and_none_of_comments():
    text = "// a < b\nif (a < b && c == d) wait_copies<0>();\n#if X < Y\nsync_block();  // a < b"
    found = [(one.kind, one.line, one.text.split("\n")[one.line - 1]) for one in mutations.mutants_of_source(text)]
    assert found == [
        ("wait deleted", 2, "if (a < b && c == d) ;"),
        ("less or equal", 2, "if (a <= b && c == d) wait_copies<0>();"),
        ("and to or", 2, "if (a < b || c == d) wait_copies<0>();"),
        ("equal to unequal", 2, "if (a < b && c != d) wait_copies<0>();"),
        ("barrier deleted", 4, ";  // a < b"),
    ]


def subject(run, text="add.s32 %r1, %r2, 1;\nbar.sync 0;\nbar.sync 1;\n@%p1 shl.b32 %r1, %r2, 3;"):
    return mutations.Subject("a kernel", text, [run], mutations.mutants_of_ptx)


def test_mutants_are_drawn_from_all_kinds_alike():
    chosen = mutations.drawn(subject(None), 3, seed=1)
    assert sorted(one.kind for one in chosen) == ["barrier deleted", "guard turned", "sum of one more"]
    assert mutations.drawn(subject(None), 3, seed=1) == chosen and len(mutations.drawn(subject(None), 99, 0)) == 5


def test_a_campaign_counts_what_is_noticed(monkeypatch):
    """Barriers are reported, sums are wrong, the shift is never reached, and what is guarded goes unnoticed."""

    def run(text, how):
        lines = text.split("\n")
        if "trap;" in text:
            return not any(line.lstrip() == "@%p1 trap;" for line in lines), []
        return "add.s32 %r1, %r2, 2;" not in text, ["[race] here"] if text.count("bar.sync") < 2 else []

    row = mutations.campaign(subject(run), 9, seed=0)
    assert {name: row[name] for name in ("mutants", "killed", "report", "data", "data_alone", "unreached")} == dict(
        mutants=5, killed=3, report=2, data=1, data_alone=1, unreached=0
    )
    assert {one["kind"] for one in row["survivors"]} == {"guard turned", "shift of one more"}
    everywhere = subject(lambda text, how: (True, []))
    row = mutations.campaign(everywhere, 9, seed=0)
    assert row["mutants"] == 0 and row["unreached"] == 5


def test_a_kernel_that_is_wrong_itself_is_not_broken_further():
    with pytest.raises(SystemExit, match="not right to begin with"):
        mutations.campaign(subject(lambda text, how: (False, [])), 9, seed=0)


@pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")
def test_real_mutants_of_a_cuda_kernel():
    """A commit, an address and a barrier of a CUDA kernel."""
    if reason := mutations.cuda_launches.why_not():
        pytest.skip(reason)
    whole = mutations.cuda_subject(80, ("1x448x5x5 -> 64, 1x1 float16 bias relu",), 1)
    assert not mutations.tried(whole, whole.text, 0).is_killed
    for kind in ("cp.async commit deleted", "ldmatrix 16 bytes on", "barrier deleted"):
        first = next(one for one in whole.mutants(whole.text) if one.kind == kind)
        verdict = mutations.tried(whole, first.text, 0)
        assert verdict.is_killed == mutations.is_reached(whole, first, 0)
