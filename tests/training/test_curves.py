"""ResNet-20 on real images from one seed: a fused run leaves a plain one no faster than another order of sums does."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fused_resnet
from fused_resnet import models
from tests.support import real_data
from tests.support.fused import kernels_for_small_maps

pytestmark = pytest.mark.full
STEPS, BATCH = 12, 32


@pytest.fixture
def batches():
    images, labels = real_data.cifar10("train_batch1", count=STEPS * BATCH)
    images = real_data.imagenet_normalized(images).contiguous(memory_format=torch.channels_last)
    return list(zip(images.split(BATCH), labels.split(BATCH)))


def run(model, batches, dtype=torch.float32, order=slice(None)):
    """(loss, all parameters) after each step. order: in which the images of a batch lie."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    curve = []
    for images, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(images[order].contiguous(memory_format=torch.channels_last)), labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parameters = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        curve.append((loss.item(), parameters))
    return curve


def distances(one, other):
    """How far the parameters are apart after each step, in relation to their size."""
    return [((p - q).norm() / q.norm()).item() for (_, p), (_, q) in zip(one, other)]


def test_in_fp32_fused_is_as_far_as_a_batch_in_another_order(batches, monkeypatch):
    """The order of the images changes nothing but the order of sums, whose roundings grow from step to step."""
    kernels_for_small_maps(monkeypatch)
    torch.manual_seed(0)
    plain = models.create("resnet20")
    expected = run(plain, batches)
    shuffled = run(plain, batches, order=torch.arange(BATCH).flip(0))
    fused = run(fused_resnet.fuse(copy.deepcopy(plain), strict=True), batches)
    assert min(loss for loss, _ in expected[-3:]) < expected[0][0], "nothing was learnt"
    other_order, of_fused = distances(shuffled, expected), distances(fused, expected)
    of_losses = [abs(one[0] - other[0]) for one, other in zip(shuffled, expected)]
    for step in range(STEPS):
        assert of_fused[step] <= 4 * max(other_order[: step + 1]) < 0.2, (step, of_fused, other_order)
        assert abs(fused[step][0] - expected[step][0]) <= 4 * max(of_losses[: step + 1]) + 1e-6, (step, of_losses)


def test_in_bf16_fused_is_no_farther_from_fp32_than_plain(batches, monkeypatch):
    kernels_for_small_maps(monkeypatch)
    torch.manual_seed(0)
    plain = models.create("resnet20")
    exact = run(plain, batches)
    expected, actual = (
        run(model, batches, torch.bfloat16) for model in (plain, fused_resnet.fuse(copy.deepcopy(plain)))
    )
    of_plain, of_fused = distances(expected, exact), distances(actual, exact)
    for step in range(STEPS):  # with fewer roundings; that of one step may be lucky
        assert of_fused[step] <= 1.5 * max(of_plain[: step + 1]), (step, of_fused, of_plain)
    assert max(abs(a[0] - b[0]) for a, b in zip(actual, exact)) < 0.2
