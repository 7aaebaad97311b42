"""The CPU's blocked convolution as a backend: right on awkward shapes, what it refuses, and when `auto` takes it.
Its micro-kernels: regions/test_convolutions.py. Several convolutions in one call: freezing/test_regions.py."""

import pytest
import torch

import fused_resnet
from fused_resnet import backends, choosing, models, testing
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.kernels import compiled
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.regions import kernels
from tests.support import networks

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

RECORD = backends.known("conv_bn_act")["blocked"]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if kernels.why_none(dtype) is None]


def case_of(shape, dtype=torch.float32, window=((1, 1), (0, 0), (1, 1)), has_residual=False, **options):
    N, C, H, W, K, R, S = shape
    x = torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(K, C, R, S) / (C * R * S) ** 0.5).to(dtype), torch.randn(K).to(dtype)
    operands = ConvOperands(x, weight, bias=bias)
    problem = conv_problem(operands, *window, 1, options.get("activation", "relu"))
    if has_residual:
        residual = torch.randn(problem.output_shape).to(dtype).contiguous(memory_format=torch.channels_last)
        problem, operands = problem._replace(has_residual=True), operands._replace(residual=residual)
    return testing.Case(problem, operands)


def call(case, into_residual=False):
    o = case.operands
    packed = RECORD.plan.pack(case.problem, o.weight, None)
    return RECORD.plan.bind(case.problem, packed, o.bias, into_residual=into_residual)(o.x, o.residual)


SHAPES = [
    ((1, 3, 32, 30, 64, 7, 7), ((2, 2), (3, 3), (1, 1))),
    ((2, 517, 5, 6, 17, 3, 2), ((1, 1), (1, 0), (1, 1))),
    ((3, 5, 9, 8, 7, 2, 5), ((3, 2), (1, 3), (2, 1))),
    ((1, 1, 1, 1, 1, 1, 1), ((1, 1), (0, 0), (1, 1))),
    ((2, 4, 2, 2, 18, 3, 3), ((1, 1), (6, 9), (1, 1))),  # outputs that see padding alone
    ((1, 8, 40, 40, 3, 40, 40), ((1, 1), (0, 0), (1, 1))),
    ((3, 6, 5, 2, 9, 3, 7), ((1, 2), (1, 3), (1, 1))),  # wider than the image
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, window", SHAPES, ids=str)
def test_every_element_is_as_exact_as_its_sum(shape, window, dtype):
    outcome = testing.check(case_of(shape, dtype, window, activation="none"), "blocked")
    assert outcome.status == "ok", outcome.detail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_may_replace_the_residual(dtype):
    case = case_of((2, 40, 5, 6, 21, 3, 3), dtype, ((1, 1), (1, 1), (1, 1)), has_residual=True)
    assert testing.check(case, "blocked").status == "ok"
    expected = call(case)
    y = call(case, into_residual=True)
    assert y.data_ptr() == case.operands.residual.data_ptr() and torch.equal(y, expected)


@pytest.mark.parametrize("change, sentence", [
    (dict(dtype=torch.float16), "float16 is not supported"),
    (dict(device="cuda"), "it runs on the CPU"),
    (dict(has_bn=True), "folded BN"),
    (dict(groups=2), "convolutions of one group, not of 2"),
    (dict(H=0, padding=(2, 2)), "a map of one pixel at least, not 0x4"),
    (dict(R=1025, padding=(600, 1)), "at most 1024 pixels high and wide, not 1025x3"),
    (dict(N=2**24 + 1), "sizes are at most 16777216, not 16777217"),
])  # fmt: skip
def test_what_it_cannot_run_it_says(change, sentence):
    problem = case_of((1, 8, 4, 4, 8, 3, 3)).problem
    assert RECORD.why_not(problem) is None
    assert sentence in RECORD.why_not(problem._replace(**change))


def test_a_dtype_without_a_kernel_is_refused(monkeypatch):
    lacking = [kernel._replace(why_not="no tiles") for kernel in kernels.table() if kernel.dtype == torch.bfloat16]
    monkeypatch.setattr(kernels, "table", lambda: lacking)
    problem = case_of((1, 8, 4, 4, 8, 3, 3), torch.bfloat16).problem
    assert RECORD.why_not(problem) == "no micro-kernel for bfloat16 runs here (amx_bf16: no tiles)"


def test_auto_takes_it_where_that_was_measured():
    problem = case_of((1, 64, 14, 14, 64, 1, 1)).problem
    assert choosing.fixed_order(problem, in_plan=True).backend.name != "blocked"
    assert "blocked" in {choice.backend.name for choice in choosing.candidates.candidates(problem)[0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_frozen_by_name(dtype):
    model, x = networks.randomize(models.resnet18(num_classes=10)), torch.randn(2, 3, 65, 64)
    frozen = fused_resnet.freeze(model, x, dtype=dtype, backend="blocked")
    convs = [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]
    assert len(convs) == 20 and {conv.backend.name for conv in convs} == {"blocked"}
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(dtype):
    assert call(case_of((0, 8, 5, 5, 24, 3, 3), dtype)).shape == (0, 24, 3, 3)
