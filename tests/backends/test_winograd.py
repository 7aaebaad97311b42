"""The CPU's Winograd convolution: right on awkward sizes, on every number of threads, in plans. On each instruction
set: processors/test_instruction_sets.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import backends, choosing, models
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.kernels import compiled
from fused_resnet.machine import onednn
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from tests.support import networks

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

RECORD = backends.known("conv_bn_act")["winograd"]


def problem_of(N=1, C=16, H=8, W=8, K=16, *, R=3, stride=1, padding=1, groups=1, activation="relu", **changes):
    x, weight = torch.empty(N, C, H, W), torch.empty(K, C // groups, R, R)
    problem = conv_problem(
        ConvOperands(x, weight), (stride, stride), (padding, padding), (1, 1), groups, activation
    )  # fmt: skip
    return problem._replace(**changes)


def draw(N, C, H, W, K):
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(K, C, 3, 3) / (9 * C) ** 0.5, torch.randn(K)


def call(x, weight, bias, residual=None, padding=1, activation="relu", into_residual=False):
    p = (padding, padding)
    problem = conv_problem(ConvOperands(x, weight, bias=bias, residual=residual), (1, 1), p, (1, 1), 1, activation)
    packed = RECORD.plan.pack(problem, weight, None)
    return RECORD.plan.bind(problem, packed, bias, into_residual=into_residual)(x, residual)


def error(actual, x, weight, bias, residual=None, padding=1):
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    expected = torch.relu(expected if residual is None else expected + residual.double())
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("N, C, H, W, K, padding", [
    (1, 64, 56, 56, 64, 1), (2, 128, 28, 28, 128, 1), (1, 256, 14, 14, 256, 1), (3, 512, 7, 7, 512, 1),  # ResNets'
    (1, 16, 1, 1, 16, 1), (2, 48, 5, 3, 80, 0), (1, 16, 4, 30, 176, 5),
])  # fmt: skip
def test_as_exact_as_a_sum_in_fp32_can_be(N, C, H, W, K, padding):
    """F(4x4, 3x3) amplifies rounding several times: to a few 1e-6 of the largest output, with normal data."""
    x, weight, bias = draw(N, C, H, W, K)
    residual = torch.randn_like(F.conv2d(x, weight, padding=padding)).contiguous(memory_format=torch.channels_last)
    assert error(call(x, weight, bias, padding=padding), x, weight, bias, padding=padding) < 5e-6
    actual = call(x, weight, bias, residual, padding)
    assert error(actual, x, weight, bias, residual, padding) < 5e-6
    kept = residual.clone()
    assert torch.equal(call(x, weight, bias, residual, padding, into_residual=True), actual)
    assert torch.equal(residual, actual) and not torch.equal(residual, kept)


@pytest.mark.parametrize("shape", [(1, 64, 23, 17, 96), (3, 32, 7, 7, 32), (1, 16, 4, 4, 208)])
def test_threads_change_no_bit(shape):
    before, arguments = torch.get_num_threads(), draw(*shape)
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(call(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_activations():
    x, weight, bias = draw(1, 16, 9, 9, 16)
    plain = call(x * 9, weight, bias, activation="none")
    assert plain.min() < 0 and plain.max() > 6
    assert torch.equal(call(x * 9, weight, bias), torch.relu(plain))
    assert torch.equal(call(x * 9, weight, bias, activation="relu6"), plain.clamp(0, 6))


def test_nan_stays_in_its_tile_and_survives_relu():
    x, weight, bias = draw(2, 16, 16, 16, 16)
    right = call(x, weight, bias)
    x[0, 3, 5, 5] = torch.nan
    y = call(x, weight, bias)
    assert y[0, :, 4:7, 4:7].isnan().all() and torch.equal(y[1], right[1])
    assert torch.equal(y[0, :, 8:, 8:], right[0, :, 8:, 8:]) and torch.equal(y[0, :, :4, 8:], right[0, :, :4, 8:])


@pytest.mark.parametrize("change, sentence", [
    (dict(dtype=torch.float16), "float16 is not supported"),
    (dict(device="cuda"), "it runs on the CPU"),
    (dict(has_bn=True), "folded BN"),
    (dict(R=1, padding=0), "3x3 convolutions with stride 1"),
    (dict(stride=2), "3x3 convolutions with stride 1"),
    (dict(groups=2), "one group"),
    (dict(C=20), "multiples of 16, there are 20 and 16"),
])  # fmt: skip
def test_what_it_cannot_run_it_says(change, sentence):
    assert RECORD.why_not(problem_of()) is None
    assert sentence in RECORD.why_not(problem_of(**change))


def test_auto_takes_it_in_plans_where_it_pays(monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: False)
    chosen = lambda p, **where: choosing.fixed_order(p, **where).backend.name  # noqa: E731
    assert chosen(problem_of(H=56, W=56), in_plan=True) == "winograd"
    assert chosen(problem_of(H=56, W=56)) != "winograd"  # the weight would be packed at every call
    assert chosen(problem_of(H=4, W=8), in_plan=True) != "winograd"  # two tiles
    assert chosen(problem_of(H=1, W=56), in_plan=True) != "winograd"  # a quarter of each tile
    late = problem_of(C=512, K=512, H=7, W=7)
    assert chosen(late._replace(N=8), in_plan=True) == "winograd"
    assert chosen(late, in_plan=True) != "winograd"  # 38 MB of weights for four tiles
    half = problem_of(C=256, K=256, H=28, W=28)._replace(dtype=torch.bfloat16)
    assert chosen(half, in_plan=True) == "winograd"
    assert chosen(half._replace(H=17, W=17), in_plan=True) != "winograd"  # a quarter of the tiles lies outside
    assert chosen(half._replace(C=192, K=192, H=17, W=17), in_plan=True) == "winograd"
    monkeypatch.setattr(onednn, "has_amx", lambda: True)  # whose bf16 is faster
    assert chosen(half, in_plan=True) != "winograd"
    assert chosen(half._replace(dtype=torch.float32), in_plan=True) == "winograd"


def test_plans_use_it_and_sum_in_place():
    model, x = models.create("resnet18").eval(), torch.randn(2, 3, 64, 64)
    frozen = fused_resnet.freeze(model, x)
    convs = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]
    ours = [conv for conv in convs if conv.backend.name == "winograd"]
    assert len(ours) == 7  # the 3x3 of stride 1 in layers 1 and 2; the later maps are too few tiles
    assert {conv.in_place for conv in ours if conv.problem.has_residual} == {True}
    exact = networks.in_fp64(model, x)
    with torch.no_grad():
        assert networks.error(frozen(x), exact) < 10 * networks.error(model(x), exact) + 1e-5


def test_the_operator_refuses_what_would_leave_its_memory():
    x, weight, bias = draw(1, 16, 8, 8, 32)
    packed = RECORD.plan.pack(problem_of(K=32), weight, None)
    out = torch.empty(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    good = dict(x=x, weight=packed, bias=bias, residual=None, padding=(1, 1), activation="relu", out=out)
    run = torch.ops.fused_resnet.cpu_winograd
    run(*good.values())
    for change, sentence in (
        (dict(weight=packed[:35].contiguous()), "packed as"),
        (dict(weight=packed.double()), "must be float32"),
        (dict(x=draw(1, 32, 8, 8, 1)[0]), "packed as"),
        (dict(x=x.contiguous()), "channels_last"),
        (dict(padding=(0, 1)), r"out must have the shape \(1, 32, 6, 8\), not \(1, 32, 8, 8\)"),
        (dict(padding=(-1, 1)), "at least 0"),
        (dict(padding=(2**63 - 1, 1)), "below 2\\^31"),
        (dict(padding=(1,)), "padding must have 2 values"),
        (dict(x=out, weight=RECORD.plan.pack(problem_of(C=32, K=32), draw(1, 32, 8, 8, 32)[1], None)), "must not be x"),
        (dict(bias=bias[:31]), "one value for each of 32 output channels"),
        (dict(residual=x), "residual must have"),
        (dict(out=out.bfloat16()), "one dtype"),
        (dict(x=x.half(), out=out.half()), "float32 or bfloat16"),
        (dict(activation="gelu"), "unknown activation gelu"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(*(good | change).values())


def test_pruned_and_odd_networks_still_freeze():
    model = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 32, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(1, 3, 12, 12)
    assert networks.error(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x)) < 1e-5
