"""Models frozen in int8 by oneDNN, which is asked for by name: within a bound of the contract, groups of any width."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends import onednn_int8
from fused_resnet.choosing import quantized as in_steps
from fused_resnet.choosing.choice import Selection
from fused_resnet.freezing.steps import FrozenSteps
from fused_resnet.machine import onednn
from fused_resnet.measuring.rooflines import Roofline
from tests.support.quantized import by_reference, int8_regions

X = (2, 3, 14, 14)
REASON = onednn.why_no_vnni()
needs_vnni = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Net(nn.Module):
    """A stem of signed pixels, a residual, groups of 4, a depthwise convolution, SiLU, s8 and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 32, 3, padding=1, groups=g) for c, g in ((3, 1), (32, 1), (32, 8)))
        self.depthwise, self.signed = nn.Conv2d(32, 32, 5, 2, 2, groups=32), nn.Conv2d(32, 48, 1)
        self.silu, self.fc = nn.Conv2d(48, 8, 1), nn.Linear(8, 5)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.b(F.relu6(self.a(x))) + x)
        x = F.silu(self.silu(self.signed(F.relu6(self.depthwise(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images():
    return [torch.randn(8, *X[1:], generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def in_int8(model, x, **options):
    return fused_resnet.freeze(model, x, dtype=torch.int8, **{"calibrate": images(), **options})


@needs_vnni
def test_its_answers_are_those_of_the_reference_but_for_steps(monkeypatch):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(X)
    frozen = in_int8(model, x, backend="onednn")
    steps = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenSteps)]
    names = [conv.name.removeprefix("fused_model_") for module in steps for conv in module.convolutions]
    assert names == ["stem", "a", "b", "depthwise", "signed"]
    assert {one.backend for module in steps for one in module.selections} == {onednn_int8.BACKEND}
    with monkeypatch.context() as patch:
        by_reference(patch)
        patch.setattr("fused_resnet.freezing.quantized.blocked.why_no_groups", lambda problem, dtype: None)
        expected = in_int8(model, x)
        assert [conv.name for region in int8_regions(expected, x) for conv in region.convolutions] == [
            conv.name for module in steps for conv in module.convolutions
        ]
        assert fused_resnet.agreement(expected, frozen, images()).sqnr_db > 35
    other = torch.randn(3, 3, 9, 17)  # by the same scales
    assert fused_resnet.agreement(model, frozen, [other]).sqnr_db > 20
    roof = Roofline(1e9, 1e11)
    text = str(fused_resnet.explain(frozen, x, roofline=roof))
    assert "onednn: 5 of 6: asked for by name (int8 was asked for, a byte may be a step off)" in text
    assert "silu has no int8 form" in text


@needs_vnni
def test_it_is_taken_only_where_it_was_asked_for():
    model, x = Net().eval(), torch.randn(X)
    frozen = in_int8(model, x)
    assert not any(isinstance(module, FrozenSteps) for module in frozen.plan(x).modules())
    text = str(fused_resnet.explain(frozen, x, roofline=Roofline(1e9, 1e11)))
    assert "groups of 1" in text and "a step off" not in text


@needs_vnni
def test_what_is_kept_stays_in_floats():
    model, x = Net().eval(), torch.randn(X)
    frozen = in_int8(model, x, backend="onednn", keep=["depthwise", "a"])
    assert {conv.name for region in int8_regions(frozen, x) for conv in region.convolutions} == {
        "fused_model_stem", "fused_model_b", "fused_model_signed",
    }  # fmt: skip
    ranked = in_int8(model, x, backend="onednn", keep=5)  # all that has an int8 form, the depthwise one too
    assert not int8_regions(ranked, x)


@needs_vnni
def test_what_it_computes_wrongly_stays_in_floats():
    """Signed bytes with padding in groups."""
    model, x = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, groups=3), nn.ReLU(), nn.Conv2d(12, 8, 1)), torch.randn(X)
    frozen = in_int8(model.eval(), x, backend="onednn")
    assert [conv.name for region in int8_regions(frozen, x) for conv in region.convolutions] == ["fused_model_2"]


@needs_vnni
def test_it_is_checked_where_it_runs(monkeypatch):
    p = in_steps._SAMPLE._replace(device="cpu", H=9, has_residual=True)

    def wrong(problem, operands):
        y = onednn_int8.run(problem, operands)
        y[-1, -1, -1, -1] ^= 4
        return y

    device, spoilt = torch.device("cpu"), onednn_int8.BACKEND._replace(run=wrong)
    assert in_steps.why_wrong(p, Selection(onednn_int8.BACKEND), device) is None
    assert in_steps.why_wrong(p, Selection(spoilt), device) == "a value is beyond the bound of bytes"


def test_without_vnni_it_is_refused(monkeypatch):
    monkeypatch.setattr(onednn, "why_no_vnni", lambda: "no VNNI here")
    with pytest.raises(
        backends.BackendError, match="int8 by onednn cannot run on cpu: no VNNI here. Leave out backend="
    ):
        in_int8(Net().eval(), torch.randn(X), backend="onednn")
