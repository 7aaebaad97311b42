"""Whether a convolution, a norm and an activation may be computed together instead of being called one by one."""

from __future__ import annotations

from typing import Optional, Union, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from fused_resnet.nn.norms import Norm, norm_of, why_not_bn
from fused_resnet.nn.stock import ACTIVATION_OF, why_called


def why_not_fused(act: Optional[nn.Module], stages: list) -> Optional[str]:
    """None when this activation and these (conv, bn) pairs may be bypassed, else the reason. Cheap: runs every call."""
    if torch_module._has_any_global_hook():
        return "a global module hook is installed"
    for child in (act, *(child for stage in stages for child in stage)):
        reason = None if child is None or type(child) is Norm else why_called(child)
        if reason is not None:
            return reason
    if act is not None and type(act) not in ACTIVATION_OF:
        return f"the activation is {type(act).__name__}, not nn.ReLU, nn.ReLU6 or nn.SiLU"
    for conv, bn in stages:
        reason = why_not_conv_bn(conv, bn)
        if reason is not None:
            return reason
        if act is not None and type(bn) is not nn.BatchNorm2d and bn is not None and cast(Norm, norm_of(bn)).then:
            return f"the {type(bn).__name__} has an activation of its own"
    return None


def why_not_norm(bn: Union[nn.Module, Norm], act: Optional[nn.Module]) -> Optional[str]:
    """None when this norm, which no convolution is in front of, and this activation may be bypassed, else the reason.
    Cheap: runs every call."""
    reason = why_not_fused(act, [])
    if reason is None and type(bn) is not Norm:
        reason = why_called(cast(nn.Module, bn))
    return reason or why_not_bn(bn)


def why_not_conv_bn(conv: nn.Module, bn: Union[nn.Module, Norm, None]) -> Optional[str]:
    """None when conv and bn are plain ones whose parameters may be read instead of calling them."""
    if type(conv) is not nn.Conv2d:
        return f"the convolution is {type(conv).__name__}, not nn.Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding_mode={conv.padding_mode!r} with padding={conv.padding!r}"
    reason = None if bn is None else why_not_bn(bn)
    if reason is not None:
        return reason
    if not _is_plain_tensor(conv.weight):
        return f"the weight is a {type(conv.weight).__name__}, not a plain parameter"
    return None


def _is_plain_tensor(value) -> bool:
    return type(value) in (nn.Parameter, torch.Tensor, FakeTensor)  # torch.export shows parameters as fake tensors
