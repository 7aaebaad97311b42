"""freeze: what is refused, and the way back to the model."""

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support import networks
from tests.support.plans import X, frozen_equals


def test_training_mode_is_refused():
    model, x = networks.small(), torch.randn(X)
    model.layer2[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"freeze: layer2.0.bn1 is in training mode; call model.eval\(\) first"):
        fused_resnet.freeze(model, x)
    with pytest.raises(RuntimeError, match="freeze: bn1 is in training mode; .* BatchNorm2d does something else then"):
        fused_resnet.freeze(model.train(), x)
    dropping = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    for name, module in (("1", dropping), ("the model", Branches())):
        with pytest.raises(RuntimeError, match=f"freeze: {name} is in training mode"):
            fused_resnet.freeze(module, x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if self.training else -self.conv(x)


def ask(module):
    return module.training


class AsksThroughAFunction(nn.Module):
    """Its own code does not say `training`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if ask(self) else -self.conv(x)


class CountsInTraining(AsksThroughAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if ask(self):
            self.calls += 1
        return self.conv(x) + self.calls


@pytest.mark.parametrize("model", (AsksThroughAFunction, CountsInTraining))
def test_what_training_mode_means_is_seen_in_the_graph(model):
    model, x = model(), torch.randn(X)
    with pytest.raises(RuntimeError, match="freeze: the model is in training mode; call model.eval"):
        fused_resnet.freeze(model, x)
    frozen_equals(model.eval(), x)


def with_fresh_modules(model):
    model.relu, model.layer1[0].relu = nn.Sequential(nn.Identity(), nn.ReLU()), nn.ReLU()
    return model


def exported(model):
    return torch.export.export(model, (torch.randn(X),)).module()


MODELESS = {
    "fresh modules": with_fresh_modules,
    "exported": exported,
    "traced by torch.fx": lambda model: torch.fx.symbolic_trace(nn.Sequential(model).eval()),
    "a flag alone": lambda model: model.conv1.train() and model,
}


@pytest.mark.parametrize("make", MODELESS.values(), ids=MODELESS)
def test_a_training_flag_that_means_nothing_is_no_matter(make):
    model, x = make(networks.small()), torch.randn(X)
    assert any(module.training for module in model.modules())
    flags, hooks = [module.training for module in model.modules()], len(model._forward_pre_hooks)
    with torch.no_grad():
        expected = model(x)
    frozen = fused_resnet.freeze(model, x)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    assert [module.training for module in model.modules()] == flags and len(model._forward_pre_hooks) == hooks


def test_an_exported_model_keeps_its_guards():
    frozen = fused_resnet.freeze(exported(networks.small()), torch.randn(X))
    with pytest.raises(ValueError, match="Guard failed"):
        frozen(torch.randn(3, *X[1:]))
