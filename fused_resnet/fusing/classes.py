"""Classes made for modules that nobody knows: what a module was, with a forward of ours."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fused_resnet.nn.fused import Fused


@functools.lru_cache(maxsize=None)
def fused_class(kind: type[Fused], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a `plain` module that computes by `kind`, a subclass of both.

    Its forward shows the plain signature, for exporters. Copies and pickles name the kind and the plain class, so that
    it need not be importable.
    """

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    def reduced(self: Any, protocol: Any) -> tuple:
        state: Any = kind.__reduce_ex__(self, protocol)[2:]
        return _restored, (kind, plain), *state

    contents = {"plain_class": plain, "forward": forward, "__reduce_ex__": reduced, "__doc__": plain.__doc__}
    # tracers decide by the name of the class's module what is one node
    contents["__module__"] = plain.__module__
    return type(f"Fused{plain.__name__}", (kind, plain), contents)


def _restored(kind: type[Fused], plain: type[nn.Module]) -> nn.Module:
    cls = fused_class(kind, plain)
    return cls.__new__(cls)
