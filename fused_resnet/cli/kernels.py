"""`fused-resnet info --kernels`: every compiled kernel with its tile, stages, registers, shared memory and spills."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Optional

import torch

from fused_resnet.cli.console import new_table
from fused_resnet.emulation import cuda_launches
from fused_resnet.emulation import library as emulator
from fused_resnet.kernels import compiled, resources
from fused_resnet.operators.problem import dtype_name
from fused_resnet.regions import kernels as micro_kernels


def collect_kernels() -> dict[str, Any]:
    """As plain values: {"cpu": {"why", "kernels"}, "cuda": {"why", "tiles_why", "kernels"}}. why: there are none."""
    why = resources.why_not(compiled.library_path("cuda"))
    tiles_why = emulator.why_missing()
    rows = [] if why else resources.of_library(compiled.library_path("cuda"))
    cpu = [{**kernel._asdict(), "dtype": dtype_name(kernel.dtype)} for kernel in micro_kernels.table()]
    return {
        "cpu": {"why": compiled.load("cpu"), "kernels": cpu},
        "cuda": {
            "why": why,
            "tiles_why": tiles_why,
            "kernels": [{**row._asdict(), **_tile(row, tiles_why)} for row in rows],
        },
    }


def _tile(row: resources.Resources, tiles_why: Optional[str]) -> dict[str, Any]:
    """What a convolution's tile takes, which the emulator's library knows; else nothing."""
    if row.tile is None or tiles_why is not None:
        return dict.fromkeys(cuda_launches.Tile._fields)
    return cuda_launches.tile_of(row.tile, getattr(torch, row.dtype).itemsize)._asdict()


def print_kernels(found: dict[str, Any], out: Any) -> None:
    cpu, cuda = found["cpu"], found["cuda"]
    table = new_table("kernel", "dtype", "registers", "why that shape", "here", title="Micro-kernels of the CPU")
    for row in cpu["kernels"]:
        runs = "chosen" if row["is_chosen"] else "by its name alone"
        table.add_row(row["name"], row["dtype"], row["registers"], row["reason"], row["why_not"] or runs)
    out.print(table if cpu["kernels"] else f"CPU: none, {cpu['why']}")
    if cuda["why"]:
        return out.print(f"CUDA: none are listed, {cuda['why']}", markup=False)
    if cuda["tiles_why"]:
        out.print(f"without tiles: {cuda['tiles_why']}", markup=False)
    table = new_table(
        "kernel", "dtype", "tile", "rows x columns", "stages", "cluster", "threads", "shared", "architectures",
        "registers", "spills",
        title="Kernels of CUDA: of a thread the registers and the bytes of its stack, where spills go",
    )  # fmt: skip
    for same in _grouped(cuda["kernels"]):
        table.add_row(*map(_text, _cells(same)))
    out.print(table)


def _grouped(kernels: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One kernel for its architectures together, in the order of names."""

    def key(row: dict[str, Any]) -> tuple:
        tile, copied, width = (-1 if row[name] is None else row[name] for name in ("tile", "copy_bytes", "width"))
        return row["kernel"], row["dtype"], tile, -copied, width, "90a" in row["arch"]

    return [list(rows) for _, rows in groupby(sorted(kernels, key=key), key)]


def _cells(same: list[dict[str, Any]]) -> list[Any]:
    row = same[0]
    tile = row["tile"]
    if row["copy_bytes"] is not None:
        tile = f"{tile}, copies of {row['copy_bytes'] or 'one element'}"
    if row["width"] is not None:
        tile = f"{tile}, {row['width']} channels wide"
    shape = row["block_m"] and f"{row['block_m']} x {row['block_n']}"
    spills = {each["stack_bytes"] for each in same}
    return [
        row["kernel"], row["dtype"], tile, shape, row["stages"], row["cluster"], row["threads"], row["shared_bytes"],
        " ".join(each["arch"].removeprefix("sm_") for each in same), " ".join(str(each["registers"]) for each in same),
        0 if spills == {0} else " ".join(str(each["stack_bytes"]) for each in same),
    ]  # fmt: skip


def _text(value: Any) -> str:
    return "" if value is None else str(value)
