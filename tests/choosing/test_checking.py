"""What a check of a candidate sees, each fault by itself; and the order of the images that it computes."""

import re

import pytest
import torch

from fused_resnet import backends, choosing
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import cases, checking
from tests.support.tuned_files import problem

EAGER = backends.known("conv_bn_act")["eager"]
ONE = problem(5, has_residual=True)


def outcome_of(monkeypatch, run, one=ONE):
    spoilt = backends.Backend("spoilt", lambda problem: None, run, rounding=EAGER.rounding)
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "spoilt", spoilt)
    return checking.checked(checking.Subject(one, "cpu"), choosing.Selection(spoilt)).outcome


def keeps_its_output():
    kept = []

    def run(problem, operands):
        kept.append(EAGER.run(problem, operands))
        return kept[0]

    return run


def after(spoil):
    """A right result, then what spoil(operands, result) makes of it."""

    def run(problem, operands):
        return spoil(operands, EAGER.run(problem, operands))

    return run


def leaves_out_the_last(operands, out):
    new = torch.empty_like(out)
    new[:-1] = out[:-1]
    new[-1, :-1] = out[-1, :-1]
    return new


def takes_less_of(name):
    """Right for images of ordinary size."""

    def run(problem, operands):
        return EAGER.run(problem, operands._replace(**{name: getattr(operands, name).clamp(-20.0, 20.0)}))

    return run


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("N", (1, 2, 5))
def test_what_is_right_is_found_right(monkeypatch, N, dtype):
    for has_residual in (False, True):
        one = problem(N, dtype, has_residual=has_residual)
        assert 0 < outcome_of(monkeypatch, EAGER.run, one)["error_ratio"] <= 1


WRONG = {
    "keeps its output from call to call": keeps_its_output(),
    "leaves out the last channel": after(leaves_out_the_last),
    "leaves out large x": takes_less_of("x"),
    "leaves out a large residual": takes_less_of("residual"),
    "takes one image for another": after(lambda operands, out: out[[0, 1, 0, 3, 4]]),
    "NaN": after(lambda operands, out: out * torch.nan),
}


@pytest.mark.parametrize("run", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found_wrong(monkeypatch, run):
    outcome = outcome_of(monkeypatch, run)
    assert outcome["error_ratio"] is None or outcome["error_ratio"] > 1


def test_a_batch_of_one_meets_both_images(monkeypatch):
    outcome = outcome_of(monkeypatch, takes_less_of("x"), problem(1))
    assert outcome["error_ratio"] is None or outcome["error_ratio"] > 1


@pytest.mark.parametrize(
    "spoil, why",
    (
        (lambda operands, out: (out, operands.x[-1].zero_())[0], "it writes into its input"),
        (lambda operands, out: (out, operands.residual[-1].zero_())[0], "it writes into its input"),
        (lambda operands, out: out[:, :-1], r"its output is \(5, 15, 8, 8\) in torch.float32"),
        (lambda operands, out: out.double(), r"its output is \(5, 16, 8, 8\) in torch.float64"),
        (lambda operands, out: 1 / 0, "ZeroDivisionError: division by zero"),
    ),
    ids=("x", "residual", "shape", "dtype", "raises"),
)
def test_what_a_plan_cannot_use_is_said(monkeypatch, spoil, why):
    (said,) = outcome_of(monkeypatch, after(spoil)).values()
    assert re.search(why, said), said


def test_images_lie_in_an_order_without_a_period():
    assert cases.order_of(8).tolist() == [0, 1, 1, 0, 1, 0, 0, 1] and cases.order_of(0).tolist() == []
    order = cases.order_of(256)
    assert not any(torch.equal(order[period:], order[:-period]) for period in range(1, 128))
    operands = cases.random_operands(ONE, "cpu")
    case = cases.compared_case(ONE, operands)
    assert case.problem == ONE._replace(N=2)
    for name in ("x", "residual"):
        two, all_images = getattr(case.operands, name), getattr(operands, name)
        assert not torch.equal(two[0], two[1])
        assert all(torch.equal(image, two[k]) for image, k in zip(all_images, cases.order_of(5)))
