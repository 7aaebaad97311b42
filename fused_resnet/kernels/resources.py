"""What nvcc made of csrc's CUDA kernels: cuobjdump reads it from a library's file. Nothing is loaded, no GPU asked."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import torch

from fused_resnet.operators.problem import dtype_name

# How C++ spells an element in a kernel's name.
MANGLED = {
    torch.float16: "N3c104HalfE", torch.bfloat16: "NS_8BFloat16E", torch.float32: "f",
    torch.uint8: "h", torch.int8: "a",
}  # fmt: skip
_NAME = re.compile(
    r"_ZN12fused_resnet(?P<namespace>4sm90|7grouped)?\d+(?P<kernel>\w+?)_kernelI(?P<element>N3c104HalfE|NS_8BFloat16E|[fha])"
    r"(?:Li(?P<tile>\d+)E(?:Li(?P<more>\d+)E)?|NS_\d+(?P<function>\w+?)E)?E"
)
# by the namespace: csrc/cuda/sm80/grouped_tiles.h, csrc/cuda/sm90/tiles.h
_FIRST_TILES = {"7grouped": 60, "4sm90": 90}


class Resources(NamedTuple):
    """A kernel for one architecture.

    dtype: of x and the output. tile: as configs name it, of convolutions; copy_bytes: at once, of sm_80's. width: how
    many channels a filter is multiplied with, of grouped ones. stack_bytes: a thread's spilled registers and arrays.
    static_shared_bytes: what a launch asks for comes on top.
    """

    kernel: str
    dtype: str
    tile: Optional[int]
    copy_bytes: Optional[int]
    width: Optional[int]
    arch: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int


def cuobjdump() -> Optional[Path]:
    """The tool: in PATH, in the CUDA toolkit's usual folder, or in Triton's wheel; None where there is none."""
    folders: list[Optional[str]] = [None, "/usr/local/cuda/bin"]  # None: PATH
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = next(filter(None, (shutil.which("cuobjdump", path=folder) for folder in folders)), None)
    return None if found is None else Path(found)


def why_not(library: Path) -> Optional[str]:
    """Why nothing can be read of it, or None."""
    if not library.exists():
        return f"{library.name} is not built"
    if cuobjdump() is None:
        return "cuobjdump was not found; the CUDA toolkit and the triton package bring it"
    return None


def of_library(library: Path) -> list[Resources]:
    """Every kernel of the library, or of a cubin, in the order of its file. Raises RuntimeError where it has none."""
    command = [str(cuobjdump()), "--dump-resource-usage", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(_read(done.stdout))
    if done.returncode or not found:
        said = done.stderr.strip()[-200:] or "it lists no kernel"
        raise RuntimeError(f"info: cuobjdump cannot read {library.name}: {said}.")
    return found


def _read(text: str) -> Iterator[Resources]:
    """cuobjdump names the architecture once, then each kernel and in the next line what it takes."""
    elements = {mangled: dtype_name(dtype) for dtype, mangled in MANGLED.items()}
    arch = ""
    lines = iter(text.splitlines())
    for line in lines:
        if said := re.match(r"arch = (\w+)", line):
            arch = said[1]
        if not (said := re.match(r"\s*Function (\w+):", line)):
            continue
        name, used = _NAME.match(said[1]), dict(re.findall(r"(\w+):(\d+)", next(lines, "")))
        if name is None:
            raise RuntimeError(f"info: {said[1]} is no kernel of ours.")
        tile = None if name["tile"] is None else int(name["tile"]) + _FIRST_TILES.get(name["namespace"], 0)
        kernel = (
            name["kernel"] if name["function"] is None else re.sub(r"(?<!^)(?=[A-Z])", "_", name["function"]).lower()
        )
        more = None if name["more"] is None else int(name["more"])
        copied, width = (None, more) if name["namespace"] == "7grouped" else (more, None)
        yield Resources(kernel, elements[name["element"]], tile, copied, width, arch, int(used["REG"]),
                        int(used["STACK"]), int(used["SHARED"]))  # fmt: skip
