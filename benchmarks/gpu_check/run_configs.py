"""Every tuned config of a device once, on two images, against the reference.

python -m benchmarks.gpu_check.run_configs FILE

Small enough to run under compute-sanitizer. Prints a line per config; exit code 1 when one is wrong or raises.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch

from fused_resnet import backends, choosing, measuring
from fused_resnet.choosing import winners_file
from fused_resnet.freezing import modules
from fused_resnet.machine.errors import why_missing
from fused_resnet.operators.problem import ConvProblem, parsed_problem

IMAGES = 2
_PROBLEM = re.compile(r"[^,]*, [^,]*")  # a key's threads, TF32 and versions come after it (`winners.key`)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.run_configs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="fused_resnet/configs/<device>.json, or a copy")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", type=lambda text: text.split(","), default=["cuda", "triton"],
                        help="whose configs (default: cuda,triton)")  # fmt: skip
    options = parser.parse_args()
    table = winners_file.Table.from_json(json.loads(options.file.read_text()))
    counts = {"right": 0, "wrong": 0, "not run": 0}
    for problem, name, config in configs_of(table, options.device, options.backend):
        outcome, why = run(problem, name, config, options.device)
        counts[outcome] += 1
        print(f"{outcome}: {name} {config}: {problem} {why}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["wrong"] else 0


def configs_of(
    table: winners_file.Table, device: str, names: Sequence[str]
) -> Iterator[tuple[ConvProblem, str, dict[str, Any]]]:
    """Each (problem, backend, config) of the table once, whatever batch it was tuned for."""
    seen = set()
    for key, by_batch in table.entries.items():
        shown = _PROBLEM.match(key)
        problem = parsed_problem(f"{IMAGES}x{shown.group() if shown else key}", device)
        for entry in by_batch.values():
            for name, measured in entry.candidates.items():
                place = (key, name, json.dumps(measured.config, sort_keys=True))
                if name in names and measured.config is not None and place not in seen:
                    seen.add(place)
                    yield problem, name, measured.config


def run(problem: ConvProblem, name: str, config: dict[str, Any], device: str) -> tuple[str, str]:
    """("right", "wrong" or "not run"; why)."""
    backend = backends.known("conv_bn_act")[name]
    reason = backend.why_not(problem)
    found = backend.configs.find(problem, config) if backend.configs and not reason else None
    if found is None:
        return "not run", reason or "there is no such config for two images"
    operands = measuring.folded_operands(measuring.random_operands(problem, device), has_bias=problem.has_bias)
    case = measuring.compared_case(problem, operands)
    conv = modules.FrozenConv(problem, choosing.Selection(backend, found), operands.weight, operands.bias)

    def call() -> torch.Tensor:
        return conv(operands.x, operands.residual)

    try:
        ratio = measuring.error_ratio(measuring.Prepared(call, case, name))
    except Exception as error:  # the next config does not depend on it
        return "wrong", why_missing(error)
    return ("right", "") if ratio <= 1 else ("wrong", f"by {ratio:.3g} times the bound")


if __name__ == "__main__":
    sys.exit(main())
