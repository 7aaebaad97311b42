"""Residual blocks, plain and fused, with torchvision's constructors, attributes and keys."""

from fused_resnet.nn.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, conv1x1, conv3x3
from fused_resnet.nn.call import bn_act, conv_bn_act
from fused_resnet.nn.fused import ConvBNAct, FusedBasicBlock, FusedBlock, FusedBottleneck

__all__ = [
    "BasicBlock", "Bottleneck", "ConvBNAct", "FusedBasicBlock", "FusedBlock", "FusedBottleneck", "PreActBasicBlock",
    "PreActBottleneck", "bn_act", "conv1x1", "conv3x3", "conv_bn_act",
]  # fmt: skip
