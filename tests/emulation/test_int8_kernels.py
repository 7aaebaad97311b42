"""Convolutions of bytes, as Triton and nvcc compile them, run in the emulator: exactly the int8 contract's bytes."""

import importlib.util
import sys

import pytest

from fused_resnet.emulation import cuda_launches, library
from tests.support.emulated import Worker

_HAS_TRITON = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")
needs_triton = pytest.mark.skipif(not _HAS_TRITON, reason="needs Triton's compiler")
needs_nvcc = pytest.mark.skipif(cuda_launches.why_not() is not None, reason=cuda_launches.why_not() or "")


@pytest.fixture(scope="module")
def worker():
    with Worker() as one:
        yield one


# BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages, form, split_k, persistent. Whether the output and the
# residual lie in row space.
TRITON = (
    (80, "2x128x7x9 -> 72, 1x1 uint8 bias+add relu", (64, 64, 32, 8, 4, 3)),
    (80, "1x128x9x7 -> 40, 3x3 p1 int8 bias+add none", (64, 32, 64, 8, 4, 3)),
    (80, "1x64x9x7 -> 40, 3x3 s2 p1 uint8 bias relu6", (64, 32, 64, 8, 4, 4), True),
    (80, "1x3x17x15 -> 64, 7x7 s2 p3 int8 bias relu", ()),
    (80, "1x64x6x6 -> 64, 3x3 p1 g8 uint8 bias+add relu", ()),
    (80, "1x256x5x5 -> 64, 1x1 uint8 bias+add none", (64, 64, 64, 8, 4, 3, "pointer", 2)),
    (90, "1x128x9x7 -> 64, 3x3 p1 uint8 bias+add relu", (64, 64, 64, 8, 2, 3)),
    (90, "1x128x9x7 -> 64, 3x3 p1 int8 bias+add relu", (64, 64, 64, 8, 4, 3)),
    (90, "2x512x7x9 -> 136, 1x1 uint8 bias+add relu", (64, 64, 128, 8, 2, 3, "gemm_tma")),
    (90, "2x512x7x9 -> 136, 1x1 int8 bias none", (64, 64, 128, 8, 4, 3, "gemm_tma")),
    (90, "2x128x12x10 -> 64, 1x1 s2 uint8 bias relu6", (32, 64, 32, 8, 4, 3, "gemm_tma"), True),
    (90, "3x256x9x9 -> 136, 1x1 uint8 bias relu", (32, 128, 64, 8, 4, 3, "gemm_tma", 1, True)),
    (90, "1x512x5x5 -> 64, 1x1 int8 bias+add relu", (64, 64, 64, 8, 4, 3, "gemm_tma", 2)),
    (90, "2x128x9x7 -> 64, 3x3 p1 uint8 bias+add none", (32, 64, 128, 8, 4, 3, "rows_tma"), True),
    (90, "1x64x9x9 -> 72, 3x3 p1 int8 bias relu", (64, 64, 64, 8, 4, 3, "rows_tma", 2)),
)  # fmt: skip


@needs_triton
@pytest.mark.parametrize("number", range(len(TRITON)), ids=[f"sm_{c[0]} {c[1]}".replace(" ", "_") for c in TRITON])
def test_triton(worker, number):
    arch, problem, config, *rest = TRITON[number]
    answer = worker.ask("conv_int8", problem=problem, how=config, arch=arch, number=number, in_row_space=bool(rest))
    assert answer["reports"] == [] and answer["differing"] == 0, answer
    assert (answer["bulk_copies"] > 0) == (len(config) > 6 and config[6] != "pointer")
    by_wgmma = arch == 90 and " int8 " in problem
    assert (answer["wgmma"] > 0, answer["mma"] > 0, answer["register_a"]) == (by_wgmma, not by_wgmma, 0)


# (tile, splits). Between them every tile, every way of copying, both signs of x and of the residual.
CUDA = (
    ("2x64x7x5 -> 72, 1x1 uint8 bias+add relu", (0, 1)),
    ("2x128x8x8 -> 64, 3x3 p1 int8 bias+add relu", (1, 2)),
    ("2x32x9x7 -> 136, 1x1 s2 uint8 bias none", (2, 1)),
    ("1x3x17x15 -> 64, 7x7 s2 p3 int8 bias relu", (1, 1)),
    ("1x64x6x6 -> 64, 3x3 p1 g8 uint8 bias+add none", (3, 1)),
    ("1x24x9x9 -> 40, 3x3 p2 d2 uint8 bias relu6", (3, 2)),
    ("1x12x6x5 -> 12, 3x3 p1 g12 uint8 bias+add relu", (3, 3)),
    ("2x16x2x2 -> 9, 5x5 p2 int8 bias+add none", (4, 1)),
)


# test_sm90_kernel has more of them
SM90 = (
    ("2x64x7x5 -> 72, 1x1 uint8 bias+add relu", (92, 1)),
    ("1x144x8x8 -> 64, 3x3 p1 int8 bias+add none", (93, 1)),
)


@needs_nvcc
@pytest.mark.parametrize("number", range(len(SM90)), ids=[case[0].replace(" ", "_") for case in SM90])
def test_cuda_for_sm_90(worker, number):
    problem, how = SM90[number]
    answer = worker.ask("conv_int8", problem=problem, how=how, arch=90, number=number)
    assert answer["reports"] == [] and answer["differing"] == 0, answer
    assert answer["wgmma"] > 0 and answer["bulk_copies"] > 0


@needs_nvcc
@pytest.mark.parametrize("number", range(len(CUDA)), ids=[case[0].replace(" ", "_") for case in CUDA])
def test_cuda(worker, number):
    problem, how = CUDA[number]
    answer = worker.ask("conv_int8", problem=problem, how=how, arch=80, number=number)
    assert answer["reports"] == [] and answer["differing"] == 0, answer
    assert answer["mma"] > 0
