"""Modules that compute their class's forward another way, and remember their plain class."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fused_resnet.nn.fused import Fused


class FusedForward(Fused):
    """A module whose class was replaced by one that computes the same another way, and is a subclass of its own class.

    Children, parameters, keys and hooks are the module's. `plain_class.forward` runs wherever `fused_forward` returns
    NotImplemented. Copies and pickles name the plain class, so that the fused one need not be importable.
    """

    kind: type["FusedForward"]

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.fused_forward(*args, **kwargs)
        return self.plain_class.forward(self, *args, **kwargs) if out is NotImplemented else out

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state: Any = super().__reduce_ex__(protocol)[2:]
        return _restored, (self.kind, self.plain_class), *state


@functools.lru_cache(maxsize=None)
def fused_class(kind: type[FusedForward], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a `plain` module that computes by `kind`. Its forward shows the plain signature, for exporters."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    # tracers decide by the name of the class's module what is one node
    contents = {"kind": kind, "plain_class": plain, "forward": forward, "__doc__": plain.__doc__}
    contents["__module__"] = plain.__module__
    return type(f"Fused{plain.__name__}", (kind, plain), contents)


def _restored(kind: type[FusedForward], plain: type[nn.Module]) -> nn.Module:
    cls = fused_class(kind, plain)
    return cls.__new__(cls)
