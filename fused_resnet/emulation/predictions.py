"""What the timing model expects of our convolution kernels: a few blocks are emulated, and stand for all."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from fused_resnet.choosing.cases import folded_operands, random_operands
from fused_resnet.emulation import cuda_launches, launches
from fused_resnet.emulation.interface import PtxConvLaunch
from fused_resnet.emulation.kernel import Kernel, Outcome
from fused_resnet.emulation.library import why_missing
from fused_resnet.emulation.timing_model import Gpu, Prediction, Shape, predict
from fused_resnet.kernels.triton import aot
from fused_resnet.kernels.triton.conv import cost
from fused_resnet.kernels.triton.conv import launch as conv
from fused_resnet.kernels.triton.conv.configs import TritonConfig, default_config
from fused_resnet.kernels.triton.conv.epilogue import Epilogue
from fused_resnet.kernels.triton.runtime import triton
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem

SAMPLED_BLOCKS = 3


class Expected(NamedTuple):
    """A launch: the kernel, or the two where the reduction is split. us: of all; bound: of the first."""

    us: float
    bound: str
    kernels: tuple[Prediction, ...]


def why_not() -> Optional[str]:
    """Why nothing can be predicted here, or None."""
    return why_missing() or aot.cannot_compile()


def ways(problem: ConvProblem, gpu: Gpu) -> Iterator[tuple[str, Union[Expected, str]]]:
    """(way, what to expect or why it cannot run): Triton's default and likeliest config, and each CUDA tile."""
    tiles = cuda_launches.tiles_for(problem, gpu.arch)
    configs = {default_config(problem): "default"}
    configs.setdefault(cost.likely_config(problem, gpu.arch, gpu.num_sms), "likely")
    for config, name in configs.items():
        yield f"triton {name}, {described(config)}", of_triton(problem, config, gpu)
    for tile in tiles:
        name = f"cuda tile {tile}"
        try:
            yield name, cuda_launches.why_not() or of_cuda(problem, tile, gpu)
        except ValueError as refusal:
            yield name, str(refusal)


def described(config: TritonConfig) -> str:
    c = config
    more = (f", {c.split_k} parts" if c.split_k > 1 else "") + (", persistent" if c.persistent else "")
    return f"{c.form} {c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}, {c.num_warps} warps, {c.num_stages} stages{more}"


def of_triton(problem: ConvProblem, config: TritonConfig, gpu: Gpu, blocks: int = SAMPLED_BLOCKS) -> Expected:
    """The launch of a Triton config, compiled for the GPU. blocks: of each kernel, so many are emulated."""
    o = _operands(problem)
    out = torch.empty(problem.output_shape, dtype=problem.dtype).contiguous(memory_format=torch.channels_last)
    found: list[Prediction] = []
    for each in conv.prepare(problem, o, out, config):
        made = launches.compiled(each, gpu.arch)
        epilogue = next(value for value in each.arguments if isinstance(value, Epilogue))
        is_first = not found
        written = out if epilogue.partial is None or not is_first else epilogue.partial
        programs = min(each.num_programs, gpu.num_sms) if is_first and config.persistent else each.num_programs
        kernel, sample = Kernel(made.text), _sample(programs, blocks)
        outcome = kernel.run(
            programs, made.threads, launches.arguments(each, made), shared_bytes=made.shared_bytes, writable=[written],
            races=0, blocks=sample,
        )  # fmt: skip
        registers = registers_of(made.text, kernel.name, gpu.arch, _triton_ptxas())
        shape = Shape(programs, made.threads, registers, kernel.entry.static_shared_bytes + made.shared_bytes)
        found.append(_predicted(gpu, outcome, len(sample), shape, problem, is_first))
    return _all(found)


def of_cuda(problem: ConvProblem, tile: int, gpu: Gpu, blocks: int = SAMPLED_BLOCKS) -> Expected:
    """The launch of one of csrc/cuda's tiles, compiled by nvcc for the GPU; the reduction in one part."""
    o = _operands(problem)
    out = torch.empty(problem.output_shape, dtype=problem.dtype).contiguous(memory_format=torch.channels_last)
    launch = cuda_launches.prepare(problem, o, out, None, tile, 1, gpu.arch, gpu.num_sms)
    text, kernel = _text_of(problem, tile, launch, gpu)
    sample = _sample(launch.blocks, blocks)
    run = functools.partial(cuda_launches.conv_bn_act, out=out, text=text, num_sms=gpu.num_sms)
    _, outcomes = run(problem, o, gpu.arch, tile, races=0, blocks=sample)
    compiler = cuda_launches.nvcc()
    assert compiler is not None
    registers = registers_of(text, kernel, gpu.arch, Path(compiler).parent / "ptxas")
    shape = Shape(launch.blocks, launch.threads, registers, launch.shared_bytes)
    ran = launch.cluster * len({block // launch.cluster for block in sample})  # a cluster runs as a whole
    return _all([_predicted(gpu, outcomes[0], ran, shape, problem, True)])


def _text_of(problem: ConvProblem, tile: int, launch: PtxConvLaunch, gpu: Gpu) -> tuple[str, str]:
    """The PTX of a tile's kernel, and a part of its name. Compiled together: most of nvcc's time goes into headers."""
    if tile in cuda_launches.SM90_TILES:
        text = cuda_launches.sm90_conv_text(problem.dtype, cuda_launches.SM90_TILES)
        return text, f"Li{tile - cuda_launches.FIRST_SM90_TILE}E"
    if tile in cuda_launches.GROUPED_TILES:
        text = cuda_launches.grouped_conv_text(problem.dtype, gpu.arch, ((tile, launch.width),))
        return text, f"Li{launch.width}E"
    copied = launch.copy_bytes
    tiles = range(cuda_launches.NUM_TILES) if copied == 16 else (tile,)
    text = cuda_launches.conv_text(problem.dtype, gpu.arch, tuple((each, copied) for each in tiles))
    return text, f"Li{tile}ELi{copied}E"


def _all(found: Sequence[Prediction]) -> Expected:
    return Expected(sum(one.us for one in found), found[0].bound, tuple(found))


def _predicted(
    gpu: Gpu, outcome: Outcome, sampled: int, shape: Shape, problem: ConvProblem, is_first: bool
) -> Prediction:
    """Partial sums stay in L2, and the output is counted once: with the first kernel, as all that memory sees."""
    if outcome.faulted:
        raise RuntimeError(f"emulation: {outcome.reports[0]}")
    memory_bytes = problem.bytes_moved if is_first else 0
    element_bytes = problem.dtype.itemsize
    return predict(gpu, outcome.counts, sampled, shape, element_bytes=element_bytes, memory_bytes=memory_bytes)


def _sample(blocks: int, most: int) -> list[int]:
    """Evenly spread, the first among them: a persistent kernel's first program has the most tiles."""
    most = min(blocks, most)
    return [index * blocks // most for index in range(most)]


@functools.lru_cache(maxsize=4)
def _operands(problem: ConvProblem) -> ConvOperands:
    """On the CPU, as a plan gives them to a kernel."""
    live = random_operands(problem._replace(device="cpu"), "cpu")
    folded = live if problem.has_bn else folded_operands(live, has_bias=problem.has_bias)
    return folded._replace(bias=folded.bias.float() if isinstance(folded.bias, Tensor) else None)


def _triton_ptxas() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def registers_of(text: str, kernel: str, arch: int, ptxas: Path) -> int:
    """What ptxas gives a thread of the kernel whose name has this part. text: PTX."""
    return next(count for name, count in _registers(text, arch, ptxas).items() if kernel in name)


@functools.lru_cache(maxsize=None)
def _registers(text: str, arch: int, ptxas: Path) -> dict[str, int]:
    target = next(iter(re.findall(r"^\.target\s+(sm_\w+)", text, re.MULTILINE)), f"sm_{arch}")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [str(ptxas), "-v", f"--gpu-name={target}", "-o", "/dev/null", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", said, re.DOTALL)
    return {name: int(count) for name, count in found}
