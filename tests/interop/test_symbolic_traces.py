"""The symbolic trace of a fused model is that of the plain one."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization.fx.tracer import QuantizationTracer

import fused_resnet
from fused_resnet.fusing import adapters, convert
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from tests.support import networks


class Adapts(nn.Module):
    """A block that has an adapter, called with one tensor or several."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        x = x if isinstance(x, (torch.fx.Proxy, torch.Tensor)) else torch.cat(x, 1)
        return self.relu(self.bn(self.conv(x)))


@adapters.register(f"{__name__}.Adapts", reads=" ".join(Adapts.forward.__code__.co_names), convs="conv")
def _adapts(block, x):
    x = x if isinstance(x, torch.Tensor) else torch.cat(x, 1)
    return fused_resnet.nn.conv_bn_act(x, block.conv, block.bn, block.relu, backend=block.backend)


class Gives(nn.Module):
    """Calls a module with several tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module([x[:, :1], x[:, 1:]])


class ByHand(nn.Module):
    """A forward that was written for us."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return fused_resnet.nn.conv_bn_act(x, self.conv, self.bn, self.relu)


TRACED = {
    "our blocks": lambda: networks.small(BasicBlock),
    "our bottlenecks": lambda: networks.small(Bottleneck),
    "a block as the root": lambda: networks.single(BasicBlock),
    "a bottleneck as the root": lambda: networks.single(Bottleneck),
    "sequences": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "adapted": Adapts,
    "adapted, of a list": lambda: Gives(Adapts()),
    "ConvBNAct": lambda: nn.Sequential(ConvBNAct(3, 8), ConvBNAct(8, 8, norm_layer=None)),
    "ConvBNAct as the root": lambda: ConvBNAct(3, 8),
}


class Deep(torch.fx.Tracer):
    """Follows torch's own modules too, but for norms, which ask for the number of dimensions."""

    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, nn.BatchNorm2d)


class Shallow(torch.fx.Tracer):
    """One node for what is written in this file."""

    def is_leaf_module(self, module, qualified_name):
        return type(module).__module__ == __name__ or super().is_leaf_module(module, qualified_name)


def nodes_of(graph):
    return [(node.name, node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


@pytest.mark.parametrize("tracer", (torch.fx.Tracer, Shallow, QuantizationTracer, Deep))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
def test_a_symbolic_trace_is_that_of_the_plain_model(make, training, tracer):
    plain = networks.randomize(make()).train(training)
    fused = fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert convert.fused_convs(fused)
    tracers = [tracer([], []) if tracer is QuantizationTracer else tracer() for _ in range(2)]
    ours, theirs = (one.trace(model) for one, model in zip(tracers, (fused, plain)))
    assert nodes_of(ours) == nodes_of(theirs)
    assert not [node for node in ours.nodes if node.op != "output" and not node.users]


def test_a_symbolic_trace_of_a_forward_by_hand_holds_calls():
    graph = torch.fx.symbolic_trace(ByHand().eval()).graph
    assert [node.op for node in graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]


def test_a_torchvision_like_block_is_traced_by_its_own_forward(tmp_path, monkeypatch):
    plain = networks.single(networks.torchvision_like(tmp_path, monkeypatch).BasicBlock)
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    assert nodes_of(torch.fx.symbolic_trace(fused).graph) == nodes_of(torch.fx.symbolic_trace(plain).graph)
