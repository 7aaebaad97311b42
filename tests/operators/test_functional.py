"""The public functions: values on every backend by position, gradients as torch.nn's, dispatch, empty batches, NaN."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import backends, choosing, functional, operators, testing
from fused_resnet.operators.describe import _describe_conv, _describe_sum, conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS

VECTORS = ("bn_weight", "bn_bias", "bn_mean", "bn_var")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (N, C, H, W, K, R, S, stride, padding, dilation, groups), each odd in its own way
SHAPES = {
    "odd channels": (2, 5, 9, 7, 19, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "pointwise": (3, 17, 5, 7, 33, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    "strided pointwise": (2, 8, 9, 8, 16, 1, 1, (2, 2), (0, 0), (1, 1), 1),
    "stem": (1, 3, 33, 31, 8, 7, 7, (2, 2), (3, 3), (1, 1), 1),
    "grouped": (2, 12, 8, 9, 20, 3, 3, (2, 2), (1, 1), (1, 1), 4),
    "depthwise": (1, 7, 8, 6, 7, 3, 5, (1, 1), (1, 2), (1, 1), 7),
    "dilated": (1, 16, 11, 12, 16, 3, 3, (1, 1), (2, 2), (2, 2), 1),
    "every pair uneven": (2, 6, 13, 10, 8, 4, 2, (2, 1), (3, 0), (1, 3), 2),
    "one pixel": (2, 64, 1, 1, 70, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "one channel": (2, 1, 6, 5, 1, 2, 2, (1, 1), (0, 0), (1, 1), 1),
    "long reduction": (1, 64, 4, 4, 9, 5, 5, (1, 1), (2, 2), (1, 1), 1),
}


# where each backend has anything to run: a pair for every parameter set below
PLACES = [(name, "cpu") for name in ("eager", "onednn", "triton")] + [
    pytest.param(name, "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))
    for name in ("eager", "cudnn", "cuda", "triton")
]  # fmt: skip
on_every_backend = pytest.mark.parametrize("backend, device", PLACES)
on_live_backends = pytest.mark.parametrize(
    "backend, device", [place for place in PLACES if not {"onednn", "cudnn"} & set(getattr(place, "values", place))]
)


def case_of(shape, dtype, device, activation="relu", vectors=VECTORS, bias=False, residual=True):
    N, C, H, W, K, R, S, *window = SHAPES[shape]
    P, Q = F.conv2d(torch.empty(N, C, H, W, device="meta"), torch.empty(K, C // window[3], R, S, device="meta"),
                    None, *window).shape[2:]  # fmt: skip
    values = dict(zip(VECTORS, (torch.randn(K), torch.randn(K), torch.randn(K), torch.rand(K) + 0.1)))
    operands = ConvOperands(
        torch.randn(N, C, H, W), torch.randn(K, C // window[3], R, S) / (C // window[3] * R * S) ** 0.5,
        **{name: values[name] for name in vectors},
        bias=torch.randn(K) if bias else None, residual=torch.randn(N, K, P, Q) if residual else None,
    ).map(lambda tensor: tensor.to(device, dtype if tensor.dim() == 4 else torch.float32))  # fmt: skip
    return testing.Case(conv_problem(operands, *window, activation), operands)


def check(case, backend):
    """The result is right; skips where the backend cannot run on this machine."""
    outcome = testing.check(case, backend)
    if outcome.status == "cannot run":
        pytest.skip(f"{backend}: {outcome.detail}")
    assert outcome.status == "ok", f"{case}: {outcome.detail}"


@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, torch.float32) for shape in SHAPES]
    + [(shape, dtype) for shape in ("odd channels", "strided pointwise", "grouped") for dtype in DTYPES[1:]],
    ids=str,
)
@on_every_backend
def test_live_bn_and_residual(backend, shape, dtype, device):
    folds = backend in ("onednn", "cudnn")  # they take a bias only
    check(case_of(shape, dtype, device, vectors=() if folds else VECTORS, bias=folds), backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", (False, True))
@on_every_backend
def test_activations(backend, residual, activation, device):
    options = dict(activation=activation, vectors=(), bias=True, residual=residual)
    check(case_of("odd channels", torch.float32, device, **options), backend)


@pytest.mark.parametrize("present", [c for n in range(5) for c in itertools.combinations(VECTORS, n)], ids="-".join)
@pytest.mark.parametrize("bias", (False, True))
@on_live_backends
def test_any_subset_of_vectors(backend, bias, present, device):
    check(case_of("one channel", torch.bfloat16, device, vectors=present, bias=bias), backend)


@pytest.mark.parametrize("op", ("conv_bn_act", "add_relu"))
def test_forcing_a_backend_that_cannot_run_says_why(op):
    """The sentence that selects is the sentence that is raised, for every backend."""
    case = next(c for c in (testing.case_at(5, i) for i in range(99)) if c.problem.op == op)
    for name, backend in backends.known(op).items():
        reason = backend.why_not(case.problem)
        if reason is None:
            assert choosing.select(case.problem, name).backend is backend
        else:
            with pytest.raises(backends.BackendError) as error:
                testing.run(case, name)
            assert str(error.value).startswith(f"backend {name!r} cannot run this: {reason}. Use backend='eager'")


@pytest.mark.parametrize("vector_dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@on_live_backends
def test_vectors_of_one_dtype_beside_any_activations(backend, device, dtype, vector_dtype):
    case = case_of("odd channels", dtype, device)
    vectors = {name: vector.to(vector_dtype) for name, vector in case.operands.bn_vectors.items()}
    if vector_dtype == torch.float64 != dtype:
        with pytest.raises(TypeError, match="bn_weight has dtype float64"):
            testing.run(testing.Case(case.problem, case.operands._replace(**vectors)), backend)
    else:
        check(testing.Case(case.problem, case.operands._replace(**vectors)), backend)


@pytest.mark.parametrize(
    "size, layout, as_it_is",
    ((4, torch.contiguous_format, False), (4, torch.channels_last, True), (32, torch.contiguous_format, True)),
)
def test_eager_on_the_cpu_converts_the_smaller_of_activations_and_weight(monkeypatch, size, layout, as_it_is):
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(backends.eager.F, "conv2d", lambda x, *rest: seen.append(x) or conv2d(x, *rest))
    x = torch.randn(1, 16, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(24, 16, 3, 3).to(memory_format=layout)
    operands = ConvOperands(x, weight, residual=torch.randn(1, 24, size, size))
    case = testing.Case(*_problem_and_operands(operands))
    check(case, "eager")
    assert (seen[0] is x) == as_it_is and seen[0].is_contiguous() != as_it_is


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ("odd channels", "stem", "every pair uneven"))
def test_gradients_equal_those_of_the_unfused_modules(shape, activation):
    case = case_of(shape, torch.float32, "cpu", activation=activation, bias=True)
    p, o = case.problem, case.operands
    names = ("x", "weight", "bn_weight", "bn_bias", "bias", "residual")
    fused = {name: getattr(o, name).clone().requires_grad_() for name in names}
    plain = {name: getattr(o, name).clone().requires_grad_() for name in names}
    window = (p.stride, p.padding, p.dilation, p.groups)
    y = F.batch_norm(
        F.conv2d(plain["x"], plain["weight"], plain["bias"], *window),
        o.bn_mean, o.bn_var, plain["bn_weight"], plain["bn_bias"], eps=o.eps,
    ) + plain["residual"]  # fmt: skip
    expected = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU()}[activation](y)
    operands = o._replace(**fused)
    actual = functional.conv_bn_act(
        *operands[:6], eps=o.eps, bias=operands.bias, residual=operands.residual,
        **dict(zip(("stride", "padding", "dilation", "groups"), window)), activation=activation,
    )  # fmt: skip
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    for name in names:
        # two fp32 sums of up to 2*17*16*19 terms, in another order: sqrt(terms) * 2**-24 of the largest gradient
        scale = plain[name].grad.abs().max().item()
        torch.testing.assert_close(
            fused[name].grad, plain[name].grad, rtol=0, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_is_torchs_to_the_last_bit(dtype, device):
    a, b = (torch.randn(3, 5, 7, 9, device=device, dtype=dtype).requires_grad_() for _ in "ab")
    a_plain, b_plain = (tensor.detach().clone().requires_grad_() for tensor in (a, b))
    actual, expected = functional.add_relu(a, b), torch.relu(a_plain + b_plain)
    assert torch.equal(actual, expected)
    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad)
    assert torch.equal(a.grad, a_plain.grad) and torch.equal(b.grad, b_plain.grad)


def test_autograd_is_skipped_only_when_no_gradient_is_wanted():
    case = case_of("odd channels", torch.float32, "cpu")
    weight = case.operands.weight.requires_grad_()
    call = lambda: functional.conv_bn_act(case.operands.x, weight, padding=1)  # noqa: E731
    assert call().grad_fn is not None
    with torch.no_grad():
        assert call().grad_fn is None and not call().requires_grad
    with torch.inference_mode():
        assert call().is_inference()
    assert functional.conv_bn_act(case.operands.x, weight.detach(), padding=1).grad_fn is None
    only_residual = case.operands.residual.requires_grad_()
    out = functional.conv_bn_act(case.operands.x, weight.detach(), padding=1, residual=only_residual)
    assert out.requires_grad


class _Names(TorchDispatchMode):
    """Which of our operators the dispatcher was asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_resnet":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class _FunctionNames(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def _calls(x, weight, **options):
    """Both operators, conv_bn_act with everything, and what they give."""
    y = functional.conv_bn_act(x, weight, *torch.ones(4, 8).unbind(), residual=x, padding=1, **options)
    return functional.add_relu(y, x, **options)


def _operators_dispatched(x, weight) -> list[str]:
    with _Names() as names:
        _calls(x, weight)
    return names.seen


@pytest.mark.parametrize("requires_grad", (False, True))
def test_whoever_watches_sees_the_operators(requires_grad):
    """A plain call goes past the dispatcher; modes, subclasses, profilers, autocast and tracing all still meet it."""
    x, weight = torch.randn(2, 8, 5, 5, requires_grad=requires_grad), torch.randn(8, 8, 3, 3)
    expected = _calls(x, weight)
    assert expected.requires_grad == requires_grad
    assert _operators_dispatched(x, weight) == ["fused_resnet::conv_bn_act", "fused_resnet::add_relu"]
    with _FunctionNames() as names:
        assert torch.equal(_calls(x, weight), expected)
    assert [name for name in names.seen if "fused_resnet" in name] == [
        "fused_resnet.conv_bn_act.default", "fused_resnet.add_relu.default",
    ]  # fmt: skip
    _Subclass.seen.clear()
    assert torch.equal(_calls(x, weight.as_subclass(_Subclass)).as_subclass(torch.Tensor), expected)
    assert "fused_resnet.conv_bn_act.default" in _Subclass.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(_calls(x, weight), expected)
    names = {event.key for event in profile.key_averages()}
    assert {"fused_resnet::conv_bn_act", "fused_resnet::add_relu"} <= names
    with torch.autocast("cpu", torch.bfloat16):
        assert _calls(x, weight).dtype == torch.bfloat16
    traced = torch.jit.trace(_calls, (x, weight), check_trace=False)
    assert "fused_resnet::conv_bn_act" in str(traced.graph) and torch.equal(traced(x, weight), expected)


def _python_calls(function) -> list[str]:
    """The files of the Python functions that are called, torch's own included."""
    files = []
    sys.setprofile(lambda frame, event, arg: files.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def test_a_second_call_describes_nothing_again():
    """What it costs to launch a small kernel: the problem is looked up, the dispatcher not asked, little Python run."""
    x, weight, vectors = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 1, 1), torch.ones(4, 8).unbind()
    convolution = lambda: functional.conv_bn_act(x, weight, *vectors, backend="eager")  # noqa: E731
    total = lambda: functional.add_relu(x, x, backend="eager")  # noqa: E731
    for function, describe, most in ((convolution, _describe_conv, 40), (total, _describe_sum, 20)):
        for _ in range(2):  # the second is kept
            function()
        before = describe.cache_info()
        called = _python_calls(function)
        after = describe.cache_info()
        assert after.hits - before.hits <= 1 and after.misses == before.misses
        assert torch._ops.__file__ not in called
        assert len(called) <= most, called


def test_what_was_looked_up_is_what_was_asked():
    """Every fact of every operand is part of the key: after a valid call, each change of one is seen."""
    x, weight, vector = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3), torch.ones(8)
    call = lambda **other: functional.conv_bn_act(  # noqa: E731
        **{"x": x, "weight": weight, **dict.fromkeys((*VECTORS, "bias"), vector), "residual": x, "padding": 1, **other}
    )
    assert call().shape == x.shape
    for name, error in (("x", ValueError), ("weight", ValueError), ("residual", ValueError)):
        with pytest.raises(error):
            call(**{name: torch.randn(2, 7, 5, 5)})
    for name in ("x", "weight", "residual", *VECTORS, "bias"):
        valid = {"x": x, "weight": weight, "residual": x}.get(name, vector)
        with pytest.raises(TypeError, match="has dtype"):
            call(**{name: valid.double()})
        with pytest.raises(TypeError, match="is on"):
            call(**{name: valid.to("meta")})
    assert call(x=x[:1], residual=x[:1]).shape == (1, 8, 5, 5)
    assert call(stride=2, residual=None).shape == (2, 8, 3, 3)
    assert call(activation="none").min() < 0 <= call().min()


def test_a_direct_call_of_the_operator_has_its_gradient():
    x, weight = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 3)
    vectors, window = (None,) * 4, ((1, 1), (1, 1), (1, 1), 1, "relu", "auto")
    direct = torch.ops.fused_resnet.conv_bn_act(x, weight, *vectors, 1e-5, None, None, *window)
    plain = torch.relu(torch.conv2d(x, weight, padding=1))
    torch.testing.assert_close(torch.autograd.grad(direct.sum(), x), torch.autograd.grad(plain.sum(), x))


@pytest.mark.parametrize("activation", ("none", "relu6", "silu"))
def test_the_output_may_be_written_to_as_after_torchs_own(activation):
    """ReLU's may not, here and there: its gradient is in the sign of its output."""
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 4, 6, 5), (3, 4, 3, 3)))
    out = functional.conv_bn_act(x, 5 * weight, activation=activation)
    expected = functional.activate(F.conv2d(x, 5 * weight), activation)
    gradients = [torch.autograd.grad(y.mul_(2).sum(), (x, weight)) for y in (out, expected)]
    for actual, wanted in zip(*gradients):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------- torch.func and forward-mode AD


def _plain_conv_bn_act(o, p):
    window = (p.stride, p.padding, p.dilation, p.groups)
    y = F.batch_norm(F.conv2d(o.x, o.weight, o.bias, *window), o.bn_mean, o.bn_var, o.bn_weight, o.bn_bias, eps=o.eps)
    return functional.activate(y + o.residual, p.activation)


def _fused_conv_bn_act(o, p, **options):
    return functional.conv_bn_act(
        *o[:6], eps=o.eps, bias=o.bias, residual=o.residual, stride=p.stride, padding=p.padding, dilation=p.dilation,
        groups=p.groups, activation=p.activation, **options,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode_in_every_operand(activation):
    case = case_of("every pair uneven", torch.float64, "cpu", activation=activation, bias=True)
    p, operands = case.problem, case.operands.map(torch.Tensor.double)
    names = ("x", "weight", "bn_weight", "bn_bias", "bias", "residual")
    values = tuple(getattr(operands, name) for name in names)
    tangents = tuple(torch.randn_like(value) for value in values)

    def derivative(function):
        return torch.func.jvp(lambda *v: function(operands._replace(**dict(zip(names, v))), p), values, tangents)

    for actual, expected in zip(derivative(_fused_conv_bn_act), derivative(_plain_conv_bn_act)):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_statistics_are_constants_of_the_transforms_too():
    p, o = (case := case_of("stem", torch.float32, "cpu")).problem, case.operands
    function = lambda mean, var: _fused_conv_bn_act(o._replace(bn_mean=mean, bn_var=var), p)  # noqa: E731
    statistics = (o.bn_mean, o.bn_var)
    assert not torch.func.jvp(function, statistics, tuple(map(torch.ones_like, statistics)))[1].any()
    assert not torch.func.grad(lambda mean: function(mean, o.bn_var).sum())(o.bn_mean).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transforms_of_add_relu(dtype):
    a, b = torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 4, 5, dtype=dtype)

    def results(function):
        loss = lambda a, b: function(a, b).square().sum()  # noqa: E731
        yield from torch.func.jvp(function, (a, b), (b, a))
        yield from torch.func.grad(loss, (0, 1))(a, b)
        yield torch.func.vmap(torch.func.grad(loss))(a, b.transpose(1, 2).contiguous().transpose(1, 2))
        yield torch.func.vmap(function, (0, None))(a, b[0])

    for actual, expected in zip(results(functional.add_relu), results(lambda a, b: torch.relu(a + b))):
        assert torch.equal(actual, expected)


_ONLY_PADDING = """
import torch
from fused_resnet.functional import conv_bn_act
x, weight = torch.randn(1, 56, 17, 1), torch.randn(5, 56, 1, 1)
x, weight = (tensor.bfloat16().to(memory_format=torch.channels_last) for tensor in (x, weight))
function = lambda x, weight: conv_bn_act(x, weight, stride=(1, 2), padding=1, dilation=2)
for out in (
    torch.func.vmap(function, (0, None))(x[None], weight),
    *torch.func.jvp(function, (x, weight), (x, weight)),
    *torch.func.grad(lambda *v: function(*v).sum(), (0, 1))(x, weight),
):
    assert not out.any()
"""


def test_transforms_where_every_window_lies_in_the_padding():
    """torch.conv2d ends the process on it (oneDNN issue 5942), with AVX-512 and in bf16, so this has its own."""
    done = subprocess.run([sys.executable, "-c", _ONLY_PADDING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transforms_check_and_cast_as_the_operators_do():
    case = case_of("odd channels", torch.float32, "cpu")
    p, o = case.problem, case.operands
    transformed = lambda function: torch.func.vmap(lambda x: function(o._replace(x=x)))(o.x[None])[0]  # noqa: E731
    with pytest.raises(backends.BackendError, match="backend 'onednn' cannot run this"):
        transformed(lambda o: _fused_conv_bn_act(o, p, backend="onednn"))
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        transformed(lambda o: _fused_conv_bn_act(o._replace(residual=o.x), p))
    with pytest.raises(ValueError, match="must have the same shape"):
        torch.func.vmap(functional.add_relu)(torch.ones(2, 3), torch.ones(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = transformed(lambda o: _fused_conv_bn_act(o, p)), _fused_conv_bn_act(o, p)
        assert out.dtype == expected.dtype == torch.bfloat16
        # two roundings to bf16 each: of the sum after the convolution or BN, and of the output
        torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
        added = torch.func.vmap(functional.add_relu)(o.x, o.x)
        assert torch.equal(added, functional.add_relu(o.x, o.x)) and added.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------- odd inputs


@pytest.mark.parametrize("backend", ("auto", *backends.known("conv_bn_act")))
def test_empty_batch(backend):
    x, weight = torch.empty(0, 4, 6, 5, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    problem = conv_problem(ConvOperands(x, weight), (1, 1), (1, 1), (1, 1), 1, "relu")
    if backend != "auto" and backends.known("conv_bn_act")[backend].why_not(problem) is not None:
        pytest.skip(backends.known("conv_bn_act")[backend].why_not(problem))
    out = functional.conv_bn_act(x, weight, padding=1, backend=backend)
    assert (
        out.shape == (0, 8, 6, 5)
        and out.stride() == torch.empty(0, 8, 6, 5, memory_format=torch.channels_last).stride()
    )
    out.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_batch_with_everything(activation):
    vectors = [torch.ones(8, requires_grad=name in VECTORS[:2]) for name in VECTORS]
    bias, residual = torch.ones(8, requires_grad=True), torch.ones(0, 8, 4, 3, requires_grad=True)
    out = functional.conv_bn_act(
        torch.ones(0, 4, 6, 5), torch.ones(8, 4, 3, 3), *vectors, bias=bias, residual=residual, activation=activation
    )
    out.sum().backward()
    for tensor in (*vectors[:2], bias):
        assert torch.equal(tensor.grad, torch.zeros(8))


@pytest.mark.parametrize("shape", ((0,), (0, 3, 4, 5), (2, 0, 4, 5), (), (1,)))
def test_empty_and_scalar_sums(shape):
    for name, backend in (("auto", None), *backends.known("add_relu").items()):
        a = torch.ones(shape, requires_grad=True)
        if backend is None or backend.why_not(operators.add_relu_problem(a, a)) is None:
            out = functional.add_relu(a, a, backend=name)
            out.sum().backward()
            assert torch.equal(out, 2 * torch.ones(shape)) and torch.equal(a.grad, 2 * torch.ones(shape)), name


@on_live_backends
def test_nan_stays_nan_in_live_operators(backend, device):
    x = torch.zeros(1, 4, 5, 5, device=device)
    x[0, 1, 2, 2] = torch.nan
    case = testing.Case(*_problem_and_operands(ConvOperands(x, torch.ones(3, 4, 3, 3, device=device))))
    check(case, backend)
    out = testing.run(case, backend)
    assert out[:, :, 1:4, 1:4].isnan().all()
    if backend != "eager" or device == "cpu":  # cuDNN may spread it over a tile
        assert out.isnan().sum() == 3 * 9


def _problem_and_operands(operands):
    return conv_problem(operands, (1, 1), (1, 1), (1, 1), 1, "relu"), operands


def test_nothing_shared_with_the_inputs():
    """The result is memory of its own, even where there is nothing to compute."""
    x, weight = torch.randn(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    residual = torch.zeros(1, 1, 2, 2)
    for options in ({}, {"residual": residual}):
        out = functional.conv_bn_act(x, weight, activation="none", **options)
        assert torch.equal(out, x)
        out.zero_()
        assert x.abs().sum() > 0 and residual.abs().sum() == 0
    out = functional.add_relu(residual, x.abs())
    out.zero_()
    assert x.abs().sum() > 0


@pytest.mark.parametrize("pairs", (dict(stride=2, padding=1), dict(stride=[2, 2], padding=torch.Size([1, 1]))))
def test_pairs_may_be_any_sequence(pairs):
    x, weight = torch.randn(1, 3, 7, 7), torch.randn(4, 3, 3, 3)
    assert torch.equal(
        functional.conv_bn_act(x, weight, **pairs),
        functional.conv_bn_act(x, weight, stride=(2, 2), padding=(1, 1)),
    )


@pytest.mark.parametrize(
    "bad", [dict(padding=(1.0, 1.0)), dict(padding=1.0), dict(groups=1.0), dict(dilation=(1.0, 1))]
)
def test_floats_are_no_window_and_leave_no_trace(bad):
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        with pytest.raises(TypeError, match="must be an int or a pair of ints, got"):
            functional.conv_bn_act(x, weight, **bad)
        functional.conv_bn_act(x, weight, padding=1, dilation=1, groups=1)
