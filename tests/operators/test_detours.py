"""Convolutions that libraries compute wrongly: right through every path of ours, on this machine as on others."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused_resnet
from fused_resnet import backends, functional, testing
from fused_resnet.machine import onednn
from fused_resnet.operators import detours, reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import FLOAT_DTYPES

# (N, C, H, W, K, R, S, stride, padding, dilation, groups) that oneDNN 3.12 computes wrongly in bf16: the first ones on
# AMX alone, then with AVX-512's bf16 instructions too
SHAPES = {
    "one column": (2, 64, 18, 2, 24, 3, 3, (1, 2), (1, 1), (1, 1), 1),
    "one column, grouped": (2, 64, 9, 3, 64, 3, 2, (1, 2), (0, 0), (1, 1), 4),
    "rows passed by": (2, 24, 70, 3, 48, 1, 3, (2, 1), (0, 3), (1, 3), 1),
    "rows passed by, dilated": (2, 24, 66, 29, 48, 2, 2, (5, 1), (2, 1), (3, 1), 1),
    "columns as channels": (2, 8, 9, 27, 16, 3, 8, (1, 2), (1, 2), (1, 1), 1),
    "columns as channels, grouped": (2, 24, 6, 19, 32, 2, 8, (1, 1), (0, 1), (1, 1), 2),
    "rows as channels": (2, 4, 21, 5, 16, 16, 1, (1, 1), (0, 0), (1, 1), 1),
    "parts of the columns as channels": (2, 16, 12, 12, 32, 3, 4, (1, 4), (0, 0), (1, 1), 1),
    "one column as wide as the filter": (2, 16, 18, 4, 32, 3, 4, (1, 4), (2, 0), (1, 1), 1),
    "a single tap, dilated": (3, 8, 4, 3, 24, 1, 1, (1, 2), (1, 1), (1, 2), 1),
    "one column, one channel a group": (2, 4, 18, 3, 96, 2, 3, (1, 5), (0, 0), (1, 1), 4),
}
WEIGHT_GRADIENT_SHAPES = {
    "a tap that meets padding alone": (2, 24, 12, 2, 16, 3, 4, (1, 3), (1, 3), (1, 1), 1),
    "an outer tap that meets padding alone": (2, 48, 15, 2, 96, 4, 7, (3, 6), (2, 3), (1, 1), 1),
    "dilated rows": (2, 24, 19, 32, 32, 3, 3, (1, 1), (2, 1), (2, 1), 1),
    "dilated rows of groups": (2, 8, 10, 33, 16, 3, 1, (1, 1), (0, 0), (2, 2), 2),
}
on_wrong_shapes = pytest.mark.parametrize("shape", SHAPES)


def case_of(shape, dtype=torch.bfloat16, activation="none", residual=False):
    N, C, H, W, K, R, S, *window = {**SHAPES, **WEIGHT_GRADIENT_SHAPES}[shape]
    x = torch.randn(N, C, H, W).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(K, C // window[3], R, S) / (C // window[3] * R * S) ** 0.5
    operands = ConvOperands(x, weight.to(dtype), bias=torch.randn(K).to(dtype))
    if residual:
        out = conv_problem(operands, *window, activation).output_shape
        operands = operands._replace(residual=torch.randn(out).to(dtype, memory_format=torch.channels_last))
    return testing.Case(conv_problem(operands, *window, activation), operands)


def check_within(actual, case):
    """By the bound of a computation that rounds between its steps."""
    bound = reference.error_bound(case.problem, case.operands, expected=case.expected, stored=case.problem.dtype)
    assert ((actual.double() - case.expected).abs() <= bound).all()


# ------------------------------------------------------------------------------------------------------------- values


@on_wrong_shapes
@pytest.mark.parametrize("backend", backends.known("conv_bn_act"))
@pytest.mark.parametrize("activation, residual", (("none", False), ("relu", True)))
def test_every_backend_is_right(shape, backend, activation, residual):
    outcome = testing.check(case_of(shape, activation=activation, residual=residual), backend)
    if outcome.status == "cannot run":
        pytest.skip(f"{backend}: {outcome.detail}")
    assert outcome.status == "ok", outcome.detail


@on_wrong_shapes
def test_the_composite_is_right(shape):
    case = case_of(shape)
    p, o = case.problem, case.operands
    options = dict(stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.groups, activation="none")
    out = torch.func.vmap(lambda x: functional.conv_bn_act(x, o.weight, bias=o.bias, **options))(o.x[None])[0]
    check_within(out, case)


@on_wrong_shapes
@pytest.mark.parametrize("backend", ("auto", "onednn", "eager"))
def test_frozen_is_right(shape, backend):
    if backend == "onednn" and backends.onednn_missing(torch.bfloat16) is not None:
        pytest.skip(backends.onednn_missing(torch.bfloat16))
    case = case_of(shape)
    frozen = fused_resnet.freeze(module_of(case).eval(), case.operands.x, backend=backend)
    check_within(frozen(case.operands.x), case)


@on_wrong_shapes
def test_fused_is_right(shape):
    case = case_of(shape, activation="relu")
    fused = fused_resnet.fuse(nn.Sequential(module_of(case), nn.ReLU()).eval(), strict=True)
    with torch.no_grad():
        check_within(fused(case.operands.x), case)


class _Left(nn.Module):
    """Convolutions to one column that a plan does not lower: one of each kind, summed."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(4, 96, (2, 5), padding="same", groups=4)
        self.circular = nn.Conv2d(4, 96, (2, 3), stride=(1, 5), padding_mode="circular", groups=4)
        self.line = nn.Conv1d(4, 96, 3, stride=5, groups=4)
        self.volume = nn.Conv3d(4, 96, (1, 2, 3), stride=(1, 1, 5), groups=4)

    def forward(self, x):
        asked = F.conv2d(input=x, weight=self.circular.weight, stride=(1, 5), groups=4)
        values = self.circular(x), asked, self.line(x[:, :, 0])[:, :, None], self.volume(x[:, :, None])[:, :, 0]
        return sum(values) + self.same(x).mean((2, 3), keepdim=True)


def test_what_a_plan_does_not_lower_is_right():
    model, x = _Left().eval(), torch.randn(2, 4, 18, 3)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    x = x.bfloat16().float()
    frozen = fused_resnet.freeze(model, x, dtype=torch.bfloat16)
    wide = [node.name for node in frozen.plan(x).graph.nodes if str(node.target).startswith("wide_")]
    assert len(wide) == 3 and not any("same" in name for name in wide)
    with torch.no_grad():
        expected = model.double()(x.double())
    # five results and their sums, each rounded once
    torch.testing.assert_close(frozen(x).double(), expected, rtol=2**-6, atol=2**-6)
    assert "oneDNN is wrong there in 16 bits" in str(fused_resnet.explain(frozen, x))


@pytest.mark.parametrize("call", (
    lambda x, w: torch.ops.aten.conv2d.default(x, w, None, [1, 5], [0, 0], [1, 1], 4),
    lambda x, w: torch.ops.aten.conv2d.padding(x, w, None, [1, 5], "valid", [1, 1], 4),
    lambda x, w: torch.ops.aten.convolution.default(x, w, None, [1, 5], [0, 0], [1, 1], False, [0, 0], 4),
    lambda x, w: torch.convolution(x, w, None, (1, 5), (0, 0), (1, 1), False, (0, 0), 4),
    lambda x, w: F.conv2d(x, w, None, (1, 5), groups=4),
))  # fmt: skip
@pytest.mark.parametrize("is_computed", (False, True))
def test_convolutions_that_are_called_as_functions_are_right(call, is_computed):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 1, 2, 3).bfloat16().float())

        def forward(self, x):
            return call(x, self.weight + 0 * x.mean() if is_computed else self.weight)

    model, x = Calls().eval(), torch.randn(2, 4, 18, 3).bfloat16().float()
    expected = F.conv2d(x.double(), model.weight.double(), None, (1, 5), groups=4)
    frozen = fused_resnet.freeze(model, x, dtype=torch.bfloat16)
    is_widened = any(str(node.target).startswith("wide_") for node in frozen.plan(x).graph.nodes)
    assert is_widened == (is_computed or "valid" in str(call.__code__.co_consts))
    torch.testing.assert_close(frozen(x).double(), expected, rtol=2**-7, atol=2**-7)


def test_transposed_convolutions_stay_as_they_are():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 2, 3))

        def forward(self, x):
            return torch.convolution(x, self.weight, None, (1, 5), (0, 0), (1, 1), True, (0, 0), 1)

    x = torch.randn(2, 4, 5, 1)
    plan = fused_resnet.freeze(Transposed().eval(), x, dtype=torch.bfloat16).plan(x)
    assert not [node for node in plan.graph.nodes if str(node.target).startswith("wide_")]


def module_of(case):
    p, o = case.problem, case.operands
    window = dict(stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.groups)
    conv = nn.Conv2d(p.C, p.K, (p.R, p.S), **window, dtype=p.dtype)
    conv.load_state_dict({"weight": o.weight, "bias": o.bias})
    return conv


@pytest.mark.parametrize("shape", (*SHAPES, *WEIGHT_GRADIENT_SHAPES))
@pytest.mark.parametrize("backend", ("auto", "eager"))
def test_gradients_are_right(shape, backend):
    """Against those of fp64, in the bounds of sums of bf16 products. oneDNN sums in fp32 and rounds the result once.

    Without it ATen also rounds each tap's share of x's gradient, each image's of the weight's, and their sums.
    """
    case = case_of(shape)
    p, o = case.problem, case.operands
    grad = torch.randn(p.output_shape).bfloat16()
    window = dict(stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.groups)
    x, weight = o.x.requires_grad_(), o.weight.requires_grad_()
    functional.conv_bn_act(x, weight, **window, activation="none", backend=backend).backward(grad)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    F.conv2d(exact_x, exact_weight, **window).backward(grad.double())
    magnitude = torch.ops.aten.convolution_backward(
        grad.double().abs(), exact_x.detach().abs(), exact_weight.detach().abs(), None, p.stride, p.padding,
        p.dilation, False, [0, 0], p.groups, [True, True, False],
    )  # fmt: skip
    is_onednn = backends.onednn_missing(torch.bfloat16) is None
    for got, exact, sums, shares in zip(
        (x.grad, weight.grad), (exact_x.grad, exact_weight.grad), magnitude, (p.R * p.S, p.N)
    ):
        terms = p.N * p.P * p.Q + p.K * p.R * p.S
        rounded = exact.abs() if is_onednn else shares * sums
        assert ((got.double() - exact).abs() <= 2.0**-8 * rounded + terms * 2.0**-24 * sums).all()


@pytest.mark.parametrize("shape", (*SHAPES, *WEIGHT_GRADIENT_SHAPES))
@pytest.mark.parametrize("mapped", (False, True))
def test_gradients_by_transforms_are_right(shape, mapped):
    """torch.func differentiates the composite, whose gradients are ATen's."""
    case = case_of(shape)
    p, o = case.problem, case.operands
    window = dict(stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.groups)

    def gradients(conv, x, weight):
        return torch.func.grad(lambda x, weight: conv(x, weight).sum(), (0, 1))(x, weight)

    def ours(x, weight):
        return functional.conv_bn_act(x, weight, **window, activation="none")

    if mapped:
        per_sample = torch.func.vmap(lambda x: gradients(ours, x, o.weight))(o.x[None])
        got = [gradient[0] for gradient in per_sample]
    else:
        got = gradients(ours, o.x, o.weight)
    exact = gradients(lambda x, weight: F.conv2d(x, weight, **window), o.x.double(), o.weight.double())
    # each tap's share of x's gradient is rounded to bf16, and the sum of them; the weight's once
    for ours_, right in zip(got, exact):
        torch.testing.assert_close(ours_.double(), right, rtol=2**-6, atol=2**-6 * right.abs().max().item())


@pytest.mark.parametrize("kind, shape", (("weight", "dilated rows"), ("x", "one column")))
def test_second_derivatives_are_right(kind, shape):
    case = case_of(shape)
    p, o = case.problem, case.operands
    window = dict(stride=p.stride, padding=p.padding, dilation=p.dilation, groups=p.groups)
    grad = torch.randn(p.output_shape)

    def derived(conv, dtype):
        x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (o.x, o.weight))
        out = conv(x, weight) * grad.to(dtype)
        first = torch.autograd.grad(out.sum(), {"weight": weight, "x": x}[kind], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), {"weight": x, "x": weight}[kind])[0]

    got = derived(lambda x, w: functional.conv_bn_act(x, w, **window, activation="none"), torch.bfloat16)
    exact = derived(lambda x, w: F.conv2d(x, w, **window), torch.float64)
    # three roundings to bf16 on the way, of terms of random sign
    torch.testing.assert_close(got.double(), exact, rtol=2**-5, atol=2**-5 * exact.square().mean().sqrt().item())


# ------------------------------------------------------------------------------------------------------------ the rule


def problem_of(shape, **changes):
    return case_of(shape).problem._replace(**changes)


def axes_of(detour):
    return {dim - 2 for dim, _, _ in (() if detour is None else detour.laid)}


@pytest.mark.parametrize("amx", (True, False))
def test_whose_windows_are_laid_side_by_side(amx, monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: amx)
    axes = lambda shape, **changes: axes_of(detours.forward_detour(problem_of(shape, **changes)))  # noqa: E731
    assert axes("one column") == {1} and axes("one column", dtype=torch.float32) == {1}
    assert axes("one column", stride=(1, 1), W=1) == set()
    assert axes("one column", W=4) == set()  # two columns
    assert axes("one column", device="cuda") == set()
    assert axes("rows passed by") == ({0} if amx else set())
    assert axes("rows passed by", dtype=torch.float32) == set()
    assert axes("rows passed by", stride=(1, 1)) == set()
    shortcut = dict(R=1, S=1, stride=(2, 2), dilation=(1, 1))
    assert axes("rows passed by", **shortcut, padding=(0, 0)) == set()
    assert axes("rows passed by", **shortcut, padding=(0, 1)) == ({0} if amx else set())
    assert axes("one column", H=1, W=1, padding=(3, 3), dilation=(4, 4), R=2, S=2, stride=(3, 3)) == {0, 1}


@pytest.mark.parametrize(
    "changes, spare",
    (
        ({}, 24),
        ({"C": 12}, 20),
        ({"C": 16, "groups": 2}, 24),
        ({"dtype": torch.float16}, 24),
        ({"dtype": torch.float32}, 0),
        ({"device": "cuda"}, 0),
        ({"dilation": (1, 2)}, 0),
        ({"S": 4}, 0),  # one block of 32
        ({"S": 7}, 0),
        ({"C": 16}, 0),
        ({"C": 16, "W": 32, "stride": (2, 4), "padding": (1, 0)}, 16),
        ({"C": 16, "W": 32, "stride": (2, 4), "padding": (1, 1)}, 0),
        ({"C": 16, "W": 33, "stride": (2, 4), "padding": (1, 0)}, 0),  # not in whole parts
        ({"C": 4, "R": 16, "S": 1, "H": 21}, 28),  # its rows
        ({"C": 64, "W": 32, "stride": (2, 4), "padding": (1, 0)}, 0),
        ({"W": 8, "stride": (1, 3), "padding": (0, 0), "C": 8}, 24),  # one column, with windows side by side
    ),
)
def test_who_gets_spare_channels_on_amx(changes, spare, monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    detour = detours.forward_detour(problem_of("columns as channels", **changes))
    assert (0 if detour is None else detour.spare_channels) == spare
    assert detour is None or detours.forward_detour(detour.problem) is None
    monkeypatch.setattr(onednn, "has_amx", lambda: False)
    detour = detours.forward_detour(problem_of("columns as channels", **changes))
    assert detour is None or not detour.spare_channels


@pytest.mark.parametrize(
    "changes, axes",
    (
        ({}, {0}),
        ({"dtype": torch.float32}, set()),
        ({"stride": (2, 1)}, set()),
        ({"dilation": (1, 2)}, set()),
        ({"R": 1}, set()),
        ({"W": 1, "padding": (2, 3), "stride": (2, 2)}, {1}),
        ({"device": "cuda"}, set()),
    ),
)
def test_which_weight_gradients_go_another_way(changes, axes):
    assert detours._axes_of_wrong_weight_gradients(problem_of("dilated rows", **changes)) == axes


@pytest.mark.parametrize("amx", (True, False))
def test_the_quick_answers_are_the_rules(amx, monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: amx)
    draw, plain, found = random.Random(0), problem_of("columns as channels"), set()
    for _ in range(2000):
        size = {name: draw.choice((1, 2, 5, 9, 16)) for name in "HWRS"}
        pairs = {name: tuple(draw.choices((1, 1, 2, 4), k=2)) for name in ("stride", "dilation")}
        problem = plain._replace(**size, **pairs, C=draw.choice((2, 8, 30, 32, 64)), dtype=draw.choice(FLOAT_DTYPES))
        problem = problem._replace(padding=tuple(draw.choices((0, 1, 3), k=2)))
        if min(problem.output_shape) > 0:
            expected = detours._detour(problem, detours._wrong_axes(problem))
            assert detours.forward_detour(problem) == expected
            found.add((expected is None, bool(expected and expected.laid), bool(expected and expected.spare_channels)))
    kinds = {(True, False, False), (False, True, False), (False, False, False)}
    assert found >= (kinds | {(False, False, True)} if amx else kinds)


def test_a_tap_that_is_alone_is_not_dilated():
    problem = problem_of("a single tap, dilated")
    assert detours.forward_detour(problem) == detours.Detour((), 0, problem._replace(dilation=(1, 1)))
    wider = problem._replace(S=2)
    assert detours.forward_detour(wider) is None
    assert detours.forward_detour(problem._replace(device="cuda")) is None


@pytest.mark.parametrize(
    "changes, anywhere, on_amx",
    (
        ({}, False, False),
        ({"out": (1, 8, 9, 1), "stride": (1, 2)}, True, True),
        ({"out": (1, 8, 9, 1), "stride": (1, 2), "dtype": torch.float32}, False, False),
        ({"out": (1, 8, 9, 1), "stride": (1, 2), "weight": (8, 64, 3, 1)}, False, False),
        ({"stride": (4, 1)}, False, True),
        ({"stride": (2, 2), "weight": (8, 64, 1, 1)}, False, False),
        ({"weight": (8, 8, 3, 8)}, False, True),
        ({"weight": (8, 8, 3, 3)}, False, False),
        ({"weight": (8, 64, 3, 1), "dilation": (1, 2)}, True, True),
        ({"weight": (8, 64, 3, 3, 3), "out": (1, 8, 9, 9, 1), "stride": (1, 1, 2), "dilation": (1, 1, 1)}, True, True),
        ({"weight": (8, 64, 1, 3, 3), "out": (1, 8, 9, 9, 9), "stride": (2, 1, 1), "dilation": (1, 1, 1)}, False, True),
        ({"weight": (8, 64, 3), "out": (1, 8, 1), "stride": (2,), "dilation": (1,)}, True, True),
    ),
)
def test_what_may_be_wrong_without_a_detour(changes, anywhere, on_amx, monkeypatch):
    plain = dict(dtype=torch.bfloat16, weight=(8, 64, 3, 3), out=(1, 8, 9, 9), stride=(1, 1), dilation=(1, 1))
    for has_amx, expected in ((False, anywhere), (True, on_amx)):
        monkeypatch.setattr(onednn, "has_amx", lambda answer=has_amx: answer)
        assert detours.may_be_wrong(**{**plain, **changes}) is expected


def test_a_tap_is_idle_where_it_meets_padding_alone():
    for size, taps, stride, padding, dilation in itertools.product(
        range(1, 5), range(1, 5), range(1, 4), range(4), (1, 2)
    ):
        outputs = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        if outputs > 0:
            x, grad = torch.ones(1, 1, size), torch.ones(1, 1, outputs)
            window = (None, [stride], [padding], [dilation], False, [0], 1, [False, True, False])
            weight = torch.zeros(1, 1, taps)
            wanted = bool((torch.ops.aten.convolution_backward(grad, x, weight, *window)[1] == 0).any())
            assert detours._has_idle_tap(size, outputs, taps, stride, padding, dilation) == wanted


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), axes=st.sampled_from(((), (0,), (1,), (0, 1))), spare=st.integers(0, 2))
def test_a_detour_is_the_same_convolution(seed, axes, spare):
    """In fp64, where no library is wrong: values, the gradients as the adjoint, and shapes."""
    torch.manual_seed(seed)
    case = testing.case_at(seed, 0, kind="strided")
    p = case.problem
    if p.N == 0 or not p.reads_x or not (axes or spare):
        return
    x, weight = (tensor.nan_to_num(1.0, 1.0, 1.0).double() for tensor in (case.operands.x, case.operands.weight))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(detours, "_spare_channels", lambda problem: spare)
        detour = detours._detour(p, frozenset(axes))
    q = detour.problem
    assert q.output_shape == p.output_shape
    read, filter = detour.input(x), detour.filter(weight)
    assert read.shape == (q.N, q.C, q.H, q.W) and filter.shape == (q.K, q.C // q.groups, q.R, q.S)
    expected = F.conv2d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)
    torch.testing.assert_close(F.conv2d(read, filter, None, q.stride, q.padding, q.dilation, q.groups), expected)
    grads = torch.randn_like(read), torch.randn_like(filter)
    for value, grad, original, returned in zip((read, filter), grads, (x, weight), detour.gradients(*grads)):
        assert returned.shape == original.shape
        torch.testing.assert_close((value * grad).sum(), (original * returned).sum())
    assert detour.input(x.contiguous(memory_format=torch.channels_last)).equal(read)


@pytest.mark.parametrize("spare", (0, 1))
def test_what_goes_another_way_can_be_differentiated(spare, monkeypatch):
    """With every problem sent that way: first and second derivatives, backward and forward."""
    monkeypatch.setattr(detours, "_wrong_axes", lambda problem: frozenset((0, 1)))
    monkeypatch.setattr(detours, "_spare_channels", lambda problem: spare)
    x, weight = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(6, 2, 2, 3, dtype=torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    problem = conv_problem(ConvOperands(x, weight), (2, 1), (1, 0), (1, 2), 2, "none")

    def conv(x, weight):
        return detours.convolution(problem, x, weight)

    assert torch.autograd.gradcheck(conv, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(conv, (x, weight))
    grad = torch.randn(problem.output_shape, dtype=torch.float64, requires_grad=True)

    def backward(grad, x, weight):
        return detours.convolution_backward(problem, grad, x, weight, True, True)

    assert torch.autograd.gradcheck(backward, (grad, x, weight))
    expected = torch.autograd.grad((F.conv2d(x, weight, None, (2, 1), (1, 0), (1, 2), 2) * grad).sum(), (x, weight))
    for got, wanted in zip(backward(grad, x, weight), expected):
        torch.testing.assert_close(got, wanted)
    assert detours.convolution_backward(problem, grad, x, weight, False, True)[0] is None
    assert detours.convolution_backward(problem, grad, x, weight, True, False)[1] is None


@pytest.mark.parametrize("error, seen", ((0.0, False), (1.0, True), (torch.nan, True)))
def test_an_example_is_seen_where_torch_is_wrong(error, seen, monkeypatch):
    conv2d = F.conv2d

    def with_error(x, weight, *window):
        exact = conv2d(x.float(), weight.float(), *window)
        return exact if x.dtype == torch.float32 else (exact + error * exact.mean().sign() * 5).bfloat16()

    monkeypatch.setattr(F, "conv2d", with_error)
    examples = [fault.example for fault in detours.FAULTS if fault.example and fault.example[0] == "forward"]
    assert examples and all(detours._is_seen(*example) is seen for example in examples)
