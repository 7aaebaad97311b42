"""Finds, checks and loads the compiled parts. Each may be missing; then it is said why, and what to do about it.

`_C_cpu.so` and `_C_cuda.so` register kernels for operators of `operators.library`; `_host_checks` is for tests.
"""

from __future__ import annotations

import functools
import json
import logging
import mmap
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Optional

import torch

from fused_resnet.kernels import sources
from fused_resnet.operators import schemas

log = logging.getLogger("fused_resnet")

_DIRECTORY = Path(__file__).parents[1]
_REBUILD = "rebuild with `pip install --no-build-isolation .`"
_REBUILD_CUDA = "rebuild with `FUSED_RESNET_CUDA=1 pip install --no-build-isolation .`"
_loaded: set[str] = set()


@functools.lru_cache(maxsize=None)
def load(library: str) -> Optional[str]:
    """Load the kernels of "cpu" or "cuda". None when they are there, else the sentence why not; asked only once.

    The schemas a library was compiled against are compared before any of its code runs.
    """
    path = library_path(library)
    if not path.exists():
        return _why_missing(library)
    wanted, found = schemas.digest(library), embedded_digest(path, f"schemas of {library}")
    if found != wanted:
        return (
            f"{path.name} was built for other operators than this fused_resnet has (schema {found or 'unknown'}, "
            f"wanted {wanted}): {_rebuild(library)}"
        )
    if library == "cuda" and torch.version.cuda is None:
        return (
            f"{path.name} needs a CUDA build of torch, and this is torch {torch.__version__}: install torch for CUDA, "
            f"or carry the library to a machine that has it"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}): {_rebuild(library)}"
    _loaded.add(library)
    if library == "cpu" and (warning := torch.ops.fused_resnet.cpu_instruction_set()[2]):
        log.warning("%s", warning)
    return None


def instruction_set() -> Optional[dict[str, str]]:
    """{"name", "why"} of the instructions that _C_cpu uses in this process; None where it is not loaded."""
    if load("cpu") is not None:
        return None
    name, why, _ = torch.ops.fused_resnet.cpu_instruction_set()
    return {"name": name, "why": why}


def status() -> dict[str, dict]:
    """What `fused-resnet info` shows: per part whether it is present and loaded, else why not and what to do.

    Loads nothing that is not loaded yet, except that a present library is asked for (`load`).
    """
    parts = {}
    for library in schemas.KERNELS:
        path = library_path(library)
        why = load(library)
        parts[path.stem] = {"present": path.exists(), "loaded": library in _loaded, "why": why}
    # beside this file, not anywhere: an editable install elsewhere would answer an import too
    found = sorted(path.name for path in _DIRECTORY.glob("_host_checks.*"))
    present = any(f"_host_checks{suffix}" in found for suffix in EXTENSION_SUFFIXES)
    others = f"{', '.join(found)} is for another Python: {_REBUILD}" if found else _why_missing("host_checks")
    parts["_host_checks"] = {"present": present, "loaded": None, "why": None if present else others}
    return parts


@functools.lru_cache(maxsize=None)
def build_record() -> dict:
    """What the build wrote about itself: torch, compilers, archs, and per part whether it was built, or why not."""
    try:
        return json.loads((_DIRECTORY / "_build.json").read_text())
    except FileNotFoundError:
        return {}


@functools.lru_cache(maxsize=None)
def built_digest(patterns: tuple[str, ...]) -> Optional[str]:
    """`sources.kernel_digest` of what runs here: of sources in C++ as the libraries were built. None if unknown."""
    if any(sources.is_compiled(pattern) for pattern in patterns):
        return sources.digest_of(build_record().get("sources", {}), patterns)
    return sources.kernel_digest(patterns)


def embedded_digest(path: Path, what: str) -> Optional[str]:
    """The digest of "schemas of cpu" and the like in a library's file, found without loading it."""
    if path.stat().st_size == 0:  # which mmap refuses
        return None
    marker = re.compile(rb"fused_resnet %s: ([0-9a-f]{16})\0" % what.encode())
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = marker.search(content)
        return found and found.group(1).decode()


def library_path(library: str) -> Path:
    return _DIRECTORY / f"_C_{library}.so"


def _why_missing(part: str) -> str:
    record = build_record().get("parts", {}).get(part, {})
    if not record:
        return f"it is not built: {_rebuild(part)}"
    if record["built"]:
        return f"it was built, but its file is gone: {_rebuild(part)}"
    return f"it was not built: {record['why']}; {record['what_to_do']}"


def _rebuild(part: str) -> str:
    return _REBUILD_CUDA if part == "cuda" else _REBUILD
