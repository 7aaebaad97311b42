"""What is run while sanitizers watch: random problems by every kernel of a _C_cpu.so that was compiled for them.

python -m benchmarks.cpu_check.sanitized FOLDER --problems 20 takes the library of that folder in place of the installed
one, and prints what it found in JSON. `sanitizers` makes the library and starts this with the sanitizers' own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_check import networks, problems
from benchmarks.cpu_check.cores import threads
from benchmarks.cpu_check.soak import soaked
from benchmarks.random_problems import merged
from fused_resnet import backends, testing
from fused_resnet.choosing import winners
from fused_resnet.freezing.freeze import freeze
from fused_resnet.kernels import compiled, winograd
from fused_resnet.operators.layout import channels_last
from fused_resnet.operators.problem import FLOAT_DTYPES, SHORT_DTYPES
from fused_resnet.operators.quantized import GATES, Epilogue, Quantized, Wide
from fused_resnet.regions import kernels, program
from fused_resnet.regions.program import CompiledRegion, Map, Region, Segment
from fused_resnet.testing import Outcome, Report
from fused_resnet.testing.networks import randomize

GAP = 1 << 14  # bytes between the maps of a region: several lines of a map
CALLERS = 3
_SOAK_S = 2.0


_PROCESS, _POISON = ctypes.CDLL(None), "__asan_poison_memory_region"  # there where AddressSanitizer is


class Apart(CompiledRegion):
    """A region with GAP bytes before each of its maps and behind the last, which AddressSanitizer lets nobody touch."""

    gaps: list[int]

    def empty_workspace(self) -> Tensor:
        poison = _PROCESS[_POISON]
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8)  # malloc's, which forgets it all once freed
        for begin in self.gaps:
            poison(ctypes.c_void_p(workspace.data_ptr() + begin), ctypes.c_size_t(GAP))
        return workspace


@contextlib.contextmanager
def maps_apart() -> Iterator[None]:
    """Inside, regions are compiled as `Apart`. Else what is behind a map is the next one, or one that is done with."""
    plain = Region.compile

    def places(region: Region, waves: Any) -> dict[Map, int]:
        ends = itertools.accumulate((region._bytes(x, waves) + GAP for x in region._maps), initial=GAP)
        return dict(zip(region._maps, ends))

    def compile_apart(region: Region) -> Apart:
        compact = plain(region)
        apart = Apart(*compact._replace(workspace_bytes=compact.workspace_bytes + GAP))
        apart.gaps = [place - GAP for place in places(region, region._waves()).values()] + [compact.workspace_bytes]
        return apart

    with mock.patch.object(Region, "_places", places), mock.patch.object(Region, "compile", compile_apart):
        yield


# ------------------------------------------------------------------------------------------------------------- parts


def regions(count: int, seed: int) -> Report:
    """Convolutions of one region each, by every micro-kernel."""
    return problems.verify(count, seed, problems.kernels_here())


class Chain(NamedTuple):
    """A region with its inputs, and a number of threads that runs it."""

    region: Region
    compiled: CompiledRegion
    inputs: list[Tensor]
    threads: int


def chains(count: int, seed: int) -> Report:
    """All kinds of steps, by every micro-kernel: several threads must give the bytes that one gives. In int8 every
    kernel must give the first one's."""
    report = Report(seed, "cpu")
    for index in range(count):
        expected: dict[torch.dtype, list[Tensor]] = {}
        for name, dtype in micro_kernels_here().items():
            chain = chain_at(seed, index, dtype)
            results = []
            for one in (1, chain.threads):
                with threads(one):
                    results.append(chain.compiled(chain.inputs, chain.compiled.empty_workspace(), name))
            right = expected.setdefault(dtype, results[0]) if dtype == torch.int8 else results[0]
            detail = next((
                f"{how} give other bytes"
                for how, found in (("other kernels", results[0]), (f"{chain.threads} threads", results[1]))
                if not all(map(torch.equal, found, right))
            ), "")  # fmt: skip
            found = Outcome(name, "mismatch" if detail else "ok", detail)
            report.add(f"chain/{name}", found, f"chain_at({seed}, {index}, {dtype})", tuple(chain.inputs[0].shape))
        report.problems += 1
    return report


def micro_kernels_here() -> dict[str, torch.dtype]:
    """{name: dtype} of those that run here, for floats and bytes."""
    return {kernel.name: kernel.dtype for kernel in kernels.table() if not kernel.why_not}


def chain_at(seed: int, index: int, dtype: torch.dtype) -> Chain:
    """A chain of all steps that this dtype has. Caches that are small on paper make several bands and waves."""
    rng = random.Random(f"chain {seed}/{index}")
    cache = rng.choice((0, 2000, 30_000, 1 << 21))
    with mock.patch.object(program, "second_level_cache_bytes", lambda: cache):
        draw = _Draw(rng, torch.Generator().manual_seed(rng.getrandbits(62)), dtype, Region(dtype), [])
        (_add_int8_steps if dtype == torch.int8 else _add_float_steps)(draw)
        return Chain(draw.region, draw.region.compile(), draw.inputs, rng.choice(problems.THREADS))


class _Draw(NamedTuple):
    rng: random.Random
    generator: torch.Generator
    dtype: torch.dtype
    region: Region
    inputs: list[Tensor]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def image(self, *shape: int) -> tuple[int, int, int, int]:
        """The next input, in any layout and dtype. Returns its shape."""
        x = self.normal(*shape).to(self.rng.choice((torch.float32, torch.bfloat16)))
        self.inputs.append(self.rng.choice((channels_last, Tensor.contiguous))(x))
        N, C, H, W = shape
        return N, C, H, W

    def stem(self) -> tuple[tuple[int, int, int, int], int, tuple[int, int], tuple[int, int]]:
        """The first input's shape, and the side of its convolution's window, the stride and the padding."""
        size, stride = self.rng.choice((3, 7)), self.rng.randint(1, 2)
        shape = self.image(self.rng.randint(1, 3), self.rng.randint(1, 4), *(self.rng.randint(8, 26) for _ in range(2)))
        return shape, size, (stride, stride), (size // 2, size // 2)

    def pooling(self, kind: str) -> program.Pooling:
        window = self.rng.randint(1, 3), self.rng.randint(1, 3)
        stride, padding = (self.rng.randint(1, 2), self.rng.randint(1, 2)), (window[0] // 2, window[1] // 2)
        return program.Pooling(kind, window, stride, padding, self.rng.random() < 0.5)

    def copied(self, y: Map, x: Map) -> Map:
        """Both side by side."""
        factor, before, after = self.rng.choice(((1, 1), (2, 1))), self.rng.randint(0, 5), self.rng.randint(0, 5)
        return self.region.copy([y, x], before=before, after=after, stride=(1, 2), factor=factor)

    def weight(self, *shape: int) -> Tensor:
        if self.dtype == torch.int8:
            return torch.randint(-127, 128, shape, generator=self.generator).to(torch.int8)
        return (self.normal(*shape) / math.prod(shape[1:]) ** 0.5).to(self.dtype)

    def linear(self, weight: Tensor) -> tuple[Tensor, Epilogue]:
        """A weight (K, C, 1, 1) as it is packed, and the constants for vectors of about 1."""
        K, C, _, _ = weight.shape
        epilogue = Epilogue(self.normal(K).abs() / C / 1e4, self.normal(K), 0.0, -math.inf, math.inf, torch.float32)
        return program.packed_weights([weight], torch.int8), epilogue

    def requantizing(self, weight: Tensor, is_input_signed: bool = False) -> program.Requantizing:
        K, *reduced = weight.shape
        multiplier = torch.rand(K, generator=self.generator) / (math.prod(reduced) ** 0.5 * 74)
        epilogue = Epilogue(multiplier, self.normal(K) * 40, 0.5, 0.0, 255.0, torch.uint8)
        return program.Requantizing(epilogue, is_input_signed)


def _add_float_steps(d: _Draw) -> None:
    rng, region, kinds = d.rng, d.region, ("max", "average")
    (K, K_wide), out = (32 * rng.randint(1, 2) for _ in range(2)), rng.randint(1, 70)
    shape, size, stride, padding = d.stem()
    stem = d.weight(K, shape[1], size, size)
    pooling = d.pooling(rng.choice(kinds))
    y = region.pooled_stem(
        shape, stem, stride, padding, d.normal(K), pooling, activation=rng.choice(problems.ACTIVATIONS)
    )
    points = winograd.points(d.normal(K_wide, K, 3, 3) / K)
    y = region.winograd(y, points, (1, 1), d.normal(K_wide), activation="relu")
    y = d.copied(y, region.read(d.image(shape[0], rng.randint(1, 40), *y.shape[2:])))
    pooling = d.pooling(rng.choice(kinds))
    y = region.pool(y, *pooling[:4], count_include_pad=pooling.counts_padding)
    segment = Segment(y, d.weight(out, y.shape[1], 3, 3), (2, 2), (1, 1))
    y = region.convolve([segment], d.normal(out), activation="relu6")
    y = region.norm(y, d.normal(out), d.normal(out), activation=rng.choice(problems.ACTIVATIONS))
    mean = region.pool(y, "average", y.shape[2:], y.shape[2:])
    gate = region.convolve([Segment(mean, d.weight(out, out, 1, 1))], d.normal(out), activation="silu")
    residual = rng.choice((None, y))
    function, activation = rng.choice([*GATES]), rng.choice(problems.ACTIVATIONS)
    region.write(region.gate(y, gate, function, activation=activation, residual=residual, into=rng.choice((None, y))))


def _add_int8_steps(d: _Draw) -> None:
    rng, region, how = d.rng, d.region, Quantized(0.02, False)
    K, out, classes = (rng.randint(1, 70) for _ in range(3))
    shape, size, stride, padding = d.stem()
    stem, pooling = d.weight(K, shape[1], size, size), d.pooling("max")
    signed = Quantized(0.02, True)
    y = region.pooled_stem(
        shape, stem, stride, padding, None, pooling, how=signed, requantizing=d.requantizing(stem, True)
    )
    weight = d.weight(K, K, 3, 3)
    segment, requantizing = Segment(y, weight, padding=(1, 1)), d.requantizing(weight)
    y = region.convolve([segment], None, residual=y, requantizing=requantizing)
    y = d.copied(y, region.read(d.image(shape[0], rng.randint(1, 40), *y.shape[2:]), how))
    y = region.pool(y, *d.pooling("max")[:4], how=how)
    weight = d.weight(out, y.shape[1], 3, 3)
    y = region.convolve([Segment(y, weight, (2, 2), (1, 1))], None, requantizing=d.requantizing(weight))
    bounds = d.requantizing(weight)
    y = region.norm(y, d.normal(out), d.normal(out), requantizing=bounds)
    hidden = rng.randint(1, 70)
    first, last = d.weight(hidden, out, 1, 1), d.weight(out, hidden, 1, 1)
    v = region.linear(region.means(y, how), out, *d.linear(first), Wide(0.02, False), rng.choice(("relu", "silu")))
    v = region.linear(v, hidden, *d.linear(last), Wide(0.1, True))
    kept = Epilogue(torch.tensor([1.5]), torch.zeros(1), 0.5, 0.0, 255.0, torch.uint8)
    of_gate = program.Requantizing(kept, False)
    y = region.gate(
        y, v, rng.choice([*GATES]), residual=rng.choice((None, y)), into=rng.choice((None, y)), requantizing=of_gate
    )
    region.write(y, how)
    region.write_means(y, how)
    region.write_linear(y, *d.linear(d.weight(classes, out, 1, 1)))


def operators(count: int, seed: int) -> Report:
    """The kernels of single convolutions, their epilogue and the addition, as `fused-resnet verify` draws them."""
    with threads(problems.THREADS[seed % len(problems.THREADS)]):
        return testing.verify(count, seed, "cpu", ours())


def common_operators(count: int, seed: int) -> Report:
    """The same of the problems that plans of ResNets have."""
    with threads(problems.THREADS[seed % len(problems.THREADS)]):
        return testing.verify(count, seed, "cpu", ours(), kind="common")


def convolutions_of_bytes(count: int, seed: int) -> Report:
    """The same in int8, by every micro-kernel of regions."""
    with threads(problems.THREADS[seed % len(problems.THREADS)]):
        return testing.verify(count, seed, "cpu", ours("conv_int8"), kind="int8")


def ours(op: str = "conv_bn_act") -> list[str]:
    """The backends that csrc/cpu computes. The addition's names no sources."""
    known = backends.known(op).values()
    return ["cpu", *(one.name for one in known if any(file.startswith("csrc/cpu/") for file in one.sources))]


def poolings(count: int, seed: int) -> Report:
    """Max-poolings in NHWC, against torch's."""
    report = Report(seed, "cpu")
    for index in range(count):
        rng = random.Random(f"pooling {seed}/{index}")
        shape = rng.randint(1, 3), rng.randint(1, 70), rng.randint(3, 20), rng.randint(3, 20)
        window = rng.randint(1, 3), rng.randint(1, 3)
        step, padding = (rng.randint(1, 3), rng.randint(1, 3)), (window[0] // 2, window[1] // 2)
        x = channels_last(torch.randn(shape).to(rng.choice(FLOAT_DTYPES)))
        expected = F.max_pool2d(x, window, step, padding)
        out = torch.full_like(expected, torch.nan)
        with threads(rng.choice(problems.THREADS)):
            torch.ops.fused_resnet.cpu_max_pool2d(x, window, step, padding, out)
        found = Outcome("", "ok") if torch.equal(out, expected) else Outcome("", "mismatch", "torch gives other bytes")
        report.add("max_pool2d", found, f"pooling {seed}/{index}", f"{shape} of {x.dtype} by {window}, stride {step}")
        report.problems += 1
    return report


def whole_networks(count: int, seed: int) -> Report:
    return networks.verify(-(-count // 10), seed)


def callers(count: int, seed: int) -> Report:
    """Python threads that call one frozen network, each with threads of its own."""
    report = Report(seed, "cpu")
    for index in range(-(-count // 20)):
        drawn = networks.drawn_at(seed, index)
        torch.manual_seed(drawn.seed)
        model = randomize(networks.Network(drawn._replace(returns="logits")))
        images = [torch.randn(batch, 3, *drawn.size) for batch in drawn.batches]
        for short in networks.DTYPES:
            with torch.no_grad(), threads(2), winners.ignored(), networks.with_all_regions():
                frozen = freeze(model, images[0], dtype=SHORT_DTYPES[short], tune=False)
                found = soaked(frozen, images, CALLERS, _SOAK_S)
            is_right = not found["wrong"] and not found["raised"]
            detail = f"{found['wrong']} of {found['calls']} calls are wrong; {'; '.join(found['raised'])}"
            outcome = Outcome("", "ok") if is_right else Outcome("", "mismatch", detail)
            report.add(f"{CALLERS} callers/{short}", outcome, f"networks.drawn_at({seed}, {index})", drawn)
        report.problems += 1
    return report


PARTS: dict[str, Callable[[int, int], Report]] = {
    "regions": regions, "chains": chains, "operators": operators, "common operators": common_operators,
    "bytes": convolutions_of_bytes, "poolings": poolings, "networks": whole_networks, "callers": callers,
}  # fmt: skip


def loaded_libraries() -> set[str]:
    """The files of that name which this process has mapped."""
    return set(re.findall(r"(/\S*_C_cpu\.so)", Path("/proc/self/maps").read_text()))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Exit code 0, 1 when a result is wrong, 2 where the library is not what runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the library")
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    options = parser.parse_args(arguments)
    with mock.patch.object(compiled, "_DIRECTORY", options.folder):
        why = compiled.load("cpu")
    if why is not None or loaded_libraries() != {str(options.folder / "_C_cpu.so")}:
        print(f"cpu_check.sanitized: {why or loaded_libraries()}", file=sys.stderr)
        return 2
    reports = []
    with maps_apart() if hasattr(_PROCESS, _POISON) else contextlib.nullcontext():
        for part in options.parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            reports.append({**PARTS[part](options.problems, options.seed).as_dict(), "kind": part})
    found = merged(reports)
    print(json.dumps({"instruction_set": (compiled.instruction_set() or {})["name"], **found}))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
