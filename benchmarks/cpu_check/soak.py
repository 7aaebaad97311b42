"""Several threads on one frozen model: python -m benchmarks.cpu_check.soak --seconds 600

Every call must give the very bytes that a single thread got before. Prints {"calls", "wrong", ...} in JSON for each
dtype. Exit code 1 for a wrong byte.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

import fused_resnet
from benchmarks.cpu_check.cores import threads
from fused_resnet import measuring, models
from fused_resnet.measuring import Record
from fused_resnet.operators.problem import SHORT_DTYPES


def soaked(call: Callable[[Tensor], Tensor], images: Sequence[Tensor], callers: int, seconds: float) -> dict[str, Any]:
    """What came of so many threads that call for so long, each with its own torch threads and another image in turn."""
    expected = [call(x) for x in images]
    counts, wrong, raised = [0] * callers, [0] * callers, list[str]()
    intra, until = torch.get_num_threads(), time.monotonic() + seconds

    def work(caller: int) -> None:
        torch.set_num_threads(intra)  # a new thread has the default
        try:
            while counts[caller] == 0 or time.monotonic() < until:
                number = (caller + counts[caller]) % len(images)
                y = call(images[number])
                counts[caller] += 1
                wrong[caller] += not _same_bytes(y, expected[number])
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(caller,)) for caller in range(callers)]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {
        "callers": callers, "torch_threads": intra, "seconds": round(time.monotonic() - started, 1),
        "calls": sum(counts), "wrong": sum(wrong), "raised": raised,
    }  # fmt: skip


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="in all (default: 10)")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    image = (3, options.size, options.size)
    model = measuring.calibrated(models.create(options.model), image)
    images = [torch.randn(batch, *image) for batch in (1, 3, 1, 2, 1)]
    rows = []
    for dtype in ("fp32", "bf16"):
        for intra in (1, 2):
            with threads(intra):
                frozen = fused_resnet.freeze(model, images[0], dtype=SHORT_DTYPES[dtype])
                rows.append({"dtype": dtype, **soaked(frozen, images, options.callers, options.seconds / 4)})
            print(json.dumps(rows[-1]), flush=True)
    passed = not any(row["wrong"] or row["raised"] for row in rows)
    if options.out is not None:
        settings = {"model": options.model, "size": options.size, "seconds": options.seconds}
        Record.here("soak", "cpu", settings)._replace(rows=rows, more={"passed": passed}).write(options.out)
    calls, wrong = (sum(row[name] for row in rows) for name in ("calls", "wrong"))
    print(f"{calls} calls, {wrong} with a wrong byte")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
