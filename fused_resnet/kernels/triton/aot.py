"""Compile the kernels without a GPU and read what came out: registers, spills, shared memory, instructions.

    python -m fused_resnet.kernels.triton.aot --arch 80,90,100 [--dtype float16] [--only TEXT] [--all-configs] [--json]

Compiles for the very specialisation a launch of the problem would produce. Needs Triton with its NVIDIA tools, and
TRITON_INTERPRET unset: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional

import torch

from fused_resnet.kernels.triton import add_relu, affine_act, bn_act, max_pool, runtime
from fused_resnet.kernels.triton.chain import shift
from fused_resnet.kernels.triton.chain.shift import ChainConfig
from fused_resnet.kernels.triton.conv.configs import TritonConfig, configs, default_config
from fused_resnet.kernels.triton.conv.launch import launches
from fused_resnet.kernels.triton.runtime import triton
from fused_resnet.operators.operands import BnActOperands, ConvOperands
from fused_resnet.operators.problem import AddReluProblem, BnActProblem, ChainProblem, ConvProblem, MaxPoolProblem

ARCHITECTURES = (80, 90, 100)
# What each kind of instruction looks like, and where. tcgen05 is Blackwell's tensor core, HGMMA Hopper's.
# Those of bytes begin with I, those of e4m3 with Q.
_KINDS = {
    "HMMA": ("sass", r"\bHMMA\."),
    "HGMMA": ("sass", r"\bHGMMA\."),
    "IMMA": ("sass", r"\bIMMA\."),
    "IGMMA": ("sass", r"\bIGMMA\."),
    "QMMA": ("sass", r"\bQMMA\."),
    "QGMMA": ("sass", r"\bQGMMA\."),
    "UTCHMMA": ("sass", r"\bUTC\w*MMA\b"),
    "FFMA": ("sass", r"\bFFMA2?\b"),
    "UTMALDG": ("sass", r"\bUTMALDG\b"),
    "LDGSTS": ("sass", r"\bLDGSTS\."),
    "LDG.128": ("sass", r"\bLDG\.\S*128"),
    "STG.128": ("sass", r"\bSTG\.\S*128"),
    "spill": ("sass", r"\b(STL|LDL)\b"),
    "max.NaN": ("ptx", r"\bmax\.NaN\.f32"),
    "max": ("ptx", r"\bmax\.(?!NaN)\w*\.?f32"),
    "min.NaN": ("ptx", r"\bmin\.NaN\.f32"),
}
# A product and the type of its first operand: a shared-memory descriptor, or a tensor, which lives in registers.
_DOT = re.compile(r"(ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot) .* : ((?:!ttg\.memdesc|tensor)<.*?)(?: \*|, !ttg)")
_DTYPE_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


class LoopFacts(NamedTuple):
    """Read from the TTGIR, before the register allocator: what the loops over the reduction do.

    dots: tensor-core products in loops, and register_dots those of them whose first operand comes from registers.
    tma_copies: of the loops that hold these products. Both count instructions, not how often they run.
    """

    dots: int
    register_dots: int
    tma_copies: int


class Compiled(NamedTuple):
    """One kernel for one architecture. stack_bytes is per thread and 0 where no register spills."""

    kernel: str
    problem: str
    config: Optional[Any]
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    loops: LoopFacts


def compile_launches(
    problem: ConvProblem, arch: int, config: Optional[TritonConfig] = None, *, row_space_output: bool = False
) -> list[Compiled]:
    """The kernels that `conv.launch` would start for fp32 vectors: behind a split reduction there is a second one."""
    config = config or default_config(problem)
    return [
        _compile(each.kernel, each.arguments, each.options, arch, str(problem), config)
        for each in launches(problem, config, torch.float32, row_space_output=row_space_output)
    ]


def compile_add_relu(problem: AddReluProblem, arch: int, *, backward: bool = False) -> Compiled:
    """The kernel `add_relu.launch` or `launch_backward` would start for this problem."""
    tensor = torch.empty(problem.shape, dtype=problem.dtype, device="meta")
    kernel = add_relu._add_relu_backward_kernel if backward else add_relu._add_relu_kernel
    _, arguments, options = add_relu.flat_arguments(problem, tensor, tensor, tensor)
    return _compile(kernel, arguments, options, arch, str(problem), None)


def compile_chain(problem: ChainProblem, arch: int, config: Optional[ChainConfig] = None) -> Compiled:
    """The kernel that `chain.shift.launch` would start for fp32 vectors."""
    config = config or shift.configs(problem, arch)[0]
    (each,) = shift.launches(problem, config, torch.float32)
    return _compile(each.kernel, each.arguments, each.options, arch, str(problem), config)


def compile_max_pool(problem: MaxPoolProblem, arch: int) -> Compiled:
    """The kernel `max_pool.launch` would start for this problem."""
    x = torch.empty(problem.N, problem.C, problem.H, problem.W, dtype=problem.dtype, device="meta")
    bias = torch.empty(problem.C, dtype=problem.dtype, device="meta") if problem.has_bias else None
    _, arguments, options = max_pool.arguments_of(problem, x, bias, x)
    return _compile(max_pool._max_pool_kernel, arguments, options, arch, str(problem), None)


def compile_affine_act(problem: ConvProblem, arch: int, *, in_nchw: bool = False) -> Compiled:
    """The kernel `affine_act.launch` would start behind this convolution, for fp32 vectors."""
    memory_format = torch.contiguous_format if in_nchw else torch.channels_last
    y = torch.empty(problem.output_shape, dtype=problem.dtype, device="meta", memory_format=memory_format)
    vector = torch.empty(problem.K, device="meta")
    residual = y if problem.has_residual else None
    operands = ConvOperands(y, y, *(vector if problem.has_bn else None,) * 4, 1e-5, None, residual)
    _, arguments, options = affine_act.arguments(y, operands, problem.activation)
    return _compile(affine_act._affine_act_kernel, arguments, options, arch, str(problem), None)


def compile_bn_act(problem: BnActProblem, arch: int) -> list[Compiled]:
    """The kernels that the backend triton would start for a training step of this problem, for fp32 vectors."""
    p, memory_format = problem, torch.channels_last if problem.is_nhwc else torch.contiguous_format
    x = torch.empty(p.output_shape, dtype=p.dtype, device="meta", memory_format=memory_format)
    vector = torch.empty(p.C, device="meta")
    mask = torch.empty(p.mask_shape, dtype=torch.uint8, device="meta") if p.has_mask else None
    o = BnActOperands(x, *(vector,) * 4, x if p.has_residual else None)
    made = (
        *bn_act.statistics_launches(p, x, vector, vector),
        *bn_act.forward_launches(p, o, mask, x),
        *bn_act.sums_launches(p, x, o, mask, vector, vector),
        *bn_act.backward_launches(p, x, o, mask, vector, vector, x, x if p.has_residual else None),
    )
    return [_compile(each.kernel, each.arguments, each.options, arch, str(problem), None) for each in made]


def specialise(kernel, arguments: tuple, options: dict) -> tuple[dict, dict, dict, dict]:
    """(signature, constants, attributes, compiler options), as Triton's launcher derives them from a call's values."""
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items() if name in kernel.arg_names}
    compiler_options = {name: value for name, value in options.items() if name not in kernel.arg_names}
    values = {**dict(zip(kernel.arg_names, arguments)), **options}
    attributes: dict[tuple[int, ...], list] = {}
    signature = {
        name: "constexpr" if (position,) in constants else _type_of(values[name], (position,), constants, attributes)
        for position, name in enumerate(kernel.arg_names)
    }
    return signature, constants, attributes, compiler_options


def _type_of(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """Triton's name for the type of an argument. What is constant or a multiple of 16 is noted under the path.

    A NamedTuple's type is the same NamedTuple, of its fields' types. The path of a field is (argument, field).
    """
    if isinstance(value, tuple):
        types = [_type_of(field, (*path, place), constants, attributes) for place, field in enumerate(value)]
        return type(value)(*types)
    if value is None or (type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, runtime.TensorDescriptor):
        return f"tensordesc<{_DTYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return f"*{_DTYPE_NAMES[value.dtype]}"
    return "i32" if value < 2**31 else "i64"


def problems(dtype: torch.dtype) -> Iterator[ConvProblem]:
    """Convolutions that between them use every kernel, path and activation: ResNet-50's, ResNeXt's, CIFAR's."""

    def problem(C, size, K, filter_size=1, stride=1, groups=1, activation="relu", residual=False):
        return ConvProblem(
            32, C, size, size, K, filter_size, filter_size, (stride,) * 2, (filter_size // 2,) * 2, (1, 1), groups,
            activation, True, False, residual, dtype, "cuda",
        )  # fmt: skip

    yield problem(64, 56, 256, residual=True)
    yield problem(1024, 14, 256)
    yield problem(64, 56, 64, 3)
    yield problem(512, 7, 512, 3)
    yield problem(128, 56, 128, 3, stride=2)
    yield problem(256, 56, 512, stride=2, activation="none")
    yield problem(3, 224, 64, 7, stride=2)
    yield problem(128, 56, 128, 3, groups=32)
    yield problem(16, 32, 16, 3, residual=True, activation="silu")
    yield problem(20, 14, 52, activation="relu6")


def main(argv: Optional[list[str]] = None) -> int:
    prog = "python -m fused_resnet.kernels.triton.aot"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities, times ten")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--only", default="", metavar="TEXT", help="only problems whose description contains this")
    parser.add_argument("--all-configs", action="store_true", help="every config of the search space, not the default")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    arguments = parser.parse_args(argv)
    if reason := cannot_compile():
        print(f"aot: {reason}.", file=sys.stderr)
        return 1
    reports = []
    for arch in map(int, arguments.arch.split(",")):
        for report in _compile_all(arch, getattr(torch, arguments.dtype), arguments.only, arguments.all_configs):
            reports.append(report)
            if not arguments.json:
                print(_row(report), flush=True)
    if arguments.json:
        as_dict = [dict(report._asdict(), config=report.config and report.config._asdict()) for report in reports]
        print(json.dumps(as_dict))
    return 0


def cannot_compile() -> Optional[str]:
    """Why nothing can be compiled in this process, or None."""
    if runtime.IMPORT_ERROR is not None:
        return f"Triton cannot be imported: {runtime.IMPORT_ERROR}"
    if runtime.INTERPRETED:
        return "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it"
    return None


def _compile_all(arch: int, dtype: torch.dtype, only: str, all_configs: bool) -> Iterator[Compiled]:
    for problem in problems(dtype):
        if only in str(problem):
            for config in configs(problem, arch) if all_configs else [None]:
                yield from compile_launches(problem, arch, config)
            if problem.has_residual or problem.activation == "relu6":  # all kinds of arithmetic, and of widths
                yield from (compile_affine_act(problem, arch, in_nchw=in_nchw) for in_nchw in (False, True))
    addition = AddReluProblem((32, 256, 56, 56), True, dtype, "cuda")
    for backward in (False, True):
        if only in str(addition):
            yield compile_add_relu(addition, arch, backward=backward)
    norm = BnActProblem(32, 256, 56, 56, "relu", True, True, True, dtype, "cuda")
    if only in str(norm):
        yield from compile_bn_act(norm, arch)
    stem = MaxPoolProblem(32, 64, 112, 112, 3, 3, (2, 2), (1, 1), "relu", True, dtype, "cuda")
    if only in str(stem):
        yield compile_max_pool(stem, arch)


def _compile(kernel, arguments: tuple, options: dict, arch: int, problem: str, config: Optional[Any]) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, compiler_options = specialise(kernel, arguments, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=compiler_options)
    dump = _dump(compiled.asm["cubin"], "--dump-resource-usage", "-sass")
    text = {"sass": dump, "ptx": compiled.asm["ptx"]}
    counts = {kind: len(re.findall(pattern, text[where])) for kind, (where, pattern) in _KINDS.items()}
    return Compiled(
        kernel.__name__, problem, config, arch,
        registers=int(re.findall(r"REG:(\d+)", dump)[0]),
        stack_bytes=int(re.findall(r"STACK:(\d+)", dump)[0]),
        shared_bytes=compiled.metadata.shared,
        instructions={kind: count for kind, count in counts.items() if count},
        loops=loop_facts(compiled.asm["ttgir"]),
    )  # fmt: skip


def loop_facts(ttgir: str) -> LoopFacts:
    """Count in the innermost loop around each line, whatever blocks stand between."""
    loops: dict[int, list[str]] = {}  # lines of loops that have been opened, by the number of the loop
    blocks: list[Optional[int]] = []  # for each open brace, the loop it belongs to
    for line in ttgir.splitlines():
        if blocks and blocks[-1] is not None:
            loops[blocks[-1]].append(line)
        is_loop = "scf.for" in line or "scf.while" in line
        change = line.count("{") - line.count("}")
        del blocks[len(blocks) + min(change, 0) :]
        if is_loop:
            loops[len(loops)] = []
        blocks += [len(loops) - 1 if is_loop else blocks[-1] if blocks else None] * max(change, 0)
    dots = {number: [dot for line in lines if (dot := _DOT.search(line))] for number, lines in loops.items()}
    return LoopFacts(
        dots=sum(len(found) for found in dots.values()),
        register_dots=sum("ttg.dot_op" in dot[2] for found in dots.values() for dot in found),
        tma_copies=sum(
            "async_tma_copy_global_to_local" in line for number in loops if dots[number] for line in loops[number]
        ),
    )


def _dump(cubin: bytes, *options: str) -> str:
    """What the cuobjdump inside the Triton wheel says about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def _row(report: Compiled) -> str:
    config = "x".join(map(str, report.config)) if report.config else "-"
    counts = " ".join(f"{kind}:{count}" for kind, count in report.instructions.items())
    return (
        f"sm_{report.arch:<4}{report.problem:<62}{config:<22}{report.registers:>4} regs "
        f"{report.stack_bytes:>5} B stack {report.shared_bytes:>7} B shared  {counts}"
    )


if __name__ == "__main__":
    sys.exit(main())
