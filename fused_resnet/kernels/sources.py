"""What kernels are made from: patterns of files, and digests of what they match.

A digest says whether a kernel is still what was measured, verified or compiled. setup.py loads this file by its path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).parents[2]
_FOLDERS = ("csrc", "fused_resnet/kernels/triton")
_SUFFIXES = {".cu", ".cuh", ".h", ".cpp", ".py"}
# A star also stands for folders.
_TRITON = "fused_resnet/kernels/triton"
_CPU = ("csrc/common/*", *(f"csrc/cpu/{name}.h" for name in ("operator", "vectors", "epilogue", "silu", "dispatch")))
CUDA = ("csrc/common/*", "csrc/cuda/*")
TRITON = (f"{_TRITON}/conv/*", f"{_TRITON}/add_relu.py", f"{_TRITON}/runtime.py")
BN_ACT = (*_CPU, "csrc/cpu/bits.h", "csrc/cpu/bn_act.cpp")
TRITON_BN_ACT = (f"{_TRITON}/bn_act.py", f"{_TRITON}/conv/epilogue.py", f"{_TRITON}/runtime.py")
TRITON_CHAIN = (
    f"{_TRITON}/chain/*",
    *(f"{_TRITON}/conv/{name}.py" for name in ("epilogue", "row_space")),
    f"{_TRITON}/runtime.py",
)
CPU_PASS = (*_CPU, "csrc/cpu/affine_act.cpp")
PASS = (f"{_TRITON}/affine_act.py", f"{_TRITON}/conv/epilogue.py", f"{_TRITON}/runtime.py")
WINOGRAD = (*_CPU, "csrc/cpu/winograd*", "csrc/cpu/denormals.h")
GROUPED = (*_CPU, "csrc/cpu/grouped.*")
DIRECT = (*_CPU, "csrc/cpu/direct.*")
BLOCKED = (*_CPU, "csrc/cpu/winograd*.h", "csrc/cpu/denormals.h", "csrc/cpu/blocked/*")


def is_source(file: str, patterns: Sequence[str]) -> bool:
    """Whether a path below the root matches one of the patterns."""
    return any(fnmatchcase(file, pattern) for pattern in patterns)


def digests(root: Path = ROOT) -> dict[str, str]:
    """{path below root: SHA-256, shortened} of all C++, CUDA and Triton sources.

    Also of those that no backend runs: what compiles, tests or interprets kernels, and `cache_read`, which measures.
    """
    files = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*")))
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in files
        if file.suffix in _SUFFIXES
    }


def compiled_digests(root: Path = ROOT) -> dict[str, str]:
    """The part of digests(root) that libraries are compiled from."""
    return {file: digest for file, digest in digests(root).items() if is_compiled(file)}


def is_compiled(pattern: str) -> bool:
    """Whether what matches is compiled into a library, and not when it is launched."""
    return pattern.startswith("csrc/")


def digest_of(files: Mapping[str, str], patterns: Sequence[str] = ("*",)) -> Optional[str]:
    """One digest of those files that match, by their own digests; None where none does."""
    matching = {file: digest for file, digest in files.items() if is_source(file, patterns)}
    return hashlib.sha256(json.dumps(matching, sort_keys=True).encode()).hexdigest()[:16] if matching else None


def kernel_digest(patterns: Sequence[str], root: Path = ROOT) -> Optional[str]:
    """One digest of the sources below root that match, None where they are not there."""
    return digest_of(digests(root), patterns)


def source_digest(root: Path = ROOT) -> Optional[str]:
    """One digest of all sources, by which a record says what it measured."""
    return digest_of(digests(root))
