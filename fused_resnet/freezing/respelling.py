"""Traced graphs in the spelling that plans have rules for.

torch.export's graphs call ATen's operators: they become the functions and methods that models call. Functions that take
the model's own weights become modules over those very weights.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.graphs.nodes import add_child
from fused_resnet.graphs.spelling import ATEN_CONVOLUTIONS, CONVOLUTIONS, arguments_of

_ATEN = torch.ops.aten
_BATCH_NORM, _MAX_POOL = _ATEN._native_batch_norm_legit_no_training.default, _ATEN.max_pool2d_with_indices.default
_DROPOUTS = tuple(
    getattr(_ATEN, name).default for name in ("dropout", "dropout_", "feature_dropout", "feature_dropout_")
)
# Operators by the function, or the name of the method, that takes the same arguments.
_CALLS: dict[Any, Any] = {
    **ATEN_CONVOLUTIONS, _ATEN.linear.default: F.linear,
    _ATEN.batch_norm.default: torch.batch_norm, _ATEN.add.Tensor: torch.add, _ATEN.add_.Tensor: "add_",
    _ATEN.relu.default: torch.relu, _ATEN.relu_.default: torch.relu_, _ATEN.silu.default: F.silu,
    _ATEN.max_pool2d.default: F.max_pool2d, _ATEN.avg_pool2d.default: F.avg_pool2d,
    _ATEN.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d, _ATEN.mean.dim: "mean", _ATEN.sum.dim_IntList: "sum",
    _ATEN.mul.Tensor: operator.mul, _ATEN.cat.default: torch.cat, _ATEN.clone.default: torch.clone,
    _ATEN.view.default: "view", _ATEN.reshape.default: "reshape", _ATEN.flatten.using_ints: torch.flatten,
    _ATEN.contiguous.default: "contiguous", _ATEN.as_strided.default: torch.as_strided,
}  # fmt: skip
# And those of activations, whose arguments say which one it is, and which write in place.
_ACTIVATIONS: dict[Any, tuple[Any, tuple, bool]] = {
    _ATEN.silu_.default: (F.silu, (), True),
    _ATEN.hardtanh.default: (F.relu6, (0, 6), False),
    _ATEN.hardtanh_.default: (F.relu6, (0, 6), True),
}


def call_functions(graph: fx.Graph) -> None:
    """Respell what ATen's operators compute, of dropout in eval mode nothing."""
    for node in list(graph.nodes):
        op, args = node.target, node.args
        if node.op != "call_function":
            continue
        if op in _DROPOUTS and args[2:] == (False,):
            node.replace_all_uses_with(args[0])
            graph.erase_node(node)
        elif op in (_BATCH_NORM, _MAX_POOL):
            if all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
                for first in list(node.users):
                    first.replace_all_uses_with(node)
                    graph.erase_node(first)
                is_norm = op is _BATCH_NORM
                node.target = torch.batch_norm if is_norm else F.max_pool2d
                node.args = (*args[:5], False, *args[5:], True) if is_norm else args
        elif op in _ACTIVATIONS:
            function, limits, is_in_place = _ACTIVATIONS[op]
            if args[1:] == limits:
                node.target, node.args, node.kwargs = function, args[:1], {"inplace": is_in_place}
        elif op in _CALLS:
            node.target = _CALLS[op]
            node.op = "call_method" if isinstance(node.target, str) else node.op


def call_modules(root: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Have modules compute convolutions and linear layers whose weights are attributes, and max-poolings.

    Not what torch would refuse, so that it is refused when it is called.
    """
    for node in list(graph.nodes):
        call, make = arguments_of(node), _MODULES.get(node.target)
        x, weights = call.pop("input", None), {name: call[name] for name in ("weight", "bias") if call.get(name)}
        is_kept = all(getattr(weight, "op", None) == "get_attr" for weight in weights.values())
        if make is None or not is_kept or {*node.all_input_nodes} != {x, *weights.values()}:
            continue
        try:
            module = make(**{**call, **{name: _parameter(root, weight) for name, weight in weights.items()}})
        except (TypeError, ValueError):
            continue
        holder, _, _ = str(weights["weight"].target if weights else "").rpartition(".")
        stem = holder.replace(".", "_") or node.name
        with graph.inserting_before(node):
            called = graph.create_node("call_module", add_child(root, modules, stem, module), (x,), name=stem)
        node.replace_all_uses_with(called)
        for unused in (node, *weights.values()):
            if not unused.users:
                graph.erase_node(unused)


def _parameter(root: nn.Module, attribute: fx.Node) -> nn.Parameter:
    tensor: Any = functools.reduce(getattr, str(attribute.target).split("."), root)
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _convolution(
    rank: Optional[int], weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, transposed: bool = False, output_padding: Any = 0,
) -> Any:  # fmt: skip
    if transposed or rank not in (weight.dim(), None) or weight.dim() not in _CONVOLUTIONS:
        raise ValueError("no convolution that a module computes")
    K, C, *window = weight.shape
    make = _CONVOLUTIONS[weight.dim()]
    conv = make(C * groups, K, window, stride, padding, dilation, groups, bias is not None, device="meta")
    return _holding(conv, weight, bias)


def _linear(weight: Tensor, bias: Any = None) -> Any:
    K, C = weight.shape
    return _holding(nn.Linear(C, K, bias is not None, device="meta"), weight, bias)


def _holding(module: Any, weight: Tensor, bias: Any) -> Any:
    """A module with these very parameters for those that it was made with."""
    if bias is not None and bias.shape != module.bias.shape:
        raise ValueError("no bias that such a module has")
    module.weight, module.bias = weight, bias
    return module


def _max_pool2d(kernel_size: Any, stride: Any = None, **rest: Any) -> nn.Module:
    return nn.MaxPool2d(kernel_size, None if stride in ((), []) else stride, **rest)


_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_MODULES: dict[Any, Any] = {
    **{function: functools.partial(_convolution, rank) for function, rank in CONVOLUTIONS.items()},
    F.linear: _linear,
    F.max_pool2d: _max_pool2d,
}
