"""A folder of compiled kernels that is carried to another machine, and whether it serves there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from fused_resnet.kernels import compiled, sources
from fused_resnet.kernels.triton.runtime import triton_version
from fused_resnet.machine import files

_MANIFEST = "fused_resnet.json"


class Manifest(NamedTuple):
    """What a carried cache was compiled for: Triton's version, the architectures, and the kernels' sources."""

    triton: str
    archs: list[int]
    kernels: Optional[str]


def write_manifest(folder: Path, arch: int) -> Path:
    """Say in the folder what was compiled into it; architectures add up. ValueError for a folder of another Triton."""
    manifest, version = read_manifest(folder), triton_version()
    if manifest is not None and manifest.triton != version:
        raise ValueError(f"{folder} holds kernels of Triton {manifest.triton}, this is {version}: use another folder.")
    archs = sorted({arch, *(manifest.archs if manifest else ())})
    record = Manifest(str(version), archs, compiled.built_digest(sources.TRITON))
    return files.write_json(Path(folder) / _MANIFEST, record._asdict())


def read_manifest(folder: Path) -> Optional[Manifest]:
    return files.read_json(Path(folder) / _MANIFEST, lambda record: Manifest(**record))


def why_not_carried(folder: Path, arch: int) -> Optional[str]:
    """Why a carried cache cannot serve here, or None."""
    manifest, version = read_manifest(folder), triton_version()
    if manifest is None:
        return f"{folder} holds no {_MANIFEST}: fill it with fused-resnet tune --compile-only"
    if manifest.triton != version:
        return f"{folder} was compiled by Triton {manifest.triton}, this is {version}: compile it with that version"
    if arch not in manifest.archs:
        return f"{folder} was compiled for sm_{', sm_'.join(map(str, manifest.archs))}, this GPU is sm_{arch}"
    if manifest.kernels != compiled.built_digest(sources.TRITON):
        return f"{folder} was compiled from other kernel sources than these: compile it again"
    return None
