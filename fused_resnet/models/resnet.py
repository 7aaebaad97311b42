"""ImageNet ResNets, ResNeXts and Wide ResNets with torchvision's constructors, initialisation and state_dict keys.

He et al. 2015 (arXiv 1512.03385), Xie et al. 2016 (arXiv 1611.05431), Zagoruyko and Komodakis 2016 (arXiv 1605.07146),
and SE-ResNet, Hu et al. 2017 (arXiv 1709.01507), with timm's keys.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from fused_resnet.models.weights import Source, load_weights
from fused_resnet.nn import BasicBlock, Bottleneck, conv1x1

INPUT_SHAPE = (3, 224, 224)
Block = Union[BasicBlock, Bottleneck]


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over the image)))): one gate per channel. x: (N, channels, H, W)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class SEBottleneck(Bottleneck):
    """Bottleneck with a gate on the residual branch: relu(se(bn3(conv3(...))) + shortcut(x)). Arguments: Bottleneck's.

    `fuse` gives each convolution its BN and, but for the last, its ReLU; the gate stands before the addition.
    """

    def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se = SqueezeExcitation(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, average pool, linear classifier. x: (N, 3, H, W) -> (N, num_classes).

    Arguments, attributes, keys and the order in which random numbers are drawn are torchvision's, so its checkpoints
    load and its seeds reproduce. `replace_stride_with_dilation` holds one flag for each of stages 2 to 4.
    `stride_in_1x1` puts a bottleneck's stride into its first 1x1 convolution, as in the paper, Caffe and Keras.
    Raises ValueError for a stride_in_1x1 with BasicBlock, which has no 1x1, and for a flag list of another length.
    """

    def __init__(
        self,
        block: type[Block],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Optional[Sequence[bool]] = None,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(
                f"ResNet: replace_stride_with_dilation needs one flag for each of the last three stages, got {dilate}."
            )
        if stride_in_1x1 and issubclass(block, BasicBlock):
            raise ValueError("ResNet: stride_in_1x1 needs Bottleneck blocks; BasicBlock has no 1x1 convolution.")
        self._block_options: dict[str, Any] = {"stride_in_1x1": True} if stride_in_1x1 else {}
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        init_conv_and_norm(self)
        if zero_init_residual:
            zero_last_norms(self)

    def _make_layer(
        self, block: type[Block], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        first_dilation = self.dilation  # the first block of a dilated stage still sees the undilated map
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        stage = nn.Sequential()
        for index in range(blocks):
            first = index == 0
            projected = first and (stride != 1 or self.inplanes != outplanes)
            downsample = None
            if projected:
                downsample = nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))
            stage.append(
                block(
                    self.inplanes,
                    planes,
                    stride if first else 1,
                    downsample,
                    self.groups,
                    self.base_width,
                    first_dilation if first else self.dilation,
                    self._norm_layer,
                    **self._block_options,
                )
            )
            self.inplanes = outplanes
        return stage

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def init_conv_and_norm(model: nn.Module) -> None:
    """He et al. 2015 (arXiv 1502.01852), fan-out, for convolutions; norms start as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def zero_last_norms(model: nn.Module) -> None:
    """Every residual branch starts as zero, every block as its shortcut: Goyal et al. 2017 (arXiv 1706.02677)."""
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            last: Any = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            if last.weight is not None:
                nn.init.zeros_(last.weight)


def _resnet(block, layers: Sequence[int], weights: Optional[Source], progress: bool, **kwargs) -> ResNet:
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        load_weights(model, weights, progress=progress)
    return model


def resnet18(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNet-18, 11.7 M parameters. weights: what `load_weights` reads; kwargs: ResNet's."""
    return _resnet(BasicBlock, (2, 2, 2, 2), weights, progress, **kwargs)


def resnet34(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNet-34, 21.8 M parameters. weights: what `load_weights` reads; kwargs: ResNet's."""
    return _resnet(BasicBlock, (3, 4, 6, 3), weights, progress, **kwargs)


def resnet50(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNet-50 v1.5 (v1 with stride_in_1x1=True), 25.6 M parameters. weights: what `load_weights` reads."""
    return _resnet(Bottleneck, (3, 4, 6, 3), weights, progress, **kwargs)


def resnet101(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNet-101 v1.5, 44.5 M parameters. weights: what `load_weights` reads; kwargs: ResNet's."""
    return _resnet(Bottleneck, (3, 4, 23, 3), weights, progress, **kwargs)


def resnet152(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNet-152 v1.5, 60.2 M parameters. weights: what `load_weights` reads; kwargs: ResNet's."""
    return _resnet(Bottleneck, (3, 8, 36, 3), weights, progress, **kwargs)


def resnext50_32x4d(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNeXt-50, 32 groups of 4 channels, 25.0 M parameters. weights: what `load_weights` reads."""
    return _resnet(Bottleneck, (3, 4, 6, 3), weights, progress, groups=32, width_per_group=4, **kwargs)


def resnext101_32x8d(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNeXt-101, 32 groups of 8 channels, 88.8 M parameters. weights: what `load_weights` reads."""
    return _resnet(Bottleneck, (3, 4, 23, 3), weights, progress, groups=32, width_per_group=8, **kwargs)


def resnext101_64x4d(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """ResNeXt-101, 64 groups of 4 channels, 83.5 M parameters. weights: what `load_weights` reads."""
    return _resnet(Bottleneck, (3, 4, 23, 3), weights, progress, groups=64, width_per_group=4, **kwargs)


def wide_resnet50_2(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """Wide ResNet-50, inner widths doubled, 68.9 M parameters. weights: what `load_weights` reads."""
    return _resnet(Bottleneck, (3, 4, 6, 3), weights, progress, width_per_group=128, **kwargs)


def wide_resnet101_2(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """Wide ResNet-101, inner widths doubled, 126.9 M parameters. weights: what `load_weights` reads."""
    return _resnet(Bottleneck, (3, 4, 23, 3), weights, progress, width_per_group=128, **kwargs)


def seresnet50(*, weights: Optional[Source] = None, progress: bool = True, **kwargs) -> ResNet:
    """SE-ResNet-50, 28.1 M parameters. weights: what `load_weights` reads; kwargs: ResNet's."""
    return _resnet(SEBottleneck, (3, 4, 6, 3), weights, progress, **kwargs)
