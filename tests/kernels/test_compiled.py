"""The compiled libraries as Python finds, checks and loads them."""

import json
import sysconfig

import pytest
import torch

from fused_resnet.kernels import compiled
from fused_resnet.operators import schemas
from fused_resnet.operators.library import LIBRARY
from tests.support.libraries import PACKAGE, built

LIBRARIES = tuple(schemas.KERNELS)


@built("cpu")
def test_cpu_library_loads_and_registers():
    assert compiled.load("cpu") is None
    for name, schema in schemas.KERNELS["cpu"].items():
        key = "CPU" if "Tensor" in schema else "CompositeExplicitAutograd"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{LIBRARY.ns}::{name}", key)


@pytest.mark.parametrize("library", [pytest.param(library, marks=built(library)) for library in LIBRARIES])
def test_library_carries_the_digest_of_these_schemas(library):
    path = PACKAGE / f"_C_{library}.so"
    assert compiled.embedded_digest(path, f"schemas of {library}") == schemas.digest(library)
    other = next(name for name in LIBRARIES if name != library)
    assert compiled.embedded_digest(path, f"schemas of {other}") is None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`compiled` with an empty directory instead of the package's, and nothing remembered."""
    monkeypatch.setattr(compiled, "_DIRECTORY", tmp_path)
    compiled.build_record.cache_clear()
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    monkeypatch.setattr(compiled, "_loaded", set())
    yield tmp_path
    compiled.build_record.cache_clear()


@built("cpu")
def test_other_schemas_are_refused_before_loading(fresh):
    content = (PACKAGE / "_C_cpu.so").read_bytes()
    stale = content.replace(schemas.digest("cpu").encode(), b"0123456789abcdef")
    assert stale != content
    (fresh / "_C_cpu.so").write_bytes(stale)
    reason = compiled.load("cpu")
    assert "0123456789abcdef" in reason and schemas.digest("cpu") in reason and "rebuild" in reason
    assert str(fresh) not in "".join(torch.ops.loaded_libraries)


@pytest.mark.parametrize("library", LIBRARIES)
def test_missing_library_without_a_record(fresh, library):
    assert compiled.load(library).startswith("it is not built: rebuild with")
    assert ("FUSED_RESNET_CUDA=1" in compiled.load(library)) == (library == "cuda")


def test_missing_library_says_what_the_build_recorded(fresh):
    record = {"parts": {"cuda": {"built": False, "why": "nvcc was not found", "what_to_do": "install it"}}}
    (fresh / "_build.json").write_text(json.dumps(record))
    assert compiled.load("cuda") == "it was not built: nvcc was not found; install it"


def test_deleted_library_is_not_called_unbuilt(fresh):
    (fresh / "_build.json").write_text(json.dumps({"parts": {"cpu": {"built": True}}}))
    assert "its file is gone" in compiled.load("cpu")


def test_file_that_is_no_library(fresh):
    marker = f"fused_resnet schemas of cpu: {schemas.digest('cpu')}\0"
    (fresh / "_C_cpu.so").write_bytes(b"not ELF " + marker.encode())
    assert "does not load" in compiled.load("cpu")
    (fresh / "_C_cpu.so").write_bytes(b"")
    assert "schema unknown" in compiled.load("cpu")


@built("cuda")
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_cuda_library_beside_a_cpu_torch_is_declined_politely():
    assert "needs a CUDA build of torch" in compiled.load("cuda")


def test_status_names_every_part_and_explains_what_is_missing():
    status = compiled.status()
    assert set(status) == {"_C_cpu", "_C_cuda", "_host_checks"}
    for part in status.values():
        assert part["present"] or part["why"]
        assert not (part["loaded"] and part["why"])


def test_host_checks_of_another_python_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_DIRECTORY", tmp_path)
    (tmp_path / "_host_checks.cpython-39-x86_64-linux-gnu.so").touch()
    part = compiled.status()["_host_checks"]
    assert not part["present"] and "cpython-39-x86_64-linux-gnu.so is for another Python" in part["why"]
    (tmp_path / f"_host_checks{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert compiled.status()["_host_checks"] == {"present": True, "loaded": None, "why": None}
