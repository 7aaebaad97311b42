"""fuse and unfuse: change the class of modules in place, and change it back.

A residual block of ours or torchvision's is fused when its forward is known to be the stock one. So is a block of a
class with an adapter (`adapters`). Any other module is fused where its forward can be rewritten (`rewriting`).
Everything else is left alone.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, NamedTuple, Optional, Sequence, cast

from torch import fx, nn

import fused_resnet.fusing.known_blocks  # noqa: F401  registers its adapters
from fused_resnet import backends
from fused_resnet.fusing import adapters, classes, rewriting
from fused_resnet.fusing.adapters import Adapted
from fused_resnet.fusing.rewriting import Rewritten
from fused_resnet.graphs.spelling import has_convolutions
from fused_resnet.machine.errors import one_line
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct, FusedBasicBlock, FusedBlock, FusedBottleneck
from fused_resnet.nn.bypass import why_not_fused
from fused_resnet.nn.fused import Fused, Fusion, fused_shortcut, plain_class_of, set_class
from fused_resnet.nn.norms import may_be_norm
from fused_resnet.nn.stock import has_stock_code, returns_its_input

log = logging.getLogger("fused_resnet")

# Blocks whose forward is ours to replace, by module and name, so that nothing has to be imported to recognise them.
_FUSED_CLASS = {
    (module, plain.__name__): fused
    for module in (BasicBlock.__module__, "torchvision.models.resnet")
    for plain, fused in ((BasicBlock, FusedBasicBlock), (Bottleneck, FusedBottleneck))
}
# What says how a module is pickled; a fused one is pickled by its plain class and its state.
_PICKLED_BY = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")


class LeftAlone(NamedTuple):
    """A module that looks as if it could be fused, and was not, or a convolution without the norm that follows it."""

    name: str
    reason: str


class _Change(NamedTuple):
    """What `fuse` is about to set of a module, its class and its Fusion, and what that means for others."""

    module: Any
    cls: type[nn.Module]
    fused: Fusion
    has_norm: bool
    claims: Sequence[nn.Module] = ()  # modules that it computes itself, so that they need not be fused
    left: tuple[tuple[str, str], ...] = ()  # convolutions inside without the norm that follows them, and why


def fuse(
    model: nn.Module,
    *,
    backend: str = "auto",
    strict: bool = False,
    filter_fn: Optional[Callable[[nn.Module, str], bool]] = None,
) -> nn.Module:
    """Make the modules of `model` compute conv+BN(+add)+activation in one call each. In place; returns the model.

    Parameters, buffers, keys and hooks stay what they are. The model can be trained, saved, loaded and edited as
    before, and `unfuse` undoes it. `fused_convs` lists the convolutions. Fuse before torch.compile and fully_shard.
    Fused are:

    - our residual blocks and torchvision's
    - blocks with an adapter (`adapters.register`): those of transformers' ResNet, of torchvision's DenseNet, of our and
      timm's pre-activation ResNets
    - inside every other module with convolutions of its own, the sequences that torch.fx sees in its forward
      (`rewriting`): timm's blocks, stems, VGG, Inception, RegNet

    backend: asked for by everything fused; "auto" chooses per problem. filter_fn(module, name) -> bool: a module for
    which it is false is not fused by this call. The modules inside are asked about too, among them a residual block's
    downsample, which the block then calls. Convolutions, norms and activations are not kept by themselves, since they
    belong to the forward that calls them. Nor is what an adapter computes, which belongs to the block.
    strict: raise ValueError where one of these is so:

    - a module with a convolution and a norm or an activation was left alone
    - a convolution was left without its norm
    - there is nothing to fuse

    Raises BackendError for an unknown backend and for one that cannot run live BN ("onednn", "cudnn"). A call that
    raises leaves the model as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected an nn.Module, got {type(model).__name__}.")
    backends.check_name("fuse", backend)
    changes, skipped = _survey(model, filter_fn)
    if strict and (skipped or not changes):
        lines = [f"{name}: {reason}" for name, reason in skipped] or ["no convolution was found that can be fused"]
        raise ValueError("fuse: strict=True and some blocks cannot be fused:\n  " + "\n  ".join(lines))
    reason = backends.why_never_live(backend)
    if reason is not None and any(change.has_norm for change in changes):
        raise backends.BackendError(
            f"fuse: backend {backend!r} cannot run blocks with live BN: {reason}, or backend='auto'."
        )
    before = [(module, type(module), module.__dict__.get("_fused_resnet")) for module, *_ in changes]
    try:
        for module, cls, fused, *_ in changes:
            _become(module, cls, fused._replace(backend=backend))
    except BaseException:
        for module, cls, was_fused in before:
            _become(module, cls, was_fused)
        raise
    log.info("fused %d modules (%d convolutions), left %d alone", len(changes), len(fused_convs(model)), len(skipped))
    for name, reason in skipped:
        log.info("left alone %s: %s", name, reason)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module its plain class back, and every ConvBNAct the backend it had. In place; returns the
    model."""
    for module in model.modules():
        if issubclass(type(module), (Fused, ConvBNAct)):  # which, unlike isinstance, asks nothing of the module
            _become(module, plain_class_of(module), None)
    return model


def _become(module: nn.Module, cls: type[nn.Module], fused: Optional[Fusion]) -> None:
    """Give a module this class and this value of `_fused_resnet`, or none."""
    set_class(module, cls)
    module.__dict__.pop("_fused_resnet", None)
    if fused is not None:
        module.__dict__["_fused_resnet"] = fused


def left_alone(model: nn.Module) -> list[LeftAlone]:
    """What `fuse` finds in `model` that looks as if it could be fused, and cannot."""
    return _survey(model, None)[1]


def fused_convs(model: nn.Module) -> list[str]:
    """Names of the convolutions that `model`, fused and in eval mode, computes in one call with what follows them."""
    names = []
    for name, module in model.named_modules():
        fused: Any = module
        if issubclass(type(module), (Fused, ConvBNAct)):
            names += [f"{name}.{conv}" if name else conv for conv in fused.fused_convs()]
    return names


def _survey(
    model: nn.Module, filter_fn: Optional[Callable[[nn.Module, str], bool]]
) -> tuple[list[_Change], list[LeftAlone]]:
    """What `fuse` would change in `model`, and what it would leave alone."""
    named = list(model.named_modules())
    kept = {id(module) for name, module in named if filter_fn is not None and not filter_fn(module, name)}
    changes: list[_Change] = []
    skipped = []
    claimed: set[int] = set()
    for name, module in named:
        if id(module) in kept | claimed:
            continue
        try:
            change, reason = _change_of(module, kept)
        except Exception as error:  # a module may do anything when it is looked at
            change, reason = None, f"it cannot be looked at: {one_line(error)}"
        if change is not None:
            changes.append(change)
            claimed.update(map(id, change.claims))
            skipped += [LeftAlone(f"{name}.{conv}" if name else conv, why) for conv, why in change.left]
        elif reason is not None:
            skipped.append(LeftAlone(name or "the model", reason))
    return changes, skipped


def _change_of(module: nn.Module, kept: set[int]) -> tuple[Optional[_Change], Optional[str]]:
    """(change, None), or (None, why this module is left alone), or (None, None) where there is nothing to fuse.

    kept: the modules inside that must run their own forward, by id.
    """
    if type(module).__module__.startswith("torch.ao."):
        return None, _why_not_quantizations(module)
    if isinstance(module, ConvBNAct):
        if type(module).backend is not ConvBNAct.backend:
            return None, _name_taken("backend")
        return _Change(module, type(module), Fusion(), module.has_norm), None
    block, reason = _residual_block(module, kept)
    if block is not None or reason is not None:
        return block, reason
    if not isinstance(module, Fused) or isinstance(module, Adapted):
        adapted, reason = _adapted(module)
        if adapted is not None or reason is not None:
            return adapted, reason
    return _rewritten(module)


def _why_not_quantizations(module: nn.Module) -> Optional[str]:
    """Why one of torch.ao's modules is left alone, if it could be fused."""
    if not any(isinstance(child, nn.Conv2d) for child in _own_children(module)):
        return None
    return f"quantization knows a {type(module).__qualname__} of torch.ao by its class"


def _residual_block(module: Any, kept: set[int]) -> tuple[Optional[_Change], Optional[str]]:
    """Our blocks and torchvision's."""
    if isinstance(module, FusedBlock) and type(module).backend is not FusedBlock.backend:
        return None, _name_taken("backend")
    fused_class, reason = (type(module), None) if isinstance(module, FusedBlock) else _recognise(module)
    if fused_class is None:
        return None, reason
    calls_downsample = id(module.downsample) in kept
    is_claimed = not calls_downsample and fused_shortcut(module.downsample) is not None
    fused = Fusion(stock_class=plain_class_of(module), calls_downsample=calls_downsample)
    return _Change(module, fused_class, fused, True, [module.downsample] if is_claimed else []), None


def _adapted(module: Any) -> tuple[Optional[_Change], Optional[str]]:
    if isinstance(module, Adapted):
        adapter, reason = adapters.adapter_of_class(module.plain_class), None
    else:
        adapter, reason = adapters.adapter_of(module)
    if adapter is not None:
        reason = _why_not_reclassed(module, Adapted)
    if adapter is None or reason is not None:
        return None, reason
    computed = {id(module.get_submodule(name)) for name in adapters.convs_of(module, adapter)}
    claims = [child for child in module.modules() if child is not module and _convs_in(child) <= computed]
    return _Change(module, _class_of_kind(module, Adapted), Fusion(), True, claims), None


def _convs_in(module: nn.Module) -> set[int]:
    return {id(child) for child in module.modules() if isinstance(child, nn.Conv2d)}


def _rewritten(module: nn.Module) -> tuple[Optional[_Change], Optional[str]]:
    children = _own_children(module)
    if not any(isinstance(child, nn.Conv2d) for child in children):
        if isinstance(module, fx.GraphModule) and has_convolutions(module.graph):
            return None, "its convolutions are functions: fuse what it was exported from, or freeze it"
        return None, None
    programs, error = rewriting.programs_of(module)
    if not programs:
        others = [child for child in children if may_be_norm(child) or _is_activation(child)]
        return None, str(error) if others or isinstance(error, rewriting.NormUnfolded) else None
    reason = _why_not_reclassed(module, Rewritten)
    if reason is not None:
        return None, reason
    cls, eval_program = _class_of_kind(module, Rewritten), programs[False]
    return _Change(module, cls, Fusion(programs=programs), eval_program.has_norm, left=eval_program.left), None


def _is_activation(module: nn.Module) -> bool:
    return why_not_fused(module, []) is None and not returns_its_input(module)


def _class_of_kind(module: Any, kind: type[Fused]) -> Any:
    """The class by which a module is fused: its own where it is of this kind already."""
    cls = type(module)
    return cls if issubclass(cls, kind) else classes.fused_class(kind, plain_class_of(module))


def _why_not_reclassed(module: Any, kind: Any) -> Optional[str]:
    """Why a module that is not fused yet cannot be given a class of this kind, or None."""
    if isinstance(module, Fused):
        return None
    cls: Any = type(module)
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _PICKLED_BY):
        return f"{cls.__qualname__} has its own way to be pickled"
    reason = _why_name_taken(module, classes.fused_class(kind, nn.Module), nn.Module)
    if reason is not None:
        return reason
    try:  # it may forbid subclasses, or have a layout that no other class has
        set_class(module, classes.fused_class(kind, cls))
    except Exception as error:
        return f"its class cannot be replaced: {one_line(error)}"
    set_class(module, cls)
    return None


def _why_name_taken(module: nn.Module, fused: type, plain: type) -> Optional[str]:
    """Why a module may not get a fused class that adds names to a plain one's: it has one of them already."""
    taken = sorted((set(dir(fused)) - set(dir(plain))) & set(dir(module)))
    return _name_taken(taken[0]) if taken else None


def _name_taken(name: str) -> str:
    return f"its attribute {name} has a name that fused modules use for something else"


def _own_children(module: nn.Module) -> list[nn.Module]:
    """Children, and those of lists and dicts of modules, whose parent is this module's forward."""
    lists = (nn.ModuleList, nn.ModuleDict)
    if type(module) in lists:
        return []
    children = list(module.children())
    return children + [inner for child in children if type(child) in lists for inner in child.children()]


def _recognise(module: nn.Module) -> tuple[Optional[type], Optional[str]]:
    """(fused class, None), or (None, why this block is left alone), or (None, None) for what is no residual block."""
    cls = type(module)
    fused_class = _FUSED_CLASS.get((cls.__module__, cls.__name__))
    if fused_class is None:
        return None, None
    if "forward" in module.__dict__ or not has_stock_code(cls, cls.forward, frozenset(_attributes(fused_class))):
        return None, f"the forward of {cls.__qualname__} was replaced"
    missing = [name for name in sorted(_attributes(fused_class)) if not hasattr(module, name)]
    if missing:
        return None, f"it has no {missing[0]}"
    stages = [(getattr(module, conv), getattr(module, bn)) for conv, bn in fused_class.stage_names]
    reason = why_not_fused(cast(nn.Module, module.relu), stages)
    reason = reason or _why_name_taken(module, fused_class, fused_class.plain_class)
    return (None, reason) if reason is not None else (fused_class, None)


def _attributes(fused_class: type[FusedBlock]) -> set[str]:
    """What the stock forward of this kind of block reads of the block."""
    return {"relu", "downsample"} | {attribute for stage in fused_class.stage_names for attribute in stage}
