"""Int8 fragments by the reference: the steps in their order, each by the contract."""

import torch
import torch.nn.functional as F

from fused_resnet.operators import quantized
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.quantized import Quantized, quantized_over
from fused_resnet.regions import layout
from fused_resnet.regions.exact import run_reference
from fused_resnet.regions.fragment import ConvStep, FlattenStep, Fragment, PoolStep


def step(shape, weight, x, residual=None, stride=1, padding=0, activation="relu"):
    images, weight = torch.empty(shape, device="meta"), weight.to("meta")
    P, Q = ((side + 2 * padding - taps) // stride + 1 for side, taps in zip(shape[2:], weight.shape[2:]))
    added = None if residual is None else torch.empty(shape[0], len(weight), P, Q, device="meta")
    window = ((stride,) * 2, (padding,) * 2, (1, 1), 1)
    problem = conv_problem(ConvOperands(images, weight, residual=added), *window, activation)
    return ConvStep(problem._replace(dtype=torch.int8, device="cpu"), x, residual)


class Block:
    """A stem, a max-pooling, a block with a projection, and the mean of its map as vectors."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, 3, 12, 10, generator=g)
        shapes = ((8, 3, 3, 3), (8, 8, 3, 3), (8, 8, 1, 1), (8, 8, 3, 3))
        self.weights = [torch.randn(shape, generator=g) / shape[1] for shape in shapes]
        self.biases = [torch.randn(8, generator=g) for _ in shapes]
        self.float = self.in_floats()
        y, _, inner, skip, out, _ = self.float
        of_pooled = quantized_over(0.0, y.max().item())
        self.scales = (
            quantized_over(self.x.min().item(), self.x.max().item()),
            of_pooled,
            of_pooled,
            quantized_over(0.0, inner.max().item()),
            quantized_over(skip.min().item(), skip.max().item()),
            quantized_over(0.0, out.max().item()),
            None,
            None,
        )
        self.fragment = Fragment(
            (tuple(self.x.shape),),
            (
                step((2, 3, 12, 10), self.weights[0], 0, padding=1),
                PoolStep("max", 1, (3, 3), (2, 2), (1, 1), False),
                step((2, 8, 6, 5), self.weights[1], 2, padding=1),
                step((2, 8, 6, 5), self.weights[2], 2, activation="none"),
                step((2, 8, 6, 5), self.weights[3], 3, 4, padding=1),
                PoolStep("average", 5, (6, 5), (6, 5), (0, 0), False),
                FlattenStep(6),
            ),
            (2, 5, 7),
            torch.int8,
            self.scales,
        )
        packed = [quantized.quantized_weight(weight) for weight in self.weights]
        x, pooled, inner, skip, out = self.scales[0], *self.scales[2:6]
        asked = {
            0: (packed[0][1], x, pooled, self.biases[0], None, "relu"),
            2: (packed[1][1], pooled, inner, self.biases[1], None, "relu"),
            3: (packed[2][1], pooled, skip, self.biases[2], None, "none"),
            4: (packed[3][1], inner, out, self.biases[3], skip, "relu"),
        }
        self.q = dict(zip(asked, (q for q, _ in packed)))
        self.epilogues = {
            place: quantized.epilogue_of(source, scales, to, bias, residual, activation)
            for place, (scales, source, to, bias, residual, activation) in asked.items()
        }

    def in_floats(self):
        y = F.relu(F.conv2d(self.x, self.weights[0], self.biases[0], padding=1))
        pooled = F.max_pool2d(y, 3, 2, 1)
        inner = F.relu(F.conv2d(pooled, self.weights[1], self.biases[1], padding=1))
        skip = F.conv2d(pooled, self.weights[2], self.biases[2])
        out = F.relu(F.conv2d(inner, self.weights[3], self.biases[3], padding=1) + skip)
        return y, pooled, inner, skip, out, out.mean((2, 3))


def test_a_block_is_near_floats():
    block = Block()
    outputs = run_reference(block.fragment, block.q, block.epilogues, [block.x])
    for actual, expected in zip(outputs, (block.float[1], block.float[4], block.float[5])):
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        noise = (actual - expected).square().sum() / expected.square().sum()
        assert noise < 10 ** (-28 / 10)  # a wrong scale or step leaves about 0 dB


def test_steps_follow_the_contract():
    block = Block()
    x, pooled, out = (block.scales[value] for value in (0, 2, 5))
    first = quantized.conv_act(quantized.quantize(block.x, x), block.q[0], block.epilogues[0], (1, 1), (1, 1))
    q = quantized.max_pool(first, (3, 3), (2, 2), (1, 1))
    a = quantized.conv_act(q, block.q[2], block.epilogues[2], (1, 1), (1, 1))
    b = quantized.conv_act(q, block.q[3], block.epilogues[3])
    c = quantized.conv_act(a, block.q[4], block.epilogues[4], (1, 1), (1, 1), residual_q=b)
    assert (a.dtype, b.dtype, c.dtype) == (torch.uint8, torch.int8, torch.uint8)
    expected = [
        quantized.dequantize(q, pooled),
        quantized.dequantize(c, out),
        quantized.average_pool(c, out)[..., 0, 0],
    ]
    actual = run_reference(block.fragment, block.q, block.epilogues, [block.x])
    assert all(map(torch.equal, actual, expected))


def test_which_values_are_signed_is_part_of_the_text():
    block = Block()
    first, *rest = block.scales
    alike, other = (block.fragment._replace(scales=(Quantized(0.5, sign), *rest)) for sign in (first[1], not first[1]))
    assert other.text != block.fragment.text == alike.text and " int8, " in other.text
    floats = block.fragment._replace(scales=(), dtype=torch.float32)
    assert [layout.outside(dtype) for dtype in layout.DTYPES] == list(layout.DTYPES)
    assert floats.bytes_at_seams == block.fragment.bytes_at_seams
