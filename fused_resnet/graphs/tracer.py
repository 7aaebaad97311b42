"""A tracer of torch.fx that keeps what torch.fx alone loses.

- `a += b` writes a's memory.
- Default arguments are what the model sees, not proxies.
- Other threads may call modules while one is traced.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import threading
from typing import Any, Callable

from torch import Tensor, fx, nn

from fused_resnet.machine.locks import new_rlock
from fused_resnet.nn.norms import is_norm

AUGMENTED = {f"i{name}" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}

# torch.fx patches nn.Module while it traces: one trace at a time, or the patches of two are undone in the wrong order.
TRACING = new_rlock()


class Proxy(fx.Proxy):
    """Keeps `a += b` the write to a's memory that it is; torch.fx alone records a new tensor."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):  # `a.data = b`, which torch.fx alone forgets
            raise WritesState(f"the attribute {name} of a tensor")
        super().__setattr__(name, value)


def _augmented(operation: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in AUGMENTED:
    setattr(Proxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Traces into modules that are not torch's own; a fused one shows its plain form, because its input is a proxy.

    While it runs, every module call of the process comes by: those of other threads pass through.
    """

    proxy_class = Proxy

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self.used: dict[int, tuple[Tensor, int]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self.proxy_class(node, self)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, Tensor):
            self.used.setdefault(id(a), (a, count_writes(a)))
        if not issubclass(kind, dict) or kind is dict:
            return super().create_arg(a)
        items = [(key, self.create_arg(value)) for key, value in a.items()]
        if kind is collections.OrderedDict:  # torch.fx alone makes a dict of it
            return self.create_node("call_function", kind, (items,), {})
        if dataclasses.is_dataclass(kind):  # a ModelOutput of transformers
            return self.create_node("call_function", kind, (), dict(items))
        raise NotImplementedError(f"a {kind.__name__} cannot be made in a graph")

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, nn.Sequential):
            return False
        return is_norm(module) or super().is_leaf_module(module, qualified_name)

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class Unfaithful(RuntimeError):
    """A graph would not go on doing what the model does."""


class WritesState(Unfaithful):
    """The forward writes what a graph would not write again. what: part of a sentence."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it writes {what}, which a graph would not write again")
        self.what = what


def count_writes(tensor: Tensor) -> int:
    """How often its memory was written to, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version
