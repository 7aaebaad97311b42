"""Trained networks in e4m3 by the reference, calibrated with 16 images: how many answers change, and by how much.

No CPU runs such plans, and the reference computes in fp64: hence few images.
"""

import pytest
import torch

import fused_resnet
from benchmarks import data
from fused_resnet.models import cifar
from tests.support import real_data
from tests.support.quantized import by_reference, int8_regions

full = pytest.mark.full


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    by_reference(monkeypatch)


def answers(model, calibrating, inputs, labels, batch):
    frozen = fused_resnet.freeze(model, inputs[:batch], dtype=torch.float8_e4m3fn, calibrate=[calibrating])
    inside = sum(len(region.convolutions) for region in int8_regions(frozen, inputs[:batch]))
    assert inside == sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) - 1  # all but the first
    return fused_resnet.agreement(model, frozen, zip(inputs.split(batch), labels.split(batch)))


def test_resnet20_on_the_sample():
    images, labels = data.load_cifar10_sample()
    inputs = data.normalize(images)
    model = cifar.resnet20(weights=data.RESNET20_WEIGHTS).eval()
    found = answers(model, inputs[1::32], inputs[::16], labels[::16], batch=16)
    assert found.changed <= 3 and found.sqnr_db >= 20, found


@full
def test_cifar():
    images, labels = real_data.cifar10(count=300)
    calibrating = real_data.imagenet_normalized(real_data.cifar10("train_batch1", count=16)[0])
    found = answers(real_data.akamaster("resnet20"), calibrating, real_data.imagenet_normalized(images), labels, 150)
    assert found.changed <= 9 and found.sqnr_db >= 21, found  # 3 %


@full
def test_imagenet():
    inputs, labels = real_data.imagenet_400(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    calibrating, counted = inputs[order[:16]], order[17:]
    found = answers(real_data.keras_resnet50(), calibrating, inputs[counted], labels[counted], batch=1)
    assert found.sqnr_db >= 17, found
