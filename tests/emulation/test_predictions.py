"""What the timing model expects of our kernels: a small convolution whose products are known."""

import importlib.util
import json
import sys

import pytest

from fused_resnet.emulation import library
from tests.support.scripts import script

_HAS_TRITON = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or ""),
    pytest.mark.skipif(not _HAS_TRITON, reason="needs Triton's compiler"),
]

CODE = """
import json, torch
from fused_resnet.emulation import cuda_launches, predictions
from fused_resnet.emulation.timing_model import GPUS
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.operators.problem import ConvProblem

one = (1, 1)
problem = ConvProblem(2, 64, 8, 8, 64, 3, 3, one, one, one, 1, "relu", False, True, True, torch.float16, "cuda")
a100 = GPUS["a100"]
found = {
    "whole": predictions.of_triton(problem, TritonConfig(64, 64, 64, 8, 4, 3), a100),
    "sample": predictions.of_triton(problem, TritonConfig(64, 64, 64, 8, 4, 3), a100, blocks=1),
    "split": predictions.of_triton(problem, TritonConfig(64, 64, 64, 8, 4, 3, split_k=3), a100),
}
if cuda_launches.why_not() is None:
    found["cuda"] = predictions.of_cuda(problem, 2, a100)
    # 256 rows: two blocks of a cluster have 128 x 128 each, of which half a tile's columns exist
    found["sm_90"] = predictions.of_cuda(problem._replace(N=4), 95, GPUS["h100"], blocks=1)
print(json.dumps({name: [one.us, [kernel._asdict() for kernel in one.kernels]] for name, one in found.items()}))
"""


@pytest.fixture(scope="module")
def found():
    done = script("-c", CODE)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# 128 rows in two tiles of 64 x 64, each on a multiprocessor of its own; a reduction of 576
TILE_US = 64 * 64 * 576 / 1024 / 1410


@pytest.mark.parametrize("name", ["whole", "sample", "cuda"])
def test_the_products_of_a_tile(found, name):
    if name not in found:
        pytest.skip("needs nvcc")
    us, (kernel,) = found[name]
    assert kernel["parts"]["tensor"] == pytest.approx(TILE_US)
    assert kernel["waves"] == 1 and kernel["resident"] >= 2  # 48 KiB of 164, and at most 255 registers
    assert us == kernel["us"] > 2 + max(kernel["parts"].values())


def test_a_cluster_is_counted_once(found):
    """The products of one block of its two, also of columns that do not exist."""
    if "sm_90" not in found:
        pytest.skip("needs nvcc")
    _, (kernel,) = found["sm_90"]
    assert kernel["parts"]["tensor"] == pytest.approx(128 * 128 * 576 / 2048 / 1830)
    assert kernel["waves"] == kernel["resident"] == 1  # 209 KiB of 228


def test_a_split_reduction_is_two_launches(found):
    us, kernels = found["split"]
    assert len(kernels) == 2 and us == sum(kernel["us"] for kernel in kernels)
    assert kernels[0]["parts"]["tensor"] == pytest.approx(TILE_US / 3)
    assert kernels[1]["parts"]["tensor"] == kernels[1]["parts"]["memory"] == 0
    assert kernels[1]["parts"]["L2"] > 0


def test_the_operands_come_from_memory_once(found):
    """x, weight, residual and output in fp16, the bias: by the A100's 2039 GB/s."""
    elements = 2 * 64 * 64 * 3 + 64 * 64 * 9 + 64
    for name in ("whole", "sample", "split"):
        assert found[name][1][0]["parts"]["memory"] == pytest.approx(2 * elements / 2039e3, rel=0.01)
