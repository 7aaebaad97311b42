"""Models that bring their scales, by FakeQuantize modules or by PT2E's quantize and dequantize nodes, in int8."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import fused_resnet
from fused_resnet.operators.quantized import Quantized
from fused_resnet.regions import kernels
from tests.support import networks
from tests.support.quantized import by_reference, int8_regions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min"),
]
RUNNING = [kernel for kernel in kernels.table() if kernel.dtype == torch.int8 and not kernel.why_not]
X = (2, 3, 16, 16)
WEIGHTS = quantization.default_per_channel_weight_fake_quant
AFFINE = quantization.FakeQuantize.with_args(
    observer=quantization.MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
)


class Block(nn.Module):
    """A stem, a residual block with a projection, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.shortcut, self.bn3 = nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12)
        self.relu1, self.relu2, self.fc = nn.ReLU(), nn.ReLU(), nn.Linear(12, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + self.bn3(self.shortcut(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def block():
    return networks.randomize(Block())


def aware(model, x, qconfig=None, backend="fbgemm"):
    """A model prepared for quantization-aware training, which has seen x."""
    found = quantization.get_default_qat_qconfig_mapping(backend)
    if qconfig is not None:
        found = quantization.QConfigMapping().set_global(qconfig)
    prepared = quantize_fx.prepare_qat_fx(copy.deepcopy(model).train(), found, (x,)).eval()
    with torch.no_grad():
        prepared(x)
    return prepared.apply(quantization.disable_observer)


def rounded_weight(layer):
    """The bytes of a QAT layer's weight, and their scales."""
    fake, weight = layer.weight_fake_quant, layer.weight
    if hasattr(layer, "bn"):
        factor = layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)
        weight = weight * factor.view(-1, 1, 1, 1)
    scale = fake.scale.expand(len(weight))
    steps = weight.detach() * (1 / scale).view(-1, *(1,) * (weight.dim() - 1))
    return steps.round().clamp(fake.quant_min, fake.quant_max).to(torch.int8), scale.double()


@pytest.fixture
def exact(monkeypatch):
    by_reference(monkeypatch)


# ------------------------------------------------------------------------------------------------ FakeQuantize modules


@pytest.mark.parametrize("backend", ("fbgemm", "qnnpack"))
def test_scales_and_weights_are_the_models(backend, exact):
    x = torch.randn(X)
    model = aware(block(), x, backend=backend)
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    (region,) = int8_regions(frozen, x)
    assert [conv.name.removeprefix("fused_model_") for conv in region.convolutions] == ["conv1", "conv2", "shortcut"]
    source, stem, projected, out, *_ = region.fragment.scales
    observed = [getattr(model, f"activation_post_process_{index}") for index in (1, 4)]
    assert [stem, out] == [Quantized(fake.scale.item(), False) for fake in observed]
    if backend == "fbgemm":  # of 7 bits, which fit s8 wherever their zero is
        assert source == Quantized(model.activation_post_process_0.scale.item(), True)
        assert projected == Quantized(model.activation_post_process_2.scale.item(), True)
        low, high = (limit - int(model.activation_post_process_2.zero_point) for limit in (0, 127))
        assert [(end.low, end.high) for end in list(region.epilogues.values())[:3]] == [(0, 127), (low, high), (0, 127)]
    places = dict(zip((0, 1, 2, 5), (model.conv1, model.conv2, model.shortcut, model.fc)))
    assert region.weights.keys() == places.keys()
    for place, layer in places.items():
        q, scales = rounded_weight(layer)
        assert torch.equal(region.weights[place].flatten(1), q.flatten(1)), place
        x_scale = region.fragment.scales[region.fragment.steps[place].x]
        if place < 3:
            wanted = x_scale.scale * scales / region.fragment.scales[1 + place].scale
            assert torch.equal(region.epilogues[place].multiplier, wanted.float())


@pytest.mark.parametrize("backend", ("fbgemm", "qnnpack"))
def test_answers_are_about_the_models(backend, exact):
    x = torch.randn(8, *X[1:])
    model = aware(block(), x, backend=backend)
    found = fused_resnet.agreement(model, fused_resnet.freeze(model, x, dtype=torch.int8), [x])
    assert found.sqnr_db > (28 if backend == "fbgemm" else 33)
