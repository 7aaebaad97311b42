"""Random convolutions of one region each, by every micro-kernel that runs here, against the fp64 reference.

python -m benchmarks.cpu_check.problems --problems 300 --seed 0 prints a report in JSON. `benchmarks.random_problems
--kind regions` runs many of them, in parts. A problem follows from (seed, index) alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from typing import Iterator, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_check.cores import threads
from fused_resnet.choosing.case import poisoned_memory
from fused_resnet.kernels import compiled
from fused_resnet.operators import reference
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.layout import channels_last
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import output_size
from fused_resnet.regions import kernels, layout
from fused_resnet.regions.program import Region, Segment
from fused_resnet.testing import Outcome, Report

ACTIVATIONS = ("none", "relu", "relu6", "silu")
THREADS = (2, 3, 5)
_MOST_PRODUCTS = 4e6  # emulated tiles make about a hundred million a second
Pair = tuple[int, int]


class Window(NamedTuple):
    """What a segment reads: channels and size of its map, and how its filter goes over it."""

    C: int
    size: Pair
    filter: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def output_size(self) -> Pair:
        sides = zip(self.size, self.filter, self.stride, self.padding, self.dilation)
        P, Q = (output_size(*side) for side in sides)
        return P, Q

    @property
    def reduction(self) -> int:
        return self.C * self.filter[0] * self.filter[1]

    def patches(self, x: Tensor) -> Tensor:
        """(N, reduction, P, Q): what each output's products read."""
        unfolded = F.unfold(x.double(), self.filter, self.dilation, self.padding, self.stride)
        return unfolded.view(len(x), self.reduction, *self.output_size).to(x.dtype)

    def __str__(self) -> str:
        parts = (self.size, self.filter, self.stride, self.padding, self.dilation)
        size, taps, stride, padding, dilation = ("x".join(map(str, pair)) for pair in parts)
        return f"{self.C}x{size} by {taps} stride {stride} padding {padding} dilation {dilation}"


class Drawn(NamedTuple):
    """act(sum of convolutions + bias + residual). residual: "", "added", or "in place", where its map takes the sum."""

    N: int
    K: int
    windows: tuple[Window, ...]
    has_bias: bool
    residual: str
    activation: str
    magnitude: float
    threads: int
    seed: int

    def __str__(self) -> str:
        tail = f"{'bias ' * self.has_bias}{self.residual} {self.activation}, values about {self.magnitude:g}"
        return f"batch {self.N}, {' and '.join(map(str, self.windows))} -> {self.K}, {tail}, {self.threads} threads"


class Tensors(NamedTuple):
    """One for each window in xs and weights."""

    xs: list[Tensor]
    weights: list[Tensor]
    bias: Optional[Tensor]
    residual: Optional[Tensor]


def drawn_at(seed: int, index: int) -> Drawn:
    """Odd channels and sizes, batches 0 to 5, windows to 7x7 and beyond the map, one input or two of other windows."""
    rng = random.Random(f"{seed}/{index}")
    while True:
        N, K = rng.choice((0, 1, 1, 1, 2, 3, 4, 5)), _channels(rng)
        windows = (_window(rng),)
        P, Q = windows[0].output_size
        if P < 1 or Q < 1:
            continue
        if rng.random() < 0.3:
            windows += (_window_giving(rng, (P, Q)),)
        if max(N, 1) * K * P * Q * sum(window.reduction for window in windows) <= _MOST_PRODUCTS:
            break
    return Drawn(
        N, K, windows, has_bias=rng.random() < 0.8, residual=rng.choice(("", "", "added", "in place")),
        activation=rng.choice(ACTIVATIONS), magnitude=rng.choice((1.0, 1.0, 1.0, 1e-3, 1e4)),
        threads=rng.choice(THREADS), seed=rng.getrandbits(62),
    )  # fmt: skip


def _channels(rng: random.Random) -> int:
    return rng.randint(1, rng.choice((8, 40, 100, 300)))


def _pair(rng: random.Random, values: Sequence[int]) -> Pair:
    first = rng.choice(values)
    return first, first if rng.random() < 0.6 else rng.choice(values)


def _window(rng: random.Random) -> Window:
    size = rng.randint(1, rng.choice((7, 14, 33))), rng.randint(1, rng.choice((7, 14, 33)))
    kind = rng.random()
    taps = (1, 1) if kind < 0.35 else (3, 3) if kind < 0.7 else (rng.randint(1, 7), rng.randint(1, 7))
    padding = _pair(rng, (0, 1, 1, 2, 3))
    return Window(_channels(rng), size, taps, _pair(rng, (1, 1, 1, 2, 3)), padding, _pair(rng, (1, 1, 1, 2, 3)))


def _window_giving(rng: random.Random, size: Pair) -> Window:
    """A projection's: 1x1 or 3x3 with a stride, over a map of which each output has its pixels."""
    stride, tap = rng.choice((1, 2, 2, 3)), rng.choice((1, 1, 3))
    maps = [(side - 1) * stride + 1 + rng.randrange(stride) for side in size]
    return Window(_channels(rng), (maps[0], maps[1]), (tap, tap), (stride,) * 2, (tap // 2,) * 2, (1, 1))


def tensors_of(drawn: Drawn, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(drawn.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    reduction = sum(window.reduction for window in drawn.windows)
    xs = [
        channels_last((normal(drawn.N, window.C, *window.size) * drawn.magnitude).to(dtype)) for window in drawn.windows
    ]
    weights = [(normal(drawn.K, window.C, *window.filter) / reduction**0.5).to(dtype) for window in drawn.windows]
    bias = normal(drawn.K) * drawn.magnitude if drawn.has_bias else None
    shape = (drawn.N, drawn.K, *drawn.windows[0].output_size)
    residual = channels_last((normal(*shape) * drawn.magnitude).to(dtype)) if drawn.residual else None
    return Tensors(xs, weights, bias, residual)


def region_of(drawn: Drawn, tensors: Tensors, dtype: torch.dtype) -> Region:
    region = Region(dtype)
    segments = [
        Segment(region.read(tuple(x.shape)), weight, window.stride, window.padding, window.dilation)
        for x, weight, window in zip(tensors.xs, tensors.weights, drawn.windows)
    ]
    added = None if tensors.residual is None else region.read(tuple(tensors.residual.shape))
    region.write(
        region.convolve(
            segments, tensors.bias, activation=drawn.activation, residual=added, in_place=drawn.residual == "in place"
        )
    )
    return region


def expected_and_bound(drawn: Drawn, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The reference's result and what a kernel may err: of the 1x1 convolution of all patches, one below the other."""
    patches = torch.cat([window.patches(x) for x, window in zip(tensors.xs, drawn.windows)], 1)
    columns = torch.cat([weight.flatten(1) for weight in tensors.weights], 1)[:, :, None, None]
    operands = ConvOperands(patches, columns, bias=tensors.bias, residual=tensors.residual)
    problem = conv_problem(operands, (1, 1), (0, 0), (1, 1), 1, drawn.activation)
    expected = reference.conv_bn_act(problem, operands)
    return expected, reference.error_bound(problem, operands, expected=expected)


def outcomes(drawn: Drawn, here: dict[str, torch.dtype]) -> Iterator[Outcome]:
    """One of each kernel. here: as `kernels_here`."""
    for dtype in layout.DTYPES:
        named = [name for name, known in here.items() if known == dtype]
        if not named:
            continue
        tensors = tensors_of(drawn, dtype)
        expected, bound = expected_and_bound(drawn, tensors)
        for name in named:
            try:
                yield outcome(name, drawn, tensors, expected, bound)
            except Exception as error:
                yield Outcome(name, "mismatch", f"raised {type(error).__name__}: {error}")


def outcome(kernel: str, drawn: Drawn, tensors: Tensors, expected: Tensor, bound: Tensor) -> Outcome:
    """Whether one thread gives what it may, and several the same bytes."""
    inputs = tensors.xs + ([] if tensors.residual is None else [tensors.residual])
    before, results = [x.clone() for x in inputs], []
    for count in (1, drawn.threads):
        with threads(count), poisoned_memory(expected):
            region = region_of(drawn, tensors, inputs[0].dtype).compile()
            results += region(inputs, region.empty_workspace(), kernel)
    y = results[0]
    if not all(map(torch.equal, inputs, before)):
        return Outcome(kernel, "mismatch", "an input was written to")
    if y.shape != expected.shape or not y.is_contiguous(memory_format=torch.channels_last):
        return Outcome(kernel, "mismatch", f"the output is {tuple(y.shape)} with strides {y.stride()}")
    if not torch.equal(y.nan_to_num(nan=0.0), results[1].nan_to_num(nan=0.0)):
        return Outcome(kernel, "mismatch", f"{drawn.threads} threads give other bytes than one")
    share = ((y.double() - expected).abs() / bound).nan_to_num(nan=torch.inf)
    worst = share.max().item() if share.numel() else 0.0
    if worst > 1:
        place = tuple((share == worst).nonzero()[0].tolist())
        detail = f"at {place}: got {y[place]}, expected {expected[place]}, {worst:.3g} times what is allowed"
        return Outcome(kernel, "mismatch", detail)
    return Outcome(kernel, "ok", worst_error=worst)


def verify(problems: int, seed: int, here: dict[str, torch.dtype]) -> Report:
    report = Report(seed, "cpu")
    for index in range(problems):
        drawn = drawn_at(seed, index)
        for found in outcomes(drawn, here):
            report.add(f"region/{found.backend}", found, f"cpu_check.problems.drawn_at({seed}, {index})", drawn)
        report.problems += 1
    return report


def kernels_here() -> dict[str, torch.dtype]:
    """{name: dtype} of the micro-kernels for floats that run on this machine; none without the library."""
    here = [kernel for kernel in kernels.table() if not kernel.why_not]
    return {kernel.name: kernel.dtype for kernel in here if kernel.dtype in layout.DTYPES}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Exit code 0, 1 when a result is wrong, 2 where no micro-kernel runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    here = kernels_here()
    if not here:
        print(f"cpu_check.problems: no micro-kernel runs here: {compiled.load('cpu')}", file=sys.stderr)
        return 2
    report = verify(options.problems, options.seed, here)
    print(json.dumps(report.as_dict()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
