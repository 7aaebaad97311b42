"""Set before anything imports Triton: without a GPU its kernels run in the interpreter. Seeds, devices, markers."""

import collections
import os
import random
import tempfile
import zlib

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What somebody has tuned on this machine must not decide what is tested, nor must a test write into their cache. The
# fixture `tuned_files` gives a test files of its own.
_CACHE = tempfile.TemporaryDirectory(prefix="fused_resnet_tests_")
os.environ["FUSED_RESNET_CACHE_DIR"] = _CACHE.name
os.environ["FUSED_RESNET_TUNED"] = "0"
os.environ["FUSED_RESNET_TUNE"] = "0"

NO_CUDA = None if torch.cuda.is_available() else "needs a CUDA GPU and a CUDA build of torch"


def pytest_configure(config):
    if "OMP_NUM_THREADS" not in os.environ:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# What takes minutes in either tier, the longest first.
LONGEST = (
    "processors/test_amx.py",
    "processors/test_instruction_sets.py",
    "testing/test_verify.py",
    "kernels/test_triton_aot.py",
    "csrc/test_nvcc.py",
    "interop/test_wild.py",
    "models/test_models.py",
    "packaging/test_build.py",
    "tuning/test_tuner.py",
    "choosing/test_rebuilt_kernel.py",
    "choosing/test_decide.py",
    "benchmarks/test_benchmarks.py",
    "benchmarks/test_gpu_check.py",
)


def pytest_collection_modifyitems(items):
    """Long files first, then those of many tests, so that no worker is alone with a long one at the end.

    xdist hands files out in this order with `--no-loadscope-reorder`.
    """
    files = [item.nodeid.split("::")[0].removeprefix("tests/") for item in items]
    counts = collections.Counter(files)
    places = {file: place for place, file in enumerate(LONGEST)}
    keys = {id(item): (places.get(file, len(LONGEST)), -counts[file], file) for item, file in zip(items, files)}
    items.sort(key=lambda item: keys[id(item)])


@pytest.fixture(autouse=True)
def seeds(request):
    """Every test draws the same numbers alone, in any order and in any process: the seed is its id's checksum."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def tuned_files(tmp_path, monkeypatch):
    """Measurements count, and lie in this test's own folders."""
    from tests.support import tuned_files  # which imports Triton

    yield from tuned_files.own_files(tmp_path, monkeypatch)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=NO_CUDA or ""))]
)
def device(request) -> str:
    return request.param
