"""Runs that are killed with SIGKILL and resumed, beside one that is not. It imports torch once, and forks for each.

    python -m tests.support.killed_runs FOLDER --kills 4 --seed 0 --processes 2

Prints a JSON object: what the weights and the history of each run that came to its end are, by digest.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from benchmarks import data as real
from fused_resnet.recipes import checkpoint, data
from fused_resnet.recipes.images import Images
from fused_resnet.recipes.processes import joined
from fused_resnet.recipes.settings import Settings
from fused_resnet.recipes.train import train

SETTINGS = Settings(epochs=3, batch=16, lr=0.05, warm_up=1, log_every=3, steps=20, dtype="bf16")


def small(with_norms: bool = True) -> nn.Module:
    """Norms, whose statistics are state, and dropout, which takes numbers from the global generator."""
    norm = nn.BatchNorm2d(8) if with_norms else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, bias=False), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Dropout(0.2 if with_norms else 0.0), nn.Linear(128, 10),
    )  # fmt: skip


def images() -> data.Data:
    pixels, labels = real.load_cifar10_sample()
    chosen = torch.arange(0, 500, 4)  # of all classes; seven batches, and some are left over
    return data.Data(
        data.InMemory(Images(pixels[chosen], labels[chosen]), 10, "cifar10"),
        data.InMemory(Images(pixels[1::25], labels[1::25]), 10, "cifar10"),
    )


def trained(folder: Path, settings: Settings = SETTINGS, with_norms: bool = True) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        train(lambda: small(with_norms), images(), settings, folder, processes=processes, resume=True,
              checkpoint_every=2)  # fmt: skip


def forked(count: int, work) -> list[int]:
    """Process ids of so many processes that work together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if count > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int]) -> bool:
    """Whether all came to their end; waits for it. AssertionError where one failed by itself."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    return set(codes) == {0}


def digests(folder: Path) -> list[str]:
    """SHA-256 of the weights to the last bit, and of the curves."""
    weights = torch.load(folder / "model.pt", weights_only=True)
    history = json.loads((folder / "history.json").read_text())
    kept = json.dumps({name: history[name] for name in ("points", "tests")})
    bits = b"".join(tensor.numpy().tobytes() for tensor in weights.values())
    return [hashlib.sha256(content).hexdigest() for content in (bits, kept.encode())]


def killed_at_random(folder: Path, kills: int, seed: int, processes: int, duration_s: float) -> dict:
    """Runs until so many kills have struck, at moments drawn from the time that an undisturbed run takes."""
    draw = random.Random(seed)
    found, struck, resumed, number = [], 0, 0, 0
    while struck < kills or not found:
        own = folder / f"run{number}"
        while True:
            resumed += (own / checkpoint.NAME).exists()
            children = forked(processes, lambda own=own: trained(own))
            if struck < kills:
                time.sleep(draw.uniform(0, duration_s))
                for child in children:
                    os.kill(child, signal.SIGKILL)
            if ended(children):
                break
            struck += 1
        found.append(digests(own))
        number += 1
    return {"runs": found, "kills": struck, "resumed": resumed}


def killed_while_saving(folder: Path) -> dict:
    """A process that kills itself before its second checkpoint is on the disk, then before its third has its name.

    A checkpoint takes two calls of fsync, of the file and of the folder.
    """
    found, left = [], []
    for moment in ("fsync", "replace"):
        own = folder / moment

        def work(moment=moment, own=own):
            right, calls = getattr(os, moment), []

            def strike(*arguments):
                calls.append(arguments)
                if len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return right(*arguments)

            setattr(os, moment, strike)
            trained(own)

        assert not ended(forked(1, work)), "it was not killed"
        left.append([len(list(own.glob("*.part"))), checkpoint.load(own)["step"]])
        assert ended(forked(1, lambda own=own: trained(own)))
        assert not list(own.glob("*.part"))
        found.append(digests(own))
    return {"runs": found, "left": left}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    trained(given.folder / "first", SETTINGS._replace(steps=1))  # what torch imports late, the children have
    start = time.monotonic()
    assert ended(forked(given.processes, lambda: trained(given.folder / "undisturbed")))
    duration_s = time.monotonic() - start
    result = {"undisturbed": digests(given.folder / "undisturbed")}
    result["random"] = killed_at_random(given.folder, given.kills, given.seed, given.processes, duration_s)
    if given.processes == 1:
        result["saving"] = killed_while_saving(given.folder)
    else:
        exact = SETTINGS._replace(dtype="fp32", augment=True)
        for count in (1, given.processes):
            own = given.folder / f"without_norms{count}"
            assert ended(forked(count, lambda own=own: trained(own, exact, with_norms=False)))
        one, many = (torch.load(given.folder / f"without_norms{count}" / "model.pt") for count in (1, given.processes))
        torch.manual_seed(exact.seed)
        begin = small(with_norms=False).state_dict()
        result["apart"] = max((one[name] - many[name]).abs().max().item() for name in one)
        result["learnt"] = max((one[name] - begin[name]).abs().max().item() for name in one)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
