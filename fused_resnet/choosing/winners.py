"""Which backend and config was the fastest for a convolution on this device: read from files, never measured here.

    fused_resnet/configs/<device>.json         what ships
    <cache folder>/tuning/<device>.json        what `fused-resnet tune` measured here; where it has an entry it is used

The cache folder is `files.cache_dir`'s. FUSED_RESNET_TUNED=0 ignores both files. An entry belongs to a problem without
its batch (`key`) and to the batch it was measured at. The entry nearest in log space answers for the batches between.
A kernel of ours counts as verified on this device where its entry says that it passed the reference there. Its sources
must still be what they were then. That decides what runs. `measuring.verified` says the same of whole kernel files, for
people: it decides nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from fused_resnet.backends import record
from fused_resnet.choosing.winners_file import Entry, Table, file_name, read
from fused_resnet.kernels import compiled
from fused_resnet.machine import devices, files
from fused_resnet.operators.problem import SHORT_DTYPES

SHIPPED = Path(__file__).parents[1] / "configs"

log = logging.getLogger("fused_resnet")


class Winner(NamedTuple):
    """What a file names: a backend, and its config as a dict (None where it has none). `choice.Selection` runs it.

    source: where the choice comes from, as part of a sentence. time_us: what was measured for it.
    """

    backend: str
    config: Optional[dict]
    source: str
    time_us: float


def key(problem) -> str:
    """The problem without its batch, as people read it; on a CPU with the number of threads, which decides as much."""
    text = str(problem).partition("x")[2]
    return f"{text}, {torch.get_num_threads()} threads" if problem.device == "cpu" else text


def device_id(device: str) -> Optional[str]:
    """The name under which measurements of a kind of device ("cpu", "cuda") are kept.

    A CPU's includes its instruction sets: virtual machines give different processors one name. None where GPUs of
    different kinds are visible, since a problem does not say which of them it is on.
    """
    if device == "cpu":
        return " ".join((devices.cpu_name(), *devices.cpu_flags()))
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return names.pop() if len(names) == 1 else None


def user_folder() -> Path:
    return files.cache_dir() / "tuning"


def lookup(problem, backend: Optional[str] = None, in_nhwc: bool = False) -> Optional[Winner]:
    """What was measured fastest for this problem or its nearest batch; with `backend`, that backend's best config.

    in_nhwc: of those that read x in NHWC, if the entry tells them apart (`Entry`). None without a measurement, for
    another operator than conv_bn_act, and for a kernel of ours whose sources have changed since. Never raises because
    of a file.
    """
    if problem.op != "conv_bn_act" or problem.device not in ("cpu", "cuda") or _is_ignored.get():
        return None
    return _lookup(problem, backend, in_nhwc, torch.get_num_threads() if problem.device == "cpu" else 0)


@functools.lru_cache(maxsize=8192)
def _lookup(problem, backend: Optional[str], in_nhwc: bool, threads: int) -> Optional[Winner]:
    entries = _entries(problem.device).get(key(problem), {})
    if not entries:
        return None
    batch = min(entries, key=lambda found: (abs(math.log2(found / max(problem.N, 1))), -found))
    entry, place, kernels = entries[batch]
    entry = entry.in_nhwc or entry if in_nhwc else entry
    name = backend or entry.winner
    if name not in entry.candidates or not _is_unchanged(name, kernels, place):
        return None
    measured = entry.candidates[name]
    return Winner(name, measured.config, f"{place} batch {batch}", measured.time_us)


@functools.lru_cache(maxsize=None)
def _entries(device: str) -> dict[str, dict[int, tuple[Entry, str, dict]]]:
    """By problem key and batch: the entry, where it comes from, and the digests of the kernels measured."""
    name = None if os.environ.get("FUSED_RESNET_TUNED") == "0" else device_id(device)
    merged: dict[str, dict[int, tuple[Entry, str, dict]]] = {}
    if name is None:
        return merged
    for folder, place in ((SHIPPED, "configs/{}, tuned for"), (user_folder(), "tuned here, {},")):
        path = folder / file_name(name)
        table = read(path, name) or Table(name, {}, {})
        for problem_key, by_batch in table.entries.items():
            for batch, entry in by_batch.items():
                kernels = table.runs.get(entry.run, {}).get("kernels", {})
                merged.setdefault(problem_key, {})[batch] = (entry, place.format(path.name), kernels)
    return merged


def add(folder: Path, device: str, entries: dict[str, dict[int, Entry]], run: str, environment: dict) -> Path:
    """Merge entries of one run into the folder's file for a device, whole or not at all, beside other writers.

    A file that cannot be understood is replaced. Raises OSError where the folder cannot be written to.
    """
    path = Path(folder) / file_name(device)
    with files.locked(path):
        table = read(path, device) or Table(device, {}, {})
        table.runs[run] = environment
        for problem_key, by_batch in entries.items():
            table.entries.setdefault(problem_key, {}).update(by_batch)
        files.write_json(path, table.as_json())
    forget()
    return path


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within, no measurement is found: what is made there is what `auto` would make untuned."""
    token = _is_ignored.set(True)
    try:
        yield
    finally:
        _is_ignored.reset(token)


_is_ignored = contextvars.ContextVar("fused_resnet measurements are ignored", default=False)


def forget() -> None:
    """Read the files again at the next lookup."""
    _lookup.cache_clear()
    _entries.cache_clear()


def warn_untuned(problem) -> None:
    """Say once per process and kind of device that `auto` has no measurement to go by, and how to make one."""
    warned.add(problem.device)
    short = {dtype: short for short, dtype in SHORT_DTYPES.items()}.get(problem.dtype)
    name = device_id(problem.device)
    if os.environ.get("FUSED_RESNET_TUNED") == "0" or _is_ignored.get() or short is None:
        return
    if name is None:
        log.warning("GPUs of different kinds are visible, so measured configs are not used, and none can be added.")
        return
    log.warning(
        "nothing is tuned for %s on %s, so the fixed order of backends decides. To measure this convolution: "
        "fused-resnet tune --device %s --conv '%s'; all of a model's: "
        "fused-resnet tune --device %s --model resnet50 --batch %d --dtype %s (said once per process).",
        problem, name, problem.device, problem, problem.device, max(problem.N, 1), short,
    )  # fmt: skip


warned: set[str] = set()


def kernel_digests() -> dict[str, Optional[str]]:
    """By backend of ours, a digest of all it is compiled from: in C++ as its library was built. None if unknown."""
    made = {**record.known("add_relu"), **record.known("conv_bn_act")}
    return {name: compiled.built_digest(backend.sources) for name, backend in made.items() if backend.sources}


def _is_unchanged(backend: str, measured: dict, place: str) -> bool:
    made = record.known("conv_bn_act").get(backend)
    if made is None or not made.sources:
        return True
    current = compiled.built_digest(made.sources)
    if current is not None and measured.get(backend) == current:
        return True
    files.report_once(
        f"{place.rstrip(',')}: its measurements of {backend!r} are ignored, since that backend's kernels have changed. "
        f"Run fused-resnet tune again."
    )
    return False
