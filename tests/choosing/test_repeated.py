"""Calls like one before: the same result, and whatever changes the decision counts."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import backends, choosing, functional, fuse, nn, testing
from fused_resnet.backends import eager, record
from fused_resnet.choosing import repeated, winners
from fused_resnet.nn import call as call_of_a_module
from fused_resnet.operators.problem import ACTIVATIONS
from tests.support.tuned_files import entry, problem

pytestmark = pytest.mark.skipif(repeated.TensorGuards is None, reason="needs torch's own guards")


@pytest.fixture(autouse=True)
def none_before(monkeypatch):
    monkeypatch.setattr(repeated, "calls", {})
    monkeypatch.setattr(repeated, "_weights", {})
    monkeypatch.setattr(repeated, "sums", {})


class Conv:
    """One convolution with live BN, as a function of x, and how often it went the short way."""

    def __init__(self, **options):
        self.x, self.weight = torch.randn(2, 6, 5, 4), torch.randn(10, 6, 3, 3)
        self.vectors = [torch.randn(10), torch.randn(10), torch.randn(10), torch.rand(10) + 0.5]
        self.options = {"padding": 1, **options}
        self.short = 0

    def __call__(self, x=None, **changed):
        return functional.conv_bn_act(
            self.x if x is None else x, self.weight, *self.vectors, **{**self.options, **changed}
        )

    def learned(self):
        with torch.no_grad():
            expected = [self() for _ in range(2)][0]
            (((*before, run),),) = repeated.calls.values()

        def counted(*operands):
            self.short += 1
            return run(*operands)

        for key in repeated.calls:
            repeated.calls[key] = (repeated.Call(*before, counted),)
        with torch.no_grad():
            assert torch.equal(self(), expected) and self.short == 1
        self.short = 0
        return self


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_the_same_to_the_last_bit(activation, channels_last, dtype):
    for in_channels_last in (False, True):
        x, weight = torch.randn(2, 6, 5, 4).to(dtype), torch.randn(10, 6, 3, 3).to(dtype)
        if in_channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        vectors = [v.to(dtype) for v in (torch.randn(10), torch.randn(10), torch.randn(10), torch.rand(10) + 0.5)]
        for bias, residual in ((None, None), (torch.randn(10).to(dtype), torch.randn(2, 10, 5, 4).to(dtype))):
            operands = (x, weight, *vectors, *(() if bias is None else (bias, residual)))
            before = [tensor.clone() for tensor in operands]
            first, second, third = (
                functional.conv_bn_act(
                    x, weight, *vectors, bias=bias, residual=residual, padding=1, activation=activation,
                    channels_last=channels_last,
                )
                for _ in range(3)
            )  # fmt: skip
            assert torch.equal(first, second) and torch.equal(first, third)
            assert first.stride() == second.stride() == third.stride() and second.data_ptr() != third.data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(before, operands))


@torch.no_grad()
def test_random_problems_twice():
    count = 0
    for seed in range(120):
        case = testing.case_at(5, seed)
        if case.problem.op != "conv_bn_act" or case.problem.N == 0:
            continue
        first, *others = (testing.run(case, "auto") for _ in range(3))
        assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others), case.problem
        assert all(first.stride() == other.stride() for other in others)
        count += len(repeated.calls)
    assert count > 0


@torch.no_grad()
def test_other_operands_are_decided_anew():
    conv = Conv().learned()
    for x in (
        torch.randn(3, 6, 5, 4),
        torch.randn(2, 6, 5, 8)[..., ::2],
        conv.x.contiguous(memory_format=torch.channels_last),
    ):
        y = F.relu(F.batch_norm(F.conv2d(x, conv.weight, padding=1), *conv.vectors[2:], *conv.vectors[:2]))
        torch.testing.assert_close(conv(x), y)
    with pytest.raises(TypeError, match="weight has dtype float32 but x has float64"):
        conv(conv.x.double())
    with pytest.raises(ValueError, match="x has 7"):
        conv(torch.randn(2, 7, 5, 4))
    assert conv.short == 0


@torch.no_grad()
def test_what_is_refused_stays_refused():
    """Whole floats and lists are equal to what was asked before."""
    conv = Conv(stride=(1, 1)).learned()
    with pytest.raises(TypeError, match="stride must be an int or a pair of ints"):
        conv(stride=(1.0, 1.0))
    with pytest.raises(TypeError, match="groups must be an int"):
        conv(groups=1.0)
    with pytest.raises(backends.BackendError, match="unknown backend 'eagr'"):
        conv(backend="eagr")
    with pytest.raises(ValueError, match="unknown activation"):
        conv(activation="gelu")
    assert conv.short == 0
    pair = [1, 1]
    for _ in range(3):
        conv(stride=pair)
    pair[0] = 2
    assert conv(stride=pair).shape[2] == 3


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WATCHING = {
    "function mode": Functions,
    "dispatch mode": Operators,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.autograd.profiler.profile,
    "forward AD": forward_ad.dual_level,
}


@pytest.mark.parametrize("watching", WATCHING.values(), ids=WATCHING)
@torch.no_grad()
def test_whatever_watches_sees_the_operator(watching):
    conv = Conv().learned()
    with watching():
        out = conv()
    assert conv.short == 0 and out.shape == (2, 10, 5, 4)
    conv()
    assert conv.short == 1


@torch.no_grad()
def test_transforms_and_traces():
    conv = Conv().learned()
    torch.func.vmap(lambda x: conv(x))(conv.x[None])
    torch.jit.trace(lambda x: conv(x), conv.x, check_trace=False)
    assert conv.short == 0


def test_grad_mode_counts():
    conv = Conv()
    conv.weight.requires_grad_()
    conv.learned()
    conv().sum().backward()
    assert conv.weight.grad is not None and conv.short == 0
    with torch.inference_mode():
        assert conv().is_inference()


@torch.no_grad()
def test_a_registered_backend_counts(monkeypatch):
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {**record.REGISTRY["conv_bn_act"]})
    conv = Conv().learned()
    taken = []

    def run(problem, operands):
        taken.append(problem)
        return eager.run(problem, operands)

    one = backends.Backend("first", lambda problem: None, run, backends.Auto(("cpu",)))
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {"first": one, **record.REGISTRY["conv_bn_act"]})
    conv()
    assert len(taken) == 1 and conv.short == 0


@torch.no_grad()
def test_register_makes_a_new_dict(monkeypatch):
    monkeypatch.setattr(record, "REGISTRY", {"conv_bn_act": dict(record.REGISTRY["conv_bn_act"])})
    before = record.REGISTRY["conv_bn_act"]
    backends.register("conv_bn_act", eager.BACKEND)
    assert record.REGISTRY["conv_bn_act"] == before and record.REGISTRY["conv_bn_act"] is not before


@torch.no_grad()
def test_measurements_count(tuned_files):
    conv = Conv().learned()
    one = problem(N=2, C=6, H=5, W=4, K=10, has_bn=True, has_bias=False)
    tuned_files.add(tuned_files.user, one, entry("eager", eager=({"layout": "NCHW"}, 1.0)))
    assert choosing.select(one).config == backends.EagerConfig("NCHW")
    conv()
    assert conv.short == 0
    for _ in range(3):
        conv()
    with winners.ignored():
        assert conv().shape == (2, 10, 5, 4)


@torch.no_grad()
def test_calls_go_with_their_weight():
    conv = Conv().learned()
    assert repeated.calls and repeated._weights
    del conv.weight
    gc.collect()
    assert not repeated.calls and not repeated._weights


@torch.no_grad()
def test_weights_that_are_made_for_a_call_are_not_kept():
    conv = Conv()
    for _ in range(5):
        conv.weight = torch.randn(10, 6, 3, 3)
        conv()
    assert not repeated.calls


@pytest.fixture
def asked(monkeypatch):
    """How often a module called the operator, and did not repeat what ran before."""
    calls, function = [], functional.conv_bn_act
    monkeypatch.setattr(call_of_a_module, "_known", {})
    monkeypatch.setattr(
        functional, "conv_bn_act", lambda *args, **options: calls.append(1) or function(*args, **options)
    )
    return calls


@pytest.mark.parametrize("watching", WATCHING.values(), ids=WATCHING)
@torch.no_grad()
def test_a_module_repeats_its_calls_unless_somebody_watches(watching, asked):
    block, x = fuse(nn.BasicBlock(8, 8).eval()), torch.randn(2, 8, 6, 5)
    expected = [block(x) for _ in range(4)][0]
    asked.clear()
    assert torch.equal(block(x), expected) and not asked
    with watching():
        block(x)
    assert len(asked) == 2
    asked.clear()
    assert torch.equal(block(x), expected) and not asked
    block.bn1.eps = 1  # an int is refused by nobody, but is another type than that of the calls before
    block(x)
    assert len(asked) == 1


@torch.no_grad()
def test_a_module_with_two_shapes_in_turn(asked):
    plain, shapes = nn.BasicBlock(8, 8).eval(), ((2, 8, 6, 5), (1, 8, 3, 7))
    block = fuse(copy.deepcopy(plain))
    for _ in range(5):
        for shape in shapes:
            x = torch.randn(shape)
            torch.testing.assert_close(block(x), plain(x))
    asked.clear()
    assert [block(torch.randn(shape)).shape for shape in shapes] == list(shapes) and not asked
    calls = [call for known in call_of_a_module._known.values() for one in known for call in one.calls.values()]
    assert len({id(call) for call in calls}) == len(calls) == 4  # of two convolutions for two shapes


@torch.no_grad()
def test_a_bias_that_is_no_parameter_counts(asked):
    plain, x = nn.BasicBlock(8, 8).eval(), torch.randn(2, 8, 6, 5)
    block = fuse(copy.deepcopy(plain))
    for _ in range(4):
        block(x)
    for module in (plain, block):
        del module.conv1.bias
        module.conv1.bias = torch.full((8,), 5.0)
    torch.testing.assert_close(block(x), plain(x))


@torch.no_grad()
def test_what_a_module_knows_goes_with_its_weight(asked):
    block, x = fuse(nn.BasicBlock(8, 8).eval()), torch.randn(2, 8, 6, 5)
    for _ in range(4):
        block(x)
    assert call_of_a_module._known
    del block
    gc.collect()
    assert not call_of_a_module._known


@torch.no_grad()
def test_a_registration_drops_the_calls_once(asked, monkeypatch):
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {**record.REGISTRY["conv_bn_act"]})
    block, xs = fuse(nn.BasicBlock(8, 8).eval()), [torch.randn(2, 8, 6, size) for size in (4, 5, 6)]
    run = lambda: [block(x) for x in xs]  # noqa: E731
    for _ in range(4):
        run()
    cleared = []

    class Calls(dict):
        def clear(self):
            cleared.append(len(self))
            super().clear()

    monkeypatch.setattr(repeated, "calls", Calls(repeated.calls))
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {**record.REGISTRY["conv_bn_act"]})
    for _ in range(3):
        run()
    asked.clear()
    run()
    assert not asked and len(cleared) == 1 and cleared[0] > 0


@torch.no_grad()
def test_a_module_notices_registered_backends_and_measurements(asked, monkeypatch, tuned_files):
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {**record.REGISTRY["conv_bn_act"]})
    block, x = fuse(nn.BasicBlock(8, 8).eval()), torch.randn(2, 8, 6, 5)
    for _ in range(4):
        block(x)
    asked.clear()
    taken = []
    one = backends.Backend(
        "first", lambda problem: None, lambda p, o: taken.append(p) or eager.run(p, o), backends.Auto(("cpu",))
    )
    monkeypatch.setitem(record.REGISTRY, "conv_bn_act", {"first": one, **record.REGISTRY["conv_bn_act"]})
    block(x)
    assert len(taken) == len(asked) == 2
    tuned_files.add(tuned_files.user, problem(has_bn=True, has_bias=False), entry("eager", eager=({}, 1.0)))
    for _ in range(4):
        block(x)
    assert len(taken) == 10


@torch.no_grad()
def test_fused_modules():
    """A block after many calls: training, hooks, another stride, activation or dtype."""
    plain = nn.BasicBlock(8, 8).eval()
    block = fuse(nn.BasicBlock(8, 8).eval())
    block.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 6, 5)

    def same(x=x):
        for _ in range(3):
            out, expected = block(x), plain(x)
            torch.testing.assert_close(out, expected)
            assert out.stride() == expected.stride()

    same()
    assert repeated.calls
    same(x.contiguous(memory_format=torch.channels_last))
    same(torch.randn(1, 8, 3, 3))
    for module in (plain, block):
        module.bn1.eps = 0.5
        module.bn2.running_mean += 1
    same()
    for module in (plain, block):
        module.conv2.dilation = module.conv2.padding = (2, 2)
        module.bn1.weight = torch.nn.Parameter(torch.full((8,), 2.0))
    same()
    for module in (plain, block):
        module.relu = torch.nn.SiLU()
    same()
    for module in (plain, block):
        module.bn2.train()
    same()
    for module in (plain, block):
        module.eval()
    same()
    seen = []
    block.conv1.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen == [1]
    for module in (plain, block):
        module.double()
    same(x.double())


def test_sums(monkeypatch):
    a, b = torch.randn(2, 2, 3, 4, 5)
    expected = torch.relu(a + b)
    for _ in range(2):
        assert torch.equal(functional.add_relu(a, b), expected)
    if not repeated.sums:
        pytest.skip("csrc's kernel is not built")
    ran = []
    ((known,),) = repeated.sums.values()
    repeated.sums[a.shape] = (known._replace(run=lambda a, b: ran.append(1) or known.run(a, b)),)
    out = functional.add_relu(a, b)
    assert torch.equal(out, expected) and out.data_ptr() not in (a.data_ptr(), b.data_ptr()) and ran == [1]
    assert functional.add_relu(a.double(), b.double()).dtype == torch.float64
    other = b.contiguous(memory_format=torch.channels_last)
    assert torch.equal(functional.add_relu(a, other), expected)
    with pytest.raises(TypeError, match="b has dtype float64"):
        functional.add_relu(a, b.double())
    with pytest.raises(backends.BackendError, match="unknown backend"):
        functional.add_relu(a, b, backend="gpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.add_relu(a, b).dtype == torch.bfloat16
    grown = a.clone().requires_grad_()
    functional.add_relu(grown, b).sum().backward()
    assert torch.equal(grown.grad, (expected > 0).float())
    with Functions(), torch.no_grad():
        functional.add_relu(a, b)
    assert ran == [1]
    monkeypatch.setitem(record.REGISTRY, "add_relu", dict(record.REGISTRY["add_relu"]))
    functional.add_relu(a, b)
    assert ran == [1]
