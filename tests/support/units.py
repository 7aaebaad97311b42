"""A module with children for any forward, and the forwards that several files of tests give it."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from tests.support import networks


class Config:
    scale = 2.0


class Gain:
    """Callable, and its answer may change."""

    value = 2.0

    def __call__(self):
        return self.value


class Writer(nn.Module):
    calls = 0

    def forward(self, x):
        return x.mul_(3)


class Unit(nn.Module):
    """The children that the forwards below use. x: (N, 6, H, W)."""

    total, history = 0, []

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = (
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, eps=1e-3)
        self.drop, self.pool, self.stages = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.ModuleList([nn.Hardtanh()])
        self.writer, self.dropout = Writer(), nn.Dropout2d(0.5)
        self.nested = nn.ModuleList([nn.ModuleList([nn.Hardtanh()])])
        self.skip = None
        self.scale, self.taps, self.config, self.kept = 1.0, ["a"], Config(), None
        self.gain, self.memory = Gain(), {"last": []}
        self.gain_of, self.partial = self.gain.__call__, functools.partial(self.gain)

    def stem(self, x):
        return self.act(self.bn(self.conv(x)))


def unit(forward, **changes):
    """A module with this forward, in eval mode."""
    cls = type("UnitUnderTest", (Unit,), {"forward": forward})
    made = networks.randomize(cls())
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def rewritten(module):
    return fused_resnet.fuse(copy.deepcopy(module))


def same(actual, expected):
    # sums in another order, and a norm by another formula: 1e-6 was seen
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def run(module, x, *args, **kwargs):
    with torch.no_grad():
        return module(x.clone(), *args, **kwargs)


def modules_only(self, x):
    return self.act(self.bn(self.conv(x)))


def functional_activation(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


def identity_between(self, x):
    return self.act(self.drop(self.bn(self.conv(x))))


def residual_of_both_kinds(self, x):
    out = self.bn2(self.conv2(self.stem(x)))
    out += x if self.skip is None else self.skip(x)
    return self.act(out)


def through_a_method_and_a_list(self, x):
    out = self.stem(x)
    for stage in self.stages:
        out = stage(out)
    return self.bn2(self.conv2(out))


def through_a_nested_list(self, x):
    out = self.stem(x)
    for stages in self.nested:
        for stage in stages:
            out = stage(out)
    return out


def optional_argument(self, x, scale=None):
    out = self.stem(x)
    return out if scale is None else out * scale
