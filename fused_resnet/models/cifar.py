"""The CIFAR networks of He et al. 2015 (arXiv 1512.03385), section 4.2: depth 6n + 2, widths 16, 32, 64.

ResNets, and the plain networks that they are compared with: the same layers without shortcuts, which get worse beyond
some twenty layers. Option A shortcuts (zero-padded identity) are the paper's choice for CIFAR; option B projects with a
1x1 convolution. The pre-activation ResNets are those of He et al. 2016 (arXiv 1603.05027): also of depth 9n + 2, in
bottlenecks.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.models.resnet import init_conv_and_norm, zero_last_norms
from fused_resnet.models.weights import Source, load_weights
from fused_resnet.nn import BasicBlock, ConvBNAct, PreActBasicBlock, PreActBottleneck, conv1x1, conv3x3

INPUT_SHAPE = (3, 32, 32)
WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """The option-A shortcut: every `stride`-th row and column, and zero channels around those of x. No parameters.

    (N, C, H, W) -> (N, C + before + after, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, before={self.before}, after={self.after}"


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of n BasicBlocks, average pool, classifier. x: (N, 3, H, W) -> (N, num_classes).

    option: "A" or "B", the shortcut where a stage changes shape. inner_widths: channels between the two convolutions
    of each of the 3n blocks, for channel-pruned networks; None means as wide as the block's output. Keys are those of
    akamaster/pytorch_resnet_cifar10; `load_weights` also takes the names in `key_aliases`.
    Raises ValueError for another option or number of widths.
    """

    # other people's names for our children, component by component: distiller's classifier, akamaster's projections
    key_aliases = {"fc": "linear", "shortcut": "downsample"}

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        n: int,
        num_classes: int = 10,
        option: str = "A",
        inner_widths: Optional[Sequence[int]] = None,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if option not in ("A", "B"):
            raise ValueError(f"CifarResNet: option must be 'A' (zero padding) or 'B' (1x1 conv), got {option!r}.")
        if inner_widths is None:
            inner_widths = [planes for planes in WIDTHS for _ in range(n)]
        if len(inner_widths) != 3 * n:
            raise ValueError(
                f"CifarResNet: inner_widths needs one width for each of the {3 * n} blocks, got {len(inner_widths)}."
            )
        self.conv1 = conv3x3(3, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        inplanes = WIDTHS[0]
        for stage, planes in enumerate(WIDTHS):
            widths = inner_widths[stage * n : (stage + 1) * n]
            layer = nn.Sequential(_block(inplanes, planes, 1 if stage == 0 else 2, option, widths[0]))
            layer.extend(_block(planes, planes, 1, option, width) for width in widths[1:])
            setattr(self, f"layer{stage + 1}", layer)
            inplanes = planes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        init_conv_and_norm(self)
        if zero_init_residual:
            zero_last_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def _block(inplanes: int, planes: int, stride: int, option: str, inner_width: int) -> BasicBlock:
    downsample: Optional[nn.Module] = None
    if stride != 1 or inplanes != planes:
        added = planes - inplanes
        if option == "A":
            downsample = PadShortcut(stride, added // 2, added - added // 2)
        else:
            downsample = nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
    block = BasicBlock(inplanes, planes, stride, downsample)
    if inner_width != planes:
        block.conv1 = conv3x3(inplanes, inner_width, stride)
        block.bn1 = nn.BatchNorm2d(inner_width)
        block.conv2 = conv3x3(inner_width, planes)
    return block


class CifarPlain(nn.Module):
    """A 3x3 stem, three stages of 2n convolutions with BN and ReLU, average pool, classifier: a CifarResNet of option A
    without its shortcuts, with as many parameters. x: (N, 3, H, W) -> (N, num_classes).
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, n: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvBNAct(3, WIDTHS[0])
        inplanes = WIDTHS[0]
        for stage, planes in enumerate(WIDTHS):
            layer = nn.Sequential(ConvBNAct(inplanes, planes, stride=1 if stage == 0 else 2))
            layer.extend(ConvBNAct(planes, planes) for _ in range(2 * n - 1))
            setattr(self, f"layer{stage + 1}", layer)
            inplanes = planes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        init_conv_and_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class CifarPreActResNet(nn.Module):
    """A 3x3 stem, three stages of n pre-activation blocks, BN and ReLU, average pool, classifier.

    x: (N, 3, H, W) -> (N, num_classes). block: PreActBasicBlock or PreActBottleneck, whose outputs are four times as
    wide. option: "A" or "B", the shortcut where a stage changes shape. None is the paper's: A for basic blocks, B for
    bottlenecks. A pads x, B projects the activated x with a 1x1 convolution. The first block's shortcut starts behind
    its activation. The keys are our own, since there are no published weights with names that others share.
    Raises ValueError for another option.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        n: int,
        num_classes: int = 10,
        block: type[Union[PreActBasicBlock, PreActBottleneck]] = PreActBasicBlock,
        option: Optional[str] = None,
    ) -> None:
        super().__init__()
        if option not in (None, "A", "B"):
            raise ValueError(f"CifarPreActResNet: option must be 'A' (zero padding) or 'B' (1x1 conv), got {option!r}.")
        projects = (option or ("A" if block is PreActBasicBlock else "B")) == "B"
        self.conv1 = conv3x3(3, WIDTHS[0])
        inplanes = WIDTHS[0]
        for stage, planes in enumerate(WIDTHS):
            layer, stride, width = nn.Sequential(), 1 if stage == 0 else 2, planes * block.expansion
            for index in range(n):
                shortcut = None
                if index == 0 and (stride, inplanes) != (1, width):
                    added = width - inplanes
                    pads = PadShortcut(stride, added // 2, added - added // 2)
                    shortcut = conv1x1(inplanes, width, stride) if projects else pads
                is_activated = stage == index == 0 or projects and shortcut is not None
                step = stride if index == 0 else 1
                layer.append(block(inplanes, planes, step, shortcut, activated_shortcut=is_activated))
                inplanes = width
            setattr(self, f"layer{stage + 1}", layer)
        self.bn = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(inplanes, num_classes)
        init_conv_and_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.bn(x))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def _cifar(network: type[nn.Module], depth: int, weights: Optional[Source], progress: bool, **kwargs) -> Any:
    of_a_block = 9 if kwargs.get("block") is PreActBottleneck else 6
    model = network((depth - 2) // of_a_block, **kwargs)
    if weights is not None:
        load_weights(model, weights, progress=progress)
    return model


def resnet20(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarResNet:
    """ResNet-20, 0.27 M parameters. weights: what `load_weights` reads; kwargs: CifarResNet's."""
    return _cifar(CifarResNet, 20, weights, progress, **kwargs)


def resnet32(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarResNet:
    """ResNet-32, 0.46 M parameters. weights: what `load_weights` reads; kwargs: CifarResNet's."""
    return _cifar(CifarResNet, 32, weights, progress, **kwargs)


def resnet44(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarResNet:
    """ResNet-44, 0.66 M parameters. weights: what `load_weights` reads; kwargs: CifarResNet's."""
    return _cifar(CifarResNet, 44, weights, progress, **kwargs)


def resnet56(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarResNet:
    """ResNet-56, 0.85 M parameters. weights: what `load_weights` reads; kwargs: CifarResNet's."""
    return _cifar(CifarResNet, 56, weights, progress, **kwargs)


def resnet110(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarResNet:
    """ResNet-110, 1.7 M parameters. weights: what `load_weights` reads; kwargs: CifarResNet's."""
    return _cifar(CifarResNet, 110, weights, progress, **kwargs)


def resnet1202(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarResNet:
    """ResNet-1202, 19.4 M parameters. weights: what `load_weights` reads; kwargs: CifarResNet's."""
    return _cifar(CifarResNet, 1202, weights, progress, **kwargs)


def plain20(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPlain:
    """The plain network of 20 layers, 0.27 M parameters. weights: what `load_weights` reads; kwargs: CifarPlain's."""
    return _cifar(CifarPlain, 20, weights, progress, **kwargs)


def plain32(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPlain:
    """The plain network of 32 layers, 0.46 M parameters. weights: what `load_weights` reads; kwargs: CifarPlain's."""
    return _cifar(CifarPlain, 32, weights, progress, **kwargs)


def plain44(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPlain:
    """The plain network of 44 layers, 0.66 M parameters. weights: what `load_weights` reads; kwargs: CifarPlain's."""
    return _cifar(CifarPlain, 44, weights, progress, **kwargs)


def plain56(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPlain:
    """The plain network of 56 layers, 0.85 M parameters. weights: what `load_weights` reads; kwargs: CifarPlain's."""
    return _cifar(CifarPlain, 56, weights, progress, **kwargs)


def plain110(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPlain:
    """The plain network of 110 layers, 1.7 M parameters. weights: what `load_weights` reads; kwargs: CifarPlain's."""
    return _cifar(CifarPlain, 110, weights, progress, **kwargs)


def preact20(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-20, 0.27 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 20, weights, progress, **kwargs)


def preact32(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-32, 0.46 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 32, weights, progress, **kwargs)


def preact44(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-44, 0.66 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 44, weights, progress, **kwargs)


def preact56(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-56, 0.85 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 56, weights, progress, **kwargs)


def preact110(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-110, 1.7 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 110, weights, progress, **kwargs)


def preact164(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-164, in bottlenecks, 1.7 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 164, weights, progress, block=PreActBottleneck, **kwargs)


def preact1001(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-1001, in bottlenecks, 10.3 M parameters. kwargs: CifarPreActResNet's."""
    return _cifar(CifarPreActResNet, 1001, weights, progress, block=PreActBottleneck, **kwargs)
