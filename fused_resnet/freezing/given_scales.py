"""The scales that a traced model brings, in fake-quantize operators and in PT2E's quantize and dequantize nodes.

`take_scales` has the graph compute in floats, and notes what it found: of a tensor how it is rounded, of a convolution
or a linear layer the scales of its weight. `ranges_of` says what of that has a form by the contract of int8.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, fx, nn

from fused_resnet.freezing.respelling import call_modules
from fused_resnet.graphs.matching import is_plain_add
from fused_resnet.graphs.memory import writes_in_place, written
from fused_resnet.graphs.nodes import free_name, module_of
from fused_resnet.nn.norms import is_norm
from fused_resnet.operators.quantized import is_too_small
from fused_resnet.quantizing.calibrate import Ranges, Subject

log = logging.getLogger("fused_resnet")

_ARGUMENTS = {  # of what rounds, by its name
    "fake_quantize_per_tensor_affine": "input scale zero_point least largest",
    "fake_quantize_per_channel_affine": "input scale zero_point axis least largest",
    "quantize_per_tensor": "input scale zero_point least largest dtype",
    "dequantize_per_tensor": "input scale zero_point least largest dtype",
    "dequantize_per_channel": "input scale zero_point axis least largest dtype",
}
_KEYWORDS = {"quant_min": "least", "quant_max": "largest", "scales": "scale", "zero_points": "zero_point"}
_ROUNDED_WEIGHT = "_rounded_weight"


class Rounded(NamedTuple):
    """How a model rounds a tensor: x is scale * (q - zero_point), with q from least to largest."""

    scale: float
    zero_point: int
    least: int
    largest: int

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the largest of q - zero_point."""
        return self.least - self.zero_point, self.largest - self.zero_point

    def __str__(self) -> str:
        return f"scale {self.scale:.4g}, zero point {self.zero_point}, {self.least} to {self.largest}"


class RoundedWeight(NamedTuple):
    """How a model rounds a layer's weight. scales: of each output channel (K,), in fp64. why_not: why that is not s8
    with zero point 0, where it is not."""

    scales: Tensor
    why_not: Optional[str]


class Given(NamedTuple):
    """What a model says of its tensors, by name. ranges: from which their scales follow. limits: the largest byte
    of u8. unknown: why a tensor of two scales has none."""

    ranges: Ranges
    limits: Mapping[str, float]
    unknown: Mapping[str, str]


def rounded_weight(layer: Optional[nn.Module]) -> Optional[RoundedWeight]:
    """How a model rounds a layer's weight, if it does."""
    return getattr(layer, _ROUNDED_WEIGHT, None)


def take_scales(traced: fx.GraphModule) -> None:
    """Drop what rounds tensors from a graph. meta["rounded"] of a node: how its value was, by all that rounded it.

    Raises ValueError for what int8 cannot be: scales that are computed in each call, and values of more than 8 bits.
    Also for scales of activations by channel, and of weights along another dimension than the first.
    """
    weights: dict[int, RoundedWeight] = {}
    found = [node for node in traced.graph.nodes if _arguments(node)]
    for node in found:
        source = _arguments(node)["input"]
        if source.op == "get_attr":
            parameter, how = _take_weight(traced, node)
            weights[id(parameter)] = how
    modules = dict(traced.named_modules())
    call_modules(traced, traced.graph, modules)
    for module in modules.values():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module.weight) in weights:
            setattr(module, _ROUNDED_WEIGHT, weights[id(module.weight)])
    for node in found:
        if node.users and not _name_of(node).startswith("quantize"):  # whose readers dequantize
            source = _arguments(node)["input"]
            is_pair = _name_of(node).startswith("dequantize")
            _take(traced, modules, node, _quantized_source(traced, node) if is_pair else source)
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and (node.op == "get_attr" or node in found):
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


def notes_of(subject: Subject) -> dict[str, tuple[Rounded, ...]]:
    """What `take_scales` has noted of the tensors of a subject."""
    return {name: node.meta["rounded"] for node, name in subject.names.items() if node.meta.get("rounded")}


def ranges_of(rounded: Mapping[str, tuple[Rounded, ...]], activations: Mapping[str, str]) -> Given:
    """What the scales of tensors are in int8. activations: of those that convolutions give.

    What is never negative is u8 of the model's scale, cut off where the model does. So is what ReLU gives. What fits s8
    is s8 of the model's scale, and is cut off at -128 and 127. Other zero points need longer steps: s8 over the range
    that the model's bytes span.
    """
    ranges, limits, unknown = {}, {}, {}
    for name, ways in rounded.items():
        if len(ways) > 1:
            unknown[name] = f"{name} is rounded in two ways: {' and '.join(map(str, ways[:2]))}"
            continue
        scale, (low, high) = ways[0].scale, ways[0].levels
        if activations.get(name) in ("relu", "relu6"):
            low = 0
        if low == 0:
            ranges[name], limits[name] = (0.0, 255 * scale), float(high)
        elif low >= -128 and high <= 127:
            ranges[name] = -127 * scale, 127 * scale
        else:
            ranges[name] = low * scale, high * scale
            log.warning(
                "freeze: %s has zero point %d in the model (%d to %d). int8 keeps it as s8, with steps %.2f times as "
                "long.", name, ways[0].zero_point, ways[0].least, ways[0].largest, max(-low, high) / 127,
            )  # fmt: skip
    return Given(ranges, limits, unknown)


def _name_of(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return getattr(node.target, "__name__", "") if schema is None else schema.name.rpartition("::")[2]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments by name of a node that rounds; empty of any other node."""
    names = _ARGUMENTS.get(_name_of(node), "").split() if node.op == "call_function" else []
    given = {_KEYWORDS.get(key, key): value for key, value in node.kwargs.items()}
    return {**dict(zip(names, node.args)), **given} if names else {}


def _asked(traced: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    """These arguments, with scale and zero point as tensors."""
    asked = _arguments(node)
    return {**asked, **{name: _constant(traced, node, asked[name]) for name in ("scale", "zero_point")}}


def _constant(traced: fx.GraphModule, node: fx.Node, value: Any) -> Tensor:
    if not isinstance(value, fx.Node):
        return torch.as_tensor(value)
    if value.op != "get_attr":
        raise ValueError(
            f"freeze: {node.name} rounds with what {value.name} computes in each call, which is dynamic quantization. "
            "int8 takes static scales. Prepare the model with those, or freeze the float model with calibrate."
        )
    return _attribute(traced, str(value.target))


def _attribute(traced: fx.GraphModule, target: str) -> Any:
    return functools.reduce(getattr, target.split("."), traced)


def _quantized_source(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What was quantized before it is dequantized here."""
    asked = _asked(traced, node)
    before = asked["input"]
    made = _asked(traced, before) if _name_of(before) == "quantize_per_tensor" else {}
    if not made or any(made[key] != asked[key] for key in ("scale", "zero_point", "least", "largest")):
        raise ValueError(
            f"freeze: {node.name} dequantizes what {before.name} computes on bytes, or with another scale. int8 takes "
            "a quantize node with a dequantize node behind it. Freeze the float model with calibrate instead."
        )
    return made["input"]


def _rounded(traced: fx.GraphModule, node: fx.Node) -> Rounded:
    """How an activation is rounded."""
    asked = _asked(traced, node)
    scale = asked["scale"]
    if "axis" in asked or scale.numel() != 1:
        raise ValueError(
            f"freeze: {node.name} rounds an activation with {scale.numel()} scales. int8 takes one for each tensor. "
            "Quantize activations per tensor, or freeze the float model with calibrate."
        )
    limits = int(asked["zero_point"].item()), int(asked["least"]), int(asked["largest"])
    found = Rounded(scale.float().item(), *limits)
    low, high = found.levels
    _check_scales(node, scale)
    if high - low > 255 or not low <= 0 <= high or is_too_small(0.0, 255 * found.scale):
        raise ValueError(
            f"freeze: {node.name} rounds with {found}. int8 takes at most 256 values, a zero point among them, and "
            "scales from 1e-38 on. Quantize to 8 bits, or freeze the float model with calibrate."
        )
    return found


def _check_scales(node: fx.Node, scales: Tensor) -> None:
    wrong = scales[~(scales.isfinite() & (scales > 0))]
    if wrong.numel():
        raise ValueError(
            f"freeze: {node.name} rounds with a scale of {wrong[0]}, not with a positive one. An observer that has "
            "seen no data has none. Run the model over 16 or more images with its observers enabled, then freeze it."
        )


def _take(traced: fx.GraphModule, modules: dict[str, nn.Module], node: fx.Node, source: fx.Node) -> None:
    """Have what reads a rounded value read the value itself, of which the rounding is noted.

    What cut off everything negative is a ReLU now. What a reader writes into is a copy.
    """
    how = _rounded(traced, node)
    if how.levels[0] == 0 and _may_be_negative(source, modules):
        known = [user for user in source.users if user.target is torch.relu and user.meta.get("rounded")]
        with traced.graph.inserting_before(node):
            source = known[0] if known else traced.graph.call_function(torch.relu, (source,))
    ways = source.meta.get("rounded", ())
    source.meta["rounded"] = ways if how in ways else (*ways, how)
    if any(writes_in_place(user, modules) and node in written(user) for user in node.users):
        with traced.graph.inserting_before(node):
            source = traced.graph.call_function(torch.clone, (source,))
    node.replace_all_uses_with(source)


def _may_be_negative(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it is a convolution, a norm or a sum, without activation."""
    module = module_of(node, modules)
    return isinstance(module, nn.Conv2d) or is_norm(module) or is_plain_add(node)


def _take_weight(traced: fx.GraphModule, node: fx.Node) -> tuple[nn.Parameter, RoundedWeight]:
    """A weight as it is rounded, put in the graph in place of the node that rounds it; and how that is."""
    asked, name = _asked(traced, node), _name_of(node)
    weight: Tensor = _attribute(traced, str(asked["input"].target))
    K = weight.shape[0] if weight.dim() else 1
    scales, zero_points = asked["scale"].double().flatten(), asked["zero_point"].flatten()
    if asked.get("axis", 0) % max(weight.dim(), 1) or scales.numel() not in (1, K):
        raise ValueError(
            f"freeze: {node.name} rounds a weight of shape {tuple(weight.shape)} with {scales.numel()} scales along "
            f"dimension {asked.get('axis')}. int8 takes one for each output channel, dimension 0, or one for all."
        )
    _check_scales(node, scales)
    shape = (-1, *(1,) * (weight.dim() - 1))
    if name.startswith("dequantize"):
        q = weight.double() - zero_points.double().view(shape)
    else:
        rest = [asked[argument] for argument in _ARGUMENTS[name].split()[1:]]
        q = (getattr(torch, name)(weight.detach(), *rest).double() / scales.view(shape)).round()
    why_not = None
    if q.numel() and (q.min() < -128 or q.max() > 127):
        why_not = f"the model rounds its weight to {int(q.min())} to {int(q.max())} around zero points, beyond s8"
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    rounded = nn.Parameter((q * scales.view(shape)).to(dtype), requires_grad=False)
    path, _, name = str(asked["input"].target).rpartition(".")
    name = free_name(traced.get_submodule(path), f"{name}_rounded")
    traced.get_submodule(path).register_parameter(name, rounded)
    with traced.graph.inserting_before(node):
        node.replace_all_uses_with(traced.graph.get_attr(f"{path}.{name}" if path else name))
    return rounded, RoundedWeight(scales.expand(K).clone(), why_not)
