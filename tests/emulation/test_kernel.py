"""Arguments, sizes and memory: what a run is given, what it refuses, and what it reports."""

import numpy
import pytest
import torch

from fused_resnet.emulation import Kernel, Launch, PtxError, TensorMap, run_together
from fused_resnet.emulation.interface import Counts
from tests.support.ptx import kernel_text

# out[i] = in[i] + one, a thread an element
ADD = """
ld.param.u64 %d0, [in];
ld.param.u64 %d1, [out];
ld.param.f32 %f0, [one];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %ntid.x;
mad.lo.u32 %r3, %r1, %r2, %r0;
mul.wide.u32 %d2, %r3, 4;
add.s64 %d3, %d0, %d2;
add.s64 %d4, %d1, %d2;
ld.global.f32 %f1, [%d3];
add.f32 %f2, %f1, %f0;
st.global.f32 [%d4], %f2;
ret;
"""
ADD_PARAMETERS = ".param .u64 in, .param .u64 out, .param .f32 one"


@pytest.fixture(scope="module")
def add():
    return Kernel(kernel_text(ADD, parameters=ADD_PARAMETERS))


def test_a_kernel_runs_on_tensors(add):
    x, y = torch.arange(64.0), torch.full((64,), torch.nan)
    outcome = add.run(2, 32, [x, y, 1.0], writable=[y])
    assert outcome.reports == [] and not outcome.faulted and outcome.seconds >= 0
    assert torch.equal(y, x + 1)
    assert outcome.counts.global_loads == outcome.counts.global_stores == 2


def test_a_kernel_runs_on_arrays_and_in_place(add):
    x = numpy.arange(32, dtype=numpy.float32)
    assert add.run(1, 32, [x, x, numpy.float32(1)], writable=[x]).reports == []
    assert (x == numpy.arange(32) + 1).all()


def test_chosen_blocks_only(add):
    x, y = torch.arange(96.0), torch.zeros(96)
    add.run(3, 32, [x, y, 1.0], writable=[y], blocks=[1])
    assert torch.equal(y, torch.cat([torch.zeros(32), x[32:64] + 1, torch.zeros(32)]))


def test_addresses_with_memory_by_name(add):
    x, y = torch.arange(32.0), torch.zeros(32)
    outcome = add.run(1, 32, [x.data_ptr(), y.data_ptr(), 1.0], memory=dict(first=x, second=y), writable=[y])
    assert outcome.reports == [] and torch.equal(y, x + 1)


@pytest.mark.parametrize("landing", ("late", "early", "random"))
@pytest.mark.parametrize("schedule", ("random", "in_turn", "greedy", "backwards"))
def test_every_mode(add, landing, schedule):
    x, y = torch.arange(128.0), torch.zeros(128)
    outcome = add.run(1, 128, [x, y, 1.0], writable=[y], landing=landing, schedule=schedule, seed=3, rounding=90)
    assert outcome.reports == [] and torch.equal(y, x + 1)


# ---------------------------------------------------------------------------------------------------- wrong arguments


def refused(kernel, error, reason, grid=1, block=32, arguments=None, **how):
    x = torch.zeros(64)
    with pytest.raises(error, match=reason):
        kernel.run(grid, block, [x, x, 1.0] if arguments is None else arguments, **how)


@pytest.mark.parametrize("arguments, error, reason", (
    ([], ValueError, "0 arguments for 3 parameters \\(in, out, one\\)"),
    ([torch.zeros(8), torch.zeros(8), 1], TypeError, "one is .f32; 1 is an int"),
    ([1.5, torch.zeros(8), 1.0], TypeError, "in is .u64; 1.5 is a float"),
    ([torch.zeros(8), torch.zeros(8), torch.zeros(1)], TypeError, "one is .f32; an array's address needs 64 bits"),
    ([2**64, 0, 1.0], ValueError, "in is .u64, which does not hold"),
    ([b"1234", 0, 1.0], ValueError, "in has 8 bytes, not 4"),
    (["x", 0, 1.0], TypeError, "a str is no argument"),
    ([torch.zeros(8, 8).t()[:4], 0, 1.0], ValueError, "in' has gaps or overlaps"),
    ([torch.zeros(1, 8).expand(4, 8), 0, 1.0], ValueError, "in' has gaps or overlaps"),
    ([numpy.zeros(8)[::2], 0, 1.0], ValueError, "in' has gaps or overlaps"),
    ([numpy.zeros(9, "u1")[1:].view("f4"), 0, 1.0], ValueError, "is not aligned to its elements"),
    ([torch.zeros(8, device="meta"), 0, 1.0], ValueError, "lies on meta"),
))  # fmt: skip
def test_arguments_that_are_refused(add, arguments, error, reason):
    refused(add, error, reason, arguments=arguments)


@pytest.mark.parametrize("how, reason", (
    (dict(grid=0), "a grid of"),
    (dict(grid=(1, 65536)), "a grid of"),
    (dict(block=1025), "wanted: at most 1024"),
    (dict(block=(1, 1, 65)), "64 in z"),
    (dict(grid=3, cluster=2), "clusters of"),
    (dict(grid=17, cluster=17), "at most 16"),
    (dict(shared_bytes=232449), "bytes of shared memory; sm_90a has 232448"),
    (dict(blocks=[1]), "wanted: some of 0 to 0"),
    (dict(blocks=[]), "wanted: some of 0 to 0"),
    (dict(blocks=[(1, 0, 0)]), "wanted: linear indices, x \\+ grid x"),
    (dict(grid=(1, 1, 1, 1)), "k: grid is \\(1, 1, 1, 1\\); wanted: a number or a tuple of up to three"),
    (dict(block=()), "k: block is \\(\\); wanted"),
    (dict(cluster="2"), "k: cluster is '2'; wanted"),
    (dict(grid=lambda options: (1,)), "k: grid is <function.*; wanted: a number"),
    (dict(landing="never"), "'late', 'early', 'random'"),
    (dict(schedule="sorted"), "'backwards'"),
    (dict(races=3), "0, 1, 2"),
    (dict(rounding=70), "80, 89, 90"),
    (dict(writable=[torch.zeros(4)]), "neither an argument nor in memory"),
))  # fmt: skip
def test_launches_that_are_refused(add, how, reason):
    refused(add, ValueError, reason, **how)


def test_arrays_of_which_only_one_is_writable_may_not_overlap(add):
    x = torch.zeros(64)
    with pytest.raises(ValueError, match="overlap, and only one of them is writable"):
        add.run(1, 32, [x, x[16:48], 1.0], writable=[x[16:48]])


def test_what_memory_holds_must_be_arrays(add):
    refused(add, TypeError, "memory 'n' is a int", memory=dict(n=3))


def test_the_directives_of_the_head_are_honoured():
    text = kernel_text("ret;", parameters="").replace("k()", "k() .reqntid 64\n.reqnctapercluster 2")
    kernel = Kernel(text)
    assert kernel.run(2, 64, []).reports == []
    for how, reason in ((dict(block=32), ".reqntid wants"), (dict(block=64, cluster=4), ".reqnctapercluster wants")):
        with pytest.raises(ValueError, match=reason):
            kernel.run(4, arguments=[], **how)
    with pytest.raises(ValueError, match=".maxntid allows 32"):
        Kernel(kernel_text("ret;", parameters="").replace("k()", "k() .maxntid 32")).run(1, 64, [])


def test_a_tensor_map_goes_where_128_bytes_are(add):
    made = TensorMap(torch.zeros(8, 8), (8, 8), (32,), (8, 8))
    refused(add, TypeError, "a TensorMap has 128", arguments=[made, 0, 1.0])
    aligned = Kernel(kernel_text("ret;", parameters=".param .align 64 .b8 map[128]"))
    assert aligned.run(1, 32, [made]).reports == []
    with pytest.raises(TypeError, match="wanted: bytes, a list or a TensorMap"):
        aligned.run(1, 32, [torch.zeros(4)])


STRUCT = """
ld.param.u64 %d0, [all];
ld.param.f32 %f0, [all+12];
ld.param.u64 %d1, [out];
ld.global.f32 %f1, [%d0];
add.f32 %f2, %f1, %f0;
st.global.f32 [%d1], %f2;
ret;
"""


def test_a_struct_is_given_in_parts():
    kernel = Kernel(kernel_text(STRUCT, parameters=".param .align 8 .b8 all[16], .param .u64 out"))
    x, y = torch.full((1,), 3.0), torch.zeros(1)
    assert kernel.run(1, 1, [[x, bytes(4), numpy.float32(4).tobytes()], y], writable=[y]).reports == []
    assert y == 7


@pytest.mark.parametrize("parts, error, reason", (
    ([bytes(8)], ValueError, "all has 256 bytes, not 8"),
    ([bytes(32), "map", bytes(96)], ValueError, "a TensorMap at byte 32; wanted: aligned to 64"),
    ([bytes(128), 5], TypeError, "a int in a struct; wanted: bytes"),
))  # fmt: skip
def test_parts_that_are_refused(parts, error, reason):
    kernel = Kernel(kernel_text("ret;", parameters=".param .align 128 .b8 all[256]"))
    made = TensorMap(torch.zeros(8, 8), (8, 8), (32,), (8, 8))
    refused(kernel, error, reason, arguments=[[made if part == "map" else part for part in parts]])


# ------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_instruction_is_an_error_at_load_that_names_it():
    first = kernel_text("").count("\n", 0, kernel_text("@").index("@")) + 1
    with pytest.raises(PtxError, match=f"line {first + 1}.*frobnicate.b32"):
        Kernel(kernel_text("mov.b32 %r0, 1;\nfrobnicate.b32 %r0, %r1;"))
    with pytest.raises(PtxError, match="approximately"):
        Kernel(kernel_text("add.approximately.f32 %f0, %f1, %f2;"))


def test_what_lies_outside_of_the_arrays_is_out_of_bounds(add):
    x, y = torch.arange(31.0), torch.zeros(32)
    outcome = add.run(1, 32, [x, y, 1.0], writable=[y])
    assert outcome.reports and "in" in outcome.reports[0] and outcome.reports[0].startswith("[")
    assert "ld.global.f32" in outcome.reports[0]


def test_the_nearest_array_alone_is_named(add):
    """Three pages of one array, so that all of them are near each other."""
    room = torch.zeros(3 * 64)
    first, second, third = room[:32], room[64:96], room[128:160]
    outcome = add.run(1, 33, [second, third, 1.0], writable=[third], memory=dict(first=first))
    assert outcome.reports[0].count("bytes)") == 1 and "(in+128, of 128 bytes)" in outcome.reports[0]
    outcome = add.run(1, 1, [room.data_ptr() + 63 * 4, third, 1.0], memory=dict(first=first, second=second))
    assert "(second-4, of 128 bytes)" in outcome.reports[0]
    outcome = add.run(1, 1, [64, third, 1.0], writable=[third])
    assert "out of bounds" in outcome.reports[0] and "bytes)" not in outcome.reports[0]


def test_without_shared_memory_the_report_says_how_to_give_it():
    shared = ".extern .shared .align 16 .b8 room[];"
    kernel = Kernel(kernel_text("mov.b32 %r0, 1;\n st.shared.b32 [room+16], %r0;\n ret;", "", shared))
    assert "the block has no shared memory; shared_bytes= gives" in kernel.run(1, 1, []).reports[0]
    assert "of which 1024 to 1039 are the block's" in kernel.run(1, 1, [], shared_bytes=16).reports[0]
    assert kernel.run(1, 1, [], shared_bytes=20).reports == []


def test_inputs_may_not_be_written(add):
    x, y = torch.arange(32.0), torch.zeros(32)
    outcome = add.run(1, 32, [x, y, 1.0])
    assert outcome.reports and "st.global.f32" in outcome.reports[0]
    assert torch.equal(y, torch.zeros(32))


def test_an_endless_kernel_ends():
    outcome = Kernel(kernel_text("L: bra L;", parameters="")).run(1, 32, [], max_steps=1000)
    assert outcome.faulted and outcome.reports


def test_module_variables_are_memory():
    shared = ".const .align 4 .u32 table[2] = {5, 7};"
    body = "ld.param.u64 %d0, [out];\n ld.const.u32 %r0, [table+4];\n st.global.u32 [%d0], %r0;\n ret;"
    kernel = Kernel(kernel_text(body, shared=shared))
    out = torch.zeros(1, dtype=torch.int32)
    assert kernel.run(1, 1, [out], writable=[out]).reports == [] and out.item() == 7


def test_alignment_that_is_not_declared_shows():
    """st.shared.v4 needs 16 bytes, the variable has 4."""
    shared = ".extern .shared .align 4 .b8 room[];"
    text = kernel_text("mov.b32 %r0, 1;\n st.shared.v4.b32 [room], {%r0, %r0, %r0, %r0};\n ret;", "", shared)
    assert Kernel(text).run(1, 1, [], shared_bytes=16).reports == []
    assert "misaligned" in Kernel(text, shared_shift=4).run(1, 1, [], shared_bytes=16).reports[0]


@pytest.mark.parametrize("alignment", [16, 256, 1024])
def test_the_strict_mode_moves_dynamic_shared_memory_within_its_alignment(alignment):
    """Where it begins is no kernel's to know: only that it is a multiple of what it declares."""
    text = kernel_text(
        "ld.param.u64 %d0, [out];\nmov.u32 %r0, dynamic;\nst.global.u32 [%d0], %r0;\nst.shared.u8 [%r0+99], 1;\nret;",
        shared=f".extern .shared .align {alignment} .b8 dynamic[];",
    )
    kernel, begins = Kernel(text), {}
    for races in (1, 2):
        for seed in range(20):
            out = numpy.zeros(1, numpy.uint32)
            outcome = kernel.run(1, 1, [out], writable=[out], shared_bytes=100, races=races, seed=seed)
            assert outcome.reports == [] and out[0] % alignment == 0
            begins.setdefault(races, set()).add(int(out[0]) % 1024)
    assert begins[1] == {0} and len(begins[2]) == min(1024 // alignment, len(begins[2]))
    assert (len(begins[2]) > 1) == (alignment < 1024)
    # no room to move in
    out, most = numpy.zeros(1, numpy.uint32), 227 * 1024
    for seed in range(4):
        outcome = kernel.run(1, 1, [out], writable=[out], shared_bytes=most, races=2, seed=seed)
        assert outcome.reports == [] and out[0] % 1024 == 0


def test_two_launches_in_order(add):
    x, y, z = torch.arange(32.0), torch.full((32,), torch.nan), torch.full((32,), torch.nan)
    outcome = run_together([Launch(add, 1, 32, [x, y, 1.0]), Launch(add, 1, 32, [y, z, 2.0])], writable=[y, z])
    assert outcome.reports == [] and torch.equal(z, x + 3)


def test_counts_add_up():
    assert Counts(warp_instructions=2, mma=1).plus(Counts(mma=3)) == Counts(warp_instructions=2, mma=4)
