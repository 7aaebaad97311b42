"""Problems as values: derived sizes, how they print, are read back, and every refusal, by its message."""

import itertools

import pytest
import torch

from fused_resnet import BackendError, backends, functional, testing
from fused_resnet.operators.describe import add_relu_problem, conv_problem, is_dense
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, parsed_problem

RESNET_STEM = ConvProblem(
    2, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", True, False, False, torch.float16, "cuda"
)  # fmt: skip


def conv(x=(2, 6, 5, 7), weight=(8, 3, 3, 3), **options):
    """conv_bn_act on ones of these shapes: a valid call unless an option spoils it."""
    options = {"groups": 2, "padding": 1, **options}
    vectors = {name: options.pop(name) for name in ConvOperands._fields[2:6] if name in options}
    as_tensor = (torch.ones(value) if isinstance(value, tuple) else value for value in (x, weight))
    return functional.conv_bn_act(*as_tensor, **vectors, **options)


def test_reads_x_says_whether_any_window_reaches_a_pixel():
    """Against every window of every small axis; the other axis always reaches."""
    found = set()
    for size, taps, stride, padding, dilation in itertools.product(
        range(1, 5), (1, 2, 3), range(1, 6), range(6), (1, 3)
    ):
        outputs = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        if outputs <= 0:
            continue
        pixels = {p * stride + r * dilation - padding for p in range(outputs) for r in range(taps)}
        wanted = not pixels.isdisjoint(range(size))
        window = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
        problem = RESNET_STEM._replace(H=size, W=9, R=taps, S=1, **window)
        turned = {name: pair[::-1] for name, pair in window.items()}
        assert problem.reads_x == wanted, problem
        assert problem._replace(H=9, W=size, R=1, S=taps, **turned).reads_x == wanted, problem
        found.add(wanted)
    assert found == {True, False}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_convolution_of_padding_alone_is_its_bias(dtype):
    """torch.conv2d ends the process here (oneDNN issue 5942): stride 2 passes the only column by on both sides."""
    x, weight = (
        torch.randn(shape).to(dtype, memory_format=torch.channels_last) for shape in ((1, 56, 17, 1), (5, 56, 1, 1))
    )
    bias, window = torch.randn(5).to(dtype), {"stride": (1, 2), "padding": 1, "dilation": 2}
    for backend in ("auto", "eager", "onednn"):
        if backend == "onednn" and backends.onednn_missing(dtype) is not None:
            continue
        y = functional.conv_bn_act(x, weight, bias=bias, backend=backend, **window)
        assert y.stride() == torch.empty(1, 5, 19, 2).contiguous(memory_format=torch.channels_last).stride()
        assert torch.equal(y, bias.relu().view(1, -1, 1, 1).expand(1, 5, 19, 2))


def test_derived_sizes():
    assert RESNET_STEM.output_shape == (2, 64, 112, 112)
    assert RESNET_STEM.reduction == 147
    assert RESNET_STEM.flops == 2 * 2 * 64 * 112 * 112 * 147
    elements = 2 * 3 * 224 * 224 + 64 * 147 + 2 * 64 * 112 * 112
    assert RESNET_STEM.bytes_moved == 2 * elements
    assert RESNET_STEM._replace(has_residual=True).bytes_moved == 2 * (elements + 2 * 64 * 112 * 112)


@pytest.mark.parametrize("stride, padding, dilation", (((1, 1), (0, 0), (1, 1)), ((3, 2), (2, 1), (1, 2))))
@pytest.mark.parametrize("H, W", ((9, 9), (10, 13)))
def test_output_shape_is_torchs(stride, padding, dilation, H, W):
    operands = ConvOperands(torch.ones(1, 4, H, W), torch.ones(6, 2, 3, 4))
    problem = conv_problem(operands, stride, padding, dilation, 2, "relu")
    assert problem.output_shape == torch.conv2d(*operands[:2], None, stride, padding, dilation, 2).shape


def test_what_is_pointwise():
    pointwise = RESNET_STEM._replace(R=1, S=1, stride=(1, 1), padding=(0, 0))
    assert pointwise.is_pointwise
    for change in ({"R": 2}, {"S": 3}, {"stride": (1, 2)}, {"padding": (0, 1)}):
        assert not pointwise._replace(**change).is_pointwise, change


def test_how_problems_print():
    assert str(RESNET_STEM) == "2x3x224x224 -> 64, 7x7 s2 p3 float16 bn relu"
    odd = RESNET_STEM._replace(stride=(2, 1), groups=3, has_bn=False, has_bias=True, has_residual=True)
    assert str(odd) == "2x3x224x224 -> 64, 7x7 s(2, 1) p3 g3 float16 bias+add relu"
    assert str(add_relu_problem(torch.ones(2, 3), torch.ones(2, 3))) == "2x3 float32"


def test_a_problem_is_read_back_from_what_is_printed():
    cases = (testing.case_at(11, index) for index in range(150))
    problems = {case.problem for case in cases if case.problem.op == "conv_bn_act" and case.problem.N}
    assert len(problems) > 80
    for one in problems:
        assert parsed_problem(f" {one} ", "cpu") == one


@pytest.mark.parametrize(
    "text",
    (
        "", "resnet50", "1x4x4x4 -> 4, 3x3 s0 float32 plain relu", "0x4x4x4 -> 4, 3x3 float32 plain relu",
        "1x4x2x2 -> 4, 3x3 float32 plain relu", "1x4x4x4 -> 4, 3x3 g3 float32 plain relu",
        "1x4x4x4 -> 4, 3x3 int32 plain relu", "1x4x4x4 -> 4, 3x3 float32 plain gelu",
        "1x4x4x4 -> 4, 3x3 float32 bias+bn relu", "1x4x4x4 -> 4, 3x3 Tensor plain relu",
    ),
)  # fmt: skip
def test_what_is_no_problem_is_refused(text):
    with pytest.raises(ValueError, match="is no convolution|has no output"):
        parsed_problem(text, "cpu")


def test_density():
    x = torch.ones(2, 3, 4, 5)
    dense = (x, x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, :, :, :0])
    sparse = (x[:, ::2], x[..., 1:], x[:1].expand(2, 3, 4, 5))
    assert [is_dense(view) for view in (*dense, *sparse)] == [True] * 4 + [False] * 3
    assert add_relu_problem(x, x).same_dense_layout
    assert not add_relu_problem(x, dense[1]).same_dense_layout
    assert not add_relu_problem(sparse[0], sparse[0]).same_dense_layout


VECTOR = torch.ones(8)
REFUSED = {
    "x of rank 3": (
        dict(x=(6, 5, 7)), ValueError, r"x must have 4 dimensions, \(N, C, H, W\), got 3 with shape \(6, 5, 7\)"),
    "weight of rank 2": (dict(weight=(8, 3)), ValueError, r"weight must have 4 dimensions, \(K, C/groups, R, S\)"),
    "channels": (
        dict(x=(2, 4, 5, 7)), ValueError,
        r"weight has 3 input channels per group but x has 4 \(groups=2\): x needs 6 channels"),
    "K and groups": (dict(weight=(7, 3, 3, 3)), ValueError, "7 output channels cannot be split into groups=2"),
    "no groups": (dict(groups=0), ValueError, "groups must be at least 1, got 0"),
    "no filters": (dict(weight=(0, 3, 3, 3)), ValueError, r"weight of shape \(0, 3, 3, 3\) has an empty dimension"),
    "empty filter": (dict(weight=(8, 3, 0, 3)), ValueError, "has an empty dimension"),
    "weight dtype": (
        dict(weight=torch.ones(8, 3, 3, 3).half()), TypeError,
        "weight has dtype float16 but x has float32. Convert one of them, or use torch.autocast"),
    "residual dtype": (
        dict(residual=torch.ones(2, 8, 5, 7).double()), TypeError, "residual has dtype float64 but x has float32"),
    "weight device": (
        dict(weight=torch.ones(8, 3, 3, 3, device="meta")), TypeError, "weight is on meta but x is on cpu. Move one"),
    "vector device": (dict(bn_mean=VECTOR.to("meta")), TypeError, "bn_mean is on meta but x is on cpu"),
    "residual shape": (
        dict(residual=torch.ones(2, 8, 5, 6)), ValueError,
        r"residual must have the output's shape \(2, 8, 5, 7\), got \(2, 8, 5, 6\)"),
    "residual to broadcast": (dict(residual=torch.ones(1, 8, 1, 1)), ValueError, "must have the output's shape"),
    **{
        f"{name} length": (
            {name: torch.ones(6)}, ValueError,
            rf"{name} must have shape \(8,\), one value per output channel, got \(6,\)")
        for name in ("bn_weight", "bn_bias", "bn_mean", "bn_var", "bias")
    },
    "vector rank": (dict(bn_var=VECTOR.view(1, 8)), ValueError, r"bn_var must have shape \(8,\)"),
    "double vector": (
        dict(bn_var=VECTOR.double()), TypeError,
        "bn_var has dtype float64; with x in float32 it may be float32, float16, bfloat16"),
    "integer vector": (dict(bias=VECTOR.int()), TypeError, "bias has dtype int32"),
    "zero stride": (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    "half zero stride": (dict(stride=(1, 0)), ValueError, r"stride must be at least 1, got \(1, 0\)"),
    "negative padding": (dict(padding=(-1, 0)), ValueError, r"padding must be at least 0, got \(-1, 0\)"),
    "zero dilation": (dict(dilation=0), ValueError, "dilation must be at least 1, got 0"),
    "triple stride": (dict(stride=(1, 1, 1)), ValueError, "stride must be an int or a pair"),
    "no output": (
        dict(x=(2, 6, 5, 2), padding=0), ValueError,
        r"the output would be empty \(3 x 0\): a 3x3 filter with dilation 1 does not fit into 5x2 with padding 0"),
    "complex x": (dict(x=torch.ones(2, 6, 5, 7) * 1j), TypeError, "x has dtype complex64; float32, float16, bfloat16"),
    "integer x": (dict(x=torch.ones(2, 6, 5, 7).int()), TypeError, "x has dtype int32"),
    "activation": (
        dict(activation="gelu"), ValueError, "unknown activation 'gelu'; known ones are none, relu, relu6, silu"),
    "backend": (
        dict(backend="tpu"), BackendError,
        "unknown backend 'tpu' for conv_bn_act; known ones are auto, .*onednn, direct, blocked, cudnn, cuda, .*triton, .*eager"),
    "forced cudnn": (
        dict(backend="cudnn"), BackendError,
        "backend 'cudnn' cannot run this: it runs on NVIDIA GPUs, the tensors are on cpu. "
        "Use backend='eager' or 'auto'. The problem: 2x6x5x7 -> 8, 3x3 p1 g2 float32 plain relu"),
    "forced onednn": (
        dict(bn_mean=VECTOR, backend="onednn"), BackendError,
        "backend 'onednn' cannot run this: it takes only a bias, so it needs folded BN: use fused_resnet.freeze"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, message", REFUSED.values(), ids=REFUSED)
def test_conv_bn_act_refuses(options, error, message):
    assert conv().shape == (2, 8, 5, 7)
    with pytest.raises(error, match=message):
        conv(**options)


@pytest.mark.parametrize("options, error, message", REFUSED.values(), ids=REFUSED)
def test_conv_bn_act_refuses_before_autograd(options, error, message):
    """The same sentences when a gradient is wanted, which takes another way through the dispatcher."""
    x = options.get("x", (2, 6, 5, 7))
    x = torch.ones(x) if isinstance(x, tuple) else x
    if x.dtype.is_floating_point:
        x.requires_grad_()
    with pytest.raises(error, match=message):
        conv(**{**options, "x": x})


@pytest.mark.parametrize(
    "a, b, options, error, message",
    (
        (torch.ones(2, 3), torch.ones(3), {}, ValueError, r"same shape, got \(2, 3\) and \(3,\)"),
        (torch.ones(2), torch.ones(2).half(), {}, TypeError, "b has dtype float16 but a has float32"),
        (torch.ones(2), torch.ones(2, device="meta"), {}, TypeError, "b is on meta but a is on cpu"),
        (torch.ones(2).int(), torch.ones(2).int(), {}, TypeError, "a has dtype int32; float32, float16, bfloat16"),
        (torch.ones(2) * 1j, torch.ones(2) * 1j, {}, TypeError, "a has dtype complex64"),
        (
            torch.ones(2),
            torch.ones(2),
            {"backend": "tpu"},
            BackendError,
            "known ones are auto, cpu, cuda, triton, eager",
        ),
        (torch.ones(2), torch.ones(2), {"backend": "cuda"}, BackendError, "'cuda' cannot run this: it runs on NVIDIA"),
    ),
)
def test_add_relu_refuses(a, b, options, error, message):
    with pytest.raises(error, match=message):
        functional.add_relu(a, b, **options)
