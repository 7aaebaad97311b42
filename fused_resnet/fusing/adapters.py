"""Other people's blocks: a forward of ours for a class of theirs, found by name, so that nothing has to be imported.

A block that `torch.fx` can trace needs no adapter (`rewriting`). An adapter is for the others, and for sums that
cross modules. `register` adds one:

>>> from fused_resnet import adapters
>>> from fused_resnet.nn import conv_bn_act
>>>
>>> @adapters.register("mylib.blocks.ResidualUnit", reads="conv_a bn_a relu conv_b bn_b skip", convs="conv_*")
... def residual_unit(block, x):
...     shortcut = x if block.skip is None else block.skip(x)
...     out = conv_bn_act(x, block.conv_a, block.bn_a, block.relu, backend=block.backend)
...     return conv_bn_act(out, block.conv_b, block.bn_b, block.relu, shortcut, block.backend)
"""

from __future__ import annotations

import fnmatch
from typing import Any, Callable, NamedTuple, Optional

from torch import fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.nn.fused import Fused
from fused_resnet.nn.stock import has_stock_code


class Adapter(NamedTuple):
    """forward(block, *args) computes what the class's own forward does, or returns NotImplemented to have it called."""

    forward: Callable[..., Any]
    reads: frozenset[str]
    convs: tuple[str, ...]
    why_not: Callable[[Any], Optional[str]]


_ADAPTERS: dict[str, Adapter] = {}


def register(
    *classes: str, reads: str, convs: str, why_not: Callable[[Any], Optional[str]] = lambda block: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `fuse` lets blocks of these classes compute by the decorated function, and `unfuse` undoes it.

    classes: "package.module.Class"; a subclass is not recognised. reads: the names that the class's own forward reads,
    of attributes, methods and globals (its __code__.co_names): a forward that was patched to do something else reads
    other names, and such a block is left alone. convs: patterns (fnmatch) of the convolutions that the function
    computes by `nn.conv_bn_act`, for counting; modules all of whose convolutions are among them are not fused again.
    why_not(block): the reason for which a block of these classes is left alone, or None.

    The function gets the block and its forward's arguments. It reads weights through `nn.conv_bn_act`, which calls the
    children where they were hooked or replaced. It calls other children itself. For a call that it does not cover it
    returns NotImplemented, and the block's own forward runs. The last registration of a class counts.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        adapter = Adapter(function, frozenset(reads.split()), tuple(convs.split()), why_not)
        _ADAPTERS.update(dict.fromkeys(classes, adapter))
        return function

    return decorate


def adapter_of_class(cls: type[nn.Module]) -> Optional[Adapter]:
    return _ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")


def adapter_of(module: nn.Module) -> tuple[Optional[Adapter], Optional[str]]:
    """(adapter, None), or (None, why this block of a registered class is left alone), or (None, None) for others."""
    cls = type(module)
    adapter = adapter_of_class(cls)
    if adapter is None:
        return None, None
    if "forward" in module.__dict__ or not has_stock_code(cls, cls.forward, adapter.reads):
        return None, f"the forward of {cls.__qualname__} was replaced"
    reason = adapter.why_not(module)
    return (adapter, None) if reason is None else (None, reason)


class Adapted(Fused):
    """A block that computes by the adapter registered for its plain class."""

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = adapter_of_class(self.plain_class)
        if adapter is None or _are_proxies((args, kwargs)):
            return NotImplemented
        return adapter.forward(self, *args, **kwargs)

    def fused_convs(self) -> list[str]:
        adapter = adapter_of_class(self.plain_class)
        return [] if adapter is None else convs_of(self, adapter)


def _are_proxies(arguments: tuple) -> bool:
    """Whether a call is part of a symbolic trace, which is to be that of the plain block."""
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(arguments))


def convs_of(module: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the convolutions of a module that an adapter computes."""
    convs = [name for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
    return [name for name in convs if any(fnmatch.fnmatchcase(name, pattern) for pattern in adapter.convs)]
