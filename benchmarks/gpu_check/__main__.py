"""Everything that needs a GPU, in one call: python -m benchmarks.gpu_check [--out folder] [--only tests,ops].

A first call of 540 s builds _C_cuda where there is none. It runs every form of our kernels, the golden kernels and
racecheck. ResNet-50's convolutions and the whole network follow. Then it asks what cuDNN reads, and whether a NaN
outlives its image. Later calls do the rest: the tuner, the GPU tests, `verify`, the benchmarks. Each step is a
process group of its own, so that one that crashes or hangs costs only itself. Writes check.json, with what was
verified, after each step. Beside it are log.txt, golden.json, the tuner's configs.json and journal.jsonl, and a file
for each of four benchmarks, in benchmarks/results/<device>/.

--budget says how many seconds the call may take. A later call goes on: --only names steps, "rest" those that have not
passed on these sources. check.json keeps the others with their dates. The tuner and the benchmarks go on in their
files, on another machine too where the results' folder was brought along.
--device cpu runs what a CPU can of it, to try the whole out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check.budget import chosen, run_steps
from benchmarks.gpu_check.isolated import FAILED
from benchmarks.gpu_check.steps import Setup, all_steps, bring_back
from fused_resnet.kernels import sources
from fused_resnet.machine import devices


def main() -> int:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: needs a CUDA GPU and a CUDA build of torch; this torch sees none.", file=sys.stderr)
        return 2
    device = devices.device_name(options.device)
    out = options.out or sources.ROOT / "benchmarks" / "results" / device.lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "check.json"
    setup = Setup(out, options.device, options.model, options.problems, options.configs)
    bring_back(setup)
    steps = all_steps(setup)
    unknown = set(options.only or ()) - {"rest", *(step.name for step in steps)}
    if unknown:
        known = ", ".join(step.name for step in steps)
        print(f"gpu-check: unknown step {', '.join(sorted(unknown))}; known ones are rest, {known}.", file=sys.stderr)
        return 2
    done = run_steps(chosen(steps, options.only, file), file, device, options.budget)
    print(f"\nrecords in {out}: {', '.join(sorted(file.name for file in out.iterdir() if file.is_file()))}")
    for name, step in done.items():
        print(f"  {name:18} {step['outcome']:8} {step['seconds']:6.0f} s  {step['detail'][:100]}")
    return 1 if any(step["outcome"] == FAILED for step in done.values()) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    parser.add_argument("--only", type=lambda text: text.split(","), default=None,
                        help='steps, separated by commas; "rest": those that have not passed yet')  # fmt: skip
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all (default: 1500)")
    parser.add_argument("--problems", type=int, default=300, help="random problems per backend (default: 300)")
    parser.add_argument("--model", default="resnet50", help="what the benchmarks measure (default: resnet50)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--configs", type=Path, default=None,
                        help="of the tuner's winners (default: fused_resnet/configs; on a CPU, OUT/tuned)")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
