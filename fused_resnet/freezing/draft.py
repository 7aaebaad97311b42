"""A graph on its way to a plan, as the passes get it, and what they have decided about its convolutions."""

from __future__ import annotations

from typing import Callable, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, fx, nn

from fused_resnet.choosing import Selection
from fused_resnet.choosing.decide import NOTHING, Tuning
from fused_resnet.choosing.planned import Placed
from fused_resnet.freezing.dtypes import Conversion
from fused_resnet.freezing.given_scales import RoundedWeight
from fused_resnet.freezing.modules import PackedWeights
from fused_resnet.graphs.nodes import add_child, module_of
from fused_resnet.operators.problem import ConvProblem
from fused_resnet.quantizing import Scales


class Decision(NamedTuple):
    """What is decided about a lowered convolution: what a `FrozenConv` is made of.

    weight and bias are folded; the weight is not packed. in_place: the sum replaces the residual's memory. placed: for
    a backend whose tensors the plan places, how `layouts` settled them.
    """

    problem: ConvProblem
    selection: Selection
    weight: Tensor
    bias: Optional[Tensor]
    in_place: bool = False
    placed: Optional[Placed] = None


class Quantization(NamedTuple):
    """How a model becomes int8 or e4m3: the ranges of its tensors, and the convolutions that stay in floats (by name).

    forms: of each convolution, its activation and whether it has a residual, as its range was found. dtype: int8, or
    float8_e4m3fn. limits: the largest byte of u8 tensors, where the model cuts them off earlier than 255. unknown: why
    a tensor has no scale.
    """

    scales: Scales
    forms: Mapping[str, tuple[str, bool]]
    kept: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.int8
    limits: Mapping[str, float] = {}
    unknown: Mapping[str, str] = {}


class Draft(NamedTuple):
    """The traced model for one input shape, and what was asked for.

    module: the graph, whose nodes know their shapes and dtypes. modules: those that its nodes may call, by name.
    convs: the nodes that are lowered convolutions, each called with x and perhaps a residual. Passes decide by
    replacing what is kept there. backend: "auto", or the one that every convolution must use. device: where the plan
    will run. conversion: of the caller's dtypes, if there is one. packed: the weights that the model's plans share.
    tuning: what may be measured of what is not known (`choosing.decide`). overrides: who computes some problems,
    whatever is known of them. quantization: what becomes int8. folds: of each of convs, a function that folds it anew
    in another dtype. rounded: of those whose weight the model has rounded, how it is after folding.
    """

    module: fx.GraphModule
    modules: dict[str, nn.Module]
    convs: dict[fx.Node, Decision]
    folds: dict[fx.Node, Callable[[torch.dtype], tuple[Tensor, Optional[Tensor]]]]
    rounded: dict[fx.Node, RoundedWeight]
    backend: str
    device: torch.device
    conversion: Optional[Conversion]
    packed: PackedWeights
    tuning: Tuning = NOTHING
    overrides: Mapping[ConvProblem, Selection] = {}
    quantization: Optional[Quantization] = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def called_by(self, node: fx.Node) -> Optional[nn.Module]:
        return module_of(node, self.modules)

    def decide(self, node: fx.Node, **values: object) -> None:
        """Replace these values of what is decided about a convolution."""
        self.convs[node] = self.convs[node]._replace(**values)  # type: ignore[arg-type]

    def add(self, name: str, child: nn.Module) -> str:
        """Give the graph a module of this name, or of the next free one. Returns the name."""
        return add_child(self.module, self.modules, name, child)


def lowered(x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
    """What the nodes of lowered convolutions call until their modules are made."""
    raise NotImplementedError("a draft is no plan yet")
