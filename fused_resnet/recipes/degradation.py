"""The experiment that ResNet was made for: deeper plain networks get worse, deeper residual ones do not.

He et al. 2015 (arXiv 1512.03385), section 4.2 and figure 6: both kinds, trained alike, differ in their shortcuts alone.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import torch

from fused_resnet import models
from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.machine import devices
from fused_resnet.measuring import Record
from fused_resnet.recipes import data
from fused_resnet.recipes.processes import Processes
from fused_resnet.recipes.settings import CIFAR, Settings
from fused_resnet.recipes.train import train

NETWORKS = ("plain20", "plain32", "plain44", "plain56", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
SHORT_NETWORKS = ("plain20", "plain56", "resnet56")
SHORT_SEEDS = (0, 1, 2)
SHORT_STEPS = 300
# the training error of a run is that of its last steps, on the images as they were trained on
_LAST_STEPS = 100


class Experiment(NamedTuple):
    """Which networks are trained on what, how, and from which seeds. tested: how many of the test images are.

    threads: of each run on a CPU.
    workers: runs at a time. Small maps keep two cores busier as two runs than as two threads of one.
    """

    networks: Sequence[str]
    seeds: Sequence[int]
    settings: Settings
    images: Path
    test_images: Optional[Path]
    device: str
    tested: Optional[int] = None
    workers: int = 1
    threads: Optional[int] = None

    def checked(self) -> "Experiment":
        """Itself. FileNotFoundError and ValueError before any work for images or settings that do not fit."""
        self.settings.checked(len(self.data().train), torch.device(self.device))
        for name in self.networks:
            models.input_shape(name)  # which knows no other names
        return self

    def data(self) -> data.Data:
        return data.cifar10(self.images, self.test_images, self.tested)


def full(epochs: float, seeds: Sequence[int], images: Path, test_images: Optional[Path], device: str) -> Experiment:
    """All networks by the paper's recipe, shortened to so many epochs."""
    dtype = "bf16" if device != "cpu" else short_dtype()
    settings = CIFAR._replace(epochs=epochs, warm_up=min(1.0, epochs / 10), dtype=dtype, log_every=100, gradients=True)
    return Experiment(NETWORKS, seeds, settings, images, test_images, device)


def short(images: Path, test_images: Optional[Path], device: str, steps: int = SHORT_STEPS) -> Experiment:
    """Three networks, three seeds, a few hundred steps of 64 images: minutes on two cores."""
    settings = Settings(
        epochs=3, batch=64, lr=0.05, warm_up=0.5, milestones=(), dtype=short_dtype(), steps=steps, log_every=20,
        gradients=True,
    )  # fmt: skip
    runs = len(SHORT_NETWORKS) * len(SHORT_SEEDS)
    workers = min(devices.core_count(), runs) if device == "cpu" else 1
    return Experiment(SHORT_NETWORKS, SHORT_SEEDS, settings, images, test_images, device, 1000, workers, threads=1)


def short_dtype() -> str:
    """bf16 where this processor multiplies it, else fp32."""
    return "bf16" if any(devices.has_cpu_flag(flag) for flag in ("amx_bf16", "avx512_bf16")) else "fp32"


def perform(experiment: Experiment, out: Path, command: str, progress: Progress = silent) -> Record:
    """Train all, and write `degradation.json` into `out`. Runs that `out` holds already go on or are taken as they are.

    Raises what `Experiment.checked` does.
    """
    experiment.checked()
    settings = {
        "command": command, "networks": list(experiment.networks), "seeds": list(experiment.seeds),
        "workers": experiment.workers, "threads_of_each": experiment.threads or torch.get_num_threads(),
        **experiment.settings.as_json(),
    }  # fmt: skip
    start = Record.here("degradation", experiment.device, settings)
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    for row in _rows(experiment, out, progress):
        rows.append(row)
        done, every = len(rows), len(experiment.networks) * len(experiment.seeds)
        progress(done / every, f"{done} of {every} runs: {row['network']}, seed {row['seed']}, training error "
                               f"{100 * row['train_error']:.1f} %, {time.monotonic() - begin:.0f} s")  # fmt: skip
    order = {name: place for place, name in enumerate(experiment.networks)}
    rows.sort(key=lambda row: (row["seed"], order[row["network"]]))
    record = start._replace(rows=rows, summary=verdict(rows), more={"wall_s": round(time.monotonic() - begin, 1)})
    record.write(out / "degradation.json")
    return record


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each seed the training errors of plain-20, plain-56 and ResNet-56, and whether they show the degradation.

    They do where plain-56 errs more than plain-20, and ResNet-56 less than plain-56. is_decisive: in every seed.
    """
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        errors = {row["network"]: row["train_error"] for row in rows if row["seed"] == seed}
        if set(SHORT_NETWORKS) <= set(errors):
            plain20, plain56, resnet56 = (errors[name] for name in SHORT_NETWORKS)
            found[str(seed)] = {"plain20": plain20, "plain56": plain56, "resnet56": resnet56,
                                "degrades": plain56 > plain20, "shortcuts_help": resnet56 < plain56}  # fmt: skip
    decisive = bool(found) and all(one["degrades"] and one["shortcuts_help"] for one in found.values())
    return {"is_decisive": decisive, "seeds": found}


def _rows(experiment: Experiment, out: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    """Those of one seed first, in the order in which they are done."""
    runs = [(name, seed) for seed in experiment.seeds for name in experiment.networks]
    if experiment.workers == 1:
        for number, (name, seed) in enumerate(runs):
            yield _row(experiment, out, name, seed, _part_of(progress, number, len(runs), f"{name}, seed {seed}"))
        return
    context = multiprocessing.get_context("spawn")  # a forked child has no threads of OpenMP
    with concurrent.futures.ProcessPoolExecutor(experiment.workers, context) as pool:
        waiting = [pool.submit(_row, experiment, out, name, seed, _end_with_parent) for name, seed in runs]
        try:
            for done in concurrent.futures.as_completed(waiting):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent(fraction: float, text: str) -> None:
    """A worker's progress is nobody's, once the process that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def _part_of(progress: Progress, number: int, count: int, name: str) -> Progress:
    return lambda fraction, text: progress((number + fraction) / count, f"{name}: {text}")


def _row(experiment: Experiment, out: Path, name: str, seed: int, progress: Progress = silent) -> dict[str, Any]:
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    settings = experiment.settings._replace(seed=seed)
    history = train(
        functools.partial(models.create, name),
        experiment.data(),
        settings,
        out / "runs" / f"{name}_seed{seed}",
        processes=Processes(0, 1, torch.device(experiment.device)),
        resume=True,
        progress=progress,
    )
    points, tests = history["points"], history["tests"]
    last = [point["error"] for point in points[-max(1, _LAST_STEPS // settings.log_every) :]]
    return {
        "network": name, "depth": depth_of(name), "has_shortcuts": name.startswith("resnet"), "seed": seed,
        "train_error": sum(last) / len(last), "test_error": tests[-1]["error"] if tests else None,
        "seconds": round(history["seconds"], 1), "points": points, "tests": tests,
    }  # fmt: skip


def depth_of(name: str) -> int:
    return int("".join(filter(str.isdigit, name)))
