"""A traced model as a plan for one input shape: BN folded, weights packed for that size, sums written in place.

The graph that torch.fx traced is lowered: every conv -> BN -> (+ residual) -> activation becomes one call of the
backend chosen for that very problem, everything else stays the module or function it was. A plan's graph is an
fx.GraphModule, so it prints as Python.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import math
import threading
from collections.abc import Iterator
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.freezing import dtypes, layouts
from fused_resnet.freezing.dtypes import Conversion, facts_of, first_line
from fused_resnet.freezing.state import content_of_tensor
from fused_resnet.graphs.matching import Match, activation_of, matches, norm_at
from fused_resnet.graphs.memory import POOL_FUNCTIONS, POOLS
from fused_resnet.graphs.nodes import module_of
from fused_resnet.graphs.spelling import CONVOLUTIONS, add_child, arguments_of
from fused_resnet.graphs.tracer import keeps_state
from fused_resnet.kernels import compiled
from fused_resnet.machine import malloc
from fused_resnet.nn.bypass import Norm, has_stock_call, norm_of
from fused_resnet.operators import affine, library_faults
from fused_resnet.operators.describe import conv_problem, pair
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import FLOAT_DTYPES, ConvProblem, dtype_name

log = logging.getLogger("fused_resnet")
_CAPTURING = threading.Lock()


class FrozenConv(nn.Module):
    """One fused convolution of a plan: the problem, the backend and config chosen for it, and its packed weight."""

    def __init__(
        self, problem: ConvProblem, selection: backends.Selection, weight: Tensor, bias: Optional[Tensor]
    ) -> None:
        super().__init__()
        self.problem, self.in_place = problem, False
        self.placed: Optional[layouts.Placed] = None  # of Triton convolutions: how `layouts` settled them
        self.weight, self.bias = weight, bias
        self.select(selection)

    def select(self, selection: backends.Selection) -> None:
        """Have this selection run it. The weight must not be packed yet, which Triton's never is."""
        self.selection = selection
        self.weight = selection.backend.pack(self.problem, self.weight, selection.config)

    @property
    def backend(self) -> backends.Backend:
        return self.selection.backend

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return self.bound()(x, residual)

    def bound(self) -> Callable[..., Tensor]:
        """(x, residual=None) -> output, with all else settled: what a plan calls."""
        if self.backend.bind is not None:
            return self.backend.bind(self.problem, self.weight, self.bias, into_residual=self.in_place)
        if self.placed is not None:
            run_placed, weight, bias = self.placed.run, self.weight, self.bias
            return lambda x, residual=None: run_placed(ConvOperands(x, weight, bias=bias, residual=residual))
        run, problem, weight, bias = self.selection.run, self.problem, self.weight, self.bias
        return lambda x, residual=None: run(problem, ConvOperands(x, weight, bias=bias, residual=residual))

    def extra_repr(self) -> str:
        layout = ", in place" if self.in_place else ", into row space" if self.writes_row_space else ""
        return f"{self.problem}, {self.backend.name}{layout}"

    @property
    def writes_row_space(self) -> bool:
        return self.placed is not None and self.placed.writes_row_space


class FrozenLinear(nn.Module):
    """A classifier on a CPU, its weight packed for oneDNN and the batch size."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, batch: int) -> None:
        super().__init__()
        with torch.no_grad():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.to(dtype), batch)
            self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.bound()(x)

    def bound(self) -> Callable[[Tensor], Tensor]:
        linear, weight, bias = torch.ops.mkldnn._linear_pointwise.default, self.weight, self.bias
        return lambda x: linear(x, weight, bias, "none", [], "")


class FrozenMaxPool(nn.Module):
    """A max-pooling on a CPU that writes no indices. x: (N, C, H, W), channels_last or copied into it."""

    def __init__(self, pool: nn.MaxPool2d, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.window = tuple(pair("pooling", value) for value in (pool.kernel_size, pool.stride, pool.padding))
        self.output_shape = output_shape

    def forward(self, x: Tensor) -> Tensor:
        return self.bound()(x)

    def bound(self) -> Callable[[Tensor], Tensor]:
        max_pool, window, shape = torch.ops.fused_resnet.cpu_max_pool2d.default, self.window, self.output_shape

        def run(x: Tensor) -> Tensor:
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            max_pool(x.contiguous(memory_format=torch.channels_last), *window, out)
            return out

        return run


class WideConv(nn.Module):
    """A convolution that is no FrozenConv and that torch would compute wrongly in a 16-bit dtype: in fp32.

    run: a module or a function of torch.nn.functional.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = copy.deepcopy(run).float() if isinstance(run, nn.Module) else run

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (dtype,) = {value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return self.run(*args, **kwargs).to(dtype)


_LOWERED = (FrozenConv, FrozenLinear, FrozenMaxPool)


class Plan:
    """A lowered graph; with a conversion, between the caller's dtypes and the plan's."""

    is_graphed = False

    def __init__(self, module: fx.GraphModule, conversion: Optional[Conversion]) -> None:
        self.module, self.conversion = module, conversion
        self._run = _bound(module)

    def taken(self, x: Tensor) -> Tensor:
        """x as the graph takes it."""
        if self.conversion is not None:
            # not together with the layout: fp32 to bf16 and NHWC at once took 2.5 times as long
            x = x.to(self.conversion.input)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def __call__(self, x: Tensor) -> Any:
        out = self._run(self.taken(x))
        if self.conversion is None:
            return out
        if isinstance(out, Tensor):
            return out.to(self.conversion.outputs[0])
        leaves, structure = pytree.tree_flatten(out)
        wanted = zip(leaves, self.conversion.outputs, strict=True)
        return pytree.tree_unflatten([v if dtype is None else v.to(dtype) for v, dtype in wanted], structure)


def _bound(module: fx.GraphModule) -> Callable[[Tensor], Any]:
    """The plan's graph as one function in which the frozen modules are plain calls.

    A module call costs little in a loop, but about 19 us between two convolutions that have emptied the caches: 1.0 of
    76.4 ms for ResNet-50 at batch 1 (EPYC Zen 4, one thread, 2026-11).
    """
    graph = copy.deepcopy(module.graph)
    modules = dict(module.named_modules())
    for node in graph.nodes:
        frozen = module_of(node, modules)
        if isinstance(frozen, _LOWERED):
            node.op, node.target = "call_function", frozen.bound()
    return fx.GraphModule(module, graph).forward


class _GraphedPlan(Plan):
    """The same, captured once as a CUDA graph. Replays share static buffers, so they take turns."""

    is_graphed = True

    def __init__(self, plan: Plan, example: Tensor) -> None:
        super().__init__(plan.module, plan.conversion)
        self._lock = threading.Lock()
        # a normal tensor can be written in and out of inference mode
        with capturing(), torch.inference_mode(False), torch.no_grad(), torch.cuda.device(example.device):
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
def capturing() -> Iterator[None]:
    """One thread at a time, which is what CUDA allows, and without garbage collection: a CUDA graph that is freed while
    another is captured ends that capture (pytorch PR 161037), and torch.cuda.graph no longer collects beforehand."""
    with _CAPTURING:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


@contextlib.contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Without gradients and outside autocast: a plan's dtypes are its own."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext():
        yield


def make_plan(traced: fx.GraphModule, x: Tensor, conversion: Optional[Conversion], backend: str) -> Plan:
    """The plan for inputs like x: as the model computes, or with its dtypes converted."""
    module = dtypes.propagated(traced, x, conversion)
    modules = dict(module.named_modules())
    for match in _matches(module.graph, modules):
        _lower(module, modules, match, backend)
    _reselect_stranded(module.graph, modules, backend)
    _mark_sums_in_place(module.graph, modules)
    _place_triton(module.graph, modules, x.device)
    if x.device.type == "cpu" and backend in ("auto", "onednn"):
        _pack_linears(module, modules)
    if x.device.type == "cpu" and compiled.load("cpu") is None:
        _replace_max_pools(module, modules)
    if conversion is not None and conversion.wanted is not None:
        _convert_the_rest(module, modules, conversion)
    if x.device.type == "cpu":
        _widen_what_is_wrong(module, modules)
    module.delete_all_unused_submodules()
    module.recompile()
    plan = Plan(module.eval(), conversion)
    if x.device.type == "cpu":
        malloc.keep(*_workspace_of(module.graph))
    _try(plan, x)
    if x.device.type != "cuda" or torch.version.hip:
        return plan
    try:
        return _GraphedPlan(plan, x)
    except RuntimeError as error:
        log.warning("frozen without a CUDA graph: %s cannot be captured (%s)", _shown(x), error)
        return plan


def _try(plan: Plan, x: Tensor) -> None:
    """Run a new plan once, so that what it cannot do is said where it is made, and what it would keep."""
    held = {**dict(plan.module.named_parameters()), **dict(plan.module.named_buffers())}
    before = {name: content_of_tensor(tensor) for name, tensor in held.items()}
    try:
        plan(x)
    except Exception as error:
        wanted = plan.conversion and plan.conversion.wanted
        where = f"{f' in {dtype_name(wanted)}' if wanted else ''} on an input of {_shown(x)}"
        raise ValueError(f"freeze: the model does not run{where}: {first_line(error)}") from error
    for name, tensor in held.items():
        if content_of_tensor(tensor) != before[name]:
            raise keeps_state(f"its attribute {name.removeprefix('model.')}")


def _shown(x: Tensor) -> str:
    return f"shape {tuple(x.shape)} in {dtype_name(x.dtype)}"


def _workspace_of(graph: fx.Graph) -> tuple[int, int]:
    """Bytes of the largest tensor, and of all that are alive at once, as a plan computes its nodes in order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    change = [0] * (len(order) + 1)  # bytes that come alive at each node
    largest = 0
    for node, index in order.items():
        facts = facts_of(node)
        size = 0 if facts is None else math.prod(facts.shape) * facts.dtype.itemsize
        largest = max(largest, size)
        change[index] += size
        change[1 + max((order[user] for user in node.users), default=index)] -= size
    return largest, max(itertools.accumulate(change))


def _matches(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Match]:
    return matches(
        graph,
        modules,
        is_fit=lambda node: len(getattr(facts_of(node), "shape", ())) == 4 and _keeps_dtype(node),
        is_alike=lambda other, head: facts_of(other) == facts_of(head),
    )


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether it returns the dtype that it was given, and that is one which plans know."""
    source, result = facts_of(node.all_input_nodes[0]), facts_of(node)
    return bool(source and result and source.dtype == result.dtype in FLOAT_DTYPES)


def _lower(module: fx.GraphModule, modules: dict, match: Match, backend: str) -> None:
    """Replace a match by one FrozenConv, placed where its last node was, and what its norm calls after that."""
    conv: nn.Conv2d = modules[match.conv.target]
    norm = norm_of(norm_at(match.bn, modules))
    activation, then = ("none", ()) if norm is None else norm.activation
    source, residual, tail = match.conv.all_input_nodes[0], match.residual, match.nodes[-1]
    facts = source.meta["facts"]
    weight, bias = fold(conv, norm, facts.dtype)
    described = ConvOperands(
        torch.empty(facts.shape, dtype=facts.dtype, device="meta"),
        weight.to("meta"),
        bias=None if bias is None else bias.to("meta"),
        residual=None if residual is None else torch.empty(tail.meta["facts"].shape, dtype=facts.dtype, device="meta"),
    )
    if match.act is not None:
        activation = activation_of(match.act, modules)
    window = (pair("stride", conv.stride), pair("padding", conv.padding), pair("dilation", conv.dilation))
    problem = conv_problem(described, *window, conv.groups, activation)
    problem = problem._replace(device=weight.device.type)
    frozen = FrozenConv(problem, backends.select(problem, backend, in_plan=True), weight, bias)
    name = add_child(module, modules, f"fused_{match.conv.name}", frozen)
    with module.graph.inserting_before(tail):
        fused = module.graph.call_module(name, (source,) if residual is None else (source, residual))
        fused.meta = dict(tail.meta)
        for called in then:
            name = add_child(module, modules, f"{match.conv.name}_{type(called).__name__.lower()}", called)
            fused = module.graph.call_module(name, (fused,))
            fused.meta = dict(tail.meta)
    tail.replace_all_uses_with(fused)
    vectors = [node for node in match.bn.all_input_nodes if node.op == "get_attr"] if match.bn else []
    for node in (*reversed(match.nodes), *vectors):
        if not node.users:
            module.graph.erase_node(node)


def _pack_linears(module: fx.GraphModule, modules: dict) -> None:
    for node in module.graph.nodes:
        linear, facts = module_of(node, modules), facts_of(node.args[0]) if node.args else None
        if type(linear) is not nn.Linear or not has_stock_call(linear) or node.kwargs or facts is None:
            continue
        if len(facts.shape) != 2 or not facts.shape[0] or type(linear.weight) is not nn.Parameter:
            continue
        if _keeps_dtype(node) and backends.onednn_missing(facts.dtype) is None:
            packed = FrozenLinear(linear, facts.dtype, facts.shape[0])
            node.target = add_child(module, modules, f"packed_{node.name}", packed)


def _replace_max_pools(module: fx.GraphModule, modules: dict) -> None:
    for node in module.graph.nodes:
        pool, facts = module_of(node, modules), facts_of(node)
        if type(pool) is not nn.MaxPool2d or not has_stock_call(pool) or node.kwargs or facts is None:
            continue
        is_plain = pair("pooling", pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices
        if is_plain and len(facts.shape) == 4 and facts.dtype in FLOAT_DTYPES:
            node.target = add_child(module, modules, f"frozen_{node.name}", FrozenMaxPool(pool, facts.shape))


def _widen_what_is_wrong(module: fx.GraphModule, modules: dict) -> None:
    """Have convolutions that were not lowered computed in fp32 where torch's own would be wrong."""
    for node in module.graph.nodes:
        facts, conv = facts_of(node), module_of(node, modules)
        if isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            weight: Optional[tuple] = tuple(conv.weight.shape)
            stride, dilation = conv.stride, conv.dilation
        elif node.op == "call_function" and node.target in CONVOLUTIONS:
            asked = arguments_of(node)
            weight = getattr(facts_of(asked["weight"]), "shape", None)
            dims = len(weight or ()) - 2
            if asked.get("transposed"):
                continue
            stride, dilation = (_spread(asked.get(name, 1), dims) for name in ("stride", "dilation"))
        else:
            continue
        if facts and weight and library_faults.may_be_wrong(facts.dtype, weight, facts.shape, stride, dilation):
            wide = WideConv(conv or node.target)
            node.op, node.target = "call_module", add_child(module, modules, f"wide_{node.name}", wide)


def _spread(value: Any, dims: int) -> tuple:
    """A step for each dimension. What is computed may be any, so it counts as the longest."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = tuple(math.inf if isinstance(step, fx.Node) else step for step in values)
    return values if len(values) == dims else values * dims


def _mark_sums_in_place(graph: fx.Graph, modules: dict) -> None:
    """Let a convolution write its sum over the residual where nothing reads the residual's memory afterwards.

    The residual must be memory of its own, made by a fused convolution or a pooling. Every other reader of it must be
    a fused convolution or a pooling that comes earlier: those return no views. A convolution whose input is the
    residual itself never qualifies.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        conv = module_of(node, modules)
        if not isinstance(conv, FrozenConv) or len(node.args) < 2 or conv.backend.bind is None:
            continue
        source, residual = node.args
        readers = [user for user in residual.users if user is not node]
        conv.in_place = (
            source is not residual
            and _owns_its_memory(residual, modules)
            and all(order[reader] < order[node] and _owns_its_memory(reader, modules) for reader in readers)
        )


def _reselect_stranded(graph: fx.Graph, modules: dict, backend: str) -> None:
    """Where x cannot lie in row space, take what was measured fastest without it."""
    while stranded := layouts.stranded(_triton_as_selected(graph, modules)):
        for node in stranded:
            conv = modules[node.target]
            conv.select(backends.select(conv.problem, backend, in_plan=True, in_nhwc=True))


def _triton_as_selected(graph: fx.Graph, modules: dict) -> dict[fx.Node, layouts.Placed]:
    return {
        node: layouts.Placed(conv.problem, conv.selection.config)
        for node in graph.nodes
        if isinstance(conv := module_of(node, modules), FrozenConv) and conv.backend.name == "triton"
    }


def _place_triton(graph: fx.Graph, modules: dict, device: torch.device) -> None:
    asked = _triton_as_selected(graph, modules)
    is_replayed = device.type == "cuda" and not torch.version.hip
    for node, placed in layouts.assign(asked, device, is_replayed=is_replayed).items():
        conv = modules[node.target]
        conv.placed, conv.selection = placed, conv.selection._replace(config=placed.config)


def _owns_its_memory(node: fx.Node, modules: dict) -> bool:
    module = module_of(node, modules)
    if module is not None:
        return isinstance(module, (FrozenConv, FrozenMaxPool, *POOLS)) and has_stock_call(module)
    return node.op == "call_function" and node.target in POOL_FUNCTIONS


def _convert_the_rest(module: fx.GraphModule, modules: dict, conversion: Conversion) -> None:
    """Give converted copies to the modules that were not lowered: one for each dtype that a module computes in."""
    names: dict[tuple[Any, torch.dtype], str] = {}
    for node in module.graph.nodes:
        child, dtype = module_of(node, modules), node.meta.get("arrives_in")
        if child is None or dtype is None or isinstance(child, _LOWERED):
            continue
        key = (node.target, dtype)
        if key not in names:
            copied = dtypes.converted(child, conversion.main, dtype)
            names[key] = add_child(module, modules, f"{node.name}_{dtype_name(dtype)}", copied)
        node.target = names[key]


def fold(conv: nn.Conv2d, bn: Union[nn.Module, Norm, None], dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
    """(weight * scale, shift) of conv -> BN in eval mode, computed in fp64; the weight in channels_last."""
    operands, norm = ConvOperands(conv.weight, conv.weight, bias=conv.bias), norm_of(bn)
    if norm is not None:
        operands = ConvOperands(conv.weight, conv.weight, *norm[:5], bias=conv.bias)
    weight, shift = affine.fold(operands, dtype)
    return weight, None if conv.bias is None and norm is None else shift
