"""The bound of kernels that round more often than the int8 contract."""

import pytest
import torch

from fused_resnet import testing
from fused_resnet.operators import near_bytes, quantized
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import parsed_problem
from fused_resnet.operators.quantized import Epilogue


def rounding_often(p, o):
    """The formula with a rounding after each operation, and s8 as u8 with a zero point, in the order of libraries."""
    e, per_channel = o.epilogue, (1, -1, 1, 1)
    total = quantized.sums(o.x, o.weight, p.stride, p.padding, p.dilation, p.groups).float()
    y = total * e.multiplier.view(per_channel) + e.bias.view(per_channel)
    if o.residual is not None:
        y = y + o.residual.float() * torch.tensor(e.residual)
    zero_point = 128 if e.dtype == torch.int8 else 0
    return (y + zero_point).clamp(0, 255 if zero_point else e.high).round().sub(zero_point).to(e.dtype)


def test_kernels_that_round_more_often_are_within_it_and_a_step_off_at_most():
    differing = 0
    for index in range(120):
        case = testing.case_at(3, index, kind="int8")
        exact = near_bytes.exact(case.problem, case.operands)
        bound = near_bytes.error_bound(case.problem, case.operands)
        for found in (case.expected, rounding_often(case.problem, case.operands)):
            assert ((found - exact).abs() <= bound).all(), case
        steps = (found.int() - case.expected.int()).abs()
        assert not steps.numel() or steps.max() <= 1
        differing += int(steps.sum())
    assert 0 < differing < 100


def problem_of(total, bias, skip=None, residual=0.0):
    """One pixel, of which the sum is `total` and the multiplier 1/8."""
    p = parsed_problem(f"1x1x1x1 -> 1, 1x1 uint8 {'bias' if skip is None else 'bias+add'} relu", "cpu")
    vectors = torch.tensor([0.125]), torch.tensor([bias])
    residual_q = None if skip is None else torch.full((1, 1, 1, 1), skip, dtype=torch.uint8)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    x = torch.full((1, 1, 1, 1), total, dtype=torch.uint8)
    return p, Int8Operands(x, weight, Epilogue(*vectors, residual, 0.0, 255.0, torch.uint8), residual_q)


@pytest.mark.parametrize(
    "total, bias, skip, exact, right",
    [
        (80, 1.0, None, 11.0, [11]),
        (84, 0.0, None, 10.5, [10, 11]),  # the middle between two bytes
        (84, 0.0, 2, 12.5, [12, 13]),
        (84, 0.001, None, 10.501, [11]),
        (80, -20.0, None, 0.0, [0]),
        (255, 1e4, None, 255.0, [255]),
        (84, 2.0**19, None, 255.0, [255]),
        (0, -(2.0**24), None, 0.0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # terms so large that nothing else is left of them
    ],
)
def test_which_bytes_are_within_it(total, bias, skip, exact, right):
    p, o = problem_of(total, bias, skip, 1.0)
    value, bound = near_bytes.exact(p, o), near_bytes.error_bound(p, o)
    assert abs(value.item() - exact) < 1e-6
    assert [q for q in range(256) if abs(q - value.item()) <= bound.item()] == right
