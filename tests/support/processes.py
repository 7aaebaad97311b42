"""Processes that run one function together, connected by gloo."""

from __future__ import annotations

import copy
import datetime
import os
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

_LIMIT_S = 90


class Processes:
    """`count` processes, started once. A context; they end with it."""

    def __init__(self, count: int = 2) -> None:
        self._count = count

    def __enter__(self) -> Processes:
        if not dist.is_available() or not dist.is_gloo_available():
            pytest.skip("this torch has no gloo")
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(self._count)]
        meeting = f"file://{Path(self._folder.name) / 'rendezvous'}"
        self._ends = [end for end, _ in pipes]
        self._all = [
            context.Process(target=_serve, args=(rank, self._count, meeting, other), daemon=True)
            for rank, (_, other) in enumerate(pipes)
        ]
        for process in self._all:
            process.start()
        return self

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(rank, *args) returned in each process. function: of a module, by which it is found there.

        Where one fails, all are started anew: the others may wait for it.
        """
        for end in self._ends:
            end.send((function, args))
        answers: dict[int, Any] = {}
        while len(answers) < self._count:
            waiting = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(waiting, _LIMIT_S)
            found = {self._ends.index(end): end.recv() for end in ready}
            answers.update({rank: answer for rank, (_, answer) in found.items()})
            failed = [answer for is_right, answer in found.values() if not is_right]
            if failed or not ready:
                self.__exit__()
                self.__enter__()
                pytest.fail("\n".join(failed) or f"no answer in {_LIMIT_S} s but of {sorted(answers)}")
        return [answers[rank] for rank in range(self._count)]

    def __exit__(self, *error: Any) -> None:
        for process in self._all:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, count: int, meeting: str, end: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=_LIMIT_S)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=limit)
    while True:
        function, args = end.recv()
        try:
            end.send((True, function(rank, *copy.deepcopy(args))))  # tensors come in memory that all share
        except BaseException:
            end.send((False, f"in process {rank}:\n{traceback.format_exc()}"))
