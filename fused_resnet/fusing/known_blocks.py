"""The adapters that ship: Hugging Face's ResNet and torchvision's DenseNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.fusing.adapters import register
from fused_resnet.nn import conv_bn_act
from fused_resnet.nn.stock import has_stock_code, why_called

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
    out = conv_bn_act(layer.relu1(layer.norm1(x)), layer.conv1, layer.norm2, layer.relu2, backend=layer.backend)
    return layer.conv2(out)
