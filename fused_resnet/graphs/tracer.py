"""A model as a torch.fx graph whose reading and writing of memory is what the model's was. For `plan`.

What torch.fx alone loses and this keeps:

- `a += b` writes a's memory.
- Default arguments are what the model sees, not proxies.
- Other threads may call modules while one is traced.
- A view that becomes a copy is not written through.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import operator
import random
import sys
import threading
import zlib
from types import CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, Callable, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fused_resnet.graphs.spelling import call_functions, call_modules
from fused_resnet.nn.bypass import has_stock_call, is_norm, returns_its_input

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
POOL_FUNCTIONS = (F.max_pool2d, F.avg_pool2d)
# Modules that return new memory, never their input or a view of it.
_FRESH = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase, *POOLS, nn.AdaptiveAvgPool2d)
_FRESH_FUNCTIONS = {
    *POOL_FUNCTIONS, F.conv2d, F.linear, F.adaptive_avg_pool2d, F.batch_norm, torch.batch_norm, torch.cat,
    "clone", torch.clone, "add", torch.add, "relu", torch.relu, "mul", "sum", "mean",
    operator.add, operator.sub, operator.mul,
}  # fmt: skip
# By the name of the class, because torch._dynamo takes long to import: the attribute that holds what they were given.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
}
_WEIGHT_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
_HOLDERS = {"_parameters", "_buffers", "_modules"}
_LIBRARIES = {*sys.stdlib_module_names, "fused_resnet", "numpy", "timm", "torch", "torchvision", "transformers"}
_SAME_BY_ID = (nn.Module, FunctionType, ModuleType, type, fx.Proxy, fx.Graph)
_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_CONTAINERS = (collections.OrderedDict, dict, list, tuple, set, frozenset, collections.deque)
# How far is looked for state: objects from one place and in all, bytes in all. Of what is beyond only the type is told.
_MOST_CODE, _MOST_OF_A_PLACE, _MOST_OBJECTS, _MOST_BYTES, _DEEPEST = 1000, 2**14, 2**18, 2**30, 100
_AUGMENTED = {f"i{name}" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
# A view of contiguous memory, a copy of channels_last memory; or the other way round.
_LAYOUT_DECIDES = {"view", "reshape", "flatten", "ravel", "contiguous", torch.reshape, torch.flatten, torch.ravel}
# torch.fx patches nn.Module while it traces: one trace at a time, or the patches of two are undone in the wrong order.
TRACING = threading.RLock()


class Proxy(fx.Proxy):
    """Keeps `a += b` the write to a's memory that it is; torch.fx alone records a new tensor."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):  # `a.data = b`, which torch.fx alone forgets
            raise keeps_state(f"the attribute {name} of a tensor")
        super().__setattr__(name, value)


def _augmented(operation: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in _AUGMENTED:
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


class _Call(nn.Module):
    """model(x): traced in the model's place, so that its other arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class _OwnTensors(TorchFunctionMode):
    """Notes which tensors a trace computes from the model's own buffers alone, before the graph sees them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(id(leaf) in self._tensors for leaf in pytree.tree_leaves((args, kwargs))):
            self._tensors.update((id(leaf), leaf) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
        return out


class Untraceable(ValueError):
    """torch.fx cannot trace a model."""


class Unfaithful(RuntimeError):
    """A graph would not go on doing what the model does."""


def keeps_state(what: str) -> Unfaithful:
    return Unfaithful(
        f"freeze: the forward writes {what}, which a plan would not write again: a frozen model does the same in each "
        "call. Freeze the modules that keep nothing, or use fused_resnet.fuse."
    )


def _draws() -> Unfaithful:
    return Unfaithful(
        "freeze: the forward draws random numbers that depend on no input, which a plan would repeat in each call. "
        "Draw them like a tensor (torch.rand_like), or use fused_resnet.fuse."
    )


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of one input over copies of its leaf modules. meta["writes_input"]: whether the model does,
    which the graph does to a copy.

    Raises Untraceable when torch.fx cannot have it, ValueError when the graph would not be the model. Unfaithful when
    it would be in the first call alone, or in eval mode alone where the model is not all in eval mode.
    """
    tracer = Tracer()
    try:
        # a copy, because the forward runs: what it counts and keeps is not for the model
        copied = copy_with_parameters(model)
    except Exception as error:
        raise _untraceable(model, error) from error
    in_training = [module for module in copied.modules() if module.training]
    _set_training(in_training, False)
    _drop_checks(copied)
    _compute_weights(copied)
    for name, module in copied.named_modules():
        if not tracer.is_leaf_module(module, name):
            refuse_hooks(name, module)
    root = _Call(copied)
    _set_training([root], False)
    before, numbers = _state_of(copied), _random_state()
    try:
        graph = _graph_of(root)
    except Unfaithful:
        raise
    except Exception as error:
        raise _untraceable(model, error) from error
    _forget_constants(copied, before)
    if changed := _changes(before, _state_of(copied)):
        graph = _settled(root, graph, keeps_state(changed[0]))
    elif _random_state() != numbers:  # another thread may have drawn them: then a second graph is the same
        graph = _settled(root, graph, _draws())
    if in_training:
        _compare_modes(root, graph, in_training)
    modules = dict(root.named_modules())
    for node in graph.nodes:
        node.type = None  # annotations are of no use here, and as strings they cannot be pickled
        if node.target is getattr and node.args[1] == "data":  # the same tensor, whose writes are not counted
            node.op, node.target, node.args = "call_method", "detach", node.args[:1]
    skip_identities(graph, modules)
    call_functions(graph)
    _renew_made_tensors(root, graph, modules)
    call_modules(root, graph, modules)
    _let_views_copy(graph, modules)
    writes_input = _leave_input_alone(graph, modules)
    _return_new_memory(graph, modules)
    for node in graph.nodes:
        if node.meta.pop("is_of_buffers", False):
            setattr(root, f"_of_buffers{node.target}", getattr(root, node.target))
            node.target = f"_of_buffers{node.target}"
    traced = copy.deepcopy(fx.GraphModule(root, graph)).eval()
    traced.meta["writes_input"] = writes_input
    return traced


def is_made_in_forward(node: fx.Node) -> bool:
    """Whether this is a tensor that the forward makes, as torch.arange does, and that is in no module."""
    return node.op == "get_attr" and str(node.target).startswith("_tensor_constant")


def refuse_hooks(name: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"freeze: {name or 'the model'} has forward hooks, which a plan would drop. Remove them first."
        )


def _graph_of(root: nn.Module) -> fx.Graph:
    tracer = Tracer()
    with TRACING, _OwnTensors(root) as own:
        graph = tracer.trace(root)
    for node in graph.nodes:
        node.meta["is_of_buffers"] = is_made_in_forward(node) and getattr(root, node.target) in own
    if any(count_writes(tensor) != writes for tensor, writes in tracer.used.values()):
        raise ValueError("it writes into a tensor that it has computed with, which a graph would not see")
    return graph


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode


def _settled(root: Any, graph: fx.Graph, refusal: Unfaithful) -> fx.Graph:
    """The graph of a second call, where the first one changed something. It must be the same, and change nothing: then
    what changed was a cache. Raises the refusal where it is not."""
    before = _state_of(root.model)
    try:
        again = _graph_of(root)
    except Exception as error:
        raise refusal from error
    if _changes(before, _state_of(root.model)) or not _are_alike(root, graph, again):
        raise refusal
    return again


def _compare_modes(root: Any, graph: fx.Graph, in_training: list[nn.Module]) -> None:
    """Raises Unfaithful where these modules do something else in training mode."""
    before = _state_of(root.model)
    try:
        _set_training(in_training, True)
        other = _graph_of(root)
    except Exception:
        other = None
    finally:
        _set_training(in_training, False)
    if other is None or _changes(before, _state_of(root.model)) or not _are_alike(root, graph, other):
        name = next(name for name, module in root.named_modules() if module is in_training[0])
        raise in_training_mode(name.removeprefix("model").removeprefix("."), in_training[0])


def reads_mode(module: nn.Module) -> bool:
    """Whether training mode means anything to a module, by its code, and to what a trace does not go into by its hooks.

    The modules inside are asked by themselves. What is traced is traced in both modes where one of them is in training.
    """
    if unwrapped(module) is not module:
        return False
    is_opaque = Tracer().is_leaf_module(module, "") and not has_stock_call(module)
    return is_opaque or any(map(_class_reads_mode, type(module).__mro__))


@functools.lru_cache(maxsize=None)
def _class_reads_mode(cls: type) -> bool:
    if cls is nn.Module or cls.__module__.startswith("torch.fx."):
        return False
    members = (getattr(value, "fget", None) or getattr(value, "__func__", value) for value in vars(cls).values())
    return any(isinstance(member, FunctionType) and "training" in _names_in(member.__code__) for member in members)


def _names_in(code: CodeType) -> Iterator[str]:
    """The global variables, attributes and modules that code names, and the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def in_training_mode(name: str, module: nn.Module) -> Unfaithful:
    return Unfaithful(
        f"freeze: {name or 'the model'} is in training mode; call model.eval() first. {type(module).__name__} does "
        "something else then. To train, use fused_resnet.fuse."
    )


def _are_alike(root: nn.Module, graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs over the same modules do the same."""
    (steps, tensors), (other_steps, other_tensors) = _steps(root, graph), _steps(root, other)
    return steps == other_steps and all(map(_is_equal, tensors, other_tensors))


def _steps(root: nn.Module, graph: fx.Graph) -> tuple[list, list]:
    """What the nodes do, and the attributes that they get."""
    names = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    got = [functools.reduce(getattr, node.target.split("."), root) for node in graph.nodes if node.op == "get_attr"]
    return [
        (node.op, node.op == "get_attr" or node.target, fx.map_arg((node.args, node.kwargs), names.get))
        for node in graph.nodes
    ], got


def _is_equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return one is other or one.dtype == other.dtype and torch.equal(one, other)


def _untraceable(model: nn.Module, error: Exception) -> Untraceable:
    return Untraceable(
        f"freeze: torch.fx cannot trace {type(model).__name__}: {error}. Freeze the part that is a plain network, "
        "or use fused_resnet.fuse."
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel or DistributedDataParallel were given; any other module is itself."""
    while inner := _WRAPPERS.get((type(module).__module__, type(module).__qualname__)):
        module = getattr(module, inner)
    return module


def copy_of(model: nn.Module, copies: Optional[dict[int, Any]] = None) -> nn.Module:
    """A deep copy without the wrappers, in which `copies` stand for what they are copies of (by id).

    deepcopy refuses tensors with a history, such as a pruned weight. The copy has their values.
    """
    memo: dict[int, Any] = dict(copies or {})
    for module in model.modules():
        for leaf in pytree.tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
    for module in reversed(list(model.modules())):  # from the inside out
        if id(module) not in memo and unwrapped(module) is not module:
            memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
    return copy.deepcopy(model, memo)


def copy_with_parameters(model: nn.Module) -> nn.Module:
    """A copy over the model's own parameters, whose forward may count and keep what it likes."""
    return copy_of(model, {id(parameter): parameter for parameter in model.parameters()})


def _drop_checks(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_check(hook)]:
                del hooks[key]


def _is_check(hook: Callable) -> bool:
    """Whether it checks the input of a torch.export'ed module, which its graph does besides."""
    return getattr(hook, "__module__", "") == "torch.export._unlift"


def computed_weights(module: nn.Module) -> dict[str, Callable]:
    """The weights that torch's own hooks compute before each call, in eval mode from parameters and buffers alone."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]
    return {hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name: hook for hook in hooks}


def _compute_weights(model: nn.Module) -> None:
    """Make parameters of them, save where other hooks run too, which may want their turn kept."""
    for module in model.modules():
        computed = computed_weights(module)
        if len(computed) != len(module._forward_pre_hooks):
            continue
        for name, hook in computed.items():
            with torch.no_grad():
                hook(module, ())
            module.register_parameter(name, nn.Parameter(module.__dict__.pop(name).detach(), requires_grad=False))
        module._forward_pre_hooks.clear()


# ------------------------------------------------------------------------------------------------- what a forward keeps


class _State(dict[tuple[int, str], Any]):
    """What values hold, by whose they are and by what they are called in a sentence. walk: keeps what was met, or
    something new could have its id."""

    def __init__(self, walk: "_Walk") -> None:
        super().__init__()
        self.walk = walk


def _state_of(model: nn.Module) -> _State:
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
        names, namespaces = list(_names_in(function.__code__)), [function.__globals__, sys.modules]
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


def _forget_constants(model: nn.Module, before: _State) -> None:
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


def _changes(before: _State, now: _State) -> list[str]:
    """What they are called."""
    return [place[1] for place in {**before, **now} if before.get(place) != now.get(place)]


def _random_state() -> list:
    """The state of the generators that a forward may draw from unseen."""
    state = [random.getstate(), torch.get_rng_state().numpy().tobytes()]
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state.append((kind, keys.tobytes(), *rest))
    return state


def count_writes(tensor: Tensor) -> int:
    """How often its memory was written to, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version


# ----------------------------------------------------------------------------------------------------- memory in graphs


def skip_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Drop the modules that return their input. Their names."""
    skipped = []
    for node in list(graph.nodes):
        if len(node.args) == 1 and returns_its_input(module_of(node, modules)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            skipped.append(str(node.target))
    return skipped


def _renew_made_tensors(root: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Give each call tensors of its own where the forward makes some and may write to them: a graph has them once.

    Raises Unfaithful where such a tensor is a view of another one.
    """
    memory = memory_of(graph, modules)
    writes = [node for node in graph.nodes if writes_in_place(node, modules)]
    touched = {owner for write in writes for node in written(write) for owner in memory[node]}
    got = {str(node.target) for node in touched if node.op == "get_attr"}
    made = {name for name in got if name.startswith("_tensor_constant")}
    if not made:
        return
    held = {id(t): t for module in root.modules() for t in pytree.tree_leaves(vars(module)) if isinstance(t, Tensor)}
    places = collections.Counter(_storage_of(tensor) for tensor in held.values())
    renewed: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in made:
            continue
        if places[_storage_of(getattr(root, str(node.target)))] > 1:
            raise Unfaithful(
                "freeze: the forward writes into a view of a tensor that is not computed from its input, which a plan "
                "would not see. Write into the tensor itself (t[i] = value), or use fused_resnet.fuse."
            )
        if node.target not in renewed:
            with graph.inserting_after(node):
                renewed[node.target] = graph.call_function(copy_tensors, (node,))
        own = renewed[node.target]
        node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _let_views_copy(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """`view` as `reshape`, because a plan's activations are channels_last, which few views survive.

    Not where the model writes memory on one side of the view and reads it on the other: there a view stays a view.
    Raises ValueError there for the others, of which the layout decides whether they copy.
    """
    memory, order = memory_of(graph, modules), {node: index for index, node in enumerate(graph.nodes)}
    writes = [node for node in graph.nodes if writes_in_place(node, modules)]
    for view in graph.nodes:
        if view.op == "call_function" and view.target is torch.as_strided or view.target == "as_strided":
            raise ValueError(f"freeze: {view} reads memory by strides, and a plan has other strides than the model.")
        is_module = isinstance(module_of(view, modules), nn.Flatten)
        if not (is_module or view.op in ("call_function", "call_method") and view.target in _LAYOUT_DECIDES):
            continue
        if view.target == "view" and isinstance(view.args[-1], torch.dtype):
            continue
        lost = _lost_write(view, writes, list(graph.nodes), memory, order)
        if lost is not None and view.target != "view":
            raise ValueError(
                f"freeze: {lost[0]} writes memory that {lost[1]} reads through {view}: whether it sees the write "
                f"depends on the memory layout, which a plan changes. Copy first (clone())."
            )
        if lost is None and view.target == "view":
            view.target = "reshape"


def _lost_write(
    view: fx.Node, writes: list[fx.Node], nodes: list[fx.Node], memory: dict[fx.Node, set[fx.Node]], order: dict
) -> Optional[tuple[fx.Node, fx.Node]]:
    """A write on one side of the view and a later reader on the other, if there are any."""
    base = memory[view] - {view}
    for write in writes:
        touched = set().union(*(memory[node] for node in written(write)))
        if order[write] < order[view] or not touched & memory[view]:
            continue
        through_view = view in touched
        for reader in nodes[order[write] + 1 :]:
            if any((view in memory[n]) != through_view and memory[n] & base for n in reader.all_input_nodes):
                return write, reader
    return None


def _leave_input_alone(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Work on a copy of the input where the model writes it. Whether it does."""
    memory, placeholder = memory_of(graph, modules), next(iter(graph.nodes))
    writes = [node for node in graph.nodes if writes_in_place(node, modules)]
    if any(placeholder in memory[node] for write in writes for node in written(write)):
        with graph.inserting_after(placeholder):
            own = graph.call_function(copy_tensors, (placeholder,))
        placeholder.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
        return True
    return False


def _return_new_memory(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Copy outputs that may be the input or a buffer: what a plan returns belongs to the caller."""
    memory, (output,) = memory_of(graph, modules), [node for node in graph.nodes if node.op == "output"]
    for node in output.all_input_nodes:
        if any(owner.op in ("placeholder", "get_attr") for owner in memory[node]):
            with graph.inserting_before(output):
                output.replace_input_with(node, graph.call_function(copy_tensors, (node,)))


def copy_tensors(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def memory_of(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, set[fx.Node]]:
    """For each node, the nodes whose memory its result may be."""
    memory: dict[fx.Node, set[fx.Node]] = {}
    attributes: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        owners = [] if _is_fresh(node, modules) else node.all_input_nodes
        if node.op == "get_attr":
            owners = [attributes.setdefault(node.target, node)]
        memory[node] = {node}.union(*(memory.get(owner, set()) for owner in owners))
    return memory


def written(write: fx.Node) -> list[fx.Node]:
    """The arguments that an in-place operation may write: the first, or `out`; of an operator or a module, any."""
    if write.op == "call_module" or getattr(write.target, "_schema", None) is not None or "out" in write.kwargs:
        return write.all_input_nodes
    return write.all_input_nodes[:1]


def _is_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return (isinstance(module, _FRESH) or is_norm(module)) and has_stock_call(module)
    is_call = node.op in ("call_function", "call_method")
    return is_call and node.target in _FRESH_FUNCTIONS and not writes_in_place(node, modules)


def module_of(node: Optional[fx.Node], modules: dict[str, nn.Module]) -> Optional[nn.Module]:
    return modules[str(node.target)] if node is not None and node.op == "call_module" else None


def only_user(node: fx.Node) -> Optional[fx.Node]:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def writes_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node writes into memory that it is given."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    schema = getattr(node.target, "_schema", None)  # of an operator, torch.ops.aten.relu_.default
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_inplace_name = name.endswith("_") and not name.endswith("__") or name in ("setitem", "__setitem__")
    is_augmented = getattr(node.target, "__module__", "") == "_operator" and name in _AUGMENTED
    is_asked_for = "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return bool(schema is not None and schema.is_mutable) or is_inplace_name or is_augmented or is_asked_for
