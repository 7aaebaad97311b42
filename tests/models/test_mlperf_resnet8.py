"""MLPerf Tiny's integer ResNet-8 and a wider one, TFLite networks: the files' weights and scales, by our contract.

TFLite rounds a convolution to bytes before the add, and rounds means. We do neither, so some bytes differ.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet.operators import quantized
from fused_resnet.quantizing.scales import Scales, digest
from fused_resnet.regions import kernels
from tests.support import real_data
from tests.support.quantized import by_reference, int8_regions

WHY_NONE = kernels.why_none(torch.int8)
needs_kernel = pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))
# The file's tensors by our names. The branch that ends in an add (24) and the other addends (28, 32) are never bytes.
TENSORS = {
    "x": 0, "layer0": 22, "layer1": 23, "layer2": 25, "layer3": 26, "layer4": 27, "layer5": 29, "layer6": 30,
    "layer7": 31, "layer8": 33, "pad": 25, "pad_1": 29,
}  # fmt: skip


SMALL, LARGE = "resnet8_int8.npz", "resnet_large_int8.npz"


class ResNet8(nn.Module):
    """A file's network in floats: images of 0..255, padded as TensorFlow does."""

    def __init__(self, arrays):
        super().__init__()
        plan = json.loads(str(arrays["plan"]))
        self.scales = {int(tensor): how for tensor, how in plan["act"].items()}
        for step in plan["plan"]:
            if step["op"] not in ("conv", "fc"):
                continue
            weight, bias, by = (torch.from_numpy(arrays[f"{kind}{step['idx']}"]).double() for kind in ("w", "b", "ws"))
            scale = self.scales[step["inp"]][0]
            if step["op"] == "conv":
                K, R, S, C = weight.shape
                layer = nn.Conv2d(C, K, (R, S), step["stride"], padding=R // 2 if step["stride"] == 1 else 0)
                weight, by_row = weight.permute(0, 3, 1, 2), by.view(-1, 1, 1, 1)
            else:
                layer, by_row = nn.Linear(weight.shape[1], weight.shape[0]), by
            layer.weight.data, layer.bias.data = (weight * by_row).float(), (bias * by * scale).float()
            setattr(self, f"layer{step['idx']}", layer)

    def forward(self, x):
        x = F.relu(self.layer0(x))
        x = F.relu(x + self.layer2(F.relu(self.layer1(x))))
        y = self.layer4(F.relu(self.layer3(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu(self.layer5(x) + y)
        y = self.layer7(F.relu(self.layer6(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu(self.layer8(x) + y)
        return self.layer9(x.mean((2, 3)))


def converted(file):
    """The network, and the ranges of its tensors: every value that a byte of the file may stand for."""
    arrays = np.load(real_data.path(f"mlperf_tiny_resnet8/{file}"))
    model = ResNet8(arrays).eval()
    how = {name: model.scales[tensor] for name, tensor in TENSORS.items()}
    ranges = {name: (scale * (-128 - zero), scale * (127 - zero)) for name, (scale, zero) in how.items()}
    return arrays, model, Scales(ranges, digest(model), images=0)


@needs_kernel
@pytest.mark.parametrize("file, images", [(SMALL, 16), (LARGE, 4)])
def test_weights_and_scales_are_the_files(monkeypatch, file, images):
    arrays, model, scales = converted(file)
    x = real_data.cifar10(count=images)[0].float()
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8, calibrate=scales)
    for index in range(9):
        weight, by_channel = quantized.quantized_weight(getattr(model, f"layer{index}").weight)
        assert np.array_equal(weight.permute(0, 2, 3, 1).numpy(), arrays[f"w{index}"])
        has_weights = weight.flatten(1).any(1)  # where all are 0, any scale will do
        expected = torch.from_numpy(arrays[f"ws{index}"])[has_weights]
        torch.testing.assert_close(by_channel.float()[has_weights], expected, rtol=3e-7, atol=0)
    regions = int8_regions(frozen, x)
    assert sum(len(region.convolutions) for region in regions) == 9
    kept = {how for region in regions for how in region.fragment.scales if how is not None}
    for scale, zero in (model.scales[tensor] for tensor in set(TENSORS.values())):
        expected = scale if zero == -128 else scale * max(128 + zero, 127 - zero) / 127  # u8, or s8 without zero point
        assert any(how.scale == pytest.approx(expected, rel=1e-12) and how.is_signed == (zero != -128) for how in kept)
    by_reference(monkeypatch)
    reference = fused_resnet.freeze(model, x, dtype=torch.int8, calibrate=scales)
    assert torch.equal(frozen(x), reference(x))


@pytest.mark.full
@needs_kernel
@pytest.mark.parametrize("file, images, right", [(SMALL, 10_000, 8697), (LARGE, 1000, 914)])
def test_accuracy(file, images, right):
    """On CIFAR-10's test images, beside the file's own arithmetic. MLPerf Tiny asks for 85 %."""
    _, model, scales = converted(file)
    x, labels = real_data.cifar10(count=images)
    frozen = fused_resnet.freeze(model, x[:250].float(), dtype=torch.int8, calibrate=scales)
    ours = real_data.predictions(frozen, x.float())
    theirs = real_data.predictions(real_data.refcheck().resnet8_int8(file), x)
    known = real_data.correct(theirs, labels)
    assert known == right and known >= 0.85 * images
    assert abs(real_data.correct(ours, labels) - known) <= 0.003 * images
    assert (ours != theirs).sum() <= 0.03 * images
