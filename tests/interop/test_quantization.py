"""Fused models in torch's quantization, by eager mode and by torch.fx."""

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import fused_resnet
from fused_resnet.fusing import convert
from fused_resnet.nn import BasicBlock, ConvBNAct
from tests.support import networks
from tests.support.snapshots import snapshot, unchanged


class Quantizable(nn.Module):
    """What torch.ao.quantization.fuse_modules has something to do with."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv3, self.relu3 = nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.rest(self.bn2(self.conv2(x)))
        return self.dequant(self.relu3(self.conv3(x)))


GROUPS = [["conv1", "bn1", "relu1"], ["conv2", "bn2"], ["rest.0", "rest.1", "rest.2"], ["conv3", "relu3"]]


def quantized(steps, training):
    """The result of a model that goes through these steps, and its convolutions' classes."""
    torch.manual_seed(0)
    model, x = networks.randomize(Quantizable()).train(training), torch.randn(4, 3, 12, 12)
    for step in steps:
        if step == "fuse":
            fused_resnet.fuse(model)
        elif step == "fuse_modules":
            (quantization.fuse_modules_qat if training else quantization.fuse_modules)(model, GROUPS, inplace=True)
        elif step == "prepare":
            default = quantization.get_default_qat_qconfig if training else quantization.get_default_qconfig
            model.qconfig = default(torch.backends.quantized.engine)
            model = (quantization.prepare_qat if training else quantization.prepare)(model)
        elif step == "calibrate":
            model(x)
        else:
            model = quantization.convert(model.eval())
    return model(x), {name: type(module) for name, module in model.named_modules() if "Conv" in type(module).__name__}


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("at", ((0,), (1,), (2,), (3,), (4,), (0, 2), (1, 2)), ids=str)
def test_eager_mode_quantization(at, training):
    """Wherever in the flow the model is fused, and where it is fused again."""
    flow = ["fuse_modules", "prepare", "calibrate", "convert"]
    expected, classes = quantized(flow, training)
    for position in reversed(at):
        flow.insert(position, "fuse")
    actual, ours = quantized(flow, training)
    assert ours == classes and any("quantized" in kind.__module__ for kind in classes.values())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("make", (lambda: networks.Network(BasicBlock), lambda: nn.Sequential(ConvBNAct(3, 8))))
def test_fx_graph_mode_quantization(make, at, training):
    def result(*steps):
        torch.manual_seed(0)
        model, x = networks.randomize(make()).train(training), torch.randn(4, 3, 12, 12)
        for step in steps:
            if step == "fuse":
                fused_resnet.fuse(model)
            elif step == "prepare":
                prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
                model = prepare(model, quantization.get_default_qconfig_mapping(), (x,))
            elif step == "calibrate":
                model(x)
            else:
                model = quantize_fx.convert_fx(model.eval())
        return model(x)

    flow = ["prepare", "calibrate", "convert"]
    assert torch.equal(result(*flow[:at], "fuse", *flow[at:]), result(*flow))


@pytest.mark.parametrize("has_qconfig", (False, True))
def test_the_modules_of_torch_ao_are_left_alone_with_a_reason(has_qconfig):
    model = networks.randomize(Quantizable())
    if has_qconfig:
        model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    model = quantization.fuse_modules(model, GROUPS)
    before = snapshot(model)
    fused_resnet.fuse(model)
    unchanged(model, before)
    reasons = {name: reason for name, reason in convert.left_alone(model) if name != "the model"}
    assert list(reasons) == ["conv1", "rest.0", "conv3"]
    assert set(reasons.values()) == {"quantization knows a ConvReLU2d of torch.ao by its class"}
