"""Calibration: run a traced model over some batches, and keep the range of every tensor that int8 may hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.operators import composites
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.operators.quantized import (
    FLOAT8,
    Float8,
    Kept,
    dequantize,
    is_too_small,
    kept_over,
    quantize,
    quantized_weight,
)
from fused_resnet.quantizing.scales import Effect, Scales

_FEW = 4  # images that show what int8 does to each convolution

Range = tuple[float, float]
Ranges = Mapping[str, Range]

log = logging.getLogger("fused_resnet")


class FloatConv(nn.Module):
    """act(conv(x) + bias + residual) by torch, for any batch: a lowered convolution while a model is calibrated."""

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Optional[Tensor]) -> None:
        super().__init__()
        self.problem, self.weight, self.bias = problem, weight, bias

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return self._by(self.weight, x, residual)

    def _by(self, weight: Tensor, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        p = self.problem
        y = F.conv2d(x, weight, self.bias, p.stride, p.padding, p.dilation, p.groups)
        return composites.activate(y if residual is None else y + residual, p.activation)

    def quantized(self, x: Tensor, residual: Optional[Tensor], hows: Sequence[Kept]) -> tuple[Tensor, float]:
        """About what the convolution alone gives in int8 or e4m3, and the share of that which is cut off.

        hows: how its result, x and the residual are kept.
        """
        is_float8, how = isinstance(hows[0], Float8), hows[0]
        q, scales = quantized_weight(self.weight, FLOAT8 if is_float8 else torch.int8)
        weight = (q.double() * scales.view(-1, 1, 1, 1)).to(self.weight.dtype)
        y = self._by(weight, _rounded(x, hows[1]), None if residual is None else _rounded(residual, hows[2]))
        levels, step = y / how.scale, 32.0 if is_float8 else 1.0  # of the largest values
        is_cut = (levels < how.low - step / 2) | (levels > how.high + step / 2)
        return _rounded(y, how), is_cut.float().mean().item()


class Subject(NamedTuple):
    """A traced model whose lowered convolutions are `FloatConv`s. names: of the nodes whose values are looked at.
    dtype: of the input that it takes."""

    graph: fx.GraphModule
    names: Mapping[fx.Node, str]
    dtype: torch.dtype

    @property
    def convolutions(self) -> dict[fx.Node, FloatConv]:
        modules = dict(self.graph.named_modules())
        called = {node: modules[str(node.target)] for node in self.names if node.op == "call_module"}
        return {node: module for node, module in called.items() if isinstance(module, FloatConv)}


def calibrate(
    subject: Subject,
    batches: Iterable[Any],
    example: Optional[Tensor],
    weights: str,
    progress: Callable[[int], None] = lambda images: None,
    given: Optional[Ranges] = None,
) -> tuple[Scales, Tensor]:
    """The ranges over all batches, and the first batch. progress: is told how many images were seen. given: ranges that
    hold whatever is seen.

    batches: tensors as the model takes them, or (tensor, label) pairs; the number of images may vary. A tensor that
    stays 0, or too small for a scale, is warned of once. Raises TypeError for other batches, and ValueError where there
    are none or a value is no number. ValueError too where a batch differs from the example in shape, dtype or device;
    without an example they are as the subject takes them.
    """
    ranges: dict[str, Range] = {}
    first, images = None, 0
    for index, x in enumerate(images_of("freeze", batches)):
        if example is not None:
            _check(x, index, example)
        if not len(x):
            continue
        first = x if first is None else first
        images += len(x)
        for name, found in _Observer(subject).ranges_of(x).items():
            if not all(map(math.isfinite, found)):
                raise ValueError(
                    f"freeze: {name} is NaN or infinite in batch {index} of calibrate, and has no scale. Leave such "
                    "images out, or freeze in a float dtype."
                )
            known = ranges.get(name, found)
            ranges[name] = min(known[0], found[0]), max(known[1], found[1])
        progress(images)
    if first is None:
        raise ValueError("freeze: calibrate holds no images. Pass a loader of 16 or more, as the model takes them.")
    ranges.update(given or {})
    zeros = [name for name, found in ranges.items() if found == (0.0, 0.0)]
    small = [name for name, found in ranges.items() if found != (0.0, 0.0) and is_too_small(*found)]
    for what, names in (("0", zeros), ("too small for a scale", small)):
        if names:
            log.warning("%s in all %d images of calibrate, and kept with scale 1: %s", what, images, ", ".join(names))
    return Scales(ranges, weights, images, effects=effects(subject, ranges, _few(subject, first))), first


def _few(subject: Subject, x: Tensor) -> Tensor:
    """A few images of a batch, or all for a graph that asserts what it takes, as one exported for a batch size does."""
    asserts = any(node.target is torch._assert for node in subject.graph.graph.nodes)
    return x if asserts else x[:_FEW]


def images_of(caller: str, batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images of batches of images, or of (images, labels)."""
    return (images for images, _ in pairs_of(caller, batches))


def pairs_of(caller: str, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Optional[Tensor]]]:
    """(images, labels) of such pairs; labels None of batches of images alone. TypeError for what is neither."""
    for index, batch in enumerate(batches):
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        images, labels = batch if is_pair else (batch, None)
        if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
            raise TypeError(
                f"{caller}: batch {index} is a {type(batch).__name__}; batches are tensors as the model takes them, or "
                "(images, labels) pairs of tensors."
            )
        yield images, labels


def _check(x: Tensor, index: int, example: Tensor) -> None:
    for what, got, wanted in (
        ("shape", (..., *x.shape[1:]), (..., *example.shape[1:])),
        ("device", x.device, example.device),
        ("dtype", x.dtype, example.dtype),
    ):
        if got != wanted:
            shown = [str(value).replace("Ellipsis", "N") for value in (got, wanted)]
            raise ValueError(
                f"freeze: batch {index} of calibrate has {what} {shown[0]}, but the example has {shown[1]}. Calibrate "
                "with batches like the example."
            )


class _Observer(fx.Interpreter):
    """Runs a batch, and notes the least and the largest of each node's value."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject.graph)
        self._names, self._dtype = subject.names, subject.dtype

    def ranges_of(self, x: Tensor) -> Ranges:
        self._ranges: dict[str, Range] = {}
        self.run(x.to(self._dtype))
        return self._ranges

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._names:
            least, largest = value.aminmax()
            self._ranges[self._names[n]] = least.item(), largest.item()
        return value


class _Comparison(fx.Interpreter):
    """Runs a batch, and compares what each convolution gives with the same in int8 or e4m3."""

    def __init__(self, subject: Subject, ranges: Ranges, dtype: torch.dtype) -> None:
        super().__init__(subject.graph)
        self._dtype = dtype
        self._names, self._ranges, self._convolutions = subject.names, ranges, subject.convolutions

    def effects_of(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """{convolution: its SQNR in dB, and the share that is cut off}."""
        self._found: dict[str, tuple[float, float]] = {}
        self.run(x)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        if n in self._convolutions:
            operands = cast("tuple[fx.Node, ...]", n.args)
            x, residual, *_ = (*(self.env[node] for node in operands), None)
            actual, cut = self._convolutions[n].quantized(x, residual, [self._how(node) for node in (n, *operands)])
            self._found[self._names[n]] = sqnr_db(_energy(y), _energy(actual - y)), cut
        return y

    def _how(self, node: fx.Node) -> Kept:
        conv = self._convolutions.get(node)
        activation = None if conv is None else conv.problem.activation
        return kept_over(*self._ranges[self._names[node]], self._dtype, activation)


def sensitivity(subject: Subject, ranges: Ranges, x: Tensor, dtype: torch.dtype = torch.int8) -> dict[str, float]:
    """{convolution: the ratio in dB of what it gives on a batch to the error of its quantized form on the same
    operands}. dtype: int8 or float8_e4m3fn."""
    found = _Comparison(subject, ranges, dtype).effects_of(x.to(subject.dtype))
    return {name: sqnr for name, (sqnr, _) in found.items()}


def effects(subject: Subject, ranges: Ranges, x: Tensor) -> dict[str, Effect]:
    """What int8 does to each convolution by itself on a batch."""
    found = _Comparison(subject, ranges, torch.int8).effects_of(x.to(subject.dtype))
    return {name: Effect(sqnr if math.isfinite(sqnr) else None, cut) for name, (sqnr, cut) in found.items()}


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), of energies. Infinite without noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _energy(x: Tensor) -> float:
    return x.double().square().sum().item()


def _rounded(x: Tensor, how: Kept) -> Tensor:
    return dequantize(quantize(x, how), how, x.dtype)
