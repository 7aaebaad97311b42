"""A plan's first run: its capture on a GPU, and the memory that stays with the process."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends.record import REGISTRY
from fused_resnet.machine import malloc
from tests.support import networks
from tests.support.plans import X, convolutions


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_cuda_graph(dtype):
    """On a GPU a plan is a graph: right for several shapes, from several threads and streams, in and out of inference
    mode, and its outputs are fresh."""
    model, x = networks.small().cuda(), torch.randn(X, device="cuda")
    limit = 5e-3 if dtype == torch.float32 else 5e-2  # products in TF32, unless torch is told otherwise
    with torch.inference_mode():
        frozen = fused_resnet.freeze(model, x, dtype=dtype)
    first, second = frozen(x), frozen(-x)
    assert networks.error(first, networks.in_fp64(model, x)) < limit and first.data_ptr() != second.data_ptr()
    wrong = []

    def serve(batch):
        stream, own = torch.cuda.Stream(), torch.randn(batch, *X[1:], device="cuda")
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(stream):
            expected = networks.in_fp64(model, own)
            if any(networks.error(frozen(own), expected) > limit for _ in range(20)):
                wrong.append(batch)

    threads = [threading.Thread(target=serve, args=(1 + index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(frozen.is_graphed(torch.empty(batch, *X[1:], device="cuda")) for batch in (1, 2, 3))


FAULTS = """
import resource, statistics, torch, fused_resnet
from torch import nn
model = nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 8, 1)).eval()
x = torch.randn(8, 16, 192, 192)  # results of 75 MB: more than malloc keeps of its own accord
frozen = fused_resnet.freeze(model, x)
faults = []
for _ in range(8):  # the first few find the heap still growing
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frozen(x)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[1:])))
"""


@pytest.mark.skipif(not malloc._is_ours_to_set(), reason="needs glibc with malloc's thresholds not set from outside")
def test_freed_memory_stays_with_the_process():
    def page_faults(**environment):
        run = subprocess.run(
            [sys.executable, "-c", FAULTS], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert page_faults() < 1000
    assert page_faults(MALLOC_MMAP_THRESHOLD_=str(32 * 2**20)) > 10_000  # the environment's word is the last


def test_a_convolution_that_a_library_refuses_goes_to_another_alone(tuned_files, monkeypatch):
    """It said that it can run it, and raises when it does: as cuDNN where it has no fused engine."""
    eager = backends.known("conv_bn_act")["eager"]

    def run(problem, operands):
        if problem.C == 16:
            raise RuntimeError("no engine\nmore")
        return eager.run(problem, operands)

    library = backends.Backend("library", lambda problem: None, run, backends.Auto(("cpu",)))
    monkeypatch.setitem(REGISTRY, "conv_bn_act", {"library": library, **REGISTRY["conv_bn_act"]})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    frozen = fused_resnet.freeze(model, x)
    names = [conv.backend.name for conv in convolutions(frozen, x)]
    assert names[0] == names[2] == "library" != names[1]
    torch.testing.assert_close(frozen(x), model(x))
    with pytest.raises(ValueError, match="does not run on an input .* no engine"):
        fused_resnet.freeze(model, x, backend="library")
