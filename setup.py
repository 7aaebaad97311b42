"""Builds the compiled parts with ninja: _C_cpu.so, _C_cuda.so (LibTorch stable ABI, no Python.h), _ptx.so (the PTX
emulator, plain C++) and _host_checks.

Each part is optional. What cannot be built is skipped, said so at the end, and recorded in fused_resnet/_build.json,
which `fused-resnet info` reads back. One environment variable is ours:

    FUSED_RESNET_CUDA   unset: build _C_cuda if torch is a CUDA build and a matching nvcc is there
                        1: build it, also beside a CPU torch, or fail; 0: do not

TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean for every torch extension.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "fused_resnet"
CSRC = ROOT / "csrc"
VERSION = re.search(r'^__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(), re.MULTILINE).group(1)

TORCH_TARGET = "0x020b000000000000"  # 2.11: the oldest torch the libraries load into
# Ampere to Blackwell, as far as the compiler knows them; the newest also as PTX, for what comes after.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class Part(NamedTuple):
    """One shared library: what it is compiled from, or why it is not built and what to do about that."""

    name: str
    filename: str
    sources: tuple[str, ...] = ()
    why: Optional[str] = None
    what_to_do: Optional[str] = None

    @property
    def is_built(self) -> bool:
        return self.why is None


class Toolchain:
    """What this machine can compile with. Nothing here fails: a missing tool is None."""

    def __init__(self) -> None:
        self.torch = _import_or_none("torch")
        self.pybind11 = _import_or_none("pybind11")
        self.ninja = _find_ninja()
        self.cxx = _find_compiler()
        self.nvcc = _find_nvcc()
        self.nvcc_version = _nvcc_version(self.nvcc)

    @property
    def torch_cuda(self) -> Optional[str]:
        return self.torch and self.torch.version.cuda

    @property
    def torch_include(self) -> str:
        return str(Path(self.torch.__file__).parent / "include")

    @property
    def torch_lib(self) -> str:
        return str(Path(self.torch.__file__).parent / "lib")

    def missing(self) -> Optional[tuple[str, str]]:
        """The tool without which nothing can be compiled, and what to do."""
        if sys.platform != "linux":
            return f"the compiled parts are written for Linux, not {sys.platform}", "use Linux; the rest works as it is"
        if self.torch is None:
            return "torch cannot be imported during the build", "install torch, then pip install --no-build-isolation"
        if self.cxx is None:
            return "no C++ compiler was found", "install g++ or clang++, or point CXX at one"
        if self.ninja is None:
            return "ninja was not found", "pip install ninja"
        return None


def plan(tools: Toolchain) -> list[Part]:
    """All parts, each with its sources or with the reason it is skipped. Fails only if CUDA was asked for in vain."""
    wish = os.environ.get("FUSED_RESNET_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"FUSED_RESNET_CUDA must be 0, 1 or unset, got {wish!r}.")
    parts = [
        _part(tools, "cpu", "_C_cpu.so"),
        _part(tools, "cuda", "_C_cuda.so", _why_no_cuda(tools, wish)),
        _part(tools, "ptx", "_ptx.so"),
        _part(
            tools, "host_checks", "_host_checks" + sysconfig.get_config_var("EXT_SUFFIX"), _why_no_host_checks(tools)
        ),
    ]
    cuda = parts[1]
    if wish == "1" and not cuda.is_built:
        raise SetupError(f"FUSED_RESNET_CUDA=1, but {cuda.why}. To go on: {cuda.what_to_do}.")
    return parts


def _part(tools, name, filename, skip: Optional[tuple[str, str]] = None) -> Part:
    skip = tools.missing() or skip
    return Part(name, filename, (), *skip) if skip else Part(name, filename, _sources(name))


def _sources(name: str) -> tuple[str, ...]:
    """What a part is compiled from, as paths below csrc/: everything in the folder of its name."""
    files = (file for pattern in ("*.cpp", "*.cu") for file in (CSRC / name).rglob(pattern))
    return tuple(sorted(file.relative_to(CSRC).as_posix() for file in files))


def _why_no_cuda(tools: Toolchain, wish: str) -> Optional[tuple[str, str]]:
    if wish == "0":
        return "FUSED_RESNET_CUDA=0 said so", "build again without it"
    if wish == "" and not tools.torch_cuda:
        version = tools.torch.__version__ if tools.torch else "missing"
        return (
            f"torch {version} is not a CUDA build",
            "install torch for CUDA, or set FUSED_RESNET_CUDA=1 to build anyway",
        )
    if tools.nvcc is None:
        return "nvcc was not found", "install the CUDA toolkit, or point CUDA_HOME at it"
    if tools.nvcc_version is None:
        return f"{tools.nvcc} does not say its version", "repair the CUDA toolkit"
    majors = [version.split(".")[0] for version in (tools.torch_cuda or "", tools.nvcc_version)]
    if wish == "" and majors[0] != majors[1]:
        return (
            f"nvcc is {tools.nvcc_version} and torch was built for CUDA {tools.torch_cuda}",
            "point CUDA_HOME at a toolkit of the same major version, or set FUSED_RESNET_CUDA=1 to build anyway",
        )
    return None


def _why_no_host_checks(tools: Toolchain) -> Optional[tuple[str, str]]:
    if tools.pybind11 is None:
        return "pybind11 is not installed (only the tests need it)", "pip install pybind11"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is missing (only the tests need it)", "install Python's development headers"
    return None


def cuda_archs(tools: Toolchain) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), or every default the compiler knows and PTX of the newest."""
    wanted = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted != [""]:
        for arch in wanted:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise SetupError(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not an arch; write them as 8.0;9.0a+PTX.")
            if float(re.match(r"\d+\.\d", arch).group()) < 8.0:
                raise SetupError(f"TORCH_CUDA_ARCH_LIST: {arch} is too old; the kernels need 8.0 or later.")
        return wanted
    known = subprocess.run([tools.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in DEFAULT_ARCHS if "compute_" + arch.replace(".", "") in known]
    return [*archs[:-1], archs[-1] + "+PTX"]


def _gencode(archs: list[str], source: str = "") -> list[str]:
    """The architectures that a source is compiled for: what is in sm90/ for 9.0a alone, if 9.0 is among them."""
    if source.startswith("cuda/sm90/") and any(arch.startswith("9.0") for arch in archs):
        return ["-gencode=arch=compute_90a,code=sm_90a", "-DFUSED_RESNET_SM90"]
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Flags(NamedTuple):
    """How one part is compiled and linked; nvcc's are without architectures."""

    cxx: list[str]
    nvcc: list[str]
    link: list[str]


def flags(part: Part, tools: Toolchain) -> Flags:
    ours = "-I" + shlex.quote(str(CSRC)).replace("$", "$$")  # for the shell, then for ninja
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", ours]
    if part.name == "host_checks":
        includes = ["-I" + tools.pybind11.get_include(), "-I" + sysconfig.get_path("include")]
        return Flags([*common, "-O2", *WARNINGS, *includes, "-isystem", tools.torch_include], [], [])
    if part.name == "ptx":  # neither torch nor Python; fused multiply-adds only where PTX says so
        interface = _load_file("interface", PACKAGE / "emulation" / "interface.py")
        digest = f'-DFUSED_RESNET_PTX_INTERFACE=\\"{interface.digest()}\\"'
        return Flags([*common, "-O3", "-ffp-contract=off", "-fno-math-errno", *WARNINGS, digest], [], [])
    schemas = _load_file("schemas", PACKAGE / "operators" / "schemas.py")
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        "-DTORCH_STABLE_ONLY",
        f'-DFUSED_RESNET_SCHEMA_DIGEST=\\"{schemas.digest(part.name)}\\"',
    ]
    cxx = [*common, "-O3", *WARNINGS, *defines, "-isystem", tools.torch_include]
    # libtorch.so stands for all of torch's libraries; a CUDA torch's brings libtorch_cuda.so, where the stream is
    link = ["-Wl,--no-as-needed", f"-L{tools.torch_lib}", "-ltorch", "-ltorch_cpu"]
    if part.name == "cpu":
        return Flags(cxx, [], link)
    nvcc = [
        "-std=c++17", "-O3", "-DUSE_CUDA", *defines, ours, "-isystem", tools.torch_include, f"-ccbin={tools.cxx}",
        "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2",
    ]  # fmt: skip
    # nvcc links, since it knows where its runtime is; that runtime stays private, torch has brought its own
    through_nvcc = [flag.replace("-Wl,", "-Xlinker=") for flag in (*link, "-Wl,--exclude-libs=ALL")]
    return Flags([*cxx, "-DUSE_CUDA"], nvcc, [f"-ccbin={tools.cxx}", "-cudart=static", *through_nvcc])


def write_ninja(parts: list[Part], tools: Toolchain, build_dir: Path, more: Sequence[str] = ()) -> list[str]:
    """build.ninja for all parts that can be built. Returns the targets, relative to build_dir.

    more: flags for the C++ compiler besides, where it compiles and where it links.
    """
    lines = [
        "rule cxx",
        f"  command = {tools.cxx} $flags -MMD -MF $out.d -c $in -o $out",
        "  description = compile $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {tools.nvcc} $flags -MD -MF $out.d -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $linker -shared $in $flags -o $out",
        "  description = link $out",
    ]
    targets = []
    for part in parts:
        if not part.is_built:
            continue
        plain, objects = flags(part, tools), []
        archs = cuda_archs(tools) if part.name == "cuda" else []
        part_flags = plain._replace(cxx=[*plain.cxx, *more], link=[*plain.link, *more])
        for source in part.sources:
            rule, compile_flags = "cxx", part_flags.cxx
            if source.endswith(".cu"):
                rule, compile_flags = "nvcc", [*part_flags.nvcc, *_gencode(archs, source)]
            objects.append(f"{source}.o")
            lines += [f"build {objects[-1]}: {rule} {_escaped(CSRC / source)}", f"  flags = {' '.join(compile_flags)}"]
        linker = tools.nvcc if part.name == "cuda" else tools.cxx
        lines += [
            f"build {part.filename}: link {' '.join(objects)}",
            f"  linker = {linker}",
            f"  flags = {' '.join(part_flags.link)}",
        ]
        targets.append(part.filename)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
    return targets


class BuildParts(build_ext):
    """setuptools' build_ext, doing the whole of it with ninja; the one Extension below only makes wheels binary."""

    def run(self) -> None:
        tools = Toolchain()
        parts = plan(tools)
        build_dir = Path(self.build_temp).resolve() / f"ninja-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        record = self._record(parts, tools)
        built = [part for part in parts if part.is_built]
        if built:
            targets = write_ninja(parts, tools, build_dir)
            command = [tools.ninja, "-C", str(build_dir), *targets]
            if jobs := os.environ.get("MAX_JOBS"):
                command += ["-j", jobs]
            print(" ".join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise SetupError(
                    "compiling fused_resnet failed, see above. If it was _C_cuda, FUSED_RESNET_CUDA=0 leaves it out."
                )
        out = self._package_dir()
        out.mkdir(parents=True, exist_ok=True)
        for part in parts:
            target = out / part.filename
            if part.is_built:
                _replace(build_dir / part.filename, target)
            elif target.exists():
                target.unlink()  # of an earlier build: it would contradict the record
        (out / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
        self._outputs = [str(out / part.filename) for part in built] + [str(out / "_build.json")]
        print("\n" + summary(record), flush=True)

    def get_outputs(self) -> list[str]:
        return getattr(self, "_outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _package_dir(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return PACKAGE if in_place else Path(self.build_lib).resolve() / "fused_resnet"

    @staticmethod
    def _record(parts: list[Part], tools: Toolchain) -> dict:
        has_cuda = any(part.name == "cuda" and part.is_built for part in parts)
        sources = _load_file("sources", PACKAGE / "kernels" / "sources.py")
        return {
            "version": VERSION,
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": tools.torch and tools.torch.__version__,
            "compiler": tools.cxx and _first_line([tools.cxx, "--version"]),
            "nvcc": tools.nvcc_version if has_cuda else None,
            "cuda_archs": cuda_archs(tools) if has_cuda else [],
            "sources": sources.compiled_digests(ROOT),
            "parts": {
                part.name: {
                    "file": part.filename,
                    "built": part.is_built,
                    "why": part.why,
                    "what_to_do": part.what_to_do,
                }
                for part in parts
            },
        }


def summary(record: dict) -> str:
    """What was built and what was not, for the end of the build's output."""
    lines = [f"fused_resnet {record['version']} for torch {record['torch']}:"]
    for part in record["parts"].values():
        if part["built"]:
            archs = f" (nvcc {record['nvcc']}, {' '.join(record['cuda_archs'])})" if "cuda" in part["file"] else ""
            lines.append(f"  built    {part['file']}{archs}")
        else:
            lines.append(f"  skipped  {part['file']}: {part['why']}. To have it: {part['what_to_do']}.")
    return "\n".join(lines)


def _replace(source: Path, target: Path) -> None:
    """A copy under a new inode: a process that has the old library mapped keeps it unharmed."""
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


def _import_or_none(name: str):
    try:
        return __import__(name)
    except ImportError:
        return None


def _load_file(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _find_compiler() -> Optional[str]:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def _find_ninja() -> Optional[str]:
    module = _import_or_none("ninja")
    if module is not None and (path := shutil.which("ninja", path=module.BIN_DIR)):
        return path
    return shutil.which("ninja")


def _find_nvcc() -> Optional[str]:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (path := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return path
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _nvcc_version(nvcc: Optional[str]) -> Optional[str]:
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", output)
    return found and found.group(1)


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def _escaped(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


if __name__ == "__main__":
    setup(
        version=VERSION,
        packages=find_packages(include=["fused_resnet", "fused_resnet.*"]),
        package_data={"fused_resnet": ["py.typed", "**/*.json", "*.jinja"]},
        ext_modules=[Extension("fused_resnet._host_checks", sources=["csrc/host_checks/host_checks.cpp"])],
        cmdclass={"build_ext": BuildParts},
    )
