"""`fused-resnet eval`: what it counts, and its exit code."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fused_resnet.cli.main import cli
from fused_resnet.models import cifar
from fused_resnet.recipes import images
from tests.support import networks
from tests.support.quantized import by_reference


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.pt"
    torch.save(networks.randomize(cifar.resnet20()).state_dict(), path)
    return path


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, images=rng.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8), labels=rng.integers(0, 10, 24))
    return path


def run(weights, path, *arguments):
    arguments = ("eval", "--model", "resnet20", "--weights", weights, "--images", path, "--device", "cpu", *arguments)
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_fp32_agrees(weights, npz):
    done = run(weights, npz, "--json", "--batch", 10, "--max-drop", 0)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["images"], record["changed"], record["passed"]) == (24, 0, True)
    assert record["drop"] == 0 and record["sqnr_db"] > 80


def test_int8_leaves_out_what_it_calibrates_with(weights, npz, monkeypatch):
    by_reference(monkeypatch)
    done = run(weights, npz, "--dtype", "int8", "--calibrate", 8, "--keep", "conv1", "--batch", 16)
    assert done.exit_code == 0, done.output
    assert "resnet20, fp32 and frozen in int8: 16 images, top-1 " in done.stdout
    done = run(weights, npz, "--dtype", "int8", "--calibrate", 24)
    assert done.exit_code == 2 and "leaves none of 24 images" in done.output


def test_a_drop_is_an_exit_code(weights, npz):
    done = run(weights, npz, "--max-drop", -1)
    assert done.exit_code == 1 and "eval: top-1 drops by 0.00 points, more than -1." in done.output


def test_folders_of_images(tmp_path):
    for name, colour in (("cat", (250, 0, 0)), ("ant", (0, 250, 0))):
        (tmp_path / name).mkdir()
        image = Image.new("RGB", (50, 80), (9, 9, 9))
        image.paste(colour, (10, 20, 40, 60))  # the middle
        image.save(tmp_path / name / "1.png")
    found = images.load(tmp_path, 16)
    assert found.pixels.shape == (2, 3, 16, 16) and found.labels.tolist() == [0, 1]
    assert found.pixels[:, :, 8, 8].tolist() == [[0, 250, 0], [250, 0, 0]]
    flat = images.load(tmp_path / "ant", 16)
    assert flat.labels is None and torch.equal(flat.pixels[0], found.pixels[0])
    x, labels = found.batch(torch.tensor([1]), "half")
    assert x[0, :, 8, 8].tolist() == pytest.approx([(250 / 255 - 0.5) / 0.5, -1, -1]) and labels.tolist() == [1]


def test_refusals(weights, npz, tmp_path):
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 3, 4, 4)))
    np.savez(tmp_path / "short.npz", images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.zeros(1, int))
    np.savez(tmp_path / "none.npz", images=np.zeros((2, 3, 32, 32), np.uint8))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, error, match in (
        ("absent.npz", FileNotFoundError, "there is no file or folder"),
        ("floats.npz", ValueError, r"got `images` \(2, 3, 4, 4\) in float64"),
        ("short.npz", ValueError, "must have 2 integer `labels`"),
        ("text.npz", ValueError, "is no .npz file"),
        ("empty", ValueError, "holds no images"),
    ):
        with pytest.raises(error, match=match):
            images.load(tmp_path / name, 32)
    done = run(weights, tmp_path / "none.npz", "--max-drop", 1)
    assert done.exit_code == 2 and "--max-drop needs labels" in done.output
    done = run(weights, npz, "--keep", "conv1", "--calibrate", 16, "--dtype", "bf16")
    assert done.exit_code == 2 and "--keep and --calibrate: for --dtype int8 alone, got --dtype bf16." in done.output
    done = run(weights, npz, "--calibrate", 4)
    assert done.exit_code == 2 and "Error: --calibrate: for --dtype int8 alone, got --dtype fp32" in done.output
    done = run(weights, npz, "--dtype", "int4")
    assert done.exit_code == 2 and "known ones are fp32, fp16, bf16, int8" in done.output
