"""Which tiles the convolution kernels may use for a problem. Arithmetic on shapes only, no Triton."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fused_resnet.problem import ConvProblem


class TritonConfig(NamedTuple):
    """A tile of rows (n, p, q) by output channels by reduction, and how its programs are ordered and compiled."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


def configs(problem: ConvProblem) -> list[TritonConfig]:
    """The tiles worth measuring for this problem, large to small. Any of them computes it; no two are alike.

    All fit into 99 KiB of shared memory, so that they run on every GPU from sm_80 on. Eight warps are for pointwise
    convolutions only: for filters, a flattened (r, s, c) loop has been miscompiled with them (pytorch issue 173068).
    """
    if not _step_divides(problem):  # masks and divisions for each element need the registers of larger tiles
        tiles = [(64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3)]
    elif problem.dtype == torch.float32:
        tiles = [(64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)]
    elif is_gemm(problem):
        tiles = [(128, 128, 8, 3), (256, 64, 8, 2), (128, 64, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4)]
    else:
        tiles = [(128, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4), (64, 32, 4, 4)]
    channels = problem.K // problem.groups
    widest = max(16, 1 << (channels - 1).bit_length())
    step = _step(problem)
    return list(dict.fromkeys(TritonConfig(m, min(n, widest), step, 8, *compiler) for m, n, *compiler in tiles))


@functools.lru_cache(maxsize=4096)
def default_config(problem: ConvProblem) -> TritonConfig:
    """The first of `configs` that gives every SM of a large GPU a tile, or else the one with the most tiles.

    A guess from arithmetic, not a measurement.
    """
    candidates = configs(problem)
    for config in candidates:
        if num_programs(problem, config) >= 132:  # the SMs of an H100 or H200
            return config
    return max(candidates, key=lambda config: num_programs(problem, config))


def is_gemm(problem: ConvProblem) -> bool:
    return problem.is_pointwise and problem.groups == 1


def num_programs(problem: ConvProblem, config: TritonConfig) -> int:
    rows = -(-problem.N * problem.P * problem.Q // config.BLOCK_M)
    return rows * -(-(problem.K // problem.groups) // config.BLOCK_N) * problem.groups


def _step(problem: ConvProblem) -> int:
    """BLOCK_K: the largest that divides the channels of a group, 128 bytes at most, or else 32 with masks."""
    for step in (128 // problem.dtype.itemsize, 32, 16):
        if problem.C // problem.groups % step == 0:
            return step
    return 32


def _step_divides(problem: ConvProblem) -> bool:
    return problem.C // problem.groups % _step(problem) == 0
