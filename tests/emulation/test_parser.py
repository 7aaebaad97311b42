"""PTX text to instructions: what is read, and what is refused with its line."""

import struct

import pytest

from fused_resnet.emulation.entry import Operand
from fused_resnet.emulation.interface import (
    IMMEDIATE,
    LABEL,
    MEMORY,
    PREDICATE,
    REGISTER,
    SHARED_BASE,
    SINK,
    SPECIAL,
    SPECIAL_REGISTERS,
)
from fused_resnet.emulation.parser import kernel_names, parse
from fused_resnet.emulation.syntax import PtxError, Source, floating, integer, split_list
from tests.support.ptx import kernel_text


def instructions(body, **how):
    return parse(kernel_text(body, **how)).instructions


def operand(text, op="mov.b32 %r0,"):
    """The elements of the last operand of an instruction."""
    return instructions(f"{op} {text};")[0].operands[-1]


def refused(body, **how):
    with pytest.raises(PtxError) as error:
        parse(kernel_text(body, **how))
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("text, value", (
    ("0", 0), ("17", 17), ("-1", -1), ("0x1F", 31), ("0b101", 5), ("017", 15), ("4294967295U", 2**32 - 1), ("~0", -1),
    ("0xffffffffffffffff", -1), ("-9223372036854775808", -(2**63)), ("x", None), ("1.5", None), ("", None),
))  # fmt: skip
def test_integers(text, value):
    assert integer(text) == value


@pytest.mark.parametrize("text, is_double, value", (
    ("0f3F800000", False, 0x3F800000), ("0F7fffffff", True, 0x7FFFFFFF), ("0d3FF0000000000000", False, 0x3FF << 52),
    ("0dFFF0000000000000", True, -(1 << 52)), ("1.5", False, 0x3FC00000), ("-2.0e0", True, -(2**62)),
    ("1", False, None), ("0f3F80000", False, None),
))  # fmt: skip
def test_floating_constants(text, is_double, value):
    assert floating(text, is_double) == value


def test_a_list_is_split_outside_of_brackets():
    assert split_list("{a, b}, [c, {d, e}] , (f, g)") == ["{a, b}", "[c, {d, e}]", "(f, g)"]
    assert split_list("") == [] and split_list("a,b") == ["a", "b"]


def test_comments_leave_lines_where_they_are():
    source = Source("a // ; }\n/* {\n\n*/ b")
    assert source.text.split() == ["a", "b"] and source.line(source.text.index("b")) == 4


# ----------------------------------------------------------------------------------------------------------- operands


def test_registers_and_predicates_are_numbered_apart():
    add, setp = instructions("add.u32 %r1, %r0, %r2;\n setp.eq.b32 %p3|%p2, %r0, 0;")
    first, *_ = add.operands
    assert first[0].kind == REGISTER and [one[0].index - first[0].index for one in add.operands] == [0, -1, 1]
    assert setp.operands[0] == (Operand(PREDICATE, 3), Operand(PREDICATE, 2))


@pytest.mark.parametrize("text, op, expected", (
    ("7", "mov.b32 %r0,", [Operand(IMMEDIATE, 0, 7)]),
    ("1.0", "mov.f32 %f0,", [Operand(IMMEDIATE, 0, 0x3F800000)]),
    ("1.0", "mov.f64 %fd0,", [Operand(IMMEDIATE, 0, 0x3FF << 52)]),
    ("WARP_SZ", "mov.b32 %r0,", [Operand(IMMEDIATE, 0, 32)]),
    ("_", "mov.b32 %r0,", [Operand(SINK)]),
    ("%tid.y", "mov.b32 %r0,", [Operand(SPECIAL, 1)]),
    ("%laneid", "mov.b32 %r0,", [Operand(SPECIAL, 12)]),
    ("%clock64", "mov.b64 %d0,", [Operand(SPECIAL, SPECIAL_REGISTERS.index("clock"))]),
    ("out", "mov.b64 %d0,", [Operand(IMMEDIATE, 0, 0)]),
    ("[out]", "ld.param.u64 %d0,", [Operand(MEMORY, -1, 0)]),
    ("[out+4]", "ld.param.u32 %r0,", [Operand(MEMORY, -1, 4)]),
    ("[1024]", "ld.shared.u32 %r0,", [Operand(MEMORY, -1, 1024)]),
))  # fmt: skip
def test_operands(text, op, expected):
    assert list(operand(text, op)) == expected


def test_negated_predicates_and_guards():
    selp, bra = instructions("L: selp.b32 %r0, 1, 2, !%p4;\n @!%p5 bra L;")
    assert selp.operands[-1] == (Operand(PREDICATE, 4, 1),)
    assert (bra.predicate, bra.negated, bra.target, bra.operands) == (5, True, 0, ())


def test_addresses_have_a_base_and_an_offset():
    base = operand("%d3", "mov.b64 %d0,")[0].index
    for text, offset in (("[%d3]", 0), ("[%d3+16]", 16), ("[%d3+-16]", -16), ("[%d3 - 8]", -8), ("[%d3+0x10]", 16)):
        assert operand(text, "ld.global.u32 %r0,") == (Operand(MEMORY, base, offset),), text


def test_a_tensor_copy_names_its_map_and_coordinates_in_one_operand():
    copy = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%d1, {%r2, 5}], [%r3+8]"
    to, source, barrier = instructions(f"{copy};")[0].operands
    assert [one.kind for one in to] == [MEMORY]
    assert [one.kind for one in source] == [MEMORY, REGISTER, IMMEDIATE] and source[2].value == 5
    assert barrier[0].value == 8


def test_vectors_are_one_operand():
    (vector, address) = instructions("ld.global.v2.b32 {%r0, _}, [%d0];")[0].operands
    assert [one.kind for one in vector] == [REGISTER, SINK] and address[0].kind == MEMORY


# -------------------------------------------------------------------------------------------------------------- scopes


def test_names_in_inner_braces_are_others():
    inner = """
mov.b32 %r0, 1;
{ .reg .b32 %r0; mov.b32 %r0, 2; { mov.b32 %r0, 3; } }
mov.b32 %r0, 4;
"""
    to = [one.operands[0][0].index for one in instructions(inner)]
    assert to[0] == to[3] != to[1] == to[2]


def test_labels_are_scoped_and_may_repeat():
    body = """
{ again: add.u32 %r0, %r0, 1; @%p0 bra again; }
{ again: add.u32 %r0, %r0, 2; @%p0 bra.uni again; bra done; }
done: ret;
"""
    assert [one.target for one in instructions(body)] == [-1, 0, -1, 2, 5, -1]


def test_a_label_of_another_block_is_not_seen():
    assert "no label away" in refused("{ away: ret; }\n bra away;")


def test_branch_targets():
    index, targets = instructions("""
T: .branchtargets A, B;
brx.idx %r0, T;
A: mov.b32 %r1, 1;
B: ret;
""")[0].operands
    assert index[0].kind == REGISTER and targets == (Operand(LABEL, 0, 1), Operand(LABEL, 0, 2))


# ----------------------------------------------------------------------------------------------------------- variables


def test_static_shared_memory_is_laid_out_in_order_and_dynamic_behind_it():
    shared = (
        ".shared .align 4 .b8 a[6];\n.shared .f64 b;\n.extern .shared .align 128 .b8 c[];\n.extern .shared .u32 d[];"
    )
    entry = parse(kernel_text("mov.b32 %r0, a; mov.b32 %r1, b; mov.b32 %r2, c; mov.b32 %r3, d;", shared=shared))
    assert [one.operands[1][0].value - SHARED_BASE for one in entry.instructions] == [0, 8, 128, 128]
    assert entry.static_shared_bytes == 128


def test_dynamic_shared_memory_alone_begins_at_the_base():
    entry = parse(kernel_text("ld.shared.b32 %r0, [c+12];", shared=".extern .shared .align 16 .b8 c[];"))
    assert entry.instructions[0].operands[1] == (Operand(MEMORY, -1, SHARED_BASE + 12),)
    assert entry.static_shared_bytes == 0


def test_dynamic_shared_memory_may_begin_anywhere_its_alignment_allows():
    text = kernel_text("mov.b32 %r0, c;", shared=".extern .shared .align 16 .b8 c[];")
    starts = [parse(text, shared_shift=shift).instructions[0].operands[1][0].value for shift in (0, 16, 40)]
    assert starts == [SHARED_BASE, SHARED_BASE + 16, SHARED_BASE + 48]


def test_shared_memory_of_other_kernels_takes_no_room():
    assert parse(kernel_text("ret;", shared=".shared .b8 theirs[4096];")).static_shared_bytes == 0


def test_dynamic_size_is_what_is_not_static():
    (one,) = instructions("mov.u32 %r0, %dynamic_smem_size;\n", shared="")
    assert one.operands[1] == (Operand(SPECIAL, SPECIAL_REGISTERS.index("dynamic_smem_size"), 0),)
    body = ".shared .b8 a[48];\n mov.u32 %r0, %dynamic_smem_size;"
    assert parse(kernel_text(body)).instructions[0].operands[1][0].value == 48


def test_local_variables_have_offsets():
    entry = parse(kernel_text(".local .b8 a[3];\n.local .align 16 .b8 b[32];\n mov.b64 %d0, b;"))
    assert entry.instructions[0].operands[1] == (Operand(IMMEDIATE, 0, 16),) and entry.local_bytes == 48


@pytest.mark.parametrize("declaration, data", (
    (".const .align 4 .u32 v[3] = {1, 0x10, -1}", struct.pack("<IIi", 1, 16, -1)),
    (".const .f32 v[2] = {0f3F800000, 2.5}", struct.pack("<ff", 1, 2.5)),
    (".const .f64 v = 0d3FF8000000000000", struct.pack("<d", 1.5)),
    (".global .align 1 .b8 v[4] = {104, 105}", b"hi\0\0"),
    (".global .align 8 .u64 v[2]", bytes(16)),
    (".visible .global .u16 v[] = {7, 8}", b"\x07\0\x08\0"),
))  # fmt: skip
def test_module_variables(declaration, data):
    entry = parse(kernel_text("mov.u64 %d0, v;", shared=f"{declaration};"))
    (variable,) = entry.variables
    assert variable.memory.tobytes() == data and variable.writable == ("global" in declaration)
    assert entry.instructions[0].operands[1][0].value == variable.memory.ctypes.data
    assert variable.memory.ctypes.data % (8 if "u64" in declaration else 1) == 0


# ---------------------------------------------------------------------------------------------------------------- head


def test_parameters_lie_as_in_c():
    parameters = ".param .u8 a, .param .u64 .ptr .global .align 16 b, .param .align 64 .b8 c[128], .param .f32 d"
    entry = parse(kernel_text("ret;", parameters=parameters))
    assert [(p.name, p.offset, p.size) for p in entry.parameters] == [
        ("a", 0, 1), ("b", 8, 8), ("c", 64, 128), ("d", 192, 4),
    ]  # fmt: skip
    assert entry.parameter_bytes == 196 and entry.parameters[2].is_array


def with_head(directives):
    return parse(kernel_text("ret;").replace("(.param .u64 out)", f"(.param .u64 out)\n{directives}"))


def test_directives_of_the_head():
    entry = with_head(".reqntid 32, 4\n.minnctapersm 1\n.maxnreg 64\n.reqnctapercluster 2")
    assert entry.required_block == (32, 4, 1) and entry.required_cluster == (2, 1, 1)
    assert with_head(".maxntid 16, 8, 1").most_threads == 128
    with pytest.raises(PtxError, match="unknown in a kernel's head: .other 3"):
        with_head(".other 3")


def test_a_kernel_without_parameters():
    assert parse(".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{ ret; }").parameters == []


def test_one_of_several_kernels_is_named():
    text = kernel_text("ret;") + kernel_text("mov.b32 %r0, 1; ret;").replace(" k(", " other(").split("64\n", 1)[1]
    assert kernel_names(text) == ["k", "other"]
    assert len(parse(text, "k").instructions) == 1 and len(parse(text, "other").instructions) == 2
    with pytest.raises(PtxError, match="2 kernels, name one of them: k, other"):
        parse(text)
    with pytest.raises(PtxError, match="no kernel 'third'"):
        parse(text, "third")


def test_what_debuggers_read_is_passed_over():
    body = ' .loc 1 5 3, function_name $L, inlined_at 1 2 3\n .pragma "nounroll";\n ret;'
    text = kernel_text(body) + '.file 1 "a.cu"\n.section .debug_abbrev {\n .b8 1\n .b8 2\n}\n.section .debug_loc { }\n'
    assert [one.op for one in parse(text).instructions] == ["ret"]


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("body, reason", (
    ("mov.b32 %r0, %nobody;", "unknown operand '%nobody'"),
    ("mov.b32 %r0, (1 + 2);", "unknown operand '(1 + 2)'"),
    ("ld.global.b32 %r0, [nobody];", "unknown address 'nobody'"),
    ("ld.global.b32 %r0, [%p0];", "unknown address '%p0'"),
    ("@%r0 ret;", "%r0 is no predicate"),
    ("mov.b32 %r0, !%r1;", "only a predicate can be negated"),
    ("bra nowhere;", "no label nowhere"),
    ("call f, (%r0);", "device calls are not modelled, and this calls f: have the compiler inline it"),
    ("call.uni (%r1), f, (%r0);", "this calls f: have"),
    (".param .b64 p;\nst.param.b64 [p], %d0;\ncall.uni\n(r),\nvprintf,\n(p);", "this calls vprintf: remove printf"),
    (".param .b64 p;\ncall.uni\n__assertfail,\n(p);", "this calls __assertfail: remove assert"),
    (".param .b32 x;", "device calls are not modelled"),
    (".reg .b128 %q;", "registers of a type that is unknown here"),
    (".reg .v4 .f32 %q;", "registers of a type that is unknown here"),
    (".local .b8 a[4] mov;", "not understood as a variable"),
    (".shared .pred a;", "a variable of type .pred"),
    (".shared .b8 a[];", "a shared variable of no size"),
    (".global .b8 a[4];", "a .global variable within a kernel"),
    (".something 4;", "unknown directive"),
    ("brx.idx %r0, T;", "no branch targets T"),
    ("ret", "without a semicolon"),
))  # fmt: skip
def test_what_is_unknown_is_refused_with_its_line(body, reason):
    message = refused(f"mov.b32 %r0, 1;\n{body}")
    assert reason in message
    first = kernel_text("mov.b32 %r0, 1;").split("mov.b32")[0].count("\n") + 1
    assert f"line {first + 1}:" in message


@pytest.mark.parametrize("module, reason", (
    (".visible .func f() { ret; }", "device functions are not modelled"),
    (".alias a, b;", "unknown at the level of the module"),
    (".tex .u32 t;", "unknown at the level of the module"),
    ("what is this;", "unknown at the level of the module"),
    (".extern .global .b8 v[4];", "a variable of another module"),
    (".global .b8 v[2] = {1, 2, 3};", "3 values for a variable of 2"),
    (".global .u64 v = generic(w);", "'generic(w)' is not understood as a value"),
))  # fmt: skip
def test_modules_that_are_refused(module, reason):
    assert reason in refused("mov.u64 %d0, v;", shared=module)


def test_a_declared_function_is_no_harm():
    assert (
        len(instructions("ret;", shared=".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);")) == 1
    )


def test_32_bit_addresses_are_refused():
    with pytest.raises(PtxError, match="64 bits"):
        parse(kernel_text("ret;").replace(".address_size 64", ".address_size 32"))
