"""The sample of CIFAR-10 that travels with the repository."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch

from fused_resnet.models import cifar
from tests.support import real_data


@pytest.fixture(scope="module")
def sample():
    """benchmarks/data as a module, wherever pytest was started."""
    file = Path(__file__).parents[2] / "benchmarks" / "data" / "__init__.py"
    spec = importlib.util.spec_from_file_location("benchmarks_data", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sample_is_balanced_and_answered_as_its_readme_says(sample):
    images, labels = sample.load_cifar10_sample()
    assert (images.dtype, images.shape) == (torch.uint8, (500, 3, 32, 32))
    assert (labels.dtype, labels.bincount().tolist()) == (torch.int64, [50] * 10)
    model = cifar.resnet20(weights=sample.RESNET20_WEIGHTS).eval()
    assert real_data.correct(real_data.predictions(model, sample.normalize(images)), labels) == 457


def test_sample_files_are_those_its_readme_names(sample):
    folder = sample.RESNET20_WEIGHTS.parent
    readme = (folder / "README.md").read_text()
    for file in (sample.RESNET20_WEIGHTS, folder / "cifar10_sample.npz"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in readme, file.name
    assert "Redistributions in binary form" in (folder / "LICENSE.resnet20").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000


def test_sample_comes_from_the_test_set(sample):
    import numpy as np

    all_images, all_labels = real_data.cifar10()
    images, labels = sample.load_cifar10_sample()
    with np.load(sample.RESNET20_WEIGHTS.parent / "cifar10_sample.npz") as arrays:
        indices = torch.from_numpy(arrays["indices"]).long()
    assert torch.equal(all_images[indices], images)
    assert torch.equal(all_labels[indices], labels)
