"""A module's own forward with its conv -> BN -> (+ residual) -> activation sequences in one call each. For `fuse`.

`programs_of` traces one module's forward with torch.fx, its children as they are called, and replaces what `matching`
finds by calls of `nn.conv_bn_act` that read the live children. Why the rewritten forward may stand for the original:

- What torch.fx cannot see is refused or checked. The trace is taken twice, with gradients on and off, and both must
  agree; code that asks for a tensor's class, changes the gradient mode or autocast, draws random numbers, writes
  attributes of any module or into the containers there, or takes anything but one tensor is refused. Every attribute
  that the forward read of the module or of one inside is compared on each call: where one has changed, or a child
  became another kind of module, the original forward runs. There is a program for training mode and one for eval
  mode. A class whose forward was replaced since runs the new one.
- What a child does is not assumed. A child of a sequence that was hooked, replaced or parametrized is called
  (`nn.conv_bn_act`), and every other child is called anyway. A child that torch does not know may write the memory
  that it is given, and no convolution is moved past such a write to its input.
- What a call passes decides too: the program is for one positional tensor; other calls run the original forward.

Not seen: a forward whose path depends on a global variable that changes later, or on `type(x) is ...` of a tensor.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import random
import sys
import threading
from types import FrameType
from typing import Any, Callable, Iterator, NamedTuple, NoReturn, Optional

import torch
from torch import Tensor, fx, nn

from fused_resnet.adapters import FusedForward, fused_class
from fused_resnet.matching import Match, activation_of, matches
from fused_resnet.nn import conv_bn_act
from fused_resnet.tracing import (
    TRACING,
    Proxy,
    Tracer,
    has_stock_call,
    module_of,
    returns_its_input,
    skip_identities,
    writes_in_place,
)

_PLAIN_VALUES = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_KNOWN_FUNCTIONS = {"torch", "_operator", "operator", "builtins", "math", "collections"}
_LOOKUP = nn.Module.__getattr__.__code__
_MISSING = object()


class CannotRewrite(Exception):
    """Why a module's forward stays as it is."""


class Program(NamedTuple):
    """A rewritten forward, and what must hold for it to compute what the original does."""

    run: Callable[[nn.Module, Tensor], Any]
    convs: tuple[str, ...]
    original: Callable[..., Any]
    state: tuple[tuple[tuple[str, ...], str, Any], ...]  # what the forward read: path of the module, name, value
    skipped: tuple[str, ...]  # modules that return their input and are not called

    def holds(self, module: Any, args: tuple) -> bool:
        return (
            len(args) == 1
            and isinstance(args[0], Tensor)
            and module.plain_class.forward is self.original
            and all(_seen(module, path, name) == value for path, name, value in self.state)
            and all(returns_its_input(module.get_submodule(name)) for name in self.skipped)
        )


class Rewritten(FusedForward):
    """A module that runs the program of its mode where it holds, else its own forward."""

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self.__dict__.get("_programs", {}).get(self.training)
        if program is None or kwargs or not program.holds(self, args):
            return NotImplemented
        return program.run(self, *args)

    def fused_convs(self) -> list[str]:
        program = self.__dict__.get("_programs", {}).get(False)
        return [] if program is None else list(program.convs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        restore, what, state, *rest = super().__reduce_ex__(protocol)
        return restore, what, {name: value for name, value in state.items() if name != "_programs"}, *rest

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__["_programs"] = programs_of(self)[0]


def programs_of(module: nn.Module) -> tuple[dict[bool, Program], Optional[str]]:
    """(the module's programs by `training`, None), or ({}, why it has none). The module is left as it was."""
    programs: dict[bool, Program] = {}
    reason = None
    for training in (True, False):
        try:
            programs[training] = _program_of(module, training)
        except CannotRewrite as error:
            reason = str(error)
    return (programs, None) if False in programs else ({}, reason)


def rewrite(module: nn.Module, programs: dict[bool, Program]) -> None:
    """Have a module run these programs. In place."""
    if not isinstance(module, Rewritten):
        module.__class__ = fused_class(Rewritten, type(module))
    module.__dict__["_programs"] = programs


# --------------------------------------------------------------------------------------------------------- tracing


class _Proxy(Proxy):
    """A value of which the rewritten forward may not depend in ways that torch.fx does not record."""

    @property
    def __class__(self):  # type: ignore[override]
        # isinstance asks here, and the proxy's answer would not be the value's
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.startswith("torch."):
            return _Proxy
        raise CannotRewrite("its forward asks for the class of a value")

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)


class _Watch:
    """What a forward reads of the module and of those inside, while it is traced. What it would write is refused."""

    def __init__(self, module: nn.Module) -> None:
        self.paths: dict[int, list[tuple[str, ...]]] = {}
        for name, child in module.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(child), []).append(tuple(name.split(".")) if name else ())
        self.read: set[tuple[tuple[str, ...], str]] = set()
        self.refusal: Optional[CannotRewrite] = None
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
                    watch._refuse(f"writes its attribute {watch._label(module, name)}")
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

    def check(self) -> None:
        """Raises CannotRewrite for a forward that caught its refusal, or wrote into a container that it read."""
        if self.refusal is not None:
            raise self.refusal
        for label, value, lent in self._lent.values():
            is_same = _same(lent, value) if label.endswith("_modules") else _is_plain(lent) and lent == value
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
        if name != "_modules" and not _is_unchanging(value, module):
            kind = type(value).__name__
            self._refuse(f"reads its attribute {self._label(module, name)}, a {kind}, which may change unseen")
        if not isinstance(value, (list, dict, set, tuple)):
            return value
        if id(value) not in self._lent:
            lent = dict(value) if name == "_modules" else copy.deepcopy(value)
            self._lent[id(value)] = (self._label(module, name), value, lent)
        return self._lent[id(value)][2]

    def _paths_of(self, module: nn.Module) -> list[tuple[str, ...]]:
        if id(module) not in self.paths:
            self._refuse(f"uses a {type(module).__name__} that is not one of its modules")
        return self.paths[id(module)]

    def _label(self, module: nn.Module, name: str) -> str:
        return ".".join((*self._paths_of(module)[0], name))

    def _refuse(self, what: str) -> NoReturn:
        self.refusal = CannotRewrite(f"its forward {what}")
        raise self.refusal


class _Tracer(Tracer):
    """Traces one module; its children are calls. Refuses what a graph does not show."""

    proxy_class = _Proxy

    def trace(self, root: Any, concrete_args: Optional[dict[str, Any]] = None) -> fx.Graph:
        self._modes = _modes()
        self._tensors = {id(tensor): name for name, tensor in (*root.named_buffers(), *root.named_parameters())}
        return super().trace(root, concrete_args)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Also buffers are proxies: what is done with their values belongs into the graph."""
        if threading.get_ident() != self._thread or id(attr_val) not in self._tensors:
            return attr_val
        name = self._tensors[id(attr_val)]
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Tensor):
            raise CannotRewrite("its forward makes a tensor, which a graph would keep")
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise CannotRewrite("its forward changes the gradient mode or autocast")
        if kind == "call_function" and getattr(target, "__module__", "").split(".")[0] not in _KNOWN_FUNCTIONS:
            raise CannotRewrite(f"its forward calls {getattr(target, '__name__', target)}, which torch does not know")
        return super().create_node(kind, target, *args, **kwargs)


def _modes() -> tuple:
    autocast = ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _program_of(module: nn.Module, training: bool) -> Program:
    plain = plain_class_of(module)
    _check_signature(module, plain)
    graph, state = _traced(module, plain, training, gradients=True)
    if (str(graph), state) != (str((again := _traced(module, plain, training, gradients=False))[0]), again[1]):
        raise CannotRewrite("its forward does not do the same each time")
    modules = dict(module.named_modules())
    skipped = skip_identities(graph, modules)
    found = [match for match in matches(graph, modules, is_write=_may_write) if match.bn or match.act]
    if not found:
        raise CannotRewrite("none of its convolutions is followed by a BN or an activation alone")
    convs = tuple(dict.fromkeys(str(match.conv.target) for match in found))
    for match in found:
        _replace(graph, match, modules)
    return Program(_compiled(graph), convs, plain.forward, state, tuple(skipped))


def _check_signature(module: nn.Module, plain: Any) -> None:
    if (
        "forward" in module.__dict__
        or not inspect.isfunction(plain.forward)
        or plain.__call__ is not nn.Module.__call__
    ):
        raise CannotRewrite(f"the forward of {plain.__qualname__} was replaced")
    _, *parameters = inspect.signature(plain.forward).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if len(required) != 1 or required[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise CannotRewrite("its forward does not take exactly one tensor")


def _traced(module: nn.Module, plain: Any, training: bool, gradients: bool) -> tuple[fx.Graph, tuple]:
    """The graph of one trace, and what the forward read of the module. The module is as before, whatever happens."""
    watch, cls, mode = _Watch(module), module.__class__, module.training
    try:
        with TRACING, torch.set_grad_enabled(gradients), _no_random_numbers(), watch.of_all_modules():
            module.__class__ = _of_one_tensor(plain, watch)
            module.__dict__["training"] = training
            graph = _Tracer().trace(module)
    except CannotRewrite:
        raise
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CannotRewrite(f"torch.fx cannot trace its forward: {first_line}") from error
    finally:
        module.__dict__["training"] = mode
        module.__class__ = cls
    watch.check()
    for node in graph.nodes:
        node.type = None  # annotations are of no use here
    # there is a program for each mode of the module, and classes are compared with what the parent holds
    names = sorted((path, name) for path, name in watch.read if name != "__class__" and (path or name != "training"))
    return graph, tuple((path, name, _found(module, path, name)) for path, name in names)


def _of_one_tensor(plain: Any, watch: _Watch) -> type:
    """A subclass whose forward takes one tensor and is watched."""

    class Watched(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: Any) -> Any:
            watch.in_forward = True
            try:
                return plain.forward(self, x)
            finally:
                watch.in_forward = False

    return Watched


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raises CannotRewrite where any were drawn. The generators are as before, whatever happens."""
    generators: list[tuple[Callable, Callable]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        generators.append((numpy.get_state, numpy.set_state))
    if torch.cuda.is_initialized():
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    before = [get() for get, _ in generators]
    drew = False
    try:
        yield
    finally:
        for (get, restore), state in zip(generators, before):
            if _comparable(get()) != _comparable(state):
                drew = True
                restore(state)
        if drew:
            raise CannotRewrite("its forward draws random numbers")


def _comparable(state: Any) -> list:
    """A generator's state without arrays."""
    parts = [state] if isinstance(state, Tensor) else state
    return [part.tolist() if hasattr(part, "tolist") else part for part in parts]


def _same(value: dict, content: dict) -> bool:
    """Whether a dictionary still holds the very same things."""
    return list(value) == list(content) and all(value[key] is content[key] for key in content)


# ------------------------------------------------------------------------------------------------- what a forward reads


def plain_class_of(module: Any) -> type[nn.Module]:
    """The class that a module has when it is not fused."""
    cls = type(module)
    return module.__dict__.get("_stock_class") or getattr(cls, "plain_class", cls)


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
    return getattr(value, "__func__", value)


def _kind(child: Optional[nn.Module]) -> Any:
    """The class of a child; of a container, also of what is in it, which a forward may go through."""
    return (plain_class_of(child), _kinds(child)) if isinstance(child, _CONTAINERS) else plain_class_of(child)


def _kinds(container: nn.Module) -> tuple:
    return tuple((name, _kind(child)) for name, child in container._modules.items())


def _found(module: nn.Module, path: tuple[str, ...], name: str) -> Any:
    """A copy of what `_seen` gives, to compare with later."""
    value = _seen(module, path, name)
    return copy.deepcopy(value) if _is_plain(value) else value


def _is_unchanging(value: Any, module: nn.Module) -> bool:
    """Whether an attribute's value is known as long as it compares equal. A method is, of the module itself."""
    if inspect.ismethod(value):
        return value.__self__ is module or isinstance(value.__self__, type)
    return inspect.isroutine(value) or _is_plain(value)


def _is_plain(value: Any) -> bool:
    if type(value) is _Proxy:  # which answers no isinstance
        return False
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN_VALUES)


# ----------------------------------------------------------------------------------------------------------- rewriting


def _may_write(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Also a child that is not one of torch's own, or that does more when called."""
    module = module_of(node, modules)
    if module is None:
        return writes_in_place(node, modules)
    is_torchs = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, _CONTAINERS)
    return not is_torchs or not has_stock_call(module) or writes_in_place(node, modules)


def _replace(graph: fx.Graph, match: Match, modules: dict[str, nn.Module]) -> None:
    """One call of `nn.conv_bn_act` in the place of the match's last node."""
    tail, act = match.nodes[-1], match.act
    with graph.inserting_before(tail):
        conv = graph.create_node("get_attr", match.conv.target)
        bn = graph.create_node("get_attr", match.bn.target) if match.bn else None
        if act is not None and act.op == "call_module":
            activation: Any = graph.create_node("get_attr", act.target)
        else:
            activation = activation_of(act, modules) if act else None
        backend = graph.create_node("get_attr", "backend")
        fused = graph.call_function(conv_bn_act, (match.conv.args[0], conv, bn, activation, match.residual, backend))
    tail.replace_all_uses_with(fused)
    for node in reversed(match.nodes):
        graph.erase_node(node)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function (module, x)."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<rewritten by fused_resnet>", "exec"), names)
    return names["forward"]
