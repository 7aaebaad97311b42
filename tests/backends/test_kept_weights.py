"""Kept channels_last copies of weights, with a CPU that counts as a GPU."""

import gc

import pytest
import torch

from fused_resnet.backends import eager, kept_weights
from fused_resnet.backends.kept_weights import in_channels_last
from fused_resnet.operators import ConvOperands, conv_problem


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kept_weights, "_kept", {})
    monkeypatch.setattr(kept_weights, "_may_outlive", lambda weight: True)
    monkeypatch.setattr(kept_weights, "current_stream", lambda weight: 0)


def weight_of(*size) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*size))


@torch.no_grad()
def test_a_copy_is_kept_from_the_second_call_on():
    weight = weight_of(4, 3, 2, 2)
    first, second, third = (in_channels_last(weight) for _ in range(3))
    assert second is third is not first
    assert torch.equal(third, weight) and third.is_contiguous(memory_format=torch.channels_last)
    assert in_channels_last(third) is third and len(kept_weights._kept) == 1


@torch.no_grad()
def test_a_changed_weight_is_converted_again(monkeypatch):
    weight = weight_of(4, 3, 2, 2)

    def seen():
        for _ in range(3):
            found = in_channels_last(weight)
            assert torch.equal(found, weight)
        return found

    before = seen()
    weight.mul_(2)
    assert seen() is not before
    weight.data = torch.randn(4, 3, 2, 2)
    before = seen()
    monkeypatch.setattr(kept_weights, "current_stream", lambda weight: 7)
    assert seen() is not before


@torch.no_grad()
def test_a_weight_in_training_has_no_copy():
    weight = weight_of(4, 3, 2, 2)
    for _ in range(3):
        in_channels_last(weight)
        weight.add_(1)
        assert all(kept.copy is None for kept in kept_weights._kept.values())


@torch.no_grad()
def test_a_copy_dies_with_its_weight_and_there_is_a_limit(monkeypatch):
    weight = weight_of(4, 3, 2, 2)
    in_channels_last(weight), in_channels_last(weight)
    del weight
    gc.collect()
    assert not kept_weights._kept
    monkeypatch.setattr(kept_weights, "MOST", 2)
    weights = [weight_of(4, 3, 2, 2) for _ in range(5)]
    for weight in weights:
        in_channels_last(weight), in_channels_last(weight)
    assert len(kept_weights._kept) == 2


def test_gradients_reach_the_weight():
    weight = weight_of(4, 3, 2, 2)
    for _ in range(3):
        in_channels_last(weight).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0)) and not kept_weights._kept


def test_a_copy_made_for_inference_serves_outside():
    weight = weight_of(4, 3, 2, 2)
    with torch.inference_mode():
        in_channels_last(weight)
        assert not in_channels_last(weight).is_inference()
        inner = torch.randn(4, 3, 2, 2)
        assert torch.equal(in_channels_last(inner), inner)


def test_on_a_cpu_nothing_is_kept(monkeypatch):
    monkeypatch.undo()
    weight = weight_of(4, 3, 2, 2)
    with torch.no_grad():
        assert in_channels_last(weight) is not in_channels_last(weight)


@torch.no_grad()
def test_eager_keeps_the_weights_of_channels_last_inputs():
    x, weight = torch.randn(2, 3, 5, 4), weight_of(4, 3, 2, 2)
    one = conv_problem(ConvOperands(x, weight), (1, 1), (0, 0), (1, 1), 1, "relu")._replace(device="cuda")
    expected = eager.run(one, ConvOperands(x, weight))
    assert not kept_weights._kept
    for _ in range(2):
        out = eager.run(one, ConvOperands(x.contiguous(memory_format=torch.channels_last), weight))
        torch.testing.assert_close(out, expected)
    assert [kept.copy is not None for kept in kept_weights._kept.values()] == [True]
