"""`fused-resnet info --kernels`: every row of the CPU's table, and of a library every kernel with its tile."""

import json
import shutil

import pytest
from click.testing import CliRunner

from fused_resnet.cli import kernels, main
from fused_resnet.emulation import cuda_launches
from fused_resnet.emulation import library as emulator
from fused_resnet.kernels import compiled, resources
from fused_resnet.regions import kernels as micro_kernels

LIBRARY = compiled.library_path("cuda")
USAGE = """
arch = sm_80
 Function _ZN12fused_resnet18conv_bn_act_kernelIhLi1ELi8EEEvNS_13ConvArgumentsE:
  REG:188 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:640
arch = sm_86
 Function _ZN12fused_resnet18conv_bn_act_kernelIhLi1ELi8EEEvNS_13ConvArgumentsE:
  REG:190 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:640
arch = sm_80
 Function _ZN12fused_resnet7grouped19grouped_conv_kernelINS_8BFloat16ELi2ELi32EEEvNS_13ConvArgumentsE:
  REG:128 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:640
arch = sm_90a
 Function _ZN12fused_resnet4sm9018conv_bn_act_kernelIN3c104HalfELi3EEEvNS_13ConvArgumentsENS0_9TensorMapES4_:
  REG:128 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[2]:12 CONSTANT[0]:1088
 Function _ZN12fused_resnet16pointwise_kernelINS_8BFloat16ENS_15AddReluBackwardEEEvPKT_S5_PS3_l:
  REG:28 STACK:0 SHARED:0
 Function _ZN12fused_resnet17sum_splits_kernelIfEEvNS_13ConvArgumentsE:
  REG:40 STACK:0 SHARED:0
"""


def put_in_place(monkeypatch, path):
    """A stand-in for _C_cuda.so. What is remembered of the other library stays right."""
    known = compiled.library_path
    monkeypatch.setattr(compiled, "library_path", lambda library: path if library == "cuda" else known(library))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A library of six kernels, as cuobjdump lists them."""
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{USAGE}END\n")
    tool.chmod(0o755)
    monkeypatch.setattr(resources, "cuobjdump", lambda: tool)
    put_in_place(monkeypatch, tmp_path / "cuobjdump")
    monkeypatch.setattr(micro_kernels, "table", lambda: ())


def shown(*options: str) -> str:
    result = CliRunner().invoke(main.cli, ["info", "--kernels", *options])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_each_kernel_has_what_its_name_and_cuobjdump_say(stand_in):
    rows = json.loads(shown("--json"))["cuda"]["kernels"]
    names = (
        "kernel",
        "dtype",
        "tile",
        "copy_bytes",
        "width",
        "arch",
        "registers",
        "stack_bytes",
        "static_shared_bytes",
    )
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("conv_bn_act", "uint8", 1, 8, None, "sm_80", 188, 16, 0),
        ("conv_bn_act", "uint8", 1, 8, None, "sm_86", 190, 0, 0),
        ("grouped_conv", "bfloat16", 62, None, 32, "sm_80", 128, 0, 0),
        ("conv_bn_act", "float16", 93, None, None, "sm_90a", 128, 0, 1024),
        ("add_relu_backward", "bfloat16", None, None, None, "sm_90a", 28, 0, 0),
        ("sum_splits", "float32", None, None, None, "sm_90a", 40, 0, 0),
    ]


@pytest.mark.skipif(emulator.why_missing() is not None, reason=emulator.why_missing() or "")
def test_a_kernels_architectures_share_a_line(stand_in):
    lines = [line.split() for line in shown().splitlines()]
    (conv,) = [line for line in lines if line[:2] == ["conv_bn_act", "uint8"]]
    assert " ".join(conv) == "conv_bn_act uint8 1, copies of 8 128 x 64 3 1 128 73728 80 86 188 190 16 0"
    (tma,) = [line for line in lines if line[:2] == ["conv_bn_act", "float16"]]
    (grouped,) = [line for line in lines if line[:1] == ["grouped_conv"]]
    tile = cuda_launches.tile_of(62, 2)
    shape = f"64 x 64 2 1 256 {tile.shared_bytes}"
    assert " ".join(grouped) == f"grouped_conv bfloat16 62, 32 channels wide {shape} 80 128 0"
    tile = cuda_launches.tile_of(93, 2)
    assert " ".join(tma) == f"conv_bn_act float16 93 64 x 128 3 1 256 {tile.shared_bytes} 90a 128 0"


def test_the_cpus_table_is_whole():
    if compiled.load("cpu") is not None:
        pytest.skip(compiled.load("cpu"))
    found = kernels.collect_kernels()["cpu"]["kernels"]
    assert [row["name"] for row in found] == [kernel.name for kernel in micro_kernels.table()] != []
    text = shown()
    assert all(row["name"] in text for row in found)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    put_in_place(monkeypatch, tmp_path / "_C_cuda.so")
    assert "CUDA: none are listed, _C_cuda.so is not built" in shown()
    (tmp_path / "_C_cuda.so").touch()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "cuobjdump was not found; the CUDA toolkit and the triton package bring it" in shown()


@pytest.mark.skipif(not LIBRARY.exists(), reason="_C_cuda.so is not built")
@pytest.mark.skipif(resources.cuobjdump() is None, reason="needs cuobjdump")
def test_no_kernel_of_the_library_spills():
    found = resources.of_library(LIBRARY)
    kernels_there = {"conv_bn_act", "grouped_conv", "sum_splits", "add_relu", "add_relu_backward"}
    assert {row.kernel for row in found} == kernels_there
    assert [row for row in found if row.stack_bytes] == []
    tiles = {row.tile for row in found if row.arch == "sm_90a"}
    assert not tiles or tiles == set(cuda_launches.SM90_TILES)
