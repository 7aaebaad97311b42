"""One module's forward as a torch.fx graph, refused where the graph would not be all that the forward does.

The children are calls. The trace is taken twice, with gradients on and off, and both must agree. What the forward read
of the module and of those inside comes with the graph, to be compared before each call.

| what a forward does | what happens |
| --- | --- |
| calls its children, computes with tensors | it is in the graph |
| reads attributes of the module or of those inside | noted; another value later, and the plain forward runs |
| asks for the class of a value or a module | refused |
| asks for another of torch's modes, or changes one | refused |
| draws random numbers | refused |
| writes attributes of any module or class, or into the containers there | refused |
| writes a variable outside, or into a container or object that its code names | refused |
| recomputes activations | refused |
| takes anything but one tensor | refused |
| swallows the error of a refusal | refused all the same |
| depends on a global variable that changes later | not seen |
| depends on what is read of a class by the class's name, and that changes later | not seen |
| prints | not seen |
| writes into tensors outside, slots, Python's modules, and objects inside other objects | not seen |
| has it written by a function of another file that is given neither a module nor a value | not seen |
| swallows an error that Python raises where it needs an integer, as in range(x.shape[0]) | not seen |
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dis
import enum
import functools
import inspect
import itertools
import operator
import random
import sys
import threading
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, Callable, Iterator, NamedTuple, NoReturn, Optional, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet.graphs.tracer import TRACING, Proxy, Tracer
from fused_resnet.nn.fused import set_class

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLAIN_VALUES = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device)
_KNOWN_FUNCTIONS = {"torch", "_operator", "operator", "builtins", "math", "collections"}
# Torch's answers that may be others in a later call. Both of is_grad_enabled are traced, and nothing fused is scripted.
_MODES = frozenset(
    "is_autocast_enabled is_autocast_cpu_enabled get_autocast_dtype get_autocast_cpu_dtype get_autocast_gpu_dtype "
    "is_inference_mode_enabled is_tracing _is_tracing _get_tracing_state is_in_onnx_export is_compiling "
    "is_dynamo_compiling is_exporting get_default_dtype are_deterministic_algorithms_enabled".split()
)
_CLASS_QUESTIONS = {"LOAD_GLOBAL": "type", "LOAD_ATTR": "__class__", "LOAD_METHOD": "__class__"}
_COLLECTIONS = (dict, list, tuple, set, frozenset, collections.deque)
_NO_CONTENT = (ModuleType, FunctionType, nn.Module, Tensor, fx.Proxy)  # or none that is kept
_LOOKUP = nn.Module.__getattr__.__code__
_MISSING = object()


class CannotRewrite(Exception):
    """Why a module's forward stays as it is."""


class Reads(NamedTuple):
    """What a forward read of its module. As long as it holds, the graph does what the forward does."""

    seen: tuple[tuple[tuple[str, ...], str, Any], ...]  # path of the module, name of the attribute, what it was
    ties: tuple[tuple[tuple[str, ...], ...], ...]  # paths of modules and tensors that were the same

    def hold(self, module: nn.Module) -> bool:
        is_seen = all(_seen(module, path, name) == value for path, name, value in self.seen)
        return is_seen and all(_is_tied(module, paths) for paths in self.ties)


def graph_of(module: nn.Module, training: bool) -> tuple[fx.Graph, Reads]:
    """The graph of a module's forward in this mode, and what it read. Raises CannotRewrite. The module is left as it
    was."""
    plain = plain_class_of(module)
    _check_signature(module, plain)
    graph, reads = _traced(module, plain, training, gradients=True)
    again, reads_again = _traced(module, plain, training, gradients=False)
    if (str(graph), reads) != (str(again), reads_again):
        raise CannotRewrite("its forward does not do the same each time")
    return graph, reads


def plain_class_of(module: Any) -> type[nn.Module]:
    """The class that a module has when it is not fused."""
    cls = type(module)
    return module.__dict__.get("_stock_class") or getattr(cls, "plain_class", cls)


# --------------------------------------------------------------------------------------------------------- tracing


class _Proxy(Proxy):
    """A value of which the rewritten forward may not depend in ways that torch.fx does not record."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self):  # type: ignore[override]
        # isinstance asks here, and the proxy's answer would not be the value's
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if not asker.startswith("torch."):
            self.tracer.watch._refuse("asks for the class of a value")
        return _Proxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return _Attribute(self, name)

    def _look(self, *_: Any) -> NoReturn:
        self.tracer.watch._refuse("looks at a value, which torch.fx cannot trace")

    __len__ = __int__ = __float__ = __complex__ = __array__ = __setitem__ = _look  # type: ignore[assignment]


class _Attribute(_Proxy, fx.proxy.Attribute):
    """What an attribute of a value gives: a shape, a method."""

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Contents:
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
            if issubclass(type(part), _COLLECTIONS):
                self.keep(f"{key}, an attribute of a class" if issubclass(type(value), type) else name, part)

    def put_back(self) -> list[str]:
        """The names of what was written since, which is as before now."""
        written = []
        for name, value, content in self._before.values():
            now = _content(value)
            if not _same(now, content):
                if isinstance(value, type):
                    key = next(key for key in {**now, **content} if _differ(now, content, key))
                    name = f"{key}, an attribute of a class"
                written.append(name)
                _restore(value, content)
        return written


def _differ(now: dict, content: dict, key: Any) -> bool:
    return now.get(key, _MISSING) is not content.get(key, _MISSING)


def _content(value: Any) -> Any:
    """What is in a container, object or class that code outside torch may write, or None."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict(value)
    if issubclass(kind, _COLLECTIONS):
        return list(value)
    if issubclass(kind, _NO_CONTENT) or _is_torchs(value.__module__ if issubclass(kind, type) else kind.__module__):
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


class _Watch:
    """What a forward reads of the module and of those inside, while it is traced. What it would write is refused."""

    def __init__(self, module: nn.Module) -> None:
        self.paths: dict[int, list[tuple[str, ...]]] = {}
        for name, child in module.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(child), []).append(tuple(name.split(".")) if name else ())
        self.read: set[tuple[tuple[str, ...], str]] = set()
        self.refusal: Optional[CannotRewrite] = None  # the first; the forward may have swallowed it
        self.outside = _Contents()
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
            what = _unseen_in(frame) or self._written_by(frame)
            if self._is_the_forwards(frame):
                what = what or _unseen_in_code(frame.f_code, _variable_written)
                if what is not None:
                    raise self.note(CannotRewrite(f"its forward {what}"))  # before it is done
                self.outside.keep_named_in(frame)
        elif event == "c_call":
            what = _mode_asked(name, frame)
        else:
            what = f"fails in torch's {name}()" if _is_torchs(_owner(function)) else None
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
        name = _module_name(frame)
        is_known = _is_torchs(name) or name.partition(".")[0] in sys.stdlib_module_names
        return frame.f_globals is self._globals or not is_known and _is_about_the_forward(frame)

    def note(self, error: Exception) -> CannotRewrite:
        """The first reason to refuse, which is this one where there was none."""
        if self.refusal is None:
            if not isinstance(error, CannotRewrite):
                first_line = f"{type(error).__name__}: {error}".splitlines()[0]
                error = CannotRewrite(f"torch.fx cannot trace its forward: {first_line}")
            self.refusal = error
        return self.refusal

    def check(self) -> None:
        """Raises CannotRewrite for a forward that went on after its refusal, or wrote into a container that it read."""
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
        raise self.note(CannotRewrite(f"its forward {what}"))


def _noted(method: Callable) -> Callable:
    """A tracer's method whose errors are noted, because the forward may swallow them."""

    @functools.wraps(method)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if threading.get_ident() == self._thread:
                self.watch.note(error)
            raise

    return noted


class _Tracer(Tracer):
    """Traces one module; its children are calls. Refuses what a graph does not show."""

    proxy_class = _Proxy
    to_bool, iter, keys = _noted(Tracer.to_bool), _noted(Tracer.iter), _noted(Tracer.keys)
    call_module = _noted(Tracer.call_module)

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

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

    @_noted
    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Tensor):
            raise CannotRewrite("its forward makes a tensor, which a graph would keep")
        return super().create_arg(a)

    @_noted
    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise CannotRewrite("its forward changes the gradient mode or autocast")
        if kind == "call_function" and getattr(target, "__module__", "").split(".")[0] not in _KNOWN_FUNCTIONS:
            raise CannotRewrite(f"its forward calls {getattr(target, '__name__', target)}, which torch does not know")
        return super().create_node(kind, target, *args, **kwargs)


def _modes() -> tuple:
    autocast = ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


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


def _traced(module: nn.Module, plain: Any, training: bool, gradients: bool) -> tuple[fx.Graph, Reads]:
    """The graph of one trace, and what the forward read of the module. The module is as before, whatever happens."""
    watch, cls, mode = _Watch(module), type(module), module.__dict__.get("training", _MISSING)
    before = [(name, child, dict(vars(child))) for name, child in module.named_modules()]
    try:
        with TRACING, torch.set_grad_enabled(gradients), _no_random_numbers(), _nothing_written_outside(module, watch):
            set_class(module, _of_one_tensor(plain, watch))
            module.__dict__["training"] = training
            with watch.of_all_modules(), watch.of_all_calls():
                graph = _Tracer(watch).trace(module)
    except Exception as error:
        raise watch.note(error) from error
    finally:
        module.__dict__["training"] = mode
        if mode is _MISSING:  # a property
            del module.__dict__["training"]
        set_class(module, cls)
        written = _attributes_put_back(before)
    if written:
        watch.note(CannotRewrite(f"its forward writes its attribute {written[0]}"))
    watch.check()
    for node in graph.nodes:
        node.type = None  # annotations are of no use here
    # there is a program for each mode of the module, and classes are compared with what the parent holds
    names = sorted((path, name) for path, name in watch.read if name != "__class__" and (path or name != "training"))
    seen = tuple((path, name, _found(module, path, name)) for path, name in names)
    return graph, Reads(seen, _ties(module, seen))


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


@contextlib.contextmanager
def _nothing_written_outside(module: nn.Module, watch: _Watch) -> Iterator[None]:
    """Raises CannotRewrite where anything outside the module was: its class, one of a class inside, what its code
    names. They are as before, whatever happens."""
    for child in module.modules():
        for cls in type(child).__mro__[:-1]:
            watch.outside.keep(cls.__name__, cls)
    try:
        yield
    finally:
        written = watch.outside.put_back()
        if written:
            raise watch.note(CannotRewrite(f"its forward writes {written[0]}, outside the module"))


def _attributes_put_back(before: list[tuple[str, nn.Module, dict]]) -> list[str]:
    """The names of the attributes that modules got past nn.Module.__setattr__, and have no more."""
    written = []
    for path, module, own in before:
        now = vars(module)
        if not _same(now, own):
            name = next((key for key in {**own, **now} if _differ(now, own, key)), "__dict__")
            written.append(f"{path}.{name}" if path else name)
            _restore(module, own)
    return written


def _kept(value: Any) -> Any:
    return copy.deepcopy(value) if _is_plain(value) else value


def _same(value: Any, content: Any) -> bool:
    """Whether a dictionary or list still holds the very same things."""
    if isinstance(content, list):
        return len(value) == len(content) and all(map(operator.is_, value, content))
    return list(value) == list(content) and all(value[key] is content[key] for key in content)


# ------------------------------------------------------------------------------------------------- what a forward calls


def _is_torchs(name: str) -> bool:
    """Whether a module of Python is torch's, or ours."""
    return name.partition(".")[0] in ("torch", "fused_resnet")


def _module_name(frame: Optional[FrameType]) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "")


def _owner(function: Any) -> str:
    """The module of Python that a function in C is from."""
    return getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__


def _unseen_in(frame: FrameType) -> Optional[str]:
    """What a function that is being called does that a graph does not show, or None."""
    if not _is_torchs(_module_name(frame)):
        return _unseen_in_code(frame.f_code, _class_asked) if _is_about_the_forward(frame) else None
    if _module_name(frame) == "torch.utils.checkpoint":
        return "recomputes its activations (torch.utils.checkpoint)"
    return _mode_asked(frame.f_code.co_name, frame.f_back)


def _is_about_the_forward(frame: FrameType) -> bool:
    variables = frame.f_locals.values()  # of what is no dict from Python 3.13 on
    return any(issubclass(kind, (nn.Module, _Proxy)) for kind in _kinds_in(variables))


def _kinds_in(values: Any, depth: int = 2) -> Iterator[type]:
    """The types of values, and of what is in those that are containers."""
    for value in values.values() if issubclass(type(values), dict) else values:
        yield type(value)
        if depth and issubclass(type(value), _COLLECTIONS):
            yield from _kinds_in(value, depth - 1)


def _mode_asked(name: str, asker: Optional[FrameType]) -> Optional[str]:
    is_asked = name in _MODES and not _is_torchs(_module_name(asker))
    return f"asks torch {name}(), which may answer otherwise in a later call" if is_asked else None


@functools.lru_cache(maxsize=None)
def _unseen_in_code(code: CodeType, unseen: Callable[[CodeType, str, Any], Optional[str]]) -> Optional[str]:
    """What an instruction of a function, or of one inside, does, or None."""
    own = (unseen(code, instruction.opname, instruction.argval) for instruction in dis.get_instructions(code))
    inner = (_unseen_in_code(constant, unseen) for constant in code.co_consts if isinstance(constant, CodeType))
    return next(filter(None, itertools.chain(own, inner)), None)


def _class_asked(code: CodeType, kind: str, name: Any) -> Optional[str]:
    is_asked = kind in _CLASS_QUESTIONS and name == _CLASS_QUESTIONS[kind]
    return "asks for the class of a value or a module" if is_asked else None


def _variable_written(code: CodeType, kind: str, name: Any) -> Optional[str]:
    if kind in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        return f"writes the global variable {name}"
    is_outer = kind in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars
    return f"writes the nonlocal variable {name}" if is_outer else None


# ------------------------------------------------------------------------------------------------- what a forward reads


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


def _found(module: nn.Module, path: tuple[str, ...], name: str) -> Any:
    """A copy of what `_seen` gives, to compare with later."""
    return _kept(_seen(module, path, name))


def _is_unchanging(value: Any, module: nn.Module) -> bool:
    """Whether an attribute's value is known as long as it compares equal. A method is, of the module itself."""
    if inspect.ismethod(value):
        return value.__self__ is module or isinstance(value.__self__, type)
    return inspect.isroutine(value) or _is_plain(value)


def _is_plain(value: Any) -> bool:
    if issubclass(type(value), _Proxy):  # which answers no isinstance
        return False
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN_VALUES)
