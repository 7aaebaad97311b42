"""Triton's max-pooling behind a convolution, against ATen's addition, activation and pooling.

In Triton's interpreter, or on a GPU. Equal to the last bit, but for the sign of a zero.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.kernels.triton import max_pool, runtime
from fused_resnet.operators.composites import activate
from fused_resnet.operators.problem import MaxPoolProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MISSING = runtime.why_not(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"Triton kernels: {_MISSING}")

# (N, C, H, W), window, stride, padding
CASES = (
    ((2, 64, 12, 12), (3, 3), (2, 2), (1, 1)),  # a ResNet's stem
    ((1, 3, 7, 5), (3, 3), (2, 2), (1, 1)),
    ((3, 70, 9, 11), (2, 2), (2, 2), (0, 0)),
    ((2, 5, 8, 13), (3, 2), (1, 3), (1, 1)),
    ((1, 16, 6, 6), (5, 5), (1, 1), (2, 2)),
    ((2, 8, 5, 1), (5, 1), (1, 1), (0, 0)),  # one output for each image and channel
    ((1, 1, 1, 1), (3, 3), (2, 2), (1, 1)),
    ((0, 4, 6, 6), (3, 3), (2, 2), (1, 1)),
)


def operands(shape, dtype):
    """Sums that round and sums that overflow, ties, and in places infinities and NaN."""
    y = torch.randn(shape, device=DEVICE).mul(8).to(dtype)
    flat = y.view(-1)
    flat[1::7] = flat[1::7].round()
    for place, value in ((5, torch.inf), (17, -torch.inf), (29, torch.nan), (40, torch.finfo(dtype).max)):
        flat[place::97] = value
    bias = torch.randn(shape[1], device=DEVICE).mul(40).to(dtype)
    bias[::5] = torch.finfo(dtype).max / 4
    return y.contiguous(memory_format=torch.channels_last), bias


def pooled(y, bias, window, stride, padding, activation):
    problem = MaxPoolProblem(*y.shape, *window, stride, padding, activation, bias is not None, y.dtype, DEVICE)
    assert max_pool.why_not(problem) is None
    out = torch.full(problem.output_shape, torch.nan, dtype=y.dtype, device=DEVICE)
    out = out.contiguous(memory_format=torch.channels_last)
    max_pool.launch(problem, y, bias, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", max_pool.ACTIVATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_passes_of_aten(case, activation, dtype):
    shape, window, stride, padding = case
    y, bias = operands(shape, dtype)
    for b in (bias, None):
        passes = activate(y if b is None else y + b.view(-1, 1, 1), activation)
        if passes.numel():
            expected = F.max_pool2d(passes, window, stride, padding)
            assert y.numel() < 30 or expected.isnan().any()
        else:
            expected = y.new_empty(0, 4, 3, 3)
        actual = pooled(y, b, window, stride, padding, activation)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_but_padding_is_no_maximum():
    y = torch.full((1, 2, 4, 4), -torch.inf, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y[0, 0] = -5.0  # less than the zero that a padding of zeros would put there
    out = pooled(y, None, (3, 3), (2, 2), (1, 1), "none")
    assert (out[0, 0] == -5).all() and (out[0, 1] == -torch.inf).all()


@pytest.mark.parametrize("changes, reason", (
    (dict(activation="silu"), "silu is not monotone (none, relu, relu6 are)"),
    (dict(dtype=torch.float64), "float64 is not supported (float32, float16, bfloat16 are)"),
    (dict(H=2**15, W=2**12, C=16), "images of 32768x4096 pixels and 16 channels"),
    (dict(N=2**20, H=64, W=64, stride=(1, 1)), "or 4294967296 outputs, need 64-bit offsets"),
    (dict(N=2**15, H=112, W=112), None),  # more than 2**31 elements, which only offsets of images are
))  # fmt: skip
def test_what_it_cannot_do(changes, reason):
    stem = MaxPoolProblem(2, 64, 16, 16, 3, 3, (2, 2), (1, 1), "relu", True, torch.float16, DEVICE)
    answer = max_pool.why_not(stem._replace(**changes))
    assert answer is None if reason is None else reason in answer
