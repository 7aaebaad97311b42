"""What torch's own tools make of a fused model: compile, export, symbolic traces, quantization."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import fused_resnet
from fused_resnet import models
from fused_resnet.fusing import convert
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from tests.support import networks
from tests.support.fused import as_good_as_plain, snapshot, unchanged


@pytest.fixture
def fresh_dynamo():
    """Dynamo's counters, empty: its `reset` leaves them as an earlier test of this process made them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def operator_names(graph):
    return [
        node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "fused_resnet"
    ]


@pytest.mark.parametrize("training", (False, True))
def test_compile_keeps_the_operators_in_one_graph(training, fresh_dynamo):
    from torch._dynamo.testing import CompileCounterWithBackend

    plain = networks.small().train() if training else networks.randomize(models.resnet18(num_classes=10))
    model = fused_resnet.fuse(copy.deepcopy(plain))
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 48, 48)
        with torch.set_grad_enabled(training):
            actual, expected = compiled(x), plain(x)
        assert networks.error(actual, expected.double()) < 1e-4
    # ResNet-18: a stem, 8 blocks of two convolutions, 3 projections; in training one addition for each of the 4 blocks
    expected_names = ["add_relu"] * 4 if training else ["conv_bn_act"] * 20
    assert [operator_names(graph) for graph in backend.graphs] == [expected_names]
    assert backend.frame_count == 1 and not fresh_dynamo["graph_break"] and not fresh_dynamo["recompiles"]
    if training:
        actual.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters()):
            assert networks.error(q.grad, p.grad.double()) < 1e-3, name


@pytest.mark.full
def test_inductor_on_a_network(fresh_dynamo):
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        as_good_as_plain(compiled, plain, torch.randn(4, 3, 16, 16))
    assert not fresh_dynamo["graph_break"] and not fresh_dynamo["recompiles"]


def test_inductor_on_one_block(fresh_dynamo):
    """Strides of the fake outputs are those of the real ones where Inductor relies on them."""
    plain = networks.single()
    compiled = torch.compile(fused_resnet.fuse(copy.deepcopy(plain)), fullgraph=True)
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    actual, expected = compiled(x), plain(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual_grad, expected_grad = (torch.autograd.grad(out.square().sum(), x)[0] for out in (actual, expected))
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_exported_models_are_left_alone_with_the_reason():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), torch.randn(1, 3, 9, 9)
    exported = torch.export.export(model, (x,)).module()
    reason = "its convolutions are functions: fuse what it was exported from, or freeze it"
    assert convert.left_alone(exported) == [("the model", reason)]
    with pytest.raises(ValueError, match=reason):
        fused_resnet.fuse(exported, strict=True)
    assert not convert.left_alone(torch.export.export(fused_resnet.fuse(model), (x,)).module())


def test_export_keeps_the_operators(tmp_path):
    plain = networks.small()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 16, 16)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert operator_names(program.graph_module) == ["conv_bn_act"] * (1 + 4 * 2 + 3)
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))


# ------------------------------------------------------------------------------------------------------------- torch.fx


TRACED = {
    "basic block": lambda: BasicBlock(8, 8, 2, nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))),
    "bottleneck": lambda: Bottleneck(32, 8),
    "ConvBNAct": lambda: ConvBNAct(8, 8),
    "rewritten": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "network": lambda: networks.small(),
}


@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("tracer", (torch.fx.Tracer, quantize_fx.QuantizationTracer))
def test_a_trace_of_what_is_fused_is_that_of_the_plain(make, tracer):
    model = make().eval()
    arguments = ([], []) if tracer is quantize_fx.QuantizationTracer else ()
    plain = str(tracer(*arguments).trace(model))
    fused = tracer(*arguments).trace(fused_resnet.fuse(model, strict=True))
    assert str(fused) == plain
    assert not [node for node in fused.nodes if node.op != "output" and not node.users]


# --------------------------------------------------------------------------------------------------------- quantization


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.act = nn.Conv2d(8, 8, 3), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.act(self.second(x)))


@pytest.mark.parametrize("fused_first", (True, False))
@pytest.mark.parametrize("train", (True, False))
def test_eager_quantization_goes_on_after_fuse(fused_first, train):
    """Observers, swaps by class and int8 kernels as without fuse; before and after torch's own fusing."""
    torch.manual_seed(0)
    model, x = networks.randomize(Quantizable()), torch.randn(4, 3, 12, 12)
    groups = [["conv", "bn", "relu"], ["second", "act"]]

    def quantized(model, fuse):
        if not fused_first:
            model = fuse(model)
        if train:
            model.train().qconfig = quantization.get_default_qat_qconfig("x86")
            quantization.fuse_modules_qat(model, groups, inplace=True)
        else:
            model.eval().qconfig = quantization.get_default_qconfig("x86")
            quantization.fuse_modules(model, groups, inplace=True)
        if fused_first:
            model = fuse(model)
        prepare = quantization.prepare_qat if train else quantization.prepare
        model = fuse(prepare(model))
        with torch.no_grad():
            model(x)
        return quantization.convert(model.eval())

    with torch.no_grad():
        expected = quantized(copy.deepcopy(model), lambda model: model)(x)
        got = quantized(copy.deepcopy(model), fused_resnet.fuse)(x)
    assert torch.equal(got, expected)


def test_modules_of_quantization_are_named_and_left_alone():
    model = Quantizable().eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.fuse_modules(model, [["conv", "bn", "relu"], ["second", "act"]], inplace=True)
    before = snapshot(model)
    fused_resnet.fuse(model)
    unchanged(model, before)
    found = dict(convert.left_alone(model))
    assert set(found) == {"conv", "second"}
    assert all("quantization knows a ConvReLU2d of torch.ao" in why for why in found.values())
