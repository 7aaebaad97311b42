"""The golden kernels: one instruction each, between loads of drawn words and stores of what it left.

No layout is built here. Fragments and shared memory are drawn words, and a GPU says which of them become what.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple, Optional, Sequence

from benchmarks.gpu_check.golden.inputs import Segment

TARGETS = {80: "sm_80", 89: "sm_89", 90: "sm_90a"}
VERSION = "8.4"  # of PTX, which drivers from CUDA 12.4 on compile
POISON = 0xA5  # what shared memory and outputs hold beforehand
_LANES, _THREADS, _WARPGROUP = 32, 256, 128


class Map(NamedTuple):
    """A tensor map over the input, innermost first: tiled by `box`, or im2col by corners, channels and pixels.

    sizes in elements of 2 bytes, strides in bytes.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int
    box: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    channels: int = 0
    pixels: int = 0


class Golden(NamedTuple):
    """gpu: the least compute capability, and nothing else for 90. bound: of an approximate result in fp32, the error
    that the ISA allows, in units of the last place or relative; None where each bit counts. sums: whether a tensor
    core's rounding shows."""

    name: str
    gpu: int
    body: str
    threads: int
    inputs: tuple[Segment, ...]
    out_bytes: int
    tensor_map: Optional[Map] = None
    ulps: float = 0.0
    relative: float = 0.0
    sums: bool = False

    @property
    def in_bytes(self) -> int:
        return 4 * sum(words for _, words in self.inputs)

    @property
    def digest(self) -> str:
        """A digest: it changes with whatever an output depends on."""
        return hashlib.sha256(repr((self, VERSION, POISON)).encode()).hexdigest()[:16]

    @property
    def entry(self) -> str:
        has_map = ", .param .align 64 .b8 map[128]" if self.tensor_map else ""
        return f"""
.visible .entry {self.name}(.param .u64 in, .param .u64 out{has_map})
{{
  .reg .pred %p<4>;
  .reg .b16 %h<8>;
  .reg .b32 %r<80>;
  .reg .b64 %d<16>;
  .shared .align 1024 .b8 sm[10240];
  .shared .align 8 .b64 full;
  ld.param.u64 %d0, [in];
  ld.param.u64 %d1, [out];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, sm;
{self.body}
  ret;
}}
"""

    @property
    def text(self) -> str:
        return module([self])


def module(kernels: Sequence[Golden]) -> str:
    """One PTX text of kernels for one kind of GPU."""
    (gpu,) = {kernel.gpu for kernel in kernels}
    header = f".version {VERSION}\n.target {TARGETS[gpu]}\n.address_size 64\n"
    return header + "".join(kernel.entry for kernel in kernels)


# -------------------------------------------------------------------------------------------------------- words of PTX


def _registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + j}" for j in range(count)) + "}"


def _row(register: str, base: str, row_bytes: int) -> str:
    """The address of this thread's row."""
    return f"  mad.wide.u32 {register}, %r0, {row_bytes}, {base};\n"


def _load(first: int, count: int, at: int = 0) -> str:
    return "".join(f"  ld.global.b32 %r{first + j}, [%d2+{at + 4 * j}];\n" for j in range(count))


def _store(first: int, count: int) -> str:
    stores = "".join(f"  st.global.b32 [%d3+{4 * j}], %r{first + j};\n" for j in range(count))
    return _row("%d3", "%d1", 4 * count) + stores


def _name(*parts: str) -> str:
    return "_".join(filter(None, parts)).translate(str.maketrans({".": "_", ":": None, "{": None, "}": None}))


# ------------------------------------------------------------------------------------------------- a result per thread


def _lanewise(
    op: str, operands: str, *, gpu: int = 80, words: int = 2, kind: str = "edges", threads: int = _THREADS,
    ulps: float = 0.0, relative: float = 0.0, name: str = "",
) -> Golden:  # fmt: skip
    """op operands, from %r10, %r11, ... to %r20. What reads or writes 16 bits has them in %h0 and %h1."""
    body = _row("%d2", "%d0", 4 * words) + _load(10, words)
    body += "  mov.b32 {%h0, %h1}, %r10;\n  mov.b32 {%h2, %h3}, %r10;\n"
    body += f"  {op} {operands};\n"
    if operands.startswith("%h"):
        body += "  mov.b32 %r20, {%h2, %h3};\n"
    inputs = ((kind, threads * words),)
    return Golden(
        _name(op, name), gpu, body + _store(20, 1), threads, inputs, 4 * threads, ulps=ulps, relative=relative
    )


def _lanewise_kernels() -> list[Golden]:
    two, three = "%r20, %r10, %r11", "%r20, %r10, %r11, %r12"
    pack = [(f"cvt.{how}.{to}.f32", 80) for to in ("f16x2", "bf16x2") for how in ("rn", "rz", "rn.relu")]
    pack_16 = [(f"cvt.rn.satfinite{relu}.{to}.f32", 89) for to in ("e4m3x2", "e5m2x2") for relu in ("", ".relu")]
    return [
        *(_lanewise(op, "%h2, %r10") for op in ("cvt.rn.f16.f32", "cvt.rz.f16.f32", "cvt.rn.bf16.f32")),
        *(_lanewise(op, two, gpu=gpu) for op, gpu in pack),
        *(_lanewise(op, "%h2, %r10, %r11", gpu=gpu) for op, gpu in pack_16),
        _lanewise("cvt.rn.satfinite.e4m3x2.f16x2", "%h2, %r10", gpu=89, kind="bits"),
        *(_lanewise(f"cvt.rn.f16x2.{of}", "%r20, %h0", gpu=89, kind="bits") for of in ("e4m3x2", "e5m2x2")),
        _lanewise("cvt.rna.tf32.f32", "%r20, %r10"),
        _lanewise("cvt.rn.tf32.f32", "%r20, %r10", gpu=90),
        *(_lanewise(op, "%r20, %h0", kind="bits") for op in ("cvt.f32.f16", "cvt.rn.f32.s16")),
        _lanewise("cvt.f32.bf16", "%r20, %h0", gpu=90, kind="bits"),
        *(_lanewise(op, "%r20, %r10") for op in ("cvt.rni.s32.f32", "cvt.rzi.u32.f32", "cvt.rn.f32.s32")),
        # PTX ISA 9.7.3.21, 9.7.3.13, 9.7.3.16: 2 ulps of the rounded result, and 1 ulp; a relative error of 2^-22.9
        *(_lanewise(f"ex2.approx{ftz}.f32", "%r20, %r10", ulps=2) for ftz in ("", ".ftz")),
        *(_lanewise(f"rcp.approx{ftz}.f32", "%r20, %r10", ulps=1) for ftz in ("", ".ftz")),
        *(_lanewise(f"rsqrt.approx{ftz}.f32", "%r20, %r10", relative=2**-22.9) for ftz in ("", ".ftz")),
        *(_lanewise(op, "%r20, %r10") for op in ("rcp.rn.f32", "sqrt.rn.f32")),
        _lanewise("div.rn.f32", two),
        *(_lanewise(f"{op}{nan}.{of}", two, kind=kind) for op in ("max", "min") for nan in ("", ".NaN")
          for of, kind in (("f32", "edges"), ("f16x2", "bits"), ("bf16x2", "bits"))),
        *(_lanewise(f"fma.rn{how}.{of}", three, words=3, kind=kind)
          for of, kind, hows in (("f32", "edges", ("", ".ftz")), ("f16x2", "bits", ("", ".ftz", ".relu")),
                                 ("bf16x2", "bits", ("", ".relu"))) for how in hows),
        _lanewise("fma.rn.f16x2", three, words=3, kind="f16", name="near_one"),
        *(_lanewise(f"{op}.f16x2", two, kind="f16") for op in ("add.rn", "mul.rn")),
        *(_lanewise(f"prmt.b32{mode}", three, words=3, kind="bits")
          for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16")),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- words of a warp


def _exchange(mode: str, clamp: int) -> Golden:
    """The lane asked for is drawn. Where it is out of range a lane keeps its own; the predicate is the lowest bit."""
    body = _row("%d2", "%d0", 8) + _load(10, 2)
    body += "  and.b32 %r11, %r11, 31;\n"
    body += f"  shfl.sync.{mode}.b32 %r20|%p0, %r10, %r11, {clamp:#x}, -1;\n"
    body += "  shl.b32 %r20, %r20, 1;\n  selp.b32 %r21, 1, 0, %p0;\n  or.b32 %r20, %r20, %r21;\n"
    name = _name("shfl.sync", mode, f"c{clamp:x}")
    return Golden(name, 80, body + _store(20, 1), _LANES, (("bits", 2 * _LANES),), 4 * _LANES)


def _warp_kernels() -> list[Golden]:
    # a segment of all lanes and one of eight; lanes below the segment's end for "up"
    clamps = {"idx": (0x1F, 0x181F), "down": (0x1F, 0x181F), "bfly": (0x1F, 0x181F), "up": (0x0, 0x1800)}
    redux = [f"{op}.{of}" for op in ("add", "min", "max") for of in ("s32", "u32")]
    redux += [f"{op}.b32" for op in ("and", "or", "xor")]
    return [
        *(_exchange(mode, clamp) for mode, found in clamps.items() for clamp in found),
        *(_lanewise(f"redux.sync.{op}", "%r20, %r10, -1", words=1, kind="bits", threads=_LANES) for op in redux),
    ]


# ------------------------------------------------------------------------------------------------------------- matrices


def _ldmatrix(count: int, trans: str) -> Golden:
    op = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
    body = f"""{_row("%d2", "%d0", 16)}{_load(10, 4)}
  mad.lo.u32 %r1, %r0, 16, %r1;
  st.shared.v4.b32 [%r1], {_registers(10, 4)};
  bar.warp.sync -1;
  {op} {_registers(20, count)}, [%r1];
{_store(20, count)}"""
    return Golden(_name(op), 80, body, _LANES, (("bits", 4 * _LANES),), 4 * count * _LANES)


def _stmatrix(count: int, trans: str) -> Golden:
    op = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
    body = f"""{_row("%d2", "%d0", 16)}{_load(10, 4)}
  mad.lo.u32 %r1, %r0, 16, %r1;
  mov.b32 %r2, {POISON * 0x01010101:#x};
  st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}};
  bar.warp.sync -1;
  {op} [%r1], {_registers(10, count)};
  bar.warp.sync -1;
  ld.shared.v4.b32 {_registers(20, 4)}, [%r1];
{_store(20, 4)}"""
    return Golden(_name(op), 90, body, _LANES, (("bits", 4 * _LANES),), 16 * _LANES)


_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "s8": 8, "u8": 8, "s32": 32, "e4m3": 8, "e5m2": 8}


def _mma(shape: str, types: str, gpu: int = 80) -> Golden:
    """A, B and C are drawn registers: where their elements belong is what the result shows."""
    d_type, a_type, b_type, _ = types.split(".")
    k = int(shape.split("k")[1])
    a, b, c = (rows * columns * _BITS[of] // 32 // _LANES
               for rows, columns, of in ((16, k, a_type), (k, 8, b_type), (16, 8, d_type)))  # fmt: skip
    op = f"mma.sync.aligned.{shape}.row.col.{types}"
    at_b = 4 * _LANES * a
    body = _row("%d2", "%d0", 4 * a) + _load(10, a)
    body += _row("%d2", "%d0", 4 * b) + _load(10 + a, b, at_b)
    body += _row("%d2", "%d0", 4 * c) + _load(10 + a + b, c, at_b + 4 * _LANES * b)
    operands = (_registers(40, c), _registers(10, a), _registers(10 + a, b), _registers(10 + a + b, c))
    body += f"  {op} {', '.join(operands)};\n{_store(40, c)}"
    kinds = tuple("bits" if of in ("s8", "u8", "s32") else of for of in (a_type, b_type, d_type))
    inputs = tuple((kind, count * _LANES) for kind, count in zip(kinds, (a, b, c)))
    return Golden(_name(op), gpu, body, _LANES, inputs, 4 * c * _LANES, sums=d_type != "s32")


def _matrix_kernels() -> list[Golden]:
    integers = ("s8", "u8")
    return [
        *(make(count, trans) for make in (_ldmatrix, _stmatrix) for count in (1, 2, 4) for trans in ("", ".trans")),
        *(_mma(f"m16n8k{k}", f"{d}.f16.f16.{d}") for k in (8, 16) for d in ("f32", "f16")),
        *(_mma(f"m16n8k{k}", "f32.bf16.bf16.f32") for k in (8, 16)),
        *(_mma(f"m16n8k{k}", "f32.tf32.tf32.f32") for k in (4, 8)),
        *(_mma(f"m16n8k{k}", f"s32.{a}.{b}.s32") for k in (16, 32) for a in integers for b in integers),
        *(_mma("m16n8k32", f"f32.{a}.{b}.f32", 89) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
    ]


_SWIZZLES = {0: (0, 16), 32: (3, 32), 64: (2, 64), 128: (1, 128)}  # by span: the descriptor's code, the row in bytes
_A_BYTES, _B_BYTES, _N = 8192, 2048, 16


def _descriptor(swizzle: int, is_mn_major: bool, mn_bytes: int) -> int:
    """All but the start: the leading and the stride offset of the canonical layouts, as close as they can lie."""
    code, span = _SWIZZLES[swizzle]
    core = 8 * span
    if is_mn_major:
        groups = -(-mn_bytes // span)
        leading, stride = (core, core * groups) if swizzle else (core * groups, core)
    else:
        leading, stride = (16, core) if swizzle else (core, 2 * core)
    return leading >> 4 << 16 | stride >> 4 << 32 | code << 62


def _wgmma(types: str, swizzle: int, majors: tuple[int, int] = (0, 0)) -> Golden:
    """One product of 64 x 16 by a warpgroup, of drawn shared memory and drawn sums."""
    d_type, a_type, _ = types.split(".")
    k = 256 // _BITS[a_type]
    sums = 64 * _N * _BITS[d_type] // 32 // _WARPGROUP
    op = f"wgmma.mma_async.sync.aligned.m64n{_N}k{k}.{types}"
    descriptors = [_descriptor(swizzle, bool(major), rows * 2) for major, rows in zip(majors, (64, _N))]
    transposes = "" if a_type == "tf32" else f", {majors[0]}, {majors[1]}"
    image = _A_BYTES + _B_BYTES
    fill = "".join(
        f"  ld.global.v4.b32 {_registers(10, 4)}, [%d2+{at}];\n  st.shared.v4.b32 [%r2+{at}], {_registers(10, 4)};\n"
        for at in range(0, image, 16 * _WARPGROUP)
    )
    body = f"""{_row("%d2", "%d0", 16)}  mad.lo.u32 %r2, %r0, 16, %r1;
{fill}{_row("%d2", "%d0", 4 * sums)}{_load(20, sums, image)}
  fence.proxy.async.shared::cta;
  bar.sync 0;
  cvt.u64.u32 %d4, %r1;
  shr.u64 %d4, %d4, 4;
  or.b64 %d5, %d4, {descriptors[0]:#x};
  add.u64 %d4, %d4, {_A_BYTES >> 4};
  or.b64 %d6, %d4, {descriptors[1]:#x};
  setp.eq.u32 %p0, %r0, %r0;
  wgmma.fence.sync.aligned;
  {op} {_registers(20, sums)}, %d5, %d6, %p0, 1, 1{transposes};
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
{_store(20, sums)}"""
    letters = "".join("mn" if major else "k" for major in majors)
    inputs = ((a_type, _A_BYTES // 4), (a_type, _B_BYTES // 4), (d_type, sums * _WARPGROUP))
    out_bytes = 4 * sums * _WARPGROUP
    return Golden(_name(op, f"swizzle{swizzle}", letters), 90, body, _WARPGROUP, inputs, out_bytes, sums=True)


def _wgmma_kernels() -> list[Golden]:
    return [
        *(_wgmma(types, swizzle) for types in ("f32.f16.f16", "f32.bf16.bf16", "f32.tf32.tf32")
          for swizzle in _SWIZZLES),
        _wgmma("f16.f16.f16", 128),
        *(_wgmma("f32.f16.f16", swizzle, majors) for swizzle in _SWIZZLES for majors in ((0, 1), (1, 0))),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- tensor copies


def _copy(name: str, tensor_map: Map, coordinates: Sequence[int], copied_bytes: int, words: int,
          offsets: Sequence[int] = ()) -> Golden:  # fmt: skip
    """One copy into poisoned shared memory, and all of that; behind it, whether the bytes that were expected came."""
    out_bytes = 2048
    places = range(0, out_bytes, 4 * _WARPGROUP)
    mode, also = ("im2col", ", {%h0, %h1}") if offsets else ("tile", "")
    rank = len(coordinates)
    op = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.{mode}.mbarrier::complete_tx::bytes"
    moves = "".join(f"  mov.b32 %r{30 + j}, {at};\n" for j, at in enumerate(coordinates))
    moves += "".join(f"  mov.b16 %h{j}, {at};\n" for j, at in enumerate(offsets))
    poison = "".join(f"  st.shared.b32 [%r2+{at}], %r3;\n" for at in places)
    loads = "".join(f"  ld.shared.b32 %r{10 + j}, [%r2+{at}];\n" for j, at in enumerate(places))
    stores = "".join(f"  st.global.b32 [%d3+{at}], %r{10 + j};\n" for j, at in enumerate(places))
    body = f"""
  mad.lo.u32 %r2, %r0, 4, %r1;
  mov.b32 %r3, {POISON * 0x01010101:#x};
{poison}{moves}
  mov.u32 %r4, full;
  mov.b64 %d2, map;
  cvta.param.u64 %d2, %d2;
  setp.eq.u32 %p0, %r0, 0;
  @%p0 mbarrier.init.shared::cta.b64 [%r4], 1;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {copied_bytes};
  @%p0 {op} [%r1], [%d2, {_registers(30, rank)}], [%r4]{also};
  mov.u32 %r5, 0;
WAIT:
  mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r4], 0, 1000;
  @%p1 bra DONE;
  add.u32 %r5, %r5, 1;
  setp.lt.u32 %p2, %r5, 20000;
  @%p2 bra WAIT;
DONE:
  selp.u32 %r6, 1, 0, %p1;
{loads}{_row("%d3", "%d1", 4)}{stores}
  st.global.b32 [%d3+{out_bytes}], %r6;"""
    inputs = (("bits", words),)
    return Golden(name, 90, body, _WARPGROUP, inputs, out_bytes + 4 * _WARPGROUP, tensor_map)


def _copy_kernels() -> list[Golden]:
    rows, row_bytes = 24, 192
    sizes, strides, words = (row_bytes // 2, rows), (row_bytes,), rows * row_bytes // 4

    def tile(name: str, swizzle: int, inner_bytes: int, at: tuple[int, int], steps: tuple[int, int] = (1, 1)) -> Golden:
        tensor_map = Map(sizes, strides, swizzle, (inner_bytes // 2, 12 * steps[1]), steps)
        return _copy(f"tma_tile_{name}", tensor_map, at, 12 * inner_bytes, words)

    # N 2, H 7, W 9, C 16; a filter of 3 x 3 with padding 1 and stride 2: 4 x 5 pixels an image
    image = ((16, 9, 7, 2), (32, 288, 2016))
    pixels = 32

    def im2col(name: str, swizzle: int, at: Sequence[int], offsets: Sequence[int], step: int) -> Golden:
        tensor_map = Map(*image, swizzle, (), (1, step, step, 1), (-1, -1), (-1, -1), 16, pixels)
        return _copy(f"tma_im2col_{name}", tensor_map, at, 32 * pixels, 2 * 2016 // 4, offsets)

    taps = itertools.product((0, 2), (0, 1))
    return [
        *(tile(f"swizzle{span}", span, span or 64, at) for span, at in ((0, (3, 2)), (32, (8, 1)), (64, (5, 3)))),
        tile("swizzle128", 128, 128, (16, 4)),
        tile("before_the_first", 64, 64, (-5, -3)),
        tile("beyond_the_last", 128, 128, (70, 17)),
        tile("every_second_row", 64, 64, (4, 1), (1, 2)),
        *(tile(f"narrow{inner}_swizzle{span}", span, inner, (8, 2)) for inner, span in ((16, 32), (32, 64), (32, 128))),
        *(im2col(f"stride1_tap{s}{r}", 32, (0, -1, -1, 0), (s, r), 1) for s, r in ((0, 0), (2, 1))),
        *(im2col(f"stride2_tap{s}{r}", 32, (0, -1, -1, 0), (s, r), 2) for s, r in taps),
        im2col("stride2_from_within", 0, (0, 3, 1, 0), (1, 1), 2),
        im2col("narrow32_swizzle64", 64, (0, -1, -1, 0), (0, 0), 2),
    ]


KERNELS: tuple[Golden, ...] = (
    *_lanewise_kernels(), *_warp_kernels(), *_matrix_kernels(), *_wgmma_kernels(), *_copy_kernels(),
)  # fmt: skip
