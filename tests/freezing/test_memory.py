"""freeze: memory that nobody else sees, and sums in place."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.kernels import compiled
from tests.support import networks
from tests.support.plans import (
    Traced,
    X,
    convolutions,
    equal_outputs,
    frozen_equals,
    full,
    needs_onednn,
)


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


def test_another_default_device_changes_nothing():
    model, x = (
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval(),
        torch.randn(2, 16, 8, 8),
    )
    expected = fused_resnet.freeze(model, x)(x)
    with torch.device("meta"):
        assert torch.equal(fused_resnet.freeze(model, x)(x), expected)


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


class Scaled(nn.Module):
    """A convolution, times what `factor` makes of x."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.conv = factor, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x) * self.factor(x)


def sums_up(x):
    total = torch.zeros(1)
    total += x.mean()
    return total


def fills_in(x):
    scale = torch.ones(4, 1, 1)
    scale[1] = x.mean()
    return scale


def written_between(x):
    scale = torch.ones(4, 1, 1)
    once = x * scale
    scale.add_(1)
    return once + x * scale


@pytest.mark.parametrize("factor", (sums_up, fills_in, written_between))
def test_tensors_that_the_forward_makes_are_new_in_each_call(factor):
    model, x = Scaled(factor).eval(), torch.randn(2, 4, 5, 5)
    frozen = fused_resnet.freeze(model, x)
    for image in (x, -x, x):
        equal_outputs(frozen(image), networks.in_fp64(model, image))
