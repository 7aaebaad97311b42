"""Which backend and config was the fastest for a convolution on this device, and which were wrong: read from files.

    fused_resnet/configs/<device>.json         what ships
    <cache folder>/tuning/<device>.json        what `freeze` and `fused-resnet tune` measured here; it comes first

The cache folder is `files.cache_dir`'s. FUSED_RESNET_TUNED=0 ignores both files. An entry belongs to a problem without
its batch (`key`) and to the batch it was measured at. The entry nearest in log space answers for the batches near it.
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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from fused_resnet.backends import record
from fused_resnet.choosing.winners_file import Entry, Table, file_name, read
from fused_resnet.kernels import compiled
from fused_resnet.machine import devices, files, onednn
from fused_resnet.machine.errors import one_line
from fused_resnet.operators.problem import SHORT_DTYPES

NEAR = 1.0  # a measurement answers for batches from half of its own to twice that
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
    """The problem without its batch, as people read it, and what else decides how fast it is and whether it is right.

    On a CPU that is the number of threads, and what the process has set of oneDNN. For fp32 on a GPU it is whether TF32
    is allowed. On both it is the versions of what computes (`versions`).
    """
    parts = [str(problem).partition("x")[2]]
    if problem.device == "cpu":
        parts += [f"{torch.get_num_threads()} threads", *_switched()]
    elif problem.dtype == torch.float32:
        parts.append("tf32" if devices.allows_tf32() else "no tf32")
    return ", ".join((*parts, versions(problem.device)))


def _switched() -> list[str]:
    """What the process has set of oneDNN, in words: nothing by default."""
    is_enabled, precision = onednn.switches()
    found = [] if is_enabled else ["oneDNN off"]
    return found if precision in ("none", "ieee") else [*found, f"fp32 as {precision}"]


@functools.lru_cache(maxsize=None)
def versions(device: str) -> str:
    """Those of all that computes on a kind of device besides our kernels, and the instructions it is limited to."""
    if device == "cpu":
        ours, (variable, limit) = compiled.instruction_set(), onednn.isa_limit()
        limits = [f"{variable}={limit}"] if variable else []
        return ", ".join((f"torch {torch.__version__}", onednn.version(), *limits, *([ours["name"]] if ours else [])))
    from fused_resnet.kernels.triton.runtime import triton_version  # which imports Triton

    parts = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}", f"Triton {triton_version()}"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()  # the CUDA that it serves
        parts += [f"cuDNN {torch.backends.cudnn.version()}", f"driver {driver}"]
        parts += [f"{properties.multi_processor_count} SMs"]
    return ", ".join(parts)


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

    in_nhwc: of those that read x in NHWC, if the entry tells them apart (`Entry`). None without a measurement of a
    batch between half and twice this one, and for what is neither a convolution nor a region. None too for a kernel
    of ours whose sources have changed since. Never raises because of a file.
    """
    if not _counts(problem):
        return None
    return _lookup(problem, backend, in_nhwc, _settings(problem))


def outcome(problem, candidate: str) -> Optional[dict]:
    """What came of checking a candidate on exactly this problem (`checking.Checked`); None if that was never done, or
    to other kernels."""
    if not _counts(problem):
        return None
    return _outcome(problem, candidate, _settings(problem))


def entry_of(problem) -> Optional[Entry]:
    """What was measured for exactly this problem by the kernels that are here; None if one of them has changed."""
    if not _counts(problem):
        return None
    found = known(problem.device).entries.get(key(problem), {}).get(problem.N)
    if found is None or not all(_is_current(name, found.kernels) for name in found.entry.candidates):
        return None
    return found.entry


class Measurement(NamedTuple):
    """What is known of a problem: `when` and at which batch it was measured, and the best time of each backend there.

    wrong: why, by candidate, of those that are wrong for exactly this problem.
    """

    place: str
    when: str
    batch: int
    times_us: dict[str, float]
    wrong: dict[str, str]


def measurement_of(problem) -> Optional[Measurement]:
    """What `lookup` decides by, and what was found wrong; None where neither is known."""
    if not _counts(problem):
        return None
    checks = known(problem.device).checks.get(_check_key(problem), {})
    wrong = {name: why for name in checks if (why := why_wrong(outcome(problem, name))) is not None}
    found = _nearest(problem)
    if found is None:
        return Measurement("", "", problem.N, {}, wrong) if wrong else None
    batch, (entry, place, _) = found
    times_us = {name: one.time_us for name, one in entry.candidates.items()}
    return Measurement(place.rstrip(","), entry.run, batch, times_us, wrong)


def why_wrong(outcome: Optional[dict]) -> Optional[str]:
    """What is said of a candidate that a check (`checking.checked`) has not found right, or None."""
    if outcome is None:
        return None
    if "why" in outcome:
        return outcome["why"]
    ratio = outcome["error_ratio"]
    if ratio is None:
        return "its result is no number"
    return f"its error is {ratio:.3g} times what is allowed" if ratio > 1 else None


def knows(problem) -> bool:
    """Whether anything was measured or found of a problem, at any batch, number of threads or version."""
    text = str(problem).partition("x")[2]
    found = known(problem.device)
    return any(text in name for names in (found.entries, found.checks) for name in names)


def is_trusted(backend: str, device: str) -> bool:
    """Whether a backend has been checked in a process of its own here, with these versions, and did not end it."""
    return kernel_digest(backend) is not None and known(device).trusted.get(backend) == _stamp(backend, device)


def _counts(problem) -> bool:
    return problem.op in ("conv_bn_act", "region") and problem.device in ("cpu", "cuda") and not _is_ignored.get()


def _settings(problem) -> tuple:
    """What is looked up anew when it changes, beside the problem."""
    if problem.device == "cpu":
        return (torch.get_num_threads(), *onednn.switches())
    return (devices.allows_tf32(),)


@functools.lru_cache(maxsize=8192)
def _lookup(problem, backend: Optional[str], in_nhwc: bool, settings: tuple) -> Optional[Winner]:
    found = _nearest(problem)
    if found is None:
        return None
    batch, (entry, place, kernels) = found
    entry = entry.in_nhwc or entry if in_nhwc else entry
    name = backend or entry.winner
    if name not in entry.candidates or not _is_unchanged(name, kernels, place):
        return None
    measured = entry.candidates[name]
    return Winner(name, measured.config, f"{place} batch {batch}", measured.time_us)


def _nearest(problem) -> Optional[tuple[int, "_Found"]]:
    """The batch nearest in log space that was measured, if it is near enough, and what was found there."""
    entries = known(problem.device).entries.get(key(problem), {})
    distances = {batch: abs(math.log2(batch / max(problem.N, 1))) for batch in entries}
    near = [batch for batch, distance in distances.items() if distance <= NEAR]
    if not near:
        return None
    batch = min(near, key=lambda found: (distances[found], -found))
    return batch, entries[batch]


@functools.lru_cache(maxsize=8192)
def _outcome(problem, candidate: str, settings: tuple) -> Optional[dict]:
    found = known(problem.device).checks.get(_check_key(problem), {}).get(candidate)
    digest = kernel_digest(candidate.partition(" ")[0])
    return None if found is None or digest is None or found["kernel"] != digest else found


def _check_key(problem) -> str:
    return f"{problem.N}x{key(problem)}"


class _Found(NamedTuple):
    """An entry, where it comes from, and the digests of the kernels measured."""

    entry: Entry
    place: str
    kernels: dict


class Known(NamedTuple):
    """All tables of a device as one: later ones replace what earlier ones say."""

    entries: dict[str, dict[int, _Found]]
    checks: dict[str, dict[str, dict]]
    trusted: dict[str, str]


@functools.lru_cache(maxsize=None)
def known(device: str) -> Known:
    """What ships, the user's file, and what this process has measured and could not write."""
    merged = Known({}, {}, {})
    name = device_id(device)
    if not are_used() or name is None:
        return merged
    sources = [(read(folder / file_name(name), name), place) for folder, place in (
        (SHIPPED, "configs/{}, tuned for"), (user_folder(), "tuned here, {},"),
    )]  # fmt: skip
    for table, place in (*sources, (_SESSION.get(name), "tuned in this process,")):
        if table is None:
            continue
        for problem_key, by_batch in table.entries.items():
            for batch, entry in by_batch.items():
                kernels = table.runs.get(entry.run, {}).get("kernels", {})
                found = _Found(entry, place.format(file_name(name)), kernels)
                merged.entries.setdefault(problem_key, {})[batch] = found
        for problem_key, found_checks in table.checks.items():
            merged.checks.setdefault(problem_key, {}).update(found_checks)
        merged.trusted.update(table.trusted)
    return merged


def are_used() -> bool:
    """Whether measurements count in this process: FUSED_RESNET_TUNED=0 says no."""
    return os.environ.get("FUSED_RESNET_TUNED") != "0"


def merge(folder: Path, found: Table) -> Path:
    """Merge what was found into the folder's file for its device, whole or not at all, beside other writers.

    A file that cannot be understood is replaced. Raises OSError where the folder cannot be written to.
    """
    path = Path(folder) / file_name(found.device)
    with files.locked(path):
        table = read(path, found.device) or Table.empty(found.device)
        table.merge(found)
        files.write_json(path, table.as_json())
    forget()
    return path


def keep(found: Table) -> None:
    """Merge what was found into the user's file, or where that cannot be written, into what this process knows."""
    try:
        merge(user_folder(), found)
    except OSError as error:
        files.report_once(
            f"{user_folder()} cannot be written, so what is measured is kept for this process alone "
            f"({one_line(error)})."
        )
        keep_here(found)


def keep_here(found: Table) -> None:
    """Merge what was found into what this process knows."""
    _SESSION.setdefault(found.device, Table.empty(found.device)).merge(found)
    forget()


def keep_refusals(refusals: Mapping[Any, tuple[Any, str]]) -> None:
    """Keep that these candidates cannot run these problems: {problem: (selection, why)}."""
    for problem, (selection, why) in refusals.items():
        if (name := device_id(problem.device)) is not None:
            keep(Table.empty(name)._replace(checks=checks_of(problem, {str(selection): {"why": why}})))


def keep_swaps(better: Mapping[Any, Optional[Any]]) -> None:
    """Keep what a captured plan has shown of problems that were measured here: the selection that is better in place of
    the winner, None where the winner is."""
    for problem, selection in better.items():
        entry, _, kernels = known(problem.device).entries[key(problem)][problem.N]
        winner = entry.winner if selection is None else selection.backend.name
        table = Table.empty(str(device_id(problem.device)))
        table.runs[entry.run] = {"date": entry.run, "kernels": kernels}
        table.entries[key(problem)] = {problem.N: entry._replace(winner=winner, is_swapped=True)}
        keep(table)


def checks_of(problem, outcomes: Mapping[str, dict]) -> dict[str, dict[str, dict]]:
    """Outcomes by candidate, as a table keeps them."""
    found = {name: {**one, "kernel": kernel_digest(name.partition(" ")[0])} for name, one in outcomes.items()}
    return {_check_key(problem): found}


def trust(names: Iterable[str], device: str) -> dict[str, str]:
    """As a table keeps it that these backends were checked in a process of their own."""
    return {name: _stamp(name, device) for name in names}


def _stamp(backend: str, device: str) -> str:
    return f"{kernel_digest(backend)}, {versions(device)}"


_SESSION: dict[str, Table] = {}


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within, no measurement is found: what is made there is what `auto` would make untuned."""
    token = _is_ignored.set(True)
    try:
        yield
    finally:
        _is_ignored.reset(token)


def are_ignored() -> bool:
    return _is_ignored.get()


_is_ignored = contextvars.ContextVar("fused_resnet measurements are ignored", default=False)


def forget() -> None:
    """Read the files again at the next lookup."""
    for cached in (_lookup, _outcome, known):
        cached.cache_clear()


def warn_untuned(problem) -> None:
    """Say once per process and kind of device that `auto` has no measurement to go by, and how to make one."""
    warned.add(problem.device)
    short = {dtype: short for short, dtype in SHORT_DTYPES.items()}.get(problem.dtype)
    name = device_id(problem.device)
    if not are_used() or _is_ignored.get() or short is None:
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


def kernel_digest(backend: str) -> Optional[str]:
    """The digest of one backend's kernels, as in `kernel_digests`; "" of a backend that is not made from ours."""
    made = record.known("conv_bn_act").get(backend)
    return "" if made is None or not made.sources else compiled.built_digest(made.sources)


def _is_current(backend: str, measured: dict) -> bool:
    digest = kernel_digest(backend)
    return digest == "" or digest is not None and measured.get(backend) == digest


def _is_unchanged(backend: str, measured: dict, place: str) -> bool:
    if _is_current(backend, measured):
        return True
    files.report_once(
        f"{place.rstrip(',')}: its measurements of {backend!r} are ignored, since that backend's kernels have changed. "
        f"Run fused-resnet tune again."
    )
    return False
