"""Memory and the first freeze of ResNet-50: python -m benchmarks.cpu_check.footprint --out footprint.json

| what, in bf16 and in fp32 | at most |
| --- | --- |
| activations at batch 8: the workspaces of a frozen model, and what its call allocates beside | 0.6 of eager's peak |
| weights that plans for two batches hold together | 1.15 of those of one |
| freeze without measuring, in a process that has frozen nothing before | 3 s |

The plans are those of `freeze` by default, which has measured the first of them. Weights are in memory once where a
second plan adds little to them. Beside that stands how they compare with the model's own in the dtype: Winograd's are
four times as large as the 3x3 filters that they are made of.

Exit code 1 where one is more.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fused_resnet
from benchmarks.cpu_check.cores import keep_to
from fused_resnet import measuring, models
from fused_resnet.kernels import sources
from fused_resnet.measuring import Record
from fused_resnet.operators.problem import SHORT_DTYPES

LIMITS = {"activations": 0.6, "weights": 1.15, "freeze_s": 3.0}
_CONTAINERS = (tuple, list, set, frozenset, collections.deque)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that torch's allocator holds at once of what it hands out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, torch.no_grad():
        call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(steps), default=0)


def tensors_of(*roots: Any) -> Iterator[Tensor]:
    """Every tensor that modules hold, a storage once: also in containers, and in functions that close over it."""
    seen, storages, left = set[int](), set[int](), list(roots)
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            place = id(value) if value.is_mkldnn else value.untyped_storage().data_ptr()
            if place not in storages:
                storages.add(place)
                yield value
        elif isinstance(value, nn.Module):
            left.append(vars(value))
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, _CONTAINERS):
            left += value
        elif isinstance(value, FunctionType):
            left += [value.__defaults__, *(cell.cell_contents for cell in value.__closure__ or ())]
        elif isinstance(value, MethodType):
            left.append(value.__self__)
        elif isinstance(value, functools.partial):
            left += [value.func, value.args, value.keywords]


def bytes_of(tensor: Tensor) -> int:
    """All the memory that it keeps, be it a view. oneDNN does not say how much it has padded."""
    return tensor.numel() * tensor.itemsize if tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def held_bytes(plans: Sequence[nn.Module]) -> tuple[int, int]:
    """(weights, workspaces): floating-point tensors, and those of raw bytes."""
    found = list(tensors_of(*plans))
    weights = sum(bytes_of(tensor) for tensor in found if tensor.is_floating_point())
    return weights, sum(bytes_of(tensor) for tensor in found if tensor.dtype == torch.uint8)


def measured(name: str, dtype: str, size: int, batch: int) -> dict[str, Any]:
    """In a process that has frozen nothing before: the freeze comes first."""
    torch.manual_seed(0)
    image = (3, size, size)
    model = measuring.calibrated(models.create(name), image)
    x, other = torch.randn(batch, *image), torch.randn(1, *image)
    started = time.perf_counter()
    fused_resnet.freeze(model, x, dtype=SHORT_DTYPES[dtype], tune=False)
    freeze_s = time.perf_counter() - started
    frozen = fused_resnet.freeze(model, x, dtype=SHORT_DTYPES[dtype])
    frozen(x)
    call_bytes = peak_bytes(lambda: frozen(x))
    first, workspaces = held_bytes(frozen.plans())
    frozen(other)
    weights, _ = held_bytes(frozen.plans())
    plain = model.to(SHORT_DTYPES[dtype])
    images = x.to(SHORT_DTYPES[dtype])
    eager_bytes = min(peak_bytes(lambda: plain(images)), peak_bytes(lambda: _in_nhwc(plain)(_in_nhwc(images))))
    own = sum(bytes_of(parameter) for parameter in plain.parameters())
    return {
        "dtype": dtype, "batch": batch, "plans": len(frozen.plans()), "freeze_s": freeze_s,
        "activation_bytes": workspaces + call_bytes, "workspace_bytes": workspaces, "eager_bytes": eager_bytes,
        "activations": (workspaces + call_bytes) / eager_bytes,
        "weight_bytes": weights, "weights": weights / first, "model_bytes": own, "of_the_model": weights / own,
    }  # fmt: skip


def _in_nhwc(value: Any) -> Any:
    return value.to(memory_format=torch.channels_last)


def missed(row: dict[str, Any]) -> list[str]:
    return [f"{name} {row[name]:.2f} > {most}" for name, most in LIMITS.items() if not row[name] <= most]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="this one alone, its row printed as JSON")
    options = parser.parse_args(arguments)
    keep_to(1)
    if options.dtype:
        print(json.dumps(measured(options.model, options.dtype, options.size, options.batch)))
        return 0
    rows = []
    for dtype in ("bf16", "fp32"):
        sizes = ("--model", options.model, "--size", str(options.size), "--batch", str(options.batch))
        command = (sys.executable, "-m", "benchmarks.cpu_check.footprint", "--dtype", dtype, *sizes)
        done = subprocess.run(command, cwd=sources.ROOT, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append({**row, "missed": missed(row)})
        print(f"{dtype}: activations {row['activations']:.2f} of eager's, weights {row['weights']:.2f} of one "
              f"plan's and {row['of_the_model']:.2f} of the model's, "
              f"first freeze {row['freeze_s']:.1f} s")  # fmt: skip
    if options.out is not None:
        settings = {"model": options.model, "size": options.size, "batch": options.batch, "limits": LIMITS}
        Record.here("footprint", "cpu", settings)._replace(rows=rows).write(options.out)
    over = [f"{row['dtype']}: {one}" for row in rows for one in row["missed"]]
    print(f"too much: {'; '.join(over)}" if over else "all within their limits")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
