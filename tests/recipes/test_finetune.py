"""Fine-tuning, and the command lines of train and finetune."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fused_resnet import models
from fused_resnet.cli.main import cli
from fused_resnet.recipes.finetune import pretrained
from tests.support import real_data
from tests.support.scripts import script

SAMPLE = "benchmarks/data/cifar10/cifar10_sample.npz"


@pytest.fixture
def weights(tmp_path):
    torch.save(models.create("resnet20").state_dict(), tmp_path / "resnet20.pt")
    return tmp_path / "resnet20.pt"


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for name, colour in (("ant", 40), ("bee", 210)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(-30, 30, (40, 44, 3))
                picture = Image.fromarray((colour + noise).astype(np.uint8))
                picture.save(tmp_path / "images" / split / name / f"{number}.jpg")
    return tmp_path / "images"


def test_a_new_classifier_on_trained_layers(weights):
    model = pretrained("resnet20", weights, 3)
    kept = torch.load(weights, weights_only=True)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items() if "linear" not in name)


@pytest.mark.parametrize("library, name", (("torchvision", "resnet18"), ("timm", "resnet18")))
def test_networks_of_other_libraries(library, name, tmp_path):
    real_data.torchvision()
    found = pytest.importorskip("timm").create_model(name) if library == "timm" else models.create(name)
    torch.save(found.state_dict(), tmp_path / "weights.pt")
    model = pretrained(f"{library}/{name}", tmp_path / "weights.pt", 5)
    assert type(model).__module__.startswith(library) and model.fc.out_features == 5
    assert torch.equal(model.conv1.weight, found.conv1.weight)


def test_refusals(weights, tmp_path):
    with pytest.raises(ValueError, match="unknown model 'resnet21'"):
        pretrained("resnet21", weights, 3)
    with pytest.raises(ValueError, match="networks are of timm or torchvision, or ours by name; got keras/resnet50"):
        pretrained("keras/resnet50", weights, 3)
    with pytest.raises(ValueError, match="does not fit CifarResNet"):
        pretrained("resnet32", weights, 3)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pretrained("resnet20", tmp_path / "absent.pt", 3)


def test_the_example(weights, folder, tmp_path):
    arguments = ("--model", "resnet20", "--weights", weights, "--data", folder, "--image", 32, "--workers", 1,
                 "--batch", 8, "--epochs", 2, "--log-every", 1, "--device", "cpu", "--out", tmp_path / "o")  # fmt: skip
    done = script("examples/finetune.py", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [point["step"] for point in record["points"]] == [1, 2, 3, 4] and len(record["tests"]) == 2
    assert record["settings"]["schedule"] == "cosine" and record["settings"]["label_smoothing"] == 0.1
    (folder / "val" / "ant" / "0.jpg").write_bytes(b"no picture")
    done = script("examples/finetune.py", *arguments, "--resume")
    assert done.returncode == 1 and "Error: images:" in done.stderr and "0.jpg cannot be read" in done.stderr


def run(*arguments):
    return CliRunner().invoke(cli, ["train", "--device", "cpu", *(str(argument) for argument in arguments)])


def test_train(tmp_path):
    arguments = ("--data", SAMPLE, "--test", SAMPLE, "--batch", 250, "--steps", 1, "--out", tmp_path / "out")
    done = run(*arguments, "--plain", "--dtype", "bf16")
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "step 1: training error" in done.stdout and "step 1: test error" in done.stdout
    models.create("resnet20", weights=tmp_path / "out" / "model.pt")
    again = run(*arguments, "--plain", "--dtype", "bf16", "--resume", "--json")
    record = json.loads(again.stdout)
    assert record["settings"]["fused"] is False and record["settings"]["dtype"] == "bf16"
    for more, match in (((), "holds a run already"), (("--resume",), "dtype bf16, not fp32")):
        refused = run(*arguments, "--plain", *more)
        assert isinstance(refused.exception, ValueError) and match in str(refused.exception)


def test_wrong_arguments(tmp_path, folder):
    done = run("--data", SAMPLE, "--out", tmp_path / "out", "--model", "resnet50")
    assert done.exit_code == 2 and "--recipe cifar trains networks for 32 pixels" in done.output
    done = run("--recipe", "imagenet", "--data", folder, "--test", SAMPLE, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "--test: for --recipe cifar alone" in done.output
    done = run("--data", tmp_path / "absent", "--out", tmp_path / "out")
    assert isinstance(done.exception, FileNotFoundError) and not (tmp_path / "out").exists()


def test_imagenets_recipe(tmp_path, folder):
    """A folder's classes are the network's."""
    done = run("--recipe", "imagenet", "--model", "resnet18", "--image", 32, "--data", folder, "--batch", 16,
               "--steps", 1, "--workers", 0, "--out", tmp_path / "out", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert json.loads(done.stdout)["settings"]["label_smoothing"] == 0.1
    models.create("resnet18", num_classes=2, weights=tmp_path / "out" / "model.pt")
