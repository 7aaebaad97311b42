"""Rankings of Triton configs that nobody has measured: the timing model's beside the cost model's. No GPU is used.

    python -m benchmarks.timing_model [--gpu h200] [--batch 1,32] [--blocks 3] [--out FOLDER]

Of a handful of ResNet-50's convolutions in fp16, the configs that the tuner would measure: each is compiled and a few
of its blocks run in the emulator. Writes GPU_resnet50.json and .md into the folder. These are predictions; only a
measurement decides between the two models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Sequence

import torch

from benchmarks import shapes
from fused_resnet.emulation import predictions
from fused_resnet.emulation.timing_model import GPUS, Gpu
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import cost
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.machine import files
from fused_resnet.operators.problem import ConvProblem

RESULTS = Path(__file__).parent / "results" / "predictions"
# One convolution a stage, of both kinds: C x H x W -> K, filter
LAYERS = (
    "x64x56x56 -> 256, 1x1 float16 bias+add",
    "x64x56x56 -> 64, 3x3",
    "x512x28x28 -> 128, 1x1",
    "x256x14x14 -> 256, 3x3",
    "x512x7x7 -> 512, 3x3",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="h200", choices=sorted(GPUS))
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--blocks", type=int, default=predictions.SAMPLED_BLOCKS, help="of a kernel, emulated")
    parser.add_argument("--layer", action="append", help="part of a convolution's description; repeat for several")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if reason := predictions.why_not():
        print(f"timing_model: {reason}.", file=sys.stderr)
        return 1
    gpu = GPUS[arguments.gpu]
    record = dict(
        what="predictions, not measurements", gpu=gpu._asdict(), triton=runtime.triton.__version__,
        kernels=sources.kernel_digest(sources.TRITON), blocks=arguments.blocks, rows=[],
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{gpu.name}_resnet50.json"
    for problem in _problems(arguments.layer or LAYERS, list(map(int, arguments.batch.split(",")))):
        record["rows"].append(_row(problem, gpu, arguments.blocks))
        files.write_json(path, record)
        path.with_suffix(".md").write_text(markdown(record))
        print(_line(record["rows"][-1]), flush=True)
    print(f"{path} and {path.with_suffix('.md').name}: predictions, not measurements")
    return 0


def _problems(layers: Sequence[str], batches: Sequence[int]) -> list[ConvProblem]:
    convs = [problem for problem, _ in shapes.convs("resnet50", 1, torch.float16)]
    chosen = [next(problem for problem in convs if layer in str(problem)) for layer in layers]
    return [problem._replace(N=batch, device="cuda") for batch in batches for problem in chosen]


def _row(problem: ConvProblem, gpu: Gpu, blocks: int) -> dict[str, Any]:
    found = []
    for config in cost.promising(problem, gpu.arch, gpu.num_sms):
        expected = predictions.of_triton(problem, config, gpu, blocks)
        first = expected.kernels[0]
        cost_us = cost.estimated_us(problem, config, gpu.arch, gpu.num_sms)
        one = dict(config=config._asdict(), us=expected.us, cost_us=cost_us, bound=expected.bound, parts=first.parts)
        found.append(dict(one, resident=first.resident, waves=first.waves))
    return dict(problem=str(problem), configs=sorted(found, key=lambda one: one["us"]))


def agreement(row: dict[str, Any]) -> float:
    """Kendall's tau of the two rankings: the pairs of configs in the same order less those in the other, of all."""
    pairs = [(a, b) for i, a in enumerate(row["configs"]) for b in row["configs"][:i]]
    signs = [(a["us"] - b["us"]) * (a["cost_us"] - b["cost_us"]) for a, b in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / max(len(pairs), 1)


def markdown(record: dict[str, Any]) -> str:
    lines = [
        f"# Predictions for an {record['gpu']['name']}: the timing model beside the cost model",
        "",
        "Nothing here was measured. Times are lower bounds by design, see docs/timing-model.md. Of each convolution "
        "the configs that the tuner would measure, by the timing model's order; beside it the place and the time by "
        f"`kernels/triton/conv/cost.py`. {record['blocks']} blocks of each kernel were emulated. Kendall's tau says "
        "how far the two agree: 1, the same order, -1, the reverse.",
    ]
    for row in record["rows"]:
        by_cost = sorted(row["configs"], key=lambda one: one["cost_us"])
        lines += [
            "",
            f"## {row['problem']}",
            "",
            f"tau {agreement(row):.2f}",
            "",
            "| place | config | predicted us | bound by | cost model's place | cost model's us |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for place, one in enumerate(row["configs"], 1):
            lines.append(
                f"| {place} | {_short(one['config'])} | {one['us']:.1f} | {one['bound']} | {by_cost.index(one) + 1} "
                f"| {one['cost_us']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _short(config: dict[str, Any]) -> str:
    return predictions.described(TritonConfig(**config))


def _line(row: dict[str, Any]) -> str:
    best, by_cost = row["configs"][0], min(row["configs"], key=lambda one: one["cost_us"])
    return (
        f"{row['problem']}: predicted {best['us']:.1f} us, {_short(best['config'])}, {best['bound']}; "
        f"the cost model's first: {by_cost['us']:.1f} us, {_short(by_cost['config'])}; tau {agreement(row):.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
