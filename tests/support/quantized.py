"""Plans in int8 whose regions compute by the reference: exact, and to be had without a kernel."""

from types import SimpleNamespace

import torch
from torch import nn

from fused_resnet.freezing import calibration, quantized
from fused_resnet.freezing.modules import FrozenRegion
from fused_resnet.operators.layout import channels_last
from fused_resnet.regions import kernels
from fused_resnet.regions.exact import run_reference


class ExactRegion(FrozenRegion):
    """A region by the reference."""

    def __init__(self, fragment, convolutions, weights, epilogues):
        nn.Module.__init__(self)
        self.fragment, self.convolutions, self.weights, self.epilogues = fragment, convolutions, weights, epilogues
        self.why, self.micro_kernel = "a test asked for it", "reference"
        shapes = [fragment.value_shapes[value] for value in fragment.outputs]
        self.compiled = SimpleNamespace(weights=list(weights.values()), output_shapes=shapes, workspace_bytes=0)

    def bound(self):
        def run(*inputs):
            outputs = run_reference(self.fragment, self.weights, self.epilogues, inputs)
            outputs = [channels_last(y) if y.dim() == 4 else y for y in outputs]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return run


def by_reference(monkeypatch):
    """Have every region in int8 computed so, and in e4m3, which no CPU has."""
    monkeypatch.setattr(quantized, "region_of", lambda draft, nodes, fragment, *rest: ExactRegion(fragment, *rest))
    why_none = kernels.why_none
    monkeypatch.setattr(kernels, "why_none", lambda dtype: None if dtype.itemsize == 1 else why_none(dtype))
    why_not_on = calibration.why_not_on
    float8 = torch.float8_e4m3fn
    monkeypatch.setattr(
        calibration, "why_not_on", lambda dtype, device: None if dtype == float8 else why_not_on(dtype, device)
    )


def int8_regions(frozen, x):
    modules = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenRegion)]
    return [module for module in modules if module.fragment.scales]
