"""Which kernels and tiles may compute a convolution. Arithmetic on shapes only, no Triton; `cost` says how long.

Forms: "pointer" runs every problem; "gemm_tma" 1x1 filters, "rows_tma" 3x3 filters over maps with a halo, "lines_tma"
3x3 filters over dense maps, also with stride 2. The last three need the TMA of sm_90.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch

from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.operators.problem import FLOAT8, ConvProblem

# Row numbers are 32-bit, since dividing them is the slow part, and so are offsets within a tile; offsets of tiles and
# of whole tensors are 64-bit.
MAX_ROWS = 2**31 - 2**10
MAX_PITCH = 2**22  # elements between rows: 256 rows of a tile, and their halo, must stay below 2**31 elements

FORMS = ("pointer", "gemm_tma", "rows_tma", "lines_tma")
NUM_SMS = 132  # of an H100 and an H200
# Sums a thread. MANY_SUMS of them leave no room: with a residual, in a persistent kernel, or for stride 1 in
# lines_tma they spill up to 440 bytes (sm_90, Triton 3.6.0 and 3.7.1).
MANY_SUMS, _FEW_SUMS = 128, 64
# More of them have miscompiled a flattened (r, s, c) loop for filters beyond 1x1 (pytorch issue 173068). A config with
# more is taken only where it was measured, and so held against the reference on that very GPU.
SAFE_WARPS = 4
_MAX_HALO = 1.2  # rows computed per row wanted, above which other forms win on paper: 1.31 at 7x7
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # a block's, CUDA C guide

_LARGE_TILES = ((128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 8, 4))  # rows, channels, warps, stages
_TMA_TILES = {
    "gemm_tma": (*_LARGE_TILES, (256, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4)),
    "rows_tma": (*_LARGE_TILES, (256, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4)),
    "lines_tma": (*_LARGE_TILES, (128, 64, 8, 4), (64, 64, 4, 4)),  # with stride 1 a thread holds two sets of sums
}
# Those that mma.sync multiplies on sm_90, too (`_why_not_wgmma`)
_UINT8_TILES = ((64, 64, 2, 4), (32, 256, 4, 3), (32, 128, 4, 4), (32, 64, 4, 4), (32, 32, 2, 4))


class TritonConfig(NamedTuple):
    """A tile of rows by output channels by reduction, how it is ordered and compiled, and which kernel runs it.

    split_k: in how many parts the reduction is summed, a program each, before a second kernel adds them up.
    persistent: one program an SM that walks the tiles, instead of one a tile. `TritonConfig(**json)` reads `_asdict()`.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    form: str = "pointer"
    split_k: int = 1
    persistent: bool = False


def configs(problem: ConvProblem, arch: int = 80, num_sms: int = NUM_SMS) -> list[TritonConfig]:
    """The configs of `search_space` that are worth measuring. Any of them computes the problem; no two are alike."""
    return [config for config, reason in search_space(problem, arch, num_sms) if reason is None]


@functools.lru_cache(maxsize=4096)
def search_space(
    problem: ConvProblem, arch: int = 90, num_sms: int = NUM_SMS
) -> tuple[tuple[TritonConfig, Optional[str]], ...]:
    """Every config considered for a problem, with None or why it is not worth compiling, in words for the user."""
    considered = [*_pointer_tiles(problem), *_tma_tiles(problem)]
    candidates = [c for tile in considered for c in (tile, *_split(tile), *_persistent(tile))]
    unique = dict.fromkeys(candidates)
    return tuple((c, why_illegal(problem, c, arch) or _why_hopeless(problem, c, num_sms)) for c in unique)


@functools.lru_cache(maxsize=4096)
def default_config(problem: ConvProblem) -> TritonConfig:
    """The first pointer tile that gives every SM of a large GPU work, or else the one with the most tiles.

    A guess from arithmetic, not a measurement. Never a TMA form: a launch with descriptors encodes each of them anew,
    which outweighs what a small convolution takes unless a CUDA graph replays it.
    """
    candidates = _pointer_tiles(problem)
    for config in candidates:
        if num_tiles(problem, config) >= NUM_SMS:
            return config
    return max(candidates, key=lambda config: num_tiles(problem, config))


def _pointer_tiles(problem: ConvProblem) -> list[TritonConfig]:
    """All fit into 99 KiB of shared memory, so that they run on every GPU from sm_80 on. Eight warps are for pointwise
    convolutions only (SAFE_WARPS), since `default_config` takes these unmeasured."""
    has_masks = problem.C // problem.groups % _step(problem) != 0  # for each element, with divisions: registers
    if problem.dtype == torch.uint8:
        tiles = [tile for tile in _UINT8_TILES if tile[0] * tile[1] <= (32 * 64 if has_masks else 32 * 128)]
    elif has_masks:
        tiles = [(64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3)]
    elif problem.dtype == torch.float32:
        tiles = [(64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)]
    elif is_gemm(problem):
        tiles = [(128, 128, 8, 3), (256, 64, 8, 2), (128, 64, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4)]
    else:
        tiles = [(128, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4), (64, 32, 4, 4)]
        if problem.dtype == FLOAT8:
            tiles = tiles[1:]  # beside a step's sums the first spills 8 bytes on sm_89 (Triton 3.7.1)
    step, widest = _step(problem), _widest(problem)
    narrowed = (TritonConfig(m, min(n, widest), step, 8, warps, stages) for m, n, warps, stages in tiles)
    return list(dict.fromkeys(narrowed))


def _tma_tiles(problem: ConvProblem) -> list[TritonConfig]:
    if problem.dtype == torch.float32:  # its products go through registers, unless they are TF32
        return []
    step, widest = _step(problem), max(_widest(problem), 32)
    return [
        TritonConfig(m, min(n, widest), step, 8, warps, stages, form)
        for form in _tma_forms(problem)
        for m, n, warps, stages in (_UINT8_TILES if problem.dtype == torch.uint8 else _TMA_TILES[form])
    ]


def _split(tile: TritonConfig) -> list[TritonConfig]:
    """Where there are too few tiles the small ones are the ones to split."""
    if (tile.BLOCK_M, tile.BLOCK_N) != (64, 64) or tile.form == "lines_tma":
        return []
    return [tile._replace(split_k=parts) for parts in (2, 4, 8)]


def _persistent(tile: TritonConfig) -> list[TritonConfig]:
    is_large = tile.BLOCK_M * tile.BLOCK_N >= 128 * 64
    return [tile._replace(persistent=True)] if tile.form in ("gemm_tma", "rows_tma") and is_large else []


def _step(problem: ConvProblem) -> int:
    """BLOCK_K: the largest that divides the channels of a group, 128 bytes at most, or else 32 with masks."""
    step, least = 128 // problem.dtype.itemsize, 32 if problem.dtype.itemsize == 1 else 16  # of tl.dot
    while step >= least:
        if problem.C // problem.groups % step == 0:
            return step
        step //= 2
    return 32


def _widest(problem: ConvProblem) -> int:
    return max(16, 1 << (problem.K // problem.groups - 1).bit_length())


def is_gemm(problem: ConvProblem) -> bool:
    return problem.is_pointwise and problem.groups == 1


def _tma_forms(problem: ConvProblem) -> tuple[str, ...]:
    """The forms whose arithmetic this is, whatever its sizes."""
    p = problem
    if p.groups != 1 or p.stride not in ((1, 1), (2, 2)):
        return ()
    if (p.R, p.S, p.padding) == (1, 1, (0, 0)):
        return ("gemm_tma",)
    if (p.R, p.S, p.padding, p.dilation) == (3, 3, (1, 1), (1, 1)):
        forms = ("rows_tma", "lines_tma") if p.stride == (1, 1) else ("lines_tma",)
        # of bytes, the taps that lines_tma leaves out would have to count as -128 (`epilogue.add_products`)
        return tuple(form for form in forms if p.dtype.itemsize > 1 or form != "lines_tma")
    return ()


def rows_of(problem: ConvProblem, form: str, x_has_halo: bool = False) -> str:
    """How a form numbers its rows (`epilogue`), given how x lies in memory."""
    if form == "rows_tma" or x_has_halo:
        return "halo"
    return "lines" if form == "lines_tma" or form == "gemm_tma" and problem.stride == (2, 2) else "compact"


def num_rows(problem: ConvProblem, rows: str) -> int:
    if rows == "halo":
        return row_space.num_rows(problem.N, problem.P, problem.Q)
    return problem.N * problem.P * (1 if rows == "lines" else problem.Q)


def num_tiles(problem: ConvProblem, config: TritonConfig, rows: Optional[str] = None) -> int:
    """Tiles of the whole output, all parts of the reduction counted."""
    p, rows = problem, rows or rows_of(problem, config.form)
    columns = p.Q if rows == "lines" else 1
    in_group = -(-(p.K // p.groups) // config.BLOCK_N)
    return -(-num_rows(p, rows) // config.BLOCK_M) * columns * in_group * p.groups * config.split_k


@functools.lru_cache(maxsize=4096)
def why_illegal(problem: ConvProblem, config: TritonConfig, arch: int) -> Optional[str]:
    """Why this config cannot compute the problem on an architecture (its compute capability times ten), or None."""
    p, c = problem, config
    if c.form not in FORMS:
        return f"there is no form {c.form!r} ({', '.join(FORMS)} are)"
    if p.dtype == FLOAT8 and arch < 89:
        return f"sm_{arch} has no e4m3 arithmetic"
    if c.form != "pointer" and (reason := _why_not_tma(problem, config, arch)):
        return reason
    if reason := _why_not_wgmma(problem, config, arch):
        return reason
    if c.persistent and (c.form in ("pointer", "lines_tma") or c.split_k > 1):
        return "persistent programs are for gemm_tma and rows_tma without split_k"
    if c.split_k > 1 and c.form == "lines_tma":
        return "lines_tma has no split_k"
    steps = -(-p.reduction // c.BLOCK_K)
    if c.split_k > steps:
        return f"a reduction of {steps} steps of {c.BLOCK_K} cannot be split into {c.split_k} parts"
    # beside the sums of a TMA form with live BN there is no room for the vectors: 128x256 over 8 warps spilled 8 bytes
    # on sm_90 and 1152 on sm_100 (Triton 3.7.1, 2026-11)
    has_vectors = p.has_bn and c.form != "pointer"
    # of e4m3 the sums of a step lie beside those of all
    has_two_sums = p.dtype == FLOAT8 or (c.form == "lines_tma" and p.stride == (1, 1))
    is_crowded = p.has_residual or c.persistent or has_vectors or has_two_sums
    if sums_per_thread(config) > (_FEW_SUMS if is_crowded else MANY_SUMS):
        return f"{sums_per_thread(config)} sums a thread spill"
    limit = _SHARED_KIB.get(arch, 99) * 1024
    if shared_bytes(problem, config) > limit:
        return f"{shared_bytes(problem, config)} bytes of shared memory are too many (sm_{arch} has {limit})"
    return None


def _why_not_tma(problem: ConvProblem, config: TritonConfig, arch: int) -> Optional[str]:
    p, c = problem, config
    if arch < 90:
        return f"sm_{arch} has no TMA"
    if c.form not in _tma_forms(problem):
        return f"{c.form} does not compute this filter, stride, padding or grouping"
    element = p.dtype.itemsize
    if p.C * element % 16:
        return f"TMA needs rows of a multiple of 16 bytes: {p.C} channels have {p.C * element}"
    rows = rows_of(problem, c.form)
    is_flat = c.form == "gemm_tma" and rows != "lines"
    if not is_flat and p.C % c.BLOCK_K:
        return f"a step of {c.BLOCK_K} channels must not leave a pixel's {p.C}"
    if p.stride == (2, 2) and (p.H % 2 or (c.form == "lines_tma" and p.W % 2)):
        return f"a map of {p.H}x{p.W} cannot be viewed as pairs of lines: it must be even"
    if rows == "lines" and max(p.Q * p.K, 2 * p.W * p.C) > MAX_PITCH:
        return f"lines of {p.W * p.C} and {p.Q * p.K} elements are too long"
    if rows == "halo" and num_rows(problem, rows) > MAX_ROWS:
        return f"{num_rows(problem, rows)} rows with their halo are too many (at most {MAX_ROWS})"
    return None


def _why_not_wgmma(problem: ConvProblem, config: TritonConfig, arch: int) -> Optional[str]:
    """u8 is made s8 in registers. A wgmma may read those too late: Triton's issue 9433, mended in ptxas 13.3 alone."""
    if problem.dtype == torch.uint8 and arch == 90 and config.BLOCK_M % 64 == 0 and config.num_warps % 4 == 0:
        return "wgmma would read uint8 from registers, where ptxas errs (Triton's issue 9433)"
    return None


def sums_per_thread(config: TritonConfig) -> int:
    return config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)


def shared_bytes(problem: ConvProblem, config: TritonConfig) -> int:
    """Shared memory of a program, as estimated before compiling: the stages, and what holds a finished tile."""
    c, element = config, problem.dtype.itemsize
    stages = c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * element
    result = c.BLOCK_M * c.BLOCK_N * element
    return stages + result + 1024 if c.persistent else max(stages, result) + 1024


def _why_hopeless(problem: ConvProblem, config: TritonConfig, num_sms: int) -> Optional[str]:
    """Why a legal config need not be measured."""
    p, c = problem, config
    rows, tiles = rows_of(problem, c.form), num_tiles(problem, c)
    computed = num_rows(p, rows) / (p.N * p.P * (1 if rows == "lines" else p.Q))
    if computed > _MAX_HALO:
        return f"{100 * (computed - 1):.0f} % more rows for the halo of {p.P}x{p.Q} maps"
    if c.form == "rows_tma" and p.has_bn:
        return "live BN runs outside plans, where x would be copied into row space"
    if c.form != "pointer" and num_rows(p, rows) < c.BLOCK_M // 2:
        return f"{num_rows(p, rows)} rows fill less than half of a tile of {c.BLOCK_M}"
    if c.BLOCK_N >= 2 * _widest(problem):
        return f"{p.K} channels fill less than half of a tile of {c.BLOCK_N}"
    if c.split_k > 1 and tiles > 2 * num_sms:
        return f"{tiles // c.split_k} tiles need no splitting on {num_sms} SMs"
    if c.split_k > 1 and -(-p.reduction // c.BLOCK_K) < 2 * c.split_k:
        return f"parts of fewer than two steps of {c.BLOCK_K}"
    if c.persistent and tiles <= num_sms:
        return f"{tiles} tiles are at most one for each of {num_sms} SMs"
    return None
