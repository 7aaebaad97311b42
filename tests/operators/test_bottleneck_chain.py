"""bottleneck_chain: what it computes, what it refuses, and what it promises to compilers."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import backends
from fused_resnet.operators import reference
from fused_resnet.operators.describe import chain_problem
from fused_resnet.operators.operands import ChainOperands
from fused_resnet.operators.problem import ACTIVATIONS
from tests.support.chains import chain_operands, errors_of

bottleneck_chain = torch.ops.fused_resnet.bottleneck_chain
# N, C, H, W, K, L
SHAPES = ((2, 8, 5, 7, 24, 12), (1, 16, 9, 3, 32, 0), (3, 4, 1, 1, 8, 5), (1, 5, 4, 1, 7, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_torch_nn_s(shape, activation):
    o = chain_operands(shape, torch.float64)
    act = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[activation]
    t = act(F.conv2d(o.x, o.weight, o.bias, padding=1))
    y = act(F.conv2d(t, o.expand_weight, o.expand_bias) + o.residual)
    found = reference.bottleneck_chain(chain_problem(o, activation), o)
    torch.testing.assert_close(found.y, y, rtol=1e-13, atol=1e-13)
    if shape[-1]:
        reduced = act(F.conv2d(y, o.reduce_weight, o.reduce_bias))
        torch.testing.assert_close(found.reduced, reduced, rtol=1e-13, atol=1e-13)
    else:
        assert found.reduced is None


def test_by_hand():
    """One channel and two pixels that are not zero, in opposite corners of a map of four."""
    x = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    filter = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    one = torch.ones(1, 1, 1, 1)
    o = ChainOperands(
        x, torch.full_like(x, -20.0), filter, torch.tensor([1.0]), 2 * one, torch.tensor([3.0]),
        -one, torch.tensor([30.0]),
    )  # fmt: skip
    # 3x3: [5 + 18, 4 + 16; 2 + 12, 1 + 10] + 1; expansion: twice that, + 3 - 20; reduction: 30 less that
    y, reduced = bottleneck_chain(*o, "relu", "eager")
    assert y.flatten().tolist() == [31.0, 25.0, 13.0, 7.0]
    assert reduced.flatten().tolist() == [0.0, 5.0, 17.0, 23.0]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_is_within_the_bound(shape, dtype):
    for activation in ACTIVATIONS:
        o = chain_operands(shape, dtype)
        outputs = bottleneck_chain(*o, activation, "auto")
        assert max(errors_of(o, activation, outputs, stored=dtype)) <= 1
        for tensor in outputs[: 2 if shape[-1] else 1]:
            assert tensor.dtype == dtype and tensor.is_contiguous(memory_format=torch.channels_last)
        assert outputs[1].shape == ((shape[0], shape[-1], *shape[2:4]) if shape[-1] else (0,))


@pytest.mark.parametrize("wrong", ("a weight", "the residual", "a rounding"))
def test_the_bound_sees_small_errors(wrong):
    o = chain_operands(SHAPES[0], torch.float16)
    right = reference.bottleneck_chain(chain_problem(o, "relu"), o)
    if wrong == "a rounding":  # to bf16's significand
        outputs = [each.to(torch.bfloat16) for each in right]
    else:
        changed = {"a weight": "weight", "the residual": "residual"}[wrong]
        other = o._replace(**{changed: getattr(o, changed) * 1.05})
        outputs = bottleneck_chain(*other, "relu", "eager")
    assert max(errors_of(o, "relu", outputs)) > 1


def test_other_layouts_give_the_same():
    o = chain_operands(SHAPES[0], torch.float32)
    expected = bottleneck_chain(*o, "relu", "auto")
    for moved in (o.map(lambda t: t.contiguous()), o.map(lambda t: torch.stack((t, t), -1)[..., 0])):
        for one, other in zip(bottleneck_chain(*moved, "relu", "auto"), expected):
            torch.testing.assert_close(one, other)
            assert one.stride() == other.stride()


# ----------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("shape", (*SHAPES, (0, 4, 3, 3, 8, 4)), ids=str)
def test_fakes_have_the_real_strides(shape):
    o = chain_operands(shape, torch.float32)
    with FakeTensorMode() as mode:
        fakes = bottleneck_chain(*o.map(mode.from_tensor), "relu", "auto")
    for real, fake in zip(bottleneck_chain(*o, "relu", "auto"), fakes):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("needs_grad", (False, True))
def test_opcheck(shape, needs_grad):
    o = chain_operands(shape, torch.float32).map(lambda tensor: tensor.requires_grad_(needs_grad))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")  # "test_aot_dispatch_dynamic": 5 s each
    torch.library.opcheck(bottleneck_chain.default, (*o, "relu", "auto"), test_utils=checks)


def test_compiled_graphs_hold_it():
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    o = chain_operands(SHAPES[0], torch.float32)
    compiled = torch.compile(
        lambda *tensors: bottleneck_chain(*tensors, "relu", "auto"), backend=backend, fullgraph=True
    )
    for one, other in zip(compiled(*o), bottleneck_chain(*o, "relu", "auto")):
        assert torch.equal(one, other)
    assert bottleneck_chain in seen or bottleneck_chain.default in seen


def test_gradients_and_maps_are_those_of_aten():
    o = chain_operands((1, 2, 2, 2, 3, 2), torch.float64).map(lambda tensor: tensor.requires_grad_())

    def silu(*tensors):
        return bottleneck_chain(*tensors, "silu", "auto")

    assert torch.autograd.gradcheck(silu, tuple(o))
    xs = torch.randn(3, *o.x.shape, dtype=o.x.dtype)
    with torch.no_grad():
        mapped = torch.vmap(lambda x: silu(x, *o[1:])[1])(xs)
        one_by_one = torch.stack([silu(x, *o[1:])[1] for x in xs])
    torch.testing.assert_close(mapped, one_by_one)


def test_autocast_casts_maps_and_weights():
    o = chain_operands(SHAPES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = bottleneck_chain(*o, "relu", "auto")
    lower = o._replace(**{k: v.bfloat16() for k, v in o._asdict().items() if not k.endswith("bias")})
    for one, other in zip(outputs, bottleneck_chain(*lower, "relu", "auto")):
        assert torch.equal(one, other) and one.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_flops_are_the_convolutions(shape):
    o = chain_operands(shape, torch.float32)
    problem = chain_problem(o, "relu")
    with FlopCounterMode(display=False) as counter:
        bottleneck_chain(*o, "relu", "auto")
    N, C, H, W, K, L = shape
    assert counter.get_total_flops() == problem.flops == 2 * N * H * W * (9 * C * C + C * K + K * L)


def test_the_problem_in_words_and_bytes():
    o = chain_operands((2, 8, 5, 7, 24, 12), torch.float16)
    problem = chain_problem(o, "relu")
    assert str(problem) == "2x8x5x7 -> 24 -> 12 chain float16 relu"
    assert problem.bytes_moved == sum(2 * t.numel() for t in o if t.dim() == 4) + 2 * 70 * (24 + 12)
    assert [str(conv) for conv in problem.convolutions] == [
        "2x8x5x7 -> 8, 3x3 p1 float16 bias relu",
        "2x8x5x7 -> 24, 1x1 float16 bias+add relu",
        "2x24x5x7 -> 12, 1x1 float16 bias relu",
    ]
    assert str(problem._replace(L=0)) == "2x8x5x7 -> 24 chain float16 relu"


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED = (
    (dict(x=torch.zeros(8, 5, 7)), ValueError, "x must have 4 dimensions"),
    (dict(residual=torch.zeros(2, 24, 5, 6)), ValueError, r"residual must have shape \(2, 24, 5, 7\), got .*24, 5, 6"),
    (dict(weight=torch.zeros(8, 8, 1, 1)), ValueError, r"weight must have shape \(8, 8, 3, 3\)"),
    (dict(bias=torch.zeros(9)), ValueError, r"bias must have shape \(8,\)"),
    (dict(expand_weight=torch.zeros(24, 9, 1, 1)), ValueError, r"expand_weight must have shape \(24, 8, 1, 1\)"),
    (dict(expand_bias=torch.zeros(24, 1)), ValueError, r"expand_bias must have shape \(24,\), got \(24, 1\)"),
    (dict(reduce_weight=torch.zeros(12, 8, 1, 1)), ValueError, r"reduce_weight must have shape \(12, 24, 1, 1\)"),
    (dict(reduce_weight=None), ValueError, "only reduce_bias is given: give both"),
    (dict(reduce_bias=None), ValueError, "only reduce_weight is given: give both"),
    (dict(x=torch.zeros(2, 8, 5, 7, dtype=torch.int32)), TypeError, "x has dtype int32"),
    (dict(residual=torch.zeros(2, 24, 5, 7).half()), TypeError, "residual has dtype float16 but x has float32"),
    (dict(bias=torch.zeros(8).double()), TypeError, "bias has dtype float64"),
    (dict(residual=torch.zeros(2, 24, 5, 7, device="meta")), TypeError, "residual is on meta but x is on cpu"),
    (dict(x=torch.zeros(2, 8, 0, 7), residual=torch.zeros(2, 24, 0, 7)), ValueError, "empty dimension"),
)  # fmt: skip


@pytest.mark.parametrize("changes, kind, words", REFUSED, ids=[case[2] for case in REFUSED])
def test_refusals(changes, kind, words):
    o = chain_operands(SHAPES[0], torch.float32)._replace(**changes)
    with pytest.raises(kind, match=f"bottleneck_chain: .*{words}"):
        chain_problem(o, "relu")


def test_unknown_names_are_refused():
    o = chain_operands(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        bottleneck_chain(*o, "gelu", "auto")
    with pytest.raises(backends.BackendError, match="unknown backend 'cudnn' for bottleneck_chain"):
        bottleneck_chain(*o, "relu", "cudnn")
