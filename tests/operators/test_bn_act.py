"""bn_act: values and gradients against fp64, statistics, transforms, what is kept and what is refused."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet import backends, choosing, functional
from fused_resnet.kernels import compiled
from fused_resnet.operators import mask, reference
from fused_resnet.operators.describe import bn_act_problem
from fused_resnet.operators.operands import BnActOperands
from fused_resnet.operators.problem import ACTIVATIONS

op = torch.ops.fused_resnet.bn_act
BACKENDS = tuple(backends.known("bn_act"))
# Triton's interpreter takes seconds for what others do at once.
IN_TIERS = [pytest.param(name, marks=pytest.mark.full if name == "triton" else ()) for name in BACKENDS]
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
# channels beside whole vectors, more than one chunk of rows and part, planes of odd sizes, a single pixel, one channel
SHAPES = ((2, 3, 4, 5), (4, 70, 9, 9), (3, 64, 1, 1), (2, 1, 33, 3), (3, 128, 17, 9), (9, 8, 40, 40))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def operands_of(shape, dtype, layout="NHWC", *, residual=True, affine=True, training=True, eps=1e-5):
    """x with a mean and deviation of its own in each channel; some weights are negative."""
    C = shape[1]
    x = torch.randn(shape) * (torch.rand(C) + 0.5).view(-1, 1, 1) + 3 * torch.randn(C).view(-1, 1, 1)
    x, r = (t.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for t in (x, torch.randn(shape)))
    statistics = (None, None) if training else (torch.randn(C), torch.rand(C) + 0.5)
    vectors = (torch.randn(C), torch.randn(C)) if affine else (None, None)
    return BnActOperands(x, *statistics, *vectors, r if residual else None, eps)


def needs(backend, operands, activation):
    reason = backends.known("bn_act")[backend].why_not(bn_act_problem(operands, activation))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def requiring_grad(o):
    return BnActOperands(*(
        one.detach().clone().requires_grad_() if i in (0, 3, 4, 5) and one is not None else one
        for i, one in enumerate(o[:6])
    ), o.eps)  # fmt: skip


def check(o, activation, backend):
    """Outputs and gradients of the operator within the bounds."""
    problem = bn_act_problem(o, activation)
    o = requiring_grad(o)
    before = [None if one is None else one.detach().clone() for one in o[:6]]
    y, mean, var, bits = op(*o, activation, backend)
    assert y.dtype == o.x.dtype and y.stride() == o.x.stride()
    grad = torch.randn(o.x.shape).to(o.x.dtype)
    tensors = [one for one in (o.x, o.weight, o.bias, o.residual) if one is not None]
    found = iter(torch.autograd.grad(y, tensors, grad, retain_graph=True))
    grads = [None if one is None else next(found) for one in (o.x, o.weight, o.bias, o.residual)]
    passes = mask.unpacked(bits, o.x) if problem.has_mask else None
    expected = reference.bn_act(problem, o, grad, passes)
    is_stored, terms = backend == "eager", problem.values if backend == "eager" else 520
    bound = reference.bn_act_bound(problem, o, expected, terms=terms, stored=o.x.dtype if is_stored else None)
    actual = reference.BnAct(y, mean, var, *grads)
    for name, one, wanted, allowed in zip(actual._fields, actual, expected, bound):
        if one is not None and (problem.is_training or name not in ("mean", "var")):
            error = (one.detach().double() - wanted).abs()
            assert (error <= allowed).all(), (name, (error / allowed).max().item())
    if passes is not None:  # where the sum is away from a kink by more than the bound
        total = reference.bn_act(problem._replace(activation="none"), o).y
        clear = (bound.y < total.abs()) & ((bound.y < (total - 6).abs()) | (activation == "relu"))
        inside = (total > 0) & ((total < 6) | (activation == "relu"))
        assert (passes == inside)[clear].all() and clear.double().mean() > 0.2
    for one, was in zip(o[:6], before):
        assert one is None or torch.equal(one, was)
    return y


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", (True, False))
def test_the_reference_is_torchs(activation, training, affine):
    o = requiring_grad(operands_of((3, 4, 5, 6), torch.float64, training=training, affine=affine))
    problem = bn_act_problem(o, activation)
    statistics = (None, None) if training else (o.mean.double(), o.var.double())
    vectors = (None if one is None else one.double() for one in (o.weight, o.bias))
    y = F.batch_norm(o.x, *statistics, *vectors, training, 0.0, o.eps) + o.residual
    y = functional.activate(y, activation)
    grad = torch.randn_like(y)
    names = [name for name in ("x", "weight", "bias", "residual") if getattr(o, name) is not None]
    gradients = torch.autograd.grad(y, [getattr(o, name) for name in names], grad)
    found = reference.bn_act(problem, o, grad)
    torch.testing.assert_close(found.y, y.detach())
    for name, gradient in zip(names, gradients):
        torch.testing.assert_close(getattr(found, f"grad_{name}"), gradient.double(), rtol=1e-6, atol=1e-6)


def test_the_reference_by_hand():
    o = BnActOperands(torch.tensor([1.0, 5.0]).view(2, 1, 1, 1), weight=torch.tensor([3.0]), eps=0.0)
    found = reference.bn_act(bn_act_problem(o, "relu"), o, torch.ones(2, 1, 1, 1))
    assert found.mean.tolist() == [3] and found.var.tolist() == [4]
    assert found.y.flatten().tolist() == [0, 3] and found.grad_residual.flatten().tolist() == [0, 1]
    assert found.grad_weight.tolist() == [1] and found.grad_x.flatten().tolist() == [0, 0]


@pytest.mark.parametrize("backend", IN_TIERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("number, shape", list(enumerate(SHAPES)))
def test_every_backend_is_right(backend, layout, dtype, number, shape):
    for i, activation in enumerate(("none", "relu", "relu6")):
        residual, training, affine = (number + i) % 2 == 0, (number + 2 * i) % 3 != 0, (number + i) % 4 != 3
        o = operands_of(shape, dtype, layout, residual=residual, training=training, affine=affine)
        needs(backend, o, activation)
        check(o, activation, backend)


def test_auto_takes_the_kernel_of_maps_that_are_large_enough():
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))

    def chosen(shape, dtype=torch.float32, activation="relu", layout="NHWC"):
        x = torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout])
        return choosing.select(bn_act_problem(BnActOperands(x), activation)).backend.name

    assert chosen((8, 64, 56, 56)) == chosen((8, 64, 56, 56), torch.bfloat16) == "cpu"
    assert chosen((8, 64, 28, 28)) == chosen((8, 64, 56, 56), torch.float16) == "eager"
    assert chosen((8, 64, 56, 56), activation="silu") == "eager"
    assert chosen((8, 64, 56, 56), layout="NCHW") == chosen((8, 1024, 14, 14)) == "cpu"
    assert chosen((8, 1024, 14, 14), layout="NCHW") == "eager"


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_are_neither(backend):
    """Slices and permutations are made dense; the output lies as x does where that is dense, else in NCHW or NHWC."""
    whole = torch.randn(2, 9, 7, 12)
    x = whole[:, ::2]
    y = functional.bn_act(x, training=True, residual=whole[:, 1:6], backend=backend)
    torch.testing.assert_close(y, torch.relu(F.batch_norm(x, None, None, training=True) + whole[:, 1:6]))
    x = whole.contiguous(memory_format=torch.channels_last)[:, :5]
    y = functional.bn_act(x, training=True, residual=whole[:, 1:6], backend=backend)
    torch.testing.assert_close(y, torch.relu(F.batch_norm(x, None, None, training=True) + whole[:, 1:6]))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_in_parts_and_tiles(layout, monkeypatch):
    """Several parts of each sum, and more than one tile in each; two runs are equal to the last bit."""
    if (reason := backends.known("bn_act")["triton"].why_not(bn_act_problem(BnActOperands(X), "relu"))) is not None:
        pytest.skip(reason)
    from fused_resnet.kernels.triton import bn_act as kernels

    monkeypatch.setattr(kernels, "TILE", 64)
    o = operands_of((3, 5, 7, 9), torch.bfloat16, layout)
    tiling = kernels._tiling(bn_act_problem(o, "relu"), o.x.device)
    assert 1 < tiling.num_parts < tiling.num_tiles
    check(o, "relu", "triton")
    first, second = (op(*o, "relu", "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def mistakes(x, y, mean, var):
    """What a wrong kernel would give of a training forward without activation: by name, (y, mean, var)."""
    per_channel = lambda vector: vector.view(1, -1, 1, 1)  # noqa: E731
    count = x.numel() // x.shape[1]
    yield "the unbiased variance", y * (1 - 1 / count) ** 0.5, mean, var * count / (count - 1)
    yield "a value left out", y, mean - x[-1, :, -1, -1] / count, var
    yield "no mean", y + per_channel(mean / var.sqrt()), mean, var
    shifted = y.clone()
    shifted[:, -1, -1, -1] = y[:, -1, -1, -2]
    yield "the last value of the last channel", shifted, mean, var
    yield "the neighbour's statistics", y.roll(1, 1), mean.roll(1), var.roll(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mistake_exceeds_the_bound(dtype):
    o = operands_of((4, 6, 7, 5), dtype, residual=False, affine=False)
    problem = bn_act_problem(o, "none")
    right = reference.bn_act(problem, o, torch.randn(o.x.shape))
    bound = reference.bn_act_bound(problem, o, right, terms=problem.values, stored=dtype)
    for name, *wrong in mistakes(o.x.double(), *right[:3]):
        assert any(((a - b).abs() > allowed).any() for a, b, allowed in zip(wrong, right, bound)), name
    constant = right.grad_x + right.grad_residual.mean((0, 2, 3), keepdim=True) / right.var.sqrt().view(1, -1, 1, 1)
    assert ((constant - right.grad_x).abs() > bound.grad_x).any()  # statistics taken for constants
    assert ((right.grad_weight - right.grad_bias).abs() > bound.grad_weight).any()


# --------------------------------------------------------------------------------------------------------- statistics


def statistics_of(x, backend="cpu"):
    needs(backend, BnActOperands(x), "none")
    return op(x, None, None, None, None, None, 1e-5, "none", backend)[1:3]


@pytest.mark.parametrize("backend", IN_TIERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_deviation_beside_a_large_mean(backend, layout):
    x = (1e4 + 1e-2 * torch.randn(8, 16, 33, 31)).contiguous(memory_format=LAYOUTS[layout])
    exact = x.double()
    mean, var = statistics_of(x, backend)
    expected = exact.var((0, 2, 3), correction=0)
    assert ((mean.double() - exact.mean((0, 2, 3))).abs() <= 2.0**-11).all()  # half a unit in the last place of fp32
    assert ((var.double() - expected).abs() <= 1e-3 * expected).all()
    if backend != "eager":  # whose x * scale - mean * scale cancels
        check(BnActOperands(x, eps=1e-9), "relu", backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ("first", "last", "first half", "ramp", "tiny", "constant"))
def test_no_data_makes_the_variance_cancel(where, layout):
    x = torch.randn(4, 20, 33, 31)
    if where == "ramp":
        x += torch.linspace(0, 1e5, 4 * 33 * 31).view(4, 1, 33, 31)
    elif where == "constant":
        x = torch.full_like(x, 1e4 / 3)
    elif where == "tiny":
        x *= 1e-18
    else:
        x[{"first": (0, slice(None), 0, 0), "last": (-1, slice(None), -1, -1), "first half": slice(2)}[where]] += 3e5
    x = x.contiguous(memory_format=LAYOUTS[layout])
    mean, var = statistics_of(x)
    expected = x.double().var((0, 2, 3), correction=0)
    assert ((var.double() - expected).abs() <= 2e-4 * expected + torch.finfo(torch.float32).tiny).all()
    sums = 512 * 2.0**-24 * x.double().abs().mean((0, 2, 3))  # of at most 512 terms in fp32
    assert ((mean.double() - x.double().mean((0, 2, 3))).abs() <= sums).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((8, 64, 28, 28), (5, 2048, 7, 7), (2, 3, 150, 149)))
def test_results_do_not_depend_on_the_number_of_threads(shape, layout):
    o = requiring_grad(operands_of(shape, torch.float32, layout))
    needs("cpu", o, "relu")
    grad = torch.randn(shape)

    def results():
        y, mean, var, bits = op(*o, "relu", "cpu")
        return (y, mean, var, bits, *torch.autograd.grad(y, (o.x, o.weight, o.bias, o.residual), grad))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once, again = results(), results()
        torch.set_num_threads(3)
        shared = results()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(once, again, shared):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("backend", IN_TIERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("momentum, affine", ((0.1, True), (None, False), (1.0, True), (0, True)))
def test_running_statistics_are_those_of_batch_norm(backend, dtype, momentum, affine):
    bn = nn.BatchNorm2d(20, eps=1e-3, momentum=momentum, affine=affine)
    mean, var = torch.zeros(20), torch.ones(20)
    for step in range(3):
        x = operands_of((4, 20, 9, 7), dtype).x
        expected = torch.relu(bn(x))
        factor = 1 / (step + 1) if momentum is None else momentum
        y = functional.bn_act(x, mean, var, bn.weight, bn.bias, training=True, momentum=factor, eps=1e-3,
                              backend=backend)  # fmt: skip
        for actual, wanted in ((mean, bn.running_mean), (var, bn.running_var)):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, expected, rtol=2**-6 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    x = operands_of((4, 20, 9, 7), dtype).x
    before = mean.clone()
    y = functional.bn_act(x, mean, var, bn.weight, bn.bias, eps=1e-3, backend=backend)
    torch.testing.assert_close(y, torch.relu(bn.eval()(x)), rtol=2**-6 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    assert torch.equal(mean, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number(backend):
    x, residual = torch.randn(2, 3, 5, 4), torch.zeros(2, 3, 5, 4)
    x[0, 1, 2, 3], x[1, 2, 0, 0], residual[1, 0, 1, 1] = float("nan"), float("inf"), float("nan")
    ours, plain = (
        [one.clone().requires_grad_() for one in (x, residual)] for _ in range(2)
    )  # fmt: skip
    mean, var = torch.zeros(3), torch.ones(3)
    y = functional.bn_act(ours[0], mean, var, training=True, residual=ours[1], backend=backend)
    expected = torch.relu(F.batch_norm(plain[0], None, None, training=True) + plain[1])
    torch.testing.assert_close(y, expected, equal_nan=True)
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, plain, grad)):
        torch.testing.assert_close(a[:, 0], b[:, 0], equal_nan=True)
    assert mean[1:].isnan().any() and mean[0].isfinite()


@pytest.mark.parametrize("backend", ("auto", "eager"))
@pytest.mark.parametrize("shape", ((0, 3, 4, 5), (2, 3, 0, 4)))
def test_empty_batches_leave_the_statistics_alone(shape, backend):
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = functional.bn_act(torch.empty(shape), mean, var, training=True, backend=backend)
    assert y.shape == shape and not mean.any() and (var == 1).all()


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training, affine", ((True, True), (True, False), (False, True)))
def test_gradcheck(activation, training, affine):
    o = operands_of((2, 3, 3, 4), torch.float64, training=training, affine=affine)
    o = o._replace(**{name: one.double() for name, one in o.vectors.items() if one is not None})
    away = torch.tensor([-2.0, 3.0, 8.0, 1.5], dtype=torch.float64)[torch.arange(72) % 4].view(2, 3, 3, 4)
    o = requiring_grad(o._replace(residual=away - op(*o._replace(residual=None), "none", "eager")[0]))
    names = [name for name in ("x", "weight", "bias", "residual") if getattr(o, name) is not None]
    function = lambda *v: op(*o._replace(**dict(zip(names, v))), activation, "eager")[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, [getattr(o, name) for name in names])
    assert torch.autograd.gradgradcheck(function, [getattr(o, name) for name in names], fast_mode=True)
    function = lambda *v: plain_call(o._replace(**dict(zip(names, v))), activation, "eager")  # noqa: E731
    assert torch.autograd.gradcheck(function, [getattr(o, name) for name in names], fast_mode=True)


def plain_call(o, activation, backend):
    statistics = (None, None) if o.mean is None else (o.mean, o.var)
    return functional.bn_act(o.x, *statistics, o.weight, o.bias, training=o.mean is None, eps=o.eps,
                             residual=o.residual, activation=activation, backend=backend)  # fmt: skip


@pytest.mark.parametrize("activation", ("none", "relu", "relu6"))
@pytest.mark.parametrize("training", (True, False))
def test_double_backward_of_the_kernel_is_atens(activation, training):
    o = requiring_grad(operands_of((3, 5, 4, 6), torch.float32, training=training))
    needs("cpu", o, activation)
    tensors = (o.x, o.weight, o.bias, o.residual)

    def penalties(backend):
        y = plain_call(o, activation, backend)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return first, torch.autograd.grad(sum(one.square().sum() for one in first), tensors)

    for actual, expected in zip(*(itertools.chain(*penalties(backend)) for backend in ("cpu", "eager"))):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("wanted", ("x", "weight", "bias", "residual"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_alone_is_the_same(wanted, backend):
    o = operands_of((2, 5, 4, 6), torch.float32)
    together = requiring_grad(o)
    expected = torch.autograd.grad(op(*together, "relu", backend)[0].sum(), getattr(together, wanted))
    alone = o._replace(**{wanted: getattr(o, wanted).clone().requires_grad_()})
    found = torch.autograd.grad(op(*alone, "relu", backend)[0].sum(), getattr(alone, wanted))
    assert torch.equal(*found, *expected)


def test_what_is_kept_for_the_backward():
    """x, vectors and a bit per output: neither the output nor the residual."""
    o = requiring_grad(operands_of((2, 64, 5, 6), torch.float32))
    needs("cpu", o, "relu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = plain_call(o, "relu", "cpu")
    maps = [tensor for tensor in kept if tensor.numel() >= o.x.numel()]
    assert len(maps) == 1 and maps[0] is o.x
    assert sum(tensor.nbytes for tensor in kept if tensor.dtype == torch.uint8) == o.x.numel() // 8
    expected = torch.autograd.grad(y.sum(), o.x, retain_graph=True)
    y.detach().zero_()  # which is not kept
    assert torch.equal(*torch.autograd.grad(y.sum(), o.x), *expected)


def test_without_an_activation_the_residuals_gradient_is_the_outputs():
    o = requiring_grad(operands_of((2, 8, 5, 6), torch.float32))
    needs("cpu", o, "none")
    grad = torch.randn(2, 8, 5, 6)
    found = torch.autograd.grad(plain_call(o, "none", "cpu"), o.residual, grad)[0]
    assert found.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ("relu", "relu6"))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_of_the_kernel_is_that_of_its_output(shape, activation, layout):
    o = operands_of(shape, torch.float32, layout)
    needs("cpu", o, activation)
    y, _, _, bits = op(*o, activation, "cpu")
    assert torch.equal(bits, mask.packed(bn_act_problem(o, activation), y))
    inside = y > 0 if activation == "relu" else (y > 0) & (y < 6)
    assert torch.equal(mask.unpacked(bits, o.x), inside)


# --------------------------------------------------------------------------------- transforms, compilers and the like


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transforms(activation, training):
    o = operands_of((2, 3, 4, 5), torch.float64, training=training)
    statistics = (None, None) if training else (o.mean.double(), o.var.double())
    values = (o.x, o.weight.double(), o.bias.double(), o.residual)

    def ours(x, weight, bias, residual):
        return functional.bn_act(x, *statistics, weight, bias, training=training, residual=residual,
                                 activation=activation)  # fmt: skip

    def plain(x, weight, bias, residual):
        y = F.batch_norm(x, *statistics, weight, bias, training) + residual
        return functional.activate(y, activation)

    def results(function):
        loss = lambda *v: function(*v).square().sum()  # noqa: E731
        yield from torch.func.jvp(function, values, values)
        yield from torch.func.grad(loss, (0, 1, 2, 3))(*values)
        yield torch.func.vmap(function, (0, None, None, 0))(values[0][None], *values[1:3], values[3][None])

    for actual, expected in zip(results(ours), results(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_autocast():
    o = operands_of((2, 8, 5, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = plain_call(o, "relu", "auto")
        mapped = torch.func.vmap(lambda x: plain_call(o._replace(x=x), "relu", "auto"))(o.x[None])[0]
    half = o._replace(x=o.x.bfloat16(), residual=o.residual.bfloat16())
    assert y.dtype == mapped.dtype == torch.bfloat16
    assert torch.equal(y, plain_call(half, "relu", "auto"))


@pytest.mark.parametrize("backend", IN_TIERS)
@pytest.mark.parametrize("training, layout, activation", (
    (True, "NHWC", "relu"), (False, "NCHW", "relu6"), (True, "NCHW", "none"), (True, "NHWC", "silu"),
))  # fmt: skip
def test_opcheck(backend, training, layout, activation):
    o = operands_of((2, 3, 4, 5), torch.float32, layout, training=training)
    needs(backend, o, activation)
    torch.library.opcheck(op.default, (*requiring_grad(o), activation, backend))
    _, mean, var, bits = op(*o, activation, backend)
    statistics = (mean, var) if training else (o.mean, o.var)
    args = (torch.randn(2, 3, 4, 5), o.x, *statistics, o.weight, o.bias, o.residual, bits, o.eps, training, activation)
    backward = torch.ops.fused_resnet.bn_act_backward.default
    torch.library.opcheck(backward, (*args, True, True, backend))
    torch.library.opcheck(backward, (*args, False, True, backend), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", ((2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 4, 1), (0, 3, 4, 5)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_the_promised_ones(shape, layout):
    from torch._subclasses.fake_tensor import FakeTensorMode

    o = operands_of(shape, torch.float32, layout)
    for backend in ("eager", "auto"):
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in o), "relu", backend)
        for fake, real in zip(fakes, op(*o, "relu", backend)):
            assert fake.stride() == real.stride() and fake.dtype == real.dtype and fake.shape == real.shape


class _Unit(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x, residual):
        bn = self.bn
        return functional.bn_act(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=self.training,
                                 residual=residual)  # fmt: skip


def test_compiled_training_is_the_same():
    """One graph with the operator in it, running statistics included."""
    seen = []

    def spy(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    eager, compiled_unit = _Unit(8), _Unit(8)
    run = torch.compile(compiled_unit, backend=spy, fullgraph=True)
    through = torch.compile(_Unit(8), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, residual = (torch.randn(2, 8, 5, 6) for _ in "xr")
        results = []
        for unit in (eager, run, through):
            one, other = x.clone().requires_grad_(), residual.clone().requires_grad_()
            unit.zero_grad()
            y = unit(one, other)
            y.square().sum().backward()
            results.append((y, one.grad, other.grad, *(p.grad for p in unit.parameters()), *unit.buffers()))
        for expected, *others in zip(*results):
            for actual in others:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert "fused_resnet.bn_act.default" in seen


def test_export():
    unit, inputs = _Unit(8).eval(), (torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6))
    program = torch.export.export(unit, inputs)
    assert "fused_resnet.bn_act.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), unit(*inputs))


def test_meta_device():
    o = operands_of((2, 3, 4, 5), torch.float32)
    y, mean, var, bits = op(*(one.to("meta") if isinstance(one, torch.Tensor) else one for one in o), "relu", "auto")
    assert y.device.type == "meta" and y.stride() == o.x.stride() and mean.shape == var.shape == (3,)
    assert bits.shape == (40, 1)


# ---------------------------------------------------------------------------------------------------------- refusals

X, ONES = torch.randn(2, 4, 3, 3), torch.ones(4)
call = functools.partial(functional.bn_act, X, training=True)


@pytest.mark.parametrize("error, message, function", (
    (ValueError, "Expected more than 1 value per channel when training", lambda: functional.bn_act(
        torch.randn(1, 4, 1, 1), training=True)),
    (ValueError, r"4 dimensions, \(N, C, H, W\), got 3", lambda: functional.bn_act(X[0], training=True)),
    (ValueError, r"weight must have shape \(4,\).* got \(3,\)", lambda: call(weight=torch.ones(3))),
    (ValueError, r"running_var must have shape \(4,\), got \(5,\)", lambda: call(ONES.clone(), torch.ones(5))),
    (ValueError, "running_mean and running_var are needed together", lambda: functional.bn_act(X)),
    (ValueError, "are needed together, given are .'running_mean'", lambda: call(ONES.clone())),
    (ValueError, "has no channels", lambda: functional.bn_act(X[:, :0], training=True)),
    (ValueError, "residual must have the shape of x", lambda: call(residual=X[:1])),
    (ValueError, "unknown activation 'gelu'; known ones are none, relu", lambda: call(activation="gelu")),
    (TypeError, "residual has dtype bfloat16 but x has float32", lambda: call(residual=X.bfloat16())),
    (TypeError, "x has dtype int32", lambda: functional.bn_act(X.int(), training=True)),
    (TypeError, "weight has dtype float64; with x in float32", lambda: call(weight=ONES.double())),
    (TypeError, "bias is on meta but x is on cpu", lambda: call(bias=ONES.to("meta"))),
    (TypeError, "momentum must be a number, not None.*1 / num_batches_tracked", lambda: call(
        ONES.clone(), ONES.clone(), momentum=None)),
    (backends.BackendError, "unknown backend 'other' for bn_act; known ones are auto, ", lambda: call(backend="other")),
    (backends.BackendError, "not silu", lambda: call(backend="cpu", activation="silu")),
    (backends.BackendError, "float16 is not supported", lambda: functional.bn_act(
        X.half(), training=True, backend="cpu")),
))  # fmt: skip
def test_bad_input_is_refused(error, message, function):
    with pytest.raises(error, match=message):
        function()


def test_what_is_refused_has_changed_nothing():
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError):
        functional.bn_act(torch.randn(1, 4, 1, 1), mean, var, training=True)
    assert not mean.any() and (var == 1).all()


@pytest.mark.parametrize("name, change, message", (
    ("cpu_bn_statistics", {0: X.half()}, "the dtype must be float32 or bfloat16, not Half"),
    ("cpu_bn_statistics", {0: X[:, ::2], 1: ONES[:2], 2: ONES[:2]}, "x must be channels_last in memory"),
    ("cpu_bn_statistics", {1: torch.ones(3)}, "mean must be a contiguous vector with one value for each of 4 channels"),
    ("cpu_bn_act", {6: X.permute(0, 1, 3, 2)}, "residual must have x's shape, layout and dtype"),
    ("cpu_bn_act", {7: "silu"}, "unknown activation silu"),
    ("cpu_bn_act", {8: torch.zeros(8, 1, dtype=torch.uint8)}, r"mask must have the shape \(8, 2\), not \(8, 1\)"),
    ("cpu_bn_act", {7: "none"}, "without an activation there is no mask"),
    ("cpu_bn_act_sums", {0: X[:1]}, "grad must have x's shape"),
    ("cpu_bn_act_backward", {7: None}, "sum and dot come together"),
    ("cpu_bn_act_backward", {9: X[:1].clone()}, "grad_x must have x's shape"),
))  # fmt: skip
def test_second_line_of_checks(name, change, message):
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    vector, bits = ONES.clone, torch.zeros(8, 2, dtype=torch.uint8)
    arguments = {
        "cpu_bn_statistics": [X, vector(), vector()],
        "cpu_bn_act": [X, ONES, ONES, ONES, None, 1e-5, X, "relu", bits, torch.empty_like(X)],
        "cpu_bn_act_sums": [X, X, ONES, bits, vector(), vector()],
        "cpu_bn_act_backward": [X, X, ONES, ONES, None, 1e-5, bits, ONES, ONES, torch.empty_like(X), None],
    }[name]
    function = getattr(torch.ops.fused_resnet, name).default
    function(*arguments)
    with pytest.raises(RuntimeError, match=message):
        function(*(change.get(i, one) for i, one in enumerate(arguments)))
