"""Fused and frozen models under torch.compile and in CUDA graphs."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.nn import BasicBlock
from tests.support import networks
from tests.support.fused import as_good_as_plain, assert_same, fused_calls, pair


@pytest.fixture
def fresh_dynamo():
    """Dynamo's counters, empty: its `reset` leaves them as an earlier test of this process made them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


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
    assert [fused_calls(graph.graph) for graph in backend.graphs] == [expected_names]
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


class Around(nn.Module):
    """Something to compile before a model and something after it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(torch.relu(x)).softmax(1)


def test_compiled_around_a_frozen_model():
    """The plan runs as it is; what surrounds it is compiled, and nothing is compiled twice."""
    plain, _, x = pair(BasicBlock)
    frozen = fused_resnet.freeze(plain, x)
    around = Around(frozen)
    graphs = []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    compiled = torch.compile(around, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            assert_same(compiled(x), around(x))
    assert len(graphs) == 2 and "relu" in graphs[0][0] and graphs[1] == ["softmax"]


@pytest.mark.full
def test_compiled_frozen_model():
    plain, _, x = pair(BasicBlock)
    frozen = fused_resnet.freeze(plain, x)
    assert_same(torch.compile(frozen)(x), frozen(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and a CUDA build of torch")
def test_cuda_graph_capture_of_a_fused_model():
    plain, fused, x = (value.cuda() for value in pair())
    static, stream = x.clone(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            fused(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = fused(static)
    other = torch.randn_like(x)
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, plain(other), rtol=1e-3, atol=1e-3)
