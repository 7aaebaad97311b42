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
