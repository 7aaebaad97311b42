"""The tracer: what torch.fx alone would lose."""

import operator

import pytest

from fused_resnet.graphs.tracer import Tracer, WritesState


def test_an_augmented_sum_stays_a_write():
    def add_in_place(x, y):
        x += y
        return x

    assert [node.target for node in Tracer().trace(add_in_place).nodes][2] is operator.iadd


def test_what_is_assigned_to_a_tensor_is_no_graphs():
    def assign(x):
        x.data = 0.5 * x
        return x

    with pytest.raises(WritesState, match="it writes the attribute data of a tensor, which a graph") as raised:
        Tracer().trace(assign)
    assert raised.value.what == "the attribute data of a tensor"
