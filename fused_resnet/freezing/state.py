"""What a forward keeps from one call to the next, found by comparing all that it could write before and after a trace.

A plan does the same in each call, so a model that keeps anything is refused.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import sys
import zlib
from types import CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, Iterator

import torch
from torch import Tensor, fx, nn

from fused_resnet.graphs.tracer import Unfaithful, count_writes

_HOLDERS = {"_parameters", "_buffers", "_modules"}
_LIBRARIES = {*sys.stdlib_module_names, "fused_resnet", "numpy", "timm", "torch", "torchvision", "transformers"}
_SAME_BY_ID = (nn.Module, FunctionType, ModuleType, type, fx.Proxy, fx.Graph)
_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_CONTAINERS = (collections.OrderedDict, dict, list, tuple, set, frozenset, collections.deque)
# How far is looked for state: objects from one place and in all, bytes in all. Of what is beyond only the type is told.
_MOST_CODE, _MOST_OF_A_PLACE, _MOST_OBJECTS, _MOST_BYTES, _DEEPEST = 1000, 2**14, 2**18, 2**30, 100


def keeps_state(what: str) -> Unfaithful:
    return Unfaithful(
        f"freeze: the forward writes {what}, which a plan would not write again: a frozen model does the same in each "
        "call. Freeze the modules that keep nothing, or use fused_resnet.fuse."
    )


def names_in(code: CodeType) -> Iterator[str]:
    """The global variables, attributes and modules that code names, and the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


class _State(dict[tuple[int, str], Any]):
    """What values hold, by whose they are and by what they are called in a sentence. walk: keeps what was met, or
    something new could have its id."""

    def __init__(self, walk: "_Walk") -> None:
        super().__init__()
        self.walk = walk


def state_of(model: nn.Module) -> _State:
    """What a forward could write: attributes of modules, and what the functions name that it could call.

    Functions are found through whatever is met on the way.
    """
    walk = _Walk(model)
    state = _State(walk)
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _HOLDERS}
        own.update({**module._parameters, **module._buffers, **module._modules})
        for key, value in own.items():
            state[id(module), _attribute(name, key)] = walk.content_at_a_place(value)
    for module in model.modules():
        walk.follow(type(module))
    for code in walk.code:  # more are met meanwhile
        for owner, label, value in walk.variables_of(code):
            if (id(owner), label) not in state:
                state[id(owner), label] = walk.content_at_a_place(value)
    return state


def _attribute(module: str, name: str) -> str:
    return f"its attribute {module}.{name}" if module else f"its attribute {name}"


class _Walk:
    """Tells what values hold, and collects the functions and classes that it meets in them.

    What the code of libraries names is not followed. What is installed is one, save where the model's classes are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._met: dict[int, tuple[Any, Any]] = {}  # objects and what they hold, by id
        self._alive: list[Any] = []  # and what is told by its id
        self._objects_left, self._bytes_left = 0, _MOST_BYTES
        self._packages = {_package(type(module).__module__) for module in model.modules()} - _LIBRARIES
        self.code: list[Any] = []

    def follow(self, code: Any) -> None:
        """Collect a function or a class, once."""
        if id(code) not in self._met and len(self.code) < _MOST_CODE:
            self._met[id(code)] = code, None
            self.code.append(code)

    def content_at_a_place(self, value: Any) -> Any:
        """What a value holds, with as many objects to look at as every place has."""
        self._objects_left = _MOST_OF_A_PLACE
        return self.content(value, 0)

    def content(self, value: Any, depth: int) -> Any:
        """What a value holds. It equals what the value holds later, as long as that is the same.

        Of an object a digest, since objects that share others have as many ways through them as trees have leaves.
        """
        kind = type(value)
        if kind in _ATOMS:
            return value if value == value else repr(value)  # NaN
        if kind in _CONTAINERS and not value:  # most are, for hooks
            return kind.__name__
        if issubclass(kind, FunctionType) or issubclass(kind, type) and not issubclass(value, nn.Module):
            self.follow(value)
        if issubclass(kind, _SAME_BY_ID):
            self._alive.append(value)
            return id(value)
        if id(value) not in self._met:
            if depth == _DEEPEST or not self._objects_left or len(self._met) >= _MOST_OBJECTS:
                return id(kind)
            self._objects_left -= 1
            self._met[id(value)] = value, id(kind)  # until it is known: an object may hold itself
            is_tensor = issubclass(kind, Tensor)
            told = content_of_tensor(value) if is_tensor else self._content_of_object(value, depth)
            self._met[id(value)] = value, told
        return self._met[id(value)][1]

    def _content_of_object(self, value: Any, depth: int) -> bytes:
        kind = type(value)
        is_of_library = self._is_of_library(kind.__module__)
        if not is_of_library:
            self.follow(kind)
        parts = list(self._parts(value, is_of_library))
        if not parts and not issubclass(kind, _CONTAINERS):
            parts = [id(value)]
        elif not _ATOMS.issuperset(map(type, parts)):
            parts = [self.content(part, depth + 1) for part in parts]
        return hashlib.blake2b(repr((id(kind), parts)).encode(), digest_size=16).digest()

    def _parts(self, value: Any, is_of_library: bool) -> Iterator[Any]:
        """What can be seen of an object without a call of methods that a user wrote."""
        kind: Any = type(value)
        with contextlib.suppress(AttributeError):  # it has slots alone
            own = object.__getattribute__(value, "__dict__")
            if not is_of_library:
                yield own
            elif "__wrapped__" in own:
                yield own["__wrapped__"]
        for member in _members(kind):
            with contextlib.suppress(AttributeError):  # which is not set
                yield member.__get__(value)
        for container in _CONTAINERS:
            if issubclass(kind, container):
                yield from list(container.__iter__(value))
                yield from list(dict.values(value)) if issubclass(kind, dict) else ()
                return
        with contextlib.suppress(TypeError, ValueError, BufferError):  # most have no memory to be read
            memory = memoryview(value)
            yield from (memory.format, memory.shape)
            if memory.nbytes <= self._bytes_left:
                self._bytes_left -= memory.nbytes
                yield zlib.crc32(memory if memory.c_contiguous else memory.tobytes())
            return
        if is_of_library:
            with contextlib.suppress(Exception):  # of a lock all that can be told is which it is
                yield value.__reduce_ex__(4)

    def variables_of(self, code: Any) -> Iterator[tuple[Any, str, Any]]:
        """What a class has, and what a function names and keeps: whose it is, what it is called, and its value."""
        return self._variables_of_class(code) if isinstance(code, type) else self._variables_of_function(code)

    def _variables_of_class(self, cls: type) -> Iterator[tuple[Any, str, Any]]:
        for base in cls.__mro__:
            for key, value in () if self._is_of_library(base.__module__) else list(vars(base).items()):
                if type(value) is FunctionType or not key.startswith("__"):
                    yield base, f"{key}, an attribute of the class {base.__name__}", value

    def _variables_of_function(self, function: FunctionType) -> Iterator[tuple[Any, str, Any]]:
        is_of_library = self._is_of_library(function.__globals__.get("__name__"))
        for key, value in list(vars(function).items()):
            if key == "__wrapped__" or not is_of_library:  # a library may wrap a user's function
                yield function, f"{key}, an attribute of the function {function.__name__}", value
        if is_of_library:
            return
        defaults = function.__defaults__, function.__kwdefaults__
        yield function, f"a default argument of the function {function.__name__}", defaults
        names, namespaces = list(names_in(function.__code__)), [function.__globals__, sys.modules]
        for namespace in namespaces:  # and of modules that are named there
            for name in names:
                if name not in namespace:
                    continue
                value = namespace[name]
                yield namespace, f"the global variable {name}", value
                if issubclass(type(value), ModuleType) and not self._is_of_library(vars(value).get("__name__")):
                    if all(vars(value) is not other for other in namespaces):
                        namespaces.append(vars(value))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            with contextlib.suppress(ValueError):  # which is empty still
                yield function, f"the variable {name} of a function around it", cell.cell_contents

    def _is_of_library(self, module: Any) -> bool:
        package = _package(module)
        return package not in self._packages and (package in _LIBRARIES or _is_installed(package))


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


@functools.lru_cache(maxsize=None)
def _is_installed(package: str) -> bool:
    file = str(getattr(sys.modules.get(package), "__file__", ""))
    return "site-packages" in file or "dist-packages" in file


def content_of_tensor(tensor: Tensor) -> tuple:
    """The numbers of a small one. Of others and of parameters, which it is and how often it was written to."""
    if type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() < 2**16:
        with contextlib.suppress(RuntimeError):  # quantized ones
            numbers = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
            return str(tensor.dtype), tuple(tensor.shape), hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
    return id(tensor), count_writes(tensor)


@functools.lru_cache(maxsize=None)
def _members(kind: type) -> list[MemberDescriptorType]:
    """Its slots, and in C what it holds."""
    return [member for cls in kind.__mro__ for member in vars(cls).values() if isinstance(member, MemberDescriptorType)]


def forget_constants(model: nn.Module, before: _State) -> None:
    """Take back, where nothing was before, what depends on parameters alone: in a frozen model they are constants."""
    for name, module in model.named_modules():
        own = vars(module)
        for key in own.keys() - _HOLDERS:
            place, value = (id(module), _attribute(name, key)), own[key]
            if isinstance(value, dict):
                for part in [part for part in value if _is_constant(value[part])]:
                    del value[part]
            elif _is_constant(value) and before.get(place) is None:
                del own[key]
                if place in before:
                    own[key] = None


def _is_constant(value: Any) -> bool:
    """Whether it was computed in a trace, and not from the input."""
    if not isinstance(value, fx.Proxy):
        return False
    sources, found = [value.node], {value.node}
    while sources:
        new = set(sources.pop().all_input_nodes) - found
        sources.extend(new)
        found |= new
    return all(node.op != "placeholder" for node in found)


def changes(before: _State, now: _State) -> list[str]:
    """What they are called."""
    return [place[1] for place in {**before, **now} if before.get(place) != now.get(place)]
