"""freeze: what a plan computes its convolutions, poolings and classifiers by."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.freezing import lowering
from fused_resnet.freezing.modules import FrozenLinear
from tests.support import networks
from tests.support.plans import X, as_good_as_plain, needs_onednn


def test_folding_by_hand():
    conv, bn = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1.0).eval()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        for tensor, value in (
            (conv.bias, (1, -1)), (bn.weight, (4, -2)), (bn.bias, (0.5, 0)), (bn.running_mean, (2, 1)),
            (bn.running_var, (3, 8)),
        ):  # fmt: skip
            tensor.copy_(torch.tensor(value))
    weight, bias = lowering.folded_weights(conv, bn, torch.float32)
    assert torch.equal(weight.flatten(), torch.tensor([2 * 4 / 2.0, 3 * -2 / 3.0]))
    torch.testing.assert_close(bias, torch.tensor([(1 - 2) * 2 + 0.5, (-1 - 1) * -2 / 3]))
    assert lowering.folded_weights(nn.Conv2d(1, 1, 1, bias=False), None, torch.float32)[1] is None


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), (1, 2), (0, 1)), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, 1, 0, dilation=2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_max_pooling_is_torchs(pool, dtype):
    model, x = nn.Sequential(pool, nn.ReLU()).eval(), torch.randn(2, 5, 11, 8, dtype=dtype)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    assert torch.equal(frozen(x), model(x)) and torch.equal(frozen(x[:1]), model(x[:1]))


@pytest.mark.parametrize(
    "change", [dict(padding=1), dict(padding=[1, 1]), dict(padding=(1,), stride=2), dict(dilation=1)]
)
def test_windows_as_torch_takes_them(change):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    vars(conv).update(change)
    model, x = nn.Sequential(conv, nn.MaxPool2d((3,), stride=(2,))).eval(), torch.randn(2, 16, 9, 9)
    assert networks.error(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x)) < 1e-5


def test_pooling_of_integers_is_left_alone():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(torch.round(self.conv(x) * 9).int())

    model, x = Rounded().eval(), torch.randn(1, 3, 8, 8)
    assert (fused_resnet.freeze(model, x)(x) - model(x)).abs().max() <= 1


@needs_onednn
def test_a_classifier_is_packed_and_right():
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    packed = [m for m in frozen.plan(x).modules() if isinstance(m, FrozenLinear)]
    assert len(packed) == 1 and not any(type(m) is nn.Linear for m in frozen.plan(x).modules())
    as_good_as_plain(frozen, model, x)
    with torch.no_grad():
        model.fc.weight.zero_()
    assert frozen(x).abs().sum() > 0


def test_parametrized_and_replaced_modules_are_called():
    model, x = networks.small(), torch.randn(X)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.layer2[0].bn1 = nn.GroupNorm(4, 12)
    model.layer3[0].relu = nn.SiLU()
    model.layer1[1].bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    as_good_as_plain(fused_resnet.freeze(model.eval(), x), model, x)
