"""Watches a forward while it is traced: what it reads is noted, and what a graph would not show is refused."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
from types import FrameType
from typing import Any, Callable, Iterator, NoReturn, Optional, cast

from torch import nn

from fused_resnet.fusing.asked import (
    is_about_the_forward,
    is_torchs,
    mode_asked,
    module_name,
    owner_of,
    unseen_in,
    unseen_in_code,
    variable_written,
)
from fused_resnet.fusing.outside import Contents, holds_the_same
from fused_resnet.fusing.reads import is_plain, is_unchanging
from fused_resnet.machine.errors import one_line
from fused_resnet.nn.fused import plain_class_of

_LOOKUP = nn.Module.__getattr__.__code__


class CannotRewrite(Exception):
    """Why a module's forward stays as it is."""


class Watch:
    """What a forward reads of the module and of those inside, while it is traced. What it would write is refused."""

    def __init__(self, module: nn.Module) -> None:
        self.paths: dict[int, list[tuple[str, ...]]] = {}
        for name, child in module.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(child), []).append(tuple(name.split(".")) if name else ())
        self.read: set[tuple[tuple[str, ...], str]] = set()
        self.refusal: Optional[CannotRewrite] = None  # the first; the forward may have swallowed it
        self.outside = Contents()
        self._globals = plain_class_of(module).forward.__globals__
        self.in_forward = False
        self._lent: dict[int, tuple[str, Any, Any]] = {}
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def of_all_modules(self) -> Iterator[None]:
        """Patches nn.Module, as torch.fx does: an instance's dictionary is read without asking its class."""
        stock = {name: getattr(nn.Module, name) for name in ("__setattr__", "__delattr__")}
        watch = self

        def getattribute(module: nn.Module, name: str) -> Any:
            if not watch._is_asked(sys._getframe(1)):
                return super(nn.Module, module).__getattribute__(name)
            watch.read.update((path, name) for path in watch._paths_of(module))
            return watch._lend(module, name, super(nn.Module, module).__getattribute__(name))

        def write(kind: str) -> Callable:
            def checked(module: nn.Module, name: str, *value: Any) -> None:
                if watch.in_forward and threading.get_ident() == watch._thread:
                    watch.refuse(f"writes its attribute {watch._label(module, name)}")
                stock[kind](module, name, *value)

            return checked

        nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign, assignment]
        try:
            for kind in stock:
                setattr(nn.Module, kind, write(kind))
            yield
        finally:
            del nn.Module.__getattribute__
            for kind, function in stock.items():
                setattr(nn.Module, kind, function)

    @contextlib.contextmanager
    def of_all_calls(self) -> Iterator[None]:
        """Looks at what is called in this thread, and by whom. `check` refuses; the forward goes on."""
        profile: Any = sys.getprofile()
        sys.setprofile(self._look_at_call)
        try:
            yield
        finally:
            if hasattr(profile, "enable"):  # cProfile's, which sys.setprofile cannot put back
                profile.enable()
            else:
                sys.setprofile(profile)

    def _look_at_call(self, frame: FrameType, event: str, function: Any) -> None:
        if not self.in_forward or event not in ("call", "c_call", "c_exception"):
            return
        name = getattr(function, "__name__", "")
        if event == "call":
            what = unseen_in(frame) or self._written_by(frame)
            if self._is_the_forwards(frame):
                what = what or unseen_in_code(frame.f_code, variable_written)
                if what is not None:
                    raise self.note(CannotRewrite(f"its forward {what}"))  # before it is done
                self.outside.keep_named_in(frame)
        elif event == "c_call":
            what = mode_asked(name, frame)
        else:
            what = f"fails in torch's {name}()" if is_torchs(owner_of(function)) else None
        if what is not None:
            self.note(CannotRewrite(f"its forward {what}"))

    def _written_by(self, frame: FrameType) -> Optional[str]:
        """What a module's own __setattr__ or __delattr__ is about to do, which need not ask nn.Module's."""
        code = frame.f_code
        if code.co_name not in ("__setattr__", "__delattr__") or code.co_argcount < 2:
            return None
        module, name = (cast(Any, frame.f_locals.get(argument)) for argument in code.co_varnames[:2])
        return f"writes its attribute {self._label(module, name)}" if id(module) in self.paths else None

    def _is_the_forwards(self, frame: FrameType) -> bool:
        """Whether a function works for the forward, unlike an import or a callback of the garbage collector's."""
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return False
        name = module_name(frame)
        is_known = is_torchs(name) or name.partition(".")[0] in sys.stdlib_module_names
        return frame.f_globals is self._globals or not is_known and is_about_the_forward(frame)

    def note(self, error: Exception) -> CannotRewrite:
        """The first reason to refuse, which is this one where there was none."""
        if self.refusal is None:
            if not isinstance(error, CannotRewrite):
                error = CannotRewrite(f"torch.fx cannot trace its forward: {one_line(error)}")
            self.refusal = error
        return self.refusal

    def check(self) -> None:
        """Raises CannotRewrite for a forward that went on after its refusal, or wrote into a container that it read."""
        if self.refusal is not None:
            raise self.refusal
        for label, value, lent in self._lent.values():
            is_same = holds_the_same(lent, value) if label.endswith("_modules") else is_plain(lent) and lent == value
            if not is_same:
                raise CannotRewrite(f"its forward writes its attribute {label}")

    def _is_asked(self, asker: FrameType) -> bool:
        """Not by torch.fx, nor by the look-up in the dictionaries for what was asked for already."""
        if not self.in_forward or threading.get_ident() != self._thread or asker.f_code is _LOOKUP:
            return False
        return not asker.f_globals.get("__name__", "").startswith("torch.fx.")

    def _lend(self, module: nn.Module, name: str, value: Any) -> Any:
        """The value; of a container a copy, so that the module's own stays as it is."""
        if name == "__class__" or isinstance(value, nn.Module):
            return value
        if name != "_modules" and not is_unchanging(value, module):
            kind = type(value).__name__
            self.refuse(f"reads its attribute {self._label(module, name)}, a {kind}, which may change unseen")
        if not isinstance(value, (list, dict, set, tuple)):
            return value
        if id(value) not in self._lent:
            lent = dict(value) if name == "_modules" else copy.deepcopy(value)
            self._lent[id(value)] = (self._label(module, name), value, lent)
        return self._lent[id(value)][2]

    def _paths_of(self, module: nn.Module) -> list[tuple[str, ...]]:
        if id(module) not in self.paths:
            self.refuse(f"uses a {type(module).__name__} that is not one of its modules")
        return self.paths[id(module)]

    def _label(self, module: nn.Module, name: str) -> str:
        return ".".join((*self._paths_of(module)[0], name))

    def refuse(self, what: str) -> NoReturn:
        raise self.note(CannotRewrite(f"its forward {what}"))
