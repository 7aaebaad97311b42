"""Values in a trace of a forward that is to be rewritten."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from torch import Tensor, fx

from fused_resnet.graphs.tracer import Proxy


class WatchedProxy(Proxy):
    """A value of which the rewritten forward may not depend in ways that torch.fx does not record."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self):  # type: ignore[override]
        # isinstance asks here, and the proxy's answer would not be the value's
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if not asker.startswith("torch."):
            self.tracer.watch.refuse("asks for the class of a value")
        return WatchedProxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return _Attribute(self, name)

    def _look(self, *_: Any) -> NoReturn:
        self.tracer.watch.refuse("looks at a value, which torch.fx cannot trace")

    __len__ = __int__ = __float__ = __complex__ = __array__ = __setitem__ = _look  # type: ignore[assignment]


class _Attribute(WatchedProxy, fx.proxy.Attribute):
    """What an attribute of a value gives: a shape, a method."""

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)
