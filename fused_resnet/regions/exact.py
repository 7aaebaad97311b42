"""A fragment in int8 or e4m3 by the reference (`operators.quantized`): what its region must give."""

from __future__ import annotations

from typing import Mapping, Optional, Sequence

from torch import Tensor

from fused_resnet.operators import quantized
from fused_resnet.operators.quantized import Epilogue, Wide
from fused_resnet.regions.fragment import ConvStep, CopyStep, FlattenStep, Fragment, GateStep, map_of


def run_reference(
    fragment: Fragment, weights: Mapping[int, Tensor], epilogues: Mapping[int, Epilogue], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs of such a fragment, fp32, to the last bit: maps (N, C, P, Q), and (N, C) of what was flattened
    or is a linear layer's.

    weights: (K, C, R, S) in s8 or e4m3 by the place of the step; epilogues likewise. inputs: float tensors.
    """
    values: list[Tensor] = []
    for x, how in zip(inputs, fragment.scales):
        values.append(x if how is None else quantized.quantize(x, how))
    for place, step in enumerate(fragment.steps):
        x = values[step.reads[0]]
        if isinstance(step, ConvStep) and step.is_linear:
            y = quantized.linear_of_means(values[map_of(fragment, step.x)], weights[place], epilogues[place])
        elif isinstance(step, ConvStep) and isinstance(how := fragment.scales[step.x], Wide):
            y = quantized.linear_of_vectors(x, how, weights[place], epilogues[place], step.problem.activation)
        elif isinstance(step, GateStep):
            residual = None if step.residual is None else values[step.residual]
            y = quantized.gate_act(x, values[step.gate], epilogues[place], step.function, residual)
        elif isinstance(step, ConvStep):
            p, residual = step.problem, None if step.residual is None else values[step.residual]
            window = (p.stride, p.padding, p.dilation, p.groups)
            y = quantized.conv_act(x, weights[place], epilogues[place], *window, residual)
        elif isinstance(step, FlattenStep):
            y = x
        elif isinstance(step, CopyStep):
            y = step.of([values[read] for read in step.xs])
        elif step.kind == "max":
            y = quantized.max_pool(x, step.window, step.stride, step.padding)
        else:
            y = quantized.average_pool(x, _scale(fragment, step.x))
        values.append(y)
    outputs = []
    for value, is_vectors in zip(fragment.outputs, fragment.has_vectors):
        how = fragment.scales[value]
        y = values[value] if how is None else quantized.dequantize(values[value], how)
        outputs.append(y.flatten(1) if is_vectors else y)
    return outputs


def _scale(fragment: Fragment, value: int) -> quantized.Kept:
    how: Optional[quantized.Kept] = fragment.scales[value]
    assert how is not None
    return how
