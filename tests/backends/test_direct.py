"""The CPU's direct convolution: right for any window and on awkward sizes, on every number of threads, in plans.
On each instruction set: processors/test_instruction_sets.py."""

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

RECORD = backends.known("conv_bn_act")["direct"]


def draw(N, C, H, W, K, R, S, dtype=torch.float32):
    x = torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, (torch.randn(K, C, R, S) / (C * R * S) ** 0.5).to(dtype), torch.randn(K).to(dtype)


def case_of(x, weight, bias, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), activation="relu"):
    operands = ConvOperands(x, weight, bias=bias, residual=residual)
    return testing.Case(conv_problem(operands, stride, padding, dilation, 1, activation), operands)


def call(case, into_residual=False):
    o = case.operands
    packed = RECORD.plan.pack(case.problem, o.weight, None)
    return RECORD.plan.bind(case.problem, packed, o.bias, into_residual=into_residual)(o.x, o.residual)


# N, C, H, W, K, R, S, stride, padding, dilation
SHAPES = [
    (1, 3, 32, 30, 64, 7, 7, (2, 2), (3, 3), (1, 1)),  # a stem
    (2, 64, 7, 7, 64, 3, 3, (1, 1), (1, 1), (1, 1)),  # groups of pixels go over rows and images
    (1, 128, 14, 14, 256, 1, 1, (2, 2), (0, 0), (1, 1)),
    (1, 300, 12, 9, 20, 1, 1, (1, 1), (0, 0), (1, 1)),  # two segments of channels, a ragged panel
    (1, 70, 11, 13, 33, 3, 3, (1, 1), (1, 1), (1, 1)),  # three segments of taps, the last shorter
    (2, 517, 5, 6, 17, 3, 2, (1, 1), (1, 0), (1, 1)),  # segments within each tap
    (1, 16, 17, 19, 40, 3, 3, (1, 1), (4, 4), (4, 4)),
    (3, 5, 9, 8, 7, 2, 5, (3, 2), (1, 3), (2, 1)),
    (1, 1, 1, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1)),
    (2, 4, 2, 2, 18, 3, 3, (1, 1), (6, 9), (1, 1)),  # outputs that see padding alone
    (1, 8, 40, 40, 3, 40, 40, (1, 1), (0, 0), (1, 1)),
    (2, 3, 9, 11, 20, 5, 4, (2, 1), (2, 3), (2, 1)),  # rows of the window are taps
    (1, 15, 6, 7, 16, 1, 5, (1, 1), (0, 0), (1, 1)),
    (3, 6, 5, 2, 9, 3, 7, (1, 2), (1, 3), (1, 1)),  # wider than the image
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_as_exact_as_its_sum(shape, dtype):
    *sizes, stride, padding, dilation = shape
    case = case_of(*draw(*sizes, dtype), None, stride, padding, dilation, "none")
    outcome = testing.check(case, "direct")
    assert outcome.status == "ok", outcome.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 9, 9, 64, 3, 3), (1, 40, 5, 6, 21, 3, 3), (2, 300, 7, 7, 32, 1, 1)])
def test_the_sum_may_replace_the_residual(shape, dtype):
    x, weight, bias = draw(*shape, dtype)
    padding = (shape[-1] // 2,) * 2
    residual = torch.randn(shape[0], shape[4], *shape[2:4]).to(dtype).contiguous(memory_format=torch.channels_last)
    case = case_of(x, weight, bias, residual.clone(memory_format=torch.preserve_format), padding=padding)
    expected = call(case)
    assert testing.check(case, "direct").status == "ok"
    y = call(case, into_residual=True)
    assert y.data_ptr() == case.operands.residual.data_ptr() and torch.equal(y, expected)
    assert not torch.equal(y, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 23, 17, 40, 3, 3), (3, 48, 7, 7, 128, 3, 3), (1, 600, 2, 3, 320, 1, 1)])
def test_threads_change_no_bit(shape, dtype):
    before, case = torch.get_num_threads(), case_of(*draw(*shape, dtype), padding=(shape[-1] // 2,) * 2)
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
    x, weight, bias = draw(1, 16, 9, 9, 24, 3, 3)
    plain = call(case_of(x * 9, weight, bias, activation="none"))
    assert plain.min() < 0 and plain.max() > 6
    assert torch.equal(call(case_of(x * 9, weight, bias)), torch.relu(plain))
    assert torch.equal(call(case_of(x * 9, weight, bias, activation="relu6")), plain.clamp(0, 6))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_windows(value):
    x, weight, bias = draw(2, 32, 12, 12, 24, 3, 3)
    right = call(case_of(x, weight, bias, padding=(1, 1), activation="none"))
    x[0, 3, 5, 5] = value
    y = call(case_of(x, weight, bias, padding=(1, 1), activation="none"))
    reached = torch.zeros(2, 24, 12, 12, dtype=torch.bool)
    reached[0, :, 4:7, 4:7] = True
    assert torch.equal(~y.isfinite(), reached)
    assert torch.equal(y[~reached], right[~reached])


@pytest.mark.parametrize("change, sentence", [
    (dict(dtype=torch.float16), "float16 is not supported"),
    (dict(device="cuda"), "it runs on the CPU"),
    (dict(has_bn=True), "folded BN"),
    (dict(groups=2), "convolutions of one group, not of 2"),
])  # fmt: skip
def test_what_it_cannot_run_it_says(change, sentence):
    problem = case_of(*draw(1, 8, 4, 4, 8, 3, 3)).problem
    assert RECORD.why_not(problem) is None
    assert sentence in RECORD.why_not(problem._replace(**change))


def test_auto_takes_it_where_onednn_has_no_such_dtype(monkeypatch):
    """Where it has, a measurement may choose it."""
    chosen = lambda p, **where: choosing.fixed_order(p, **where).backend.name  # noqa: E731
    problem = case_of(*draw(1, 64, 14, 14, 64, 1, 1, torch.bfloat16)).problem
    for missing, expected in ((None, "onednn"), ("this CPU has no bfloat16 instructions", "direct")):
        monkeypatch.setattr("fused_resnet.backends.onednn.onednn_missing", lambda dtype, missing=missing: missing)
        assert chosen(problem, in_plan=True) == expected
        assert chosen(problem) != "direct"  # the weight would be packed at every call
    assert "direct" in {choice.backend.name for choice in choosing.candidates.candidates(problem)[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_frozen_by_name(dtype):
    model, x = networks.randomize(models.resnet50(num_classes=10)), torch.randn(2, 3, 65, 64)
    frozen = fused_resnet.freeze(model, x, dtype=dtype, backend="direct")
    convs = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]
    assert len(convs) == 53 and {conv.backend.name for conv in convs} == {"direct"}
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < (1e-5 if dtype == torch.float32 else 0.03)


def test_the_operator_refuses_what_would_leave_its_memory():
    x, weight, bias = draw(1, 32, 8, 8, 40, 3, 3)
    packed = RECORD.plan.pack(case_of(x, weight, bias).problem, weight, None)
    out = torch.empty(1, 40, 4, 4).contiguous(memory_format=torch.channels_last)
    good = dict(
        x=x, weight=packed, bias=bias, residual=None, stride=(2, 2), padding=(1, 1), dilation=(1, 1),
        activation="relu", out=out,
    )  # fmt: skip
    run = torch.ops.fused_resnet.cpu_direct_conv
    run(*good.values())
    for change, sentence in (
        (dict(weight=packed[:2]), "packed as"),
        (dict(weight=packed[:, :, :, :31].contiguous()), "packed as"),
        (dict(weight=packed.double()), "must be float32"),
        (dict(x=draw(1, 28, 8, 8, 40, 1, 1)[0]), "packed as"),
        (dict(x=x.contiguous()), "channels_last"),
        (dict(out=x), "must not be x, or share memory"),
        (dict(stride=(1, 1)), r"out must have the shape \(1, 40, 8, 8\), not \(1, 40, 4, 4\)"),
        (dict(stride=(2,)), "stride must have 2 values, not 1"),
        (dict(stride=(0, 2)), "at least 1"),
        (dict(stride=(2**31, 2)), "below 2\\^31"),
        (dict(dilation=(1, 0)), "at least 1"),
        (dict(dilation=(1, 2**31)), "below 2\\^31"),
        (dict(dilation=(5, 1)), "would be empty"),
        (dict(padding=(0, 1)), r"the shape \(1, 40, 3, 4\), not"),
        (dict(padding=(-1, 1)), "at least 0"),
        (dict(padding=(2**63 - 1, 1)), "below 2\\^31"),
        (dict(padding=(1,)), "padding must have 2 values"),
        (dict(bias=bias[:31]), "one value for each of 40 output channels"),
        (dict(residual=x), "residual must have"),
        (dict(out=out.bfloat16()), "one dtype"),
        (dict(x=x.half(), out=out.half()), "float32 or bfloat16"),
        (dict(activation="gelu"), "unknown activation gelu"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(*(good | change).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, W", [(0, 5), (4, 0), (0, 0)])
def test_an_image_of_padding_alone(H, W, dtype):
    x, weight, bias = draw(2, 8, H, W, 24, 1, 3, dtype)
    y = call(case_of(x, weight, bias, padding=(1, 2), activation="none"))
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))


def test_an_empty_batch():
    x, weight, bias = draw(0, 8, 5, 5, 24, 3, 3)
    assert call(case_of(x, weight, bias)).shape == (0, 24, 3, 3)
