"""What kernels are made from, and when a digest changes."""

import re

import pytest

from fused_resnet import backends
from fused_resnet.kernels import compiled, sources
from fused_resnet.measuring import verified


def test_tools_beside_the_kernels_are_no_kernels(tmp_path):
    for file, is_kernel in (
        ("fused_resnet/kernels/triton/aot.py", False), ("fused_resnet/kernels/triton/conv/launch.py", True),
        ("fused_resnet/kernels/triton/interpreter.py", False), ("fused_resnet/kernels/triton/runtime.py", True),
        ("csrc/cpu/add_relu.cpp", False), ("csrc/cpu/vectors.h", False), ("csrc/host_checks/host_checks.cpp", False),
        ("csrc/common/checks.h", True), ("csrc/cuda/conv_shape.h", True), ("csrc/cuda/operators.cpp", True),
        ("csrc/cuda/sm80/conv_bn_act.cu", True),
    ):  # fmt: skip
        assert (file in verified.gpu_kernels()) == is_kernel, file
    for folder in ("cpu", "cuda"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    assert sources.kernel_digest(sources.CUDA, tmp_path) is None
    digests = []
    for name, text in (("cuda/a.cu", "1"), ("cpu/a.cpp", "1"), ("cpu/a.cpp", "2"), ("cuda/a.cu", "2")):
        (tmp_path / "csrc" / name).write_text(text)
        digests.append(sources.kernel_digest(sources.CUDA, tmp_path))
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_the_build_says_what_the_cuda_kernels_were_compiled_from(monkeypatch):
    """And not the sources beside it, which may have been edited since."""
    built = {"csrc/cuda/a.cu": "0123", "csrc/common/b.h": "4567", "csrc/cpu/c.cpp": "89ab"}
    digests = []
    for changed in ({}, {"csrc/cpu/c.cpp": "other"}, {"csrc/common/b.h": "other"}, {"csrc/cuda/a.cu": "other"}):
        monkeypatch.setattr(compiled, "build_record", lambda changed=changed: {"sources": built | changed})
        digests.append(compiled.built_digest.__wrapped__(sources.CUDA))
    assert digests[0] == digests[1] and len(set(digests[1:])) == 3 and None not in digests
    monkeypatch.setattr(compiled, "build_record", dict)
    assert compiled.built_digest.__wrapped__(sources.CUDA) is None


@pytest.mark.parametrize(
    "name, compiled_from",
    [
        ("winograd", ["winograd"]), ("grouped", ["grouped"]), ("direct", ["direct"]), ("cpu_pass", ["affine_act"]),
        ("blocked", ["blocked/region", "blocked/program", "blocked/kernels", "blocked/int8", "blocked/int8_amx"]),
    ],
)  # fmt: skip
def test_a_cpu_kernel_s_digest_covers_all_it_includes(name, compiled_from):
    """And nothing beside that, but for all of csrc/common."""
    files, found = {f"csrc/cpu/{file}.cpp" for file in compiled_from}, set()
    while files - found:
        file = (files - found).pop()
        found.add(file)
        files |= {f"csrc/{header}" for header in re.findall('#include "(.+)"', (sources.ROOT / file).read_text())}
    patterns = backends.known("conv_bn_act")[name].sources
    covered = {file for file in sources.digests() if sources.is_source(file, patterns)}
    assert found <= covered
    assert {file for file in covered - found if not file.startswith("csrc/common/")} == set()
