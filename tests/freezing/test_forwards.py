"""freeze: what a forward may do, and what its graph must not lose."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from tests.support import networks
from tests.support.plans import Traced, X, as_good_as_plain, equal_outputs, frozen_equals, needs_onednn


def test_a_module_may_have_the_name_a_plan_would_give():
    model = Traced(lambda m, x: m.fused_model_conv(torch.relu(m.conv(x))), fused_model_conv=nn.Sigmoid())
    model.fused_model_conv_ = nn.Tanh()
    frozen_equals(model, torch.randn(2, 4, 6, 7))


def test_other_arguments_keep_their_defaults():
    frozen_equals(Traced(lambda m, x: m.conv(x)), torch.randn(2, 4, 6, 7))
    frozen_equals(fused_resnet.nn.ConvBNAct(4, 8), torch.randn(2, 4, 6, 7))
    frozen_equals(nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 7))


@pytest.mark.parametrize("kind", ("hook", "forward"))
def test_what_a_pool_with_a_hook_or_its_own_forward_returns_is_not_overwritten(kind):
    kept = []
    model, x = Traced(lambda m, x: torch.relu(m.conv(m.conv(x)) + m.pool(x))).eval(), torch.rand(2, 4, 6, 7)
    if kind == "hook":
        model.pool.register_forward_hook(lambda module, args, out: kept.append(out))
    else:
        model.pool.forward = lambda value: kept.append(F.max_pool2d(value, 3, 1, 1)) or kept[-1]
    frozen = fused_resnet.freeze(model, x)
    kept.clear()
    frozen(x)
    assert torch.equal(kept[0], F.max_pool2d(x, 3, 1, 1))


def test_autocast_around_a_call_changes_nothing():
    frozen, x = fused_resnet.freeze(networks.small(), torch.randn(X)), torch.randn(X)
    expected = frozen(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual, unseen = frozen(x), frozen(x[:1])
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    assert torch.allclose(unseen, expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "addend", (lambda x: x > 0, lambda x: x.to(torch.int64), lambda x: x.double()), ids=("bool", "int64", "float64")
)
def test_a_sum_that_promotes_is_no_residual(addend):
    model, x = Traced(lambda m, x: m.conv(x) + addend(x)).eval(), torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)


def written_through_flatten(m, x):
    a = m.conv(x)
    a.flatten(1).mul_(0.5)
    return a


def written_through_contiguous(m, x):
    a = m.conv(x)
    a.contiguous().mul_(2)
    return a


def reshaped_and_then_written(m, x):
    a = m.conv(x)
    r = a.reshape(2, -1)
    a.mul_(2)
    return r * 1


def read_by_strides(m, x):
    return m.conv(x).as_strided((2, 3), (4, 1))


@pytest.mark.parametrize(
    "function", (written_through_flatten, written_through_contiguous, reshaped_and_then_written, read_by_strides)
)
def test_what_the_memory_layout_decides_is_refused(function):
    with pytest.raises(ValueError, match="memory layout|strides"):
        fused_resnet.freeze(Traced(function).eval(), torch.randn(2, 4, 6, 7))


def written_by_an_operator(m, x):
    a = m.pool(x)
    b = m.conv(a)
    torch.ops.aten.relu_.default(a)
    return torch.relu(b + a)


def written_by_index(m, x):
    a = m.pool(x)
    b = m.conv(a)
    a.__setitem__((slice(None), 0), 0.0)
    return torch.relu(b + a) + m.conv(a)


@pytest.mark.parametrize("function", (written_by_an_operator, written_by_index))
def test_every_kind_of_write_is_seen(function):
    frozen_equals(Traced(function), torch.randn(2, 4, 6, 7))


def augments_its_input(m, x):
    x += 1
    return m.conv(x) + x


def writes_a_part_of_a_tuple(m, x):
    parts = x.chunk(2, 1) + (x,)
    parts[2].add_(1)
    return m.conv(x) + x


def writes_a_part_of_two_tuples(m, x):
    parts = torch.chunk(x, 2, 1) + x.unbind()
    (parts * 2)[1].add_(1)
    return m.conv(x) + x


@pytest.mark.parametrize(
    "function",
    (
        lambda m, x: m.conv(torch.relu_(x)) + x,
        lambda m, x: m.conv(m.relu(x)) + x,
        lambda m, x: m.conv(m.relu(x.view(x.shape))) + x,
        augments_its_input,
        writes_a_part_of_a_tuple,
        writes_a_part_of_two_tuples,
    ),
    ids=("relu_", "ReLU(inplace=True)", "through a view", "+=", "in a tuple", "in two tuples"),
)
def test_the_input_is_not_written(function):
    model = Traced(function, relu=nn.ReLU(inplace=True)).eval()
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=torch.channels_last)
    before, frozen = x.clone(), fused_resnet.freeze(model, x)
    assert torch.equal(x, before)
    expected = networks.in_fp64(model, before)
    equal_outputs(frozen(x), expected)
    assert torch.equal(x, before)
    with torch.no_grad():
        model(x)
    assert not torch.equal(x, before)  # which the plain model does


def test_a_returned_buffer_is_a_copy():
    model, x = Traced(lambda m, x: (m.conv(x), m.scale, x)), torch.randn(2, 4, 6, 7)
    model.register_buffer("scale", torch.ones(3))
    frozen = fused_resnet.freeze(model.eval(), x)
    frozen(x)[1].zero_(), frozen(x)[2].zero_()
    assert torch.equal(frozen(x)[1], torch.ones(3)) and x.abs().sum() > 0


def test_a_norm_in_a_module_with_parameters_of_its_own_stays_fp32():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale = nn.BatchNorm2d(4), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.norm(x) * self.scale

    model = Traced(lambda m, x: m.conv(m.scaled(x)), scaled=Scaled()).eval()
    plan = fused_resnet.freeze(model, torch.randn(2, 4, 6, 7), dtype=torch.bfloat16).plan(torch.randn(2, 4, 6, 7))
    norms = [module for module in plan.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.running_mean.dtype for norm in norms] == [torch.float32]


def test_a_frozen_model_has_no_state_and_is_not_frozen_again():
    x = torch.randn(X)
    frozen = fused_resnet.freeze(networks.small(), x)
    assert not frozen.state_dict() and not list(frozen.parameters())
    for model in (frozen, nn.Sequential(frozen).eval()):
        with pytest.raises(ValueError, match="frozen already. Freeze what it was made from"):
            fused_resnet.freeze(model, x)


def test_threads_may_freeze_and_serve_at_once():
    """torch.fx patches nn.Module while it traces, for the whole process."""
    call, x, wrong = nn.Module.__call__, torch.randn(X), []
    served = fused_resnet.freeze(networks.small(), x)
    expected, plain, done = served(x), nn.Linear(4, 4), threading.Event()

    def guarded(work):
        try:
            work()
        except BaseException as error:  # a thread's error would be lost
            wrong.append(error)

    def freeze():
        for _ in range(3):
            model = networks.small()
            equal_outputs(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x))

    def serve():
        while not done.is_set():
            assert torch.equal(served(x), expected)
            plain(torch.ones(1, 4))

    server = threading.Thread(target=guarded, args=(serve,))
    freezers = [threading.Thread(target=guarded, args=(freeze,)) for _ in range(3)]
    for thread in (server, *freezers):
        thread.start()
    for thread in freezers:
        thread.join()
    done.set()
    server.join()
    assert not wrong and nn.Module.__call__ is call


@needs_onednn
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("N", (1, 2))
def test_a_sum_of_one_channel_takes_a_residual_as_it_lies(N, dtype):
    """Strides do not tell its layout, and a transposed one is neither NCHW nor channels_last."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 1, 1)

        def forward(self, x):
            return F.relu(self.conv(x) + x[:, :1].transpose(2, 3))

    model, x = Sum().eval(), torch.randn(N, 16, 5, 5)
    as_good_as_plain(fused_resnet.freeze(model, x, dtype=dtype), model, x)
