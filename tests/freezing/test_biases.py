"""Which biases a plan moves, what it then computes, and that what is tuned and timed has them where plans do."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backends, measuring, models, testing
from fused_resnet.backends import record
from fused_resnet.freezing.make import planned_problems
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.measuring.summary import FOLDED
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.tuning import tuner
from tests.support import networks
from tests.support.plans import X, convolutions, needs_onednn
from tests.support.tuned_files import entry, own_files

EAGER = backends.known("conv_bn_act")["eager"]
tuned_files = pytest.fixture(own_files)


def test_a_bias_moves_to_the_convolution_that_adds_the_result():
    """Once in each block with a projection: its shortcut, which comes later, adds what the block computed."""
    model, x = networks.small(), torch.randn(X)
    found = convolutions(fused_resnet.freeze(model, x, backend="eager"), x)
    without = [conv for conv in found if conv.bias is None]
    projections = sum(block.downsample is not None for block in model.modules() if isinstance(block, BasicBlock))
    assert len(without) == projections > 0
    assert all(conv.problem.has_bias is (conv.bias is not None) for conv in found)
    assert all(conv.problem.activation == "none" and not conv.problem.has_residual for conv in without)


class Sum(nn.Module):
    """relu(conv(x) + shortcut(x)), or a variation of it."""

    def __init__(self, change="nothing"):
        super().__init__()
        self.change = change
        self.conv = nn.Conv2d(8 if change == "its own input" else 4, 8, 3, padding=1, bias=change != "no bias there")
        self.shortcut = nn.Conv2d(4, 8, 1, bias=change != "no bias here")

    def forward(self, x):
        skip = self.shortcut(x)
        x = skip if self.change == "its own input" else x
        skip = skip.relu() if self.change == "an activation" else skip
        out = (self.conv(x) + skip).relu()
        return out + skip if self.change == "read twice" else out


def without_bias(model, x, backend):
    """How many convolutions of its plan have no bias; the plan is right."""
    frozen = fused_resnet.freeze(model.eval(), x, backend=backend)
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-6
    return sum(conv.bias is None for conv in convolutions(frozen, x))


@pytest.mark.parametrize("change, expected", (
    ("nothing", 1),
    ("no bias there", 1),
    ("no bias here", 1),
    ("read twice", 0),
    ("an activation", 0),
    ("its own input", 0),
))  # fmt: skip
def test_which_biases_move(change, expected):
    assert without_bias(Sum(change), torch.randn(2, 4, 7, 7), "eager") == expected


@pytest.mark.parametrize("given, taken, is_moved", (
    (0.0, 1000.0, True), (65500.0, 1000.0, False), (0.0, 1100.0, False), (60000.0, -60000.0, False),
))  # fmt: skip
def test_a_bias_stays_where_an_fp16_sum_might_be_infinite(given, taken, is_moved):
    """given: to the convolution that adds. No GPU is needed to know."""
    model = Sum().half().eval()
    nn.init.constant_(model.conv.bias, given), nn.init.constant_(model.shortcut.bias, taken)
    x = torch.randn(2, 4, 7, 7).half()
    found = planned_problems(model, x, torch.float16, torch.device("cuda"))
    assert [problem.has_bias for problem in found] == ([False, True] if is_moved else [True, True])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", ("auto", "eager"))
def test_a_bias_that_cancels_its_convolution_stays_in_16_bits(dtype, backend):
    """Where ATen adds it before it rounds: without the bias the result is past fp16."""
    model, x = Sum().eval(), torch.full((1, 4, 7, 7), 18.0, dtype=dtype)
    with torch.no_grad():
        model.conv.weight.zero_(), model.conv.bias.zero_()
        model.shortcut.weight.fill_(1000.0), model.shortcut.bias.fill_(-60000.0)
    model = model.to(dtype)
    convs = convolutions(fused_resnet.freeze(model, x, backend=backend), x)
    assert all(conv.bias is not None for conv in convs)
    assert torch.equal(fused_resnet.freeze(model, x, backend=backend)(x), model(x))


def packing(name, why_not):
    """A backend that binds a packed weight where it runs."""

    def bind(problem, weight, bias, *, into_residual=False):
        return lambda x, residual=None: EAGER.run(problem, ConvOperands(x, weight, bias=bias, residual=residual))

    plan = backends.InPlan(bind=bind)
    return EAGER._replace(name=name, why_not=why_not, plan=plan, configs=None, origin="library")


@pytest.mark.parametrize("runs, moved", (
    (lambda problem: False, 1),
    (lambda problem: problem.R == 1, 0),
    (lambda problem: problem.R == 1 and problem.has_bias, 0),
    (lambda problem: problem.R == 1 and not problem.has_bias, 0),
    (lambda problem: problem.R == 3, 0),
    (lambda problem: problem.R == 3 and not problem.has_bias, 0),
    (lambda problem: problem.R == 3 and problem.has_bias, 0),
), ids=("nowhere", "shortcut", "shortcut, with", "shortcut, without", "sum", "sum, without", "sum, with"))  # fmt: skip
def test_a_bias_stays_where_a_weight_is_packed(monkeypatch, runs, moved):
    """Before it would move, or after that."""
    packs = packing("packs", lambda problem: None if runs(problem) else "not here")
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {"packs": packs, "eager": EAGER})
    model, x = Sum("no bias there").eval(), torch.randn(2, 4, 7, 7)
    frozen = fused_resnet.freeze(model, x)
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-6
    assert [conv.bias is not None for conv in convolutions(frozen, x)] == ([False, True] if moved else [True, False])


def test_a_bias_stays_where_the_backend_asked_for_could_not_run_without(monkeypatch):
    needs = EAGER._replace(name="needs", why_not=lambda problem: None if problem.has_bias else "there is no bias")
    monkeypatch.setitem(record.REGISTRY["conv_bn_act"], "needs", needs)
    assert without_bias(Sum(), torch.randn(2, 4, 7, 7), "needs") == 0


@needs_onednn
def test_where_eager_was_measured_faster_a_bias_does_not_move_to_what_nobody_measured(tuned_files):
    model, x = Sum(), torch.randn(2, 4, 7, 7)
    problems = [conv.problem for conv in convolutions(fused_resnet.freeze(model.eval(), x), x)]
    for problem in problems:
        tuned_files.add(tuned_files.user, problem, entry("eager"))
    convs = convolutions(fused_resnet.freeze(model, x), x)
    assert [(conv.problem, conv.backend.name) for conv in convs] == [(problem, "eager") for problem in problems]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_the_sum_is_as_right_as_its_two_convolutions(dtype):
    """Each may err by the reference's bound, the first one's error is added, and the moved bias is rounded once."""
    model, x = Sum().to(dtype).eval(), torch.randn(2, 4, 9, 7).to(dtype)
    conv, shortcut = model.conv, model.shortcut
    with torch.no_grad():
        frozen = fused_resnet.freeze(model, x, backend="eager")
        total = conv.bias.double() + shortcut.bias.double()
        operands = ConvOperands(x, shortcut.weight)
        skip = testing.Case(conv_problem(operands, (1, 1), (0, 0), (1, 1), 1, "none"), operands)
        operands = ConvOperands(x, conv.weight, bias=total.to(dtype), residual=skip.expected.to(dtype))
        added = testing.Case(conv_problem(operands, (1, 1), (1, 1), (1, 1), 1, "relu"), operands)
        rounding = reference.unit_roundoff(dtype) * total.abs().view(-1, 1, 1)
        # the skip is rounded twice: by the plan, and as the residual of this reference
        bound = testing.bound_of(added, "eager") + 2 * testing.bound_of(skip, "eager") + rounding
        assert sum(one.bias is None for one in convolutions(frozen, x)) == (dtype == torch.float32)
        assert ((frozen(x).double() - networks.in_fp64(model, x)).abs() <= bound).all()


# ---------------------------------------------------------------------------------------- what is tuned and benchmarked


def planned(model, shape, dtype):
    """The problems of a real plan, in order."""
    x = torch.randn(2, *shape)
    plan = fused_resnet.freeze(model.eval(), x, dtype=dtype).plan(x)
    modules = dict(plan.named_modules())
    called = [modules[node.target] for node in plan.graph.nodes if node.op == "call_module"]
    return [conv.problem for conv in called if isinstance(conv, FrozenConv)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)  # with oneDNN, and without
@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_the_problems_of_a_cpu_are_those_of_a_plan(tuned_files, name, dtype):
    model, shape = models.create(name), (3, 32, 32)
    expected = planned(model, shape, dtype)
    found = measuring.convs_of(model, shape, 2, dtype, "cpu")
    assert [problem for problem, _ in found] == list(dict.fromkeys(expected))
    assert [count for _, count in found] == [expected.count(problem) for problem, _ in found]
    assert set(tuner.problems_of({name: (model, shape)}, [2], [dtype], "cpu")) == set(expected)
    assert {problem.has_bias for problem in expected} == {True, dtype == torch.float32 and has_onednn()}


def has_onednn():
    return backends.onednn_missing(torch.float32) is None


@pytest.mark.parametrize(
    "block, name", ((BasicBlock, "resnet18"), (Bottleneck, "resnet50")), ids=("basic", "bottleneck")
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_on_a_gpu_what_only_a_sum_reads_has_no_bias(block, name, dtype):
    """In each of the blocks with a projection; the sum's own convolution has one. No GPU is needed to know."""
    model, shape = models.create(name), (3, 32, 32)
    counted = measuring.convs_of(model, shape, 2, dtype, "cuda")
    projections = sum(one.downsample is not None for one in model.modules() if isinstance(one, block))
    assert sum(count for problem, count in counted if not problem.has_bias) == projections > 0
    for problem, _ in counted:
        assert (problem.N, problem.dtype, problem.device) == (2, dtype, "cuda")
        if not problem.has_bias:
            assert problem.activation == "none" and not problem.has_residual
    assert {problem for problem, _ in counted} == set(tuner.problems_of({name: (model, shape)}, [2], [dtype], "cuda"))
    live = tuner.problems_of({name: (model, shape)}, [2], [dtype], "cuda", live_bn=True)
    assert all(problem.has_bn and not problem.has_bias for problem in live)


def test_a_convolution_whose_bias_has_moved_is_timed_without():
    (problem,) = [one for one, _ in measuring.convs_of(Sum(), (4, 7, 7), 2, torch.float32, "cuda") if not one.has_bias]
    problem = problem._replace(device="cpu")
    live = measuring.random_operands(problem, "cpu")
    assert measuring.folded_operands(live, has_bias=problem.has_bias).bias is None
    found, _ = measuring.op_variants(problem, live)
    assert found[FOLDED].case.operands.bias is None
    assert all(measuring.error_ratio(prepared) <= 1 for prepared in found.values())
