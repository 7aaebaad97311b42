"""Launches of Triton kernels, compiled by Triton's own compiler and run by the emulator on CPU tensors."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Iterable, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fused_resnet.emulation.kernel import CAPABILITIES, Kernel, Outcome
from fused_resnet.emulation.tensor_map import SWIZZLES, TensorMap
from fused_resnet.kernels.triton import add_relu, affine_act, aot, bn_act, max_pool
from fused_resnet.kernels.triton.chain import shift
from fused_resnet.kernels.triton.chain.shift import ChainConfig
from fused_resnet.kernels.triton.conv import launch as conv
from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.kernels.triton.conv.epilogue import Epilogue, Int8Epilogue
from fused_resnet.kernels.triton.conv.launch import Launch, Operands
from fused_resnet.kernels.triton.runtime import TensorDescriptor, triton
from fused_resnet.operators.operands import ChainOperands, ConvOperands
from fused_resnet.operators.problem import AddReluProblem, ChainProblem, ConvProblem, MaxPoolProblem

# The last parameters of every kernel of Triton's: memory where it may make tensor maps, and its profiler's
_SCRATCH = 2
_SCRATCH_ALIGNMENT = 128


class Compiled(NamedTuple):
    """A kernel as Triton compiled it: its PTX, how it is started, and what its tensor maps are to be."""

    text: str
    threads: int
    shared_bytes: int
    signature: dict[str, Any]  # parameter -> type, as Triton names them
    maps: list[dict[str, Any]]
    scratch_bytes: int = 0  # of a program


def compiled(launch: Launch, arch: int) -> Compiled:
    """arch: the compute capability times ten. Raises RuntimeError where this process cannot compile.

    ValueError where the launch is not one of a kernel's own parameters and of options that the compiler knows.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _check(launch, arch)
    if reason := aot.cannot_compile():
        raise RuntimeError(f"emulation: {reason}.")
    signature, constants, attributes, options = aot.specialise(launch.kernel, launch.arguments, launch.options)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with _without_ptxas():
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    maps = [dict(each) for each in getattr(made.metadata, "tensordesc_meta", None) or []]
    scratch_bytes = getattr(made.metadata, "global_scratch_size", 0)
    threads = 32 * made.metadata.num_warps
    return Compiled(made.asm["ptx"], threads, made.metadata.shared, signature, maps, scratch_bytes)


def _check(launch: Launch, arch: int) -> None:
    from triton.backends.nvidia.compiler import CUDAOptions

    if arch not in CAPABILITIES:
        known = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"emulation: {arch!r} is no compute capability times ten; known are {known}")
    if isinstance(launch.kernel, (triton.runtime.Autotuner, triton.runtime.Heuristics)):
        raise ValueError("emulation: pass the autotuned kernel's .fn, with the values of a config among the options")
    name, parameters = launch.kernel.__name__, launch.kernel.arg_names
    if callable(launch.num_programs):
        raise ValueError(f"{name}: pass the grid as numbers, not as a function of the options")
    options = [*parameters, *CUDAOptions.__dataclass_fields__]
    if unknown := [option for option in launch.options if option not in options]:
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; known are {', '.join(options)}")
    if len(launch.arguments) > len(parameters):
        raise ValueError(f"{name}: {len(launch.arguments)} arguments for {', '.join(parameters)}")
    if missing := [each for each in parameters[len(launch.arguments) :] if each not in launch.options]:
        raise ValueError(f"{name}: no value for {', '.join(missing)}")


@contextlib.contextmanager
def _without_ptxas() -> Iterator[None]:
    """Nobody runs the machine code, which takes a third of the time. What is cached has a key of its own."""

    def hook(*arguments: Any) -> Optional[tuple[str, str]]:
        if not arguments:
            return "without ptxas", "without ptxas"
        arguments[1]["cubin"] = lambda source, metadata: b""
        return None

    runtime = triton.knobs.runtime
    if not hasattr(runtime, "add_stages_inspection_hook"):
        yield
        return
    before, runtime.add_stages_inspection_hook = runtime.add_stages_inspection_hook, hook
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook = before


def run(
    launch: Launch, arch: int, writable: Sequence[Tensor], *, num_programs: Optional[int] = None, text: str = "", **how
) -> Outcome:
    """Compile and run a launch. num_programs: instead of the launch's own, for a persistent kernel.

    arch: the compute capability times ten. text: instead of the PTX that the compiler makes, which it was made from.
    how: as `Kernel.run` takes it.
    """
    made = compiled(launch, arch)
    kernel = Kernel(text or made.text)
    grid, values = num_programs or launch.num_programs, arguments(launch, made)
    if made.scratch_bytes:
        values[-_SCRATCH] = _scratch(made.scratch_bytes * math.prod([grid] if isinstance(grid, int) else grid))
        writable = [*writable, values[-_SCRATCH]]
    memory = {**_named_arrays(launch), **(how.pop("memory", None) or {})}  # what reports call them
    return kernel.run(
        grid, made.threads, values, shared_bytes=made.shared_bytes, writable=writable, memory=memory, **how
    )


def _scratch(size: int) -> Tensor:
    room = torch.zeros(size + _SCRATCH_ALIGNMENT, dtype=torch.uint8)
    begin = -room.data_ptr() % _SCRATCH_ALIGNMENT
    return room[begin : begin + size]


def arguments(launch: Launch, made: Compiled) -> list[Any]:
    """One for each parameter of the PTX. What Triton took for a constant is none."""
    values = {**dict(zip(launch.kernel.arg_names, launch.arguments)), **launch.options}
    maps, found = iter(made.maps), []
    for kind, value in zip(_flat(made.signature.values()), _flat(values.get(name) for name in made.signature)):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):  # the map, and then the sizes and strides that it was made from
            found += [tensor_map(value, next(maps)), *value.shape, *value.strides]
        else:
            found.append(value)
    return [*found, *[None] * _SCRATCH]


def _named_arrays(launch: Launch) -> dict[str, Tensor]:
    """The tensors by the names of the kernel's parameters, or of the fields where one is a NamedTuple."""
    named = {}
    for name, value in zip(launch.kernel.arg_names, launch.arguments):
        fields = getattr(value, "_fields", None)
        for field, part in zip(fields or [name], value if fields else [value]):
            part = part.base if isinstance(part, TensorDescriptor) else part
            if isinstance(part, Tensor):
                named[f"{name}.{field}" if fields else name] = part
    return named


def tensor_map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    """What Triton's launcher encodes for a descriptor: dimensions innermost first, strides in bytes."""
    size = meta["elem_size"]
    return TensorMap(
        descriptor.base, list(descriptor.shape)[::-1], [stride * size for stride in descriptor.strides[:-1]][::-1],
        list(meta["block_size"])[::-1], swizzle=SWIZZLES[meta["swizzle"]],
    )  # fmt: skip


def _flat(values) -> list[Any]:
    """With the fields of a NamedTuple in its place, as the kernel's parameters lie."""
    return [field for value in values for field in (value if isinstance(value, tuple) else [value])]


# ------------------------------------------------------------------------------------------------- the kernels we have


def run_conv(
    problem: ConvProblem, operands: Operands, out: Tensor, arch: int, config: TritonConfig, *,
    num_programs: int = 2, **how,
) -> list[Outcome]:  # fmt: skip
    """`conv.launch.launch` on the emulator; an Outcome for each kernel. The operands and out are as it wants them.

    num_programs: of a persistent kernel, few, so that each walks several tiles.
    """
    outcomes: list[Outcome] = []
    for each in conv.prepare(problem, operands, out, config):
        epilogue = next(value for value in each.arguments if isinstance(value, (Epilogue, Int8Epilogue)))
        is_first = not outcomes
        written = out if epilogue.partial is None or not is_first else epilogue.partial
        if is_first and epilogue.partial is not None:
            epilogue.partial.fill_(torch.nan if epilogue.partial.is_floating_point() else -(2**31))
        programs = num_programs if is_first and config.persistent else None
        outcomes.append(run(each, arch, [written], num_programs=programs, **how))
        if outcomes[-1].faulted:
            break
    return outcomes


def conv_bn_act(
    problem: ConvProblem, operands: Operands, arch: int, config: TritonConfig, *, out: Optional[Tensor] = None, **how
) -> tuple[Tensor, list[Outcome]]:
    """The output and the outcomes. out: by default new memory of NaN; of bytes, of values that all have to change."""
    p = problem
    if out is None:
        out = torch.full(p.output_shape, torch.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    return out, run_conv(p, operands, out, arch, config, **how)


def run_chain(
    problem: ChainProblem, operands: ChainOperands, arch: int, config: ChainConfig, **how
) -> tuple[Tensor, Optional[Tensor], Outcome]:
    """`shift.launch` into new memory of NaN: y and reduced, in row space as x and the residual are."""
    p, M = problem, row_space.num_rows(problem.N, problem.H, problem.W)
    y = torch.full((M, p.K), torch.nan, dtype=p.dtype)
    reduced = torch.full((M, p.L), torch.nan, dtype=p.dtype) if p.L else None
    written = [y] if reduced is None else [y, reduced]
    return y, reduced, run(shift.prepare(p, operands, y, reduced, config), arch, written, **how)


def run_add_relu(
    problem: AddReluProblem, first: Tensor, second: Tensor, out: Tensor, arch: int, *, backward: bool = False, **how
) -> Outcome:
    """`add_relu.launch`, or `launch_backward`."""
    kernel = add_relu._add_relu_backward_kernel if backward else add_relu._add_relu_kernel
    return run(Launch(kernel, *add_relu.flat_arguments(problem, first, second, out)), arch, [out], **how)


def run_max_pool(problem: MaxPoolProblem, x: Tensor, bias: Optional[Tensor], out: Tensor, arch: int, **how) -> Outcome:
    """`max_pool.launch`."""
    launch = Launch(max_pool._max_pool_kernel, *max_pool.arguments_of(problem, x, bias, out))
    return run(launch, arch, [out], **how)


def run_affine_act(y: Tensor, operands: ConvOperands, activation: str, arch: int, **how) -> Outcome:
    """`affine_act.launch`; y is changed in place."""
    launch = Launch(affine_act._affine_act_kernel, *affine_act.arguments(y, operands, activation))
    return run(launch, arch, [y], **how)


def run_bn_act(launches: Iterable[bn_act.Launch], arch: int, **how) -> list[Outcome]:
    """Launches of `bn_act`, in order. What they write is NaN before, or ones."""
    outcomes: list[Outcome] = []
    for each in launches:
        for tensor in each.writes:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
        outcomes.append(run(Launch(*each[:4]), arch, each.writes, **how))
        if outcomes[-1].faulted:
            break
    return outcomes
