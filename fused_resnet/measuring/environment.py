"""What a number depends on: processor, GPU and clocks, versions, threads, date, commit."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fused_resnet.machine.devices import allows_tf32, core_count, cpu_flags, cpu_name


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on: processor, GPU and clocks, versions, threads, date, commit. No host name, no path."""
    from fused_resnet.kernels.triton import runtime  # Triton itself

    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": runtime.triton_version(),
        "gpu": None,
        **_commit(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "allow_tf32": allows_tf32(),
            **gpu_state(),
        }
    return record


def gpu_state() -> dict[str, Any]:
    """Driver, clocks in MHz and power in W as nvidia-smi reports them; empty where it cannot be asked."""
    fields = {"driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw"}
    query = f"--query-gpu={','.join(fields.values())}"
    out = _output("nvidia-smi", f"--id={torch.cuda.current_device()}", query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in out.splitlines()[0].split(",")] if out else []
    return dict(zip(fields, values))


def _commit() -> dict[str, Any]:
    """The commit of the code that is measured, and whether its tree has other changes.

    Changed records do not count: the one being written is always changed.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": commit or None, "dirty": bool(changes)}


def _output(*command: str) -> str:
    """What a program prints, or nothing when it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
