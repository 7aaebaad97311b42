"""What counts as a batch norm, and what it is as a value: torch's own, and other people's, known by their forward."""

from __future__ import annotations

import fnmatch
import functools
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.nn.stock import ACTIVATION_OF, has_stock_code, returns_its_input, why_called


class Norm(NamedTuple):
    """A norm as a value: what a convolution is folded with, or computes live in its own call.

    (x - running_mean) / sqrt(running_var + eps) * weight + bias, then the modules that the norm calls with the result.
    Called, it is F.batch_norm in eval mode: it stands for one that a forward calls itself.
    """

    weight: Optional[Tensor]
    bias: Optional[Tensor]
    running_mean: Tensor
    running_var: Tensor
    eps: float
    then: tuple[nn.Module, ...] = ()
    training: bool = False
    promotes: bool = False  # the result has the wider dtype of x's and the vectors', not x's
    is_torchs: bool = False  # in training mode it takes and keeps statistics as nn.BatchNorm2d or nn.SyncBatchNorm do

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    @property
    def activation(self) -> tuple[str, tuple[nn.Module, ...]]:
        """The activation that a convolution may compute with the norm, and the modules to be called after that."""
        if self.then and type(self.then[0]) in ACTIVATION_OF and why_called(self.then[0]) is None:
            return ACTIVATION_OF[type(self.then[0])], self.then[1:]
        return "none", self.then


class _NormKind(NamedTuple):
    """What the forward of a class of norms does. then: the children that it calls with the result, where it has them.

    has_modes: F.batch_norm, with the batch's statistics in training mode; others multiply by their buffers as they are.
    is_torchs: as Norm's. eps: where the forward has it as a constant.
    """

    then: tuple[str, ...] = ()
    has_modes: bool = True
    is_torchs: bool = False
    eps: Optional[float] = None


_THEN = ("drop", "act")
_FROZEN_READS = "weight bias running_mean running_var reshape rsqrt"
_BATCH_NORM_READS = "F batch_norm weight bias running_mean running_var eps"
_MODE_READS = "training momentum track_running_stats num_batches_tracked add_ float"
# Other people's norms: the class, and the names that its forward reads. Nothing is imported to recognise them.
_KNOWN_NORMS = (
    ("torchvision.ops.misc.FrozenBatchNorm2d", f"{_FROZEN_READS} eps", _NormKind(has_modes=False)),
    ("timm.layers.norm_act.FrozenBatchNormAct2d", f"{_FROZEN_READS} eps drop act", _NormKind(_THEN, has_modes=False)),
    (
        "timm.layers.norm_act.BatchNormAct2d",
        f"{_BATCH_NORM_READS} {_MODE_READS} _assert ndim drop act",
        _NormKind(_THEN, is_torchs=True),
    ),
    ("timm.layers.norm_act.SyncBatchNormAct", "super forward hasattr drop act", _NormKind(_THEN, is_torchs=True)),
    (
        "timm.layers.split_batchnorm.SplitBatchNorm2d",
        "training shape num_splits split super forward enumerate aux_bn append torch cat hasattr drop act",
        _NormKind(_THEN),
    ),
    ("transformers.models.*FrozenBatchNorm2d", _FROZEN_READS, _NormKind(has_modes=False, eps=1e-5)),
    (
        "detectron2.layers.batch_norm.FrozenBatchNorm2d",
        f"{_BATCH_NORM_READS} requires_grad torch backends cudnn enabled",
        _NormKind(has_modes=False),
    ),
)


def norm_of(bn: Any) -> Optional[Norm]:
    """A norm as a value, as it is now; None of a module that is none (`is_norm`)."""
    if bn is None or type(bn) is Norm:
        return bn
    if type(bn) is nn.BatchNorm2d:  # at once: this runs at every call
        weight, bias, mean, var, eps = _attributes(bn, Norm._fields[:5])
        return Norm(weight, bias, mean, var, eps, (), bn.training, False, True)
    kind = _norm_kind(bn)
    if kind is None:
        return None
    called = (getattr(bn, name) for name in kind.then if hasattr(bn, name))
    then = tuple(module for module in called if not returns_its_input(module))
    eps = bn.eps if kind.eps is None else kind.eps
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return Norm(*vectors, eps, then, kind.has_modes and bn.training, not kind.has_modes, kind.is_torchs)


def _attributes(module: nn.Module, names: tuple[str, ...]) -> list:
    """Attributes that a module's class has none of. nn.Module looks parameters and buffers up in a microsecond each."""
    if not torch.compiler.is_compiling():  # Dynamo reads them one by one
        own = module.__dict__
        found = own["_buffers"] | own["_parameters"] | own
        try:
            return [found[name] for name in names]
        except KeyError:
            pass
    return [getattr(module, name) for name in names]


def why_not_bn(bn: Any) -> Optional[str]:
    """None of a norm that has a value in eval mode, else the reason."""
    if type(bn) is nn.BatchNorm2d and not torch.compiler.is_compiling():  # at once: this runs at every call
        statistics = bn._buffers
        if statistics.get("running_mean") is not None and statistics.get("running_var") is not None:
            return None
    norm = norm_of(bn)
    if norm is None:
        return f"the norm is {type(bn).__name__}, not nn.BatchNorm2d"
    if norm.running_mean is None or norm.running_var is None:
        return f"the {type(bn).__name__} keeps no running statistics"
    return None


def is_norm(module: Any) -> bool:
    """Whether `norm_of` knows it: nn.BatchNorm2d, nn.SyncBatchNorm, subclasses with the same forward, other people's
    whose forward is the one they were written with, and a Norm."""
    return type(module) in (nn.BatchNorm2d, Norm) or _norm_kind(module) is not None


def may_be_norm(module: Any) -> bool:
    """Whether a module looks like a batch norm, whatever its forward does."""
    is_torchs = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_torchs or isinstance(module, nn.Module) and isinstance(getattr(module, "running_var", None), Tensor)


def _norm_kind(module: Any) -> Optional[_NormKind]:
    cls = type(module)
    return _kind_of_class(cls, getattr(cls, "forward", None))


def _kind_of_class(cls: Any, forward: Any) -> Optional[_NormKind]:
    return _kind_by_code(cls, forward)


# what torch.compiler.assume_constant_result sets, without the import of Dynamo, which cannot follow `_kind_by_code`
_kind_of_class._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=None)
def _kind_by_code(cls: Any, forward: Any) -> Optional[_NormKind]:
    """forward: the class's own now; a class that gets another one is looked at again."""
    is_called_plainly = issubclass(cls, nn.Module) and cls.__call__ is nn.Module.__call__
    # a property or constant in the place of what modules keep: a parametrization, say
    if not is_called_plainly or any(hasattr(cls, name) for name in Norm._fields[:5]):
        return None
    if forward is nn.SyncBatchNorm.forward:
        is_theirs = cls._check_input_dim is nn.SyncBatchNorm._check_input_dim
        return _NormKind(is_torchs=True) if is_theirs else None
    if forward is nn.BatchNorm2d.forward:
        return _NormKind(is_torchs=True) if _takes_images(cls._check_input_dim) else None
    written: Any = next((base for base in cls.__mro__ if base.__dict__.get("forward") is forward), None)
    for name, reads, kind in _KNOWN_NORMS if written is not None else ():
        is_named = fnmatch.fnmatchcase(f"{written.__module__}.{written.__qualname__}", name)
        if is_named and has_stock_code(written, forward, frozenset(reads.split())):
            return kind if kind.eps in (None, *forward.__code__.co_consts) else None
    return None


def _takes_images(check: Any) -> bool:
    """Whether a norm's check of its input is BatchNorm2d's, or one that names nothing and so does nothing (mmcv's)."""
    code = getattr(check, "__code__", None)
    return check is nn.BatchNorm2d._check_input_dim or code is not None and not code.co_names + code.co_freevars
