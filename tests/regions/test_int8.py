"""Regions of int8: every kernel that runs here, by its name, gives the bytes of the reference. Nothing may differ."""

import math
import random

import pytest
import torch

from benchmarks.cpu_check.cores import threads
from fused_resnet.kernels import compiled
from fused_resnet.operators import quantized
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.quantized import Epilogue, Quantized, Wide
from fused_resnet.regions import fragment, layout, program
from fused_resnet.regions.exact import run_reference
from fused_resnet.regions.fragment import ConvStep, FlattenStep, Fragment, GateStep, PoolStep
from fused_resnet.regions.program import Region, Requantizing, Segment
from tests.regions.test_exact import Block
from tests.support.regions import draw_copies, draw_groups, int8_kernels

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

KERNELS = int8_kernels()
CHANNELS = (1, 3, 5, 17, 32, 33, 40, 64, 64, 70, 100, 130)


class Drawn:
    """A fragment with its weights, constants and inputs. Sums meet ties, and reach beyond bytes and beyond int32.

    taken: the values that no other step may read.
    """

    taken = frozenset()

    def __init__(self, seed, steps=8):
        self.draw, self.generator, self.linears = random.Random(seed), torch.Generator().manual_seed(seed), []
        self.N, self.steps, self.weights, self.epilogues = self.draw.choice((1, 1, 2, 3)), [], {}, {}
        self.shapes = [self.image() for _ in range(self.draw.choice((1, 1, 2)))]
        self.values, self.scales = list(self.shapes), [self.kept(self.draw.random() < 0.5) for _ in self.shapes]
        if self.draw.random() < 0.5:
            self.stem()
        for _ in range(self.draw.randint(1, steps)):
            kinds = self.convolution, self.maximum, self.copies, self.means, self.gate
            self.draw.choices(kinds, (67, 12, 8, 5, 12))[0]()
        first = len(self.shapes)
        kept = [value for value in range(first, len(self.values)) if self.draw.random() < 0.2]
        kept = [value for value in kept if value not in self.taken and not self.is_vector(value)]
        outputs = tuple(sorted({len(self.values) - 1, *kept, *self.linears}))
        self.fragment = Fragment(tuple(self.shapes), tuple(self.steps), outputs, torch.int8, scales=tuple(self.scales))

    def image(self):
        return self.N, self.draw.choice(CHANNELS), self.draw.randint(1, 13), self.draw.randint(1, 19)

    def kept(self, is_signed):
        return Quantized(self.draw.choice((1.0, 0.25, 0.0173, 3.1)), is_signed)

    def maps(self):
        return [value for value, how in enumerate(self.scales) if type(how) is Quantized and value not in self.taken]

    def source(self):
        """A map, of the last ones."""
        return self.draw.choice(self.maps()[-4:])

    def add(self, step, shape, how):
        self.steps.append(step)
        self.values.append(shape)
        self.scales.append(how)

    def stem(self):
        """A convolution that alone reads an image of few channels; mostly with a maximum that alone reads it."""
        draw, K = self.draw, self.draw.choice(CHANNELS)
        size, stride = draw.choice(((3, 3), (7, 7), (4, 4), (5, 2), (1, 3))), draw.choice(((1, 1), (2, 2), (3, 2)))
        sides = draw.randint(12, 14) * stride[0], draw.randint(12, 19) * stride[1]
        self.shapes[0] = self.values[0] = (self.N, draw.randint(1, 4), *sides)
        padding = draw.choice(((0, 0), (size[0] // 2, size[1] // 2)))
        self.weigh(0, K, size, stride, padding, activation=draw.choice(("none", "relu", "relu6")))
        self.taken = {0}
        if draw.random() < 0.7:
            convolved = len(self.values) - 1
            self.maximum(convolved)
            self.taken.add(convolved)

    def maximum(self, x=None):
        x, draw = self.source() if x is None else x, self.draw
        N, C, H, W = self.values[x]
        window = draw.randint(1, min(3, H)), draw.randint(1, min(3, W))
        stride, padding = (draw.randint(1, 3), draw.randint(1, 3)), tuple(draw.randint(0, side // 2) for side in window)
        P, Q = ((size + 2 * p - k) // s + 1 for size, k, s, p in zip((H, W), window, stride, padding))
        self.add(PoolStep("max", x, window, stride, padding, False), (N, C, P, Q), self.scales[x])

    def copies(self):
        """Those of maps that are kept alike."""
        x = self.source()
        alike = [(value, self.values[value]) for value in self.maps() if self.scales[value] == self.scales[x]]
        step, shape = draw_copies(self.draw, x, alike)
        self.add(step, shape, self.scales[x])

    def means(self):
        x = self.source()
        N, C, *sides = self.values[x]
        self.add(PoolStep("average", x, tuple(sides), tuple(sides), (0, 0), False), (N, C, 1, 1), None)
        self.add(FlattenStep(len(self.values) - 1), (N, C, 1, 1), None)
        if quantized.why_no_linear(self.scales[x], math.prod(sides)) is None and self.draw.random() < 0.7:
            self.linear(self.draw.choice(CHANNELS))

    def is_vector(self, value):
        """Whether it stays within the region: of a gate."""
        is_wide = lambda one: type(self.scales[one]) is Wide  # noqa: E731
        step = None if value < len(self.shapes) else self.steps[value - len(self.shapes)]
        return is_wide(value) or step is not None and is_wide(step.reads[0])

    def gate(self):
        """A map's means, two linear layers of vectors, and the product with a map, mostly with a sum."""
        x, draw = self.source(), self.draw
        (N, C, *sides), how = self.values[x], self.scales[x]
        wide = Wide(how.scale * draw.choice((1, 1, 0.01)), how.is_signed)  # the last cuts off
        self.add(PoolStep("average", x, tuple(sides), tuple(sides), (0, 0), False), (N, C, 1, 1), wide)
        activation = draw.choice(("none", "relu", "relu6", "silu"))
        self.vector(
            draw.choice((1, 4, 33, 70)), Wide(draw.choice((1.0, 0.07)), activation in ("none", "silu")), activation
        )
        gated = draw.choice([value for value in self.maps() if self.values[value][2:] == tuple(sides)])
        self.vector(self.values[gated][1], None, "none")
        alike = [value for value in self.maps() if self.values[value] == self.values[gated]]
        residual = draw.choice((None, *alike))
        out = self.kept(draw.random() < 0.5)
        self.epilogues[len(self.steps)] = quantized.epilogue_of_gate(
            self.scales[gated], out, None if residual is None else self.scales[residual],
            "none" if out.is_signed else draw.choice(("none", "relu", "relu6")),
        )  # fmt: skip
        step = GateStep(gated, len(self.values) - 1, residual, draw.choice(("sigmoid", "hardsigmoid")))
        self.add(step, self.values[gated], out)

    def vector(self, K, how, activation):
        """A linear layer of the vector that is there last. Mostly its results are of the size of its scale."""
        x, place = len(self.values) - 1, len(self.steps)
        N, C, *_ = self.values[x]
        self.weights[place] = self.bytes((K, C, 1, 1), -127, 128)
        scales = torch.rand(K, generator=self.generator) / (74 * C**0.5) * self.draw.choice((1, 1, 10, 1e30))
        bias = torch.randn(K, generator=self.generator)
        self.epilogues[place] = quantized.epilogue_of_vectors(self.scales[x], scales, bias)
        operands = ConvOperands(torch.empty(N, C, 1, 1, device="meta"), self.weights[place].float().to("meta"))
        problem = conv_problem(operands, (1, 1), (0, 0), (1, 1), 1, activation)
        self.add(ConvStep(problem._replace(device="cpu", dtype=torch.int8), x), (N, K, 1, 1), how)

    def linear(self, K):
        """A layer of the vectors that are there last."""
        x, place = len(self.values) - 1, len(self.steps)
        N, C, *_ = self.values[x]
        self.weights[place] = self.bytes((K, C, 1, 1), -127, 128)
        self.epilogues[place] = self.constants(K, C, "none", None)
        operands = ConvOperands(torch.empty(N, C, 1, 1, device="meta"), self.weights[place].float().to("meta"))
        problem = conv_problem(operands, (1, 1), (0, 0), (1, 1), 1, "none")
        self.linears.append(len(self.values))
        self.add(ConvStep(problem._replace(device="cpu", dtype=torch.int8), x, is_linear=True), (N, K, 1, 1), None)

    def convolution(self):
        x, draw = self.source(), self.draw
        sides, window = self.values[x][2:], ((1, 1), (1, 1), (0, 0), (1, 1))
        chosen = draw.random()
        if chosen < 0.3:
            window = (3, 3), (draw.choice((1, 1, 2)),) * 2, (1, 1), (1, 1)
        elif chosen < 0.7:
            size = draw.choice((1, 1, 2, 3, 5, 7)), draw.choice((1, 1, 2, 3, 4, 7))
            dilation = draw.choice(((1, 1), (1, 1), (2, 1), (1, 3)))
            window = size, (draw.randint(1, 3), draw.randint(1, 3)), tuple(draw.randint(0, s) for s in size), dilation
        if min(outputs_of(sides, window)) < 1:
            window = (1, 1), (1, 1), (0, 0), (1, 1)
        alike = [value for value in self.maps() if self.values[value][2:] == outputs_of(sides, window)]
        residual = draw.choice(alike) if alike and draw.random() < 0.6 else None
        K = draw.choice(CHANNELS) if residual is None else self.values[residual][1]
        groups = draw_groups(draw, self.values[x][1], K)
        activation = draw.choice(("none", "relu", "relu6"))
        self.weigh(x, K, *window, groups=groups, residual=residual, activation=activation)

    def weigh(
        self, x, K, size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), activation="relu", residual=None, groups=1
    ):
        N, C, *sides = self.values[x]
        place, shape = len(self.steps), (N, K, *outputs_of(sides, (size, stride, padding, dilation)))
        self.weights[place] = self.bytes((K, C // groups, *size), -127, 128)
        self.epilogues[place] = self.constants(K, C // groups * size[0] * size[1], activation, residual)
        meta = lambda shape: torch.empty(shape, device="meta")  # noqa: E731
        added = None if residual is None else meta(shape)
        operands = ConvOperands(meta((N, C, *sides)), self.weights[place].float().to("meta"), residual=added)
        problem = conv_problem(operands, stride, padding, dilation, groups, activation)
        self.add(
            ConvStep(problem._replace(device="cpu", dtype=torch.int8), x, residual),
            shape,
            self.kept(activation == "none"),
        )

    def bytes(self, shape, low, high):
        """Weights of all sizes, or extreme ones alone."""
        if self.draw.random() < 0.1:
            choice = torch.randint(0, 2, shape, generator=self.generator)
            return (low + choice * (high - 1 - low)).to(torch.int8)
        return torch.randint(low, high, shape, generator=self.generator).to(torch.int8)

    def constants(self, K, reduced, activation, residual):
        spread = 100 / (reduced**0.5 * 100 * 74)
        multiplier = torch.rand(K, generator=self.generator) * spread
        bias = torch.randn(K, generator=self.generator) * 40
        factor = torch.tensor(self.draw.random() if residual is not None else 0.0).item()
        kind = self.draw.random()
        if kind < 0.4:  # ties
            multiplier = torch.full((K,), 2.0 ** round(torch.tensor(spread).log2().item()))
            bias, factor = (bias * 2).round() / 2, factor and 0.5
        elif kind < 0.5:
            multiplier = multiplier * self.draw.choice((1e6, 1e12, 1e36))
        elif kind < 0.55:
            bias = bias * 1e37
        is_signed = activation == "none"
        high = 127.0 if is_signed else torch.tensor(100.3).item() if activation == "relu6" else 255.0
        return Epilogue(
            multiplier, bias, factor, -128.0 if is_signed else 0.0, high, torch.int8 if is_signed else torch.uint8
        )

    def inputs(self):
        found = []
        for shape, how in zip(self.shapes, self.scales):
            x = torch.randn(shape, generator=self.generator) * 100 * how.scale
            if self.draw.random() < 0.5:
                x = (x / how.scale * 2).round() / 2 * how.scale  # ties
            for value in (torch.nan, torch.inf, -torch.inf):
                x.view(-1)[self.draw.randrange(x.numel())] = value
            x = x.bfloat16() if self.draw.random() < 0.3 else x
            found.append(x.contiguous(memory_format=torch.channels_last) if self.draw.random() < 0.5 else x)
        return found

    def region(self):
        return compile_(self.fragment, self.weights, self.epilogues)


def compile_(whole, weights, epilogues):
    packed = {place: packing.of([weights[place]]) for place, packing in fragment.packings(whole).items()}
    return fragment.compile_fragment(whole, packed, epilogues)


def outputs_of(sides, window):
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(sides, *window))


def call(region, inputs, kernel):
    """Neither the workspace nor the outputs hold numbers before."""
    outputs = [
        torch.full(shape, torch.nan).contiguous(memory_format=torch.channels_last) for shape in region.output_shapes
    ]
    workspace = region.empty_workspace().fill_(0xA5)
    torch.ops.fused_resnet.cpu_region(
        region.program, list(inputs), region.weights, region.biases, kernel, workspace, outputs
    )
    return outputs


def differing(outputs, expected):
    return sum((y.flatten() != right.flatten()).sum().item() for y, right in zip(outputs, expected))


def test_there_is_a_kernel_for_any_machine():
    assert {"portable_int8", "amx_int8_emulated"} <= set(KERNELS)


@pytest.mark.parametrize("cache", [0, 2000, 30_000, 2**21], ids=lambda cache: f"{cache} bytes of cache")
def test_no_byte_differs_in_random_fragments(monkeypatch, cache):
    monkeypatch.setattr(program, "second_level_cache_bytes", lambda: cache)
    stems, pooled_stems, gates = 0, 0, 0
    for seed in range(40):
        drawn = Drawn(1000 * cache + seed)
        pooled = len(fragment.pooled_stems(drawn.fragment))
        stems, pooled_stems = stems + len(fragment.stems(drawn.fragment)) - pooled, pooled_stems + pooled
        gates += sum(isinstance(step, GateStep) for step in drawn.steps)
        inputs, region = drawn.inputs(), drawn.region()
        expected = run_reference(drawn.fragment, drawn.weights, drawn.epilogues, inputs)
        assert len(expected) == len(region.output_shapes)
        for kernel in KERNELS:
            assert differing(call(region, inputs, kernel), expected) == 0, (kernel, seed, drawn.fragment)
    assert stems >= 5 and pooled_stems >= 5 and gates >= 10


@pytest.mark.parametrize("function", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("centre", [-15.0, -4.7, -0.8, 0.001, 1.3, 2.9])
def test_no_bit_of_a_gate_differs(function, centre):
    """Gates near one another, magnified until a byte shows their last bits: a residual takes the first ones away."""
    if function == "hardsigmoid" and abs(centre) > 3:
        return
    K = 200
    drawn = Drawn(3)
    shape = (1, K, 1, 1)
    drawn.N, drawn.shapes, drawn.values, drawn.steps, drawn.weights, drawn.epilogues = (
        1,
        [shape] * 2,
        [shape] * 2,
        [],
        {},
        {},
    )
    drawn.scales = [Quantized(1.0, False), Quantized(1.0, True)]
    f = quantized.GATES[function](torch.tensor([centre]))
    magnified = 2.0 ** (23 - math.floor(math.log2(f.item())))
    step = f.item() * 2.0**-24 / (1 / 6 if function == "hardsigmoid" else f.item() * (1 - f.item()))
    logits = centre + torch.linspace(-90 * step, 90 * step, K, dtype=torch.float64)
    drawn.add(PoolStep("average", 0, (1, 1), (1, 1), (0, 0), False), shape, Wide(1.0, False))
    drawn.vector(K, None, "none")
    drawn.weights[1].zero_()
    drawn.epilogues[1] = drawn.epilogues[1]._replace(bias=logits.float())
    taken = Epilogue(torch.tensor([magnified]), torch.zeros(1), f.item() * magnified / 128, -128.0, 127.0, torch.int8)
    drawn.epilogues[2] = taken
    drawn.add(GateStep(0, 3, 1, function), shape, Quantized(1.0, True))
    whole = Fragment(tuple(drawn.shapes), tuple(drawn.steps), (4,), torch.int8, tuple(drawn.scales))
    inputs = [torch.ones(shape), torch.full(shape, -128.0)]
    (expected,) = run_reference(whole, drawn.weights, drawn.epilogues, inputs)
    assert expected.unique().numel() > 10 and expected.abs().max() < 127
    for kernel in KERNELS:
        (y,) = call(compile_(whole, drawn.weights, drawn.epilogues), inputs, kernel)
        assert torch.equal(y, expected), kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_change_no_byte(kernel):
    """Whether they split pixels or output channels."""
    for shape, size, K in (((3, 40, 14, 14), 3, 100), ((1, 300, 3, 5), 1, 600)):
        drawn = Drawn(7)
        drawn.N, drawn.shapes = shape[0], [shape]
        drawn.values, drawn.scales = [shape], [Quantized(0.1, False)]
        drawn.steps, drawn.weights, drawn.epilogues = [], {}, {}
        drawn.weigh(0, K, (size, size), padding=(size // 2,) * 2)
        drawn.fragment = Fragment((shape,), tuple(drawn.steps), (1,), torch.int8, tuple(drawn.scales))
        inputs, results = drawn.inputs(), []
        for count in (1, 2, 3, 16):
            with threads(count):
                results.append(call(drawn.region(), inputs, kernel)[0])
        assert all(torch.equal(result, results[0]) for result in results) and results[0].unique().numel() > 20


@pytest.mark.parametrize("N", [1, 3, 8, 9, 21])
def test_no_value_of_a_classifier_differs(N):
    """With any number of images, whose maps are as large as they may be, and full."""
    shape = (N, 100, 1, quantized.MOST_PIXELS_OF_A_MEAN)
    drawn = Drawn(3)
    drawn.N, drawn.shapes, drawn.values, drawn.scales = N, [shape], [shape], [Quantized(0.1, False)]
    drawn.steps, drawn.weights, drawn.epilogues, drawn.linears = [], {}, {}, []
    drawn.add(PoolStep("average", 0, shape[2:], shape[2:], (0, 0), False), (N, 100, 1, 1), None)
    drawn.add(FlattenStep(1), (N, 100, 1, 1), None)
    drawn.linear(70)
    drawn.fragment = Fragment((shape,), tuple(drawn.steps), (3,), torch.int8, tuple(drawn.scales))
    images = torch.randint(0, 256, shape).float() * 0.1
    images[-1] = 255 * 0.1
    expected = run_reference(drawn.fragment, drawn.weights, drawn.epilogues, [images])
    for kernel in KERNELS:
        for count in (1, 3):
            with threads(count):
                (y,) = call(drawn.region(), [images], kernel)
            assert torch.equal(y.flatten(1), expected[0]) and y.unique().numel() > 20, kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_longest_reduction_of_the_largest_bytes(kernel):
    """255 * 127 * 66,310, 255 * 128 * 65,793 and their like stay within int32; longer reductions are refused."""
    for is_signed, value, weight in (
        *((False, 255, 127), (False, 255, -127), (True, -128, 127)),
        *((False, 255, -128), (True, -128, -128), (True, 127, -128)),
    ):
        how, K = Quantized(1.0, is_signed), 66_310 if weight > -128 else 65_793
        region = Region(torch.int8)
        x, w = region.read((1, K, 1, 1), how), torch.full((3, K, 1, 1), weight, dtype=torch.int8)
        exact = value * weight * K
        # the sum less what fp32 makes of it, and a number that tells a bit of it from another
        shift = -torch.tensor(exact, dtype=torch.float64).float() * 2.0**-7
        epilogue = Epilogue(
            torch.full((3,), 2.0**-7), shift + torch.tensor([0.0, 5.0, 77.0]), 0.0, 0.0, 255.0, torch.uint8
        )
        requantizing = Requantizing(epilogue, is_signed)
        region.write(region.convolve([Segment(x, w)], None, requantizing=requantizing), Quantized(1.0, False))
        images = torch.full((1, K, 1, 1), float(value))
        expected = quantized.conv_act(quantized.quantize(images, how), w, epilogue)
        assert torch.equal(call(region.compile(), [images], kernel)[0], expected.float())
    longer = torch.zeros(3, 66_311, 1, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="sums of 66,311 products may leave int32"):
        region.convolve([Segment(region.read((1, 66_311, 1, 1), how), longer)], None, requantizing=requantizing)


@pytest.mark.parametrize("is_packed", [False, True], ids=["as it is", "packed"])
def test_the_least_weight_has_a_bound_of_its_own(is_packed):
    K, how = 65_794, Quantized(1.0, False)
    requantizing = Requantizing(Epilogue(torch.ones(3), torch.ones(3), 0.0, 0.0, 255.0, torch.uint8), False)
    weight = torch.full((3, K, 1, 1), -127, dtype=torch.int8)

    def convolve():
        region = Region(torch.int8)
        x, shaped = region.read((1, K, 1, 1), how), torch.empty_like(weight, device="meta")
        packed = layout.pack_weight(weight, torch.int8) if is_packed else None
        segment = Segment(x, shaped if is_packed else weight)
        region.convolve([segment], None, packed=packed, requantizing=requantizing)

    convolve()
    weight[2, 65_000] = -128
    with pytest.raises(ValueError, match=r"convolve: sums of 65,794 .* weights of -128 .* \(at most 65,793 stay, and"):
        convolve()
    with pytest.raises(ValueError, match="conv_act: sums of 65,794 products with weights of -128"):
        quantized.conv_act(torch.zeros(1, K, 1, 1, dtype=torch.uint8), weight, requantizing.epilogue)


def test_weights_and_constants_lie_in_the_order_of_their_use():
    K, C, R, S = 40, 70, 2, 3
    weight = torch.randint(-127, 128, (K, C, R, S)).to(torch.int8)
    packed = layout.pack_weight(weight, torch.int8)
    assert packed.shape == (2, 2 * R * S, 2, 16, 64) and packed.is_contiguous()
    for k, c, r, s in ((0, 0, 0, 0), (39, 69, 1, 2), (17, 33, 0, 2), (31, 15, 1, 0)):
        step = (c // 64 * R + r) * S + s
        assert packed[k // 32, step, k % 32 // 16, c % 64 // 4, k % 16 * 4 + c % 4] == weight[k, c, r, s]
    assert packed[1, :, 1].count_nonzero() == 0  # outputs 48 to 63
    constants = layout.pack_constants(Epilogue(torch.rand(K), torch.rand(K), 0.0, 0.0, 255.0, torch.uint8), packed)
    assert constants.shape == (2, 3, 32) and constants[1, :, 8:].count_nonzero() == 0
    assert torch.equal(constants[:, 2].flatten()[:K], -128 * weight.sum((1, 2, 3), dtype=torch.float32))
    with pytest.raises(TypeError, match="a weight of torch.float32 is not packed as torch.int8"):
        layout.pack_weight(weight.float(), torch.int8)


def test_what_does_not_fit_together_is_refused():
    region, how = Region(torch.int8), Quantized(0.5, False)
    x, weight = region.read((1, 16, 4, 4), how), torch.zeros(32, 16, 1, 1, dtype=torch.int8)
    right = Requantizing(Epilogue(torch.ones(32), torch.ones(32), 0.0, 0.0, 255.0, torch.uint8), False)
    wrong = right._replace(epilogue=right.epilogue._replace(multiplier=torch.ones(31)))
    for bias, options, sentence in (
        (None, {}, "constants of int8 belong to its regions alone, and this one is torch.int8"),
        (torch.ones(32), dict(requantizing=right), "constants in place of bias and activation"),
        (None, dict(requantizing=right, activation="relu"), "constants in place of bias and activation"),
        (None, dict(requantizing=wrong), "32 channels have as many constants"),
    ):
        with pytest.raises(ValueError, match=sentence):
            region.convolve([Segment(x, weight)], bias, **options)
    with pytest.raises(ValueError, match="write: a scale belongs to regions of int8 alone"):
        region.write(x)
    with pytest.raises(ValueError, match="read: a scale belongs to regions of int8 alone"):
        Region(torch.float32).read((1, 16, 4, 4), how)
    large, linear = region.read((1, 16, 2, 129), how), layout.pack_weight(weight, torch.int8)
    for source, packed, sentence in (
        (large, linear, "sums of 258 bytes may leave two bytes"),
        (x, torch.cat([linear, linear]), "is not of 32 x 16 channels"),
    ):
        with pytest.raises(ValueError, match=sentence):
            region.write_linear(source, packed, right.epilogue)
    with pytest.raises(ValueError, match="there is no average but write_means"):
        region.pool(x, "average", (2, 2), (2, 2), how=how)


def test_fragments_that_are_no_int8_are_refused():
    block = Block()
    steps, scales = block.fragment.steps, block.fragment.scales
    for place, step, sentence in (
        (0, steps[0]._replace(is_linear=True), "int8 has no step for a linear layer of no means"),
        (5, steps[5]._replace(window=(2, 2)), r"no step for an average over \(2, 2\) of \(6, 5\) pixels"),
    ):
        whole = block.fragment._replace(steps=(*steps[:place], step, *steps[place + 1 :]))
        with pytest.raises(ValueError, match=sentence):
            compile_(whole, block.q, block.epilogues)
    for value, how in ((1, None), (2, Quantized(9.0, False)), (6, Quantized(1.0, False))):
        whole = block.fragment._replace(scales=(*scales[:value], how, *scales[value + 1 :]))
        with pytest.raises(ValueError, match="scales that do not belong to it"):
            compile_(whole, block.q, block.epilogues)


class Call:
    """A convolution with a residual, a maximum of its result, and the mean and a linear layer of that, as the operator
    takes them."""

    def __init__(self):
        region, how = Region(torch.int8), Quantized(0.5, False)
        x, y = region.read((1, 16, 6, 6), how), region.read((1, 32, 6, 6), how)
        weight, ones = torch.ones(32, 16, 3, 3, dtype=torch.int8), torch.ones(32)
        epilogue = Epilogue(ones / 64, ones, 1.0, 0.0, 255.0, torch.uint8)
        requantizing = Requantizing(epilogue, False)
        z = region.convolve([Segment(x, weight, padding=(1, 1))], None, residual=y, requantizing=requantizing)
        pooled = region.pool(z, "max", (2, 2), (2, 2), how=how)
        region.write(pooled, how)
        region.write_means(pooled, how)
        linear = layout.pack_weight(torch.ones(5, 32, 1, 1, dtype=torch.int8), torch.int8)
        classifier = Epilogue(torch.ones(5), torch.ones(5), 0.0, -math.inf, math.inf, torch.float32)
        region.write_linear(pooled, linear, classifier)
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [torch.randn(1, 16, 6, 6), torch.randn(1, 32, 6, 6)]
        self.weights, self.biases = list(self.region.weights), list(self.region.biases)
        self.workspace = self.region.empty_workspace()
        self.outputs = [torch.full(shape, torch.nan).contiguous(memory_format=torch.channels_last)
                        for shape in self.region.output_shapes]  # fmt: skip

    def run(self):
        program = torch.tensor(self.program, dtype=torch.int64)
        torch.ops.fused_resnet.cpu_region(
            program, self.inputs, self.weights, self.biases, "", self.workspace, self.outputs
        )


def put(place, value):
    values = value if isinstance(value, list) else [value]
    return lambda call: call.program.__setitem__(slice(place, place + len(values)), values)


# version, dtype, number of buffers, four buffers of 7, two inputs of 11, a halo of 2, the convolution of 25, a maximum
# of 12, an output of 6, means of 6, a linear layer of 6
INPUT = 3 + 4 * 7 + 2
CONVOLUTION = INPUT + 2 * 11
MAXIMUM = CONVOLUTION + 25
OUTPUT = MAXIMUM + 12
LINEAR = OUTPUT + 2 * 6
INFINITE, ONE = 0x7F800000, 0x3F800000
WRONG = {
    "1 / scale must be finite, not inf": put(INPUT + 9, INFINITE),
    "1 / scale must be from 0 to 4294967295": put(INPUT + 9, -1),
    "whether bytes are signed must be from 0 to 1, not 2": put(INPUT + 10, 2),
    "one segment and no activation, not 1 and relu": put(CONVOLUTION + 3, 1),
    "the constants' number must be from 0 to 1, not -1": put(CONVOLUTION + 6, -1),
    "a residual's factor must be finite": put(CONVOLUTION + 19, INFINITE),
    "the bounds of bytes are 0 and at most 255, or -128 and 127, not 1 and 255": put(CONVOLUTION + 20, ONE),
    "the bounds of bytes .*, not 0 and -2": put(CONVOLUTION + 21, 0xC0000000),
    "whether values fit int32 must be from 0 to 1, not 2": put(CONVOLUTION + 22, 2),
    "sums of .* products may leave int32, at most 66310 stay": put(CONVOLUTION + 10, [1024, 1024]),
    "in int8 poolings are maxima": put(MAXIMUM + 1, 0),
    "a scale must be finite": put(OUTPUT + 4, INFINITE),
    "_int8 has no step 6|_vnni has no step 6": put(OUTPUT, 6),
    "an output must be Float beside .*, not Char": lambda call: call.outputs.__setitem__(0, call.outputs[0].char()),
    "an output must have the shape \\(1, 32, 1, 1\\)": put(OUTPUT + 6 + 2, 0),
    "an output must have the shape \\(1, 32, 1, 1\\), .* \\(1, 32, 3, 3\\)": put(LINEAR + 2, 0),
    "a weight must have the shape \\(1, 1, 2, 16, 64\\)": put(LINEAR + 4, 0),
    "the constants' number must be from 0 to 1, not 2": put(LINEAR + 5, 2),
    "a weight must be contiguous and of the dtype": lambda call: call.weights.__setitem__(0, call.weights[0].float()),
    "a weight must have the shape": lambda call: call.weights.__setitem__(0, call.weights[0][:, 1:].contiguous()),
    "a convolution's constants must have the shape": lambda call: call.biases.__setitem__(
        0, call.biases[0][:, :2].contiguous()
    ),
    "constants must be contiguous and float32": lambda call: call.biases.__setitem__(0, call.biases[0].double()),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_it_refuses(sentence):
    """And nothing of the program has run then. As it was, it runs."""
    call = Call()
    call.run()
    assert not any(output.isnan().any() for output in call.outputs)
    for output in call.outputs:
        output.fill_(torch.nan)
    WRONG[sentence](call)
    with pytest.raises(RuntimeError, match=sentence):
        call.run()
    assert all(output.isnan().all() for output in call.outputs if output.is_floating_point())


class Network(Drawn):
    """A whole ResNet with its classifier: ResNet-20's or ResNet-50's blocks."""

    def __init__(self, N, side, blocks, is_bottleneck, seed=0):
        self.draw, self.generator, self.linears = random.Random(seed), torch.Generator().manual_seed(seed), []
        self.N, self.steps, self.weights, self.epilogues = N, [], {}, {}
        self.shapes, self.values, self.scales = [(N, 3, side, side)], [(N, 3, side, side)], [Quantized(0.02, True)]
        if is_bottleneck:
            y = self.conv(0, 64, 7, 2)
            P = (self.values[y][2] - 1) // 2 + 1
            self.add(PoolStep("max", y, (3, 3), (2, 2), (1, 1), False), (N, 64, P, P), self.scales[y])
        else:
            self.conv(0, 16, 3, 1)
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride, x = 2 if stage > 0 and block == 0 else 1, len(self.values) - 1
                width = (64 if is_bottleneck else 16) * 2**stage
                K = width * (4 if is_bottleneck else 1)
                y = self.conv(self.conv(x, width, 1, 1), width, 3, stride) if is_bottleneck else x
                y = y if is_bottleneck else self.conv(x, width, 3, stride)
                skip = self.conv(x, K, 1, stride, "none") if block == 0 and K != self.values[x][1] else x
                self.conv(y, K, 1 if is_bottleneck else 3, 1, residual=skip)
        x = len(self.values) - 1
        self.add(PoolStep("average", x, *2 * (tuple(self.values[x][2:]),), (0, 0), False), (N, K, 1, 1), None)
        self.add(FlattenStep(x + 1), (N, K, 1, 1), None)
        self.linear(1000 if is_bottleneck else 10)
        self.fragment = Fragment(
            tuple(self.shapes), tuple(self.steps), (len(self.values) - 1,), torch.int8, scales=tuple(self.scales)
        )

    def conv(self, x, K, size, stride, activation="relu", residual=None):
        self.weigh(x, K, (size, size), (stride, stride), (size // 2,) * 2, (1, 1), activation, residual)
        return len(self.values) - 1

    def kept(self, is_signed):
        return Quantized(0.05, is_signed)

    def constants(self, K, reduced, activation, residual):
        multiplier = (0.5 + torch.rand(K, generator=self.generator)) / (reduced**0.5 * 100)
        bias = torch.randn(K, generator=self.generator) * 20
        factor = torch.tensor(0.0 if residual is None else 0.8).item()
        is_signed = activation == "none"
        low, high = (-128.0, 127.0) if is_signed else (0.0, 255.0)
        return Epilogue(multiplier, bias, factor, low, high, torch.int8 if is_signed else torch.uint8)


def resnet20(N):
    return Network(N, 32, (3, 3, 3), False)


def resnet50(N, side=224):
    return Network(N, side, (3, 4, 6, 3), True)


def assert_no_byte_differs(drawn):
    inputs, region = drawn.inputs(), drawn.region()
    expected = run_reference(drawn.fragment, drawn.weights, drawn.epilogues, inputs)
    assert expected[0].unique().numel() > expected[0].numel() // 2  # neither zeros nor the largest bytes alone
    for kernel in KERNELS:
        assert differing(call(region, inputs, kernel), expected) == 0, kernel


def test_no_byte_differs_in_resnet20():
    assert_no_byte_differs(resnet20(2))


@pytest.mark.full
def test_no_byte_differs_in_resnet50():
    assert_no_byte_differs(resnet50(1))
