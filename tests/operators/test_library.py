"""The registered operators: opcheck, finite differences, layouts promised to the compiler, autocast, flops."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import testing
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ACTIVATIONS

conv_bn_act = torch.ops.fused_resnet.conv_bn_act
add_relu = torch.ops.fused_resnet.add_relu
DIFFERENTIABLE = ("x", "weight", "bn_weight", "bn_bias", "bias", "residual")
VECTORS = ("bn_weight", "bn_bias", "bn_mean", "bn_var")


def operands_of(N=2, C=4, H=5, W=4, K=6, groups=2, dtype=torch.float64, without=()):
    """Operands of a 3x2 convolution with stride (2, 1), padding (1, 0) and dilation (1, 2)."""
    values = ConvOperands(
        torch.randn(N, C, H, W), torch.randn(K, C // groups, 3, 2),
        *(torch.randn(K), torch.randn(K), torch.randn(K), torch.rand(K) + 0.5),
        bias=torch.randn(K), residual=torch.randn(N, K, (H - 1) // 2 + 1, W - 2),
    )  # fmt: skip
    return values.map(lambda tensor: tensor.to(dtype))._replace(**{name: None for name in without})


def arguments(operands, activation="relu", backend="eager"):
    return (*operands, (2, 1), (1, 0), (1, 2), 2, activation, backend)


def requiring_grad(operands):
    for name in DIFFERENTIABLE:
        if getattr(operands, name) is not None:
            getattr(operands, name).requires_grad_()
    return operands


def as_function(operands, activation, backend="eager"):
    """(function of the tensors that may require a gradient, those tensors)."""
    names = [name for name in DIFFERENTIABLE if getattr(operands, name) is not None]

    def function(*tensors):
        return conv_bn_act(*arguments(operands._replace(**dict(zip(names, tensors))), activation, backend))

    return function, [getattr(operands, name) for name in names]


def away_from_kinks(operands, activation):
    """The same with a residual that moves every sum well away from 0 and 6, where ReLU and ReLU6 have no derivative."""
    if activation not in ("relu", "relu6") or operands.residual is None:
        return operands
    without = arguments(operands._replace(residual=None), "none")
    targets = torch.tensor([-2.0, 3.0, 8.0, 1.5])[torch.arange(operands.residual.numel()) % 4]
    targets = targets.view_as(operands.residual).to(operands.x.dtype)
    return operands._replace(residual=targets - conv_bn_act(*without).detach())


# ----------------------------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("without", ((), VECTORS, ("residual", "bias", "bn_mean")), ids=str)
def test_opcheck_conv_bn_act(dtype, without):
    operands = requiring_grad(operands_of(dtype=dtype, without=without))
    # the gradients' values are checked below against fp64 and torch.nn; here bf16 gradients agree as bf16 does
    tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    for layout in ({}, {"channels_last": False}):
        torch.library.opcheck(conv_bn_act.default, arguments(operands), layout, **tolerance)


@pytest.mark.parametrize("backend", ("eager", "auto", "onednn"))
def test_opcheck_conv_bn_act_backends(backend):
    torch.library.opcheck(
        conv_bn_act.default, arguments(operands_of(dtype=torch.float32, without=VECTORS), "relu", backend)
    )


@pytest.mark.parametrize("index", range(25))
def test_opcheck_random_problems(index):
    """Fake tensors and compiled graphs agree with the real output on shape, dtype and strides, for odd ones too."""
    case = testing.case_at(seed=1, index=index)
    if not all(tensor.numel() for tensor in case.tensors.values()):
        case = testing.case_at(seed=2, index=index)  # opcheck cannot clone empty tensors; those are tested below
    if case.problem.op == "add_relu":
        args = (case.operands.a, case.operands.b, "auto")
    else:
        p = case.problem
        args = (*case.operands, p.stride, p.padding, p.dilation, p.groups, p.activation, "auto")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.fused_resnet, case.problem.op).default, args, test_utils=checks)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_opcheck_add_relu(layout):
    a, b = (testing.laid_out(torch.randn(2, 3, 4, 5), layout).requires_grad_() for _ in "ab")
    torch.library.opcheck(add_relu.default, (a, b, "auto"))
    torch.library.opcheck(
        torch.ops.fused_resnet.add_relu_backward.default, (torch.randn(2, 3, 4, 5), a.detach(), "auto")
    )


def test_opcheck_cpu_add_relu():
    needs_cpu_library()
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.library.opcheck(torch.ops.fused_resnet.cpu_add_relu.default, (a, b, torch.empty_like(a)))


def device_of(backend):
    """Where Triton's kernels run: on the GPU where there is one, else in the interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", ((2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (1, 3, 4, 1), (0, 3, 4, 5)))
@pytest.mark.parametrize("memory_format", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("backend", ("eager", "onednn", "triton"))
def test_strides_are_the_promised_ones(shape, backend, memory_format):
    """Dimensions of size 1 and 0 may have any stride; Inductor still counts on the ones that the fake gives."""
    N, K, P, Q = shape
    device = device_of(backend)
    x, weight = torch.randn(N, 4, P, Q, device=device), torch.randn(K, 4, 1, 1, device=device)
    layout = {"channels_last": memory_format == torch.channels_last}
    for residual in (None, torch.randn(shape, device=device)):
        operands = ConvOperands(x, weight, residual=residual)
        args = (*operands, (1, 1), (0, 0), (1, 1), 1, "relu")
        with FakeTensorMode() as mode:
            fakes = (mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in args)
            fake = conv_bn_act(*fakes, backend, **layout)
        real = conv_bn_act(*args, backend, **layout)
        assert real.shape == fake.shape == shape
        assert real.stride() == fake.stride() == torch.empty(shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("backend", ("eager", "triton", "cpu"))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_add_relu_keeps_the_layout_of_a(backend, layout):
    if backend == "cpu":
        needs_cpu_library()
    device = device_of(backend)
    a = testing.laid_out(torch.randn(2, 3, 4, 5, device=device), layout)
    other, permuted = torch.randn(2, 3, 4, 5, device=device), torch.randn(5, 4, 3, 2, device=device)
    for b in (a.clone(), other, permuted.permute(3, 2, 1, 0)):
        with FakeTensorMode() as mode:
            fake = add_relu(mode.from_tensor(a), mode.from_tensor(b), backend)
        real = add_relu(a, b, backend)
        assert real.stride() == fake.stride() == torch.empty_like(a).stride()
        assert torch.equal(real, torch.relu(a + b))


def needs_cpu_library():
    from fused_resnet.kernels import compiled

    reason = compiled.load("cpu")
    if reason is not None:
        pytest.skip(f"the C++ library for the CPU: {reason}")


def test_meta_device():
    out = conv_bn_act(*arguments(operands_of().map(lambda tensor: tensor.to("meta"))))
    assert out.device.type == "meta" and out.shape == (2, 6, 3, 2) and out.stride() == (36, 1, 12, 6)
    assert add_relu(out, out, "auto").device.type == "meta"


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("present", [c for n in range(5) for c in itertools.combinations(VECTORS, n)], ids="-".join)
def test_gradcheck(activation, present):
    """Against finite differences in fp64, for every subset of the BN vectors."""
    operands = operands_of(without=[name for name in VECTORS if name not in present])
    function, tensors = as_function(requiring_grad(away_from_kinks(operands, activation)), activation)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_entry_by_entry(activation):
    operands = operands_of(N=1, C=2, K=2, H=3, W=4, without=("bias",))
    function, tensors = as_function(requiring_grad(away_from_kinks(operands, activation)), activation)
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation):
    operands = operands_of(N=1, C=2, K=2, H=3, W=4)
    function, tensors = as_function(requiring_grad(away_from_kinks(operands, activation)), activation)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_for_double_backward_are_the_same(activation):
    """create_graph may take another formula; gradgradcheck alone would not notice that it is wrong."""
    function, tensors = as_function(requiring_grad(operands_of()), activation)
    once = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    twice = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    for a, b in zip(once, twice):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_gradcheck_add_relu():
    a = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    b = torch.where(torch.rand_like(a) < 0.5, 1.5, -1.5) - a
    tensors = [tensor.requires_grad_() for tensor in (a, b)]
    assert torch.autograd.gradcheck(lambda a, b: add_relu(a, b, "eager"), tensors)
    assert torch.autograd.gradgradcheck(lambda a, b: add_relu(a, b, "eager"), tensors)


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_one_gradient_alone_is_the_same(wanted):
    """Each combination of needs_input_grad takes another way through the backward."""
    operands = operands_of()
    function, tensors = as_function(requiring_grad(operands), "silu")
    together = dict(zip(DIFFERENTIABLE, torch.autograd.grad(function(*tensors).square().sum(), tensors)))
    for tensor in tensors:
        tensor.requires_grad_(False)
    alone = getattr(operands, wanted).requires_grad_()
    (gradient,) = torch.autograd.grad(function(*tensors).square().sum(), alone)
    torch.testing.assert_close(gradient, together[wanted], rtol=1e-12, atol=1e-12)


def test_statistics_are_constants():
    operands = operands_of()
    operands.bn_mean.requires_grad_()
    operands.x.requires_grad_()
    conv_bn_act(*arguments(operands)).sum().backward()
    assert operands.x.grad is not None and operands.bn_mean.grad is None


def test_an_output_without_activation_may_be_written_to():
    """As that of torch's batch_norm: the gradient does not depend on it."""
    function, tensors = as_function(requiring_grad(operands_of()), "none")
    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    out = function(*tensors)
    out += 1
    for gradient, wanted in zip(torch.autograd.grad(out.sum(), tensors), expected):
        assert torch.equal(gradient, wanted)


def test_gradients_have_the_dtype_and_device_of_their_tensors():
    operands = operands_of(dtype=torch.bfloat16)
    operands = operands._replace(bn_weight=operands.bn_weight.float(), bias=operands.bias.half())
    conv_bn_act(*arguments(requiring_grad(operands))).sum().backward()
    for name in DIFFERENTIABLE:
        tensor = getattr(operands, name)
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape, name


def test_add_relu_gradient_where_the_sum_is_zero_or_not_a_number():
    """As torch.relu: nothing at 0, through at NaN, and a zero whatever an infinite gradient says."""
    a = torch.tensor([0.0, -1.0, float("nan"), 2.0], requires_grad=True)
    expected = torch.tensor([0.0, -1.0, float("nan"), 2.0], requires_grad=True)
    grad = torch.tensor([5.0, float("inf"), 3.0, 4.0])
    add_relu(a, torch.zeros(4), "auto").backward(grad)
    torch.relu(expected + torch.zeros(4)).backward(grad)
    assert torch.equal(a.grad, expected.grad)


# ------------------------------------------------------------------------------------------------------- transforms


def _plain(operands, activation):
    """The same by torch's own operators."""
    o, window = operands, ((2, 1), (1, 0), (1, 2), 2)
    y = F.conv2d(o.x, o.weight, o.bias, *window)
    y = F.batch_norm(y, o.bn_mean, o.bn_var, o.bn_weight, o.bn_bias, eps=o.eps) + o.residual
    return {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[activation](y)


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode_of_a_direct_call(activation, requires_grad):
    operands = operands_of()
    names = ("x", "bn_weight", "residual")

    def tangent(function):
        torch.manual_seed(0)
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(
                    (value := getattr(operands, name).clone().requires_grad_(requires_grad)), torch.randn_like(value)
                )
                for name in names
            }
            return forward_ad.unpack_dual(function(operands._replace(**duals))).tangent

    actual = tangent(lambda o: conv_bn_act(*arguments(o, activation)))
    expected = tangent(lambda o: _plain(o, activation))
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_forward_mode_of_add_relu_and_its_gradient():
    a, b, tangent = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64)
    for direct, plain in (
        (lambda a: add_relu(a, b, "auto"), lambda a: torch.relu(a + b)),
        (lambda a: torch.ops.fused_resnet.add_relu_backward(a, b, "auto"), lambda a: a * (b > 0)),
    ):
        for actual, expected in zip(*(torch.func.jvp(f, (a,), (tangent,)) for f in (direct, plain))):
            assert torch.equal(actual, expected) and expected.any()


def test_transforms_of_direct_calls():
    """Reverse mode of torch.func, forward over reverse, and a batch of gradients."""
    operands = operands_of(N=1)

    def loss(function, x):
        return function(operands._replace(x=x)).square().sum()

    x, tangent = operands.x, torch.randn_like(operands.x)
    direct = torch.func.grad(lambda x: loss(lambda o: conv_bn_act(*arguments(o, "silu")), x))
    plain = torch.func.grad(lambda x: loss(lambda o: _plain(o, "silu"), x))
    torch.testing.assert_close(direct(x), plain(x))
    torch.testing.assert_close(torch.func.vmap(direct)(x[None]), plain(x)[None])
    torch.testing.assert_close(torch.func.jvp(direct, (x,), (tangent,))[1], torch.func.jvp(plain, (x,), (tangent,))[1])


def test_transforms_refuse_what_the_operators_refuse():
    with pytest.raises(ValueError, match="must have the same shape"):
        torch.func.jvp(lambda a: add_relu(a, a[:1], "auto"), (torch.ones(2, 3),), (torch.ones(2, 3),))
    operands = operands_of()
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        torch.func.grad(lambda x: conv_bn_act(*arguments(operands._replace(residual=x))).sum())(operands.x)


# ------------------------------------------------------------------------------------------------- autocast and flops


def test_autocast_casts_activations_and_leaves_vectors():
    seen = {}
    operands = requiring_grad(operands_of(dtype=torch.float32))

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is conv_bn_act.default:
                seen.update(ConvOperands(*args[:9])._asdict())
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        out = conv_bn_act(*arguments(operands))
    cast = [name for name, value in seen.items() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16]
    assert cast == ["x", "weight", "residual"] and out.dtype == torch.bfloat16
    assert all(seen[name].dtype == torch.float32 for name in (*VECTORS, "bias"))
    out.sum().backward()
    assert {getattr(operands, name).grad.dtype for name in DIFFERENTIABLE} == {torch.float32}


def test_autocast_equals_casting_by_hand():
    operands = operands_of(dtype=torch.float32)
    by_hand = operands._replace(**{name: getattr(operands, name).bfloat16() for name in ("x", "weight", "residual")})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv_bn_act(*arguments(operands)), conv_bn_act(*arguments(by_hand)))
        assert add_relu(operands.x, operands.x.bfloat16(), "auto").dtype == torch.bfloat16
        assert conv_bn_act(*arguments(operands_of(dtype=torch.float64))).dtype == torch.float64
    assert conv_bn_act(*arguments(operands)).dtype == torch.float32


@pytest.mark.parametrize("activation", ("relu", "none"))
def test_flops_are_those_of_the_convolution(activation):
    operands = requiring_grad(operands_of(dtype=torch.float32))
    fused, plain = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with fused:
        out = conv_bn_act(*arguments(operands, activation))
        forward = fused.get_total_flops()
        out.sum().backward()
    with plain:
        out = torch.conv2d(operands.x, operands.weight, operands.bias, (2, 1), (1, 0), (1, 2), 2)
        expected = plain.get_total_flops()
        out.sum().backward()
    assert forward == expected > 0
    assert fused.get_total_flops() == plain.get_total_flops()
    with FlopCounterMode(display=False) as added:
        add_relu(operands.residual, operands.residual, "auto").sum().backward()
    assert added.get_total_flops() == 0


# ------------------------------------------------------------------------------------------------------------- export


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.operands = operands_of(dtype=torch.float32)

    def forward(self, x):
        return add_relu(conv_bn_act(*arguments(self.operands._replace(x=x))), self.operands.residual, "auto")


def test_export_keeps_the_operators_and_reloads_in_a_fresh_process(tmp_path):
    model, x = Both(), torch.randn(2, 4, 5, 4)
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes if "fused_resnet" in str(node.target)]
    assert targets == ["fused_resnet.conv_bn_act.default", "fused_resnet.add_relu.default"]
    torch.export.save(program, tmp_path / "both.pt2")
    torch.save((x, model(x)), tmp_path / "values.pt")
    code = (
        "import sys, torch, fused_resnet\n"
        "x, expected = torch.load(sys.argv[1] + '/values.pt')\n"
        "program = torch.export.load(sys.argv[1] + '/both.pt2')\n"
        "assert torch.equal(program.module()(x), expected)\n"
        "print('equal')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_aot_autograd_keeps_the_operators_in_both_directions():
    graphs = {}

    def keep(name):
        def compiler(graph, example):
            graphs[name] = [str(node.target) for node in graph.graph.nodes if "fused_resnet" in str(node.target)]
            return graph

        return compiler

    from functorch.compile import aot_function

    operands = operands_of(dtype=torch.float32, without=("bn_mean", "bn_var"))
    function, tensors = as_function(requiring_grad(operands), "silu", "auto")
    compiled = aot_function(lambda *t: add_relu(function(*t), t[-1], "auto"), keep("forward"), keep("backward"))
    gradients = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    expected = torch.autograd.grad(add_relu(function(*tensors), tensors[-1], "auto").sum(), tensors)
    assert graphs["forward"] == ["fused_resnet.conv_bn_act.default", "fused_resnet.add_relu.default"]
    assert graphs["backward"] == ["fused_resnet.add_relu_backward.default", "fused_resnet.conv_bn_act.default"]
    for gradient, wanted in zip(gradients, expected):
        torch.testing.assert_close(gradient, wanted)
