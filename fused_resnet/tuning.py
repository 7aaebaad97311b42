"""Which backend and config was the fastest for a convolution on this device: read from files, never measured here.

    fused_resnet/configs/<device>.json         what ships
    <cache folder>/tuning/<device>.json        what `fused-resnet tune` measured here; where it has an entry it is used

The cache folder is `files.cache_dir`'s. FUSED_RESNET_TUNED=0 ignores both files. An entry belongs to a problem without
its batch (`key`) and to the batch it was measured at. The entry nearest in log space answers for the batches between.
A kernel of ours counts as verified on this device where its entry says that it passed the reference there. Its sources
must still be what they were then.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from fused_resnet import devices, extension, files, provenance
from fused_resnet.problem import ACTIVATIONS, FLOAT_DTYPES, ConvProblem

SCHEMA = 1
SHIPPED = Path(__file__).parent / "configs"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

log = logging.getLogger("fused_resnet")


class Choice(NamedTuple):
    """A backend, and its config as a dict (None where it has none).

    source: where the choice comes from, as part of a sentence. time_us: what was measured for it.
    """

    backend: str
    config: Optional[dict]
    source: str
    time_us: float


class Measured(NamedTuple):
    """One candidate of an entry. error_ratio: its worst error as a fraction of what the reference allows."""

    config: Optional[dict]
    time_us: float
    error_ratio: float


class Entry(NamedTuple):
    """The best of each backend for one problem at one batch, the backend that `auto` takes, and who measured it.

    default: the backend `auto` takes without tuning. run: key of the file's "runs", which hold the environments.
    in_nhwc: the same among the candidates that read x in NHWC, for where it cannot lie in row space. None where no
    candidate reads row space, and in entries that older versions wrote.
    """

    winner: str
    default: str
    run: str
    candidates: dict[str, Measured]
    in_nhwc: Optional["Entry"] = None

    @classmethod
    def from_json(cls, record: dict) -> "Entry":
        """What `files.read_json` takes for a bad file is raised for anything that `as_json` would not have written."""
        candidates = {}
        for name, one in record["candidates"].items():
            config, measured = one["config"], Measured(one["config"], float(one["time_us"]), float(one["error_ratio"]))
            is_plain = config is None or all(isinstance(value, (int, str)) for value in config.values())
            if not (is_plain and 0 < measured.time_us < math.inf and 0 <= measured.error_ratio <= 1):
                raise ValueError(f"its candidate {name} is {one}")
            candidates[name] = measured
        if record["winner"] not in candidates:
            raise ValueError(f"the winner {record['winner']!r} was not measured")
        in_nhwc = record.get("in_nhwc")
        nested = None if in_nhwc is None else cls.from_json(in_nhwc)
        return cls(record["winner"], str(record["default"]), str(record["run"]), candidates, nested)

    def as_json(self) -> dict:
        record = dict(self._asdict(), candidates={name: one._asdict() for name, one in self.candidates.items()})
        del record["in_nhwc"]
        return record if self.in_nhwc is None else {**record, "in_nhwc": self.in_nhwc.as_json()}


class Table(NamedTuple):
    """One file: entries by problem key and batch, and by run the environment and the kernels' digests."""

    device: str
    entries: dict[str, dict[int, Entry]]
    runs: dict[str, dict]

    @classmethod
    def from_json(cls, record: dict) -> "Table":
        if record["schema"] != SCHEMA:
            raise ValueError(f"its schema is {record['schema']!r}, this version reads {SCHEMA}")
        entries = {
            key: {int(batch): Entry.from_json(entry) for batch, entry in by_batch.items()}
            for key, by_batch in record["entries"].items()
        }
        if any(not 1 <= batch < 2**63 for by_batch in entries.values() for batch in by_batch):
            raise ValueError("a batch below 1 or beyond what a tensor has")
        runs = {run: dict(found) for run, found in record["runs"].items()}
        if not all(isinstance(found.get("kernels", {}), dict) for found in runs.values()):
            raise ValueError("the digests of a run's kernels are no dict")
        return cls(record["device"], entries, runs)

    def as_json(self) -> dict:
        """Runs that no entry names any more are left out."""
        entries = {
            key: {str(batch): by_batch[batch].as_json() for batch in sorted(by_batch)}
            for key, by_batch in sorted(self.entries.items())
        }
        used = {entry.run for by_batch in self.entries.values() for entry in by_batch.values()}
        runs = {run: found for run, found in self.runs.items() if run in used}
        return {"schema": SCHEMA, "device": self.device, "runs": runs, "entries": entries}


def key(problem) -> str:
    """The problem without its batch, as people read it; on a CPU with the number of threads, which decides as much."""
    text = str(problem).partition("x")[2]
    return f"{text}, {torch.get_num_threads()} threads" if problem.device == "cpu" else text


_PROBLEM = re.compile(
    r"(\d+)x(\d+)x(\d+)x(\d+) -> (\d+), (\d+)x(\d+)((?: [spd](?:\d+|\(\d+, \d+\))| g\d+)*) (\w+) ([a-z+]+) (\w+)"
)


def parsed_problem(text: str, device: str) -> ConvProblem:
    """The convolution whose str() this is, on a kind of device. Raises ValueError for anything else."""
    found = _PROBLEM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no convolution such as '8x64x56x56 -> 64, 3x3 p1 float16 bias relu'.")
    N, C, H, W, K, R, S = (int(number) for number in found.groups()[:7])
    window, dtype, epilogue, activation = found.groups()[7:]
    pairs = {"s": (1, 1), "p": (0, 0), "d": (1, 1), "g": (1, 1)}
    for name, value in re.findall(r"([spdg])(\d+|\(\d+, \d+\))", window):
        first, *rest = (int(number) for number in re.findall(r"\d+", value))
        pairs[name] = (first, rest[0] if rest else first)
    parts = epilogue.split("+")
    problem = ConvProblem(
        N, C, H, W, K, R, S, pairs["s"], pairs["p"], pairs["d"], pairs["g"][0], activation,
        "bn" in parts, "bias" in parts, "add" in parts, getattr(torch, dtype, torch.int8), device,
    )  # fmt: skip
    if problem.dtype not in FLOAT_DTYPES or activation not in ACTIVATIONS or str(problem) != text.strip():
        raise ValueError(f"{text!r} is no convolution: its dtype, epilogue or activation is not known.")
    if min(N, C, K, R, S, *problem.stride, *problem.dilation, problem.groups) < 1:
        raise ValueError(f"{text!r} is no convolution: one of its sizes is 0.")
    if C % problem.groups or K % problem.groups or min(problem.P, problem.Q) < 1:
        raise ValueError(f"{text!r} has no output, or channels that cannot be split into its groups.")
    return problem


def device_id(device: str) -> Optional[str]:
    """The name under which measurements of a kind of device ("cpu", "cuda") are kept.

    A CPU's includes its instruction sets: virtual machines give different processors one name. None where GPUs of
    different kinds are visible, since a problem does not say which of them it is on.
    """
    if device == "cpu":
        return " ".join((devices.cpu_name(), *devices.cpu_flags()))
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return names.pop() if len(names) == 1 else None


def file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"


def user_folder() -> Path:
    return files.cache_dir() / "tuning"


def lookup(problem, backend: Optional[str] = None, in_nhwc: bool = False) -> Optional[Choice]:
    """What was measured fastest for this problem or its nearest batch; with `backend`, that backend's best config.

    in_nhwc: of those that read x in NHWC, if the entry tells them apart (`Entry`). None without a measurement, for
    another operator than conv_bn_act, and for a kernel of ours whose sources have changed since. Never raises because
    of a file.
    """
    if problem.op != "conv_bn_act" or problem.device not in ("cpu", "cuda") or _is_ignored.get():
        return None
    return _lookup(problem, backend, in_nhwc, torch.get_num_threads() if problem.device == "cpu" else 0)


@functools.lru_cache(maxsize=8192)
def _lookup(problem, backend: Optional[str], in_nhwc: bool, threads: int) -> Optional[Choice]:
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
    return Choice(name, measured.config, f"{place} batch {batch}", measured.time_us)


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


def read(path: Path, device: str) -> Optional[Table]:
    """The table in a file, None without one. A file that is corrupt or another device's is reported once."""

    def understood(record: dict) -> Table:
        table = Table.from_json(record)
        if table.device != device:
            raise ValueError(f"it is for {table.device}, this is {device}")
        return table

    return files.read_json(path, understood)


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
    short = {dtype: short for short, dtype in DTYPES.items()}.get(problem.dtype)
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


# ------------------------------------------------------------------------------------------------- kernels' digests


def kernel_digests() -> dict[str, Optional[str]]:
    """By backend of ours, a digest of all it is compiled from: in C++ as its library was built. None if unknown."""
    return {name: kernel_digest(name) for name in provenance.SOURCES}


@functools.lru_cache(maxsize=None)
def kernel_digest(backend: str) -> Optional[str]:
    if backend == "cuda":
        return extension.build_record().get("cuda_kernels")
    if backend in provenance.CPU_BACKENDS:
        return extension.build_record().get("cpu_kernels", {}).get(backend)
    return provenance.kernel_digest(backend)


def _is_unchanged(backend: str, measured: dict, place: str) -> bool:
    if backend not in provenance.SOURCES:
        return True
    current = kernel_digest(backend)
    if current is not None and measured.get(backend) == current:
        return True
    files.report_once(
        f"{place.rstrip(',')}: its measurements of {backend!r} are ignored, since that backend's kernels have changed. "
        f"Run fused-resnet tune again."
    )
    return False
