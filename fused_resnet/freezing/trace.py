"""A model as a torch.fx graph that does in each call what the model does, or a refusal.

The graph has one input, and leaf modules of its own.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, Callable, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fused_resnet.freezing.copies import copy_of, copy_with_parameters, unwrapped
from fused_resnet.freezing.memory import leave_input_alone, let_views_copy, renew_made_tensors, return_new_memory
from fused_resnet.freezing.respelling import call_functions, call_modules
from fused_resnet.freezing.state import changes, forget_constants, keeps_state, names_in, state_of
from fused_resnet.graphs.nodes import is_made_in_forward, skip_identities
from fused_resnet.graphs.random_state import random_state
from fused_resnet.graphs.tracer import TRACING, Tracer, Unfaithful, WritesState, count_writes
from fused_resnet.nn.stock import has_stock_call

_WEIGHT_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


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


def _draws() -> Unfaithful:
    return Unfaithful(
        "freeze: the forward draws random numbers that depend on no input, which a plan would repeat in each call. "
        "Draw them like a tensor (torch.rand_like), or use fused_resnet.fuse."
    )


def trace(model: nn.Module, respelled: Callable[[nn.Module], nn.Module] = lambda copied: copied) -> fx.GraphModule:
    """The model as a graph of one input over copies of its leaf modules. meta["writes_input"]: whether the model does,
    which the graph does to a copy. respelled: gives a copy of the model another form before it is traced.

    Raises Untraceable when torch.fx cannot have it, ValueError when the graph would not be the model. Unfaithful when
    it would be in the first call alone, or in eval mode alone where the model is not all in eval mode.
    """
    tracer = Tracer()
    try:
        # a copy, because the forward runs: what it counts and keeps is not for the model
        copied = copy_with_parameters(model)
    except Exception as error:
        raise _untraceable(model, error) from error
    copied = respelled(copied)
    in_training = [module for module in copied.modules() if module.training]
    _set_training(in_training, False)
    _drop_checks(copied)
    _compute_weights(copied)
    for name, module in copied.named_modules():
        if not tracer.is_leaf_module(module, name):
            refuse_hooks(name, module)
    root = _Call(copied)
    _set_training([root], False)
    before, numbers = state_of(copied), random_state()
    try:
        graph = _graph_of(root)
    except WritesState as error:
        raise keeps_state(error.what) from error
    except Exception as error:
        raise _untraceable(model, error) from error
    forget_constants(copied, before)
    if changed := changes(before, state_of(copied)):
        graph = _settled(root, graph, keeps_state(changed[0]))
    elif random_state() != numbers:  # another thread may have drawn them: then a second graph is the same
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
    renew_made_tensors(root, graph, modules)
    call_modules(root, graph, modules)
    let_views_copy(graph, modules)
    writes_input = leave_input_alone(graph, modules)
    return_new_memory(graph, modules)
    for node in graph.nodes:
        if node.meta.pop("is_of_buffers", False):
            setattr(root, f"_of_buffers{node.target}", getattr(root, node.target))
            node.target = f"_of_buffers{node.target}"
    traced = cast(fx.GraphModule, copy_of(fx.GraphModule(root, graph)).eval())
    traced.meta["writes_input"] = writes_input
    return traced


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
    before = state_of(root.model)
    try:
        again = _graph_of(root)
    except Exception as error:
        raise refusal from error
    if changes(before, state_of(root.model)) or not _are_alike(root, graph, again):
        raise refusal
    return again


def _compare_modes(root: Any, graph: fx.Graph, in_training: list[nn.Module]) -> None:
    """Raises Unfaithful where these modules do something else in training mode."""
    before = state_of(root.model)
    try:
        _set_training(in_training, True)
        other = _graph_of(root)
    except Exception:
        other = None
    finally:
        _set_training(in_training, False)
    if other is None or changes(before, state_of(root.model)) or not _are_alike(root, graph, other):
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
    return any(isinstance(member, FunctionType) and "training" in names_in(member.__code__) for member in members)


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
