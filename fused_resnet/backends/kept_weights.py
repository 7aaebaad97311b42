"""Copies of NCHW weights in channels_last memory, kept while the weight is what it was.

On CUDA ATen brings the weight of a channels_last convolution into channels_last memory at every call.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.operators.layout import channels_last

MOST = 1024  # weights of which copies are kept


class Kept(NamedTuple):
    """A weight as it was at its last call: where it lay, and its version. copy: None at the first call."""

    weight: weakref.ref
    data_ptr: int
    version: int
    stream: int
    copy: Optional[Tensor]


_kept: dict[int, Kept] = {}


def in_channels_last(weight: Tensor) -> Tensor:
    """The weight in channels_last memory: itself, or a copy, which from its second call on is kept.

    A weight that changes between any two calls, as in training, has no copy kept. Copies belong to one stream, and are
    dropped with the weight. What is captured in a CUDA graph makes a copy of its own.
    """
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    if not _may_keep(weight):
        return channels_last(weight)
    key, facts = id(weight), (weight.data_ptr(), weight._version, current_stream(weight))
    known = _kept.get(key)
    is_second = known is not None and known.weight() is weight and known[1:4] == facts
    if known is not None and known.copy is not None and is_second:
        return known.copy
    with torch.inference_mode(False):  # a copy made within could not be used outside
        copy = channels_last(weight.detach())
    if len(_kept) >= MOST and key not in _kept:
        _kept.pop(next(iter(_kept)), None)
    _kept[key] = Kept(weakref.ref(weight, lambda gone: _drop(key, gone)), *facts, copy if is_second else None)
    return copy


def _may_keep(weight: Tensor) -> bool:
    is_plain = type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_inference()  # which has no version
    is_free = not (weight.requires_grad and torch.is_grad_enabled()) and torch._C._len_torch_dispatch_stack() == 0
    return is_plain and is_free and _may_outlive(weight)


def _may_outlive(weight: Tensor) -> bool:
    """Whether memory of this call is there after it."""
    return weight.is_cuda and not torch.cuda.is_current_stream_capturing()


def current_stream(weight: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(weight.device.index)


def _drop(key: int, gone: weakref.ref) -> None:
    known = _kept.get(key)
    if known is not None and known.weight is gone:
        del _kept[key]
