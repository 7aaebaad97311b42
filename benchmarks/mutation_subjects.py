"""The kernels that `benchmarks.mutations` breaks, and the problems on which a mutant has to show.

Each kernel has a few problems of several tiles: reductions longer than its ring of stages, in numbers of steps that end
in different stages. They run in every way of landing and turns. Beside them there is a sweep of small ones, each in one
way. It leaves every remainder of rows and of channels in a tile, so that each mask decides something.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch

from benchmarks import mutants
from fused_resnet.emulation import cuda_launches, launches
from fused_resnet.emulation.kernel import Kernel, Outcome
from fused_resnet.emulation.operands import operands_of
from fused_resnet.kernels.triton.conv import launch as conv
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.operators import reference
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS, ConvProblem, parsed_problem

Run = Callable[[str, dict[str, Any]], tuple[bool, list[str]]]


class Subject(NamedTuple):
    """A kernel to break.

    runs, sweep: of each problem (PTX, how) -> whether the output is right, and reports. ptx: what becomes of a text.
    """

    name: str
    arch: int
    text: str
    runs: list[Run]
    sweep: list[Run]
    mutants: Callable[[str], Iterator[mutants.Mutant]]
    ptx: Callable[[str], str]


# arch, problems, config. All problems of a kernel share one text, so their channels are alike to Triton: multiples of
# 16, or none. The filter's size is no constant in "pointer", and 64 channels a tap are in "rows_tma".
TRITON: tuple[tuple[int, tuple[str, ...], tuple], ...] = (
    (
        80,
        ("1x64x9x9 -> 80, 3x3 p1 float16 bias+add relu", "1x128x16x5 -> 128, 3x3 p1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "pointer"),
    ),
    (
        90,
        ("1x64x9x9 -> 80, 3x3 p1 float16 bias+add relu", "1x128x16x5 -> 128, 3x3 p1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "pointer"),
    ),
    (
        90,
        ("2x320x7x9 -> 72, 1x1 float16 bias+add relu", "1x448x5x13 -> 136, 1x1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "gemm_tma"),
    ),
    (
        90,
        ("3x64x9x9 -> 72, 3x3 p1 float16 bias relu", "2x64x13x5 -> 200, 3x3 p1 float16 bias relu"),
        (128, 64, 64, 8, 4, 4, "rows_tma", 1, True),
    ),
    (
        90,
        ("2x128x9x7 -> 72, 3x3 p1 float16 bias+add relu", "3x128x5x7 -> 136, 3x3 p1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "lines_tma"),
    ),
)
# (problem, parts of the reduction): 9, 7 and 5 steps in a ring of three stages, or of two
_CUDA_PROBLEMS = (
    ("1x64x9x9 -> 64, 3x3 p1 float16 bias+add relu", 1),
    ("2x448x7x9 -> 72, 1x1 float16 bn+add silu", 1),
    ("1x320x5x5 -> 100, 1x1 s2 float16 bias none", 2),
    ("1x64x8x8 -> 56, 1x1 float16 bn+bias+add relu6", 1),
    ("2x448x7x9 -> 72, 1x1 float16 bn+add relu", 3),
)
_SINGLE_PROBLEMS = (
    ("1x5x9x11 -> 40, 3x3 s2 p1 float16 bn+bias+add silu", 1),
    ("2x77x7x5 -> 33, 3x3 p1 float16 bias+add relu", 2),
)
# arch, tile, bytes of a copy
CUDA = ((80, 1, 16), (80, 4, 16))
# header, tile, bytes of a copy: tile 3 compiles fastest, and tile 1 is laid out as the others are
SOURCES = (
    ("cuda/sm80/conv_bn_act.cuh", 3, 16),
    ("cuda/sm80/conv_bn_act.cuh", 3, 0),
    ("cuda/sm80/tile_layout.h", 1, 16),
    ("cuda/epilogue.cuh", 3, 16),
    ("cuda/conv_shape.h", 3, 16),
)


def of_names(names: list[str]) -> Iterator[Subject]:
    if "triton" in names:
        yield from (triton_subject(*one) for one in TRITON)
    if "cuda" in names:
        yield from (cuda_subject(*one) for one in CUDA)
    if "source" in names:
        yield from (source_subject(*one) for one in SOURCES)


@functools.lru_cache(maxsize=4)
def _kernel(text: str) -> Kernel:
    return Kernel(text)


def judge(p: ConvProblem, o: ConvOperands) -> Callable[[torch.Tensor, list[Outcome]], tuple[bool, list[str]]]:
    expected = reference.conv_bn_act(p, o)
    bound = reference.error_bound(p, o, expected=expected)

    def judged(out: torch.Tensor, outcomes: list[Outcome]) -> tuple[bool, list[str]]:
        is_right = not any(one.faulted for one in outcomes) and bool(((out.double() - expected).abs() <= bound).all())
        return is_right, [report for one in outcomes for report in one.reports]

    return judged


# -------------------------------------------------------------------------------------------------------------- Triton


def triton_subject(arch: int, problems: tuple[str, ...], config: tuple) -> Subject:
    """Raises ValueError where the problems do not share one text. Of the sweep, those stay that do."""
    found = [_triton_run(arch, parsed_problem(problem, "cuda"), config) for problem in problems]
    if len({text for _, text in found}) != 1:
        raise ValueError(f"mutations: the compiler makes other kernels of each of {problems}.")
    text, sizes = found[0][1], _SWEPT[config[6]]
    swept = (_triton_run(arch, p, config) for p in sizes(parsed_problem(problems[0], "cuda")))
    sweep = [run for run, other in swept if other == text]
    return Subject(f"Triton {config[6]}, sm_{arch}", arch, text, [run for run, _ in found], sweep,
                   mutants.mutants_of_ptx, _same)  # fmt: skip


def _same(text: str) -> str:
    return text


def _triton_run(arch: int, p: ConvProblem, config: tuple) -> tuple[Run, str]:
    o = operands_of(p)
    out = torch.full(p.output_shape, torch.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    (launch,) = conv.prepare(p, o, out, TritonConfig(*config))
    made = launches.compiled(launch, arch)
    given, judged = launches.arguments(launch, made), judge(p, o)
    programs = 2 if len(config) > 8 and config[8] else launch.num_programs

    def run(text: str, how: dict[str, Any]) -> tuple[bool, list[str]]:
        out.fill_(torch.nan)
        outcome = _kernel(text).run(programs, made.threads, given, shared_bytes=made.shared_bytes, writable=[out],
                                    **how)  # fmt: skip
        return judged(out, [outcome])

    return run, _without_debug_information(made.text)


def _without_debug_information(text: str) -> str:
    """The kernel alone. The rest names the folder that Triton's cache was filled from."""
    lines = text[: text.find("\n\t.file")].split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith(".loc")) + "\n"


def _pixels(remainder: int, modulus: int, least: int) -> tuple[int, int]:
    """Two sides, both of them at least so long, whose product leaves this remainder."""
    for product in range(remainder, 8 * modulus, modulus):
        for side in range(least, int(product**0.5) + 1):
            if product % side == 0:
                return side, product // side
    raise ValueError(f"mutations: no map of {remainder} pixels modulo {modulus}.")


def _no_multiple_of_16(number: int) -> int:
    return number if number % 16 else number + 1


def _swept_pointer(first: ConvProblem) -> Iterator[ConvProblem]:
    """Filters that are small or not square meet the padding elsewhere: the outputs are more than the inputs."""
    filters = itertools.cycle(((3, 3), (1, 2), (2, 2), (1, 3), (2, 3)))
    for i, (R, S) in zip(range(64), filters):
        P, Q = _pixels(i, 64, 4)
        yield first._replace(H=P + R - 3, W=Q + S - 3, R=R, S=S, K=16 * (1 + i % 7))


def _swept_gemm(first: ConvProblem) -> Iterator[ConvProblem]:
    for i in range(64):
        H, W = _pixels(_no_multiple_of_16(i), 64, 2)
        yield first._replace(N=1, H=H, W=W, C=64 * (1 + i % 7), K=_no_multiple_of_16(64 + i))


def _swept_rows(first: ConvProblem) -> Iterator[ConvProblem]:
    """The rows are those of maps with a halo: (H + 1) * (W + 1)."""
    for i in range(128):
        H, W = _pixels(_no_multiple_of_16(i), 128, 3)
        yield first._replace(N=1, H=H - 1, W=W - 1, K=_no_multiple_of_16(64 + i % 64))


def _swept_lines(first: ConvProblem) -> Iterator[ConvProblem]:
    """A row is a line."""
    return (first._replace(N=1, H=i + 2, W=2 + i % 2, K=_no_multiple_of_16(i + 2)) for i in range(64))


_SWEPT = {"pointer": _swept_pointer, "gemm_tma": _swept_gemm, "rows_tma": _swept_rows, "lines_tma": _swept_lines}


# ---------------------------------------------------------------------------------------------------------------- CUDA


def cuda_subject(arch: int, tile: int, copied: int) -> Subject:
    text = cuda_launches.conv_text(torch.float16, arch, ((tile, copied),))
    runs, sweep = _cuda_runs(arch, tile, copied)
    return Subject(f"CUDA tile {tile}, sm_{arch}", arch, text, runs, sweep, mutants.mutants_of_ptx, _same)


def source_subject(header: str, tile: int, copied: int) -> Subject:
    """The mutant is a header of csrc's; nvcc compiles the kernel with it in the place of the stock one."""
    made: dict[str, str] = {}

    def ptx(text: str) -> str:
        if text not in made:
            made[text] = _compiled_with(header, text, tile, copied)
        return made[text]

    runs, sweep = _cuda_runs(80, tile, copied)
    name = f"{header}, tile {tile}" + ("" if copied == 16 else ", single elements")
    text = (cuda_launches.CSRC / header).read_text()
    return Subject(name, 80, text, runs, sweep, mutants.mutants_of_source, ptx)


def _compiled_with(header: str, text: str, tile: int, copied: int) -> str:
    """What nvcc makes of the fp16 kernel with this text for the header. Raises RuntimeError where it does not."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        for part in ("common", "cuda"):
            shutil.copytree(cuda_launches.CSRC / part, Path(folder) / part)
        (Path(folder) / header).write_text(text)
        return cuda_launches.conv_text(torch.float16, 80, ((tile, copied),), Path(folder))


def _cuda_runs(arch: int, tile: int, copied: int) -> tuple[list[Run], list[Run]]:
    given = _CUDA_PROBLEMS if copied else _SINGLE_PROBLEMS
    runs = [_cuda_run(arch, parsed_problem(problem, "cuda"), tile, splits) for problem, splits in given]
    return runs, [_cuda_run(arch, p, tile, splits) for p, splits in _swept_cuda(bool(copied))]


def _cuda_run(arch: int, p: ConvProblem, tile: int, splits: int) -> Run:
    o = operands_of(p)
    judged = judge(p, o)

    def run(text: str, how: dict[str, Any]) -> tuple[bool, list[str]]:
        return judged(*cuda_launches.conv_bn_act(p, o, arch, tile, splits, text=text, **how))

    return run


def _swept_cuda(is_aligned: bool) -> Iterator[tuple[ConvProblem, int]]:
    """Rows, channels and reductions in every remainder, each of the channels' with every activation."""
    first = parsed_problem("1x8x4x4 -> 8, 1x1 float16 bias relu", "cuda")
    windows = itertools.cycle((
        dict(R=1, S=1), dict(R=3, S=3, padding=(1, 1)), dict(R=1, S=1, stride=(2, 2)), dict(R=2, S=2, padding=(1, 1)),
        dict(R=3, S=3, padding=(1, 1), stride=(2, 2)), dict(R=1, S=3), dict(R=3, S=2, dilation=(1, 2), padding=(2, 1)),
    ))  # fmt: skip
    channels = itertools.cycle((8, 24, 40, 64, 72, 136, 200, 16) if is_aligned else (1, 2, 3, 5, 9, 13, 33, 70, 7, 6))
    for i, window, C in zip(range(64), windows, channels):
        groups = 2 if i % 5 == 4 else 1
        yield first._replace(
            N=1 + i % 3, H=3 + i % 6, W=4 + i % 9, C=C * groups, K=groups * (1 + i), groups=groups,
            activation=ACTIVATIONS[i // 8 % 4], has_bn=i // 2 % 2 == 0, has_bias=i % 2 == 0,
            has_residual=(i + i // 32) % 2 == 0, **window,
        ), 1 + i % 3  # fmt: skip
