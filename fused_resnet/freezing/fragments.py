"""The pass that has runs of convolutions and poolings computed in one call on a CPU, where that is right and faster."""

from __future__ import annotations

import itertools
import operator
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fused_resnet import backends
from fused_resnet.backends import blocked, winograd
from fused_resnet.choosing import outright, pieces, winners
from fused_resnet.choosing.choice import FIXED_ORDER
from fused_resnet.choosing.piece import Piece, Separate
from fused_resnet.freezing.copied_maps import copies_of, sources_of
from fused_resnet.freezing.draft import Draft
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.freezing.gates import gate_of
from fused_resnet.freezing.region import FrozenRegion, RegionConv
from fused_resnet.graphs.memory import POOLS
from fused_resnet.kernels import compiled
from fused_resnet.machine.malloc import LargePages
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.operators.describe import Facts, conv_problem, pair
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.regions import kernels
from fused_resnet.regions.fragment import (
    ConvStep,
    FlattenStep,
    Fragment,
    GateStep,
    Packing,
    PoolStep,
    Step,
    compile_fragment,
    packings,
)
from fused_resnet.regions.layout import DTYPES, MOST_TAPS
from fused_resnet.regions.program import Shape

_LEAST = 2  # convolutions of a region
_BY_PRODUCTS, _BY_WINOGRAD = "region", "region by Winograd"  # whose weights they are, in place of a backend's name
FLATTENS = (torch.flatten, torch.reshape, "flatten", "reshape")


class Run(NamedTuple):
    """Nodes that one region can compute, and what they are together. stages: (begin, end) of the steps of its parts."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    piece: Piece
    stages: list[tuple[int, int]]


def form_clear_regions(draft: Draft) -> None:
    """Have what is clearly faster as a region computed by one, before its convolutions are measured (`outright`).

    It is tried where that is the rule. Elsewhere regions win by too little, and it would take its time for nothing.
    """
    if not _may_have_regions(draft):
        return
    runs = [run for run in _runs(draft) if pieces.is_by_rule(run.piece)]
    if outright.find_out([_whole(run) for run in runs], draft.tuning):
        runs = [run for run in _runs(draft) if pieces.is_by_rule(run.piece)]
        outright.find_out([_whole(run) for run in runs], draft.tuning, is_tried=True)
    reason = pieces.why_region if draft.tuning.tune == "check" else outright.why_region  # rules, where nothing is timed
    for run in runs:
        if (why := reason(_whole(run).piece)) is not None:
            _become_region(draft, run.nodes, run.piece.fragment, why)


def _whole(run: Run) -> outright.Whole:
    piece = run.piece._replace(separate=None)
    return outright.Whole(piece, tuple(piece.part(*stage) for stage in run.stages if len(run.stages) > 1))


def _may_have_regions(draft: Draft) -> bool:
    if draft.device.type != "cpu" or draft.backend != "auto" or compiled.load("cpu") is not None:
        return False
    return blocked.BACKEND.name in backends.known("conv_bn_act")  # else left out, to see what regions bring


def form_regions(draft: Draft) -> None:
    """Have what is faster as regions computed by them (`choosing.pieces`). Their convolutions leave the draft.

    Each run of nodes is measured as a whole and stage by stage. Neighbouring stages that are faster become one region,
    unless the whole run is faster than the best for each of its stages.
    """
    if not _may_have_regions(draft):
        return
    runs = _runs(draft)
    pieces.decide([piece for run in runs for piece in _alternatives(run)], draft.tuning)
    chosen = [(run, part) for run in runs for part in _faster(run)]
    pieces.decide([run.piece.part(*part) for run, part in chosen], draft.tuning)  # what was joined
    for run, part in chosen:
        piece = run.piece.part(*part)
        if (why := pieces.why_region(piece)) is not None:
            _become_region(draft, run.nodes[slice(*part)], piece.fragment, why)


# --------------------------------------------------------------------------------------------- which nodes, and in what


def _runs(draft: Draft) -> list[Run]:
    found = grouped(
        draft.graph,
        fits=lambda node: _fits(draft, node),
        joins=lambda node, run: _facts(run[0]) == _facts(node),
        goes_on=lambda node, run: _goes_on(draft, node, run),
    )
    places = itertools.count()
    runs = []
    for nodes in found:
        nodes = from_the_first_convolution(draft, nodes)
        if sum(node in draft.convs for node in nodes) >= _LEAST:
            runs.append(run_of(draft, nodes, tuple(itertools.islice(places, len(nodes)))))
    return runs


def grouped(
    graph: fx.Graph,
    fits: Callable[[fx.Node], bool],
    joins: Callable[[fx.Node, list[fx.Node]], bool],
    goes_on: Callable[[fx.Node, list[fx.Node]], bool],
) -> list[list[fx.Node]]:
    """The longest runs of nodes, in the graph's order, that a region can compute. What computes nothing ends none.

    fits: whether a node can begin a run. joins: whether such a node goes on with one. goes_on: whether another does.
    """
    found: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if (is_fit := fits(node)) and (not found[-1] or joins(node, found[-1])):
            found[-1].append(node)
        elif found[-1] and goes_on(node, found[-1]):
            found[-1].append(node)
        elif node.op not in ("get_attr", "placeholder"):
            found.append([node] if is_fit else [])
    return found


def from_the_first_convolution(draft: Draft, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Up to what would flatten, or be a linear layer of, a map that is then outside. Copies at the end are left out."""
    left = list(itertools.dropwhile(lambda node: node not in draft.convs, nodes))
    for index, node in enumerate(left):
        if (flattens(draft, node) or linear_of(draft, node)) and node.args[0] not in left[:index]:
            left = left[:index]
            break
    while left and copies_of(draft, left[-1]) is not None:
        left.pop()
    return left


def _goes_on(draft: Draft, node: fx.Node, run: Sequence[fx.Node]) -> bool:
    """Whether it flattens a map of one pixel of the run, or is a linear layer of what was flattened."""
    if len(node.all_input_nodes) != 1 or node.all_input_nodes[0] not in run or node.kwargs:
        return False
    (source,) = node.all_input_nodes
    is_flattened = flattens(draft, source)
    return flattens(draft, node) if not is_flattened else linear_of(draft, node) is not None


def flattens(draft: Draft, node: fx.Node) -> bool:
    """Whether it makes (N, C) of (N, C, 1, 1), by whatever means."""
    facts, source = facts_of(node), facts_of(node.args[0]) if node.args else None
    if facts is None or source is None or facts.dtype != source.dtype or len(node.all_input_nodes) != 1:
        return False
    module = draft.called_by(node)
    is_known = node.op != "get_attr" and node.target in FLATTENS or type(module) is nn.Flatten
    return is_known and has_stock_call(module or nn.Identity()) and tuple(source.shape) == (*facts.shape, 1, 1)


def linear_of(draft: Draft, node: fx.Node) -> Optional[ConvProblem]:
    """What a plain linear layer is over maps of one pixel, if a region can compute it."""
    layer, facts, source = draft.called_by(node), facts_of(node), facts_of(node.args[0]) if node.args else None
    if type(layer) is not nn.Linear or not has_stock_call(layer) or type(layer.weight) is not nn.Parameter:
        return None
    if facts is None or source is None or len(source.shape) != 2 or not facts.dtype == source.dtype in DTYPES:
        return None
    if node.meta.get("arrives_in") not in (None, facts.dtype):
        return None
    x = torch.empty(*source.shape, 1, 1, dtype=facts.dtype, device="meta")
    weight = torch.empty(*layer.weight.shape, 1, 1, dtype=facts.dtype, device="meta")
    bias = None if layer.bias is None else torch.empty(len(layer.bias), dtype=facts.dtype, device="meta")
    described = ConvOperands(x, weight, bias=bias)
    problem = conv_problem(described, (1, 1), (0, 0), (1, 1), 1, "none")._replace(device="cpu")
    return problem if blocked.BACKEND.why_not(problem) is None else None


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
    """A linear layer's weight and bias as those of a convolution."""
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return layer.weight.detach().to(dtype)[:, :, None, None], bias


def _facts(node: fx.Node) -> tuple[torch.dtype, int]:
    return _tensor(node).dtype, _tensor(node).shape[0]


def _tensor(node: fx.Node) -> Facts:
    """The facts of what is known to be a tensor."""
    return cast(Facts, facts_of(node))


def _fits(draft: Draft, node: fx.Node) -> bool:
    if not node.users:  # what nobody reads has no place in a region's outputs
        return False
    conv = draft.convs.get(node)
    if conv is None:
        others = (pooling_of(draft, node), copies_of(draft, node), gate_of(node))
        return any(step is not None for step in others)
    problem = conv.problem
    if not problem.N or blocked.why_not_in_region(problem) is not None:
        return False
    return winners.why_wrong(winners.outcome(problem, blocked.BACKEND.name)) is None


def pooling_of(draft: Draft, node: fx.Node) -> Optional[PoolStep]:
    """What a node pools, if it calls torch's own pooling of images as a region can do it. Its input: number 0."""
    pool, facts, source = draft.called_by(node), facts_of(node), facts_of(node.args[0]) if node.args else None
    is_called_plainly = not node.kwargs
    if _is_mean(node):
        pool, is_called_plainly = nn.AdaptiveAvgPool2d(1), True
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:  # as exported models call it
        pool = nn.AdaptiveAvgPool2d(1)
    if node.op == "call_function" and node.target is F.avg_pool2d:
        pool, is_called_plainly = _average_pool(node), True
    if pool is None or not isinstance(pool, (*POOLS, nn.AdaptiveAvgPool2d)) or not has_stock_call(pool):
        return None
    if (
        not is_called_plainly
        or facts is None
        or source is None
        or facts.dtype not in DTYPES
        or source.dtype != facts.dtype
    ):
        return None
    if len(facts.shape) != 4 or not all(source.shape) or node.meta.get("arrives_in") not in (None, facts.dtype):
        return None
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        window = tuple(source.shape[2:])
        is_whole = tuple(facts.shape[2:]) == (1, 1) and max(window) <= MOST_TAPS
        return PoolStep("average", 0, window, window, (0, 0), False) if is_whole else None
    window, stride, padding = (pair("pooling", value) for value in (pool.kernel_size, pool.stride, pool.padding))
    if pool.ceil_mode or max(window) > MOST_TAPS:
        return None
    if isinstance(pool, nn.MaxPool2d):
        is_plain = pair("pooling", pool.dilation) == (1, 1) and not pool.return_indices
        return PoolStep("max", 0, window, stride, padding, False) if is_plain else None
    is_plain = pool.divisor_override is None
    return PoolStep("average", 0, window, stride, padding, pool.count_include_pad) if is_plain else None


def _is_mean(node: fx.Node) -> bool:
    """Whether it averages over pixels and leaves one of them."""
    if (node.op, node.target) not in (("call_method", "mean"), ("call_function", torch.mean)):
        return False
    asked = {**dict(zip(("input", "dim", "keepdim"), node.args)), **node.kwargs}
    dims = asked.get("dim")
    is_over_pixels = isinstance(dims, (list, tuple)) and {*dims} in ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
    return is_over_pixels and asked.get("keepdim") is True and set(asked) <= {"input", "dim", "keepdim"}


def _average_pool(node: fx.Node) -> Optional[nn.AvgPool2d]:
    """The module that a call of the function stands for, if its arguments are known."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    asked = {**dict(zip(names, node.args[1:])), **node.kwargs}
    if len(node.all_input_nodes) > 1 or "input" in asked:
        return None
    if asked.get("stride") in ((), []):  # ATen's default
        del asked["stride"]
    return nn.AvgPool2d(**cast(Any, asked))


def run_of(draft: Draft, nodes: list[fx.Node], places: tuple[int, ...]) -> Run:
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in sources_of(node) if source not in inside))
    numbers = {node: number for number, node in enumerate([*inputs, *nodes])}
    multiplies_tiles = kernels.fastest_name(_tensor(nodes[0]).dtype).startswith("amx")
    steps: list[Step] = []
    separate: list[Optional[Separate]] = []
    for node in nodes:
        reads = tuple(numbers[source] for source in sources_of(node))
        x, residual, *_ = (*reads, None)
        conv = draft.convs.get(node)
        if conv is not None:
            # with AMX's products Winograd's in fp32 cannot compete
            is_winograd = _is_winograd(draft, node) and not multiplies_tiles
            steps.append(ConvStep(conv.problem, x, residual, by_winograd=is_winograd))
            separate.append(Separate(conv.selection, conv.in_place))
        else:
            separate.append(None)
            if (pooling := pooling_of(draft, node)) is not None:
                steps.append(pooling._replace(x=x))
            elif (copies := copies_of(draft, node)) is not None:
                steps.append(copies._replace(xs=reads))
            elif (gate := gate_of(node)) is not None:
                steps.append(gate._replace(x=x, gate=reads[1], residual=reads[2] if len(reads) > 2 else None))
            elif (problem := linear_of(draft, node)) is not None:
                steps.append(ConvStep(problem, x, is_linear=True))
            else:
                steps.append(FlattenStep(x))
    outputs = tuple(numbers[node] for node in nodes if any(user not in inside for user in node.users))
    shapes = tuple(cast(Shape, tuple(_tensor(node).shape)) for node in inputs)  # none are vectors
    fragment = Fragment(shapes, tuple(steps), outputs, _tensor(nodes[0]).dtype)
    packed = [True] * len(nodes)
    for place, packing in packings(fragment).items():
        packed[place] = draft.packed.has(nodes[place].name, _packed_as(packing))
    return Run(nodes, inputs, Piece(fragment, places, tuple(separate), tuple(packed)), _stages(fragment))


def _is_winograd(draft: Draft, node: fx.Node) -> bool:
    """Whether a region should compute it so. A shape that was not measured takes the weight that another plan has."""
    conv = draft.convs[node]
    if not conv.selection.source.startswith(FIXED_ORDER) or winograd.BACKEND.why_not(conv.problem) is not None:
        return conv.selection.backend is winograd.BACKEND
    if draft.packed.has(node.name, _BY_WINOGRAD):
        return True
    return conv.selection.backend is winograd.BACKEND and not draft.packed.has(node.name, _BY_PRODUCTS)


def _packed_as(packing: Packing) -> str:
    """The name under which the model's plans share such a weight."""
    return _BY_WINOGRAD if packing.by_winograd else _BY_PRODUCTS


def _stages(fragment: Fragment) -> list[tuple[int, int]]:
    """(begin, end) of the parts whose convolutions end with maps of one size, cut where a single value is needed on.

    Poolings end a part, and linear layers the last.
    """
    first, shapes = len(fragment.shapes), fragment.value_shapes
    last_read = {value: place for place, step in enumerate(fragment.steps) for value in step.reads}
    parts: list[tuple[int, int]] = []
    begin, size = 0, None
    for place, _ in enumerate(fragment.steps):
        needed = [value for value, last in last_read.items() if last > place and value <= first + place]
        if len(needed) != 1 and place + 1 < len(fragment.steps):
            continue
        within = range(begin, place + 1)
        sizes = [shapes[first + one][2:] for one in within if fragment.is_convolution(one) or _is_gate(fragment, one)]
        if parts and (not sizes or sizes[-1] == size):
            parts[-1] = parts[-1][0], place + 1
        else:
            parts.append((begin, place + 1))
        begin, size = place + 1, sizes[-1] if sizes else size
    return parts


def _is_gate(fragment: Fragment, place: int) -> bool:
    return isinstance(fragment.steps[place], GateStep)


# -------------------------------------------------------------------------------------------------------- which of them


def _alternatives(run: Run) -> list[Piece]:
    return [run.piece, *(run.piece.part(*stage) for stage in run.stages if len(run.stages) > 1)]


def _faster(run: Run) -> list[tuple[int, int]]:
    """(begin, end) of the steps that should be regions."""
    whole = (0, len(run.nodes))
    whole_times = pieces.times_of(run.piece)
    parts = [run.piece.part(*stage) for stage in run.stages]
    times = [pieces.times_of(part) for part in parts]
    is_taken = [pieces.why_region(part) is not None for part in parts]
    if pieces.why_region(run.piece) is not None:
        best = [one and (one.region if taken else one.separate) for one, taken in zip(times, is_taken)]
        if whole_times is None or all(is_taken) or None in best or whole_times.region <= sum(filter(None, best)):
            return [whole]
    joined: list[tuple[int, int]] = []
    for taken, stages in itertools.groupby(zip(is_taken, run.stages), key=operator.itemgetter(0)):
        if taken:
            (_, (begin, _)), *_, (_, (_, end)) = 2 * list(stages)
            joined.append((begin, end))
    return [part for part in joined if len(run.piece.part(*part).fragment.convolutions) >= _LEAST and part != whole]


# ----------------------------------------------------------------------------------------------------- what they become


def _become_region(draft: Draft, nodes: Sequence[fx.Node], fragment: Fragment, why: str) -> None:
    outputs = outputs_of(nodes, fragment)
    replace(draft, nodes, outputs, _made(draft, nodes, fragment, why))


def replace(draft: Draft, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], region: FrozenRegion) -> list[fx.Node]:
    """One node for these where the last of them is, and one for each of its outputs if there are several: the latter
    are returned."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in sources_of(node) if source not in inside))
    with draft.graph.inserting_after(nodes[-1]):
        called = draft.graph.call_module(draft.add("region", region), tuple(inputs))
    if len(outputs) == 1:
        results = [called]
    else:
        results = []
        for index in reversed(range(len(outputs))):
            with draft.graph.inserting_after(called):
                results.insert(0, draft.graph.call_function(operator.getitem, (called, index)))
    for output, result in zip(outputs, results):
        result.meta = dict(output.meta)
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        draft.graph.erase_node(node)
    return results


def outputs_of(nodes: Sequence[fx.Node], fragment: Fragment) -> list[fx.Node]:
    """The nodes whose values the fragment of these nodes gives outside."""
    return [nodes[value - len(fragment.shapes)] for value in fragment.outputs]


def _made(draft: Draft, nodes: Sequence[fx.Node], fragment: Fragment, why: str) -> FrozenRegion:
    """The module for these nodes. Its packed weights are those of the model's other plans, where they are equal."""
    decisions = {place: draft.convs.pop(node) for place, node in enumerate(nodes) if node in draft.convs}
    biases = {place: conv.bias for place, conv in decisions.items()}
    packed_as = packings(fragment)
    convolutions = tuple(
        RegionConv(nodes[place].name, conv.problem, place in packed_as and packed_as[place].by_winograd)
        for place, conv in decisions.items()
    )
    weights = {place: conv.weight for place, conv in decisions.items()}
    decisions.clear()
    for place, node in enumerate(nodes):
        if isinstance(layer := draft.called_by(node), nn.Linear):
            weights[place], biases[place] = weight_of(layer, fragment.dtype)
    packed = {  # each weight goes once it is packed
        place: packing.of([weights.pop(part) for part in packing.parts]) for place, packing in packed_as.items()
    }
    share_packed(draft, nodes, packed, packed_as)
    return FrozenRegion(fragment, convolutions, compile_fragment(fragment, packed, biases), why)


def share_packed(
    draft: Draft, nodes: Sequence[fx.Node], packed: dict[int, Tensor], packed_as: Mapping[int, Packing]
) -> None:
    """Have the weights of some nodes, by place, lie in large pages, or where another plan of the model has them."""
    pages = LargePages(sum(LargePages.room(weight.nbytes) for weight in packed.values()))
    for place, weight in packed.items():
        packed[place] = draft.packed.shared(nodes[place].name, _packed_as(packed_as[place]), weight, pages.copied)
