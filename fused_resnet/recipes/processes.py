"""The processes that train one model together, as torchrun starts them: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any, Iterator

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's number and device among `count`. One alone needs no torch.distributed."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_of(self, batch: int) -> slice:
        """This process's part of a batch, of the same size in each. ValueError where that is impossible."""
        if batch % self.count:
            raise ValueError(f"train: a batch of {batch} images cannot be shared evenly by {self.count} processes.")
        each = batch // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over all processes."""
        if self.count == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def summed(self, values: Tensor) -> Tensor:
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        found = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """As DistributedDataParallel does before each forward: the running statistics are those of rank 0."""
        if self.count > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, this one among them; else one alone. device: "cpu", "cuda" or "cuda:N".

    ValueError where there are more processes than GPUs on this machine.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield Processes(0, 1, torch.device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    own_device = torch.device(device)
    if own_device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"train: process {local} has no GPU of its own; there are {torch.cuda.device_count()}.")
        own_device = torch.device("cuda", local)
        torch.cuda.set_device(own_device)
    torch.distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    try:
        yield Processes(int(os.environ["RANK"]), count, own_device)
    finally:
        torch.distributed.destroy_process_group()
