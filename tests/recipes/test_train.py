"""Training: the same weights however often a run was killed, and refusals before any work."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from fused_resnet import models
from fused_resnet.machine import files
from fused_resnet.measuring import saved_bytes
from fused_resnet.models import cifar
from fused_resnet.recipes import checkpoint, logs
from fused_resnet.recipes.processes import Processes
from fused_resnet.recipes.settings import CIFAR, IMAGENET, Settings
from fused_resnet.recipes.train import Run, train
from tests.support.killed_runs import SETTINGS, images, small
from tests.support.scripts import script

CPU = torch.device("cpu")


def killed(tmp_path, *arguments):
    done = script("-m", "tests.support.killed_runs", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(result, kills):
    struck = result["random"]
    assert struck["kills"] == kills and struck["resumed"] >= 1
    for run in (*struck["runs"], *result.get("saving", {"runs": []})["runs"]):
        assert run == result["undisturbed"], "weights and curves are the undisturbed run's, to the last bit"


def test_killed_runs_go_on_with_nothing_lost(tmp_path):
    """At random moments, and in the middle of writing a checkpoint: the one before it is whole then."""
    result = killed(tmp_path, "--kills", 3)
    check(result, 3)
    assert result["saving"]["left"] == [[1, 2], [1, 4]], "unfinished files, and the step of the one before"


def test_two_processes_are_killed_and_equal_one(tmp_path):
    """Without norms, whose statistics are each process's own, two processes are one with the whole batch."""
    result = killed(tmp_path, "--kills", 2, "--processes", 2, "--seed", 3)
    check(result, 2)
    assert result["apart"] < 1e-5 < 1e-2 < result["learnt"]


@pytest.mark.full
@pytest.mark.parametrize("processes", (1, 2))
def test_ten_kills(tmp_path, processes):
    check(killed(tmp_path, "--kills", 10, "--processes", processes, "--seed", 11), 10)


@pytest.mark.full
def test_torchrun(tmp_path):
    """The example as a user types it, in two processes of gloo."""
    done = script(
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29533, "examples/train.py",
        "--data", "benchmarks/data/cifar10/cifar10_sample.npz", "--steps", 3, "--batch", 32, "--out", tmp_path / "out",
        "--device", "cpu", "--json", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["points"][-1]["step"] == 3
    models.create("resnet20", weights=tmp_path / "out" / "model.pt")


def trained(folder, settings=SETTINGS, build=small, **options):
    return train(build, images(), settings, folder, **options)


def test_what_a_run_leaves(tmp_path):
    texts = []
    history = trained(tmp_path / "new" / "run", progress=lambda fraction, text: texts.append((fraction, text)))
    assert [point["step"] for point in history["points"]] == [3, 6, 9, 12, 15, 18, 20]
    assert [test["step"] for test in history["tests"]] == [7, 14, 20]
    assert history["points"][-1]["loss"] < history["points"][0]["loss"]
    assert texts[-1][0] == 1 and "epoch 3, step 20 of 20, loss" in texts[-1][1] and "images/s" in texts[-1][1]
    written = json.loads((tmp_path / "new" / "run" / "history.json").read_text())
    assert written["points"] == history["points"] and written["settings"]["batch"] == 16
    models.load_weights(small(), tmp_path / "new" / "run" / "model.pt")
    again = trained(tmp_path / "new" / "run", resume=True)
    assert again == history, "what is complete is not trained again"


def test_fused_and_plain_train_the_same_network(tmp_path):
    """Three steps: later ones amplify roundings."""
    settings = SETTINGS._replace(dtype="fp32", steps=3, lr=0.01, gradients=True)
    runs = {}
    for fused in (True, False):
        folder = tmp_path / str(fused)
        runs[fused] = trained(folder, settings._replace(fused=fused), lambda: cifar.CifarResNet(1))
    fused, plain = (runs[one]["points"][-1] for one in (True, False))
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert len(plain["gradients"]) == 7 and min(plain["gradients"]) > 0
    assert fused["gradients"] == pytest.approx(plain["gradients"], rel=1e-2)
    weights = [torch.load(tmp_path / str(one) / "model.pt", weights_only=True) for one in (True, False)]
    assert weights[0].keys() == weights[1].keys() == cifar.CifarResNet(1).state_dict().keys()


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_folder_with_another_run(tmp_path):
    trained(tmp_path, SETTINGS._replace(steps=2))
    kept = (tmp_path / checkpoint.NAME).read_bytes()
    with pytest.raises(ValueError, match="holds a run already. Resume it, or give another folder"):
        trained(tmp_path, SETTINGS._replace(steps=2))
    with pytest.raises(ValueError, match=r"with lr 0.05, not 0.1; steps 2, not 20\. Give what it had"):
        trained(tmp_path, SETTINGS._replace(lr=0.1), resume=True)
    with pytest.raises(ValueError, match="other images"):
        found = images()
        train(small, found._replace(test=found.train), SETTINGS._replace(steps=2), tmp_path, resume=True)
    with pytest.raises(ValueError, match="of another architecture than CifarResNet: .* tensors differ"):
        trained(tmp_path, SETTINGS._replace(steps=2), lambda: cifar.CifarResNet(1), resume=True)
    assert (tmp_path / checkpoint.NAME).read_bytes() == kept
    for damaged in (kept[: len(kept) // 2], kept[:10], b"", b"no checkpoint"):
        (tmp_path / checkpoint.NAME).write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint.pt is not a readable checkpoint .* It may be cut off"):
            trained(tmp_path, SETTINGS._replace(steps=2), resume=True)
    torch.save(small().state_dict(), tmp_path / checkpoint.NAME)
    with pytest.raises(ValueError, match="is no checkpoint of a run of this version"):
        trained(tmp_path, SETTINGS._replace(steps=2), resume=True)


def test_a_folder_in_use(tmp_path):
    with files.locked(tmp_path / checkpoint.NAME), pytest.raises(OSError):
        trained(tmp_path)


@pytest.mark.parametrize(
    "settings, match",
    (
        (SETTINGS._replace(batch=126), "a batch of 126 is more than all 125 images"),
        (SETTINGS._replace(dtype="fp16"), "fp16 is trained on CUDA alone"),
        (SETTINGS._replace(dtype="int8"), "dtype must be one of"),
        (SETTINGS._replace(schedule="line"), "schedule must be one of steps, cosine, got 'line'"),
        (SETTINGS._replace(lr=-1.0), "lr must be positive, got -1.0"),
        (SETTINGS._replace(lr=math.nan), "lr must be positive, got nan"),
        (SETTINGS._replace(epochs=0), "epochs must be positive, got 0"),
    ),
)
def test_settings_that_do_not_fit(settings, match, tmp_path):
    def build():
        raise AssertionError("work was done")

    with pytest.raises(ValueError, match=match):
        trained(tmp_path / "run", settings, build)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared(tmp_path):
    with pytest.raises(ValueError, match="a batch of 16 images cannot be shared evenly by 3 processes"):
        trained(tmp_path, processes=Processes(1, 3, CPU))


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+\. Take a smaller lr than 1e\+18"):
        trained(tmp_path, SETTINGS._replace(lr=1e18, dtype="fp32", warm_up=0.0))


# -------------------------------------------------------------------------------------------------------- schedules


def test_the_papers_rates():
    """A tenth of the rate after half and three quarters of 64,000 steps."""
    assert CIFAR.total_steps(50_000) == 164 * 390
    factors = [CIFAR.lr_factor(step, 50_000) for step in (0, 195, 390, 31_979, 31_980, 47_970)]
    assert factors == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.01])
    assert IMAGENET.lr_factor(30 * 10 - 1, 2560) == 1 and IMAGENET.lr_factor(30 * 10, 2560) == pytest.approx(0.1)
    cosine = Settings(epochs=10, batch=10, lr=1, schedule="cosine")
    assert [cosine.lr_factor(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert CIFAR._replace(steps=7).total_steps(50_000) == 7


def test_the_optimizer_takes_the_schedules_rates(tmp_path):
    history = trained(tmp_path, SETTINGS._replace(log_every=1, steps=8))
    expected = [0.05 * SETTINGS.lr_factor(step, 125) for step in range(1, 9)]  # the next step's
    assert [point["lr"] for point in history["points"]] == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------------- logs


class Written:
    def __init__(self):
        self.scalars, self.flushed = [], 0

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, step))

    def flush(self):
        self.flushed += 1


def test_what_is_logged(tmp_path):
    log, begun = Written(), []
    trained(tmp_path, log=lambda step: begun.append(step) or log)
    assert begun == [0] and log.flushed >= 3
    assert {tag for tag, _ in log.scalars} == {
        "train/loss", "train/error", "train/lr", "train/images_per_s", "test/loss", "test/error",
    }  # fmt: skip
    assert ("test/error", 20) in log.scalars and ("train/loss", 3) in log.scalars


def test_tensorboard_is_said_once_to_be_missing(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    files.report_once.cache_clear()
    assert [logs.tensorboard(tmp_path)(0) for _ in range(2)] == [None, None]
    assert caplog.text.count("pip install tensorboard") == 1


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_files(tmp_path):
    trained(tmp_path / "run", SETTINGS._replace(steps=3), log=logs.tensorboard(tmp_path / "logs"))
    assert [file for file in (tmp_path / "logs").iterdir() if file.stat().st_size > 100]


# ------------------------------------------------------------------------------------------------------------ memory


def test_a_step_of_resnet1202_fits_into_24_gb():
    """The paper's batch of 128 in bf16: what a forward of two images keeps, 64 times, and weights, gradients, momentum.

    Its 600 blocks are 200 times three: two networks with few blocks give what each block keeps.
    """

    def run(n):
        model = cifar.CifarResNet(n)
        found = Run(model, images(), Settings(epochs=1, batch=2, lr=0.1, dtype="bf16"), Processes(0, 1, CPU))
        x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        return saved_bytes(model, lambda: found._logits(model.train(), x).sum()).activations

    few, more = run(2), run(3)
    kept = 64 * (few + 198 * (more - few))
    parameters = 12 * sum(parameter.numel() for parameter in nn.ParameterList(cifar.resnet1202().parameters()))
    assert 2e9 < kept + parameters < 24e9, (kept, parameters)
