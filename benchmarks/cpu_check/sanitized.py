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
import random
import re
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence
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


def chains(count: int, seed: int) -> Report:
    """The other steps of regions, by every micro-kernel: several threads must give the bytes that one gives."""
    report = Report(seed, "cpu")
    for index in range(count):
        for name, dtype in problems.kernels_here().items():
            compiled_region, x, intra = chain_at(seed, index, dtype)
            results = []
            for one in (1, intra):
                with threads(one):
                    results += compiled_region([x], compiled_region.empty_workspace(), name)
            is_same = torch.equal(*results)
            found = Outcome(name, "ok") if is_same else Outcome(name, "mismatch", f"{intra} threads give other bytes")
            report.add(f"chain/{name}", found, f"chain_at({seed}, {index}, {dtype})", tuple(x.shape))
        report.problems += 1
    return report


def chain_at(seed: int, index: int, dtype: torch.dtype) -> tuple[CompiledRegion, Tensor, int]:
    """Winograd's 3x3, a pooling and a 3x3 of stride 2; its input in any layout and dtype, and a number of threads."""
    rng = random.Random(f"chain {seed}/{index}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    C, K, out = 32 * rng.randint(1, 2), 32 * rng.randint(1, 2), rng.randint(1, 70)
    shape = (rng.randint(1, 3), C, rng.randint(3, 20), rng.randint(3, 20))
    window = rng.randint(1, 3), rng.randint(1, 3)
    region = Region(dtype)
    x = region.read(shape)
    y = region.winograd(x, winograd.points(normal(K, C, 3, 3) / C), (1, 1), normal(K), activation="relu")
    y = region.pool(y, rng.choice(("max", "average")), window, (rng.randint(1, 2), rng.randint(1, 2)),
                    (window[0] // 2, window[1] // 2), count_include_pad=rng.random() < 0.5)  # fmt: skip
    weight = (normal(out, K, 3, 3) / K).to(dtype)
    region.write(region.convolve([Segment(y, weight, (2, 2), (1, 1))], normal(out), activation="relu6"))
    images = normal(*shape).to(rng.choice((torch.float32, torch.bfloat16)))
    return region.compile(), rng.choice((channels_last, Tensor.contiguous))(images), rng.choice(problems.THREADS)


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
