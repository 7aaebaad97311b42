"""A model as a torch.fx graph whose reading and writing of memory is what the model's was. For `plan`.

What torch.fx alone loses and this keeps: `a += b` writes a's memory; default arguments are what the model sees, not
proxies; other threads may call modules while one is traced; a view that becomes a copy is not written through.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import operator
import threading
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from fused_resnet.nn import is_norm, replaced_call

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
POOL_FUNCTIONS = (F.max_pool2d, F.avg_pool2d)
# Modules that return new memory, never their input or a view of it.
_FRESH = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase, *POOLS, nn.AdaptiveAvgPool2d)
_FRESH_FUNCTIONS = {
    *POOL_FUNCTIONS, F.conv2d, F.linear, F.adaptive_avg_pool2d, F.batch_norm, "clone", torch.clone, torch.cat,
    operator.add, operator.sub, operator.mul, torch.add, "add", "mul", "sum", "mean", torch.relu, "relu",
}  # fmt: skip
# They return their input itself; dropout in eval mode.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_WEIGHT_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
_AUGMENTED = {f"i{name}" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
# A view of contiguous memory, a copy of channels_last memory; or the other way round.
_LAYOUT_DECIDES = {"view", "reshape", "flatten", "ravel", "contiguous", torch.reshape, torch.flatten, torch.ravel}
# torch.fx patches nn.Module while it traces: one trace at a time, or the patches of two are undone in the wrong order.
TRACING = threading.RLock()


class Proxy(fx.Proxy):
    """Keeps `a += b` the write to a's memory that it is; torch.fx alone records a new tensor."""


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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self.proxy_class(node, self)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
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


class Untraceable(ValueError):
    """torch.fx cannot trace a model."""


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of one input over copies of its leaf modules. meta["writes_input"]: whether the model does,
    which the graph does to a copy.

    Raises Untraceable when torch.fx cannot have it, ValueError when the graph would not be the model.
    """
    tracer = Tracer()
    try:
        # a copy, because the forward runs: what it counts and keeps is not for the model
        copied = copy_of(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception as error:
        raise _untraceable(model, error) from error
    _compute_weights(copied)
    for name, module in copied.named_modules():
        if not tracer.is_leaf_module(module, name) and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(
                f"freeze: {name or 'the model'} has forward hooks, which a plan would drop. Remove them first."
            )
    root = _Call(copied).eval()
    try:
        with TRACING:
            graph = tracer.trace(root)
    except Exception as error:
        raise _untraceable(model, error) from error
    modules = dict(root.named_modules())
    for node in graph.nodes:
        node.type = None  # annotations are of no use here, and as strings they cannot be pickled
    skip_identities(graph, modules)
    _let_views_copy(graph, modules)
    writes_input = _leave_input_alone(graph, modules)
    _return_new_memory(graph, modules)
    traced = copy.deepcopy(fx.GraphModule(root, graph)).eval()
    traced.meta["writes_input"] = writes_input
    return traced


def _untraceable(model: nn.Module, error: Exception) -> Untraceable:
    return Untraceable(
        f"freeze: torch.fx cannot trace {type(model).__name__}: {error}. Freeze the part that is a plain network, "
        "or use fused_resnet.fuse."
    )


def copy_of(model: nn.Module, copies: Optional[dict[int, Any]] = None) -> nn.Module:
    """A deep copy, in which `copies` stand for what they are copies of (by id).

    deepcopy refuses tensors with a history, such as a pruned weight. The copy has their values.
    """
    memo: dict[int, Any] = dict(copies or {})
    for module in model.modules():
        for leaf in pytree.tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
    return copy.deepcopy(model, memo)


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


def skip_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Drop the modules that return their input. Their names."""
    skipped = []
    for node in list(graph.nodes):
        if len(node.args) == 1 and returns_its_input(module_of(node, modules)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            skipped.append(str(node.target))
    return skipped


def returns_its_input(module: Optional[nn.Module]) -> bool:
    """Whether calling this module, as it is now, does nothing."""
    if module is None or type(module) not in _IDENTITIES or not has_stock_call(module):
        return False
    return type(module) is nn.Identity or not module.training


def _let_views_copy(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """`view` as `reshape`, because a plan's activations are channels_last, which few views survive.

    Not where the model writes memory on one side of the view and reads it on the other: there a view stays a view,
    and for the others, of which the layout decides whether they copy, it is a ValueError.
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
    """Of each node, the nodes whose memory its result may be."""
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


def has_stock_call(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else: no hooks, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or torch_module._has_any_global_hook()
    return not hooks and replaced_call(module) is None


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
