"""Options of the pytest-benchmark files: pytest benchmarks/bench_ops.py --model resnet50 --batch 8 --dtype bf16.

pytest-benchmark runs one variant after the other. For ratios prefer `fused-resnet bench`, which interleaves them.
"""

import pytest
import torch

from fused_resnet import models
from fused_resnet.operators.problem import SHORT_DTYPES


def pytest_addoption(parser):
    group = parser.getgroup("fused_resnet")
    group.addoption("--model", default="resnet50", choices=models.names())
    group.addoption("--batch", type=int, default=1)
    group.addoption("--dtype", default="fp32", choices=tuple(SHORT_DTYPES))
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config):
    config.option.benchmark_skip = False  # which pyproject.toml sets for the tests


@pytest.fixture
def timed(benchmark, request):
    """Run a callable under pytest-benchmark; on a GPU until the device has finished."""
    on_cuda = torch.device(request.config.getoption("device")).type == "cuda"

    def run(call):
        def finished():
            call()
            if on_cuda:
                torch.cuda.synchronize()

        finished()
        with torch.no_grad():
            benchmark(finished)

    return run
