"""freeze: the same answers for every shape, dtype and thread, memory nobody else sees, refusals, and the way back."""

import array
import contextlib
import copy
import functools
import gc
import logging
import operator
import os
import pickle
import random
import subprocess
import sys
import threading
import tracemalloc
import types
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fused_resnet
from fused_resnet import BackendError, backends, models, testing
from fused_resnet.freezing import lowering
from fused_resnet.freezing.modules import FrozenConv, FrozenLinear
from fused_resnet.kernels import compiled
from fused_resnet.kernels.triton import runtime
from fused_resnet.machine import cuda_graphs, malloc
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from tests.support import networks

X = (2, 3, 16, 16)
full = pytest.mark.full
needs_onednn = pytest.mark.skipif(
    backends.onednn_missing(torch.float32) is not None, reason=str(backends.onednn_missing(torch.float32))
)
needs_bf16 = pytest.mark.skipif(
    backends.onednn_missing(torch.bfloat16) is not None, reason=str(backends.onednn_missing(torch.bfloat16))
)


def convolutions(frozen, x):
    return [module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv)]


def as_good_as_plain(frozen, model, x, factor=4.0):
    """Folding rounds the weights instead of the activations, in another order: up to `factor` times the error against
    fp64 that the unfrozen model makes in the same dtype; Winograd amplifies fp32's tenfold. A mistake is a thousand
    times worse in fp32."""
    exact = networks.in_fp64(model, x)
    with torch.no_grad():
        plain = copy.deepcopy(model).to(frozen.dtype)(x.to(frozen.dtype))
        assert networks.error(frozen(x), exact) <= factor * networks.error(plain, exact) < 0.1


def unchanged(model, before, x, expected):
    modules, state = before
    assert modules == [(name, id(m), type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()]
    assert list(state) == list(model.state_dict())
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert state[key][0] is tensor and torch.equal(state[key][1], tensor), key
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def remember(model):
    modules = [(name, id(m), type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()]
    return modules, {key: (t, t.detach().clone()) for key, t in model.state_dict(keep_vars=True).items()}


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)), ids=str)
@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
@pytest.mark.parametrize("shape", (X, (1, 3, 17, 13), (3, 3, 4, 4)), ids=str)
def test_values(block, dtype, shape):
    """Down to maps of one pixel (4x4 inputs), whose strides are ambiguous."""
    model = networks.small(block)
    x = torch.randn(shape)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    as_good_as_plain(frozen, model, x)
    assert frozen(x).dtype == x.dtype and frozen.dtype == dtype


def test_fp16_and_fp64():
    model, x = networks.small(), torch.randn(X)
    as_good_as_plain(fused_resnet.freeze(model, x, dtype=torch.float16), model, x)
    # rounded once, at the output
    assert networks.error(fused_resnet.freeze(model, x, dtype=torch.float64)(x), networks.in_fp64(model, x)) < 2**-24


@needs_onednn
@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)), ids=str)
@pytest.mark.parametrize(
    "create",
    (lambda: models.resnet18(num_classes=10), lambda: models.cifar.resnet20(option="A"),
     lambda: models.cifar.resnet20(option="B"), pytest.param(lambda: models.resnet50(num_classes=10), marks=full),
     pytest.param(lambda: models.resnext50_32x4d(num_classes=10), marks=full)),
    ids=("resnet18", "resnet20-A", "resnet20-B", "resnet50", "resnext50"),
)  # fmt: skip
def test_models(create, dtype):
    """Every convolution is one call with everything up to its ReLU; images so small that maps end at 1x1."""
    model, x = networks.randomize(create()), torch.randn(2, 3, 33, 32)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    fused = [conv.backend.name for conv in convolutions(frozen, x)]
    assert len(fused) == count and set(fused) <= {"onednn", "winograd", "grouped"}
    assert not any(isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) for module in frozen.plan(x).modules())
    as_good_as_plain(frozen, model, x, 40.0 if "winograd" in fused and dtype == torch.float32 else 4.0)


@pytest.mark.parametrize("backend", ("eager", "triton"))
def test_forced_backends(backend):
    if backend == "triton" and (reason := runtime.why_not("cpu", torch.float32)):
        pytest.skip(reason)
    model, x = networks.small(), torch.randn(1, 3, 8, 8)
    frozen = fused_resnet.freeze(model, x, backend=backend)
    assert {conv.backend.name for conv in convolutions(frozen, x)} == {backend}
    as_good_as_plain(frozen, model, x)


def test_folding_by_hand():
    conv, bn = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1.0).eval()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        for tensor, value in (
            (conv.bias, (1, -1)), (bn.weight, (4, -2)), (bn.bias, (0.5, 0)), (bn.running_mean, (2, 1)),
            (bn.running_var, (3, 8)),
        ):  # fmt: skip
            tensor.copy_(torch.tensor(value))
    weight, bias = lowering.fold(conv, bn, torch.float32)
    assert torch.equal(weight.flatten(), torch.tensor([2 * 4 / 2.0, 3 * -2 / 3.0]))
    torch.testing.assert_close(bias, torch.tensor([(1 - 2) * 2 + 0.5, (-1 - 1) * -2 / 3]))
    assert lowering.fold(nn.Conv2d(1, 1, 1, bias=False), None, torch.float32)[1] is None


def test_fused_models_freeze_like_plain_ones():
    model, x = networks.small(), torch.randn(X)
    expected = fused_resnet.freeze(model, x)(x)
    frozen = fused_resnet.freeze(fused_resnet.fuse(model), x)
    assert torch.equal(frozen(x), expected)
    assert len(convolutions(frozen, x)) == 12


def test_conv_bn_act_modules():
    model = networks.randomize(nn.Sequential(ConvBNAct(3, 8), ConvBNAct(8, 8, activation_layer=nn.SiLU)))
    x = torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    assert [conv.problem.activation for conv in convolutions(frozen, x)] == ["relu", "silu"]
    as_good_as_plain(frozen, model, x)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_input_layouts(layout):
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(X))
    x = testing.laid_out(torch.randn(X), layout)
    before = x.clone()
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-5
    assert torch.equal(x, before)
    channels = torch.randn(2, 6, 16, 16).to(memory_format=torch.channels_last)[:, ::2]
    assert networks.error(frozen(channels), networks.in_fp64(model, channels)) < 1e-5


def test_empty_batch():
    model = networks.small()
    frozen = fused_resnet.freeze(model, torch.randn(X))
    assert frozen(torch.randn(0, 3, 16, 16)).shape == (0, 10)


def test_unbatched_input():
    """Where the model takes (C, H, W), so does the plan."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(3, 8, 8)
    assert networks.error(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x)) < 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_norms_that_stay_take_the_plans_dtype(dtype):
    """Pre-activation: a norm before its convolution cannot be folded."""
    model = networks.randomize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))).half()
    x = torch.randn(X, dtype=torch.float16)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-3  # the output is rounded to fp16


def test_other_outputs():
    """Dictionaries, tuples and feature maps from the middle come back as they are, in the input's dtype."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = networks.small()

        def forward(self, x):
            a = self.net.relu(self.net.bn1(self.net.conv1(x)))
            b = self.net.layer1(a)
            return {"a": a, "deep": (b, self.net.layer2(b)), "best": b.flatten(1).argmax(1)}

    model, x = Features().eval(), torch.randn(X)
    out, expected = fused_resnet.freeze(model, x, dtype=torch.float64)(x), model(x)
    assert list(out) == ["a", "deep", "best"] and torch.equal(out["best"], expected["best"])
    for actual, wanted in zip((out["a"], *out["deep"]), (expected["a"], *expected["deep"])):
        assert actual.dtype == torch.float32 and networks.error(actual, wanted.double()) < 1e-5


# --------------------------------------------------------------------------------------------------- shapes and plans


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


# ------------------------------------------------------------------------------------------------------------ memory


def test_outputs_are_fresh_and_inputs_are_not_written():
    model = networks.small()
    x = torch.randn(X).to(memory_format=torch.channels_last)
    frozen, before = fused_resnet.freeze(model, x), x.clone()
    first = frozen(x)
    kept = first.clone()
    second = frozen(x)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    second.zero_()
    frozen(torch.randn(X))
    assert torch.equal(first, kept) and torch.equal(x, before) and torch.equal(frozen(x), kept)


def test_the_sum_over_the_input_is_not_written_into_the_input():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x) + x)

    model, x = Shortcut().eval(), torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    frozen, before = fused_resnet.freeze(model, x), x.clone()
    assert networks.error(frozen(x), networks.in_fp64(model, x)) < 1e-5 and torch.equal(x, before)
    assert [conv.problem.has_residual for conv in convolutions(frozen, x)] == [True]


def test_later_changes_do_not_reach_the_frozen_copy():
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    expected, other = frozen(x).clone(), frozen(x[:1]).clone()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    frozen._plans.clear()  # made again: from the copy, too
    assert torch.equal(frozen(x), expected) and torch.equal(frozen(x[:1]), other)


@needs_onednn
def test_sums_are_written_over_what_nobody_reads_again():
    model, x = networks.small(), torch.randn(X)
    sums = [conv for conv in convolutions(fused_resnet.freeze(model, x), x) if conv.problem.has_residual]
    assert len(sums) == 4 and all(conv.in_place for conv in sums)


@needs_onednn
def test_a_block_is_one_pass_a_convolution():
    """No activation, sum or pooling indices beside the convolutions: each would be one more pass over memory."""
    model, x = models.create("resnet18").eval(), torch.randn(1, 3, 64, 64)
    frozen = fused_resnet.freeze(model, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        frozen(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    convolutions = ("mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_", "fused_resnet::cpu_winograd")
    assert sum(calls.get(name, 0) for name in convolutions) == 20
    assert not calls.keys() & {"aten::relu_", "aten::relu", "aten::add_", "aten::add"}
    if compiled.load("cpu") is None:
        assert calls["fused_resnet::cpu_max_pool2d"] == 1 and "aten::max_pool2d_with_indices" not in calls


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), (1, 2), (0, 1)), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, 1, 0, dilation=2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_max_pooling_is_torchs(pool, dtype):
    model, x = nn.Sequential(pool, nn.ReLU()).eval(), torch.randn(2, 5, 11, 8, dtype=dtype)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    assert torch.equal(frozen(x), model(x)) and torch.equal(frozen(x[:1]), model(x[:1]))


@pytest.mark.parametrize("norm", [
    nn.InstanceNorm2d(16, affine=True), nn.BatchNorm2d(16, track_running_stats=False),
], ids=str)  # fmt: skip
def test_norms_without_statistics_in_bf16(norm):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU()).eval().bfloat16()
    x = torch.randn(2, 3, 8, 8).bfloat16()
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), model(x), rtol=0.02, atol=0.02)


def test_another_default_device_changes_nothing():
    model, x = (
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval(),
        torch.randn(2, 16, 8, 8),
    )
    expected = fused_resnet.freeze(model, x)(x)
    with torch.device("meta"):
        assert torch.equal(fused_resnet.freeze(model, x)(x), expected)


@pytest.mark.parametrize(
    "change", [dict(padding=1), dict(padding=[1, 1]), dict(padding=(1,), stride=2), dict(dilation=1)]
)
def test_windows_as_torch_takes_them(change):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    vars(conv).update(change)
    model, x = nn.Sequential(conv, nn.MaxPool2d((3,), stride=(2,))).eval(), torch.randn(2, 16, 9, 9)
    assert networks.error(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x)) < 1e-5


def test_pooling_of_integers_is_left_alone():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(torch.round(self.conv(x) * 9).int())

    model, x = Rounded().eval(), torch.randn(1, 3, 8, 8)
    assert (fused_resnet.freeze(model, x)(x) - model(x)).abs().max() <= 1


def later_reader(x, conv, pool):
    a = torch.relu(conv(x))
    b = torch.relu(conv(a) + a)
    return a + b


def both_readers_and_output(x, conv, pool):
    a = pool(x)
    b = torch.relu(conv(a) + a)
    return a, b, conv(b) + b


def same_value_twice(x, conv, pool):
    a = torch.relu(conv(x))
    return conv(a) + a, conv(a) + conv(a), a + a


def inplace_relu_on_what_is_read_again(x, conv, pool):
    a = conv(x)
    b = conv(a)
    c = F.relu(a, inplace=True)
    return b + a, c


def inplace_relu_between_convolution_and_sum(x, conv, pool):
    a = pool(x)
    b = conv(a)
    a.relu_()
    return torch.relu(b + a), conv(a)


def augmented_add_on_what_is_read_again(x, conv, pool):
    a = pool(x)
    c = conv(a)
    a += c
    return conv(a) + a


def augmented_add_read_through_the_old_name(x, conv, pool):
    a, b = conv(x), pool(x)
    old = b.detach()
    b = operator.iadd(b, a)
    return old * 2, b


def view_of_a_residual(x, conv, pool):
    a = torch.relu(conv(x))
    v = a[:, :2]
    b = torch.relu(conv(a) + a)
    return v + 1, b


def view_of_a_view_written(x, conv, pool):
    a = torch.relu(conv(x))
    b = conv(a)
    a[:, 1:3][:, 1:].mul_(0.5)
    return b + a


def flattened_by_view(x, conv, pool):
    """`view` where a plan's channels_last memory allows none: the old way into a classifier."""
    return conv(x).view(x.size(0), -1), pool(torch.relu(conv(x))).view(-1)


def called_by_keyword(x, conv, pool):
    return torch.relu(conv(input=x) + x)


def pre_activation(x, conv, pool):
    a = conv(torch.relu(x)) + x
    return conv(torch.relu(a)) + a


def dense_concatenation(x, conv, pool):
    a = torch.relu(conv(x))
    b = torch.relu(conv(torch.cat([x, a], 1)[:, 2:6]))
    return torch.cat([x, a, b], 1)


def three_addends(x, conv, pool):
    a, b = conv(x), conv(pool(x))
    return torch.relu(a + b + x)


def two_sums_over_one_residual(x, conv, pool):
    a = pool(torch.relu(x))
    return torch.relu(conv(x) + a), torch.relu(conv(a) + a)


def residual_is_a_pool_of_a_residual(x, conv, pool):
    a = torch.relu(conv(x))
    b = pool(a)
    return conv(x) + a, conv(a) + b


def scaled_sum(x, conv, pool):
    return torch.add(conv(x), x, alpha=2), conv(x) + 1.0, conv(x) + x.mean((2, 3), keepdim=True)


AWKWARD = (
    later_reader, both_readers_and_output, same_value_twice, inplace_relu_on_what_is_read_again,
    inplace_relu_between_convolution_and_sum, augmented_add_on_what_is_read_again,
    augmented_add_read_through_the_old_name, view_of_a_residual, view_of_a_view_written, flattened_by_view,
    called_by_keyword, pre_activation,
    dense_concatenation, three_addends, two_sums_over_one_residual, residual_is_a_pool_of_a_residual, scaled_sum,
)  # fmt: skip


class Network(nn.Module):
    """One of the functions above over one shared convolution and one pooling that keeps the shape."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        return self.function(x, self.conv, self.pool)


def equal_outputs(actual, expected):
    actual, expected = (value if isinstance(value, tuple) else (value,) for value in (actual, expected))
    for index, (a, b) in enumerate(zip(actual, expected)):
        # fp32 against fp64 through a dozen layers; corrupted memory is wrong by about 1
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=0,
            atol=1e-4 * max(1.0, b.abs().max().item()),
            msg=lambda m, index=index: f"output {index}: {m}",
        )


@pytest.mark.parametrize("function", AWKWARD, ids=lambda function: function.__name__)
def test_memory_is_never_corrupted(function):
    model, x = Network(function).eval(), torch.randn(2, 4, 6, 7)
    frozen = fused_resnet.freeze(model, x)
    equal_outputs(frozen(x), networks.in_fp64(model, x))
    equal_outputs(frozen(x), networks.in_fp64(model, x))


def flat_view_of_what_is_written(x, conv, pool):
    a = conv(x)
    flat = a.view(x.size(0), -1)
    a.mul_(2)
    return flat


def flat_view_written_through_a_slice(x, conv, pool):
    a = conv(x)
    a.view(-1)[1:].mul_(0.5)
    return a + 1


@pytest.mark.parametrize("function", (flat_view_of_what_is_written, flat_view_written_through_a_slice))
def test_a_view_that_must_alias_is_right_or_refused(function):
    """In channels_last memory these views do not exist; a copy in their place would give wrong answers silently."""
    model, x = Network(function).eval(), torch.randn(2, 4, 6, 7)
    try:
        actual = fused_resnet.freeze(model, x)(x)
    except ValueError as error:
        assert "view" in str(error)
    else:
        equal_outputs(actual, networks.in_fp64(model, x))


def test_a_classifier_with_in_place_activations_after_a_view():
    """The old AlexNet and VGG way: what is written later is the classifier's memory, not the view's."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)
            self.first, self.last = nn.Linear(4 * 6 * 7, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.relu(self.conv(x))
            return self.last(self.relu(self.first(x.view(x.size(0), -1))))

    model, x = Classifier().eval(), torch.randn(2, 4, 6, 7)
    equal_outputs(fused_resnet.freeze(model, x)(x), networks.in_fp64(model, x))


def viewed_as_another_dtype(x, conv, pool):
    return (conv(x).view(torch.int32) & 0x7FFFFFFF).view(torch.float32)


def test_views_as_another_dtype_stay_views():
    model, x = Network(viewed_as_another_dtype).eval(), torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)


class Program(nn.Module):
    """A network given as a list of instructions over a growing list of values, all of one shape."""

    def __init__(self, instructions, outputs):
        super().__init__()
        self.instructions, self.outputs = instructions, outputs
        self.convs = nn.ModuleList(
            [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=2)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.relu, self.inplace, self.pool = nn.ReLU(), nn.ReLU(inplace=True), nn.AvgPool2d(3, 1, 1)
        networks.randomize(self)

    def forward(self, x):
        values = [x + 0]  # instructions write in place; the caller's tensor is not theirs
        for name, i, j in self.instructions:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self._step(name, j, a, b))
        return tuple(values[i % len(values)] for i in self.outputs)

    def _step(self, name, number, a, b):
        conv, norm = self.convs[number % 3], self.norms[number % 2]
        if name == "conv":
            return conv(a)
        if name == "conv-bn":
            return norm(conv(a))
        if name == "conv-bn-relu":
            return self.inplace(norm(conv(a)))
        if name == "residual":
            return self.relu(norm(conv(a)) + b)
        if name == "residual, augmented":
            out = conv(a)
            out += b
            return self.inplace(out)
        if name == "add":
            return a + b
        if name == "add_":
            return a.add_(b)
        if name == "iadd":
            return operator.iadd(a, b)
        if name == "relu":
            return self.relu(a)
        if name == "relu_":
            return self.inplace(a)
        if name == "norm":
            return norm(a)
        if name == "pool":
            return self.pool(a)
        if name == "view":
            return a.view(a.shape)
        if name == "halve a view":
            return a[:, 1:3].mul_(0.5).sum() * 0 + a
        assert name == "concatenate"
        return torch.cat([a, b], 1)[:, 2:6]


STEPS = (
    "conv", "conv-bn", "conv-bn-relu", "residual", "residual, augmented", "add", "add_", "iadd", "relu", "relu_",
    "norm", "pool", "view", "halve a view", "concatenate",
)  # fmt: skip
number = st.integers(0, 11)
programs = st.builds(
    Program,
    # an instruction reads recent values more often than not, since only those are ever fused
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.sampled_from((-1, -1, -2, -3, 0, 1)), number), min_size=1, max_size=10
    ),
    st.lists(st.sampled_from((-1, -1, -2, -3, 0)), min_size=1, max_size=3),
)


def frozen_program_is_right(program, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 5, 3)
    frozen, before = fused_resnet.freeze(program.eval(), x), x.clone()
    expected = networks.in_fp64(program, x)
    equal_outputs(frozen(x), expected)
    equal_outputs(frozen(x), expected)
    assert torch.equal(x, before)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(programs, st.integers(0, 99))
def test_random_programs(program, seed):
    frozen_program_is_right(program, seed)


@full
@settings(max_examples=3000, deadline=None, derandomize=True)
@given(programs, st.integers(0, 99))
def test_many_random_programs(program, seed):
    frozen_program_is_right(program, seed)


# ------------------------------------------------------------------------------------------------- refusals, ways back


def test_training_mode_is_refused():
    model, x = networks.small(), torch.randn(X)
    model.layer2[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"freeze: layer2.0.bn1 is in training mode; call model.eval\(\) first"):
        fused_resnet.freeze(model, x)
    with pytest.raises(RuntimeError, match="freeze: bn1 is in training mode; .* BatchNorm2d does something else then"):
        fused_resnet.freeze(model.train(), x)
    dropping = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    for name, module in (("1", dropping), ("the model", Branches())):
        with pytest.raises(RuntimeError, match=f"freeze: {name} is in training mode"):
            fused_resnet.freeze(module, x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if self.training else -self.conv(x)


def ask(module):
    return module.training


class AsksThroughAFunction(nn.Module):
    """Its own code does not say `training`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if ask(self) else -self.conv(x)


class CountsInTraining(AsksThroughAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if ask(self):
            self.calls += 1
        return self.conv(x) + self.calls


@pytest.mark.parametrize("model", (AsksThroughAFunction, CountsInTraining))
def test_what_training_mode_means_is_seen_in_the_graph(model):
    model, x = model(), torch.randn(X)
    with pytest.raises(RuntimeError, match="freeze: the model is in training mode; call model.eval"):
        fused_resnet.freeze(model, x)
    frozen_equals(model.eval(), x)


def with_fresh_modules(model):
    model.relu, model.layer1[0].relu = nn.Sequential(nn.Identity(), nn.ReLU()), nn.ReLU()
    return model


def exported(model):
    return torch.export.export(model, (torch.randn(X),)).module()


MODELESS = {
    "fresh modules": with_fresh_modules,
    "exported": exported,
    "traced by torch.fx": lambda model: torch.fx.symbolic_trace(nn.Sequential(model).eval()),
    "a flag alone": lambda model: model.conv1.train() and model,
}


@pytest.mark.parametrize("make", MODELESS.values(), ids=MODELESS)
def test_a_training_flag_that_means_nothing_is_no_matter(make):
    model, x = make(networks.small()), torch.randn(X)
    assert any(module.training for module in model.modules())
    flags, hooks = [module.training for module in model.modules()], len(model._forward_pre_hooks)
    with torch.no_grad():
        expected = model(x)
    frozen = fused_resnet.freeze(model, x)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    assert [module.training for module in model.modules()] == flags and len(model._forward_pre_hooks) == hooks


def test_an_exported_model_keeps_its_guards():
    frozen = fused_resnet.freeze(exported(networks.small()), torch.randn(X))
    with pytest.raises(ValueError, match="Guard failed"):
        frozen(torch.randn(3, *X[1:]))


# ----------------------------------------------------------------------------------------------- state and other models

COUNT, KEPT = 0, []


class Keeps(nn.Module):
    """A convolution, and something that `write` may write to before it."""

    calls = 0

    def __init__(self, write):
        super().__init__()
        self.write, self.conv, self.child = write, nn.Conv2d(4, 4, 1), nn.ReLU()
        self.register_buffer("n", torch.zeros(1))
        self.scale, self.child.calls = nn.Parameter(torch.ones(4, 1, 1)), 0
        self.k, self.seen, self.named, self.plain = 0, [], {}, torch.zeros(1)
        self.random, self.generator, self.numbers = random.Random(0), torch.Generator(), iter([1, 2, 3, 4])
        self.array = array.array("d", [0, 0])

    def forward(self, x):
        factor = self.write(self, x)
        return self.conv(x) if factor is None else self.conv(x) * factor


def adds_in_place(m, x):
    m.n += 1
    return m.n


def counts_globally(m, x):
    global COUNT
    COUNT += 1


def counts_around():
    calls = 0

    def count(m, x):
        nonlocal calls
        calls += 1

    return count


def note(x):
    CALLS[0] += 1


def note_in_an_attribute(x):
    note_in_an_attribute.calls += 1


def note_in_a_default(x, seen=[]):  # noqa: B006
    seen.append(1)


def note_by_keyword(x, *, seen=[]):  # noqa: B006
    seen.append(1)


def hands_on(x):
    [note(part) for part in (x,)]


@contextlib.contextmanager
def noting():
    note(None)
    yield


class Meter:
    """A plain object, whose methods count elsewhere."""

    total = 0
    named = property(lambda self: note(self))

    def __call__(self, x):
        Meter.total += 1

    def method(self, *args):
        note(None)

    @staticmethod
    def static(x):
        note(x)

    @classmethod
    def of_class(cls, x):
        cls.total += 1


def notes_around(m, x):
    with noting():
        pass


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def count(self):
        self.calls += 1


def counts_in_slots(m, x):
    SLOTTED.count()


def notes_inside(m, x):
    import tests_helpers

    tests_helpers.note(x)


def helpers():
    """Another module of the user's."""
    module = types.ModuleType("tests_helpers")
    exec("COUNT = 0\ndef note(x):\n    global COUNT\n    COUNT += 1\n", vars(module))
    return module


CALLS, METER, SLOTTED, HELPERS = [0], Meter(), Slotted(), helpers()
sys.modules["tests_helpers"] = HELPERS
note_in_an_attribute.calls = 0
NOTE, NOTE_PARTLY, NOTES = lambda x: note(x), functools.partial(hands_on), {"first": [note]}


def decorated(function):
    record = {"calls": 0}

    @functools.wraps(function)
    def wrapper(*args):
        record["calls"] += 1
        return function(*args)

    return wrapper


STATEFUL = {
    "n.add_": (lambda m, x: m.n.add_(1), "its attribute n"),
    "n +=": (adds_in_place, "its attribute n"),
    "n = n + 1": (lambda m, x: setattr(m, "n", m.n + 1), "its attribute n"),
    "n.add_(x)": (lambda m, x: m.n.add_(x.mean()), "its attribute n"),
    "n[0] = x": (lambda m, x: operator.setitem(m.n, 0, x.mean()), "its attribute n"),
    "n[0].add_(x)": (lambda m, x: [None, m.n[0].add_(x.mean())][0], "a view of a tensor"),
    "n = x": (lambda m, x: setattr(m, "n", x.mean()), "its attribute n"),
    "n.data": (lambda m, x: m.n.data.add_(1), "its attribute n"),
    "a tensor": (lambda m, x: m.plain.add_(1), "its attribute plain"),
    "a parameter": (lambda m, x: m.scale.mul_(0.5), "its attribute scale"),
    "a parameter's data": (lambda m, x: m.scale.data.mul_(0.5), "its attribute scale"),
    "an assigned parameter's data": (
        lambda m, x: setattr(m.scale, "data", 0.5 * m.scale.data), "the attribute data of a tensor"),
    "a power iteration": (lambda m, x: setattr(m, "n", (m.n * m.scale).mean((1, 2))), "its attribute n"),
    "a counter": (lambda m, x: setattr(m, "k", m.k + 1), "its attribute k"),
    "a new attribute": (lambda m, x: setattr(m, "last", x), "its attribute last"),
    "a list": (lambda m, x: m.seen.append(1), "its attribute seen"),
    "a list of features": (lambda m, x: m.seen.append(x), "its attribute seen"),
    "a dictionary": (lambda m, x: m.named.update(last=x), "its attribute named"),
    "of a child": (lambda m, x: setattr(m.child, "calls", m.child.calls + 1), "its attribute child.calls"),
    "of the class": (lambda m, x: setattr(type(m), "calls", m.calls + 1), "calls, an attribute of the class Keeps"),
    "a global": (counts_globally, "the global variable COUNT"),
    "a global list": (lambda m, x: KEPT.append(1), "the global variable KEPT"),
    "a variable around": (counts_around(), "the variable calls of a function around it"),
    "the first call": (
        lambda m, x: [1.0 if m.k else 2.0, setattr(m, "k", 1)][0], "its attribute k"),
    "a generator of Python's": (lambda m, x: m.random.random(), "its attribute random"),
    "a generator of torch's": (
        lambda m, x: torch.rand(1, generator=m.generator), "its attribute generator"),
    "an iterator": (lambda m, x: next(m.numbers), "its attribute numbers"),
    "an array": (lambda m, x: operator.setitem(m.array, 1, m.array[1] + 1), "its attribute array"),
    "a function's global": (lambda m, x: counts_globally(m, x), "the global variable COUNT"),
    "a function's list": (lambda m, x: note(x), "the global variable CALLS"),
    "a function's function": (lambda m, x: hands_on(x), "the global variable CALLS"),
    "a function's attribute": (
        lambda m, x: note_in_an_attribute(x), "calls, an attribute of the function note_in_an_attribute"),
    "a default argument": (
        lambda m, x: note_in_a_default(x), "a default argument of the function note_in_a_default"),
    "a keyword's default": (lambda m, x: note_by_keyword(x), "a default argument of the function note_by_keyword"),
    "a lambda": (lambda m, x: NOTE(x), "the global variable CALLS"),
    "a partial function": (lambda m, x: NOTE_PARTLY(x), "the global variable CALLS"),
    "a function in containers": (lambda m, x: NOTES["first"][0](x), "the global variable CALLS"),
    "a generator's function": (notes_around, "the global variable CALLS"),
    "without gradients": (torch.no_grad()(lambda m, x: note(x)), "the global variable CALLS"),
    "a decorator's dictionary": (
        decorated(lambda m, x: None), "the variable record of a function around it"),
    "another module": (lambda m, x: HELPERS.note(x), "the global variable COUNT"),
    "another module's variable": (
        lambda m, x: setattr(HELPERS, "COUNT", HELPERS.COUNT + 1), "the global variable COUNT"),
    "a module imported inside": (notes_inside, "the global variable COUNT"),
    "an object's method": (lambda m, x: METER.method(), "the global variable CALLS"),
    "an object's property": (lambda m, x: METER.named, "the global variable CALLS"),
    "an object's slots": (counts_in_slots, "the global variable SLOTTED"),
    "a bound method": (METER.method, "the global variable CALLS"),
    "an object that is called": (lambda m, x: METER(x), "total, an attribute of the class Meter"),
    "a static method": (lambda m, x: Meter.static(x), "the global variable CALLS"),
    "a class method": (lambda m, x: Meter.of_class(x), "total, an attribute of the class Meter"),
}  # fmt: skip


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("write, what", STATEFUL.values(), ids=STATEFUL)
def test_a_forward_that_keeps_state_is_refused(write, what, mode):
    x = torch.randn(2, 4, 5, 5)
    with mode():
        model = Keeps(write).eval()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=f"freeze: the forward writes (into )?{what}.* fused_resnet.fuse"):
            fused_resnet.freeze(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.k == 0 and not model.seen and not hasattr(model, "last")


CACHED = {
    "a constant": lambda m, x: setattr(m, "stride", 4),
    "made once": lambda m, x: m.named.setdefault("scale", torch.arange(4.0).view(4, 1, 1)),
    "made again": lambda m, x: setattr(m, "made", torch.arange(4.0).view(4, 1, 1)) or m.made,
    "written back": lambda m, x: setattr(m, "n", m.n.clone()),
    "the same value": lambda m, x: m.n.mul_(1) + 1,
}


def gathers_once(m, x):
    """The biases of LeViT's attention: a dictionary by device, of what is computed from parameters."""
    key = str(x.device)
    if key not in m.named:
        m.named[key] = m.scale[[3, 2, 1, 0]]
    return m.named[key]


def keeps_a_product(m, x):
    m.product = 2 * m.scale if m.k == 0 else m.product
    return m.product


def logs(m, x):
    LOG.warning("called")
    warnings.warn("called", UserWarning, stacklevel=1)


def warns_once(m, x):
    global HAS_WARNED
    if not HAS_WARNED:
        LOG.warning("once")
    HAS_WARNED = True


@functools.lru_cache(maxsize=None)
def scale_of(channels):
    return torch.arange(float(channels)).view(channels, 1, 1)


def remembered(channels):
    return SCALES.setdefault(channels, scale_of(channels))


def is_in_a_circle(x):
    return CIRCLE


LOG, HAS_WARNED, SCALES, CIRCLE = logging.getLogger("tests.plan"), False, {}, [is_in_a_circle]
CIRCLE += [CIRCLE, float("nan"), threading.Lock(), object()]


DEEP, MANY = [], [{} for _ in range(2**15)]
for _ in range(10_000):
    DEEP = [DEEP]


CACHED |= {
    "a log": logs,
    "a warning": warns_once,
    "a cached function": lambda m, x: scale_of(4),
    "a dictionary of a function's": lambda m, x: remembered(4),
    "a circle": lambda m, x: [is_in_a_circle(x), None][1],
    "a deep list": lambda m, x: setattr(m, "k", bool(DEEP)),
    "many objects": lambda m, x: setattr(m, "k", len(MANY)),
    "not a number": lambda m, x: setattr(m, "k", float("nan")),
}
CACHED |= {"computed from a parameter": gathers_once, "a product of a parameter": keeps_a_product}


@pytest.mark.filterwarnings("ignore:called")
@pytest.mark.parametrize("write", CACHED.values(), ids=CACHED)
def test_a_cache_is_no_state(write):
    """What the second call leaves as the first one did."""
    frozen_equals(Keeps(write), torch.randn(2, 4, 5, 5))


def test_the_state_of_installed_packages_is_theirs_unless_the_model_is_of_one(monkeypatch):
    installed, x = helpers(), torch.randn(2, 4, 5, 5)
    installed.__name__ = "tests_installed"
    installed.__file__ = "lib/site-packages/tests_installed.py"
    monkeypatch.setitem(sys.modules, "tests_installed", installed)
    write = types.FunctionType((lambda m, x: note(x)).__code__, vars(installed))
    frozen_equals(Keeps(write), x)
    monkeypatch.setattr(Keeps, "__module__", "tests_installed")
    with pytest.raises(RuntimeError, match="freeze: the forward writes the global variable COUNT"):
        fused_resnet.freeze(Keeps(write).eval(), x)


class Asked:
    """Counts how often it is asked what it holds. A copy is itself."""

    def __init__(self):
        self.times = 0

    def __deepcopy__(self, memo):
        return self

    def __getstate__(self):
        self.times += 1
        return vars(self)

    def __getattr__(self, name):
        self.times += 1
        raise AttributeError(name)


def test_what_a_users_object_holds_is_seen_without_its_methods():
    model = Keeps(lambda m, x: None)
    model.asked = Asked()
    frozen_equals(model, torch.randn(2, 4, 5, 5))
    assert model.asked.times == 0
    model.write = lambda m, x: setattr(m.asked, "calls", vars(m.asked).get("calls", 0) + 1)
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute asked"):
        fused_resnet.freeze(model.eval(), torch.randn(2, 4, 5, 5))


def test_large_arrays_are_read_where_they_are():
    numpy, x = pytest.importorskip("numpy"), torch.randn(2, 4, 5, 5)
    model = Keeps(lambda m, x: None).eval()
    model.table = numpy.zeros((1024, 1024))
    tracemalloc.start()
    try:
        fused_resnet.freeze(model, x)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * model.table.nbytes  # a copy of the model has one of it
    finally:
        tracemalloc.stop()
    model.write = lambda m, x: operator.setitem(m.table.T[::2], (-1, 7), m.table[7, -2] + 1)
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute table"):
        fused_resnet.freeze(model, x)


def test_a_counter_behind_many_objects_or_beside_shared_ones_is_seen():
    model, x, shared = Keeps(lambda m, x: None).eval(), torch.randn(2, 4, 5, 5), None
    for _ in range(60):  # with 2**60 ways through it
        shared = types.SimpleNamespace(one=shared, other=shared)
    model.many, model.shared, model.count = [[i] for i in range(2**15)], shared, [[0]]
    frozen_equals(model, x)
    model.write = lambda m, x: m.count[0].append(1)
    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute count"):
        fused_resnet.freeze(model, x)


def test_running_statistics_that_a_function_updates_are_state():
    """ATen writes them without counting it."""

    class Updates(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x):
            return F.batch_norm(self.conv(x), self.mean, self.var, training=True)

    with pytest.raises(RuntimeError, match="freeze: the forward writes its attribute"):
        fused_resnet.freeze(Updates().eval(), torch.randn(2, 4, 9, 9))


DRAWN = {
    "torch": lambda m, x: torch.randn(4, 1, 1),
    "Python": lambda m, x: random.random(),
    "numpy": lambda m, x: float(pytest.importorskip("numpy").random.rand()),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_random_numbers_that_a_graph_would_repeat_are_refused(draw):
    with pytest.raises(RuntimeError, match="freeze: the forward draws random numbers that depend on no input"):
        fused_resnet.freeze(Keeps(draw).eval(), torch.randn(2, 4, 5, 5))


def test_random_numbers_like_a_tensor_are_drawn_in_each_call():
    frozen = fused_resnet.freeze(Keeps(lambda m, x: torch.randn_like(x)).eval(), x := torch.randn(2, 4, 5, 5))
    assert not torch.equal(frozen(x), frozen(x))


def sums_up(m, x):
    total = torch.zeros(1)
    total += x.mean()
    return total


def fills_in(m, x):
    scale = torch.ones(4, 1, 1)
    scale[1] = x.mean()
    return scale


def written_between(m, x):
    scale = torch.ones(4, 1, 1)
    once = x * scale
    scale.add_(1)
    return once + x * scale


@pytest.mark.parametrize("write", (sums_up, fills_in, written_between))
def test_tensors_that_the_forward_makes_are_new_in_each_call(write):
    model, x = Keeps(write).eval(), torch.randn(2, 4, 5, 5)
    frozen = fused_resnet.freeze(model, x)
    for image in (x, -x, x):
        equal_outputs(frozen(image), networks.in_fp64(model, image))


def ddp(model):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def with_a_compiled_stage(model):
    model.layer2 = torch.compile(model.layer2, backend="eager")
    return model


def compiled_in_place(model):
    model.layer2.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a compiled stage": with_a_compiled_stage,
    "compiled twice": lambda model: torch.compile(with_a_compiled_stage(model), backend="eager"),
    "compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": ddp,
    "compiled DistributedDataParallel": lambda model: torch.compile(ddp(model), backend="eager"),
}


@pytest.fixture
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_frozen_like_what_is_in_them(wrap, no_process_group):
    plain, x = networks.small(), torch.randn(X)
    model, expected = wrap(copy.deepcopy(plain)).eval(), fused_resnet.freeze(plain, x)(x)
    frozen = fused_resnet.freeze(model, x)
    assert torch.equal(frozen(x), expected) and frozen.unfreeze() is model
    assert len(convolutions(frozen, x)) == 12
    parts = fused_resnet.freeze(Each(model).eval(), [x])
    assert list(parts.parts) == ["model"] and torch.equal(parts.parts["model"](x), expected)
    bn = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    bn.train()
    with pytest.raises(RuntimeError, match="bn1 is in training mode"):
        fused_resnet.freeze(model, x)


def test_a_wrapper_with_hooks_is_refused():
    model, x = torch.compile(networks.small(), backend="eager"), torch.randn(X)
    model.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="freeze: the model has forward hooks, which a plan would drop"):
        fused_resnet.freeze(model, x)


class Tagged(torch.Tensor):
    """A subclass of which only torch functions know what it does."""


def with_weight(change):
    def make():
        model = networks.small()
        with torch.no_grad():
            model.fc.weight = nn.Parameter(change(model.fc.weight.detach()), requires_grad=False)
        return model

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def quantized(by_torch_fx):
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    x = torch.randn(X)
    if by_torch_fx:
        prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return quantize_fx.convert_fx(prepared)
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    prepared(x)
    return quantization.convert(prepared)


CONVERTED = {
    "int8": (lambda: quantized(False), "the model is quantized already .*Freeze the float model"),
    "int8 by torch.fx": (lambda: quantized(True), "the model is quantized already .*Freeze the float model"),
    "a quantized tensor": (
        with_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "fc.weight .* dtype qint8, .* dense"),
    "a subclass": (with_weight(lambda w: w.as_subclass(Tagged)), "fc.weight is a Tagged"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)).eval(), "0.weight has no values yet. Call the model once"),
    "sparse": (with_weight(lambda w: w.to_sparse_csr()), "fc.weight is a Parameter of layout sparse_csr"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, message", CONVERTED.values(), ids=CONVERTED)
def test_models_of_other_numbers_are_refused(make, message):
    with pytest.raises(TypeError, match=f"freeze: {message}"):
        fused_resnet.freeze(make(), torch.randn(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", (None, torch.float64, torch.bfloat16))
def test_a_linear_that_quantizes_its_input_serves_in_a_plan(dtype):
    from torch.ao.quantization import quantize_dynamic

    model, x = networks.small(), torch.randn(X)
    model = quantize_dynamic(model, {nn.Linear})
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    with torch.no_grad():
        assert networks.error(frozen(x), model(x).double()) < 0.01  # inputs that differ by rounding may be int8s apart


def test_a_sparse_operand_is_no_weight():
    model, x = Traced(lambda m, x: torch.sparse.mm(m.mix, m.conv(x).flatten(1).t())).eval(), torch.randn(2, 4, 6, 7)
    model.register_buffer("mix", torch.randn(3, 4 * 6 * 7).relu().to_sparse())
    with torch.no_grad():
        torch.testing.assert_close(fused_resnet.freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


class TwoBranches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSED = {
    "wrong channels": (lambda m: fused_resnet.freeze(m, torch.randn(2, 4, 16, 16)), ValueError, "cannot take an input"),
    "wrong rank": (lambda m: fused_resnet.freeze(m, torch.randn(2, 3)), ValueError, r"input of shape \(2, 3\)"),
    "integers": (lambda m: fused_resnet.freeze(m, torch.ones(X).int()), TypeError, "floating-point tensor .* int32"),
    "not a tensor": (lambda m: fused_resnet.freeze(m, [1.0]), TypeError, "example_input must be .*list"),
    "not a module": (lambda m: fused_resnet.freeze(torch.relu, torch.ones(X)), TypeError, "expected an nn.Module"),
    "dtype": (lambda m: fused_resnet.freeze(m, torch.ones(X), dtype=torch.int8), TypeError, "dtype must be float32"),
    "unknown backend": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), backend="tpu"), BackendError, "unknown backend 'tpu'; known"),
    "forced backend": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), backend="cudnn"), BackendError, "'cudnn' cannot run this"),
    "forced dtype": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), dtype=torch.float64, backend="onednn"), BackendError,
        "'onednn' cannot run this: float64 is not supported"),
    "example on another device": (
        lambda m: fused_resnet.freeze(m, torch.ones(X, device="meta")), (TypeError, ValueError), "meta"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_and_the_model_unchanged(call, error, message):
    model, x = networks.small(), torch.randn(X)
    model.fc.register_forward_hook(lambda *_: None)
    before, expected = remember(model), model(x)
    with pytest.raises(error, match=message):
        call(model)
    unchanged(model, before, x, expected)


def test_untraceable_models_are_refused():
    with pytest.raises(
        ValueError, match="torch.fx cannot trace TwoBranches: .*Freeze the part that is a plain network"
    ):
        fused_resnet.freeze(TwoBranches().eval(), torch.ones(X))


def test_the_model_is_unchanged_by_success_and_comes_back():
    model, x = networks.small(), torch.randn(X)
    before, expected = remember(model), model(x)
    frozen = fused_resnet.freeze(model, x, dtype=torch.float64)
    frozen(x)
    unchanged(model, before, x, expected)
    assert frozen.unfreeze() is model


def test_calls_that_do_not_fit_are_refused():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    with pytest.raises(TypeError, match="frozen for float32 inputs on cpu, got float64 on cpu"):
        frozen(torch.randn(X).double())
    with pytest.raises(TypeError, match="frozen for float32 inputs on cpu, got float32 on meta"):
        frozen(torch.randn(X, device="meta"))
    with pytest.raises(TypeError, match="got list"):
        frozen([1])
    with pytest.raises(ValueError, match=r"cannot take an input of shape \(2, 5, 16, 16\)"):
        frozen(torch.randn(2, 5, 16, 16))
    x = torch.randn(X, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients: use fused_resnet.fuse"):
        frozen(x)
    with torch.no_grad():
        assert not frozen(x).requires_grad


def test_a_frozen_model_stays_as_it_is():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    assert frozen.eval() is frozen and not frozen.training
    for call in (frozen.train, frozen.half, lambda: frozen.to(torch.float64)):
        with pytest.raises(RuntimeError, match="a frozen model cannot be .*frozen.unfreeze"):
            call()


UNMOVED = {
    "to(device)": lambda m: m.to("cpu"),
    "to(dtype)": lambda m: m.to(torch.float32),
    "to(tensor)": lambda m: m.to(torch.ones(1)),
    "to(memory_format)": lambda m: m.to(memory_format=torch.channels_last),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float32),
    "apply": lambda m: m.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d) else None),
    "share_memory": lambda m: m.share_memory(),
    "eval": lambda m: m.eval(),
    "train(False)": lambda m: m.train(False),
    "requires_grad_(False)": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad() or m,
}
MOVED = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device)": lambda m: m.to("meta"),
    "type": lambda m: m.type(torch.float64),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "to_empty, where it is": lambda m: m.to_empty(device="cpu"),
    "cuda": lambda m: m.cuda() if not torch.cuda.is_available() else m.to("meta"),
    "train": lambda m: m.train(),
}


@pytest.fixture(params=("whole", "parts"))
def frozen_and_example(request):
    """A frozen model and what it takes."""
    if request.param == "whole":
        return fused_resnet.freeze(networks.small(), torch.randn(X)), torch.randn(X)
    images = [torch.randn(X)]
    return fused_resnet.freeze(Each(networks.small()).eval(), images), images


class Each(nn.Module):
    """A list of images in, which torch.fx does not trace."""

    def __init__(self, model):
        super().__init__()
        self.model, self.classifier = model, nn.Linear(10, 4)

    def forward(self, images):
        return torch.cat([self.classifier(self.model(image)) for image in images])


@pytest.mark.parametrize("call", UNMOVED.values(), ids=UNMOVED)
def test_what_would_not_change_a_frozen_model_does_nothing(frozen_and_example, call):
    frozen, x = frozen_and_example
    around, expected = nn.Sequential(frozen, nn.Linear(10, 10)).eval(), frozen(x)
    assert call(frozen) is frozen and call(around) is around and around[0] is frozen
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("call", MOVED.values(), ids=MOVED)
def test_what_would_change_a_frozen_model_is_refused(frozen_and_example, call):
    frozen, x = frozen_and_example
    around, expected = nn.Sequential(frozen, nn.Linear(10, 10)).eval(), frozen(x)
    for module in (frozen, around):
        with pytest.raises(RuntimeError, match="a frozen model cannot be .*frozen.unfreeze"):
            call(module)
    assert torch.equal(frozen(x), expected) and {p.dtype for p in around[1].parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("in_parts", (False, True))
def test_a_model_frozen_in_another_dtype_is_in_that_of_its_inputs(dtype, in_parts):
    """What it takes and returns decides: in the dtype of its arithmetic, the next call would fail."""
    model, x = (Each(networks.small()).eval(), [torch.randn(X)]) if in_parts else (networks.small(), torch.randn(X))
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    around, expected = nn.Sequential(frozen, nn.LazyLinear(10)).eval(), frozen(x)
    around(x)
    for call in UNMOVED.values():
        assert call(frozen) is frozen and call(around) is around
    for other in (torch.bfloat16, torch.float16, torch.float64):
        for module in (frozen, around):
            with pytest.raises(RuntimeError, match="cannot be moved or converted.* is in float32 on cpu"):
                module.to(other)
    assert around[1].weight.dtype == torch.float32 and torch.equal(frozen(x), expected)
    assert in_parts or frozen.dtype == dtype


def test_hooks_of_leaves_are_kept_and_those_of_containers_refused():
    model, x, seen = networks.small(), torch.randn(X), []
    handle = model.layer1[0].conv1.register_forward_hook(
        lambda module, args, out: seen.append(tuple(out.shape)) or 2 * out
    )
    frozen = fused_resnet.freeze(model, x)
    seen.clear()
    as_good_as_plain(frozen, model, x)
    seen.clear()
    frozen(x)
    assert seen == [(2, 8, 16, 16)]
    handle.remove()
    for module, name in ((model.layer1[0], "layer1.0"), (model, "the model")):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: None)
            with pytest.raises(ValueError, match=f"freeze: {name} has forward hooks, which a plan would drop"):
                fused_resnet.freeze(model, x)
            handle.remove()


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))), ids=("copy", "pickle")
)
def test_copies_and_pickles(copied):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    again = copied(frozen)
    assert torch.equal(again(x), frozen(x)) and again.dtype == torch.float32
    assert torch.equal(again(x[:1]), frozen(x[:1])) and isinstance(again.unfreeze(), networks.Network)


def test_parametrized_and_replaced_modules_are_called():
    model, x = networks.small(), torch.randn(X)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.layer2[0].bn1 = nn.GroupNorm(4, 12)
    model.layer3[0].relu = nn.SiLU()
    model.layer1[1].bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    as_good_as_plain(fused_resnet.freeze(model.eval(), x), model, x)


COMPUTED = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "pruned twice": lambda conv: [prune.random_unstructured(conv, "weight", 0.3) for _ in range(2)],
    "weight_norm, old": pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    "spectral_norm, old": nn.utils.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("grad_mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed_from_others(compute, grad_mode):
    """In grad mode such a weight has a history, which deepcopy refuses. The model's own stays as it was, trainable."""
    model, x = networks.small(), torch.randn(X)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs[:3]:
        compute(conv)
    images = [x]
    parts = Each(model).eval()
    model(x)
    before, hooks = remember(model), [len(conv._forward_pre_hooks) for conv in convs]
    with torch.no_grad():
        expected, of_parts = model(x), parts(images)
    with grad_mode():
        frozen, in_parts = fused_resnet.freeze(model, x), fused_resnet.freeze(parts, images)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_parts(images), of_parts, rtol=1e-4, atol=1e-5)
    assert list(in_parts.parts) == ["model"]
    unchanged(model, before, x, expected)
    assert [len(conv._forward_pre_hooks) for conv in convs] == hooks
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in convs[0].parameters())
    if hooks[0]:  # a hook's weight is folded like any other
        assert len(convolutions(frozen, x)) == len(convs)


def test_a_hook_beside_the_one_that_computes_the_weight_is_kept():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(X)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)


def test_tensors_with_a_history_are_copied():
    """As an attribute, as a buffer and in a list."""
    weight = torch.ones(4, 1, 1, requires_grad=True)
    model = Traced(lambda m, x: m.conv(x) * m.scale + m.shift * m.others[0]).eval()
    model.scale, model.others = 2 * weight, [3 * weight]
    model.register_buffer("shift", 4 * weight)
    x = torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.scale.requires_grad and model.shift.requires_grad


# ------------------------------------------------------------------------------------- what a model may do to a plan


class Traced(nn.Module):
    """A forward given as a function of (self, x), over a few modules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, other=None):
        return self.function(self, x) if other is None else self.pool(other)


def frozen_equals(model, x, **options):
    equal_outputs(fused_resnet.freeze(model.eval(), x, **options)(x), networks.in_fp64(model, x))


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


@pytest.mark.parametrize(
    "function",
    (
        lambda m, x: m.conv(torch.relu_(x)) + x,
        lambda m, x: m.conv(m.relu(x)) + x,
        lambda m, x: m.conv(m.relu(x.view(x.shape))) + x,
        augments_its_input,
    ),
    ids=("relu_", "ReLU(inplace=True)", "through a view", "+="),
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


def test_an_example_on_another_device_is_refused():
    with pytest.raises(TypeError, match="example_input is on meta but the model is on cpu"):
        fused_resnet.freeze(networks.small(), torch.randn(X, device="meta"))


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_cuda_graph(dtype):
    """On a GPU a plan is a graph: right for several shapes, from several threads and streams, in and out of inference
    mode, and its outputs are fresh."""
    model, x = networks.small().cuda(), torch.randn(X, device="cuda")
    limit = 5e-3 if dtype == torch.float32 else 5e-2  # products in TF32, unless torch is told otherwise
    with torch.inference_mode():
        frozen = fused_resnet.freeze(model, x, dtype=dtype)
    first, second = frozen(x), frozen(-x)
    assert networks.error(first, networks.in_fp64(model, x)) < limit and first.data_ptr() != second.data_ptr()
    wrong = []

    def serve(batch):
        stream, own = torch.cuda.Stream(), torch.randn(batch, *X[1:], device="cuda")
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(stream):
            expected = networks.in_fp64(model, own)
            if any(networks.error(frozen(own), expected) > limit for _ in range(20)):
                wrong.append(batch)

    threads = [threading.Thread(target=serve, args=(1 + index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(frozen.is_graphed(torch.empty(batch, *X[1:], device="cuda")) for batch in (1, 2, 3))


FAULTS = """
import resource, statistics, torch, fused_resnet
from torch import nn
model = nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 8, 1)).eval()
x = torch.randn(8, 16, 192, 192)  # results of 75 MB: more than malloc keeps of its own accord
frozen = fused_resnet.freeze(model, x)
faults = []
for _ in range(8):  # the first few find the heap still growing
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frozen(x)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[1:])))
"""


@pytest.mark.skipif(not malloc._is_ours_to_set(), reason="needs glibc with malloc's thresholds not set from outside")
def test_the_workspace_stays_with_the_process():
    def page_faults(**environment):
        run = subprocess.run(
            [sys.executable, "-c", FAULTS], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert page_faults() < 1000
    assert page_faults(MALLOC_MMAP_THRESHOLD_=str(32 * 2**20)) > 10_000  # the environment's word is the last


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch):
    """A CUDA graph that is freed meanwhile would end the capture, and so would another thread's capture."""
    seen = []

    def call():
        seen.append((gc.isenabled(), cuda_graphs._CAPTURING.locked()))
        if len(seen) == 8:
            raise RuntimeError("it cannot be captured")

    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        fake = mock.MagicMock()
        fake.return_value.__exit__.return_value = False
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda_graphs.captured(call)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        cuda_graphs.captured(call)
    assert seen == [*[(True, False)] * 3, (False, True)] * 2  # three calls to warm up
    assert gc.isenabled() and not cuda_graphs._CAPTURING.locked()


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


@needs_onednn
def test_a_classifier_is_packed_and_right():
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    packed = [m for m in frozen.plan(x).modules() if isinstance(m, FrozenLinear)]
    assert len(packed) == 1 and not any(type(m) is nn.Linear for m in frozen.plan(x).modules())
    as_good_as_plain(frozen, model, x)
    with torch.no_grad():
        model.fc.weight.zero_()
    assert frozen(x).abs().sum() > 0
