"""What setup.py decides to build, and whole builds: a wheel, an installation without a compiler, an edit."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.scripts import ROOT

PACKAGE = ROOT / "fused_resnet"
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree, not only the wheel")


# ------------------------------------------------------------------------------------------------------------ setup.py


@pytest.fixture(scope="module")
def setup_py():
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree, not only the wheel")
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(setup_py, monkeypatch):
    """A machine that has everything, to take things away from."""
    for name in ("FUSED_RESNET_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    tools = object.__new__(setup_py.Toolchain)
    tools.torch, tools.pybind11, tools.ninja = torch, object(), "ninja"
    tools.cxx, tools.nvcc, tools.nvcc_version = "g++", "nvcc", "13.0"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup_py, "_why_no_host_checks", lambda tools: None)
    return tools


def skipped(parts) -> dict:
    return {part.name: part.why for part in parts if not part.is_built}


def test_everything_is_built_where_everything_is_there(setup_py, tools):
    assert skipped(setup_py.plan(tools)) == {}


@pytest.mark.parametrize(
    "missing, parts, why",
    [
        ("cxx", {"cpu", "cuda", "ptx", "host_checks"}, "C++ compiler"),
        ("ninja", {"cpu", "cuda", "ptx", "host_checks"}, "ninja"),
        ("torch", {"cpu", "cuda", "ptx", "host_checks"}, "torch"),
        ("nvcc", {"cuda"}, "nvcc"),
    ],
)
def test_what_is_missing_is_skipped_with_a_reason(setup_py, tools, missing, parts, why):
    setattr(tools, missing, None)
    reasons = skipped(setup_py.plan(tools))
    assert set(reasons) == parts
    assert all(why in reason for reason in reasons.values())


def test_cuda_is_not_built_unasked_beside_a_cpu_torch(setup_py, tools, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not a CUDA build" in skipped(setup_py.plan(tools))["cuda"]
    monkeypatch.setenv("FUSED_RESNET_CUDA", "1")
    assert skipped(setup_py.plan(tools)) == {}


def test_cuda_is_not_built_unasked_with_another_major(setup_py, tools, monkeypatch):
    tools.nvcc_version = "12.8"
    assert "12.8" in skipped(setup_py.plan(tools))["cuda"]


def test_cuda_can_be_declined_and_required(setup_py, tools, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CUDA", "0")
    assert set(skipped(setup_py.plan(tools))) == {"cuda"}
    monkeypatch.setenv("FUSED_RESNET_CUDA", "1")
    tools.nvcc = None
    with pytest.raises(setup_py.SetupError, match="nvcc was not found.*CUDA_HOME"):
        setup_py.plan(tools)
    monkeypatch.setenv("FUSED_RESNET_CUDA", "yes")
    with pytest.raises(setup_py.SetupError, match="0, 1 or unset"):
        setup_py.plan(tools)


def test_arch_list(setup_py, tools, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0; 9.0a+PTX")
    assert setup_py.cuda_archs(tools) == ["8.0", "9.0a+PTX"]
    assert setup_py._gencode(["8.0", "9.0a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    for archs in (["8.0", "9.0a+PTX"], ["9.0", "10.0+PTX"]):
        assert setup_py._gencode(archs, "cuda/sm90/conv_bn_act.cu") == [
            "-gencode=arch=compute_90a,code=sm_90a",
            "-DFUSED_RESNET_SM90",
        ]
    without = ["8.0", "10.0+PTX"]
    assert setup_py._gencode(without, "cuda/sm90/conv_bn_act.cu") == setup_py._gencode(without)
    for wrong, why in (("7.5", "too old"), ("Hopper", "not an arch")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(setup_py.SetupError, match=why):
            setup_py.cuda_archs(tools)


def test_summary_is_honest(setup_py, tools):
    tools.nvcc = None
    record = setup_py.BuildParts._record(setup_py.plan(tools), tools)
    text = setup_py.summary(record)
    assert "built    _C_cpu.so" in text
    assert "skipped  _C_cuda.so: nvcc was not found. To have it: install the CUDA toolkit" in text


# ------------------------------------------------------------------------------------------------------- whole builds

EXCLUDED = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "*.egg-info", "*.so", "_build.json", "__pycache__", "results"
)
IN_THE_WHEEL = "import json; from fused_resnet.kernels import compiled; print(json.dumps(compiled.status()))"


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def copied_sources(folder) -> Path:
    shutil.copytree(ROOT, folder / "sources", ignore=EXCLUDED)
    return folder / "sources"


@pytest.fixture
def sources(tmp_path):
    return copied_sources(tmp_path)


def pip(*args, **env):
    command = [sys.executable, "-m", "pip", *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(sources, out, **env) -> Path:
    pip("wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, sources, FUSED_RESNET_CUDA="0", **env)
    (wheel,) = out.glob("*.whl")
    return wheel


class Build(NamedTuple):
    """A wheel, and the sources it was built from, where the objects still lie."""

    wheel: Path
    sources: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiled once for all tests, in a fifth of the time by a compiler that does not optimise.

    What `make` builds is optimised, and all other tests run on that.
    """
    folder = tmp_path_factory.mktemp("build")
    sources = copied_sources(folder)
    compiler = folder / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    (sources / "fused_resnet" / "configs").mkdir(exist_ok=True)
    (sources / "fused_resnet" / "configs" / "some_device.json").write_text("{}")
    environment = {"FUSED_RESNET_CUDA": "0", "CXX": str(compiler)}
    return Build(build_wheel(sources, folder / "wheels", CXX=str(compiler)), sources, environment)


def status_of_installed(wheel, tmp_path) -> dict:
    """Installed beside this environment's torch, used from elsewhere than the sources."""
    target = tmp_path / "site"
    pip("install", "-q", "--no-deps", "--target", target, wheel)
    env = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-c", IN_THE_WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_sources
@pytest.mark.full
@NEEDS_COMPILER
def test_wheel_is_complete_and_works(build, tmp_path):
    files = set(zipfile.ZipFile(build.wheel).namelist())
    host_checks = "_host_checks" + sysconfig.get_config_var("EXT_SUFFIX")
    for name in (
        "__init__.py",
        "py.typed",
        "_build.json",
        "configs/some_device.json",
        "_C_cpu.so",
        "_ptx.so",
        host_checks,
    ):
        assert f"fused_resnet/{name}" in files
    assert not [name for name in files if name.startswith(("csrc", "tests", "build"))]
    status = status_of_installed(build.wheel, tmp_path)
    assert status["_C_cpu"] == {"present": True, "loaded": True, "why": None}
    assert "FUSED_RESNET_CUDA=0" in status["_C_cuda"]["why"]


@needs_sources
@pytest.mark.full
def test_install_without_a_compiler(sources, tmp_path):
    """A PATH with no compiler: a pure-Python wheel that knows what it lacks, and works without it."""
    wheel = build_wheel(sources, tmp_path / "wheels", PATH=str(tmp_path), CXX="")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    status = status_of_installed(wheel, tmp_path)
    assert all("no C++ compiler was found" in part["why"] for part in status.values())


@needs_sources
@pytest.mark.full
@NEEDS_COMPILER
def test_rebuilding_compiles_only_what_changed(build):
    """In place, where the wheel was built."""
    package = build.sources / "fused_resnet"

    def in_place() -> str:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**os.environ, **build.environment}
        result = subprocess.run(command, capture_output=True, text=True, cwd=build.sources, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert list((build.sources / "build").rglob("*.o")) and not list(package.glob("*.so"))
    again = in_place()
    assert "no work to do" in again and "] compile" not in again
    assert len(list(package.glob("*.so"))) == 3
    header = build.sources / "csrc" / "common" / "checks.h"
    header.write_text(header.read_text() + "\n")
    touched = in_place()
    assert "cpu/add_relu.cpp" in touched and "host_checks.cpp" not in touched


# Instead of a compiler: writes which files are included, as -MD does, and an empty output.
ONLY_DEPENDENCIES = """#!{python}
import re, sys
from pathlib import Path
options = dict(zip(sys.argv, sys.argv[1:]))
folders = [Path(option[2:]) for option in sys.argv if option.startswith("-I")]
found, left = set(), [Path(options["-c"])] if "-c" in options else []
while left:
    file = left.pop()
    found.add(file)
    named = re.findall('^#include "(.+)"', file.read_text(), re.MULTILINE)
    candidates = (folder / name for name in named for folder in (file.parent, *folders))
    left += [header for header in candidates if header.exists() and header not in found]
if found:
    Path(options["-MF"]).write_text(options["-o"] + ": " + " ".join(map(str, found)))
Path(options["-o"]).touch()
"""


@pytest.fixture
def ninja(setup_py, sources, tools, tmp_path, monkeypatch):
    """All parts as if they had just been built. Called, it says which commands ninja would run now."""
    command = shutil.which("ninja") or pytest.importorskip("ninja").BIN_DIR + "/ninja"
    compiler = tmp_path / "compiler"
    compiler.write_text(ONLY_DEPENDENCIES.replace("{python}", sys.executable))
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(setup_py, "CSRC", sources / "csrc")
    tools.cxx = tools.nvcc = str(compiler)
    tools.pybind11 = types.SimpleNamespace(get_include=lambda: "pybind11")
    targets = setup_py.write_ninja(setup_py.plan(tools), tools, tmp_path)
    subprocess.run([command, "-C", tmp_path, *targets], check=True, capture_output=True)

    def would_run() -> list[str]:
        dry = subprocess.run([command, "-n", "-C", tmp_path, *targets], check=True, capture_output=True, text=True)
        return re.findall(r"^\[\d+/\d+\] (.+)", dry.stdout, re.MULTILINE)

    return would_run


@pytest.fixture
def make(sources):
    """The package as if make had just built it. Called, it says which commands make would run now."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "FUSED_RESNET_CUDA")}
    env = {name: value for name, value in env.items() if not name.startswith(("MAKE", "MFLAGS"))}
    (sources / ".venv").mkdir()
    for stamp in (".installed", ".built"):
        (sources / ".venv" / stamp).touch()

    def would_run() -> list[str]:
        command = ["make", "-n", ".venv/.built"]
        dry = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sources, env=env)
        return [line for line in dry.stdout.splitlines() if not line.startswith("make:")]

    return would_run


@needs_sources
def test_an_edit_anywhere_in_csrc_builds_again(sources, ninja, make):
    """Every file, one after the other: make calls the build, and ninja makes what that file is part of."""
    assert make() == [] and ninja() == []
    files = [file for file in sorted((sources / "csrc").rglob("*")) if file.is_file()]
    assert {file.parent.relative_to(sources / "csrc").as_posix() for file in files} >= {"common", "cpu", "cuda/sm80"}
    libraries = {
        "cpu": {"_C_cpu.so"},
        "cuda": {"_C_cuda.so"},
        "ptx": {"_ptx.so"},
        "host_checks": set(),
        "common": set(),
    }
    for file in files:
        before = file.stat()
        os.utime(file, (before.st_atime, before.st_mtime + 1e6))
        assert any("pip install" in line for line in make()), file
        commands = ninja()
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        linked = {command.split()[1] for command in commands if command.startswith("link")}
        if file.parent.name == "sanitized":  # only what benchmarks/cpu_check/sanitizers.py compiles has it
            assert commands == []
            continue
        assert linked >= libraries[file.relative_to(sources / "csrc").parts[0]] and linked, file
        if file.suffix in (".cpp", ".cu"):
            assert len(commands) == 2 and commands[0].endswith(str(file)), commands
    assert make() == [] and ninja() == []


@pytest.mark.parametrize("target", ["demo", "test", "test-full", "lint", "evidence", "cpu-check", "gpu-check", "clean"])
def test_makefile_targets_with_a_given_interpreter_install_nothing(target):
    done = subprocess.run(["make", "-n", target, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout


def test_requirements_are_exact():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert all("==" in line.split(";")[0] for line in lines if line)
