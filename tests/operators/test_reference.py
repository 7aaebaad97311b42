"""The specification itself: equal to torch.nn in fp64 and to a case by hand, and a bound that means something."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS

VECTORS = ("bn_weight", "bn_bias", "bn_mean", "bn_var")


def problem_of(operands, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, activation="relu"):
    return conv_problem(operands, stride, padding, dilation, groups, activation)


def random_operands(dtype=torch.float32, N=2, C=6, H=7, W=9, K=8, R=3, S=3, groups=1, residual=True):
    P, Q = H + 3 - R, W + 3 - S
    return ConvOperands(
        torch.randn(N, C, H, W),
        torch.randn(K, C // groups, R, S) / (R * S * C / groups) ** 0.5,
        *(torch.randn(K), torch.randn(K), torch.randn(K), torch.rand(K) + 0.5),
        residual=torch.randn(N, K, P, Q) if residual else None,
    ).map(lambda tensor: tensor.to(dtype))


def test_by_hand():
    """One 2x2 filter over a 3x3 map with stride 2 and one border of zeros; every number was worked out on paper."""
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]])
    weight = torch.tensor([[[[1.0, -1.0], [2.0, 0.5]]]])
    # taps at rows and columns (-1, 0) and (1, 2) of the map
    conv = [[0.5 * 1, 2 * 2 + 0.5 * 3], [4 * -1 + 0.5 * 7, 5 - 6 + 2 * 8 + 0.5 * 9]]
    assert conv == [[0.5, 5.5], [-0.5, 19.5]]
    operands = ConvOperands(
        x, weight, *(torch.tensor([v]) for v in (3.0, 0.25, 1.5, 3.0)), eps=1.0, bias=torch.tensor([2.0]),
        residual=torch.tensor([[[[-10.0, 1.0], [0.0, -40.0]]]]),
    )  # fmt: skip
    # scale = 3 / sqrt(3 + 1) = 1.5; shift = (2 - 1.5) * 1.5 + 0.25 = 1
    before = [[1.75 - 10, 9.25 + 1], [0.25, 30.25 - 40]]
    for activation, expected in (
        ("none", before),
        ("relu", [[0, 10.25], [0.25, 0]]),
        ("relu6", [[0, 6], [0.25, 0]]),
        ("silu", [[y * torch.tensor(y).double().sigmoid().item() for y in row] for row in before]),
    ):
        actual = reference.conv_bn_act(problem_of(operands, (2, 2), activation=activation), operands)
        assert actual[0, 0].tolist() == expected
    without = operands._replace(bn_weight=None, bn_bias=None, bn_mean=None, bn_var=None, bias=None, residual=None)
    assert reference.conv_bn_act(problem_of(without, (2, 2), activation="none"), without)[0, 0].tolist() == conv


@pytest.mark.parametrize(
    "stride, padding, dilation, groups", (((1, 1), (1, 1), (1, 1), 1), ((2, 1), (0, 3), (1, 2), 2))
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_torch_modules(stride, padding, dilation, groups, activation):
    conv = nn.Conv2d(6, 8, 3, stride, padding, dilation, groups).double()
    bn = nn.BatchNorm2d(8, eps=1e-3).double().eval()
    for tensor in (*bn.parameters(), bn.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    act = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU()}[activation]
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        y = bn(conv(x))
        residual = torch.randn_like(y) * 3
        expected = act(y + residual)
    operands = ConvOperands(
        x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, conv.bias, residual
    )  # fmt: skip
    actual = reference.conv_bn_act(problem_of(operands, stride, padding, dilation, groups, activation), operands)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("present", [c for n in range(5) for c in itertools.combinations(VECTORS, n)], ids="-".join)
def test_a_missing_vector_drops_out(present):
    """It is the BN with the neutral element for what is missing: bn_weight 1, shifts 0, bn_var 1 - eps."""
    operands = random_operands(torch.float64)
    neutral = {"bn_weight": 1.0, "bn_bias": 0.0, "bn_mean": 0.0, "bn_var": 1.0 - operands.eps}
    missing = {name: None for name in VECTORS if name not in present}
    filled = {name: torch.full((8,), neutral[name], dtype=torch.float64) for name in missing}
    actual = reference.conv_bn_act(problem_of(operands), operands._replace(**missing))
    expected = reference.conv_bn_act(problem_of(operands), operands._replace(**filled))
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_add_relu():
    a, b = torch.tensor([1.0, -3.0, float("nan")]), torch.tensor([-0.5, 1.0, 1.0])
    actual = reference.add_relu(a, b)
    assert actual.dtype == torch.float64
    assert torch.equal(actual[:2], torch.tensor([0.5, 0.0]).double()) and actual[2].isnan()


# ------------------------------------------------------------------------------------------------- the bound is tight


def mistakes(p, o):
    """What kernels get wrong, each as the result it would give."""
    right = reference.conv_bn_act
    for name in ("bn_bias", "bn_mean", "bn_weight", "bn_var"):
        yield f"no {name}", right(p, o._replace(**{name: None}))
    yield "no residual", right(p, o._replace(residual=None))
    yield "no eps", right(p, o._replace(eps=0.0))
    yield "no activation", right(p._replace(activation="none"), o)
    yield "activation before the addition", right(p, o._replace(residual=None)) + o.residual.double()
    swapped = list(range(p.K))
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    yield "last two channels swapped", right(p, o)[:, swapped]
    yield "filter upside down", right(p, o._replace(weight=o.weight.flip(2)))
    yield "filter transposed", right(p, o._replace(weight=o.weight.transpose(2, 3)))
    border = F.pad(o.x, (1, 1, 1, 1), mode="replicate")
    yield "border repeated", right(p._replace(padding=(0, 0), H=p.H + 2, W=p.W + 2), o._replace(x=border))
    last = right(p, o)
    last[-1, -1, -1, -1] = 0
    yield "last element never written", last
    shifted = o._replace(x=torch.roll(o.x, 1, 3))
    yield "one column off", right(p, shifted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("stored", (False, True))
def test_every_mistake_exceeds_the_bound(dtype, stored):
    operands = random_operands(dtype)
    # positive where it is looked at, so that ReLU hides nothing
    operands.residual[-1, -1] = 4
    operands = operands._replace(eps=0.05)  # 1e-5 is below what bf16 can tell from 0, 5e-2 is not
    problem = problem_of(operands)
    right = reference.conv_bn_act(problem, operands)
    bound = reference.error_bound(problem, operands, stored=dtype if stored else None)
    for name, wrong in mistakes(problem, operands):
        assert ((wrong - right).abs() > bound).any(), name


def test_a_missing_default_eps_exceeds_the_bound_where_the_variance_is_small():
    operands = random_operands(torch.float32)._replace(bn_var=torch.full((8,), 1e-4))
    problem = problem_of(operands)
    right = reference.conv_bn_act(problem, operands)
    wrong = reference.conv_bn_act(problem, operands._replace(eps=0.0))
    assert ((wrong - right).abs() > reference.error_bound(problem, operands)).any()


def test_the_bound_is_per_element():
    """A wrong border is seen beside an image a thousand times brighter."""
    operands = random_operands(torch.float32, residual=False)
    operands.x[:, :, :, :5] *= 1000
    problem = problem_of(operands, activation="none")
    bound = reference.error_bound(problem, operands)
    assert bound[..., -1].max() < 1e-2 * bound.max()
    wrong = reference.conv_bn_act(problem, operands)
    wrong[0, 0, -1, -1] += 1e-3
    assert ((wrong - reference.conv_bn_act(problem, operands)).abs() > bound).nonzero().tolist() == [[0, 0, 6, 8]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_an_honest_kernel_is_within_the_bound(dtype):
    """fp32 sums and one final rounding."""
    o = random_operands(dtype)
    problem = problem_of(o)
    y = F.batch_norm(F.conv2d(o.x.float(), o.weight.float(), padding=1), *(
        vector.float() for vector in (o.bn_mean, o.bn_var, o.bn_weight, o.bn_bias)
    ), eps=o.eps)  # fmt: skip
    actual = torch.relu(y + o.residual.float()).to(dtype).double()
    error = (actual - reference.conv_bn_act(problem, o)).abs()
    assert (error <= reference.error_bound(problem, o)).all()


def test_the_bound_of_a_kernel_that_stores_is_wider():
    operands = random_operands(torch.bfloat16)
    problem = problem_of(operands)
    kept = reference.error_bound(problem, operands)
    stored = reference.error_bound(problem, operands, stored=torch.bfloat16)
    assert (stored > kept).all()
    assert reference.error_bound(problem, operands, eps_acc=2.0**-53).lt(kept).all()
