"""How long a config should take, from arithmetic: what cannot win is not measured."""

from __future__ import annotations

from typing import Callable

from fused_resnet.kernels.triton.conv.configs import (
    NUM_SMS,
    SAFE_WARPS,
    TritonConfig,
    configs,
    num_rows,
    num_tiles,
    rows_of,
    shared_bytes,
)
from fused_resnet.operators.problem import ConvProblem

# Of an H200: 4.3 TB/s and 790 TFLOP/s (fp16) have been measured on such a card; of its L2, 5.5 to 7 TB/s are said.
_HBM, _L2, _TENSOR = 4.3e6, 5.5e6, {2: 790e6, 4: 395e6}  # bytes, bytes and flops a microsecond
# Guesses until a GPU has been asked: the share of the peaks that a K loop reaches, a step's latency when nothing hides
# it, and what a kernel and a tile cost besides their work.
_EFFICIENCY = {"pointer": 0.6, "tma": 0.8}
_LATENCY_US, _LAUNCH_US, _TILE_US = 0.8, 2.0, 1.0
_HOPELESS = 3.0  # times the least estimate: above it a config is not measured
_MOST_CONFIGS = 12  # that are measured


def estimated_us(problem: ConvProblem, config: TritonConfig, arch: int = 90, num_sms: int = NUM_SMS) -> float:
    """What a launch should take by arithmetic, for ranking configs and dropping the hopeless. Not a measurement.

    The longest of: the least bytes from memory; per SM, its tiles' bytes from L2, products, or latencies. A second
    kernel and the partial sums' way through memory where the reduction is split.
    """
    p, c, element = problem, config, problem.dtype.itemsize
    tiles = num_tiles(p, c)
    per_sm = -(-tiles // num_sms)
    depth = -(-p.reduction // (c.BLOCK_K * c.split_k)) * c.BLOCK_K
    steps = depth // c.BLOCK_K
    outputs = c.BLOCK_M * c.BLOCK_N * (4 if c.split_k > 1 else element * (2 if p.has_residual else 1))
    efficiency = _EFFICIENCY["pointer" if c.form == "pointer" else "tma"]
    from_l2 = ((c.BLOCK_M + c.BLOCK_N) * depth * element / efficiency + outputs) * num_sms / _L2
    products = 2 * c.BLOCK_M * c.BLOCK_N * depth * num_sms / (_TENSOR.get(element, 395e6) * efficiency)
    # several programs share an SM where their tiles are small, and hide each other's latency
    resident = max(1, min(227 * 1024 // shared_bytes(p, c), 2048 // (32 * c.num_warps), per_sm))
    latency = (steps * _LATENCY_US / max(1, c.num_stages - 1) + _TILE_US) / resident
    bytes_moved = p.bytes_moved * (num_rows(p, rows_of(p, c.form)) / (p.N * p.P * p.Q) if c.form == "rows_tma" else 1)
    partial = 2 * 4 * c.split_k * p.N * p.P * p.Q * p.K / _L2 + _LAUNCH_US if c.split_k > 1 else 0.0
    return max(bytes_moved / _HBM, per_sm * max(from_l2, products, latency)) + partial + _LAUNCH_US


def promising(problem: ConvProblem, arch: int, num_sms: int = NUM_SMS) -> list[TritonConfig]:
    """The configs that may win on an architecture, which need not be here: a few, the likeliest first."""
    estimates = {config: estimated_us(problem, config, arch, num_sms) for config in configs(problem, arch, num_sms)}
    limit = _HOPELESS * min(estimates.values(), default=0.0)
    return [config for config in sorted(estimates, key=estimates.__getitem__) if estimates[config] <= limit][
        :_MOST_CONFIGS
    ]


def likely_config(
    problem: ConvProblem,
    arch: int,
    num_sms: int = NUM_SMS,
    suits: Callable[[TritonConfig], bool] = lambda config: True,
) -> TritonConfig:
    """The config that `estimated_us` likes best of those that suit, for plans whose launches a CUDA graph replays.

    A prediction, of a config that nobody has verified here: for filters beyond 1x1 one of 4 warps (SAFE_WARPS). The
    pointer forms that `default_config` chooses from always suit.
    """
    most_warps = 8 if problem.R * problem.S == 1 else SAFE_WARPS
    candidates = [c for c in configs(problem, arch, num_sms) if c.num_warps <= most_warps and suits(c)]
    return min(candidates, key=lambda config: estimated_us(problem, config, arch, num_sms))
