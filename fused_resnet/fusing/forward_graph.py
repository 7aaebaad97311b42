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

import contextlib
import functools
import inspect
import threading
from typing import Any, Callable, Iterator, Optional

import torch
from torch import Tensor, fx, nn

from fused_resnet.fusing.outside import attributes_put_back
from fused_resnet.fusing.proxies import WatchedProxy
from fused_resnet.fusing.reads import Reads, reads_of
from fused_resnet.fusing.watch import CannotRewrite, Watch
from fused_resnet.graphs.random_state import comparable, generators
from fused_resnet.graphs.tracer import TRACING, Tracer
from fused_resnet.nn.fused import plain_class_of, set_class

_KNOWN_FUNCTIONS = {"torch", "_operator", "operator", "builtins", "math", "collections"}
_MISSING = object()


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

    proxy_class = WatchedProxy
    to_bool, iter, keys = _noted(Tracer.to_bool), _noted(Tracer.iter), _noted(Tracer.keys)
    call_module = _noted(Tracer.call_module)

    def __init__(self, watch: Watch) -> None:
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
    watch, cls, mode = Watch(module), type(module), module.__dict__.get("training", _MISSING)
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
        written = attributes_put_back(before)
    if written:
        watch.note(CannotRewrite(f"its forward writes its attribute {written[0]}"))
    watch.check()
    for node in graph.nodes:
        node.type = None  # annotations are of no use here
    # there is a program for each mode of the module, and classes are compared with what the parent holds
    names = sorted((path, name) for path, name in watch.read if name != "__class__" and (path or name != "training"))
    return graph, reads_of(module, names)


def _of_one_tensor(plain: Any, watch: Watch) -> type:
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
    watched = generators()
    before = [get() for get, _ in watched]
    drew = False
    try:
        yield
    finally:
        for (get, restore), state in zip(watched, before):
            if comparable(get()) != comparable(state):
                drew = True
                restore(state)
        if drew:
            raise CannotRewrite("its forward draws random numbers")


@contextlib.contextmanager
def _nothing_written_outside(module: nn.Module, watch: Watch) -> Iterator[None]:
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
