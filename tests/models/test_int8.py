"""Trained networks in int8, calibrated with 16 images: how many answers change, and by how much."""

import pytest
import torch

import fused_resnet
from benchmarks import data
from fused_resnet.models import cifar
from fused_resnet.regions import kernels
from tests.support import real_data
from tests.support.quantized import by_reference, int8_regions

full = pytest.mark.full
WHY_NONE = kernels.why_none(torch.int8)
needs_kernel = pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))


def answers(model, calibrating, inputs, labels, batch):
    frozen = fused_resnet.freeze(model, inputs[:batch], dtype=torch.int8, calibrate=[calibrating])
    inside = sum(len(region.convolutions) for region in int8_regions(frozen, inputs[:batch]))
    assert inside == sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    return fused_resnet.agreement(model, frozen, zip(inputs.split(batch), labels.split(batch)))


def test_resnet20_on_the_sample(monkeypatch):
    if WHY_NONE is not None:
        by_reference(monkeypatch)  # the same bytes, later
    images, labels = data.load_cifar10_sample()
    inputs = data.normalize(images)
    model = cifar.resnet20(weights=data.RESNET20_WEIGHTS).eval()
    found = answers(model, inputs[1::32], inputs[::4], labels[::4], batch=125)
    assert found.changed <= 3 and found.sqnr_db >= 29


@full
@needs_kernel
@pytest.mark.parametrize("name", ("resnet20", "resnet32", "resnet56"))
def test_cifar(name):
    images, labels = real_data.cifar10()
    calibrating = real_data.imagenet_normalized(real_data.cifar10("train_batch1", count=16)[0])
    found = answers(real_data.akamaster(name), calibrating, real_data.imagenet_normalized(images), labels, batch=250)
    assert abs(found.drop) <= 0.3 and found.changed <= 100 and found.sqnr_db >= 29, found


@full
@needs_kernel
def test_imagenet():
    inputs, labels = real_data.imagenet_400()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    calibrating, counted = inputs[order[:16]], order[100:]
    found = answers(real_data.keras_resnet50(), calibrating, inputs[counted], labels[counted], batch=10)
    assert found.drop <= 1.0 and found.changed <= 6 and found.sqnr_db >= 23, found
