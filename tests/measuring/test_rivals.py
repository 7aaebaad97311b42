"""What other libraries can be asked for, and why not."""

import sys

import torch

import fused_resnet
from fused_resnet import backends, measuring, models


def test_cudnn_is_stitched_in_where_it_fits(monkeypatch):
    """cuDNN's place is taken here by a backend that, like it, runs only what ends in a ReLU."""
    calls = []

    def run(problem, operands):
        calls.append(problem)
        return backends.known("conv_bn_act")["eager"].run(problem, operands)

    fitting = backends.Backend("stitched", lambda p: None if p.activation == "relu" else f"not {p.activation}", run)
    monkeypatch.setitem(backends.known.__globals__["REGISTRY"]["conv_bn_act"], "stitched", fitting)
    model, x = measuring.calibrated(models.create("resnet20", option="B"), (3, 16, 16)), torch.randn(2, 3, 16, 16)
    folded = fused_resnet.freeze(model, x, backend="eager").plan(x)
    assert measuring.rivals.stitch(folded, "stitched") == (19, 2)  # the main path before each projection has no ReLU
    with torch.no_grad():
        wide = x.to(memory_format=torch.channels_last)
        assert (folded(wide) - model(x)).abs().max() < 1e-4 * model(x).abs().max()
    assert len(calls) == 19


def test_tensorrt_says_why_it_cannot(monkeypatch):
    model, x = torch.nn.Conv2d(3, 200, 1).eval(), torch.randn(1, 3, 4, 4)
    build = measuring.variant_builders(model, x, dtypes=[torch.float32], baselines=("tensorrt",))
    assert set(build) == {"eager NCHW fp32", "tensorrt fp32", "frozen fp32"}
    for module, reason in ((None, "tensorrt is not installed"), (object(), "RuntimeError: it needs an NVIDIA GPU")):
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        assert measuring.build_variants({"tensorrt": build["tensorrt fp32"]}) == ({}, {"tensorrt": reason})
