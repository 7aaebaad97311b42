"""Which convolutions a model calls, in order: recorded on fake tensors or read off a plan."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any, Callable, NamedTuple, Optional, Union, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import backends, choosing
from fused_resnet.freezing.dtypes import without_torchs_log
from fused_resnet.freezing.frozen import FrozenModel, FrozenParts
from fused_resnet.freezing.modules import FrozenConv, WideConv
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.fusing import convert
from fused_resnet.graphs.matching import unfolded_norms
from fused_resnet.graphs.spelling import CONVOLUTIONS, arguments_of
from fused_resnet.machine.errors import first_line
from fused_resnet.nn.bypass import why_not_fused
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import FLOAT_DTYPES, ConvProblem, dtype_name
from fused_resnet.quantizing.scales import Effect
from fused_resnet.regions.fragment import ConvStep, Fragment

_RUNS = 5
_OPERANDS = len(ConvOperands._fields)
_FUSED_CALL = torch.ops.fused_resnet.conv_bn_act.default
_PLAIN_CALL = torch.ops.aten.convolution.default
_CAST = torch.ops.aten._to_copy.default


class Call(NamedTuple):
    """A row before it is judged. backend: what is asked for, or None where torch's own module computes, and why.
    region: the name of the call that it is part of, if there is one. scales, not_int8, effect: as a row's."""

    name: str
    problem: ConvProblem
    backend: Optional[str]
    source: str = ""
    time_us: Optional[float] = None
    selection: Optional[choosing.Selection] = None
    region: Optional[str] = None
    scales: Optional[dict[str, str]] = None
    not_int8: Optional[str] = None
    effect: Optional[Effect] = None


class RegionCall(NamedTuple):
    """A call of a region, whose convolutions are rows of their own."""

    name: str
    region: FrozenRegion
    time_us: Optional[float]


class _Recorder(TorchDispatchMode):
    """Notes the two-dimensional convolutions that pass by, and how long each takes."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._device = device
        # the tensors are kept too, or another could get the same id
        self._weights = {id(p): (p, name.removesuffix(".weight")) for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        started = _now_us(self._device)
        out = func(*args, **(kwargs or {}))
        took_us = _now_us(self._device) - started
        if func is _CAST and id(args[0]) in self._weights:  # autocast's copy of a weight
            self._weights[id(out)] = (out, self._weights[id(args[0])][1])
        elif func is _FUSED_CALL or func is _PLAIN_CALL and _is_2d_convolution(*args):
            _, name = self._weights.get(id(args[1]), (None, f"convolution {len(self.calls) + 1}"))
            self.calls.append(Call(name, *_asked(func, args), time_us=took_us))
        return out


def _is_2d_convolution(x, weight, bias, stride, padding, dilation, transposed, *_) -> bool:
    return not transposed and weight.dim() == 4 and x.dtype in FLOAT_DTYPES


def _now_us(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e6


def _asked(func: Any, args: tuple) -> tuple[ConvProblem, Optional[str]]:
    """The problem of a call, and the backend it asks for."""
    if func is _FUSED_CALL:
        stride, padding, dilation, groups, activation, backend = args[_OPERANDS:]
        operands = ConvOperands(*args[:_OPERANDS])
    else:
        x, weight, bias, stride, padding, dilation, _, _, groups = args
        operands, activation, backend = ConvOperands(x, weight, bias=bias), "none", None
    window = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return conv_problem(operands, *window, activation), backend


def recorded(
    model: nn.Module, example: Any, left_alone: list[convert.LeftAlone], device: torch.device, measure: bool
) -> list[Call]:
    """The calls of a model, in order: seen on fake tensors, or for real where those cannot follow."""
    try:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        fake = pytree.tree_map_only(Tensor, fakes.from_tensor, example)
        with fakes, without_torchs_log():
            calls = [call._replace(time_us=None) for call in _record(model, fake, device)]
    except Exception:  # control flow that reads values, or a mistake, which then shows again
        calls = [call._replace(time_us=None) for call in _record(model, example, device)]
    if measure:
        runs = [_record(model, example, device) for _ in range(1 + _RUNS)][1:]
        calls = [
            call._replace(time_us=statistics.median(one.time_us for one in same)) for call, *same in zip(calls, *runs)
        ]
    fused = set(convert.fused_convs(model))
    return [
        call._replace(source=_why_plain(call.name, model, fused, left_alone)) if call.backend is None else call
        for call in calls
    ]


def _record(model: nn.Module, example: Any, device: torch.device) -> list[Call]:
    try:
        with torch.inference_mode(False), torch.no_grad(), _Recorder(model, device) as recorder:
            model(example)
    except backends.BackendError:
        raise
    except Exception as error:
        cause = first_line(error)
        raise ValueError(f"explain: the model cannot take {shown(example)}: {cause}") from error
    return recorder.calls


def _why_plain(name: str, model: nn.Module, fused: set[str], left_alone: list[convert.LeftAlone]) -> str:
    """Why torch's own module computes this convolution."""
    if name in fused:
        conv = model.get_submodule(name)
        if conv.training:
            return "its BN is in training mode, so both run as they are"
        return why_not_fused(None, [(conv, None)]) or "its module runs its own forward, because a child was changed"
    around = [entry for entry in left_alone if entry.name == "the model" or f"{name}.".startswith(f"{entry.name}.")]
    if around:
        return max(around, key=lambda entry: len(entry.name)).reason
    return "nothing that could be fused follows it, or fuse was kept from it"


def planned(
    frozen: Union[FrozenModel, FrozenParts], example: Any, measure: bool
) -> tuple[list[Call], list[convert.LeftAlone], list[RegionCall]]:
    """The calls of a frozen model in the order of its plan, the convolutions that a plan leaves to torch, the regions.

    Of a model that was frozen in parts, those of the parts.
    """
    if isinstance(frozen, FrozenModel):
        return _of_plan("", frozen, example, measure)
    calls, left_alone, regions = [], [], []
    for name, x in _inputs_of_parts(frozen, example):
        found, others, within = _of_plan(f"{name}.", cast(FrozenModel, frozen.parts[name]), x, measure)
        calls += found
        left_alone += others
        regions += within
    return calls, left_alone, regions


def _inputs_of_parts(frozen: FrozenParts, example: Any) -> list[tuple[str, Tensor]]:
    """Which frozen part the model calls with what, in order. Runs it once."""
    inputs: list[tuple[str, Tensor]] = []
    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: inputs.append((name, args[0].detach())))
        for name, part in frozen.parts.items()
    ]
    try:
        frozen(example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _of_plan(
    prefix: str, frozen: FrozenModel, x: Tensor, measure: bool
) -> tuple[list[Call], list[convert.LeftAlone], list[RegionCall]]:
    plan = frozen.plan(x)
    runs = [_TimedPlan(plan).times(frozen, x) for _ in range(1 + _RUNS)][1:] if measure else []
    names = {f"model_{name}".replace(".", "_"): name for name, _ in frozen.unfreeze().named_modules() if name}
    names["model"] = "model"
    modules = dict(plan.named_modules())
    calls, left_alone, regions = [], [], []
    not_int8: dict[str, str] = plan.meta.get("not_int8", {})
    effects: dict[str, Effect] = plan.meta.get("effects", {})

    def name_of(node: Union[fx.Node, str]) -> str:
        stem = (node if isinstance(node, str) else node.name).removeprefix("fused_")
        first = re.sub(r"_\d+$", "", stem)  # of several calls of a module
        return prefix + (names.get(stem) or names.get(first) or stem.removeprefix("model_"))

    for node in plan.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, FrozenConv):
            name, time_us = name_of(node), statistics.median(run[node] for run in runs) if runs else None
            call = Call(name, module.problem, frozen.backend, time_us=time_us, selection=module.selection)
            calls.append(call._replace(not_int8=not_int8.get(node.name)))
        elif isinstance(module, FrozenRegion):
            time_us = statistics.median(run[node] for run in runs) if runs else None
            regions.append(RegionCall(prefix + node.name, module, time_us))
            found = _of_region(regions[-1], name_of, frozen.backend)
            for call, conv in zip(found, module.convolutions):
                effect = effects.get(conv.name) if call.scales else None
                calls.append(call._replace(not_int8=not_int8.get(conv.name), effect=effect))
        elif isinstance(module, WideConv):
            reason = "it is computed in float32, because oneDNN is wrong there in 16 bits"
            left_alone.append(convert.LeftAlone(name_of(node), reason))
        elif isinstance(module, nn.modules.conv._ConvNd):
            reason = why_not_fused(None, [(module, None)]) or "a plan has no rule for the way it is called"
            left_alone.append(convert.LeftAlone(name_of(node), reason))
        elif node.op == "call_function" and node.target in CONVOLUTIONS:
            reason = "it is transposed" if arguments_of(node).get("transposed") else "its weight or bias is computed"
            left_alone.append(convert.LeftAlone(name_of(node), reason))
    for node, reason in unfolded_norms(plan.graph, modules, FrozenConv):
        left_alone.append(convert.LeftAlone(name_of(node), f"without its norm: {reason}"))
    return calls, left_alone, regions


def _of_region(call: RegionCall, name_of: Callable[[str], str], backend: str) -> list[Call]:
    """A row for each of its convolutions, with its share of the region's time by arithmetic."""
    region, time_us = call.region, call.time_us
    shares = (conv.problem.flops / region.flops for conv in region.convolutions)
    times = (None if time_us is None else time_us * share for share in shares)
    return [
        Call(name_of(conv.name), conv.problem, backend, "", time, region.selection_of(conv), call.name, scales)
        for conv, time, scales in zip(region.convolutions, times, _scales_of(region.fragment))
    ]


def _scales_of(fragment: Fragment) -> list[Optional[dict[str, str]]]:
    """How each convolution's operands and result are kept in int8: {"x": "u8 0.0123"}."""
    found: list[Optional[dict[str, str]]] = []
    for value, step in enumerate(fragment.steps, len(fragment.shapes)):
        if isinstance(step, ConvStep) and not step.is_linear:
            values = {"x": step.x, "residual": step.residual, "out": value}
            hows = {name: fragment.scales[v] for name, v in values.items() if v is not None} if fragment.scales else {}
            texts = {name: str(how) for name, how in hows.items() if how}
            found.append(texts or None)
    return found


class _TimedPlan(fx.Interpreter):
    """Runs a plan node by node and notes how long each takes."""

    def times(self, frozen: FrozenModel, x: Tensor) -> dict[fx.Node, float]:
        self.took_us: dict[fx.Node, float] = {}
        self._device = frozen.device
        with torch.no_grad():
            self.run(frozen.taken(x))
        return self.took_us

    def run_node(self, n: fx.Node) -> Any:
        started = _now_us(self._device)
        out = super().run_node(n)
        self.took_us[n] = _now_us(self._device) - started
        return out


def shown(example: Any) -> str:
    """The tensors of an example, in words."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    return ", ".join(f"{'x'.join(map(str, t.shape))} {dtype_name(t.dtype)} on {t.device}" for t in tensors)
