"""Trained weights and labelled images for tests: `benchmarks.data.trained`, where a test skips what is absent."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Callable, ParamSpec, TypeVar

import pytest
import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.data import trained

P, T = ParamSpec("P"), TypeVar("T")


def _or_skip(load: Callable[P, T]) -> Callable[P, T]:
    """The same, but it skips the test, with the reason, where a file is absent."""

    @functools.wraps(load)
    def loaded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return load(*args, **kwargs)
        except trained.Missing as error:
            pytest.skip(str(error))

    return loaded


path = _or_skip(trained.path)
cifar10, imagenet_400 = _or_skip(trained.cifar10), _or_skip(trained.imagenet_400)
akamaster, pruned_resnet20 = _or_skip(trained.akamaster), _or_skip(trained.pruned_resnet20)
keras_resnet50 = _or_skip(trained.keras_resnet50)
imagenet_normalized, half_normalized = data.normalize, trained.half_normalized
PRUNED_WIDTHS = trained.PRUNED_WIDTHS


def expected_output(name: str) -> Tensor:
    """What torchvision's own test expects of its model `name`: seed 0, 50 classes, then torch.rand."""
    file = path(f"torchvision_expect/ModelTester.test_{name}_expect.pkl")
    return torch.load(file, weights_only=True)


def refcheck() -> ModuleType:
    """Functional implementations of the same networks that share no code with ours."""
    return _imported(path("refcheck.py"))


def torchvision() -> ModuleType:
    """torchvision, a CUDA build beside a CPU-only torch included. Skips the test where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    data.let_torchvision_import()
    return pytest.importorskip("torchvision")


def predictions(model: nn.Module, inputs: Tensor, batch: int = 250, k: int = 1) -> Tensor:
    """The k likeliest classes of each input, (N, k), int64."""
    with torch.inference_mode():
        return torch.cat([model(x).topk(k, dim=1).indices for x in inputs.split(batch)])


def correct(predicted: Tensor, labels: Tensor) -> int:
    """How many rows of `predicted` contain their label."""
    return int((predicted == labels[:, None]).any(1).sum())


@functools.cache
def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"real_data_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
