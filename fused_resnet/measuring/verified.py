"""Which kernels were verified on which GPU: a digest of every kernel source, kept in benchmarks/results/<device>/.

`make gpu-check` writes a record {"verified": {"device", "date", "kernels": {file: digest}}} once the kernels in it
agreed with the reference on that device. A kernel edited since no longer has the digest that was verified.

This is for people, who read it in `fused-resnet info`. What may run, problem by problem, is decided by what was
measured on the device at hand (`choosing.winners`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from fused_resnet.backends import known
from fused_resnet.kernels import sources

_GPU = (*sources.CUDA, *sources.TRITON)


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


def gpu_kernels(root: Path = sources.ROOT, backends: Optional[Sequence[str]] = None) -> dict[str, str]:
    """The sources of GPU kernels below root, by path, with their digests: all, or those of these backends."""
    records = known("conv_bn_act")
    patterns = _GPU if backends is None else [pattern for name in backends for pattern in records[name].sources]
    return {file: digest for file, digest in sources.digests(root).items() if sources.is_source(file, patterns)}


def verified_record(device: str, date: str, backends: Sequence[str], root: Path = sources.ROOT) -> dict[str, Any]:
    """What to store under "verified" once these backends agreed with the reference on `device`. date: ISO 8601."""
    return {"device": device, "date": date, "backends": list(backends), "kernels": gpu_kernels(root, backends)}


def newest(root: Path = sources.ROOT) -> Provenance:
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
    kernels = {file: digest for file, digest in latest["kernels"].items() if sources.is_source(file, _GPU)}
    return Provenance(
        latest["device"],
        latest["date"][:10],
        unchanged=tuple(file for file in current if kernels.get(file) == current[file]),
        changed=tuple(file for file in current if file in kernels and kernels[file] != current[file])
        + tuple(f"{file} (removed)" for file in kernels if file not in current),
        never_verified=tuple(file for file in current if file not in kernels),
    )
