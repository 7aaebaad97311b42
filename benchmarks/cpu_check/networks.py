"""Random small residual networks, frozen, against themselves in fp64: odd sizes, several batches and threads.

Each is frozen as the rules say, and once more with every region that there can be, whether it would be faster or not.

python -m benchmarks.cpu_check.networks --problems 50 --seed 0 prints a report in JSON. `benchmarks.random_problems
--kind networks` runs many of them, in parts. A network follows from (seed, index) alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import sys
from typing import Iterator, NamedTuple, Optional, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cpu_check.cores import threads
from fused_resnet.choosing import pieces, winners
from fused_resnet.choosing.region_checks import SLACK
from fused_resnet.freezing.freeze import freeze
from fused_resnet.freezing.frozen import FrozenModel
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.operators.problem import SHORT_DTYPES
from fused_resnet.operators.reference import unit_roundoff
from fused_resnet.testing import Outcome, Report
from fused_resnet.testing.networks import allowed, error, has_winograd, in_fp64, randomize

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
DTYPES = ("fp32", "bf16")
THREADS = (1, 2, 3)


class Stage(NamedTuple):
    block: str
    planes: int
    count: int
    stride: int
    dilation: int
    gate: str  # behind its blocks, or none

    def __str__(self) -> str:
        return (
            f"{self.count} {self.block} {self.planes}/{self.stride}"
            + (f" d{self.dilation}" * (self.dilation > 1))
            + self.gate
        )


class Drawn(NamedTuple):
    """A stem of one of three kinds, stages of residual blocks, and what the network returns."""

    stem: str
    width: int
    stages: tuple[Stage, ...]
    returns: str
    size: tuple[int, int]
    batches: tuple[int, ...]
    threads: int
    seed: int

    def __str__(self) -> str:
        stages = ", ".join(map(str, self.stages))
        where = f"batches {' '.join(map(str, self.batches))} of {self.size[0]}x{self.size[1]}, {self.threads} threads"
        return f"{self.stem} {self.width}; {stages}; {self.returns}; {where}"


class Network(nn.Module):
    """x: (N, 3, H, W). Returns logits; or with returns="maps" a stage's maps beside them, which others may read."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        size, stride = {"3x3": (3, 1), "7x7/2": (7, 2), "7x7/2 and pooling": (7, 2)}[drawn.stem]
        self.conv = nn.Conv2d(3, drawn.width, size, stride, size // 2, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(drawn.width), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1) if drawn.stem.endswith("pooling") else nn.Identity()
        width, stages = drawn.width, []
        for stage in drawn.stages:
            stages.append(_stage(stage, width))
            width = stage.planes * BLOCKS[stage.block].expansion
        self.stages = nn.ModuleList(stages)
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 10)
        self.returns_maps = drawn.returns == "maps"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.pool(self.relu(self.bn(self.conv(x))))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        logits = self.fc(self.average(x).flatten(1))
        return (logits, *maps) if self.returns_maps else logits


def _stage(stage: Stage, inplanes: int) -> nn.Sequential:
    block, blocks = BLOCKS[stage.block], []
    for index in range(stage.count):
        stride = stage.stride if index == 0 else 1
        outplanes, downsample = stage.planes * block.expansion, None
        if stride != 1 or inplanes != outplanes:
            downsample = nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))
        blocks.append(block(inplanes, stage.planes, stride, downsample, dilation=stage.dilation))
        inplanes = outplanes
    return nn.Sequential(*blocks, *([Gate(inplanes, stage.gate)] if stage.gate else []))


class Gate(nn.Module):
    """Squeeze and excitation, with a sum behind the product: act(x * f(g(mean of x)) + x). kind: f's name."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, channels, 1)
        self.act, self.function = nn.SiLU(), nn.Sigmoid() if kind == "sigmoid" else nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.act(self.squeeze(x.mean((2, 3), keepdim=True))))
        return torch.relu(x * self.function(gate) + x)


def drawn_at(seed: int, index: int) -> Drawn:
    rng = random.Random(f"network {seed}/{index}")
    stages = []
    for _ in range(rng.randint(1, 3)):
        block = rng.choice(tuple(BLOCKS))
        planes = rng.randint(1, 24) if block == "bottleneck" else rng.randint(3, 70)
        dilation = rng.choice((1, 1, 1, 2)) if block == "bottleneck" else 1
        stages.append(Stage(block, planes, rng.randint(1, 3), rng.choice((1, 2)), dilation,
                            rng.choice(("", "", "sigmoid", "hardsigmoid"))))  # fmt: skip
    stem = rng.choice(("3x3", "7x7/2", "7x7/2 and pooling"))
    size = rng.randint(5, 40), rng.randint(5, 40)
    batches = tuple(rng.sample((1, 2, 3, 5), 2))
    return Drawn(stem, rng.randint(3, 40), tuple(stages), rng.choice(("logits", "maps")), size, batches,
                 rng.choice(THREADS), rng.getrandbits(62))  # fmt: skip


def with_all_regions() -> contextlib.AbstractContextManager:
    """Inside, whatever of a plan can be a region is one."""
    return mock.patch.object(pieces, "why_region", lambda piece: "asked for")


def outcomes(drawn: Drawn) -> Iterator[tuple[str, Outcome]]:
    """(how, what came of it) of the network frozen in each dtype. Nothing is measured."""
    with torch.random.fork_rng(devices=[]), threads(drawn.threads), torch.no_grad(), winners.ignored():
        torch.manual_seed(drawn.seed)
        model = randomize(Network(drawn))
        images = [torch.randn(batch, 3, *drawn.size) for batch in drawn.batches]
        for short in DTYPES:
            right = [answers(model, x, SHORT_DTYPES[short]) for x in images]
            for how, made in (("by rule", contextlib.nullcontext()), ("all regions", with_all_regions())):
                regions = False
                try:
                    with made:
                        frozen = freeze(model, images[0], dtype=SHORT_DTYPES[short], tune=False)
                        regions = any(isinstance(one, FrozenRegion) for one in frozen.plans()[0].modules())
                        found = [outcome(frozen, x, *pair, SHORT_DTYPES[short]) for x, pair in zip(images, right)]
                except Exception as error:
                    found = [Outcome("", "mismatch", f"raised {type(error).__name__}: {error}")]
                wrong = [one for one in found if one.status != "ok"]
                name = f"{short}, {how}, {'regions' if regions else 'without a region'}"
                yield name, wrong[0] if wrong else max(found, key=lambda one: one.worst_error or 0.0)


def answers(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the model returns in fp64, and as it is in this dtype by torch's own kernels: oneDNN errs on some shapes."""
    enabled = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    try:
        rough = _tensors(copy.deepcopy(model).to(dtype)(x.to(dtype)))
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    return _tensors(in_fp64(model, x)), rough


def outcome(
    frozen: FrozenModel, x: Tensor, exact: tuple[Tensor, ...], plain: tuple[Tensor, ...], dtype: torch.dtype
) -> Outcome:
    """The worst of what the network returns: its error as a share of what the plain model in this dtype allows."""
    found = _tensors(frozen(x))
    winograd = any(has_winograd(plan) for plan in frozen.plans())
    slack = 1.0
    if any(isinstance(one, FrozenRegion) for plan in frozen.plans() for one in plan.modules()):
        slack = SLACK[dtype] / SLACK[torch.bfloat16]  # as freeze allows: MKL's sums are in blocks, a region's are not
    shares = []
    for number, (y, right, rough) in enumerate(zip(found, exact, plain)):
        if y.shape != right.shape:
            return Outcome("", "mismatch", f"output {number} is {tuple(y.shape)} instead of {tuple(right.shape)}")
        # a plain result of few elements may be right by luck: so many roundings of the last one it is granted
        limit = max(slack * allowed(rough, right, winograd=winograd), 4 * unit_roundoff(dtype))
        shares.append(error(y, right) / limit)
        if not shares[-1] <= 1:
            detail = f"batch {len(x)}, output {number}: {shares[-1]:.3g} times the error that is allowed ({limit:.3g})"
            return Outcome("", "mismatch", detail)
    return Outcome("", "ok", worst_error=max(shares))


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def verify(problems: int, seed: int) -> Report:
    report = Report(seed, "cpu")
    for index in range(problems):
        drawn = drawn_at(seed, index)
        for name, found in outcomes(drawn):
            report.add(f"network/{name}", found, f"cpu_check.networks.drawn_at({seed}, {index})", drawn)
        report.problems += 1
    return report


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Exit code 0, or 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = verify(options.problems, options.seed)
    print(json.dumps(report.as_dict()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
