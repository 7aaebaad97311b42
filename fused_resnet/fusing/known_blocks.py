"""The adapters that ship: Hugging Face's ResNet, torchvision's DenseNet, pre-activation blocks of ours and timm's."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_resnet.fusing.adapters import register
from fused_resnet.nn import bn_act, conv_bn_act
from fused_resnet.nn.bypass import why_not_fused, why_not_norm
from fused_resnet.nn.stock import has_stock_code, returns_its_input, why_called

_HF = "transformers.models.resnet.modeling_resnet"
_CONV_LAYER_READS = frozenset(("convolution", "normalization", "activation"))


@register(
    f"{_HF}.ResNetBasicLayer",
    f"{_HF}.ResNetBottleNeckLayer",
    reads="layer shortcut activation",
    convs="layer.*.convolution",
)
def _residual_layer(block: Any, x: Tensor) -> Any:
    """activation(layer(x) + shortcut(x)); the layer is a Sequential of convolution layers, the last not activated."""
    *first, last = block.layer
    if type(block.layer) is not nn.Sequential or why_called(block.layer) is not None:
        return NotImplemented
    if not all(_is_stock_conv_layer(layer) for layer in block.layer) or type(last.activation) is not nn.Identity:
        return NotImplemented
    out = x
    for layer in first:
        out = conv_bn_act(out, layer.convolution, layer.normalization, layer.activation, backend=block.backend)
    children = last.convolution, last.normalization, block.activation
    return conv_bn_act(out, *children, block.shortcut(x), block.backend, "out += residual")


def _is_stock_conv_layer(layer: nn.Module) -> bool:
    cls = type(layer)
    is_theirs = cls.__module__ == _HF and cls.__name__ == "ResNetConvLayer"
    return is_theirs and why_called(layer) is None and has_stock_code(cls, cls.forward, _CONV_LAYER_READS)


@register(
    "torchvision.models.densenet._DenseLayer",
    reads="isinstance Tensor memory_efficient any_requires_grad torch jit is_scripting Exception "
    "call_checkpoint_bottleneck bn_function conv2 relu2 norm2 drop_rate F dropout training",
    convs="conv1",
)
def _dense_layer(layer: Any, features: Any) -> Any:
    """conv2(relu2(norm2(conv1(relu1(norm1(cat(features))))))): the middle is a convolution with its norm."""
    inputs = [features] if isinstance(features, Tensor) else features
    recomputes = layer.memory_efficient and any(x.requires_grad for x in inputs)
    if recomputes or layer.drop_rate > 0 and layer.training:
        return NotImplemented
    x = features if isinstance(features, Tensor) else torch.cat(inputs, 1)
    x = bn_act(x, layer.norm1, layer.relu1, layer.backend)
    out = conv_bn_act(x, layer.conv1, layer.norm2, layer.relu2, backend=layer.backend)
    return conv_bn_act(out, layer.conv2, backend=layer.backend)


_OURS, _TIMM = "fused_resnet.nn.blocks", "timm.models.resnetv2"


def _why_not_preactivated(block: Any) -> Optional[str]:
    """Why a block whose first norm stands in front of all convolutions is left alone, or None."""
    first, *norms = _norms_of(block)
    convs = _convs_of(block)
    if any(isinstance(conv, nn.Conv2d) and type(conv) is not nn.Conv2d for conv in convs):
        kinds = sorted({type(conv).__name__ for conv in convs} - {"Conv2d"})
        return f"its convolutions are {', '.join(kinds)}, not nn.Conv2d, and its norms {type(first).__name__}"
    return why_not_norm(first, None) or why_not_fused(None, list(zip(convs, [*norms, None])))


def _norms_of(block: Any) -> list[Any]:
    prefix = "bn" if hasattr(block, "bn1") else "norm"
    return [getattr(block, f"{prefix}{index + 1}") for index in range(len(_convs_of(block)))]


def _convs_of(block: Any) -> list[Any]:
    return [block.conv1, block.conv2, *([block.conv3] if hasattr(block, "conv3") else [])]


def _projected(downsample: Any, x: Tensor, backend: str) -> Tensor:
    """downsample(x). A convolution, which may be timm's with a norm that does nothing, need not keep x."""
    cls, conv = type(downsample), downsample
    is_timms = f"{cls.__module__}.{cls.__qualname__}" == f"{_TIMM}.DownsampleConv" and why_called(downsample) is None
    if is_timms and has_stock_code(cls, cls.forward, frozenset(("norm", "conv"))):
        conv = downsample.conv if returns_its_input(downsample.norm) else downsample
    return conv_bn_act(x, conv, backend=backend) if type(conv) is nn.Conv2d else downsample(x)


def _branch(block: Any, x: Tensor, act: Optional[nn.Module], residual: Optional[Tensor], sum: str) -> Tensor:
    """What the convolutions of a block make of x, its activated input, plus the residual."""
    *convs, last = _convs_of(block)
    for conv, bn in zip(convs, _norms_of(block)[1:]):
        x = conv_bn_act(x, conv, bn, act, backend=block.backend)
    return conv_bn_act(x, last, None, None, residual, block.backend, sum)


@register(
    f"{_OURS}.PreActBasicBlock",
    reads="relu bn1 conv1 conv2 bn2 activated_shortcut downsample",
    convs="conv1 conv2",
    why_not=_why_not_preactivated,
)
@register(
    f"{_OURS}.PreActBottleneck",
    reads="relu bn1 conv1 conv2 bn2 conv3 bn3 activated_shortcut downsample",
    convs="conv1 conv2 conv3",
    why_not=_why_not_preactivated,
)
def _preactivated(block: Any, x: Tensor) -> Any:
    activated = bn_act(x, block.bn1, block.relu, block.backend)
    shortcut = activated if block.activated_shortcut else x
    if block.downsample is not None:
        shortcut = _projected(block.downsample, shortcut, block.backend)
    return _branch(block, activated, block.relu, shortcut, "out += residual")


@register(
    f"{_TIMM}.PreActBasic",
    reads="norm1 downsample conv1 conv2 norm2 drop_path",
    convs="conv1 conv2",
    why_not=_why_not_preactivated,
)
@register(
    f"{_TIMM}.PreActBottleneck",
    reads="norm1 downsample conv1 conv2 norm2 conv3 norm3 drop_path",
    convs="conv1 conv2 conv3",
    why_not=_why_not_preactivated,
)
def _timms_preactivated(block: Any, x: Tensor) -> Any:
    activated = bn_act(x, block.norm1, None, block.backend)
    shortcut = x if block.downsample is None else _projected(block.downsample, activated, block.backend)
    if returns_its_input(block.drop_path):
        return _branch(block, activated, None, shortcut, "out + residual")
    return block.drop_path(_branch(block, activated, None, None, "out + residual")) + shortcut
