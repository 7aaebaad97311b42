"""fuse and unfuse: change the class of residual blocks in place, and change it back.

A block is fused only when its forward is known to be the stock one. Everything else is left alone.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, NamedTuple, Optional, cast

from torch import nn

from fused_resnet import backends
from fused_resnet.nn import (
    BasicBlock,
    Bottleneck,
    ConvBNAct,
    FusedBasicBlock,
    FusedBlock,
    FusedBottleneck,
    why_not_fused,
)

log = logging.getLogger("fused_resnet")

# Blocks whose forward is ours to replace, by module and name, so that nothing has to be imported to recognise them.
_FUSED_CLASS = {
    (module, plain.__name__): fused
    for module in (BasicBlock.__module__, "torchvision.models.resnet")
    for plain, fused in ((BasicBlock, FusedBasicBlock), (Bottleneck, FusedBottleneck))
}


class LeftAlone(NamedTuple):
    """A module that looks like a residual block and was not fused."""

    name: str
    reason: str


def fuse(
    model: nn.Module,
    *,
    backend: str = "auto",
    strict: bool = False,
    filter_fn: Optional[Callable[[nn.Module, str], bool]] = None,
) -> nn.Module:
    """Make the residual blocks of `model` compute conv+BN(+add)+ReLU in one call each. In place; returns the model.

    Parameters, buffers, keys and hooks stay what they are; the model can be trained, saved, loaded and edited as
    before, and `unfuse` undoes it. Recognised: our BasicBlock and Bottleneck, and torchvision's, when their forward is
    the stock one. Fuse before torch.compile and fully_shard.

    backend: asked for by every fused block; "auto" chooses per problem. filter_fn(module, name) -> bool keeps blocks
    out. strict: raise ValueError when a block that looks fusible was left alone, or when there is none at all.

    Raises BackendError for an unknown backend and for one that cannot run live BN ("onednn", "cudnn"). A call that
    raises leaves the model as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected an nn.Module, got {type(model).__name__}.")
    backends.check_name("fuse", backend)
    chosen: list[tuple[Any, type]] = []
    left_alone = []
    for name, module in model.named_modules():
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if isinstance(module, (FusedBlock, ConvBNAct)):
            chosen.append((module, type(module)))
            continue
        fused_class, reason = _recognise(module)
        if fused_class is not None:
            chosen.append((module, fused_class))
        elif reason is not None:
            left_alone.append(LeftAlone(name or "the model", reason))
    if strict and (left_alone or not chosen):
        lines = [f"{name}: {reason}" for name, reason in left_alone] or ["no residual block was recognised"]
        raise ValueError("fuse: strict=True and some blocks cannot be fused:\n  " + "\n  ".join(lines))
    reason = backends.why_never_live(backend)
    if reason is not None and any(getattr(module, "has_norm", True) for module, _ in chosen):
        raise backends.BackendError(
            f"fuse: backend {backend!r} cannot run blocks with live BN: {reason}, or backend='auto'."
        )
    for module, fused_class in chosen:
        if type(module) is not fused_class:
            module._stock_class = type(module)
            module.__class__ = fused_class
        module.backend = backend
    log.info("fused %d blocks, left %d alone", len(chosen), len(left_alone))
    for name, reason in left_alone:
        log.info("left alone %s: %s", name, reason)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused block its plain class back. In place; returns the model."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.__class__ = module.__dict__.pop("_stock_class", module.plain_class)
            module.__dict__.pop("backend", None)
        elif isinstance(module, ConvBNAct):
            module.__dict__.pop("backend", None)
    return model


def _recognise(module: nn.Module) -> tuple[Optional[type], Optional[str]]:
    """(fused class, None), or (None, why this block is left alone), or (None, None) for what is no residual block."""
    cls = type(module)
    fused_class = _FUSED_CLASS.get((cls.__module__, cls.__name__))
    if fused_class is None:
        bases = [base for base in cls.__mro__ if (base.__module__, base.__name__) in _FUSED_CLASS]
        return None, f"{cls.__qualname__} is a subclass of {bases[0].__qualname__}" if bases else None
    if not _has_stock_forward(module, fused_class):
        return None, f"the forward of {cls.__qualname__} was replaced"
    missing = [name for name in sorted(_attributes(fused_class)) if not hasattr(module, name)]
    if missing:
        return None, f"it has no {missing[0]}"
    stages = [(getattr(module, conv), getattr(module, bn)) for conv, bn in fused_class.stage_names]
    reason = why_not_fused(cast(nn.Module, module.relu), stages)
    return (None, reason) if reason is not None else (fused_class, None)


def _has_stock_forward(module: nn.Module, fused_class: type) -> bool:
    """A patched forward may keep its name and module (functools.wraps), but not the attributes that its code reads
    and the file that its code comes from, which is the constructor's."""
    forward, cls = type(module).forward, type(module)
    code, constructor = getattr(forward, "__code__", None), getattr(cls.__init__, "__code__", None)
    if code is None or constructor is None or "forward" in module.__dict__ or cls.__call__ is not nn.Module.__call__:
        return False
    return (
        forward.__module__ == cls.__module__
        and forward.__qualname__ == f"{cls.__qualname__}.forward"
        and code.co_filename == constructor.co_filename
        and set(code.co_names) == _attributes(fused_class)
    )


def _attributes(fused_class: type[FusedBlock]) -> set[str]:
    """What the stock forward of this kind of block reads of the block."""
    return {"relu", "downsample"} | {attribute for stage in fused_class.stage_names for attribute in stage}
