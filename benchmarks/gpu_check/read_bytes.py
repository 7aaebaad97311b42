"""What cuDNN's convolutions read from DRAM, to be run under ncu: python -m benchmarks.gpu_check.read_bytes NAME

PyTorch hands the uninitialised output to cudnn_convolution_relu as the summand z, times zero. A library that reads it
all the same reads as many bytes more as the output has. NAME: plain or fused.
"""

from __future__ import annotations

import csv
import sys

import torch

METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
NAMES = ("plain", "fused")
_SHAPE = (256, 64, 56, 56)  # x and the output have 103 MB each, more than an L2 cache holds
_UNITS = {"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def tensor_bytes() -> int:
    """The size of x, and of the output: two bytes an element."""
    return 2 * torch.Size(_SHAPE).numel()


def bytes_of(output: str) -> dict[str, float]:
    """The bytes that ncu counted, by metric, over all kernels. output: of ncu --csv, with what others printed."""
    lines = output.splitlines()
    start = next((index for index, line in enumerate(lines) if '"Metric Name"' in line), len(lines))
    totals = dict.fromkeys(METRICS.split(","), 0.0)
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") in totals and row.get("Metric Value"):
            value = float(row["Metric Value"].replace(",", ""))
            totals[row["Metric Name"]] += value * _UNITS[row["Metric Unit"].lower()]
    return totals


def verdict(plain: float, fused: float) -> str:
    """What the bytes that both have read say about z."""
    more = (fused - plain) / tensor_bytes()
    is_read = "reads z" if more > 0.5 else "does not read z"
    return f"cudnn_convolution_relu {is_read}: {fused / 1e6:.0f} MB read, {plain / 1e6:.0f} MB without bias and ReLU"


def main(name: str) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(torch.float16, memory_format=torch.channels_last)

    x, weight, ones = normal(*_SHAPE), normal(64, 64, 3, 3), (1, 1)
    bias = torch.zeros(64, device="cuda", dtype=x.dtype)
    calls = {
        "plain": lambda: torch.cudnn_convolution(x, weight, ones, ones, ones, 1, True, False, True),
        "fused": lambda: torch.cudnn_convolution_relu(x, weight, bias, ones, ones, ones, 1),
    }
    torch.backends.cudnn.benchmark = True
    calls[name]()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    calls[name]()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1])
