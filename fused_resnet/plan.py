"""freeze: a model as an inference plan. BN folded, weights packed for the real input size, sums written in place.

The model is traced once (torch.fx). For each input shape the traced graph is lowered to a plan: every
conv -> BN -> (+ residual) -> activation becomes one call of the backend chosen for that very problem, everything
else stays the module or function it was. A plan is an fx.GraphModule, so it prints as Python.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import logging
import math
import operator
import threading
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree

from fused_resnet import backends, reference, workspace
from fused_resnet.nn import why_not_fused
from fused_resnet.problem import ConvOperands, ConvProblem, conv_problem, dtype_name
from fused_resnet.tracing import POOL_FUNCTIONS, POOLS, has_stock_call, module_of, only_user, trace, writes_in_place

MAX_PLANS = 8

log = logging.getLogger("fused_resnet")
_CAPTURING = threading.Lock()

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu",
}  # fmt: skip


def freeze(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: Optional[torch.dtype] = None,
    backend: str = "auto",
) -> "FrozenModel":
    """An inference-only copy of `model`: BN folded, weights packed, one plan per input shape, a CUDA graph on GPUs.

    model: in eval mode, traceable by torch.fx; it is not changed, and later changes to it do not reach the frozen
    copy. example_input: a tensor as the model takes it; its plan is made now, others when their shape is first seen.
    dtype: what the arithmetic runs in (fp32, bf16, fp16); default, the model's own. Inputs and outputs keep the
    example's dtype. backend: "auto", or the one that every convolution must use.

    Calls are safe from several threads, outputs are fresh tensors, and autocast around a call changes nothing. A
    frozen CPU plan may turn NaN into 0 where it meets a ReLU, as oneDNN does. On glibc, malloc is told to keep as much
    freed memory as a plan works in (`workspace`).

    Raises RuntimeError when the model is in training mode, TypeError and ValueError when the example does not fit the
    model or the model cannot be traced, BackendError when `backend` cannot run one of its convolutions.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: expected an nn.Module, got {type(model).__name__}.")
    if not isinstance(example_input, Tensor) or not example_input.is_floating_point():
        is_tensor = isinstance(example_input, Tensor)
        got = f"a {dtype_name(example_input.dtype)} tensor" if is_tensor else type(example_input)
        raise TypeError(f"freeze: example_input must be a floating-point tensor as the model takes it, got {got}.")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(
            f"freeze: {training[0]} is in training mode; call model.eval() first. To train, use fused_resnet.fuse."
        )
    device = next((p.device for p in model.parameters()), example_input.device)
    if example_input.device != device:
        raise TypeError(f"freeze: example_input is on {example_input.device} but the model is on {device}.")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtype is None:
        dtype = dtypes.pop() if len(dtypes) == 1 else example_input.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"freeze: dtype must be float32, bfloat16, float16 or float64, got {dtype}.")
    backends.check_name("freeze", backend)
    frozen = [name for name, module in model.named_modules() if isinstance(module, FrozenModel)]
    if frozen:
        raise ValueError(f"freeze: {frozen[0] or 'the model'} is frozen already. Freeze what it was made from.")
    return FrozenModel(model, example_input, dtype, backend)


class FrozenModel(nn.Module):
    """What `freeze` returns. Callable like the model; `unfreeze()` gives the model back."""

    def __init__(self, model: nn.Module, example_input: Tensor, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        super().train(False)
        self.dtype, self.backend = dtype, backend
        self.device, self.input_dtype = example_input.device, example_input.dtype
        self.__dict__["_original"] = model  # not a submodule: its parameters are not this model's
        self.__dict__["_traced"] = trace(model)
        self._reset_plans()
        self._plan_for(example_input)

    def forward(self, x: Tensor) -> Any:
        self._check_input(x)
        plan = self._plan_for(x)
        with _plainly(self.device):
            return plan(x)

    def plan(self, x: Tensor) -> fx.GraphModule:
        """The plan for inputs like x, made now if there is none: `print(frozen.plan(x).code)`."""
        self._check_input(x)
        return self._plan_for(x).module

    def unfreeze(self) -> nn.Module:
        """The model this was frozen from, as it is now."""
        return self._original

    def train(self, mode: bool = True) -> "FrozenModel":
        if mode:
            raise RuntimeError("a frozen model cannot be trained: train frozen.unfreeze() and freeze it again.")
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> "FrozenModel":
        raise RuntimeError(
            "a frozen model cannot be moved or converted: move frozen.unfreeze() and freeze it again (dtype= converts)."
        )

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype != self.input_dtype or x.device != self.device:
            got = f"{dtype_name(x.dtype)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"frozen for {dtype_name(self.input_dtype)} inputs on {self.device}, got {got}.")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a frozen model has no gradients: use fused_resnet.fuse, or call it under no_grad.")

    def _plan_for(self, x: Tensor) -> "_Plan":
        key = tuple(x.shape)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                with _plainly(self.device):
                    plan = self._plans[key] = _make_plan(self._traced, x.detach(), self.dtype, self.backend)
                if len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def _reset_plans(self) -> None:
        self._lock = threading.Lock()
        self._plans: collections.OrderedDict[tuple, _Plan] = collections.OrderedDict()

    def __getstate__(self) -> dict:
        rebuilt = ("_lock", "_plans")  # packed weights and graphs are made again where they are needed
        return {name: value for name, value in self.__dict__.items() if name not in rebuilt}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._reset_plans()


# --------------------------------------------------------------------------------------------------------- lowering


class _Match(NamedTuple):
    """conv -> bn? -> add? -> activation?, each the only user of the one before it."""

    conv: fx.Node
    bn: Optional[fx.Node]
    add: Optional[fx.Node]
    act: Optional[fx.Node]

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self if node is not None]

    @property
    def residual(self) -> Optional[fx.Node]:
        """The addend that is not this convolution. Read from the graph: lowering replaces nodes."""
        head = self.bn or self.conv
        return None if self.add is None else next(arg for arg in self.add.args if arg is not head)


class FrozenConv(nn.Module):
    """One fused convolution of a plan: the problem, the backend chosen for it, and its packed weight."""

    def __init__(
        self, problem: ConvProblem, backend: backends.Backend, weight: Tensor, bias: Optional[Tensor]
    ) -> None:
        super().__init__()
        self.problem, self.backend, self.in_place = problem, backend, False
        self.weight, self.bias = weight, bias
        self.uses_onednn = backend.name == "onednn"
        if self.uses_onednn:
            # Packed without the input's real size, some shapes fall to a reference loop: bf16 1x1 256->1024 at 14x14
            # took 11 ms instead of 0.22 (torch 2.13, one core, AVX-512 bf16).
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, problem.padding, problem.stride, problem.dilation, problem.groups,
                [problem.N, problem.C, problem.H, problem.W],
            )  # fmt: skip

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if self.uses_onednn:
            return backends.onednn_convolution(
                self.problem, x, self.weight, self.bias, residual, into_residual=self.in_place
            )
        return self.backend.run(self.problem, ConvOperands(x, self.weight, bias=self.bias, residual=residual))

    def extra_repr(self) -> str:
        return f"{self.problem}, {self.backend.name}{', in place' if self.in_place else ''}"


class FrozenLinear(nn.Module):
    """A classifier on a CPU, its weight packed for oneDNN and the batch size."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, batch: int) -> None:
        super().__init__()
        with torch.no_grad():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.to(dtype), batch)
            self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class _Plan:
    """A lowered graph between the caller's dtype and the plan's."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, output_dtype: torch.dtype) -> None:
        self.module, self.dtype, self.output_dtype = module, dtype, output_dtype

    def __call__(self, x: Tensor) -> Any:
        x = x.to(self.dtype)  # not together with the layout: fp32 to bf16 and NHWC at once took 2.5 times as long
        out = self.module(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
        if self.dtype == self.output_dtype:
            return out
        return pytree.tree_map(self._converted, out)

    def _converted(self, value: Any) -> Any:
        return value.to(self.output_dtype) if isinstance(value, Tensor) and value.dtype == self.dtype else value


class _GraphedPlan(_Plan):
    """The same, captured once as a CUDA graph. Replays share static buffers, so they take turns."""

    def __init__(self, plan: _Plan, example: Tensor) -> None:
        super().__init__(plan.module, plan.dtype, plan.output_dtype)
        self._lock = threading.Lock()
        # CUDA allows one capture at a time in a process; a normal tensor can be written in and out of inference mode
        with _CAPTURING, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(example.device):
            self._finished = torch.cuda.Event()
            self._input = torch.empty_like(example).copy_(example)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled, and workspaces made, before the capture
                for _ in range(3):
                    plan(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = plan(self._input)

    def __call__(self, x: Tensor) -> Any:
        with self._lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._finished)  # another stream may still be reading the buffers
            self._input.copy_(x)
            self._graph.replay()
            out = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self._output)
            self._finished.record(stream)
            return out

    def __del__(self) -> None:
        # the plan may be dropped while another stream still replays it
        if finished := self.__dict__.get("_finished"):
            finished.synchronize()


@contextlib.contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Without gradients and outside autocast: a plan's dtypes are its own."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext():
        yield


def _make_plan(traced: fx.GraphModule, x: Tensor, dtype: torch.dtype, backend: str) -> _Plan:
    module = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    _infer_shapes(module, x)
    modules = dict(module.named_modules())
    for match in _matches(module.graph, modules):
        _lower(module, modules, match, dtype, backend)
    _mark_sums_in_place(module.graph, modules)
    if x.device.type == "cpu" and backend in ("auto", "onednn") and backends.onednn_missing(dtype) is None:
        _pack_linears(module, modules, dtype)
    module.delete_all_unused_submodules()
    _convert_the_rest(module, dtype)
    module.recompile()
    plan = _Plan(module.eval(), dtype, x.dtype)
    if x.device.type == "cpu":
        workspace.keep(*_workspace_of(module.graph, dtype))
    _try(plan, x)
    if x.device.type != "cuda" or torch.version.hip:
        return plan
    try:
        return _GraphedPlan(plan, x)
    except RuntimeError as error:
        log.warning("frozen without a CUDA graph: %s cannot be captured (%s)", _shown(x), error)
        return plan


def _try(plan: _Plan, x: Tensor) -> None:
    """Run a new plan once, so that what it cannot do is said where it is made."""
    try:
        plan(x)
    except Exception as error:
        raise ValueError(f"freeze: the plan for an input of {_shown(x)} does not run: {error}") from error


def _shown(x: Tensor) -> str:
    return f"shape {tuple(x.shape)} in {dtype_name(x.dtype)}"


def _workspace_of(graph: fx.Graph, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the largest tensor, and of all that are alive at once, as a plan computes its nodes in order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    change = [0] * (len(order) + 1)  # bytes that come alive at each node
    largest = 0
    for node, index in order.items():
        size = math.prod(_shape_of(node) or (0,)) * dtype.itemsize
        largest = max(largest, size)
        change[index] += size
        change[1 + max((order[user] for user in node.users), default=index)] -= size
    return largest, max(itertools.accumulate(change))


def _infer_shapes(module: fx.GraphModule, x: Tensor) -> None:
    """Write each node's shape into its meta, without computing anything."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), x)
    try:
        with torch.no_grad():
            ShapeProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x.to(parameter.dtype))
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"freeze: the model cannot take an input of shape {tuple(x.shape)}: {str(cause).splitlines()[0]}"
        ) from error


def _matches(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[_Match]:
    order = {node: index for index, node in enumerate(graph.nodes)}
    heads: dict[fx.Node, _Match] = {}  # by the last node of conv -> bn?
    for node in graph.nodes:
        conv = module_of(node, modules)
        if conv is None or why_not_fused(None, [(conv, None)]) is not None:
            continue
        if len(node.args) != 1 or node.kwargs or len(_shape_of(node.args[0]) or ()) != 4:
            continue
        user = only_user(node)
        bn = module_of(user, modules)
        has_bn = type(bn) is nn.BatchNorm2d and why_not_fused(None, [(conv, bn)]) is None
        heads[user if has_bn else node] = _Match(node, user if has_bn else None, None, None)

    matches = []
    for head, match in heads.items():
        add = only_user(head)
        if add is not None and _is_plain_add(add):
            (other,) = [arg for arg in add.args if arg is not head] or [None]
            # both addends may be convolutions (a projection shortcut): the later one takes the sum
            is_later = other in heads and only_user(other) is add and order[other] > order[head]
            # an augmented add writes its first argument, which others may read later unless it is a convolution's own
            is_private = not writes_in_place(add, modules) or add.args[0] in heads and only_user(add.args[0]) is add
            is_alike = _shape_of(other) == _shape_of(head) and _dtype_of(other) == _dtype_of(head)
            if other is not None and not is_later and is_private and is_alike:
                match = match._replace(add=add)
        act = only_user(match.nodes[-1])
        if act is not None and _activation_of(act, modules) != "none":
            match = match._replace(act=act)
        matches.append(match)
    owned = {node for match in matches for node in match.nodes}
    writes = [order[node] for node in graph.nodes if node not in owned and writes_in_place(node, modules)]
    return [_before_writes(match, order, writes) for match in matches]


def _before_writes(match: _Match, order: dict[fx.Node, int], writes: list[int]) -> _Match:
    """The part of a match that no foreign in-place operation cuts: the convolution moves to the match's last node,
    and must not move past a write to its input."""
    first = order[match.conv]
    while len(match.nodes) > 1 and any(first < write < order[match.nodes[-1]] for write in writes):
        last = match._fields[max(i for i, node in enumerate(match) if node is not None)]
        match = match._replace(**{last: None})
    return match


def _lower(module: fx.GraphModule, modules: dict, match: _Match, dtype: torch.dtype, backend: str) -> None:
    """Replace a match by one FrozenConv, placed where its last node was."""
    conv: nn.Conv2d = modules[match.conv.target]
    weight, bias = fold(conv, modules[match.bn.target] if match.bn else None, dtype)
    source, residual, tail = match.conv.args[0], match.residual, match.nodes[-1]
    described = ConvOperands(
        torch.empty(_shape_of(source), dtype=dtype, device="meta"),
        weight.to("meta"),
        bias=None if bias is None else bias.to("meta"),
        residual=None if residual is None else torch.empty(_shape_of(residual), dtype=dtype, device="meta"),
    )
    activation = "none" if match.act is None else _activation_of(match.act, modules)
    problem = conv_problem(described, conv.stride, conv.padding, conv.dilation, conv.groups, activation)
    problem = problem._replace(device=weight.device.type)
    name = f"fused_{match.conv.name}"
    while hasattr(module, name):
        name += "_"
    modules[name] = FrozenConv(problem, backends.select(problem, backend), weight, bias)
    module.add_submodule(name, modules[name])
    with module.graph.inserting_before(tail):
        fused = module.graph.call_module(name, (source,) if residual is None else (source, residual))
    fused.meta = dict(tail.meta)
    tail.replace_all_uses_with(fused)
    for node in reversed(match.nodes):
        module.graph.erase_node(node)


def _pack_linears(module: fx.GraphModule, modules: dict, dtype: torch.dtype) -> None:
    for node in module.graph.nodes:
        linear, shape = module_of(node, modules), _shape_of(node.args[0]) if node.args else None
        if type(linear) is not nn.Linear or not has_stock_call(linear) or node.kwargs or shape is None:
            continue
        if len(shape) == 2 and shape[0] and type(linear.weight) is nn.Parameter:
            name = f"packed_{node.name}"
            while hasattr(module, name):
                name += "_"
            modules[name] = FrozenLinear(linear, dtype, shape[0])
            module.add_submodule(name, modules[name])
            node.target = name


def _mark_sums_in_place(graph: fx.Graph, modules: dict) -> None:
    """Let a convolution write its sum over the residual where nothing reads the residual's memory afterwards.

    The residual must be memory of its own (made by a fused convolution or a pooling) and every other reader of it
    a fused convolution or a pooling that comes earlier: those return no views. A convolution whose input is the
    residual itself never qualifies.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        conv = module_of(node, modules)
        if not isinstance(conv, FrozenConv) or len(node.args) < 2 or not conv.uses_onednn:
            continue
        source, residual = node.args
        readers = [user for user in residual.users if user is not node]
        conv.in_place = (
            source is not residual
            and _owns_its_memory(residual, modules)
            and all(order[reader] < order[node] and _owns_its_memory(reader, modules) for reader in readers)
        )


def _owns_its_memory(node: fx.Node, modules: dict) -> bool:
    module = module_of(node, modules)
    if module is not None:
        return isinstance(module, (FrozenConv, *POOLS)) and has_stock_call(module)
    return node.op == "call_function" and node.target in POOL_FUNCTIONS


def _convert_the_rest(module: fx.GraphModule, dtype: torch.dtype) -> None:
    """Give copies in `dtype` to the modules that were not lowered; a norm's vectors are fp32 beside 16-bit inputs."""
    for name, child in list(module.named_modules()):
        tensors = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        is_norm = isinstance(child, nn.modules.batchnorm._NormBase)
        wanted = torch.promote_types(dtype, torch.float32) if is_norm else dtype
        if not any(_differs(t, wanted) for t in tensors):
            continue
        converted = module if child is module else copy.copy(child)
        own = {**dict(child.named_parameters(recurse=False)), **dict(child.named_buffers(recurse=False))}
        converted._parameters, converted._modules = {}, dict(child._modules)
        converted._buffers = {k: t.detach().to(wanted) if _differs(t, wanted) else t.detach() for k, t in own.items()}
        for key in child._parameters.keys() - own.keys():  # bias=None stays None
            converted.register_parameter(key, None)
        if child is not module:
            module.set_submodule(name, converted)


def _differs(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtype


def fold(conv: nn.Conv2d, bn: Optional[nn.BatchNorm2d], dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
    """(weight * scale, shift) of conv -> BN in eval mode, computed in fp64; the weight in channels_last."""
    operands = ConvOperands(conv.weight, conv.weight, bias=conv.bias)
    if bn is not None:
        operands = operands._replace(
            bn_weight=bn.weight, bn_bias=bn.bias, bn_mean=bn.running_mean, bn_var=bn.running_var, eps=bn.eps
        )
    with torch.no_grad():
        scale, shift = reference.scale_and_shift(operands, torch.float64)
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    has_shift = conv.bias is not None or bn is not None
    return weight.to(dtype, memory_format=torch.channels_last), shift.to(dtype) if has_shift else None


# ------------------------------------------------------------------------------------------------- questions to nodes


def _dtype_of(node: Any) -> Optional[torch.dtype]:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return getattr(meta, "dtype", None)


def _shape_of(node: Any) -> Optional[tuple[int, ...]]:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def _is_plain_add(node: fx.Node) -> bool:
    is_call = node.op in ("call_function", "call_method")
    return is_call and node.target in _ADD and len(node.args) == 2 and not node.kwargs


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        module = modules[node.target]
        return "none" if why_not_fused(module, []) is not None else _ACTIVATIONS.get(type(module), "none")
    if node.op not in ("call_function", "call_method") or len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return "none"
    return _ACTIVATIONS.get(node.target, "none")
