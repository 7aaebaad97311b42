"""What a trace leaves as it was: containers, objects and classes outside a module, and the attributes inside."""

from __future__ import annotations

import collections
import operator
from types import FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from fused_resnet.fusing.asked import COLLECTIONS, is_torchs

_NO_CONTENT = (ModuleType, FunctionType, nn.Module, Tensor, fx.Proxy)  # or none that is kept
_MISSING = object()


class Contents:
    """Containers, objects and classes outside the module, each with its content as it was when first seen."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[str, Any, Any]] = {}

    def keep_named_in(self, frame: FrameType) -> None:
        """What the code of a function that is being called names and does not make itself."""
        for name in frame.f_code.co_names:
            self.keep(name, frame.f_globals.get(name))
        for name in frame.f_code.co_freevars:
            self.keep(name, frame.f_locals.get(name))

    def keep(self, name: str, value: Any) -> None:
        content = None if id(value) in self._before else _content(value)
        if content is None:
            return
        self._before[id(value)] = (name, value, content)
        for key, part in content.items() if isinstance(content, dict) else enumerate(content):
            if issubclass(type(part), COLLECTIONS):
                self.keep(f"{key}, an attribute of a class" if issubclass(type(value), type) else name, part)

    def put_back(self) -> list[str]:
        """The names of what was written since, which is as before now."""
        written = []
        for name, value, content in self._before.values():
            now = _content(value)
            if not holds_the_same(now, content):
                if isinstance(value, type):
                    key = next(key for key in {**now, **content} if _differ(now, content, key))
                    name = f"{key}, an attribute of a class"
                written.append(name)
                _restore(value, content)
        return written


def attributes_put_back(before: list[tuple[str, nn.Module, dict]]) -> list[str]:
    """The names of the attributes that modules got past nn.Module.__setattr__, and have no more."""
    written = []
    for path, module, own in before:
        now = vars(module)
        if not holds_the_same(now, own):
            name = next((key for key in {**own, **now} if _differ(now, own, key)), "__dict__")
            written.append(f"{path}.{name}" if path else name)
            _restore(module, own)
    return written


def holds_the_same(value: Any, content: Any) -> bool:
    """Whether a dictionary or list still holds the very same things."""
    if isinstance(content, list):
        return len(value) == len(content) and all(map(operator.is_, value, content))
    return list(value) == list(content) and all(value[key] is content[key] for key in content)


def _differ(now: dict, content: dict, key: Any) -> bool:
    return now.get(key, _MISSING) is not content.get(key, _MISSING)


def _content(value: Any) -> Any:
    """What is in a container, object or class that code outside torch may write, or None."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict(value)
    if issubclass(kind, COLLECTIONS):
        return list(value)
    if issubclass(kind, _NO_CONTENT) or is_torchs(value.__module__ if issubclass(kind, type) else kind.__module__):
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _restore(value: Any, content: Any) -> None:
    if isinstance(value, type):
        now = dict(vars(value))
        for name in set(now) - set(content):
            delattr(value, name)
        for name in content:
            if _differ(now, content, name):
                setattr(value, name, content[name])
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, (dict, set, collections.deque)):
        value.clear()
        (value.extend if isinstance(value, collections.deque) else value.update)(content)
    else:
        vars(value).clear()
        vars(value).update(content)
