"""What the timing model expects of csrc's convolutions for sm_90 on those of a network. No GPU is used.

    python -m benchmarks.sm90_predictions [--model resnet50] [--grouped] [--gpu h200] [--batch 1,32,256] [--dtype fp16]

Of each convolution the tile that csrc's own estimate puts first among sm_90a's and those for groups. --grouped: of
the convolutions with groups alone. A few of its blocks (--blocks) run in the emulator. Beside the time stands the
roof: the longer of its products and its bytes, at the GPU's peaks. These are predictions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Optional

from benchmarks import shapes
from fused_resnet import _host_checks as checks
from fused_resnet.emulation import cuda_launches, predictions
from fused_resnet.emulation.timing_model import GPUS, Gpu
from fused_resnet.kernels import sources
from fused_resnet.machine import files
from fused_resnet.operators.problem import SHORT_DTYPES, ConvProblem

RESULTS = Path(__file__).parent / "results" / "predictions"


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--grouped", action="store_true", help="only the convolutions with groups")
    parser.add_argument("--gpu", default="h200", choices=[name for name, gpu in GPUS.items() if gpu.arch == 90])
    parser.add_argument("--batch", default="1,32,256")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    parser.add_argument("--blocks", type=int, default=1, help="of a kernel, emulated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if reason := predictions.why_not() or cuda_launches.why_not():
        print(f"sm90_predictions: {reason}.", file=sys.stderr)
        return 1
    gpu, dtype = GPUS[arguments.gpu], SHORT_DTYPES[arguments.dtype]
    record: dict[str, Any] = dict(
        what="predictions, not measurements", gpu=gpu._asdict(), model=arguments.model, dtype=arguments.dtype,
        blocks=arguments.blocks, kernels=sources.kernel_digest(sources.CUDA), rows=[],
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{gpu.name}_sm90_{arguments.model}{'_grouped' * arguments.grouped}.json"
    for batch in map(int, arguments.batch.split(",")):
        for problem, count in shapes.convs(arguments.model, batch, dtype):
            if arguments.grouped and problem.groups == 1:
                continue
            record["rows"].append(dict(row(problem, gpu, arguments.blocks), batch=batch, count=count))
            files.write_json(path, record)
            path.with_suffix(".md").write_text(markdown(record))
            print(line(record["rows"][-1]), flush=True)
    print(f"{path} and {path.with_suffix('.md').name}: predictions, not measurements")
    return 0


def row(problem: ConvProblem, gpu: Gpu, blocks: int) -> dict[str, Any]:
    found: dict[str, Any] = dict(problem=str(problem), roof_us=roof_us(problem, gpu))
    tile = first_tile(problem, gpu)
    if tile is None:
        return dict(found, why=why_none(problem))
    expected = predictions.of_cuda(problem._replace(device="cuda"), tile, gpu, blocks)
    return dict(found, tile=tile, us=expected.us, bound=expected.bound, parts=expected.kernels[0].parts)


def roof_us(problem: ConvProblem, gpu: Gpu) -> float:
    """Microseconds of the products at wgmma's peak, or of each byte once at the memory's."""
    assert gpu.wgmma is not None
    products = problem.flops / 2 / gpu.wgmma / gpu.num_sms / gpu.clock_mhz
    return max(products, problem.bytes_moved / gpu.memory_gb_per_s / 1e3)


def first_tile(problem: ConvProblem, gpu: Gpu) -> Optional[int]:
    """The one for sm_90a or for groups that csrc's estimate puts first, or None."""
    known = (*cuda_launches.GROUPED_TILES, *cuda_launches.SM90_TILES)
    limits = checks.DeviceLimits(gpu.num_sms, 227 * 1024, 228 * 1024, gpu.arch)
    ranked = checks.all_configs(_shape(problem), problem.dtype.itemsize, limits, True)
    return next((tile for tile, _ in ranked if tile in known), None)


def why_none(problem: ConvProblem) -> str:
    return checks.sm90_why_not(_shape(problem), problem.dtype.itemsize, True)


def _shape(p: ConvProblem):
    x, weight = (p.N, p.H, p.W, p.C), (p.K, p.R, p.S, p.C // p.groups)
    return checks.ConvShape(x, weight, p.stride, p.padding, p.dilation, p.groups)


def markdown(record: dict[str, Any]) -> str:
    lines = [
        f"# Predictions for an {record['gpu']['name']}: csrc's convolutions for sm_90, {record['model']}, "
        f"{record['dtype']}",
        "",
        "Nothing here was measured. Times are lower bounds by design, see docs/timing-model.md. The roof is the longer "
        "of the products and of the bytes, each at the GPU's peak; the launch is not in it. Totals count each "
        "convolution as often as the network has it.",
    ]
    for batch in dict.fromkeys(one["batch"] for one in record["rows"]):
        rows = [one for one in record["rows"] if one["batch"] == batch]
        lines += ["", f"## Batch {batch}", "", "| convolution | times | tile | predicted us | bound by | roof us |",
                  "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for one in rows:
            told = f"{one['tile']} | {one['us']:.1f} | {one['bound']}" if "us" in one else f"- | - | {one['why']}"
            lines.append(f"| {one['problem']} | {one['count']} | {told} | {one['roof_us']:.1f} |")
        known = [one for one in rows if "us" in one]
        total, roof = (sum(one["count"] * one[name] for one in known) for name in ("us", "roof_us"))
        lines.append(f"| all of those | {sum(one['count'] for one in known)} | | {total:.0f} | | {roof:.0f} |")
    return "\n".join(lines) + "\n"


def line(one: dict[str, Any]) -> str:
    told = f"predicted {one['us']:.1f} us, tile {one['tile']}, {one['bound']}" if "us" in one else one["why"]
    return f"{one['problem']}: {told}; roof {one['roof_us']:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
