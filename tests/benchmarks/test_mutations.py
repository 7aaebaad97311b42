"""What a mutant of each kind looks like, and which are drawn."""

import importlib.util
import json
from itertools import product

import pytest

from fused_resnet.emulation import cuda_launches, library
from fused_resnet.operators.problem import ACTIVATIONS, parsed_problem

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, whose kernels it breaks", allow_module_level=True)

from benchmarks import mutants, mutation_subjects, mutations

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
    assert LINES.keys() == mutants.PTX.keys()


@pytest.mark.parametrize("kind", LINES)
def test_a_mutant_of_each_kind(kind):
    line, expected = LINES[kind]
    assert mutants.PTX[kind](line) == expected
    assert mutants.PTX[kind]("mov.u32 %r1, %r2;") == "mov.u32 %r1, %r2;"


def test_mutants_of_source_are_one_edit_each_and_none_of_comments():
    text = "// a < b\nif (a < b && c == d) wait_copies<0>();\n#if X < Y\nsync_block();  // a < b"
    found = [(one.kind, one.line, one.text.split("\n")[one.line - 1]) for one in mutants.mutants_of_source(text)]
    assert found == [
        ("wait deleted", 2, "if (a < b && c == d) ;"),
        ("less or equal", 2, "if (a <= b && c == d) wait_copies<0>();"),
        ("and to or", 2, "if (a < b || c == d) wait_copies<0>();"),
        ("equal to unequal", 2, "if (a < b && c != d) wait_copies<0>();"),
        ("barrier deleted", 4, ";  // a < b"),
    ]


def test_what_the_host_alone_does_is_no_source_of_mutants():
    text = "inline int on_host(int a, int b) { return a == b; }\nFUSED_RESNET_HD int on_both(int a) { return a == 1; }"
    assert [one.line for one in mutants.mutants_of_source(text)] == [2]


TEXT = "add.s32 %r1, %r2, 1;\nbar.sync 0;\nbar.sync 1;\n@%p1 shl.b32 %r1, %r2, 3;"


def subject(run, text=TEXT, sweep=()):
    return mutation_subjects.Subject(
        "a kernel", 80, text, [run], list(sweep), mutants.mutants_of_ptx, lambda same: same
    )


def test_mutants_are_drawn_from_all_kinds_alike():
    chosen = mutants.drawn(mutants.mutants_of_ptx(TEXT), 1)
    assert sorted(one.kind for one in chosen[:3]) == ["barrier deleted", "guard turned", "sum of one more"]
    assert mutants.drawn(mutants.mutants_of_ptx(TEXT), 1) == chosen and len(chosen) == 5


@pytest.fixture
def machine_code(monkeypatch):
    """No ptxas: the text stands for the code."""
    codes: dict[str, bytes] = {}
    monkeypatch.setattr(mutations, "machine_code", lambda ptx, arch: codes.get(ptx, ptx.encode()))
    return codes


def test_a_campaign_counts_what_is_noticed(machine_code):
    """Barriers are reported, sums are wrong, and what is guarded goes unnoticed."""

    def run(text, how):
        if "trap;" in text:
            return False, []
        return "add.s32 %r1, %r2, 2;" not in text, ["[race] here"] if text.count("bar.sync") < 2 else []

    row = mutations.campaign(subject(run), 9, seed=0)
    assert {name: row[name] for name in ("mutants", "killed", "report", "data", "data_alone", "unreached")} == dict(
        mutants=5, killed=3, report=2, data=1, data_alone=1, unreached=0
    )
    assert {one["kind"] for one in row["survivors"]} == {"guard turned", "shift of one more"}
    everywhere = subject(lambda text, how: (True, []))
    row = mutations.campaign(everywhere, 9, seed=0)
    assert row["mutants"] == 0 and row["unreached"] == 5


def test_a_line_is_reached_where_its_block_is_and_its_guard_holds(machine_code):
    """Blocks begin at labels and end at branches; what is known of one is not run again."""
    text = "bar.sync 0;\n@%p2 bra $L1;\nbar.sync 1;\n@%p1 add.s32 %r1, %r1, 1;\n$L1:\nbar.sync 2;"
    seen = []

    def run(tried, how):
        seen.append(tried.split("\n").index(next(line for line in tried.split("\n") if "trap;" in line)))
        return seen[-1] != 0 and seen[-1] != 3, []

    whole, known = subject(run, text), {}
    found = [mutations.is_reached(whole, one, 0, known) for one in whole.mutants(text)]
    kinds = [(one.kind, one.line) for one in whole.mutants(text)]
    assert dict(zip(kinds, found)) == {
        ("barrier deleted", 1): True, ("barrier deleted", 3): False, ("sum of one more", 4): True,
        ("guard turned", 4): False, ("barrier deleted", 6): False,
    }  # fmt: skip
    assert set(seen) == {0, 2, 3, 5} and len(known) == 4


def test_a_mutant_of_the_same_machine_code_gives_way_to_another(machine_code):
    def run(text, how):
        return "trap;" not in text and text.count("bar.sync") == 2, []

    row = mutations.campaign(subject(run), 3, seed=0)
    assert (row["mutants"], row["same_code"]) == (3, 0) and row["killed"] < 3
    machine_code.update((one.text, TEXT.encode()) for one in mutants.mutants_of_ptx(TEXT))
    row = mutations.campaign(subject(run), 3, seed=0)
    assert (row["mutants"], row["killed"], row["same_code"]) == (2, 2, 3), "those that show are mutants all the same"


def test_the_sweep_is_tried_once_in_each_way_in_turn(machine_code):
    seen = []

    def swept(text, how):
        seen.append((how["landing"], how["schedule"]))
        return True, []

    assert not mutations.tried(subject(lambda text, how: (True, []), sweep=[swept] * 5), TEXT, 0).is_killed
    assert len(seen) == 5 and len(set(seen)) == 4 and seen[0] == seen[4]


def test_a_kernel_that_is_wrong_itself_is_not_broken_further():
    with pytest.raises(SystemExit, match="not right to begin with"):
        mutations.campaign(subject(lambda text, how: (False, [])), 9, seed=0)


def test_the_sweep_leaves_every_remainder():
    """But for channels and rows in sixteens, where Triton makes another kernel."""
    first = parsed_problem("1x64x9x9 -> 80, 3x3 p1 float16 bias+add relu", "cuda")
    odd = {i for i in range(64) if i % 16}
    pointer, gemm, rows, lines = (list(sizes(first)) for sizes in mutation_subjects._SWEPT.values())
    assert {p.N * p.P * p.Q % 64 for p in pointer} == set(range(64)) and {p.K % 16 for p in pointer} == {0}
    assert {p.N * p.P * p.Q % 64 for p in gemm} == {p.K % 64 for p in gemm} == odd
    assert {(p.P + 1) * (p.Q + 1) % 64 for p in rows} == {p.K % 64 for p in rows} == odd
    assert {p.P % 64 for p in lines} == set(range(64)) and {p.K % 64 for p in lines} == odd
    for is_aligned in (True, False):
        swept = list(mutation_subjects._swept_cuda(is_aligned))
        problems = [p for p, _ in swept]
        assert {(p.K // p.groups % 8, p.activation) for p in problems} == set(product(range(8), ACTIVATIONS))
        assert {(p.K // p.groups % 8, splits) for p, splits in swept} == set(product(range(8), (1, 2, 3)))
        assert {p.K // p.groups for p in problems} == set(range(1, 65))
        assert {p.C // p.groups * 2 % 8 == 0 for p in problems} == {is_aligned}
        assert {p.reduction % 64 == 0 for p in problems} == ({True, False} if is_aligned else {False})


def test_the_record_s_survivors_are_all_explained():
    record = json.loads((mutations.RESULTS / "mutants.json").read_text())
    known = mutations.reasons()
    survivors = [mutations.key(row["subject"], one) for row in record["rows"] for one in row["survivors"]]
    assert set(survivors) == set(known), "one reason for each, and none that is left over"
    assert all(len(one["reason"]) > 40 for one in known.values())
    for row in record["rows"]:
        assert len(row["survivors"]) == row["mutants"] - row["killed"]
    assert sum(row["mutants"] for row in record["rows"]) >= 300
    assert mutations.kill_rate(record, known) >= 0.95


def test_the_rate_leaves_out_what_is_equivalent_and_nothing_else():
    survivors = [dict(kind="sum", line=line, where="add") for line in (1, 2, 3)]
    record = dict(rows=[dict(subject="a kernel", mutants=10, killed=7, survivors=survivors)])
    known = {mutations.key("a kernel", one): dict(equivalent=one["line"] == 1) for one in survivors[:2]}
    assert mutations.kill_rate(record, {}) == 7 / 10 and mutations.kill_rate(record, known) == 7 / 9


@pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")
def test_real_mutants_of_a_cuda_kernel(monkeypatch):
    """A commit, an address and a barrier of a CUDA kernel."""
    if reason := cuda_launches.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(mutation_subjects, "_CUDA_PROBLEMS", (("1x448x5x5 -> 64, 1x1 float16 bias relu", 1),))
    monkeypatch.setattr(mutation_subjects, "_swept_cuda", lambda is_aligned: [])
    whole = mutation_subjects.cuda_subject(80, 1, 16)
    assert not mutations.tried(whole, whole.text, 0).is_killed
    for kind in ("cp.async commit deleted", "ldmatrix 16 bytes on", "barrier deleted"):
        first = next(one for one in whole.mutants(whole.text) if one.kind == kind)
        verdict = mutations.tried(whole, first.text, 0)
        assert verdict.is_killed == mutations.is_reached(whole, first, 0)


@pytest.mark.full
@pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")
def test_a_real_mutant_of_a_header(monkeypatch):
    """The barrier of the loop, and an edit that the compiler undoes."""
    if reason := cuda_launches.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(mutation_subjects, "_CUDA_PROBLEMS", (("1x448x5x5 -> 16, 1x1 float16 bias relu", 1),))
    monkeypatch.setattr(mutation_subjects, "_swept_cuda", lambda is_aligned: [])
    whole = mutation_subjects.source_subject("cuda/sm80/conv_bn_act.cuh", 3, 16)
    barrier = next(one for one in whole.mutants(whole.text) if one.kind == "barrier deleted")
    assert mutations.verdict_of(whole, barrier, 0).is_killed
    same = barrier._replace(text=whole.text.replace("int read = 0;", "int read = 1 - 1;"))
    assert mutations.verdict_of(whole, same, 0) == "same_code"
    assert mutations.verdict_of(whole, barrier._replace(text="nonsense"), 0) == "refused"
