"""oneDNN's code for Intel AMX on any processor with AVX-512.

    python tests/support/amx.py SCRIPT | -m MODULE | -c CODE

amx.c executes the instructions; here torch's oneDNN is told, before it first looks, that this is a Sapphire Rapids.
A process that has started so stays so. An instruction costs about 2 us, so that times mean nothing.
"""

import ctypes
import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Optional

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_TORCH = Path(torch.__file__).resolve().parent
_CANNOT = 77  # the exit status of a process that cannot be told; its stderr says why

# Statics of dnnl::impl::cpu::x64::amx, set on first use; each has a guard, of the same name behind _ZGVZ.
_AVAILABLE = "12_GLOBAL__N_111amx_settingEvE7setting"
_MAX_PALETTE = "15get_max_paletteEvE3EAX"
_VECTORS = {
    "13get_max_tilesEiE8palettes": 8,
    "12get_max_rowsEiE8palettes": 16,
    "20get_max_column_bytesEiE8palettes": 64,
}
_CPU = "_ZN4dnnl4impl3cpu3x643cpuEv"
_kept: list[ctypes.c_int] = []  # what oneDNN's vectors point to


class _Cpu(ctypes.Structure):
    """The beginning of Xbyak::util::Cpu, which oneDNN makes once."""

    _fields_ = [
        ("features", ctypes.c_uint64),
        ("more_features", ctypes.c_uint64),
        ("cores", ctypes.c_uint32 * 2),
        ("cache_bytes", ctypes.c_uint32 * 10),
        ("cache_sharing", ctypes.c_uint32 * 10),
        ("cache_levels", ctypes.c_uint32),
    ]


_AVX512F = 1 << 35
_AMX_TILE = 1 << 59
_CLAIMED = _AMX_TILE | 1 << 60 | 1 << 61 | 1 << 62 | 1 << 11  # AMX_INT8, AMX_BF16, AVX_VNNI, AVX512_FP16
_SAPPHIRE_RAPIDS_CACHES = (48 << 10, 2 << 20)  # oneDNN chooses its blocks by them


class CannotTell(Exception):
    """oneDNN cannot be told here; the reason."""


@functools.lru_cache(maxsize=None)
def flags() -> set[str]:
    """What Linux says of this processor; nothing elsewhere."""
    if sys.platform != "linux":
        return set()
    found = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def missing() -> Optional[str]:
    """Why oneDNN's AMX code can run neither on this processor nor emulated; None if it can."""
    if "amx_bf16" in flags():
        return None
    if not {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"} <= flags():
        return "needs AMX, or Linux on x86 with AVX-512 and its bf16"
    return next((f"needs {tool} to emulate AMX" for tool in ("gcc", "nm") if shutil.which(tool) is None), None)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process whose oneDNN uses AMX: this processor's or the emulated one. One thread.

    Fresh memory is filled with huge numbers (glibc's MALLOC_PERTURB_), so that what is read unwritten shows.
    """
    if missing():
        pytest.skip(missing())
    command = [sys.executable] if "amx_bf16" in flags() else [sys.executable, str(HERE / "amx.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "128", **environment}
    done = subprocess.run([*command, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode == _CANNOT:
        pytest.skip(done.stderr)
    return done


def build(source: Path, folder: str, *arguments: str) -> ctypes.CDLL:
    """source, compiled into folder by gcc, and loaded."""
    library = Path(folder) / f"{source.stem}.so"
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *arguments]
    done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotTell(f"gcc cannot build {source.name}: {done.stderr[:500]}")
    return ctypes.CDLL(str(library))


def emulator() -> ctypes.CDLL:
    """Executes AMX in this process from now on."""
    arguments = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}")
    with tempfile.TemporaryDirectory() as folder:
        library = build(HERE / "amx.c", folder, *arguments, "-Wl,--no-as-needed", "-lc10")
    if library.amx_install() != 0:
        raise CannotTell("SIGILL cannot be handled")
    return library


def _addresses() -> dict[str, int]:
    """Where oneDNN's functions and statics lie in this process, by mangled name."""
    library = _TORCH / "lib" / "libtorch_cpu.so"
    symbols = subprocess.run(["nm", str(library)], capture_output=True, text=True).stdout
    maps = Path("/proc/self/maps").read_text().splitlines()
    bases = [int(line.split("-")[0], 16) for line in maps if line.endswith(str(library))]
    if not bases:
        raise CannotTell(f"{library} is not loaded")
    found = re.findall(r"^([0-9a-f]+) \w (_Z\w*N4dnnl4impl3cpu3x643(?:amx\w+|cpuEv))$", symbols, re.MULTILINE)
    return {name: min(bases) + int(offset, 16) for offset, name in found}


def tell_onednn() -> None:
    """oneDNN takes this for a Sapphire Rapids from its first call on."""
    where = _addresses()
    statics = [_AVAILABLE, _MAX_PALETTE, *_VECTORS]
    wanted = [_CPU, *(f"{kind}N4dnnl4impl3cpu3x643amx{name}" for name in statics for kind in ("_ZZ", "_ZGVZ"))]
    absent = [name for name in wanted if name not in where]
    if absent:
        raise CannotTell(f"this build of torch has no symbol {absent[0]}")

    cpu = _Cpu.from_address(ctypes.CFUNCTYPE(ctypes.c_void_p)(where[_CPU])())
    if not cpu.features & _AVX512F or cpu.features & _AMX_TILE or not 1 <= cpu.cache_levels <= 4:
        raise CannotTell("this oneDNN describes processors in another way")
    cpu.features |= _CLAIMED
    for level, size in enumerate(_SAPPHIRE_RAPIDS_CACHES):
        cpu.cache_bytes[level], cpu.cache_sharing[level] = size, 1

    def set_static(name, value):
        guard = ctypes.c_uint8.from_address(where[f"_ZGVZN4dnnl4impl3cpu3x643amx{name}"])
        if guard.value:
            raise CannotTell("oneDNN has looked already")
        type(value).from_address(where[f"_ZZN4dnnl4impl3cpu3x643amx{name}"])[:] = value
        guard.value = 1

    set_static(_AVAILABLE, (ctypes.c_uint8 * 1)(1))
    set_static(_MAX_PALETTE, (ctypes.c_uint32 * 1)(1))
    for name, value in _VECTORS.items():  # a std::vector<int> of one: begin, end, end of storage
        element = ctypes.c_int(value)
        _kept.append(element)
        begin = ctypes.addressof(element)
        set_static(name, (ctypes.c_uint64 * 3)(begin, begin + 4, begin + 4))


def main(arguments: list[str]) -> None:
    try:
        library = emulator()
        tell_onednn()
    except CannotTell as reason:
        print(reason, file=sys.stderr)
        sys.exit(_CANNOT)
    library.amx_claim()
    kind, rest = (arguments[0], arguments[1:]) if arguments[0] in ("-m", "-c") else (None, arguments)
    sys.path[0] = os.getcwd() if kind else str(Path(rest[0]).resolve().parent)
    sys.argv = rest if kind != "-c" else ["-c", *rest[1:]]
    if kind == "-m":
        if rest[0] == "pytest":  # whose fault handler would take SIGILL
            sys.argv += ["-p", "no:faulthandler"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
