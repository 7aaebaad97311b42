"""`fused-resnet info`: versions, devices, backends, compiled parts, tuned configs, folders and variables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any, Optional

import click
import torch

import fused_resnet
from fused_resnet import backends
from fused_resnet.choosing import winners, winners_file
from fused_resnet.cli.console import as_json_option, new_table, print_json, stdout_console, why_no_cuda
from fused_resnet.cli.kernels import collect_kernels, print_kernels
from fused_resnet.kernels import compiled
from fused_resnet.machine import files
from fused_resnet.measuring import environment, verified
from fused_resnet.operators import detours
from fused_resnet.operators.problem import (
    ACTIVATIONS,
    FLOAT_DTYPES,
    SHORT_DTYPES,
    AddReluProblem,
    BnActProblem,
    ChainProblem,
    ConvProblem,
    Problem,
    dtype_name,
)

_OPTIONAL = (
    "torchvision", "timm", "transformers", "segmentation-models-pytorch", "onnxruntime", "openvino", "tensorrt",
    "torch-tensorrt", "matplotlib", "jinja2", "platformdirs", "filelock",
)  # fmt: skip
# Whatever may change what is chosen, how fast it is, or where it is kept.
_VARIABLES = re.compile(
    r"(FUSED_RESNET|TRITON|TORCHINDUCTOR|TORCH_CUDA|TORCH_LOGS|PYTORCH|CUDA|CUDNN|CUBLAS|NVIDIA|OMP|MKL|ONEDNN|DNNL|KMP"
    r"|ATEN_CPU|MALLOC|GLIBC_TUNABLES|LD_PRELOAD|CC$|CXX$|DISABLE_ADDMM)"
)


@click.command()
@click.option("--kernels", is_flag=True, help="Instead: every compiled kernel, its tile, registers and spills.")
@as_json_option
def info(kernels: bool, as_json: bool) -> None:
    """Versions, devices, backends and compiled parts: what is missing, why, and what to do."""
    if kernels:
        found = collect_kernels()
        return print_json(found) if as_json else print_kernels(found, stdout_console())
    record = collect_info()
    if as_json:
        return print_json(record)
    out = stdout_console()
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in record["versions"].items())
    cpu, gpu = record["devices"]["cpu"], record["devices"]["cuda"]
    out.print(versions)
    out.print(f"CPU: {cpu['name']}, {cpu['threads']} threads, {' '.join(cpu['flags']) or 'no vector flags known'}")
    for dtype, reason in cpu["onednn"].items():
        out.print(f"  oneDNN {dtype}: {'yes' if reason is None else reason}")
    if cpu["kernels"]:
        out.print(f"  C++ kernels: {cpu['kernels']['name']} ({cpu['kernels']['why']})")
    for name in gpu["names"] or [f"none ({gpu['why']})"]:
        out.print(f"GPU: {name}")
    out.print(f"Triton: {record['triton_error'] or 'imported'}\n")
    rows: dict[tuple[str, str], list[str]] = {}
    reasons: list[str] = []
    for entry in record["backends"]:
        rows.setdefault((entry["op"], entry["backend"]), []).append(_support(entry, reasons))
    devices = dict.fromkeys(entry["device"] for entry in record["backends"])
    table = new_table("operator", "backend", *devices, title="Backends: the dtypes they run; (1), (2): why not")
    for operator_and_backend, cells in rows.items():
        table.add_row(*operator_and_backend, *cells)
    out.print(table)
    for number, reason in enumerate(reasons, 1):
        out.print(f"({number}) {reason}", markup=False)
    out.print()
    for part, entry in record["parts"].items():
        out.print(f"{part}: {'present' if entry['present'] else 'absent'}{', loaded' if entry['loaded'] else ''}")
        if entry["why"]:
            out.print(f"  {entry['why']}")
    for fault in record["library_faults"]:
        if fault["applies"]:
            out.print(f"{fault['library']}: {_fault_sentence(fault)}", markup=False)
    for device, tuned in record["tuning"].items():
        out.print(f"tuned for {device}, {tuned['device']}: {_tuned_sentence(tuned)}")
    out.print(f"cache: {record['folders']['cache']}")
    for name, value in record["variables"].items():
        out.print(f"{name}={value}", markup=False)
    out.print(f"\nProvenance: {record['provenance']['sentence']}")


def collect_info() -> dict[str, Any]:
    """Everything `fused-resnet info` shows, as plain values."""
    from fused_resnet.kernels.triton import runtime

    record = environment.environment()
    state = verified.newest()
    has_cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_cuda else []
    return {
        "versions": {
            "fused_resnet": fused_resnet.__version__,
            **{name: record[name] for name in ("python", "torch", "triton")},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if has_cuda else None,
        },
        "packages": {name: _version(name) for name in _OPTIONAL},
        "system": {"platform": _at_home(platform.platform()), "libc": " ".join(platform.libc_ver())},
        "gpu": environment.environment("cuda")["gpu"] if has_cuda else None,
        "commit": record["commit"],
        "dirty": record["dirty"],
        "devices": {
            "cpu": {
                "name": record["cpu"],
                "threads": record["threads"],
                "flags": record["cpu_flags"],
                "onednn": {short: backends.onednn_missing(dtype) for short, dtype in SHORT_DTYPES.items()},
                "kernels": compiled.instruction_set(),
            },
            "cuda": {"names": names, "why": None if has_cuda else why_no_cuda()},
        },
        "triton_error": None if runtime.IMPORT_ERROR is None else str(runtime.IMPORT_ERROR),
        "backends": [
            _backend_info(op, backend, device)
            for op in ("conv_bn_act", "add_relu", "bn_act")
            for backend in backends.known(op).values()
            for device in ("cpu", "cuda")
            if device == "cpu" or has_cuda
        ],
        "parts": {**compiled.status(), "_ptx": _emulator_info()},
        "build": compiled.build_record(),
        "library_faults": detours.known_faults(),
        "tuning": {device: _tuning_info(device) for device in ("cpu", "cuda") if device == "cpu" or has_cuda},
        "folders": {
            "package": _at_home(Path(fused_resnet.__file__).parent),
            "cache": _at_home(files.cache_dir()),
            "triton": _at_home(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        },
        "variables": {name: _at_home(value) for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)},
        "provenance": {"sentence": str(state), **state._asdict()},
    }


def _version(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _at_home(path: Any) -> str:
    """A path without the user's name."""
    return str(path).replace(str(Path.home()), "~")


def _emulator_info() -> dict[str, Any]:
    from fused_resnet.emulation import library

    why = library.why_missing()
    return {"present": library.PATH.exists(), "loaded": None, "why": why and _at_home(why)}


def _tuning_info(device: str) -> dict[str, Any]:
    """What `auto` goes by on a kind of device: both files, and how often each backend won in them."""
    name = winners.device_id(device)
    found: dict[str, Any] = {"device": name, "used": os.environ.get("FUSED_RESNET_TUNED") != "0", "files": []}
    for folder in (winners.SHIPPED, winners.user_folder()) if name else ():
        path = folder / winners_file.file_name(str(name))
        table = winners_file.read(path, str(name))
        entries = [entry for by_batch in table.entries.values() for entry in by_batch.values()] if table else []
        fastest = [entry.winner for entry in entries]
        found["files"].append(
            {
                "path": _at_home(path),
                "exists": path.exists(),
                "entries": len(entries),
                "winners": {winner: fastest.count(winner) for winner in sorted(set(fastest))},
            }
        )
    return found


def _fault_sentence(fault: dict[str, Any]) -> str:
    seen = {True: ", seen here", False: ", not seen here", None: ""}[fault["seen"]]
    return f"{fault['what']} ({fault['source']}{seen}); instead: {fault['instead']}"


def _tuned_sentence(tuned: dict[str, Any]) -> str:
    if tuned["device"] is None:
        return "GPUs of different kinds are visible, so no file is used"
    if not tuned["used"]:
        return "FUSED_RESNET_TUNED=0 leaves the files alone"
    parts = [
        f"{file['entries']} in {file['path']} ({', '.join(f'{name} {n}' for name, n in file['winners'].items())})"
        for file in tuned["files"]
        if file["entries"]
    ]
    return "; ".join(parts) or "nothing (run fused-resnet tune)"


def _backend_info(op: str, backend: backends.Backend, device: str) -> dict[str, Any]:
    return {
        "op": op,
        "backend": backend.name,
        "device": device,
        "auto": device in backend.auto.devices,
        "dtypes": {dtype_name(dtype): backend.why_not(_example(op, dtype, device)) for dtype in FLOAT_DTYPES},
    }


def _example(op: str, dtype: torch.dtype, device: str) -> Problem:
    """A convolution with folded BN and ReLU as every ResNet has it, an addition, or BN and ReLU in training."""
    if op == "bn_act":
        return BnActProblem(8, 64, 56, 56, "relu", True, False, True, dtype, device)
    if op == "bottleneck_chain":
        return ChainProblem(1, 64, 56, 56, 256, 64, "relu", dtype, device)
    if op == "add_relu":
        return AddReluProblem((1, 64, 56, 56), True, dtype, device)
    return ConvProblem(
        1, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, ACTIVATIONS[1], False, True, False, dtype, device
    )  # fmt: skip


def _support(entry: dict[str, Any], reasons: list[str]) -> str:
    """The dtypes an entry of `collect_info` runs, and the others with the number of their reason in `reasons`, where
    new ones are added."""
    runs: list[str] = []
    others: dict[int, list[str]] = {}
    for dtype, reason in entry["dtypes"].items():
        short = dtype.replace("bfloat", "bf").replace("float", "fp")
        if reason is None:
            runs.append(short)
            continue
        if reason not in reasons:
            reasons.append(reason)
        others.setdefault(reasons.index(reason) + 1, []).append(short)
    if not runs and len(others) == 1:
        return f"no ({next(iter(others))})"
    parts = [("auto: " if entry["auto"] else "") + ", ".join(runs)] if runs else []
    if others:
        parts.append("no: " + ", ".join(f"{', '.join(names)} ({number})" for number, names in others.items()))
    return "; ".join(parts)
