"""What freeze chooses by measuring, against every single backend: python -m benchmarks.choices --out choices.json

Frozen models of each network, dtype, batch and number of threads take turns in one process. There is one as freeze
makes it by default, and once more as a control (A/A). There is one by the rules alone (tune=False), and one with each
backend that can run all of the network. "of the best" is the time of the fastest single backend as a fraction of the
default's. Above 0.95, freeze is within 5 % of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

import fused_resnet
from benchmarks import data, wild
from fused_resnet import backends, measuring, models
from fused_resnet.measuring import Record
from fused_resnet.operators.problem import SHORT_DTYPES

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: models.create(name) for name in ("resnet18", "resnet50", "resnext50_32x4d")},
    **{name.split()[1]: wild.MODELS[name] for name in ("torchvision vgg16_bn", "torchvision regnet_y_400mf")},
}
DEFAULT, CONTROL, RULES = "measured", "measured again", "rules"


def main() -> None:
    options = parse_arguments()
    data.let_torchvision_import()
    settings = {"device": "cpu", "size": options.size, "budget_s": options.budget}
    record = Record.here("choices", "cpu", settings)
    print("| network | dtype | batch | threads | measured | A/A | rules | of the best | best single backend |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.model:
            for dtype in options.dtype:
                for batch in options.batch:
                    row = {"model": name, "dtype": dtype, "batch": batch, "threads": threads}
                    row.update(measured(name, SHORT_DTYPES[dtype], batch, options))
                    record = record._replace(rows=[*record.rows, row])
                    if options.out:
                        record.write(options.out)
                    print(shown(row), flush=True)


def measured(name: str, dtype: torch.dtype, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (batch, 3, options.size, options.size)
    model, x = measuring.calibrated(MODELS[name](), shape[1:]).eval(), torch.randn(shape)
    frozen = {DEFAULT: fused_resnet.freeze(model, x, dtype=dtype)}
    frozen[CONTROL] = fused_resnet.freeze(model, x, dtype=dtype)
    frozen[RULES] = by_rules(model, x, dtype)
    for backend in backends.known("conv_bn_act"):
        try:
            frozen[backend] = fused_resnet.freeze(model, x, dtype=dtype, backend=backend)
        except backends.BackendError:
            pass  # it cannot run all of the network
    calls = {variant: lambda one=one: one(x) for variant, one in frozen.items()}
    with torch.no_grad():
        expected = frozen["eager"](x).double()
        errors = {
            variant: ((call().double() - expected).norm() / expected.norm()).item() for variant, call in calls.items()
        }
        stats = measuring.interleaved(calls, budget_s=options.budget, rounds=options.rounds)
    best = min((one for one in stats if one not in (DEFAULT, CONTROL, RULES)), key=lambda one: stats[one].median_us)
    return {
        "variants": {variant: one._asdict() for variant, one in stats.items()},
        "errors": errors,
        "best": best,
        "of_the_best": stats[best].median_us / stats[DEFAULT].median_us,
        "control": stats[CONTROL].median_us / stats[DEFAULT].median_us,
    }


def by_rules(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    from fused_resnet.choosing import winners

    with winners.ignored():
        return fused_resnet.freeze(model, x, dtype=dtype, tune=False)


def shown(row: dict[str, Any]) -> str:
    ms = {variant: one["median_us"] / 1e3 for variant, one in row["variants"].items()}
    cells = [row["model"], row["dtype"], row["batch"], row["threads"], f"{ms[DEFAULT]:.1f} ms", f"{row['control']:.2f}"]
    cells += [f"{ms[RULES]:.1f} ms", f"{row['of_the_best']:.2f}", f"{row['best']} {ms[row['best']]:.1f} ms"]
    return "| " + " | ".join(map(str, cells)) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the record, written after each row")
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images (default: 1 8)")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(SHORT_DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads (default: 1 2)")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timing for each row (default: 15)")
    parser.add_argument("--rounds", type=int, help="at most so many rounds for each row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
