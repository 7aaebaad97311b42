"""Convolutions of e4m3, as Triton compiles them, run in the emulator with a GPU's sums: within the bound of `float8`.

And plans in int8 and e4m3 as for a GPU, of which each kernel is emulated.
"""

import importlib.util
import sys

import pytest

from fused_resnet.emulation import library
from tests.support.emulated import Worker

_HAS_TRITON = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or ""),
    pytest.mark.skipif(not _HAS_TRITON, reason="needs Triton's compiler"),
]


@pytest.fixture(scope="module")
def worker():
    with Worker() as one:
        yield one


# As in test_int8_kernels. The problems' dtype is e4m3.
CASES = (
    (89, "2x128x7x9 -> 72, 1x1 bias+add relu", (64, 64, 128, 8, 4, 3)),
    (89, "1x64x9x7 -> 40, 3x3 s2 p1 bias relu6", (64, 32, 64, 8, 4, 4), True),
    (89, "1x3x17x15 -> 64, 7x7 s2 p3 bias relu", ()),
    (89, "1x64x6x6 -> 64, 3x3 p1 g8 bias+add none", ()),
    (90, "1x128x9x7 -> 64, 3x3 p1 bias+add relu", (64, 64, 128, 8, 4, 3)),
    (90, "1x20x9x7 -> 33, 3x3 s2 p2 d2 bias none", (32, 32, 32, 8, 4, 3)),
    (90, "1x256x5x5 -> 64, 1x1 bias+add none", (64, 64, 64, 8, 4, 3, "pointer", 2)),
    (90, "2x512x7x9 -> 136, 1x1 bias+add relu", (64, 64, 128, 8, 4, 3, "gemm_tma")),
    (90, "2x128x12x10 -> 64, 1x1 s2 bias relu6", (64, 64, 32, 8, 4, 3, "gemm_tma"), True),
    (90, "3x256x9x9 -> 136, 1x1 bias none", (64, 64, 64, 8, 4, 3, "gemm_tma", 1, True)),
    (90, "2x128x9x7 -> 64, 3x3 p1 bias+add none", (64, 64, 128, 8, 4, 3, "rows_tma"), True),
    (90, "1x64x9x9 -> 72, 3x3 p1 bias relu", (64, 64, 64, 8, 4, 3, "rows_tma", 2)),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"sm_{c[0]} {c[1]}".replace(" ", "_") for c in CASES])
def test_triton(worker, number):
    arch, problem, config, *rest = CASES[number]
    problem = problem.replace(" bias", " float8_e4m3fn bias")
    answer = worker.ask("conv_float8", problem=problem, how=config, arch=arch, number=number, in_row_space=bool(rest))
    assert answer["reports"] == [] and answer["worst"] <= 1, answer
    assert answer["differing"] < 0.03, answer  # from sums in fp32: values near the middle of two
    assert (answer["bulk_copies"] > 0) == (len(config) > 6 and config[6] != "pointer")
    by_wgmma = arch == 90 and config[0] == 64
    assert (answer["wgmma"] > 0, answer["mma"] > 0, answer["register_a"]) == (by_wgmma, not by_wgmma, 0)


def test_before_sm_89_there_is_none(worker):
    with pytest.raises(RuntimeError, match="sm_80 has no e4m3 arithmetic"):
        worker.ask("conv_float8", problem="1x32x4x4 -> 32, 1x1 float8_e4m3fn bias relu", how=(), arch=80, number=0)


@pytest.mark.full
@pytest.mark.parametrize("dtype, arch", [("int8", 80), ("int8", 90), ("float8_e4m3fn", 89), ("float8_e4m3fn", 90)])
def test_a_plan_of_a_gpu_gives_the_references_answers(worker, dtype, arch):
    answer = worker.ask("quantized_plan", dtype=dtype, arch=arch, number=arch)
    is_int8 = dtype == "int8"
    assert answer["reports"] == [] and answer["convolutions"] == (12 if is_int8 else 11), answer  # all but the first
    assert answer["mma"] + answer["wgmma"] > 0
    assert answer["worst"] == 0 if is_int8 else answer["worst"] < 0.02, answer
