"""What a forward read of its module and of those inside, and whether that still holds."""

from __future__ import annotations

import copy
import enum
import functools
import inspect
from types import MethodType
from typing import Any, Iterable, NamedTuple, Optional

import torch
from torch import nn

from fused_resnet.fusing.proxies import WatchedProxy
from fused_resnet.nn.fused import plain_class_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLAIN_VALUES = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device)
_MISSING = object()


class Reads(NamedTuple):
    """What a forward read of its module. As long as it holds, the graph does what the forward does."""

    seen: tuple[tuple[tuple[str, ...], str, Any], ...]  # path of the module, name of the attribute, what it was
    ties: tuple[tuple[tuple[str, ...], ...], ...]  # paths of modules and tensors that were the same

    def hold(self, module: nn.Module) -> bool:
        is_seen = all(_seen(module, path, name) == value for path, name, value in self.seen)
        return is_seen and all(_is_tied(module, paths) for paths in self.ties)


def reads_of(module: nn.Module, names: Iterable[tuple[tuple[str, ...], str]]) -> Reads:
    """These attributes as they are now: the path of a module, and the name of its attribute."""
    seen = tuple((path, name, _copied(_seen(module, path, name))) for path, name in names)
    return Reads(seen, _ties(module, seen))


def _copied(value: Any) -> Any:
    """To compare with later."""
    return copy.deepcopy(value) if is_plain(value) else value


def _seen(module: Any, path: tuple[str, ...], name: str) -> Any:
    """What a forward learns from an attribute of the module at `path`, beside the numbers in it: two modules that
    agree in this run alike.
    """
    for part in path:
        module = module._modules.get(part)
        if module is None:
            return _MISSING
    modules, tensors = module._modules, (module._parameters, module._buffers)
    if name == "_modules":
        return _kinds(module)
    if name in modules:
        return _kind(modules[name])
    if any(name in named for named in tensors):
        return any(named.get(name) is not None for named in tensors)
    value = getattr(module, name, _MISSING)
    if isinstance(value, nn.Module):  # a property that gives a child
        return _kind(value)
    return value.__func__ if isinstance(value, MethodType) else value  # which torch 2.11's Dynamo can follow


def _kind(child: Optional[nn.Module]) -> Any:
    """The class of a child; of a container, also of what is in it, which a forward may go through."""
    return (plain_class_of(child), _kinds(child)) if isinstance(child, CONTAINERS) else plain_class_of(child)


def _kinds(container: nn.Module) -> tuple:
    return tuple((name, _kind(child)) for name, child in container._modules.items())


def _ties(module: Any, seen: tuple) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The paths at which a forward read the same module or tensor, where there are several. A graph has one of them."""
    places: dict[int, list[tuple[str, ...]]] = {}
    for path, name, _ in seen:
        owner = module.get_submodule(".".join(path))
        for child in owner._modules if name == "_modules" else [name]:
            thing = _child(owner, child)
            if thing is not None and (*path, child) not in places.setdefault(id(thing), []):
                places[id(thing)].append((*path, child))
    return tuple(tuple(paths) for paths in places.values() if len(paths) > 1)


def _child(module: Any, name: str) -> Any:
    """The module, parameter or buffer of this name, or None."""
    for named in (module._modules, module._parameters, module._buffers):
        if name in named:
            return named[name]
    return None


def _is_tied(module: Any, paths: tuple[tuple[str, ...], ...]) -> bool:
    things = [functools.reduce(_child, path, module) for path in paths]
    return all(thing is things[0] for thing in things)


def is_unchanging(value: Any, module: nn.Module) -> bool:
    """Whether an attribute's value is known as long as it compares equal. A method is, of the module itself."""
    if inspect.ismethod(value):
        return value.__self__ is module or isinstance(value.__self__, type)
    return inspect.isroutine(value) or is_plain(value)


def is_plain(value: Any) -> bool:
    if issubclass(type(value), WatchedProxy):  # which answers no isinstance
        return False
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_plain(part) for part in value)
    return isinstance(value, _PLAIN_VALUES)
