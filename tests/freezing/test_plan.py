"""freeze: a plan for each shape, printed, replayed, and dropped when there are too many."""

import threading

import torch

import fused_resnet
from tests.support import networks
from tests.support.plans import X, as_good_as_plain, convolutions


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
