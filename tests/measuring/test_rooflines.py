"""The roofline of a problem."""

import pytest
import torch

from fused_resnet.measuring import rooflines
from fused_resnet.operators.problem import AddReluProblem, ConvProblem

SMALL = ConvProblem(4, 8, 6, 5, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, "relu", False, True, True, torch.float32, "cpu")


def test_roofline_is_the_larger_of_memory_and_arithmetic():
    memory_bound = rooflines.Roofline(bytes_per_s=SMALL.bytes_moved * 10.0, flops_per_s=1e30)
    assert memory_bound.time_us(SMALL) == pytest.approx(1e5)
    assert memory_bound.time_us(AddReluProblem((4, 4), True, torch.float32, "cpu")) == pytest.approx(
        1e5 * 3 * 16 * 4 / SMALL.bytes_moved
    )
    compute_bound = rooflines.Roofline(bytes_per_s=1e30, flops_per_s=SMALL.flops * 100.0)
    assert compute_bound.time_us(SMALL) == pytest.approx(1e4)
