"""Small residual networks for tests. How far a network is from itself in fp64 is `fused_resnet.testing.networks`."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.testing.networks import LUCK, allowed, error, has_winograd, in_fp64, randomize

__all__ = [
    "LUCK", "Gated", "Network", "Squeeze", "allowed", "blocks_of", "error", "has_winograd", "in_fp64", "randomize",
    "residual_block", "single", "small", "torchvision_like",
]  # fmt: skip

# torchvision's blocks as far as `fuse` sees them: their names, their attributes and a forward of this file's own.
_TORCHVISION_LIKE = """
from torch import nn
from fused_resnet.nn import BasicBlock as _Basic, Bottleneck as _Bottleneck


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, *args, **kwargs):
        super().__init__()
        for name, child in _Basic(*args, **kwargs).named_children():
            setattr(self, name, child)
        self.downsample = getattr(self, "downsample", None)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, *args, **kwargs):
        super().__init__()
        for name, child in _Bottleneck(*args, **kwargs).named_children():
            setattr(self, name, child)
        self.downsample = getattr(self, "downsample", None)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out
"""


def torchvision_like(folder, monkeypatch) -> ModuleType:
    """A module registered as torchvision.models.resnet, with blocks as torchvision writes them."""
    name = "torchvision.models.resnet"
    file = folder / "resnet.py"
    file.write_text(_TORCHVISION_LIKE)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


class Network(nn.Module):
    """A stem, three stages of residual blocks (two, one, one) and a classifier, all narrow. x: (N, 3, H, W)."""

    def __init__(self, block: type[nn.Module], **options) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.layer1 = nn.Sequential(
            residual_block(block, 16, 8, 1, **options),
            residual_block(block, 8 * block.expansion, 8, 1, **options),
        )
        self.layer2 = nn.Sequential(residual_block(block, 8 * block.expansion, 12, 2, **options))
        self.layer3 = nn.Sequential(residual_block(block, 12 * block.expansion, 16, 2, **options))
        self.fc = nn.Linear(16 * block.expansion, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def residual_block(block: type[nn.Module], inplanes: int, planes: int, stride: int, **options) -> nn.Module:
    """One block with a projection where the shape changes."""
    outplanes, downsample = planes * block.expansion, None
    if stride != 1 or outplanes != inplanes:
        downsample = nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))
    return block(inplanes, planes, stride, downsample, **options)


class Copies(nn.Module):
    """A shortcut of every second pixel and zero channels, a concatenation, and an upsampling. x: (N, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.c, self.d = nn.Conv2d(48, 33, 1), nn.Conv2d(33, 8, 3, 1, 1)
        self.pool, self.up = nn.MaxPool2d(3, 1, 1), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = F.relu(self.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5)))
        return F.relu(self.d(self.up(F.relu(self.c(torch.cat([y, self.pool(y)], 1))))))


def small(block: type[nn.Module] = BasicBlock, **options) -> nn.Module:
    """A Network, randomised, in eval mode. Its four blocks have three projections, or two with expansion 1."""
    return randomize(Network(block, **options))


def single(block: type[nn.Module] = BasicBlock, stride: int = 2, channels: int = 8, **options) -> nn.Module:
    """A residual_block, randomised, in eval mode. Input: (N, 16, H, W)."""
    return randomize(residual_block(block, 16, channels, stride, **options))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]


class Squeeze(nn.Module):
    """Squeeze and excitation. how: as timm has it, as torchvision does, or with a hard sigmoid by its function."""

    def __init__(self, channels, how):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, channels, 1)
        self.pool, self.act, self.scale_activation, self.how = nn.AdaptiveAvgPool2d(1), nn.SiLU(), nn.Sigmoid(), how

    def forward(self, x):
        if self.how == "torchvision":
            return self.scale_activation(self.fc2(self.act(self.fc1(self.pool(x))))) * x
        y = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * (y.sigmoid() if self.how == "timm" else F.hardsigmoid(y))


class GatedBlock(nn.Module):
    """A block with a gate behind its last convolution, or before it as in RegNet's."""

    def __init__(self, inputs, channels, stride, how):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.se, self.act, self.is_last = Squeeze(channels, how), nn.ReLU(inplace=True), how != "torchvision"
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y if self.is_last else self.se(y)))
        if self.is_last:
            y = self.se(y)
        y += self.shortcut(x)
        return self.act(y)


class Gated(nn.Sequential):
    """A network with a gate of each kind, odd channels, and one block without a sum behind its gate."""

    def __init__(self):
        stem = nn.Conv2d(3, 33, 3, 1, 1, bias=False), nn.BatchNorm2d(33), nn.ReLU()
        blocks = GatedBlock(33, 33, 1, "timm"), GatedBlock(33, 70, 2, "torchvision"), GatedBlock(70, 70, 1, "hard")
        tail = nn.Conv2d(70, 40, 1), Squeeze(40, "timm"), nn.Conv2d(40, 20, 1), nn.ReLU()
        super().__init__(*stem, *blocks, *tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))
