"""mma.sync of eight rows, and of f64: fragments by CuTe's layouts (cute/atom/mma_traits_sm70.hpp, _sm80, _sm90)."""

import numpy
import pytest

from fused_resnet.emulation import Kernel
from tests.emulation import cute
from tests.support.ptx import kernel_text

LANES = (4, 8)
# (thread, value) -> m + rows k of A, n + 8 k of B, m + rows n of C, by the shape
LAYOUTS = {
    "m8n8k4": (((LANES, 1), ((8, 1), 0)), ((LANES, 1), ((8, 1), 0)), ((LANES, 2), ((16, 1), 8))),
    "m16n8k4": (((LANES, 2), ((16, 1), 8)), ((LANES, 1), ((8, 1), 0)), cute.C),
    "m16n8k8": (((LANES, (2, 2)), ((16, 1), (8, 64))), ((LANES, 2), ((8, 1), 32)), cute.C),
    "m16n8k16": (((LANES, (2, 4)), ((16, 1), (8, 64))), ((LANES, 4), ((8, 1), 32)), cute.C),
    "m8n8k16": (((LANES, 4), ((32, 1), 8)), ((LANES, 4), ((32, 1), 8)), ((LANES, 2), ((16, 1), 8))),
}
# of the eight threads of one of four products: lanes 4 q to 4 q + 3 and 16 more
LINES, LINES_ACROSS = ((8, 4), (1, 8)), (((4, 2), 4), ((8, 4), 1))
SUMS = {"f16": ((8, 8), (1, 8)), "f32": (((2, 2, 2), (2, 2, 2)), ((1, 16, 4), (8, 2, 32)))}


def fragment(matrix, layout):
    """(thread, value) of a matrix whose first coordinate counts fastest."""
    index = cute.offsets(*layout)
    return matrix.T.reshape(-1)[index].reshape(len(index), -1)


def matrix_of(values, layout, rows):
    flat = numpy.empty(values.size, values.dtype)
    flat[cute.offsets(*layout).reshape(-1)] = values.reshape(-1)
    return flat.reshape(-1, rows).T


def multiply(op, a, b, c, kind, result):
    """What lanes have of D. a, b, c: bytes of each lane, one row of them; kind, result: types of registers."""
    parts, loads, names, first = [], [], {}, 0
    for name, values, bits in (("a", a, kind), ("b", b, kind), ("c", c, result)):
        size = int(bits[1:]) // 8
        count = values.shape[1] // size
        prefix = {4: "%r", 8: "%d"}[size]
        names[name] = [f"{prefix}{20 + first + j}" for j in range(count)]
        loads += [f"ld.global.b{8 * size} {one}, [%d0+{8 * (first + j)}];" for j, one in enumerate(names[name])]
        wide = numpy.zeros((32, count, 8), numpy.uint8)
        wide[:, :, :size] = values.reshape(32, count, size)
        parts.append(wide.reshape(32, -1))
        first += count
    given = numpy.concatenate(parts, 1)
    d_bits = "b32" if ".f32.f16" in op or ".f16.f16" in op or ".s32." in op else "b64"
    size = int(d_bits[1:]) // 8
    count = 8 if op.endswith("f32.f16.f16.f16") else len(names["c"]) if ".f16.f16.f16.f32" not in op else 4
    out = numpy.zeros((32, count * size), numpy.uint8)
    d = [f"{'%r' if size == 4 else '%d'}{j + (100 if size == 4 else 50)}" for j in range(count)]
    text = "ld.param.u64 %d0, [in];\nld.param.u64 %d1, [out];\nmov.u32 %r0, %tid.x;\n"
    text += f"mad.wide.u32 %d0, %r0, {given.shape[1]}, %d0;\nmad.wide.u32 %d1, %r0, {count * size}, %d1;\n"
    text += "\n".join(loads) + "\n"
    text += (
        op + " " + ", ".join("{" + ", ".join(each) + "}" for each in (d, names["a"], names["b"], names["c"])) + ";\n"
    )
    text += "\n".join(f"st.global.{d_bits} [%d1+{size * j}], {one};" for j, one in enumerate(d)) + "\nret;"
    kernel = Kernel(kernel_text(text, parameters=".param .u64 in, .param .u64 out"))
    outcome = kernel.run(1, 32, [given, out], writable=[out])
    assert outcome.reports == [] and outcome.counts.mma == 1
    return out, outcome.counts


def as_bytes(values):
    return numpy.ascontiguousarray(values).view(numpy.uint8).reshape(32, -1)


@pytest.mark.parametrize("shape", ["m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"])
def test_doubles(shape):
    rows, k = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    draw = numpy.random.default_rng(k + rows)
    # whole numbers, whose products and sums are exact in any order
    a, b, c = (draw.integers(-(2**20), 2**20, size).astype(float) for size in ((rows, k), (8, k), (rows, 8)))
    layouts = LAYOUTS[shape]
    parts = [as_bytes(fragment(matrix, layout)) for matrix, layout in zip((a, b, c), layouts)]
    out, counts = multiply(f"mma.sync.aligned.{shape}.row.col.f64.f64.f64.f64", *parts, "b64", "b64")
    numpy.testing.assert_array_equal(matrix_of(out.view(float), layouts[2], rows), a @ b.T + c)
    assert counts.tensor_multiply_adds == rows * 8 * k


def test_doubles_are_fused():
    """One rounding a product and sum: 2^-60 is not lost where it meets a zero."""
    parts = [as_bytes(numpy.full((32, n), value)) for n, value in ((1, 1 + 2.0**-30), (1, 1 + 2.0**-30), (2, 0.0))]
    square = (1 + 2.0**-30) ** 2
    parts[2] = as_bytes(numpy.full((32, 2), -square))
    out, _ = multiply("mma.sync.aligned.m8n8k4.row.col.rn.f64.f64.f64.f64", *parts, "b64", "b64")
    # -square + x^2, exactly 2^-60, and three more rounded sums
    wanted = 2.0**-60
    for _ in range(3):
        wanted = float(numpy.longdouble(wanted) + (1 + numpy.longdouble(2) ** -30) ** 2)
    assert (out.view(float) == wanted).all()


@pytest.mark.parametrize("a_type, b_type", [("s8", "s8"), ("u8", "s8"), ("s8", "u8"), ("u8", "u8")])
def test_bytes(a_type, b_type):
    draw = numpy.random.default_rng(7)
    a, b = (
        draw.integers(0 if kind == "u8" else -128, 256 if kind == "u8" else 128, (8, 16)).astype(
            numpy.uint8 if kind == "u8" else numpy.int8
        )
        for kind in (a_type, b_type)
    )
    c = draw.integers(-1000, 1000, (8, 8)).astype(numpy.int32)
    layouts = LAYOUTS["m8n8k16"]
    parts = [as_bytes(fragment(matrix, layout)) for matrix, layout in zip((a, b, c), layouts)]
    op = f"mma.sync.aligned.m8n8k16.row.col.s32.{a_type}.{b_type}.s32"
    out, counts = multiply(op, *parts, "b32", "b32")
    wanted = a.astype(numpy.int32) @ b.astype(numpy.int32).T + c
    numpy.testing.assert_array_equal(matrix_of(out.view(numpy.int32), layouts[2], 8), wanted)
    assert counts.tensor_multiply_adds == 8 * 8 * 16


def threads_of(q):
    return numpy.r_[4 * q : 4 * q + 4, 4 * q + 16 : 4 * q + 20]


@pytest.mark.parametrize("d_type, c_type", [("f32", "f32"), ("f32", "f16"), ("f16", "f16")])
@pytest.mark.parametrize("a_order", ["row", "col"])
@pytest.mark.parametrize("b_order", ["row", "col"])
def test_halves(a_order, b_order, d_type, c_type):
    """Four products of 8 x 4 by 4 x 8, of a quadpair each. Small whole numbers: sums are exact."""
    draw = numpy.random.default_rng(3)
    a, b = (draw.integers(-8, 8, (4, 8, 4)).astype(numpy.float16) for _ in range(2))
    c_numpy, d_numpy = ({"f16": numpy.float16, "f32": numpy.float32}[kind] for kind in (c_type, d_type))
    c = draw.integers(-8, 8, (4, 8, 8)).astype(c_numpy)
    of_lanes = [numpy.zeros((32, 4), numpy.float16), numpy.zeros((32, 4), numpy.float16), numpy.zeros((32, 8), c_numpy)]
    for q in range(4):
        of_lanes[0][threads_of(q)] = fragment(a[q], LINES if a_order == "row" else LINES_ACROSS)
        of_lanes[1][threads_of(q)] = fragment(b[q], LINES if b_order == "col" else LINES_ACROSS)
        of_lanes[2][threads_of(q)] = fragment(c[q], SUMS[c_type])
    op = f"mma.sync.aligned.m8n8k4.{a_order}.{b_order}.{d_type}.f16.f16.{c_type}"
    out, _ = multiply(op, *map(as_bytes, of_lanes), "b32", "b32")
    for q in range(4):
        found = matrix_of(out.view(d_numpy).reshape(32, 8)[threads_of(q)], SUMS[d_type], 8)
        wanted = a[q].astype(float) @ b[q].astype(float).T + c[q].astype(float)
        numpy.testing.assert_array_equal(found.astype(float), wanted)
