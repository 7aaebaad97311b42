"""Whole kernels that are not ours: GEMMs by Triton in each of wgmma's layouts, and a warp-specialised one by nvcc."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet.emulation import Kernel, TensorMap, cuda_launches, library
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from tests.support.emulated import Worker

pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")
_HAS_TRITON = sys.platform == "linux" and importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def worker():
    if not _HAS_TRITON:
        pytest.skip("needs Triton's compiler")
    with Worker() as one:
        yield one


# Elements of the reduction in a tile: 128, 64 and 32 bytes a row, and so each swizzle.
FIRST = (("float16", True, True, 64), ("float16", False, False, 32), ("bfloat16", True, False, 16))
REST = (
    ("bfloat16", False, True, 64), ("float16", False, True, 16), ("bfloat16", True, True, 32),
    ("float16", True, True, 16), ("float32", True, True, 32), ("float32", True, True, 16),
)  # fmt: skip


@pytest.mark.parametrize("case", [*FIRST, *[pytest.param(case, marks=pytest.mark.full) for case in REST]], ids=str)
def test_triton_gemms(worker, case):
    dtype, a_is_k_major, b_is_k_major, block_k = case
    for number in range(3):
        answer = worker.ask("gemm", arch=90, number=5 * number, dtype=dtype, a_is_k_major=a_is_k_major,
                            b_is_k_major=b_is_k_major, block_k=block_k)  # fmt: skip
        assert answer["reports"] == [] and answer["worst"] <= 1 and answer["wgmma"] > 0, answer


def test_a_triton_kernel_that_makes_its_own_maps(worker):
    """From zeros in shared memory to a copy, through tensormap.replace and both fences."""
    for number in range(12):
        answer = worker.ask("made_descriptors", arch=90, number=number)
        assert answer == dict(is_right=True, reports=[], makes_maps=True), (number, answer)


# --------------------------------------------------------------------------------------------- a warp-specialised one

M, N, K = 136, 72, 264  # five steps for three stages; the last tiles reach beyond the matrices


@pytest.fixture(scope="module")
def text():
    if cuda_launches.nvcc() is None:
        pytest.skip("needs nvcc")
    return cuda_launches.compile_cuda((Path(__file__).parent / "warp_specialised.cu").read_text(), "sm_90a")


def run(kernel, **how):
    """(the result's largest error, what was reported). Sums of small integers: every order gives the same."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (rows, K), generator=generator).half() for rows in (M, N))
    out = torch.full((M, N), torch.nan)
    maps = [TensorMap(x, (K, len(x)), (2 * K,), (64, box), swizzle=128) for x, box in ((a, 128), (b, 64))]
    outcome = kernel.run((2, 2), 384, [*maps, out, M, N, K], shared_bytes=3 * 24576, writable=[out], **how)
    return torch.equal(out.double(), a.double() @ b.double().t()), outcome.reports


def test_a_warp_specialised_gemm(text):
    kernel = Kernel(text, "right")
    for number, landing in enumerate(LANDINGS):
        for schedule in SCHEDULES:
            assert run(kernel, landing=landing, schedule=schedule, seed=number) == (True, []), (landing, schedule)


@pytest.mark.parametrize("name", ("no_full_wait", "no_empty_wait"))
def test_a_missing_wait_is_seen(text, name):
    is_right, reports = run(Kernel(text, name))
    assert reports
    assert not is_right or name == "no_empty_wait"
