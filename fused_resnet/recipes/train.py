"""The loop: from a seed and images to weights, the same to the last bit however often it was killed and resumed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Callable, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.fusing import convert
from fused_resnet.machine import files
from fused_resnet.operators.problem import SHORT_DTYPES
from fused_resnet.recipes import checkpoint
from fused_resnet.recipes.data import Data, Source, Wanted, batch_seed, order_of
from fused_resnet.recipes.processes import Processes
from fused_resnet.recipes.settings import Settings

WEIGHTS = "model.pt"
HISTORY = "history.json"
_TEST_BATCH = 250
ALONE = Processes(0, 1, torch.device("cpu"))


class Log(Protocol):
    """What TensorBoard's SummaryWriter has."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...


def train(
    build: Callable[[], nn.Module],
    data: Data,
    settings: Settings,
    folder: Path,
    *,
    processes: Processes = ALONE,
    resume: bool = False,
    checkpoint_every: int = 200,
    progress: Progress = silent,
    log: Callable[[int], Optional[Log]] = lambda step: None,
) -> dict[str, Any]:
    """Train what `build` makes, and return the history: {"points", "tests", "seconds"}, in the order of steps.

    folder: holds the checkpoint, the weights for `load_weights` and the history. A checkpoint is written after every
    `checkpoint_every` steps and each epoch. With `resume` a run goes on from there, or begins where there is none.
    log: a writer of curves from this step on. Raises ValueError before any work is done for settings that do not fit
    and a folder with another run, OSError for one in use. Later it raises ValueError where the loss is not finite.
    """
    settings.checked(len(data.train), processes.device)
    processes.share_of(settings.batch)
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder / checkpoint.NAME, timeout_s=0):
            checkpoint.remove_unfinished(folder)
            return _train(build, data, settings, folder, processes, resume, checkpoint_every, progress, log)
    return _train(build, data, settings, folder, processes, resume, checkpoint_every, progress, log)


def _train(
    build: Callable[[], nn.Module], data: Data, settings: Settings, folder: Path, processes: Processes, resume: bool,
    checkpoint_every: int, progress: Progress, log: Callable[[int], Optional[Log]],
) -> dict[str, Any]:  # fmt: skip
    processes.gathered(None)  # nobody looks for a checkpoint before what is unfinished is gone
    is_there = (folder / checkpoint.NAME).exists()
    if is_there and not resume:
        raise ValueError(f"train: {folder} holds a run already. Resume it, or give another folder.")
    state = checkpoint.load(folder) if is_there else None
    if state is not None:
        _check_same(folder, state, settings, data, processes)
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    run = Run(build(), data, settings, processes)
    if state is not None:
        run.restore(state, folder)
    run.go(folder, checkpoint_every, progress, log(run.step) if processes.is_first else None)
    return run.history


def _check_same(folder: Path, state: dict[str, Any], settings: Settings, data: Data, processes: Processes) -> None:
    """ValueError where a checkpoint is another run's."""
    wanted, found = settings.as_json(), state["settings"]
    odd = [f"{name} {found.get(name)}, not {wanted[name]}" for name in wanted if wanted[name] != found.get(name)]
    if state["data"] != data.key:
        odd.append("other images")
    if state["processes"] != processes.count:
        odd.append(f"{state['processes']} processes, not {processes.count}")
    if odd:
        raise ValueError(f"train: {folder} holds a run with {'; '.join(odd)}. Give what it had, or another folder.")


class Run:
    """A model, its optimiser, and how far they are.

    What changes in a step is in `state`, and nothing else is needed to go on.
    """

    def __init__(self, model: nn.Module, data: Data, settings: Settings, processes: Processes) -> None:
        self.settings, self.data, self.processes = settings, data, processes
        device, self._name = processes.device, type(model).__name__  # fuse makes it another one
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.model = convert.fuse(model) if settings.fused else model
        self._layout = layout
        self._wrapped = processes.wrapped(self.model)
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        )  # fmt: skip
        count = len(data.train)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: settings.lr_factor(step, count)
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self._dtype = SHORT_DTYPES[settings.dtype]
        self.per_epoch, self.total = settings.steps_per_epoch(count), settings.total_steps(count)
        self.step = 0
        self.order: Optional[Tensor] = None
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, errors, images since the last point
        self._since: Optional[tuple[float, int]] = None  # when the first step or the last point was done, and which
        self._clock = time.monotonic()
        self.history: dict[str, Any] = {"points": [], "tests": [], "seconds": 0.0}

    # -------------------------------------------------------------------------------------------------- going on

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on. Every process must call it."""
        return {
            "settings": self.settings.as_json(),
            "data": self.data.key,
            "processes": self.processes.count,
            "step": self.step,
            "order": self.order,
            "sums": self.processes.summed(self._sums.clone()).cpu(),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": self.processes.gathered(checkpoint.random_state()),
        }

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """ValueError for the checkpoint of another architecture; nothing has changed by then."""
        own, found = self.model.state_dict(), state["model"]
        odd = sorted(own.keys() ^ found.keys())
        odd += [name for name in own if name in found and own[name].shape != found[name].shape]
        if odd:
            raise ValueError(
                f"train: {folder / checkpoint.NAME} is of another architecture than {self._name}: "
                f"{len(odd)} tensors differ, {odd[0]} first. Give the model that it was of, or another folder."
            )
        self.model.load_state_dict(found)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.step, self.order, self.history = state["step"], state["order"], state["history"]
        self._sums.copy_(state["sums"] if self.processes.is_first else torch.zeros_like(state["sums"]))
        checkpoint.set_random_state(state["random"][self.processes.rank])

    def go(self, folder: Path, checkpoint_every: int, progress: Progress, log: Optional[Log]) -> None:
        """To the end. What belongs to a step is done before the checkpoint of that step."""
        while self.step < self.total:
            for x, labels in self.data.train.batches(self._rest_of_epoch()):
                self._one_step(x, labels)
                is_last = self.step == self.total
                is_end = is_last or self.step % self.per_epoch == 0
                if is_last or self.step % self.settings.log_every == 0:
                    self._add_point(progress, log)
                if is_end:
                    self._add_test(log)
                if is_end or self.step % checkpoint_every == 0:
                    self._save(folder)
                    if log is not None:
                        log.flush()
        if self.processes.is_first:
            with files.replacing(folder / WEIGHTS) as file:
                torch.save(self.model.state_dict(), file)
            files.write_json(folder / HISTORY, {"settings": self.settings.as_json(), **self.history})

    def _save(self, folder: Path) -> None:
        now = time.monotonic()
        self.history["seconds"] += now - self._clock
        self._clock = now
        state = self.state()
        if self.processes.is_first:
            checkpoint.save(folder, state)

    # -------------------------------------------------------------------------------------------------- one step

    def _rest_of_epoch(self) -> list[Wanted]:
        """The batches from this step to the end of its epoch."""
        epoch, begin = divmod(self.step, self.per_epoch)
        if begin == 0 or self.order is None:
            self.order = order_of(len(self.data.train), self.settings.seed, epoch)
        batch, share = self.settings.batch, self.processes.share_of(self.settings.batch)
        wanted = []
        for index in range(begin, min(self.per_epoch, begin + self.total - self.step)):
            seed = batch_seed(self.settings.seed, epoch * self.per_epoch + index) if self.settings.augment else None
            wanted.append(Wanted(self.order[index * batch : (index + 1) * batch], seed, share))
        return wanted

    def _moved(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        x = x.to(device, memory_format=self._layout, non_blocking=True)
        return x, labels.to(device, non_blocking=True)

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(self.processes.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return model(x).float()

    def _one_step(self, x: Tensor, labels: Tensor) -> None:
        self._wrapped.train()
        x, labels = self._moved(x, labels)
        logits = self._logits(self._wrapped, x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self.step += 1
        wrong = (logits.detach().argmax(1) != labels).sum()
        self._sums += torch.stack([loss.detach() * len(x), wrong, wrong.new_tensor(len(x))]).double()

    # ---------------------------------------------------------------------------------------------------- curves

    def _add_point(self, progress: Progress, log: Optional[Log]) -> None:
        loss, wrong, count = self.processes.summed(self._sums).tolist()
        self._sums.zero_()
        if not loss == loss or abs(loss) == float("inf"):
            raise ValueError(f"train: the loss is {loss / count} at step {self.step}. Take a smaller lr than "
                             f"{self.settings.lr}, or a longer warm_up.")  # fmt: skip
        now, since = time.monotonic(), self._since
        rate = 0.0 if since is None else (self.step - since[1]) * self.settings.batch / (now - since[0])
        self._since = now, self.step
        point = {"step": self.step, "loss": loss / count, "error": wrong / count,
                 "lr": self._optimizer.param_groups[0]["lr"]}  # fmt: skip
        if self.settings.gradients:
            point["gradients"] = self._gradient_norms()
        self.history["points"].append(point)
        text = (
            f"epoch {(self.step - 1) // self.per_epoch + 1}, step {self.step} of {self.total}, loss {loss / count:.3f}"
        )
        text += f", error {100 * wrong / count:.1f} %" + (f", {rate:.0f} images/s" if rate else "")
        progress(self.step / self.total, text)
        if log is not None:
            for name in ("loss", "error", "lr"):
                log.add_scalar(f"train/{name}", point[name], self.step)
            if rate:
                log.add_scalar("train/images_per_s", rate, self.step)

    def _gradient_norms(self) -> list[float]:
        """The norm of the last step's gradient of each convolution's weights, in the order of the model."""
        convolutions = [module for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        norms = [conv.weight.grad.norm() for conv in convolutions if conv.weight.grad is not None]
        return torch.stack(norms).tolist()

    def _add_test(self, log: Optional[Log]) -> None:
        if self.data.test is None:
            return
        self.processes.take_buffers_of_first(self.model)
        loss, error = self.tested(self.data.test)
        self.history["tests"].append({"step": self.step, "loss": loss, "error": error})
        if log is not None:
            log.add_scalar("test/loss", loss, self.step)
            log.add_scalar("test/error", error, self.step)

    @torch.no_grad()
    def tested(self, source: Source) -> tuple[float, float]:
        """Loss and share of wrong answers over all images, which the processes share."""
        self.model.eval()
        rank, count = self.processes.rank, self.processes.count
        chosen = torch.arange(rank, len(source), count).split(_TEST_BATCH)
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        for x, labels in source.batches([Wanted(one, None, slice(None)) for one in chosen]):
            x, labels = self._moved(x, labels)
            logits = self._logits(self.model, x)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, (logits.argmax(1) != labels).sum()]).double()
        loss, wrong = self.processes.summed(sums).tolist()
        return loss / len(source), wrong / len(source)
