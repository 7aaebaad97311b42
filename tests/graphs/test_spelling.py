"""Convolutions that a graph calls as functions, and the arguments of such calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.graphs.spelling import arguments_of, has_convolutions


def graph_of(function):
    return fx.Tracer().trace(function)


def exported(module):
    return torch.export.export(module.eval(), (torch.randn(1, 3, 8, 8),)).module().graph


@pytest.mark.parametrize("graph, expected", (
    (lambda: graph_of(lambda x, w: F.conv2d(x, w).relu()), True),
    (lambda: graph_of(lambda x, w: torch.convolution(x, w, None, (1,), (0,), (1,), False, (0,), 1)), True),
    (lambda: exported(nn.Conv2d(3, 4, 1)), True),
    (lambda: exported(nn.Conv2d(3, 4, 3, padding="same")), True),
    (lambda: exported(nn.Linear(8, 2)), False),
    (lambda: graph_of(nn.Sequential(nn.Conv2d(3, 4, 1))), False),  # a module
    (lambda: graph_of(lambda x: x.relu()), False),
), ids=("function", "torch.convolution", "exported", "padded by name", "linear", "module", "none"))  # fmt: skip
def test_convolutions_are_found_as_functions_and_as_operators(graph, expected):
    assert has_convolutions(graph()) == expected


def test_arguments_have_names_by_place_and_by_keyword():
    graph = graph_of(lambda x, w, b: F.conv2d(x, w, b, 2, groups=3) + F.relu(x))
    x, w, b, conv, relu, add, _ = graph.nodes
    assert arguments_of(conv) == {"input": x, "weight": w, "bias": b, "stride": 2, "groups": 3}
    assert arguments_of(relu) == arguments_of(add) == arguments_of(x) == arguments_of(None) == {}
