"""Adapters: forwards of ours for blocks that no trace covers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.fusing import adapters
from fused_resnet.fusing.convert import fused_convs
from fused_resnet.nn import conv_bn_act
from tests.support import networks
from tests.support.units import same


class ListUnit(nn.Module):
    """Takes a list, which no trace covers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.twice = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), False

    def forward(self, xs):
        if not isinstance(xs, list):
            raise TypeError("a list")
        out = self.relu(self.bn(self.conv(torch.cat(xs, 1))))
        return out * 2 if self.twice else out


@pytest.fixture
def registered():
    reads = "isinstance list TypeError relu bn conv torch cat twice"

    @adapters.register(f"{__name__}.ListUnit", reads=reads, convs="conv")
    def list_unit(unit, xs):
        if unit.twice:
            return NotImplemented
        return conv_bn_act(torch.cat(xs, 1), unit.conv, unit.bn, unit.relu, backend=unit.backend)

    yield list_unit
    del adapters._ADAPTERS[f"{__name__}.ListUnit"]


def test_an_adapter_computes_and_steps_aside(registered):
    plain = networks.randomize(ListUnit())
    model = fused_resnet.fuse(copy.deepcopy(plain), strict=True, backend="eager")
    assert isinstance(model, adapters.Adapted) and fused_convs(model) == ["conv"] and model.backend == "eager"
    xs = [torch.randn(1, 2, 4, 4), torch.randn(1, 4, 4, 4)]
    with torch.no_grad():
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fused_resnet.fuse(model)):
            assert type(copied) is type(model)
            same(copied(xs), plain(xs))
        for module in (model, plain):
            module.twice = True
        same(model(xs), plain(xs))
        for module in (model, plain):
            module.twice = False
            module.bn.register_forward_hook(lambda _, args, out: -out)
        same(model(xs), plain(xs))
    assert type(fused_resnet.unfuse(model)) is ListUnit


def test_without_an_adapter_it_is_left_alone():
    with pytest.raises(ValueError, match="the model: its forward asks for the class of a value"):
        fused_resnet.fuse(ListUnit().eval(), strict=True)


def test_an_adapter_is_not_for_a_patched_forward(registered, monkeypatch):
    stock = ListUnit.forward
    monkeypatch.setattr(ListUnit, "forward", lambda self, xs: -stock(self, xs))
    with pytest.raises(ValueError, match="the forward of ListUnit was replaced"):
        fused_resnet.fuse(ListUnit().eval(), strict=True)
    model = ListUnit().eval()
    assert type(fused_resnet.fuse(model)) is ListUnit


def test_an_adapter_is_not_for_a_block_that_has_a_name_of_ours_or_pickles_itself(registered, monkeypatch):
    block = ListUnit().eval()
    block.backend = "the user's"
    with pytest.raises(ValueError, match="its attribute backend has a name that fused modules use"):
        fused_resnet.fuse(block, strict=True)
    assert type(fused_resnet.unfuse(fused_resnet.fuse(block))) is ListUnit and block.backend == "the user's"
    monkeypatch.setattr(ListUnit, "__reduce__", lambda self: (ListUnit, ()), raising=False)
    with pytest.raises(ValueError, match="ListUnit has its own way to be pickled"):
        fused_resnet.fuse(ListUnit().eval(), strict=True)


def test_a_subclass_has_no_adapter(registered):
    class Doubled(ListUnit):
        def forward(self, xs):
            return 2 * super().forward(xs)

    with pytest.raises(ValueError, match="asks for the class of a value"):
        fused_resnet.fuse(Doubled().eval(), strict=True)


def test_a_trace_of_an_adapted_block_is_that_of_the_plain():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.act(self.bn(self.conv(x)))

    @adapters.register(f"{Layer.__module__}.{Layer.__qualname__}", reads="act bn conv", convs="conv")
    def layer(block, x):
        return conv_bn_act(x, block.conv, block.bn, block.act, backend=block.backend)

    try:
        model = Layer().eval()
        plain = str(torch.fx.symbolic_trace(model).graph)
        assert isinstance(fused_resnet.fuse(model), adapters.Adapted)
        assert str(torch.fx.symbolic_trace(model).graph) == plain
    finally:
        del adapters._ADAPTERS[f"{Layer.__module__}.{Layer.__qualname__}"]
