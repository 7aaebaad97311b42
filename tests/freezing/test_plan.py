"""freeze: a plan for each shape, printed, replayed, and dropped when there are too many."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import fused_resnet
from fused_resnet.freezing import frozen as frozen_module
from fused_resnet.freezing.modules import FrozenConv, PackedWeights
from tests.support import networks
from tests.support.plans import X, as_good_as_plain, convolutions, needs_onednn
from tests.support.scripts import ROOT


def test_unseen_shapes_get_their_own_plan():
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(X))
    for shape in ((1, 3, 16, 16), (2, 3, 9, 11), X, (5, 3, 7, 30)):
        x = torch.randn(shape)
        as_good_as_plain(frozen, model, x)
        assert frozen.plan(x) is frozen.plan(torch.randn(shape))
        assert convolutions(frozen, x)[0].problem.N == shape[0]
    assert len(frozen._plans) == 4


def test_the_least_recently_used_plan_goes(monkeypatch):
    monkeypatch.setattr("fused_resnet.freezing.frozen.MAX_PLANS", 3)
    frozen = fused_resnet.freeze(networks.small(), torch.randn(1, 3, 8, 8))
    for batch in (2, 3, 1, 4):  # 1 is used again before the fourth comes
        frozen(torch.randn(batch, 3, 8, 8))
    assert [shape[0] for shape in frozen._plans] == [3, 1, 4]


def test_a_dropped_plan_frees_its_weights_at_once(monkeypatch):
    """Without the garbage collector, which comes seldom: the packed weights of each shape are as large as the model."""
    monkeypatch.setattr("fused_resnet.freezing.frozen.MAX_PLANS", 2)
    frozen = fused_resnet.freeze(networks.small(), torch.randn(1, 3, 8, 8))
    seen = []
    gc.collect()
    gc.disable()
    try:
        for batch in range(2, 7):
            x = torch.randn(batch, 3, 8, 8)
            frozen(x)
            seen += map(weakref.ref, convolutions(frozen, x))
        alive = {reference() for reference in seen} - {None}
    finally:
        gc.enable()
    assert alive == {conv for plan in frozen.plans() for conv in plan.modules() if isinstance(conv, FrozenConv)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_plans_share_the_weights_that_they_pack_alike(dtype):
    model, first = networks.small().to(dtype), torch.randn(1, 3, 16, 16, dtype=dtype)
    frozen, other = fused_resnet.freeze(model, first), fused_resnet.freeze(model, first)
    weights = {}
    for batch in (1, 2, 3, 8):
        x = torch.randn(batch, 3, 16, 16, dtype=dtype)
        as_good_as_plain(frozen, model, x)
        for name, conv in frozen.plan(x).named_modules():
            if isinstance(conv, FrozenConv):
                weights.setdefault((name, conv.backend.name), set()).add(id(conv.weight))
    assert len(weights) >= len(convolutions(frozen, first)) and all(len(same) == 1 for same in weights.values())
    mine, theirs = convolutions(frozen, first), convolutions(other, first)
    assert not {id(conv.weight) for conv in mine} & {id(conv.weight) for conv in theirs}


def test_only_the_same_weight_is_shared():
    packed, weight = PackedWeights(), torch.randn(4, 4)
    assert packed.shared("conv", "eager", weight) is weight
    assert packed.shared("conv", "eager", weight.clone()) is weight
    others = (
        ("other", "eager", weight.clone()), ("conv", "triton", weight.clone()),
        ("conv", "eager", weight.t().contiguous().t()), ("conv", "eager", weight + 1),
    )  # fmt: skip
    for name, backend, other in others:
        assert packed.shared(name, backend, other) is other


@needs_onednn
def test_onednns_weights_are_shared_where_their_layouts_are():
    def pack(taps, size):
        weight, window = torch.ones(64, 64, taps, taps), ((taps // 2,) * 2, (1, 1), (1, 1), 1)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *window, size)

    packed, weight = PackedWeights(), pack(3, (1, 64, 9, 9))
    assert packed.shared("conv", "onednn", weight) is weight
    assert packed.shared("conv", "onednn", pack(3, (1, 64, 9, 9))) is weight
    other = pack(1, (1, 64, 9, 9))
    assert packed.shared("conv", "onednn", other) is other


def test_first_seen_in_inference_mode():
    model, x = networks.small(), torch.randn(1, 3, 8, 8)
    frozen = fused_resnet.freeze(model, torch.randn(X))
    with torch.inference_mode():
        expected = frozen(x).clone()
    assert torch.equal(frozen(x), expected) and not frozen(x).requires_grad


def test_plans_print_as_python():
    model, x = networks.small(), torch.randn(X)
    code = fused_resnet.freeze(model, x).plan(x).code
    assert code.count("fused_") >= 12 and "batch_norm" not in code and "bn1" not in code.replace("fused_", "")


def test_threads():
    """Several threads, several shapes at once, plans made on the way: every answer is the serial one."""
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(1, 3, 8, 8))
    inputs = [torch.randn(1 + i % 3, 3, 8 + i % 2, 8) for i in range(12)]
    serial = fused_resnet.freeze(model, inputs[0])
    expected = [serial(x) for x in inputs]
    wrong, barrier = [], threading.Barrier(4)

    def work(offset):
        barrier.wait()
        for turn in range(2 * len(inputs)):
            i = (turn * 7 + offset) % len(inputs)
            if not torch.equal(frozen(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(5 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and set(frozen._plans) == {tuple(x.shape) for x in inputs}


def slow_make_plan(monkeypatch):
    """(an event that is set when a plan is being made, one that lets it go on, the shapes made)."""
    make_plan, started, go_on, shapes = frozen_module.make_plan, threading.Event(), threading.Event(), []

    def slow(traced, x, *options):
        shapes.append(tuple(x.shape))
        started.set()
        assert go_on.wait(60)
        return make_plan(traced, x, *options)

    monkeypatch.setattr(frozen_module, "make_plan", slow)
    return started, go_on, shapes


def test_calls_that_have_a_plan_do_not_wait_for_one_that_is_made(monkeypatch):
    known, new = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8)
    frozen = fused_resnet.freeze(networks.small(), known)
    started, go_on, shapes = slow_make_plan(monkeypatch)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(frozen(new))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    served = threading.Thread(target=lambda: frozen(known), daemon=True)
    served.start()
    served.join(60)
    assert not served.is_alive() and not answers and len(frozen.plans()) == 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert shapes == [(2, 3, 8, 8)] and torch.equal(*answers)  # the second thread took the first one's plan


def test_a_wrong_shape_is_refused_while_a_plan_is_made(monkeypatch):
    """It neither takes nor waits for the lock that planning holds."""
    frozen = fused_resnet.freeze(networks.small(), torch.randn(1, 3, 8, 8))
    started, go_on, _ = slow_make_plan(monkeypatch)
    planning = threading.Thread(target=frozen, args=(torch.randn(2, 3, 8, 8),))
    planning.start()
    assert started.wait(60)
    refused = []

    def send():
        for wrong in (torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(3, 8)):
            with pytest.raises(ValueError, match="cannot take an input of shape"):
                frozen(wrong)
            refused.append(frozen._making.locked())

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    sending.join(20)
    go_on.set()
    planning.join()
    assert refused == [True] * 3


def test_a_wrong_shape_is_refused_again_without_work(monkeypatch):
    frozen, wrong = fused_resnet.freeze(networks.small(), torch.randn(1, 3, 8, 8)), torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError) as first:
        frozen(wrong)
    with monkeypatch.context() as patch:
        patch.setattr(frozen_module, "propagated", None)
        with pytest.raises(ValueError) as again:
            frozen(wrong)
    assert str(again.value) == str(first.value)
    for width in range(frozen_module.MAX_REFUSALS + 3):
        with pytest.raises(ValueError, match="cannot take"):
            frozen(torch.randn(1, 5, 1, 1 + width))
    assert len(frozen._refusals) == frozen_module.MAX_REFUSALS
    assert frozen(torch.randn(3, 3, 8, 8)).shape == (3, 10)


def test_what_fails_while_a_plan_is_made_keeps_no_lock():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(1, 3, 8, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot take an input of shape"):
            frozen(torch.randn(1, 4, 8, 8))
    assert frozen(torch.randn(3, 3, 8, 8)).shape == (3, 10)


FORKED_WHILE_PLANNING = """
import os, sys, threading, torch
import fused_resnet
from fused_resnet.freezing import frozen as frozen_module
from fused_resnet.graphs.tracer import TRACING
from fused_resnet.machine import malloc

model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
frozen = fused_resnet.freeze(model, torch.randn(1, 3, 8, 8))
make_plan, started = frozen_module.make_plan, threading.Event()

def never(*arguments):
    with TRACING, malloc._lock, frozen._lock:
        started.set()
        threading.Event().wait()

frozen_module.make_plan = never
threading.Thread(target=frozen, args=(torch.randn(2, 3, 8, 8),), daemon=True).start()
started.wait()
child = os.fork()
if child == 0:
    frozen_module.make_plan = make_plan
    with torch.no_grad():
        same = torch.allclose(frozen(x := torch.randn(3, 3, 8, 8)), model(x), atol=1e-5)
    os._exit(0 if same and fused_resnet.freeze(model, x) is not None else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_while_another_thread_makes_a_plan():
    """In the child that thread is gone, and so must be its locks."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED_WHILE_PLANNING], timeout=240, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0
