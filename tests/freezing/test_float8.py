"""Models frozen in e4m3, and in int8 as for a GPU: which steps become what, by which kernels, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet.backends import BackendError
from fused_resnet.choosing import quantized as on_gpu
from fused_resnet.choosing.decide import Tuning
from fused_resnet.freezing import calibration
from fused_resnet.freezing import quantized as freezing
from fused_resnet.freezing.steps import FrozenSteps
from fused_resnet.kernels.triton import runtime
from fused_resnet.machine import devices
from fused_resnet.nn import BasicBlock
from fused_resnet.operators.problem import parsed_problem
from fused_resnet.operators.quantized import float8_over
from tests.kernels.test_triton import needs_triton
from tests.support import networks
from tests.support.quantized import by_reference, int8_regions

FLOAT8 = torch.float8_e4m3fn
X = (2, 3, 16, 16)
CUDA = torch.device("cuda")
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="TRITON_INTERPRET is not set")


def frozen_in(dtype, model, x, **options):
    options = {"calibrate": [torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(0))], **options}
    return fused_resnet.freeze(model.eval(), x, dtype=dtype, **options)


def test_the_first_convolution_stays_in_floats(monkeypatch):
    by_reference(monkeypatch)
    model, x = networks.small(BasicBlock), torch.randn(X)
    frozen = frozen_in(FLOAT8, model, x)
    assert frozen.plan(x).meta["not_int8"] == {"fused_model_conv1": "with e4m3 the first convolution is in bf16"}
    regions = int8_regions(frozen, x)
    total = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert sum(len(region.convolutions) for region in regions) == total - 1
    assert all(region.fragment.dtype == FLOAT8 for region in regions)
    assert {weight.dtype for region in regions for weight in region.weights.values()} == {FLOAT8}
    assert frozen(x).dtype == torch.float32 and frozen.dtype == FLOAT8
    assert fused_resnet.agreement(model, frozen, [x]).sqnr_db > 18
    text = str(fused_resnet.explain(frozen, x, roofline=None if torch.cuda.is_available() else _roofline()))
    assert "e4m3: layer1.0.conv1: x e4m3 " in text
    assert "not e4m3: conv1: with e4m3 the first convolution is in bf16" in text


def _roofline():
    from fused_resnet.measuring.rooflines import Roofline

    return Roofline(1e10, 1e11)


def test_one_file_of_scales_serves_both(monkeypatch, tmp_path):
    by_reference(monkeypatch)
    model, x = networks.small(BasicBlock), torch.randn(X)
    in_int8 = frozen_in(torch.int8, model, x)
    path = in_int8.scales().save(tmp_path / "scales.json")
    frozen = frozen_in(FLOAT8, model, x, calibrate=path)
    assert frozen.scales() == in_int8.scales()
    assert torch.equal(frozen(x), frozen_in(FLOAT8, model, x)(x))
    ranges = frozen.scales().ranges
    region = int8_regions(frozen, x)[0]
    assert region.fragment.scales[-1] in {float8_over(*found) for found in ranges.values()}
    kept = frozen_in(FLOAT8, model, x, keep=["layer2"])
    assert len(kept.plan(x).meta["not_int8"]) == 4  # conv1, and three of layer2


def test_the_most_sensitive_is_found_in_e4m3(monkeypatch):
    by_reference(monkeypatch)
    model, x = networks.small(BasicBlock), torch.randn(X)
    assert len(frozen_in(FLOAT8, model, x, keep=2).plan(x).meta["not_int8"]) in (2, 3)


# ----------------------------------------------------------------------------------------------- as for a GPU, in steps


class Net(nn.Module):
    """A pooled stem, a residual, a strided projection and a mean: all kinds of steps, small enough to interpret."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.a, self.b, self.c = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 8, 1, 2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = self.pool(F.relu(self.stem(x)))
        y = F.relu(self.b(F.relu6(self.a(y))) + y)
        return self.fc(F.adaptive_avg_pool2d(self.c(y), 1).flatten(1))


@needs_triton
@interpreted
@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=["int8", "e4m3"])
def test_steps_by_interpreted_kernels_give_the_references_answers(dtype, monkeypatch):
    model, x = Net(), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(calibration, "why_not_on", lambda dtype, device: None)
    with monkeypatch.context() as patch:
        by_reference(patch)
        expected = frozen_in(dtype, model, x)(x)
    monkeypatch.setattr(freezing, "runs_in_steps", lambda draft: True)
    frozen = frozen_in(dtype, model, x)
    steps = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenSteps)]
    assert steps and {one.backend.name for module in steps for one in module.selections} == {"triton"}
    assert all(weight.dtype == dtype for module in steps for weight in module.weights.values())
    if dtype == torch.int8:
        assert torch.equal(frozen(x), expected)
    else:
        torch.testing.assert_close(frozen(x), expected, rtol=0, atol=0.03 * expected.abs().max().item())
    text = str(fused_resnet.explain(frozen, x, roofline=_roofline()))
    assert "triton: " in text and "the first that is right here" in text


# -------------------------------------------------------------------------------------------------- who computes a step


def test_a_kernel_that_is_wrong_is_not_chosen(monkeypatch):
    """The next one is, and where all are wrong it is an error."""
    from fused_resnet.backends import Backend, record
    from fused_resnet.operators import quantized

    p = parsed_problem("3x16x4x4 -> 8, 3x3 p1 uint8 bias+add relu", "cpu")

    def right(p, o):
        return quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)

    def wrong(p, o):
        y = right(p, o)
        y[-1, 3, 1, 2] ^= 1
        return y

    kept, known = [], {}
    monkeypatch.setattr(on_gpu, "is_on", lambda: True)
    monkeypatch.setattr(on_gpu.winners, "outcome", lambda problem, name: known.get(name))
    monkeypatch.setattr(on_gpu.winners, "keep", kept.append)
    first, second = (Backend(name, lambda problem: None, run) for name, run in (("cuda", wrong), ("eager", right)))
    monkeypatch.setitem(record.REGISTRY, "conv_int8", {"cuda": first, "eager": second})
    assert on_gpu.first_right(p, torch.device("cpu"), Tuning("auto")).backend is second
    assert len(kept) == 2
    assert on_gpu.first_right(p, torch.device("cpu"), Tuning(False)).backend is first
    known["cuda"] = {"why": "1 of 384 bytes differ"}  # as an earlier plan found
    assert on_gpu.first_right(p, torch.device("cpu"), Tuning(False)).backend is second
    known.clear()
    monkeypatch.setitem(record.REGISTRY, "conv_int8", {"cuda": first})
    with pytest.raises(BackendError, match="no kernel computes 3x16x4x4 .* right here .cuda: 1 of 384 bytes differ"):
        on_gpu.first_right(p, torch.device("cpu"), Tuning("auto"))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8))
def test_residuals_are_looked_at_in_both_kinds_of_bytes(dtype):
    """A projection's are signed."""
    from fused_resnet.backends import Backend
    from fused_resnet.choosing import Selection
    from fused_resnet.operators import quantized

    def run(p, o):
        y = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
        return y ^ 1 if o.residual.dtype == dtype else y

    p = parsed_problem("3x16x4x4 -> 8, 3x3 p1 uint8 bias+add relu", "cpu")
    wrong = Selection(Backend("cuda", lambda problem: None, run), None, "")
    assert "bytes differ" in on_gpu.why_wrong(p, wrong, torch.device("cpu"))


@needs_triton
@interpreted
def test_interpreted_kernels_pass_the_check():
    from fused_resnet import backends
    from fused_resnet.choosing import Selection

    for dtype in ("float8_e4m3fn", "int8"):
        p = parsed_problem(f"3x16x4x4 -> 8, 3x3 p1 {dtype} bias+add relu", "cpu")
        one = Selection(backends.known(p.op)["triton"])
        assert on_gpu.why_wrong(p, one, torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(match, error=BackendError, **options):
    x = torch.randn(X)
    with pytest.raises(error, match=match):
        fused_resnet.freeze(networks.small(), x, **{"dtype": FLOAT8, "calibrate": [x], **options})


def test_on_a_cpu_there_is_no_e4m3():
    refused("float8_e4m3fn cannot run on a CPU: it needs an NVIDIA GPU of compute capability 8.9 .*in torch.int8")
    refused("dtype=torch.float8_e4m3fn needs calibrate: a loader", ValueError, calibrate=None)
    refused("'eager' is not for float8_e4m3fn; 'auto' can be asked for", ValueError, backend="eager")


def test_before_sm_89_there_is_no_e4m3(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "_driver_error", lambda: None)
    for capability, what in (((8, 6), "one has 8.6"), ((7, 5), "one has 7.5"), (None, "no GPU is visible")):
        monkeypatch.setattr(devices, "least_capability", lambda capability=capability: capability)
        if runtime.IMPORT_ERROR is None:
            assert what in calibration.why_not_on(FLOAT8, CUDA)
    assert calibration.why_not_on(FLOAT8, CUDA).endswith("Freeze in torch.int8 or torch.bfloat16 there.")
    monkeypatch.setattr(devices, "least_capability", lambda: (8, 9))
    if runtime.IMPORT_ERROR is None:
        assert calibration.why_not_on(FLOAT8, CUDA) is None
        assert calibration.why_not_on(torch.int8, CUDA) is None
