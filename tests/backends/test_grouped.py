"""The CPU's grouped convolution: right on awkward sizes, on every number of threads, in plans. On each instruction
set: processors/test_instruction_sets.py."""

import pytest
import torch

import fused_resnet
from fused_resnet import backends, choosing, models, testing
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.kernels import compiled
from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from tests.support import networks

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

RECORD = backends.known("conv_bn_act")["grouped"]


def problem_of(C=32, H=8, W=8, *, groups=8, K=None, R=3, stride=1, activation="relu", **changes):
    x, weight = torch.empty(1, C, H, W), torch.empty(K or C, C // groups, R, R)
    problem = conv_problem(ConvOperands(x, weight), (stride, stride), (1, 1), (1, 1), groups, activation)
    return problem._replace(**changes)


def draw(N, C, H, W, width, dtype=torch.float32):
    """x, weight and bias of C/width groups."""
    x = torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, (torch.randn(C, width, 3, 3) / (9 * width) ** 0.5).to(dtype), torch.randn(C).to(dtype)


def case_of(x, weight, bias, residual=None, stride=(1, 1), padding=(1, 1), activation="relu"):
    operands = ConvOperands(x, weight, bias=bias, residual=residual)
    groups = x.shape[1] // weight.shape[1]
    return testing.Case(conv_problem(operands, stride, padding, (1, 1), groups, activation), operands)


def call(case, into_residual=False):
    o = case.operands
    packed = RECORD.plan.pack(case.problem, o.weight, None)
    return RECORD.plan.bind(case.problem, packed, o.bias, into_residual=into_residual)(o.x, o.residual)


SHAPES = [
    (1, 128, 56, 56, 4, (1, 1), (1, 1)), (1, 256, 28, 28, 8, (2, 2), (1, 1)), (2, 512, 14, 14, 16, (2, 2), (1, 1)),
    (1, 128, 7, 7, 32, (1, 1), (1, 1)),  # ResNeXt's
    (1, 104, 9, 13, 8, (2, 2), (1, 1)), (3, 12, 5, 7, 4, (1, 1), (1, 1)), (2, 20, 4, 4, 4, (1, 2), (0, 2)),  # ragged
    (1, 32, 1, 23, 16, (1, 1), (1, 1)), (2, 16, 1, 1, 8, (2, 1), (1, 3)), (1, 96, 3, 31, 48, (2, 2), (0, 0)),
    (1, 16, 2, 2, 4, (1, 1), (5, 9)), (1, 32, 40, 1, 4, (2, 1), (2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, C, H, W, width, stride, padding", SHAPES)
def test_every_element_is_as_exact_as_its_sum(N, C, H, W, width, stride, padding, dtype):
    case = case_of(*draw(N, C, H, W, width, dtype), stride=stride, padding=padding, activation="none")
    outcome = testing.check(case, "grouped")
    assert outcome.status == "ok", outcome.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 9, 9, 4), (1, 40, 5, 6, 8), (1, 64, 7, 7, 32)])
def test_the_sum_may_replace_the_residual(shape, dtype):
    x, weight, bias = draw(*shape, dtype)
    residual = torch.randn(x.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    case = case_of(x, weight, bias, residual.clone(memory_format=torch.preserve_format))
    expected = call(case)
    assert testing.check(case, "grouped").status == "ok"
    y = call(case, into_residual=True)
    assert y.data_ptr() == case.operands.residual.data_ptr() and torch.equal(y, expected)
    assert not torch.equal(y, residual)


@pytest.mark.parametrize("shape", [(1, 64, 23, 17, 4), (3, 48, 7, 7, 8), (2, 64, 4, 40, 32)])
def test_threads_change_no_bit(shape):
    before, case = torch.get_num_threads(), case_of(*draw(*shape), stride=(2, 1))
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(call(case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert ((results[0].double() - case.expected).abs() <= reference.error_bound(case.problem, case.operands)).all()


def test_activations():
    x, weight, bias = draw(1, 16, 9, 9, 4)
    plain = call(case_of(x * 9, weight, bias, activation="none"))
    assert plain.min() < 0 and plain.max() > 6
    assert torch.equal(call(case_of(x * 9, weight, bias)), torch.relu(plain))
    assert torch.equal(call(case_of(x * 9, weight, bias, activation="relu6")), plain.clamp(0, 6))


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group_and_windows(width, value):
    x, weight, bias = draw(2, 32, 12, 12, width)
    right = call(case_of(x, weight, bias, activation="none"))
    x[0, 3, 5, 5] = value
    y = call(case_of(x, weight, bias, activation="none"))
    reached = torch.zeros(2, 32, 12, 12, dtype=torch.bool)
    reached[0, :width, 4:7, 4:7] = True
    assert torch.equal(~y.isfinite(), reached)
    assert torch.equal(y[~reached], right[~reached])
    y = call(case_of(x, weight, bias))
    assert torch.equal(y.isnan(), reached & torch.tensor(value).isnan())


@pytest.mark.parametrize("change, sentence", [
    (dict(dtype=torch.float16), "float16 is not supported"),
    (dict(device="cuda"), "it runs on the CPU"),
    (dict(has_bn=True), "folded BN"),
    (dict(R=1), "3x3 convolutions with stride 1 or 2"),
    (dict(stride=3), "3x3 convolutions with stride 1 or 2"),
    (dict(dilation=(2, 1)), "dilation 1"),
    (dict(groups=1), "there are 32 inputs and 32 outputs in 1"),
    (dict(groups=16), "there are 2 inputs and 2 outputs in 16"),
    (dict(C=48, groups=2), "there are 24 inputs and 24 outputs in 2"),
    (dict(K=64), "there are 4 inputs and 8 outputs in 8"),
])  # fmt: skip
def test_what_it_cannot_run_it_says(change, sentence):
    assert RECORD.why_not(problem_of()) is None
    assert sentence in RECORD.why_not(problem_of(**change))


def test_auto_takes_it_in_plans_where_it_pays():
    chosen = lambda p, **where: choosing.fixed_order(p, **where).backend.name  # noqa: E731
    assert chosen(problem_of(), in_plan=True) == "grouped"
    assert chosen(problem_of()) != "grouped"  # the weight would be packed at every call
    wide = problem_of(C=256, groups=16)
    assert chosen(wide, in_plan=True) != "grouped"
    assert chosen(wide._replace(stride=(2, 2)), in_plan=True) == "grouped"
    assert chosen(wide._replace(stride=(2, 2), dtype=torch.bfloat16), in_plan=True) != "grouped"


def test_a_frozen_resnext_takes_it():
    model, x = models.create("resnext50_32x4d").eval(), torch.randn(1, 3, 64, 64)
    frozen = fused_resnet.freeze(model, x)
    convs = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]
    grouped = [conv for conv in convs if conv.problem.groups > 1]
    assert len(grouped) == 16
    # layers 1 and 2, and the first of layer 3: wider groups are left to oneDNN
    assert sum(conv.backend.name == "grouped" for conv in grouped) == 3 + 4 + 1
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-5


def test_the_operator_refuses_what_would_leave_its_memory():
    x, weight, bias = draw(1, 32, 8, 8, 4)
    packed = RECORD.plan.pack(problem_of(), weight, None)
    out = torch.empty(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    good = dict(
        x=x, weight=packed, bias=bias, residual=None, stride=(2, 2), padding=(1, 1), activation="relu", out=out
    )  # fmt: skip
    run = torch.ops.fused_resnet.cpu_grouped_conv
    run(*good.values())
    for change, sentence in (
        (dict(weight=packed[:1]), "packed as"),
        (dict(weight=packed[:, :, :3].contiguous()), "4 or 8 channels"),
        (dict(weight=packed.double()), "must be float32"),
        (dict(x=draw(1, 28, 8, 8, 4)[0]), r"out must have the shape \(1, 28, 4, 4\), not \(1, 32, 4, 4\)"),
        (dict(x=draw(1, 30, 8, 8, 2)[0]), "whole groups"),
        (dict(x=x.contiguous()), "channels_last"),
        (dict(stride=(1, 1), out=x), "must not be x"),
        (dict(stride=(2,)), "stride must have 2 values, not 1"),
        (dict(stride=(1, 2)), r"the shape \(1, 32, 8, 4\), not"),
        (dict(stride=(3, 2)), "1 or 2"),
        (dict(padding=(0, 1)), r"the shape \(1, 32, 3, 4\), not"),
        (dict(padding=(-1, 1)), "at least 0"),
        (dict(padding=(2**63 - 1, 1)), "below 2\\^31"),
        (dict(padding=(1,)), "padding must have 2 values"),
        (dict(x=x[:, :, :, :1].contiguous(memory_format=torch.channels_last), padding=(1, 0)), "would be empty"),
        (dict(bias=bias[:31]), "one value for each of 32 output channels"),
        (dict(residual=x), "residual must have"),
        (dict(out=out.bfloat16()), "one dtype"),
        (dict(x=x.half(), out=out.half()), "float32 or bfloat16"),
        (dict(activation="gelu"), "unknown activation gelu"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(*(good | change).values())
