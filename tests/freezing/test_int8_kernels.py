"""Models frozen in int8 by every kernel that runs here: the same answers as by the reference, to the last bit."""

import pytest
import torch
from torch import nn

import fused_resnet
from benchmarks.cpu_check import footprint
from fused_resnet import models
from fused_resnet.choosing import exactness, winners
from fused_resnet.freezing import calibration
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.regions import kernels
from tests.support import networks
from tests.support.quantized import by_reference, int8_regions

RUNNING = [kernel for kernel in kernels.table() if kernel.dtype == torch.int8 and not kernel.why_not]
X = (3, 3, 17, 14)


def pooled():
    layers = [nn.Conv2d(3, 40, 7, 2, 3, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers += [nn.Conv2d(40, 33, 3, padding=2, dilation=2), nn.ReLU6(), nn.Conv2d(33, 70, 1), nn.SiLU()]
    layers += [nn.Conv2d(70, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return networks.randomize(nn.Sequential(*layers))


NETWORKS = {"basic": lambda: networks.small(BasicBlock), "bottleneck": lambda: networks.small(Bottleneck)}
NETWORKS["stem, pooling and silu"] = pooled
NETWORKS["copies"] = lambda: networks.randomize(networks.Copies())
NETWORKS["groups"] = lambda: networks.small(Bottleneck, groups=4, base_width=32)


@pytest.fixture(params=RUNNING, ids=lambda kernel: kernel.name)
def kernel(request, monkeypatch):
    fastest = kernels.fastest
    monkeypatch.setattr(kernels, "fastest", lambda dtype: request.param if dtype == torch.int8 else fastest(dtype))
    return request.param


def in_int8(model, x, **options):
    calibrate = [torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(0))]
    return fused_resnet.freeze(model.eval(), x, dtype=torch.int8, calibrate=calibrate, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_answers_are_the_references(kernel, name, monkeypatch):
    monkeypatch.setattr("fused_resnet.freezing.calibration.beside_int8", lambda: torch.float32)
    model, x = NETWORKS[name](), torch.randn(X)
    other = torch.randn(1, 3, 32, 32) * 3  # beyond the scales, in another shape
    frozen = in_int8(model, x)
    answers = frozen(x), frozen(other)
    for region in int8_regions(frozen, x):
        assert region.micro_kernel == kernel.name
        for workspace in region.workspaces:
            workspace.fill_(0xFF)  # nothing of an earlier call is read
    assert torch.equal(frozen(x), answers[0])
    by_reference(monkeypatch)
    exact = in_int8(model, x)
    assert torch.equal(exact(x), answers[0]) and torch.equal(exact(other), answers[1])


def test_regions_are_checked_once(kernel, tuned_files, monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_TUNE")
    checked, known = exactness._checked, []
    monkeypatch.setattr(exactness, "_checked", lambda *args: known.append(checked(*args)) or known[-1])
    model, x = networks.small(BasicBlock), torch.randn(X)
    frozen = in_int8(model, x)
    assert known == [{"error_ratio": 0.0}] * len(int8_regions(frozen, x))
    winners.forget()
    in_int8(model, x, tune=1)
    frozen(torch.randn(1, *X[1:]))  # a shape that a served model has not seen is checked, too
    assert known == [{"error_ratio": 0.0}] * 2 * len(int8_regions(frozen, x))


def test_memory_holds_the_weights_as_bytes(kernel):
    model, x = networks.small(Bottleneck), torch.randn(X)
    (region,) = int8_regions(in_int8(model, x), x)
    assert {weight.dtype for weight in region.compiled.weights} <= {torch.int8, torch.uint8}


@pytest.mark.full
@pytest.mark.skipif(not RUNNING, reason="needs a kernel of int8")
def test_memory_holds_the_weights_of_a_resnet50_once():
    """As bytes, however many plans there are: 25.5 million, the classifier's among them."""
    model, x = models.create("resnet50").eval(), torch.randn(2, 3, 64, 64)
    frozen = in_int8(model, x)
    for other in (x, torch.randn(1, 3, 96, 80)):
        frozen(other)
    assert len(frozen.plans()) == 2
    held = {torch.int8: 0, calibration.beside_int8(): 0}
    for tensor in footprint.tensors_of(*frozen.plans()):
        if tensor.dtype in held:
            held[tensor.dtype] += footprint.bytes_of(tensor)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    as_bytes, in_floats = held.values()
    assert weights <= as_bytes < 1.01 * weights
    assert in_floats < 0.1 * model.fc.weight.numel() * calibration.beside_int8().itemsize
