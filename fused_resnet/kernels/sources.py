"""Which kernels were verified on which GPU: a digest of every kernel source, kept in benchmarks/results/<device>/.

`make gpu-check` writes a record {"verified": {"device", "date", "kernels": {file: digest}}} once the kernels in it
agreed with the reference on that device. A kernel edited since no longer has the digest that was verified.
"""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

ROOT = Path(__file__).parents[2]
_FOLDERS = ("csrc", "fused_resnet/kernels/triton")
_SUFFIXES = {".cu", ".cuh", ".h", ".cpp", ".py"}
_CPU = ("csrc/common/*", "csrc/cpu/operator.h", "csrc/cpu/vectors.h", "csrc/cpu/dispatch.h")
_TRITON = "fused_resnet/kernels/triton"
# By backend, the files its kernels are made from; a star also stands for folders.
SOURCES = {
    "cuda": ("csrc/common/*", "csrc/cuda/*"),
    "triton": (f"{_TRITON}/conv/*", f"{_TRITON}/add_relu.py", f"{_TRITON}/runtime.py"),
    "winograd": (*_CPU, "csrc/cpu/winograd.*"),
    "grouped": (*_CPU, "csrc/cpu/grouped.*"),
}
GPU_BACKENDS = ("cuda", "triton")
CPU_BACKENDS = ("winograd", "grouped")


class Provenance(NamedTuple):
    """device and date of the newest verification, None without one; files by what has become of them since."""

    device: Optional[str]
    date: Optional[str]
    unchanged: tuple[str, ...]
    changed: tuple[str, ...]
    never_verified: tuple[str, ...]

    def __str__(self) -> str:
        if self.device is None:
            return "kernels not yet verified on a GPU"
        sentence = f"kernels verified on {self.device}, {self.date}"
        if self.changed:
            sentence += f"; changed since: {', '.join(self.changed)}"
        if self.never_verified:
            sentence += f"; not yet verified: {', '.join(self.never_verified)}"
        return sentence


def is_source(file: str, backends: Sequence[str]) -> bool:
    """Whether one of these backends has kernels made from this file, a path below the root."""
    return any(fnmatchcase(file, pattern) for backend in backends for pattern in SOURCES[backend])


def digests(root: Path = ROOT) -> dict[str, str]:
    """{path below root: SHA-256, shortened} of all C++, CUDA and Triton sources, also of what only tests kernels."""
    files = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*")))
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in files
        if file.suffix in _SUFFIXES
    }


def gpu_kernels(root: Path = ROOT, backends: Sequence[str] = GPU_BACKENDS) -> dict[str, str]:
    """The part of digests(root) that these backends' kernels are made from."""
    return {file: digest for file, digest in digests(root).items() if is_source(file, backends)}


def kernel_digest(backend: str, root: Path = ROOT) -> Optional[str]:
    """One digest of all that this backend's kernels are made from, None where the sources are not there."""
    sources = {file: digest for file, digest in digests(root).items() if is_source(file, [backend])}
    return _digest_of(sources) if sources else None


def source_digest(root: Path = ROOT) -> str:
    """One digest of all sources, by which a record says what it measured."""
    return _digest_of(digests(root))


def _digest_of(sources: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def verified_record(device: str, date: str, backends: Sequence[str], root: Path = ROOT) -> dict[str, Any]:
    """What to store under "verified" once these backends agreed with the reference on `device`. date: ISO 8601."""
    return {"device": device, "date": date, "backends": list(backends), "kernels": gpu_kernels(root, backends)}


def newest(root: Path = ROOT) -> Provenance:
    """The state of the kernels below root against the newest record in benchmarks/results/<device>/*.json.

    Raises ValueError for a results file that is not JSON: a record that cannot be read must not look like none.
    """
    found = []
    for file in sorted((root / "benchmarks" / "results").glob("*/*.json")):
        try:
            record = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file.relative_to(root).as_posix()} is not valid JSON: {error}") from error
        verified = record.get("verified") if isinstance(record, dict) else None
        if verified:
            found.append(verified)
    current = gpu_kernels(root)
    if not found:
        return Provenance(None, None, (), (), tuple(current))
    latest = max(found, key=lambda verified: verified["date"])
    kernels = {file: digest for file, digest in latest["kernels"].items() if is_source(file, GPU_BACKENDS)}
    return Provenance(
        latest["device"],
        latest["date"][:10],
        unchanged=tuple(file for file in current if kernels.get(file) == current[file]),
        changed=tuple(file for file in current if file in kernels and kernels[file] != current[file])
        + tuple(f"{file} (removed)" for file in kernels if file not in current),
        never_verified=tuple(file for file in current if file not in kernels),
    )
