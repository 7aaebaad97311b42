"""The rules for shapes against torch's own meta kernels, and what a freeze on a CPU imports."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.freezing import shapes
from fused_resnet.freezing.dtypes import without_torchs_log

X, W = (2, 4, 9, 8), (6, 4, 3, 3)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def last(*shape):
    return empty(*shape).contiguous(memory_format=torch.channels_last)


KNOWN = {
    "relu": lambda: F.relu(empty(*X)),
    "relu_": lambda: torch.relu_(empty(*X)),
    "x.relu": lambda: last(*X).relu(),
    "in place": lambda: nn.ReLU(True)(last(*X)),
    "relu6": lambda: nn.ReLU6()(empty(*X)),
    "silu": lambda: nn.SiLU()(empty(*X, dtype=torch.bfloat16)),
    "gelu": lambda: nn.GELU()(empty(3, 5)),
    "hardswish": lambda: nn.Hardswish(True)(empty(*X)),
    "sigmoid": lambda: empty(*X).sigmoid_(),
    "softmax": lambda: nn.Softmax(-1)(empty(3, 5)),
    "softmax, channels_last": lambda: torch.softmax(last(*X), 1),
    "clamp": lambda: empty(*X).clamp(0, 6),
    "x + y": lambda: empty(*X) + empty(*X),
    "x += y": lambda: empty(*X).__iadd__(empty(*X)),
    "x += row": lambda: empty(*X).add_(empty(8)),
    "x * gate": lambda: last(*X) * empty(2, 4, 1, 1),
    "gate * x": lambda: empty(2, 4, 1, 1) * empty(*X),
    "x - empty": lambda: empty(0, 4) - empty(1, 4),
    "x / 2": lambda: empty(*X) / 2,
    "2 * x": lambda: 2.0 * empty(*X),
    "add": lambda: torch.add(empty(*X), empty(*X), alpha=2),
    "conv": lambda: F.conv2d(empty(*X), empty(*W), empty(6), stride=2, padding=(1, 2), dilation=(2, 1)),
    "conv, channels_last": lambda: F.conv2d(last(*X), empty(*W)),
    "conv, groups": lambda: F.conv2d(empty(*X), empty(6, 2, 1, 1), groups=2),
    "conv, one image": lambda: F.conv2d(empty(*X[1:]), empty(*W)),
    "conv, no image": lambda: F.conv2d(empty(0, *X[1:]), empty(*W)),
    "conv1d": lambda: F.conv1d(empty(2, 4, 9), empty(6, 4, 3), padding=1),
    "conv3d": lambda: nn.Conv3d(4, 5, 3, device="meta")(empty(2, 4, 5, 6, 7)),
    "batch norm": lambda: nn.BatchNorm2d(4, device="meta").eval()(last(*X)),
    "batch norm of rows": lambda: nn.BatchNorm1d(4, device="meta").eval()(empty(3, 4)),
    "linear": lambda: F.linear(empty(3, 5), empty(7, 5), empty(7)),
    "linear of rows": lambda: F.linear(empty(2, 3, 5), empty(7, 5)),
    "linear of one": lambda: F.linear(empty(5), empty(7, 5)),
    "max pool": lambda: F.max_pool2d(empty(*X), 3, 2, 1),
    "max pool, ceil": lambda: nn.MaxPool2d(2, 3, 1, ceil_mode=True)(last(*X)),
    "max pool, dilated": lambda: nn.MaxPool2d((3, 2), dilation=2)(empty(*X)),
    "average pool": lambda: F.avg_pool2d(empty(*X), 2, ceil_mode=True),
    "average pool, no stride": lambda: nn.AvgPool2d(3, padding=1)(empty(*X)),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(1)(last(*X)),
    "adaptive pool of one side": lambda: nn.AdaptiveAvgPool2d((None, 3))(empty(*X)),
    "mean": lambda: empty(*X).mean((2, -1)),
    "mean, keepdim": lambda: torch.mean(empty(*X), 1, keepdim=True),
    "mean, channels_last": lambda: last(*X).mean(2, keepdim=True),
    "mean of all": lambda: empty(*X).mean(),
    "cat": lambda: torch.cat([empty(*X), empty(2, 1, 9, 8)], 1),
    "cat, channels_last": lambda: torch.cat((last(*X), last(*X)), dim=-3),
}  # fmt: skip


@pytest.mark.parametrize("call", KNOWN.values(), ids=KNOWN)
def test_a_rule_gives_what_torch_gives(call, monkeypatch):
    expected, answers = call(), []

    def noted(rule, *args, **kwargs):
        answers.append(rule(*args, **kwargs))
        return answers[-1]

    for function, rule in list(shapes._RULES.items()):
        monkeypatch.setitem(shapes._RULES, function, functools.partial(noted, rule))
    with shapes.Rules():
        found = call()
    assert any(answer is found for answer in answers)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert found.stride() == expected.stride()


LEFT_TO_TORCH = {
    "integers": lambda: empty(*X, dtype=torch.int64).relu(),
    "two dtypes": lambda: empty(*X) + empty(*X, dtype=torch.float64),
    "permuted": lambda: empty(*X).permute(0, 3, 1, 2).relu(),
    "out": lambda: torch.sigmoid(empty(*X), out=empty(*X)),
    "softmax without a dimension": lambda: torch.softmax(empty(*X), 1, dtype=torch.float64),
    "padding by name": lambda: F.conv2d(empty(*X), empty(*W), padding="same"),
    "batch norm in training": lambda: F.batch_norm(empty(*X), empty(4), empty(4), training=True),
    "rounding": lambda: torch.div(empty(*X), 2, rounding_mode="floor"),
    "mean in another dtype": lambda: empty(*X).mean(1, dtype=torch.float64),
    "cat of two dtypes": lambda: torch.cat([empty(*X), empty(*X, dtype=torch.float64)]),
    "indices": lambda: F.max_pool2d(empty(*X), 2, return_indices=True)[1],
}


@pytest.mark.parametrize("call", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_a_rule_does_not_know_is_left_to_torch(call):
    expected = call()
    with shapes.Rules():
        found = call()
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


WRONG = {
    "channels": lambda x: F.conv2d(x(1, 3, 8, 8), x(*W)),
    "channels of one image": lambda x: F.conv2d(x(3, 8, 8), x(*W)),
    "too small": lambda x: F.conv2d(x(1, 4, 2, 2), x(*W)),
    "too few dimensions": lambda x: F.conv2d(x(4, 8), x(*W)),
    "too many dimensions": lambda x: F.conv1d(x(1, 4, 8, 8), x(6, 4, 3)),
    "features": lambda x: F.linear(x(2, 3, 4), x(7, 5), x(7)),
    "features of one": lambda x: F.linear(x(4), x(7, 5)),
    "nothing is left": lambda x: F.max_pool2d(x(1, 4, 1, 5), 3),
    "nothing is left to average": lambda x: F.avg_pool2d(x(1, 4, 2, 5), 3),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_refusal_has_torchs_words(call):
    with FakeTensorMode(), without_torchs_log(), pytest.raises(RuntimeError) as expected:
        call(torch.empty)
    with shapes.Rules(), pytest.raises(shapes.Refused) as found:
        call(empty)
    assert str(found.value).splitlines()[0] == str(expected.value).splitlines()[0]


DECLINED = {
    "sizes that do not broadcast": lambda: empty(2, 3) + empty(2, 4),
    "a sum that is larger than its place": lambda: empty(3).add_(empty(2, 3)),
    "a dimension that is not there": lambda: empty(2, 3).mean(2),
    "parts of other sizes": lambda: torch.cat([empty(2, 3), empty(3, 3)], 1),
    "a window of padding": lambda: F.max_pool2d(empty(*X), 2, padding=2),
    "vectors of another length": lambda: F.batch_norm(empty(*X), empty(3), empty(3)),
    "a bias of another length": lambda: F.linear(empty(3, 5), empty(7, 5), empty(6)),
}


@pytest.mark.parametrize("call", DECLINED.values(), ids=DECLINED)
def test_what_torch_refuses_no_rule_takes(call):
    with shapes.Rules(), pytest.raises((RuntimeError, IndexError)):
        call()
