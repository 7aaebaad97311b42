"""freeze: what a plan computes its convolutions, poolings and classifiers by."""

import torch
from torch import nn

import fused_resnet
from tests.support import networks
from tests.support.plans import X, as_good_as_plain


def test_parametrized_and_replaced_modules_are_called():
    model, x = networks.small(), torch.randn(X)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.layer2[0].bn1 = nn.GroupNorm(4, 12)
    model.layer3[0].relu = nn.SiLU()
    model.layer1[1].bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    as_good_as_plain(fused_resnet.freeze(model.eval(), x), model, x)
