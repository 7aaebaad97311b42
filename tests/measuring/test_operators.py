"""Operators as subjects: every variant is checked before it is timed."""

import math

import torch

from fused_resnet import backends, measuring, models
from fused_resnet.choosing import planned
from fused_resnet.operators.problem import AddReluProblem, ConvProblem

SMALL = ConvProblem(4, 8, 6, 5, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, "relu", False, True, True, torch.float32, "cpu")


def test_op_variants_are_right_and_say_why_others_are_missing():
    found, skipped = measuring.op_variants(SMALL, measuring.random_operands(SMALL, "cpu"))
    assert {measuring.UNFUSED, measuring.FOLDED, "onednn"} <= set(found)
    assert "NVIDIA" in skipped["cudnn"]
    for name, prepared in found.items():
        assert 0 < measuring.error_ratio(prepared) <= 1, name


def measured(problem=SMALL):
    """One row of `bench ops`."""
    subject = measuring.OperatorSubject(problem, {"a model": 2}, "cpu")
    return {"problem": subject.name, **subject.measured(0.01, rounds=1)}


def with_bound(monkeypatch, change):
    """A plan's calls, changed by change(output); the baselines by ATen are not made for a plan."""
    bound = planned.bound

    def changed(*arguments, **options):
        call = bound(*arguments, **options)
        return lambda x, residual=None: change(call(x, residual))

    monkeypatch.setattr(planned, "bound", changed)


def test_a_wrong_kernel_is_found_and_not_timed(monkeypatch):
    def wrong_in_the_last_image(out):
        out = out.clone()
        out[-1, -1, -1, -1] += 0.01
        return out

    with_bound(monkeypatch, wrong_in_the_last_image)
    assert backends.known("conv_bn_act")["onednn"].why_not(SMALL) is None
    row = measured()
    wrong = {entry["variant"]: entry for entry in measuring.mismatches([row])}
    assert wrong["onednn"]["error_ratio"] > 1 and wrong["onednn"]["raised"] is None
    assert "onednn" not in row["variants"] and measuring.FOLDED in row["variants"]


def test_a_kernel_that_raises_costs_the_others_nothing(monkeypatch):
    def broken(out):
        raise RuntimeError("illegal address\nmore")

    with_bound(monkeypatch, broken)
    row = measured()
    wrong = {entry["variant"]: entry for entry in measuring.mismatches([row])}
    assert wrong["onednn"] == {
        "problem": str(SMALL), "variant": "onednn", "error_ratio": None, "raised": "RuntimeError: illegal address",
    }  # fmt: skip
    assert "onednn" not in row["variants"] and measuring.FOLDED in row["variants"]


def test_an_addition_has_one_right_answer(monkeypatch):
    problem = AddReluProblem((3, 5, 7, 2), True, torch.bfloat16, "cpu")
    found, _ = measuring.add_relu_variants(problem, "cpu")
    assert {measuring.UNFUSED, measuring.FOLDED, measuring.COPY, "cpu"} <= set(found)
    assert all(measuring.error_ratio(one) == 0 for one in found.values())
    right = found["cpu"].run()
    wrong = right.clone()
    wrong[-1, -1, -1, -1] = right.max() * (1 + 2**-7)  # the next number up
    assert measuring.error_ratio(found["cpu"]._replace(run=lambda: wrong)) == math.inf


def test_a_kernel_that_writes_nan_counts_as_infinitely_wrong(monkeypatch):
    found, _ = measuring.op_variants(SMALL, measuring.random_operands(SMALL, "cpu"))
    broken = found["onednn"]._replace(run=lambda: torch.full(SMALL.output_shape, math.nan))
    assert measuring.error_ratio(broken) == math.inf


def test_models_keep_their_convolution_counts():
    """23 convolution shapes in ResNet-50, four of them with two epilogues. In the four first blocks the projection
    carries both biases, the sum and ReLU, and the last 1x1 none of them."""
    problems = measuring.convs_of(models.create("resnet50"), (3, 224, 224), 256, torch.float16, "cuda:0")
    assert (len(problems), sum(count for _, count in problems)) == (27, 53)
    plain = dict(has_bias=True, has_residual=False, activation="none")
    assert len({problem._replace(**plain) for problem, _ in problems}) == 23
    first = problems[0].problem
    assert (first.N, first.dtype, first.device, first.output_shape) == (256, torch.float16, "cuda", (256, 64, 112, 112))
