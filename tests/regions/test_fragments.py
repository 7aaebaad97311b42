"""Fragments as regions: random graphs of convolutions, poolings and linear layers, step by step against fp64."""

import random

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.kernels import compiled
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.regions import fragment, program
from fused_resnet.regions.fragment import ConvStep, CopyStep, FlattenStep, Fragment, GateStep, PoolStep
from tests.support.regions import copied, draw_copies, draw_groups, kernels

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

KERNELS = kernels()
LEAST = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8}  # also of fp32's own sums, and of Winograd's
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
CHANNELS = (1, 3, 5, 17, 32, 32, 33, 40, 64, 70)


class Drawn:
    """A fragment with its weights and inputs, and what it should give. Values are drawn step by step."""

    def __init__(self, seed, dtype):
        self.draw, self.dtype = random.Random(seed), dtype
        torch.manual_seed(seed)
        self.N, self.steps, self.weights, self.biases = self.draw.choice((1, 1, 2, 3, 5)), [], {}, {}
        self.shapes = [self.image() for _ in range(self.draw.choice((1, 1, 2)))]
        self.values, self.oldest = list(self.shapes), 0
        if self.draw.random() < 0.3:
            self.stem()
        for _ in range(self.draw.randint(2, 8)):
            kinds = self.convolution, self.pooling, self.copies, self.classifier, self.gate
            self.draw.choices(kinds, (70, 9, 8, 5, 12))[0]()
        first = len(self.shapes)
        kept = [value for value in range(first, len(self.values)) if self.draw.random() < 0.2]
        outputs = tuple(sorted({len(self.values) - 1, *kept}))
        self.fragment = Fragment(tuple(self.shapes), tuple(self.steps), outputs, dtype)

    def image(self):
        return self.N, self.draw.choice(CHANNELS), self.draw.randint(1, 13), self.draw.randint(1, 19)

    def add(self, step, shape):
        self.steps.append(step)
        self.values.append(shape)

    def source(self):
        return self.draw.choice(range(max(self.oldest, len(self.values) - 4), len(self.values)))

    def known(self):
        return [(value, self.values[value]) for value in range(self.oldest, len(self.values))]

    def stem(self):
        """A convolution of an image and a pooling of that, which nothing else reads."""
        draw = self.draw
        self.shapes[-1] = self.values[-1] = (self.N, draw.choice((1, 3, 5)), draw.randint(9, 21), draw.randint(9, 21))
        size, stride = draw.choice(((3, 3), (7, 7), (2, 4))), (draw.choice((1, 1, 2)), draw.randint(1, 2))
        padding = size[0] // 2, size[1] // 2
        K, activation = draw.choice(CHANNELS), draw.choice(("none", "relu", "silu"))
        self.weigh(len(self.values) - 1, K, size, stride, padding, activation=activation)
        self.oldest = len(self.values) - 1
        self.pooling()
        self.oldest += 1

    def pooling(self):
        x, draw = self.source(), self.draw
        N, C, H, W = self.values[x]
        window = draw.randint(1, min(3, H)), draw.randint(1, min(3, W))
        stride, padding = (draw.randint(1, 3), draw.randint(1, 3)), tuple(draw.randint(0, side // 2) for side in window)
        kind = draw.choice(("max", "average"))
        P, Q = ((size + 2 * p - k) // s + 1 for size, k, s, p in zip((H, W), window, stride, padding))
        self.add(PoolStep(kind, x, window, stride, padding, draw.random() < 0.5), (N, C, P, Q))

    def copies(self):
        step, shape = draw_copies(self.draw, self.source(), self.known())
        self.add(step, shape)

    def classifier(self):
        """A map pooled to one pixel, flattened, and a linear layer of it."""
        x = self.source()
        N, C, *sides = self.values[x]
        self.add(PoolStep("average", x, tuple(sides), tuple(sides), (0, 0), False), (N, C, 1, 1))
        self.add(FlattenStep(len(self.values) - 1), (N, C, 1, 1))
        self.weigh(len(self.values) - 1, self.draw.choice(CHANNELS), (1, 1), is_linear=True)

    def gate(self):
        """A map's means, two small convolutions, and the product with that map or another, mostly with a sum."""
        x, draw = self.source(), self.draw
        N, C, *sides = self.values[x]
        self.add(PoolStep("average", x, tuple(sides), tuple(sides), (0, 0), False), (N, C, 1, 1))
        hidden, activation = draw.choice((1, 4, 33)), draw.choice(("none", "relu", "silu"))
        self.weigh(len(self.values) - 1, hidden, (1, 1), activation=activation)
        gated = draw.choice([value for value, shape in self.known() if shape[2:] == tuple(sides)])
        self.weigh(len(self.values) - 1, self.values[gated][1], (1, 1))
        alike = [value for value, shape in self.known() if shape == self.values[gated]]
        function, activation = draw.choice(("sigmoid", "hardsigmoid")), draw.choice(("none", "relu", "relu6", "silu"))
        residual = draw.choice((None, *alike))
        self.add(GateStep(gated, len(self.values) - 1, residual, function, activation), self.values[gated])

    def convolution(self):
        x, draw = self.source(), self.draw
        sides, window = self.values[x][2:], ((1, 1), (1, 1), (0, 0), (1, 1))
        chosen = draw.random()
        if chosen < 0.35:
            window = (3, 3), (1, 1), (draw.choice((1, 1, 2)), 1), (1, 1)
        elif chosen < 0.75:
            size = draw.choice((1, 1, 2, 3, 5, 7)), draw.choice((1, 1, 2, 3, 4, 7))
            dilation = draw.choice(((1, 1), (1, 1), (2, 1), (1, 3)))
            padding = tuple(draw.randint(0, side) for side in size)
            window = size, (draw.randint(1, 3), draw.randint(1, 3)), padding, dilation
        if min(outputs_of(sides, window)) < 1:
            window = (1, 1), (1, 1), (0, 0), (1, 1)
        alike = [value for value, shape in self.known() if shape[2:] == outputs_of(sides, window)]
        residual = draw.choice(alike) if alike and draw.random() < 0.6 else None
        K = draw.choice(CHANNELS) if residual is None else self.values[residual][1]
        activation, is_winograd = (
            draw.choice(("none", "none", "relu", "relu6", "silu")),
            chosen < 0.35 and draw.random() < 0.6,
        )
        groups = 1 if is_winograd else draw_groups(draw, self.values[x][1], K)
        how = dict(groups=groups, activation=activation, by_winograd=is_winograd)
        self.weigh(x, K, *window, residual=residual, **how)

    def weigh(self, x, K, size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), activation="none", groups=1, **options):
        N, C, *sides = self.values[x]
        place, shape = len(self.steps), (N, K, *outputs_of(sides, (size, stride, padding, dilation)))
        reduced = C // groups
        self.weights[place] = (torch.randn(K, reduced, *size) / (reduced * size[0] * size[1]) ** 0.5).to(self.dtype)
        self.biases[place] = torch.randn(K) if self.draw.random() < 0.7 else None
        meta = lambda shape: torch.empty(shape, dtype=self.dtype, device="meta")  # noqa: E731
        has_residual = options.get("residual") is not None
        operands = ConvOperands(
            meta((N, C, *sides)), self.weights[place].to("meta"), residual=meta(shape) if has_residual else None
        )
        problem = conv_problem(operands, stride, padding, dilation, groups, activation)._replace(device="cpu")
        self.add(ConvStep(problem, x, **options), shape)

    def packed(self):
        return {
            place: packing.of([self.weights[part] for part in packing.parts])
            for place, packing in fragment.packings(self.fragment).items()
        }

    def expected(self, inputs, rounded=lambda y: y):
        """In fp64. rounded: what becomes of each step's result."""
        values = [x.double() for x in inputs]
        for place, step in enumerate(self.steps):
            x = values[step.reads[0]]
            if isinstance(step, FlattenStep):
                values.append(x)
            elif isinstance(step, CopyStep):
                values.append(copied(step, [values[read] for read in step.xs]))
            elif isinstance(step, PoolStep) and step.kind == "max":
                values.append(F.max_pool2d(x, step.window, step.stride, step.padding))
            elif isinstance(step, PoolStep):
                values.append(F.avg_pool2d(x, step.window, step.stride, step.padding, False, step.counts_padding))
            elif isinstance(step, GateStep):
                y = x * {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}[step.function](values[step.gate])
                values.append(ACTIVATIONS[step.activation](y if step.residual is None else y + values[step.residual]))
            else:
                p, bias = step.problem, self.biases[place]
                weight, bias = self.weights[place].double(), None if bias is None else bias.double()
                y = F.conv2d(x, weight, bias, p.stride, p.padding, p.dilation, p.groups)
                y = y if step.residual is None else y + values[step.residual]
                values.append(ACTIVATIONS[p.activation](y))
            values[-1] = rounded(values[-1])
        return [values[value] for value in self.fragment.outputs]


def outputs_of(sides, window):
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(sides, *window))


def assert_right(drawn, kernel):
    region = fragment.compile_fragment(drawn.fragment, drawn.packed(), drawn.biases)
    inputs = [torch.randn(shape).to(drawn.dtype) for shape in drawn.shapes]
    workspace = region.empty_workspace().fill_(0xFF)  # NaN
    exact, rounded = drawn.expected(inputs), drawn.expected(inputs, lambda y: y.to(drawn.dtype).double())
    for actual, right, plain in zip(region(inputs, workspace, kernel), exact, rounded):
        allowed = 4 * max(error(plain, right), LEAST[drawn.dtype])
        assert error(actual, right) <= allowed, drawn.fragment


def error(actual, right):
    """The worst, relative to the largest result or to 1, about which the values lie."""
    return ((actual.double() - right).abs().max() / right.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("cache", [0, 2000, 30_000, 2**21], ids=lambda cache: f"{cache} bytes of cache")
@pytest.mark.parametrize("kernel, dtype", KERNELS.items(), ids=str)
def test_random_fragments(monkeypatch, kernel, dtype, cache):
    """Batches in waves of all sizes; sums in place, projections and Winograd wherever they may be.

    An error may be four times what rounding each step's result makes, as `choosing.pieces` allows.
    """
    monkeypatch.setattr(program, "second_level_cache_bytes", lambda: cache)
    all_drawn = [Drawn(1000 * cache + seed, dtype) for seed in range(12 if kernel.endswith("emulated") else 60)]
    for drawn in all_drawn:
        assert_right(drawn, kernel)
    assert any(fragment.pooled_stems(drawn.fragment) for drawn in all_drawn)
    assert any(fragment.gated_into(drawn.fragment) for drawn in all_drawn)


def problem_of(C, K, size, side=6, *, residual=False, activation="none", N=2):
    x = torch.empty(N, C, side, side, device="meta")
    added = torch.empty(N, K, side, side, device="meta") if residual else None
    operands = ConvOperands(x, torch.empty(K, C, size, size, device="meta"), residual=added)
    return conv_problem(operands, (1, 1), (size // 2,) * 2, (1, 1), 1, activation)._replace(device="cpu")


def test_a_map_that_is_read_as_vectors_later_is_not_replaced():
    """The sum may replace the map's memory only where nothing reads its vectors afterwards."""
    one = problem_of(8, 8, 1, 1)
    added = problem_of(8, 8, 1, 1, residual=True)
    steps = (
        ConvStep(one, 0),
        FlattenStep(1),
        ConvStep(one, 1),
        ConvStep(added, 3, 1),
        ConvStep(one, 2, is_linear=True),
    )
    whole = Fragment(((2, 8, 1, 1),), steps, (4, 5), torch.float32)
    assert fragment.replacing(whole) == set()
    assert fragment.replacing(whole._replace(steps=steps[:4], outputs=(4,))) == {3}


def test_a_projection_reads_its_input_where_it_is_absorbed():
    plain, wide = problem_of(32, 32, 1), problem_of(32, 32, 3)
    summed, absorbing = problem_of(32, 32, 3, residual=True, activation="relu"), problem_of(32, 32, 1, residual=True)
    steps = (ConvStep(plain, 0), ConvStep(wide, 0), ConvStep(summed, 2, 0, by_winograd=True), ConvStep(absorbing, 3, 1))
    whole = Fragment(((2, 32, 6, 6),), steps, (4,), torch.float32)
    assert fragment.projections(whole) == {3: 0}
    assert fragment.by_winograd(whole) == fragment.replacing(whole) == set()
