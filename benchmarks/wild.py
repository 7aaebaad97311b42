"""Other people's networks, frozen against eager: python -m benchmarks.wild --threads 1 --out wild_1_thread.json

Ten models of timm, torchvision and transformers with random weights and calibrated norms. Each is compared with fp64
before it is timed; eager (NCHW and NHWC) and frozen take turns in one process. The record has the form of
`fused-resnet bench model`, a run for each model; the table printed is in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

import fused_resnet
from benchmarks import data
from fused_resnet import measuring
from fused_resnet.freezing.frozen import FrozenParts
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.measuring import NetworkSubject, Record
from fused_resnet.operators.problem import SHORT_DTYPES

EAGER = ("eager NCHW fp32", "eager NHWC fp32")


class OneTensor(nn.Module):
    """A model whose output is a dict, as one that returns the tensor under `key`."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[self.key]


def timm(name: str) -> Callable[[], nn.Module]:
    return lambda: __import__("timm").create_model(name)


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(__import__("torchvision").models, name)(**options)


def fcn() -> nn.Module:
    from torchvision.models import segmentation

    return OneTensor(segmentation.fcn_resnet50(weights_backbone=None), "out")


def transformers_resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return OneTensor(ResNetForImageClassification(ResNetConfig(num_labels=1000)), "logits")


MODELS = {
    "timm resnet18": timm("resnet18"),
    "timm resnet50d": timm("resnet50d"),
    "timm resnext50_32x4d": timm("resnext50_32x4d"),
    "timm seresnet50": timm("seresnet50"),
    "torchvision fcn_resnet50": fcn,
    "torchvision googlenet": torchvision("googlenet", init_weights=False, aux_logits=False),
    "torchvision densenet121": torchvision("densenet121"),
    "torchvision vgg16_bn": torchvision("vgg16_bn"),
    "torchvision regnet_y_400mf": torchvision("regnet_y_400mf"),
    "transformers ResNet-50": transformers_resnet50,
}


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    data.let_torchvision_import()
    settings = {"device": "cpu", "size": options.size, "batch": options.batch, "budget_s": options.budget}
    record = Record.here("bench model", "cpu", settings)
    print(
        "| model | convolutions, frozen | eager, ms | "
        + " | ".join(f"frozen {dtype}" for dtype in options.dtype)
        + " |"
    )
    print("| --- | --- | --- |" + " --- |" * len(options.dtype))
    for name in options.model:
        run = measure(name, options)
        record = record._replace(rows=[*record.rows, run])
        if options.out:
            record.write(options.out)
        print(row_of(run, options.dtype), flush=True)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = measuring.calibrated(MODELS[name](), (3, options.size, options.size))
    shape = (options.batch, 3, options.size, options.size)
    dtypes = [SHORT_DTYPES[dtype] for dtype in options.dtype]
    run = NetworkSubject(name, model, shape, "cpu", dtypes, baselines=("eager",)).measured(options.budget)
    variants = run["variants"]
    eager_ms = min(variants[eager]["ms"] for eager in EAGER if eager in variants)
    for variant in variants.values():
        variant["ratio_to_faster_eager"] = eager_ms / variant["ms"]
    return {"model": name, "size": options.size, **convolutions(model, torch.randn(shape)), "eager_ms": eager_ms, **run}


def convolutions(model: nn.Module, x: Tensor) -> dict[str, int]:
    frozen = fused_resnet.freeze(model, x)
    plans = [frozen] if not isinstance(frozen, FrozenParts) else list(frozen.parts.values())
    modules = [module for part in plans for plan in part.plans() for module in plan.modules()]
    return {
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in model.modules()),
        "frozen_convolutions": sum(isinstance(module, FrozenConv) for module in modules)
        + sum(len(module.convolutions) for module in modules if isinstance(module, FrozenRegion)),
    }


def row_of(run: dict[str, Any], dtypes: list[str]) -> str:
    cells = [run["model"], f"{run['convolutions']}, {run['frozen_convolutions']}", f"{run['eager_ms']:.1f}"]
    for dtype in dtypes:
        frozen = run["variants"].get(f"frozen {dtype}")
        cells.append(f"{frozen['ms']:.1f} ms, {frozen['ratio_to_faster_eager']:.2f}x" if frozen else "-")
    return "| " + " | ".join(cells) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wild", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the record, written after each model")
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(SHORT_DTYPES))
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timing for each model (default: 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
