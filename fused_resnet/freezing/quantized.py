"""The pass that has convolutions, poolings and classifiers computed in int8 or e4m3, and what it asks of tensors.

What int8 computes becomes regions, and always does: it is what was asked for. Between them, and for what stays in
floats, tensors are fp32 or bf16. On a CPU a region is one call, on a GPU a kernel for each step (`steps`).
"""

from __future__ import annotations

import logging
import math
import operator
import re
from collections import Counter
from typing import Optional, Sequence

import torch
from torch import Tensor, fx, nn

from fused_resnet import backends
from fused_resnet.backends import blocked
from fused_resnet.choosing import exactness
from fused_resnet.choosing import quantized as in_steps
from fused_resnet.freezing.copied_maps import PADS, copies_of, sources_of
from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.freezing.fragments import (
    flattens,
    from_the_first_convolution,
    grouped,
    linear_of,
    outputs_of,
    pooling_of,
    replace,
    run_of,
    share_packed,
    weight_of,
)
from fused_resnet.freezing.gates import gate_of
from fused_resnet.freezing.given_scales import RoundedWeight, rounded_weight
from fused_resnet.freezing.linears import lower_linears
from fused_resnet.freezing.region import FrozenRegion, RegionConv
from fused_resnet.freezing.steps import FrozenSteps
from fused_resnet.graphs.memory import memory_of, writes_in_place, written
from fused_resnet.operators import quantized
from fused_resnet.operators.problem import FLOAT8, ConvProblem, dtype_name
from fused_resnet.operators.quantized import Epilogue, Kept, Quantized, Wide
from fused_resnet.quantizing.calibrate import FloatConv, Subject
from fused_resnet.quantizing.scales import Effect
from fused_resnet.regions.fragment import (
    ConvStep,
    FlattenStep,
    Fragment,
    GateStep,
    PoolStep,
    compile_fragment,
    map_of,
    packings,
)
from fused_resnet.regions.layout import DTYPES

_IDLE = ("get_attr", "placeholder")  # nodes that compute nothing

log = logging.getLogger("fused_resnet")


def observed(draft: Draft, dtype: torch.dtype) -> Subject:
    """A draft whose convolutions are lowered and nothing else, as `calibrate` wants it: every value that a convolution
    or a pooling reads or writes is looked at. Its convolutions leave the draft."""
    names = tensor_names(draft.graph)
    looked_at: dict[fx.Node, None] = {}
    for node in draft.graph.nodes:
        if node in draft.convs or pooling_of(draft, node) is not None or gate_of(node) is not None:
            looked_at.update(dict.fromkeys((*node.all_input_nodes, node)))
    for node in list(draft.convs):
        conv = draft.convs.pop(node)
        node.op, node.target = "call_module", draft.add(node.name, FloatConv(conv.problem, conv.weight, conv.bias))
    draft.module.recompile()
    return Subject(draft.module, {node: names[node] for node in looked_at}, dtype)


def tensor_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """What tensors are called in scales: by the module that makes them, with underscores."""
    short = {node: re.sub("^(fused_)?model_", "", node.name) for node in graph.nodes}
    counts = Counter(short.values())
    return {node: name if counts[name] == 1 else node.name for node, name in short.items()}


def linear_names(subject: Subject) -> list[str]:
    """What `keep` calls the linear layers of a model."""
    names, modules = tensor_names(subject.graph.graph), dict(subject.graph.named_modules())
    return [
        name
        for node, name in names.items()
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Linear)
    ]


def kept_by(names: Sequence[str], asked: Sequence[str]) -> frozenset[str]:
    """The convolutions and linear layers of these names that `asked` keeps in floats: themselves, or modules that hold
    some.

    Raises ValueError for what is neither.
    """
    found: set[str] = set()
    for one in asked:
        name = one.replace(".", "_")
        inside = {known for known in names if known == name or known.startswith(f"{name}_")}
        if not inside:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(
                f"freeze: keep names {one!r}, which holds no convolution and no linear layer. Known ones are {shown}."
            )
        found |= inside
    return frozenset(found)


def why_no_int8(problem: ConvProblem, dtype: torch.dtype = torch.int8, backend: str = "auto") -> Optional[str]:
    """Why no convolution like this one, of whatever dtype and images, has a form in int8, or in e4m3.

    backend: as `freeze` takes it. One that was asked for has groups of its own.
    """
    name, is_ours = "int8" if dtype == torch.int8 else "e4m3", backend == "auto"
    if dtype == torch.int8 and is_ours and (reason := blocked.why_no_groups(problem, torch.int8)) is not None:
        return reason
    if dtype == FLOAT8 and problem.groups != 1:
        return f"{name} convolutions are of one group, not of {problem.groups}"
    if problem.activation not in quantized.ACTIVATIONS:
        return f"{problem.activation} has no {name} form"
    return quantized.why_not_reduced(problem.reduction) if dtype == torch.int8 else None


def form_quantized(draft: Draft) -> None:
    """Have what can be computed in int8 by regions. Its convolutions leave the draft. meta["not_int8"] of the graph
    says of the others why, by node, and meta["effects"] what was found of each when it was calibrated."""
    if draft.quantization is None:
        return
    if not runs_in_steps(draft):
        kept = draft.quantization.kept
        lower_linears(draft, [node for node, name in tensor_names(draft.graph).items() if name in kept])
    tensors = _Tensors(draft)
    reasons = {node: reason for node in draft.convs if (reason := tensors.why_not(node)) is not None}
    draft.module.meta["not_int8"] = {node.name: reason for node, reason in reasons.items()}
    draft.module.meta["effects"] = tensors.effects()
    found = []
    for nodes in grouped(draft.graph, tensors.fits, tensors.joins, tensors.goes_on):
        nodes = from_the_first_convolution(draft, nodes)
        if nodes:
            run = run_of(draft, nodes, tuple(range(len(nodes))))
            hows = [tensors.how(node) for node in (*run.inputs, *nodes)]
            limits = [tensors.limit(node) for node in nodes]
            found.append((nodes, _quantized_fragment(run.piece.fragment, hows, draft.quantization.dtype), limits))
    results = []
    for nodes, fragment, limits in found:
        outputs = outputs_of(nodes, fragment)
        results += replace(draft, nodes, outputs, made(draft, nodes, fragment, limits))
    for result in results:
        _convert(draft, result)


def warn_without_int8(plan: fx.GraphModule, dtype: torch.dtype) -> None:
    """Say so where a plan that was to be int8 computes all in floats, of which most is in dtype."""
    if any(isinstance(module, FrozenRegion) and module.fragment.scales for module in plan.modules()):
        return
    reasons = Counter(plan.meta["not_int8"].values())
    counted = [f"{count} of its convolutions: {why}" for why, count in reasons.most_common()]
    log.warning(
        "freeze: nothing became int8, and the model computes in %s: %s. Keep fewer of them, or freeze it in %s, which "
        "needs no images. docs/int8.md says what has an int8 form.",
        dtype_name(dtype), "; ".join(counted) or "no convolution of it could be lowered", dtype,
    )  # fmt: skip


class _Tensors:
    """How the values of a draft are kept in int8, as long as none of its convolutions has been replaced."""

    def __init__(self, draft: Draft) -> None:
        assert draft.quantization is not None
        self._draft, self._names = draft, tensor_names(draft.graph)
        scales, self._forms, self._kept, self._dtype, self._limits, self._unknown = draft.quantization
        self._ranges, self._effects = scales.ranges, scales.effects
        self._missing = "was not calibrated" if scales.images else "is not rounded in the model, nor calibrated"
        self._first = next((node for node in draft.graph.nodes if node in draft.convs), None)
        self._hows: dict[fx.Node, Optional[Kept]] = {}
        self._reasons: dict[fx.Node, Optional[str]] = {}
        # of each gate that int8 can have, its mean and its two convolutions
        self._squeezes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._vectors: set[fx.Node] = set()  # all of these
        gates = () if runs_in_steps(draft) else draft.graph.nodes
        self._take({node: squeeze for node in gates if (squeeze := self._squeeze_of(node)) is not None})
        while ended := {gate for gate in self._squeezes if not self._is_of_one_run(gate)}:
            self._take({gate: squeeze for gate, squeeze in self._squeezes.items() if gate not in ended})

    def _take(self, squeezes: dict[fx.Node, tuple[fx.Node, ...]]) -> None:
        """What was found before these were known may be otherwise now."""
        self._squeezes, self._vectors = squeezes, {one for squeeze in squeezes.values() for one in squeeze}
        self._hows.clear()
        self._reasons.clear()

    def _squeeze_of(self, node: fx.Node) -> Optional[tuple[fx.Node, ...]]:
        """The mean and the two convolutions that make a node's gate, if it has one and they do nothing else."""
        gate, convs = gate_of(node), self._draft.convs
        if gate is None or gate.activation not in quantized.ACTIVATIONS or not node.users:
            return None
        found: list[fx.Node] = []
        one = node.all_input_nodes[1] if len(node.all_input_nodes) > 1 else node
        for _ in range(2):
            p = convs[one].problem if one in convs else None
            if p is None or (p.H, p.W, p.R, p.S, p.groups, p.has_residual) != (1, 1, 1, 1, 1, False):
                return None
            if len(one.users) != 1 or self._why_not_asked(one) is not None:
                return None
            found.insert(0, one)
            one = one.all_input_nodes[0]
        if convs[found[1]].problem.activation != "none" or not self._is_mean(one) or len(one.users) != 1:
            return None
        source = one.all_input_nodes[0]
        is_known = all(isinstance(self.how(value), Quantized) for value in (source, *_operands(node), node))
        is_known &= self._ranges.get(self._names[found[0]]) is not None
        return (one, *found) if is_known and source in convs else None

    def _is_of_one_run(self, gate: fx.Node) -> bool:
        """Whether nothing ends a run from the map whose mean is its squeeze to a gate."""
        nodes, source = [*self._draft.graph.nodes], self._squeezes[gate][0].all_input_nodes[0]
        within = (one for one in nodes[nodes.index(source) : nodes.index(gate) + 1] if one.op not in _IDLE)
        return all(self.fits(one) and self.joins(one, [source]) for one in within)

    def how(self, node: fx.Node) -> Optional[Kept]:
        """None of what was not calibrated, and of means, which are fp32."""
        if node not in self._hows:
            self._hows[node] = self._found(node)
        return self._hows[node]

    def _found(self, node: fx.Node) -> Optional[Kept]:
        if node in self._vectors:
            return self._found_of_vector(node)
        if (gate := gate_of(node)) is not None and (known := self._ranges.get(self._names[node])) is not None:
            is_none = gate.activation == "none"
            return quantized.kept_over(*known, self._dtype, None if is_none else gate.activation)
        conv, pooling = self._draft.convs.get(node), pooling_of(self._draft, node)
        if pooling is not None and pooling.kind == "max" or _moves(node) or _casts(node):
            source = self.how(node.all_input_nodes[0])
            if source is not None:
                return source
        if copies_of(self._draft, node) is not None:
            sources = {self.how(source) for source in node.all_input_nodes}
            if len(sources) == 1 and sources != {None}:
                return sources.pop()
        known = self._ranges.get(self._names[node])
        if known is None:
            return None
        return quantized.kept_over(*known, self._dtype, None if conv is None else conv.problem.activation)

    def _found_of_vector(self, node: fx.Node) -> Optional[Wide]:
        """A mean is as fine as its map. What gives the gate itself stays fp32."""
        if node not in self._draft.convs:
            how = self.how(node.all_input_nodes[0])
            return None if how is None else Wide(how.scale, how.is_signed)
        if next(iter(node.users)) in self._squeezes:
            return None
        how = quantized.quantized_over(*self._ranges[self._names[node]])
        return Wide(how.scale, how.is_signed)

    def limit(self, node: fx.Node) -> float:
        """The largest byte of a value, where the model says so."""
        return self._limits.get(self._names[node], math.inf)

    def effects(self) -> dict[str, Effect]:
        """What is known of int8's effect on each convolution, by node. Of e4m3's nothing is kept."""
        if self._dtype == FLOAT8:
            return {}
        found = {node.name: self._effects.get(self._names[node]) for node in self._draft.convs}
        return {name: effect for name, effect in found.items() if effect is not None}

    def why_not(self, node: fx.Node) -> Optional[str]:
        """Why a lowered convolution stays in floats."""
        if node not in self._reasons:
            self._reasons[node] = self._why_not(node)
        return self._reasons[node]

    def _why_not(self, node: fx.Node) -> Optional[str]:
        p = self._draft.convs[node].problem
        if node in self._vectors or (reason := self._why_not_asked(node)) is not None:
            return None if node in self._vectors else reason
        if (reason := why_no_int8(p, self._dtype, self._draft.backend)) is not None:
            return reason
        if self._dtype == FLOAT8 and node is self._first:
            return "with e4m3 the first convolution is in bf16"
        if p.dtype not in DTYPES:
            return f"it computes in {p.dtype}".replace("torch.", "")
        if (reason := self._why_no_kernel(node, p)) is not None:
            return reason
        unknown = [self._names[value] for value in (*node.all_input_nodes, node) if self.how(value) is None]
        if not unknown:
            return None
        return self._unknown.get(unknown[0], f"{unknown[0]} {self._missing}")

    def _why_not_asked(self, node: fx.Node) -> Optional[str]:
        """Why it stays in floats whatever computes it."""
        p, rounded = self._draft.convs[node].problem, self._draft.rounded.get(node)
        if self._names[node] in self._kept:
            return "keep asked for it"
        if not p.N:
            return "the batch is empty"
        if self._forms.get(self._names[node]) != (p.activation, p.has_residual):
            return "it was calibrated with another sum or activation behind it"
        return None if rounded is None else rounded.why_not

    def _why_no_kernel(self, node: fx.Node, p: ConvProblem) -> Optional[str]:
        if self._draft.backend != "auto":
            how = self.how(node.all_input_nodes[0])
            problem = p._replace(dtype=self._dtype if how is None else how.dtype, has_bias=True)
            return backends.known(problem.op)[self._draft.backend].why_not(problem)
        if runs_in_steps(self._draft):
            return in_steps.why_not(p._replace(dtype=self._dtype, has_bias=True))
        return blocked.why_not(p._replace(dtype=torch.float32, groups=1))

    def fits(self, node: fx.Node) -> bool:
        if not node.users:
            return False
        if node in self._draft.convs:
            return self.why_not(node) is None
        if gate_of(node) is not None:
            return node in self._squeezes
        if node in self._vectors:
            return True
        pooling, hows = pooling_of(self._draft, node), {self.how(source) for source in node.all_input_nodes}
        if copies_of(self._draft, node) is not None:  # of bytes that mean the same
            return not runs_in_steps(self._draft) and len(hows) == 1 and self.how(node) in hows - {None}
        if pooling is None or None in hows:
            return False
        return pooling.kind == "max" or self._is_mean(node)

    def joins(self, node: fx.Node, run: list[fx.Node]) -> bool:
        """Whether it is of as many images, and reads no mean of the run."""
        facts, first = facts_of(node), facts_of(run[0])
        assert facts is not None and first is not None
        is_float = node not in self._vectors and node not in self._squeezes
        is_float &= any(source in run and self._is_float(source) for source in node.all_input_nodes)
        return facts.shape[0] == first.shape[0] and not is_float

    def goes_on(self, node: fx.Node, run: list[fx.Node]) -> bool:
        if flattens(self._draft, node) and node.args[0] in run:
            return True
        return linear_of(self._draft, node) is not None and self._is_of_means(node, run)

    def _is_of_means(self, node: fx.Node, run: list[fx.Node]) -> bool:
        """Whether a linear layer reads means of the run that have an int8 form, and `keep` does not name it."""
        (flat,) = node.all_input_nodes
        if flat not in run or not flattens(self._draft, flat) or self._names[node] in self._kept or not node.users:
            return False
        (mean,) = flat.all_input_nodes
        source = mean.all_input_nodes[0]
        how, facts, rounded = self.how(source), facts_of(source), rounded_weight(self._draft.called_by(node))
        if rounded is not None and rounded.why_not is not None:
            return False
        if runs_in_steps(self._draft) or not self._is_mean(mean) or not isinstance(how, Quantized) or facts is None:
            return False
        return quantized.why_no_linear(how, math.prod(facts.shape[2:])) is None

    def _is_float(self, node: fx.Node) -> bool:
        return self._is_mean(node) or flattens(self._draft, node)

    def _is_mean(self, node: fx.Node) -> bool:
        """Whether it averages whole maps."""
        pooling, source = pooling_of(self._draft, node), facts_of(node.all_input_nodes[0]) if node.args else None
        if pooling is None or source is None or pooling.kind != "average":
            return False
        return pooling.window == tuple(source.shape[2:]) and pooling.padding == (0, 0)


def _moves(node: fx.Node) -> bool:
    """Whether its values are some of its input's, and zeros: a slice, or zeros around."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1 or facts_of(node) is None:
        return False
    if node.target is operator.getitem:
        return facts_of(node.all_input_nodes[0]) is not None
    if node.target not in PADS:
        return False
    asked = {**dict(zip(("input", "pad", "mode", "value"), node.args)), **node.kwargs}
    return asked.get("mode", "constant") == "constant" and asked.get("value") in (None, 0)


def _casts(node: fx.Node) -> bool:
    """Whether it is its input in another dtype, as a conversion of the model may put before a convolution."""
    return node.op == "call_method" and node.target == "to" and len(node.all_input_nodes) == 1


def _quantized_fragment(fragment: Fragment, hows: Sequence[Optional[Kept]], dtype: torch.dtype) -> Fragment:
    """A fragment of floats as one in int8 or e4m3. hows: how each value is kept; means and vectors are fp32."""
    steps, scales = [], list(hows)
    for value, step in enumerate(fragment.steps, len(fragment.shapes)):
        if isinstance(step, ConvStep):
            problem = step.problem._replace(dtype=dtype)
            step = step._replace(problem=problem, by_winograd=False)
            scales[value] = None if step.is_linear else scales[value]
        elif isinstance(step, PoolStep) and step.kind == "average" and not isinstance(scales[value], Wide):
            scales[value] = None
        elif isinstance(step, FlattenStep):
            scales[value] = scales[step.x]
        steps.append(step)
    return fragment._replace(steps=tuple(steps), dtype=dtype, scales=tuple(scales))


def made(draft: Draft, nodes: Sequence[fx.Node], fragment: Fragment, limits: Sequence[float]) -> FrozenRegion:
    """The module for these nodes: its weights are folded in fp64 and quantized from there. limits: of their bytes."""
    weights: dict[int, Tensor] = {}
    epilogues: dict[int, Epilogue] = {}
    convolutions = []
    for place, (node, step) in enumerate(zip(nodes, fragment.steps)):
        if isinstance(step, GateStep):
            epilogue = _gate_epilogue(fragment, place)
            epilogues[place] = epilogue._replace(high=min(epilogue.high, limits[place]))
        if isinstance(step, ConvStep):
            if isinstance(layer := draft.called_by(node), nn.Linear):
                folded, rounded = weight_of(layer, torch.float64), rounded_weight(layer)
            else:
                del draft.convs[node]
                convolutions.append(RegionConv(node.name, step.problem))
                folded, rounded = draft.folds.pop(node)(torch.float64), draft.rounded.pop(node, None)
            try:
                weights[place], epilogue = _quantized(fragment, place, *folded, rounded)
                epilogues[place] = epilogue._replace(high=min(epilogue.high, limits[place]))
            except ValueError as error:
                name = re.sub("^(fused_)?model_", "", node.name)
                raise ValueError(f"freeze: {name} has no int8 form: {error}. Name it in keep.") from None
    return region_of(draft, nodes, fragment, tuple(convolutions), weights, epilogues)


def region_of(
    draft: Draft,
    nodes: Sequence[fx.Node],
    fragment: Fragment,
    convolutions: tuple[RegionConv, ...],
    weights: dict[int, Tensor],
    epilogues: dict[int, Epilogue],
) -> FrozenRegion:
    why = f"{dtype_name(fragment.dtype)} was asked for"
    if runs_in_steps(draft):
        return _in_steps(draft, fragment, convolutions, weights, epilogues, why)
    packed_as = packings(fragment)
    packed = {place: packing.of([weights[place]]) for place, packing in packed_as.items()}
    share_packed(draft, nodes, packed, packed_as)
    compiled = compile_fragment(fragment, packed, epilogues)
    exactness.check(fragment, weights, epilogues, compiled, draft.tuning)
    return FrozenRegion(fragment, convolutions, compiled, why)


def runs_in_steps(draft: Draft) -> bool:
    """Whether each step of a region has a kernel of its own: on GPUs, and where a backend was asked for by name."""
    return draft.device.type != "cpu" or draft.backend != "auto"


def _in_steps(
    draft: Draft,
    fragment: Fragment,
    convolutions: tuple[RegionConv, ...],
    weights: dict[int, Tensor],
    epilogues: dict[int, Epilogue],
    why: str,
) -> FrozenSteps:
    selections = []
    for step in fragment.steps:
        if isinstance(step, ConvStep):
            how = fragment.scales[step.x]
            assert how is not None
            problem = step.problem._replace(dtype=how.dtype, has_bias=True, device=draft.device.type)
            selections.append(in_steps.first_right(problem, draft.device, draft.tuning, draft.backend))
    if any(one.backend.rounding.near_bytes for one in selections):
        why += ", a byte may be a step off"
    return FrozenSteps(fragment, convolutions, weights, epilogues, tuple(selections), why)


def _quantized(
    fragment: Fragment, place: int, weight: Tensor, bias: Optional[Tensor], rounded: Optional[RoundedWeight]
) -> tuple[Tensor, Epilogue]:
    """A convolution's weight in s8 or e4m3, and its epilogue; or a linear layer's in s8. rounded: as the model is."""
    step = fragment.steps[place]
    assert isinstance(step, ConvStep)
    q, scales = quantized.quantized_weight(weight, fragment.dtype, rounded and rounded.scales)
    if step.is_linear:
        source = map_of(fragment, step.x)
        how, (_, _, H, W) = fragment.scales[source], fragment.value_shapes[source]
        assert isinstance(how, Quantized)
        return q, quantized.epilogue_of_linear(how, H * W, scales, bias)
    x, out = fragment.scales[step.x], fragment.scales[len(fragment.shapes) + place]
    if isinstance(x, Wide):
        return q, quantized.epilogue_of_vectors(x, scales, bias)
    residual = None if step.residual is None else fragment.scales[step.residual]
    assert x is not None and out is not None
    return q, quantized.epilogue_of(x, scales, out, bias, residual, step.problem.activation)


def _gate_epilogue(fragment: Fragment, place: int) -> Epilogue:
    step, out = fragment.steps[place], fragment.scales[len(fragment.shapes) + place]
    assert isinstance(step, GateStep)
    x, residual = fragment.scales[step.x], None if step.residual is None else fragment.scales[step.residual]
    assert isinstance(x, Quantized) and isinstance(out, Quantized)
    assert residual is None or isinstance(residual, Quantized)
    return quantized.epilogue_of_gate(x, out, residual, step.activation)


def _operands(gate: fx.Node) -> list[fx.Node]:
    """The maps that it reads."""
    return [source for index, source in enumerate(sources_of(gate)) if index != 1]


def _is_written(draft: Draft, node: fx.Node) -> bool:
    """Whether something may write into the memory of this value."""
    memory = memory_of(draft.graph, draft.modules)
    writes = (one for one in draft.graph.nodes if writes_in_place(one, draft.modules))
    return any(node in memory[argument] for write in writes for argument in written(write))


def _convert(draft: Draft, node: fx.Node) -> None:
    """Give the fp32 result of a region the dtype that its readers compute in. Regions take either, and what moves
    values keeps the finer one. A value that is written in place is one tensor for all of its readers."""
    facts = facts_of(node)
    assert facts is not None
    if facts.dtype == torch.float32:
        return
    is_written = _is_written(draft, node)
    is_converted_later = draft.conversion is not None  # what the plan returns
    node.meta["facts"] = facts._replace(dtype=torch.float32)
    cast: Optional[fx.Node] = None
    for user in list(node.users):
        takes_either = isinstance(draft.called_by(user), FrozenRegion) or user.op == "output" and is_converted_later
        if takes_either and not is_written:
            continue
        if _moves(user) and not is_written:
            _convert(draft, user)
            continue
        if cast is None:
            with draft.graph.inserting_after(node):
                cast = draft.graph.call_method("to", (node, facts.dtype))
            cast.meta = {**node.meta, "facts": facts}
        user.replace_input_with(node, cast)
