"""csrc/ through nvcc: every kernel compiles for every architecture without spills, into the instructions meant.

No GPU is needed. ptxas reports registers and spills; cuobjdump, from the triton wheel, shows the instructions.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
import torch

from fused_resnet.operators import schemas

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree, not only the wheel")

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
FIRST_TIER = ("80", "90", "100")
SECOND_TIER = ("86", "89", "120")
ARCHS = [*FIRST_TIER, *(pytest.param(arch, marks=pytest.mark.full) for arch in SECOND_TIER)]
INCLUDES = ["-I", CSRC, "-isystem", Path(torch.__file__).parent / "include"]
FLOATS = {"f": "float", "N3c104HalfE": "Half", "NS_8BFloat16E": "BFloat16"}
ELEMENTS = {**FLOATS, "h": "uint8_t", "a": "int8_t"}


class Kernel(NamedTuple):
    """What ptxas -v says about one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


class Compiled(NamedTuple):
    """One .cu file compiled for one architecture."""

    cubin: Path
    log: str

    @property
    def kernels(self) -> list[Kernel]:
        pattern = re.compile(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            re.DOTALL,
        )
        return [Kernel(name, int(used), *map(int, memory)) for name, *memory, used in pattern.findall(self.log)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(source, arch) -> Compiled, each compiled once."""
    done, folder = {}, tmp_path_factory.mktemp("cubins")

    def compile_once(source: str, arch: str) -> Compiled:
        if (source, arch) not in done:
            known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
            if f"compute_{arch.rstrip('a')}" not in known.split():
                pytest.skip(f"this nvcc does not know sm_{arch}")
            cubin = folder / f"{Path(source).name}.{arch}.cubin"
            command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", *INCLUDES]
            command += ["-DFUSED_RESNET_SM90"] if arch == "90a" else []  # as setup.py does
            result = subprocess.run([*command, CSRC / source, "-o", cubin], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert "warning" not in result.stderr, result.stderr
            done[source, arch] = Compiled(cubin, result.stderr)
        return done[source, arch]

    return compile_once


def conv_kernels(compiled: Compiled) -> dict[tuple[str, int, int], Kernel]:
    """(element, tile, bytes of a copy) -> kernel, from the mangled template arguments."""
    return {key: kernel for kernel in compiled.kernels if (key := conv_key(kernel.name)) is not None}


def conv_key(name: str) -> Optional[tuple[str, int, int]]:
    """(element, tile, bytes of a copy) of a convolution kernel's mangled name; None for others."""
    found = re.search(r"conv_bn_act_kernelI(\w+?)Li(\d+)ELi(\d+)E", name)
    return found and (ELEMENTS[found[1]], int(found[2]), int(found[3]))


def sum_kernels(compiled: Compiled) -> dict[str, Kernel]:
    """element -> the kernel that adds up split sums."""
    found = {re.search(r"sum_splits_kernelI(\w+?)EE?v", kernel.name): kernel for kernel in compiled.kernels}
    return {ELEMENTS[match[1]]: kernel for match, kernel in found.items() if match}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_conv_kernels_compile_without_spills(compiled, arch):
    kernels = conv_kernels(compiled("cuda/sm80/conv_bn_act.cu", arch))
    tiles = {tile for _, tile, _ in kernels}
    assert set(ELEMENTS.values()) == {element for element, _, _ in kernels}
    for element in ELEMENTS.values():
        assert {tile for e, tile, copied in kernels if e == element and copied == 16} == tiles
        some = {copied: {tile for e, tile, c in kernels if e == element and c == copied} for copied in (0, 8)}
        assert some[0] == some[8] != set(), "a path for any channel count"
    for key, kernel in kernels.items():
        assert (kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0, 0), (key, kernel)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_conv_kernels_keep_to_the_registers_the_heuristics_count_on(compiled, arch):
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    kernels = conv_kernels(compiled("cuda/sm80/conv_bn_act.cu", arch))
    assert {tile for _, tile, _ in kernels} == set(range(checks.NUM_TILES))
    for (element, tile, copied), kernel in kernels.items():
        if copied == 16:
            assert kernel.registers <= checks.tile(tile)["registers"], (element, tile, kernel)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_split_sums_compile_without_spills_and_overlap_their_loads(compiled, arch):
    kernels = sum_kernels(compiled("cuda/sm80/conv_bn_act.cu", arch))
    assert set(kernels) == set(ELEMENTS.values())
    code = sass(compiled("cuda/sm80/conv_bn_act.cu", arch).cubin)
    for element, kernel in kernels.items():
        assert (kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0, 0), kernel
        # the first sums wait for loads of four splits, 16 bytes each: two per split in half precision, four of bytes
        if element in FLOATS.values():
            before_sums = code[kernel.name].split("FADD")[0]
            assert len(re.findall(r"LDG\.E\.128", before_sums)) == (4 if element == "float" else 8), element


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_pointwise_kernels_compile_without_spills(compiled, arch):
    kernels = compiled("cuda/add_relu.cu", arch).kernels
    assert len(kernels) == 2 * len(FLOATS)
    for kernel in kernels:
        assert kernel[2:] == (0, 0, 0), kernel
        # 1280 threads with two 16-byte loads each: 40 KB on their way, where 4.8 TB/s * 0.7 us over 132
        # multiprocessors needs 25 KB
        assert kernel.registers * 1280 <= 65536, kernel


@functools.lru_cache(maxsize=None)
def sass(cubin: Path) -> dict[str, str]:
    """Kernel name -> instructions. Read once: five tests ask."""
    triton = pytest.importorskip("triton", reason="needs cuobjdump, which the triton wheel brings")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton has no cuobjdump")
    text = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", text)[1:]
    return dict(function.split("\n", 1) for function in functions)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_conv_kernels_use_tensor_cores_and_wide_accesses(compiled, arch):
    cubin = compiled("cuda/sm80/conv_bn_act.cu", arch).cubin
    code = {key: None for key in conv_kernels(compiled("cuda/sm80/conv_bn_act.cu", arch))}
    for name, instructions in sass(cubin).items():
        if (key := conv_key(name)) is not None:
            code[key] = instructions
    mma = {
        "Half": r"HMMA\.16816\.F32\b(?!\.BF16)",
        "BFloat16": r"HMMA\.16816\.F32\.BF16",
        "float": r"HMMA\.1688\.F32\.TF32",
        "uint8_t": r"IMMA\.16832\.U8\.S8",
        "int8_t": r"IMMA\.16832\.S8\.S8",
    }
    for (element, _, copied), instructions in code.items():
        assert re.search(mma[element], instructions)
        assert re.search(r"LDSM\.16\.M88\.4", instructions), "ldmatrix.x4"
        assert re.search(r"STG\.E\.128", instructions), "16-byte stores"
        copies = set(re.findall(r"LDGSTS\.E[\w.]*?(?:\.(128|64))?\s", instructions))
        assert copies == {16: {"128"}, 8: {"64"}, 0: set()}[copied], copies
        assert ("BYPASS" in instructions) == (copied == 16)
        assert not re.search(r"\b(LDL|STL)\b", instructions), "no local memory"


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_conv_kernels_stage_their_output_in_wide_accesses(compiled, arch):
    """Sums go to shared memory in pairs and come back four at a time, with splits and with any activation too."""
    for name, instructions in sass(compiled("cuda/sm80/conv_bn_act.cu", arch).cubin).items():
        if (key := conv_key(name)) is None:
            continue
        # ptxas fills in `@!PT LDS`, which never runs; the unaligned loader stores words
        loads, stores = (set(re.findall(rf"(?<!@!PT )\b{access}\b\.?(\w*)", instructions)) for access in ("LDS", "STS"))
        assert loads == {"128"}, (key, loads)
        assert stores - ({""} if key[2] == 0 else set()) == {"64"}, (key, stores)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_conv_kernels_have_eight_residual_loads_in_flight(compiled, arch):
    """Or as many rows as a thread has, before it stores the first one; for ReLU and for no activation. Bytes have one
    epilogue for all."""
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    for name, instructions in sass(compiled("cuda/sm80/conv_bn_act.cu", arch).cubin).items():
        if (key := conv_key(name)) is None:
            continue
        tile, chunk = checks.tile(key[1]), {"float": 4, "uint8_t": 16, "int8_t": 16}.get(key[0], 8)
        rows = tile["block_m"] * tile["block_n"] // chunk // (32 * tile["warps_m"] * tile["warps_n"])
        loads = [len(re.findall(r"LDG\.E\.128", part)) for part in re.split(r"STG\.E\.128", instructions)]
        assert sum(count >= min(rows, 8) for count in loads) >= (1 if chunk == 16 else 2), (key, rows, loads)


@needs_nvcc
@pytest.mark.parametrize("arch", [arch if arch == "90" else pytest.param(arch, marks=pytest.mark.full)
                                  for arch in (*FIRST_TIER, *SECOND_TIER)])  # fmt: skip
def test_grouped_kernels_keep_their_weights_in_registers(compiled, arch):
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    result = compiled("cuda/sm80/grouped.cu", arch)
    code, found = sass(result.cubin), set()
    for kernel in result.kernels:
        element, tile, width = re.search(r"grouped_conv_kernelI(\w+?)Li(\d+)ELi(\d+)E", kernel.name).groups()
        found.add((ELEMENTS[element], int(tile), int(width)))
        assert (kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0, 0), kernel
        per_tap = int(width) * (4 if element == "f" else 2) // 32
        products = len(re.findall(r"\bHMMA\.", code[kernel.name]))
        assert products == len(re.findall(r"LDSM\.16\.M88\.4", code[kernel.name])) * 2 == 9 * per_tap * 2, kernel
        assert re.search(r"LDGSTS\.E\.BYPASS\.128", code[kernel.name]), "16 bytes at a time, past L1"
    widths = {"float": (16, 32), "Half": (16, 32, 64), "BFloat16": (16, 32, 64)}
    tiles = range(len(checks.GROUPED_TILES))
    assert found == {(element, tile, width) for element in widths for tile in tiles for width in widths[element]}


SM90_SOURCE = ("cuda/sm90/conv_bn_act.cu", "90a")


SM90_PRODUCTS = {
    "Half": "HGMMA.64x{}x16.F32", "BFloat16": "HGMMA.64x{}x16.F32.BF16",
    "uint8_t": "IGMMA.64x{}x32.U8.S8", "int8_t": "IGMMA.64x{}x32.S8.S8",
}  # fmt: skip


def sm90_key(name: str) -> tuple[str, int]:
    """(element, tile) of a kernel for sm_90a, by its mangled name."""
    found = re.search(r"4sm90\d+conv_bn_act_kernelI(\w+?)Li(\d+)E", name)
    return ELEMENTS[found[1]], int(found[2])


@needs_nvcc
def test_sm90_kernels_compile_without_spills(compiled):
    """Within the registers that setmaxnreg counts on. C7510: ptxas runs the products one after another."""
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    result = compiled(*SM90_SOURCE)
    assert "C7510" not in result.log and "setmaxnreg" not in result.log, result.log
    kernels = {sm90_key(kernel.name): kernel for kernel in result.kernels}
    tiles = range(len(checks.SM90_TILES))
    elements = ("Half", "BFloat16", "uint8_t", "int8_t")
    assert set(kernels) == {(element, tile) for element in elements for tile in tiles}
    for (_, tile), kernel in kernels.items():
        assert (kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0, 0), kernel
        assert kernel.registers == checks.sm90_tile(checks.SM90_TILES[tile])["registers"], kernel


@needs_nvcc
def test_sm90_kernels_multiply_by_wgmma_what_tensor_copies_bring(compiled):
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    for name, instructions in sass(compiled(*SM90_SOURCE).cubin).items():
        element, tile = sm90_key(name)
        block_n = checks.sm90_tile(checks.SM90_TILES[tile])["block_n"]
        products = re.findall(r"\b[HI]GMMA\.\S+", instructions)
        # four products of 32 bytes make a stage; the next stage's begin before they are done
        assert products == [SM90_PRODUCTS[element].format(block_n)] * 4, name
        loop = instructions[instructions.index("GMMA.64x") : instructions.rindex("GMMA.64x")]
        assert not re.search(r"WARPGROUP\.DEPBAR|WARPGROUP\.ARRIVE", loop), "the four are one group"
        assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", instructions)
        for copy in ("UTMALDG.2D", "UTMALDG.3D", "UTMALDG.4D.IM2COL", "UTMASTG.2D"):
            assert copy in instructions, (name, copy)
        is_shared = checks.sm90_tile(checks.SM90_TILES[tile])["cluster"] > 1
        assert ("UTMALDG.3D.MULTICAST" in instructions) == ("UCGABAR_ARV" in instructions) == is_shared, name
        assert not re.search(r"\b[HI]MMA\.", instructions) and "USETMAXREG" in instructions
        is_byte = element in ("uint8_t", "int8_t")
        for access in ("LDS.U16", "STS.U16") if is_byte else ("LDSM.16.M88.4", "STSM.16.M88.4"):
            assert access in instructions, (name, access)
        assert not re.search(r"\b(LDL|STL)\b", instructions), "no local memory"


@needs_nvcc
def test_without_sm90_among_the_architectures_its_launcher_compiles_alone(compiled):
    assert compiled("cuda/sm90/conv_bn_act.cu", "80").kernels == []


@needs_nvcc
def test_pointwise_kernels_move_16_bytes_at_a_time(compiled):
    for name, instructions in sass(compiled("cuda/add_relu.cu", "80").cubin).items():
        assert len(re.findall(r"LDG\.E\.128", instructions)) >= 2, name
        assert re.search(r"STG\.E\.128", instructions), name


@pytest.mark.parametrize("header", [
    "common/activation.h", "common/divisor.h", "common/dtype.h", "common/inline.h", "cpu/dispatch.h",
    "cuda/conv_shape.h", "cuda/conv_arguments.h", "cuda/launchers.h", "cuda/sm80/tiles.h", "cuda/sm80/tile_layout.h",
    "cuda/configs.h", "cuda/sm80/grouped_tiles.h", "cuda/sm90/tiles.h", "cuda/sm90/tensor_maps.h",
    "cpu/epilogue.h", "cpu/vectors.h", "cpu/winograd.h", "cpu/grouped.h", "cpu/direct.h",
])  # fmt: skip
def test_headers_stand_alone_without_cuda_or_torch(header, tmp_path):
    """In C++17, with no include path but csrc's and the standard one."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\nint main() {{ return 0; }}\n')
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", CSRC, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("library", schemas.KERNELS)
def test_every_kernel_of_the_schemas_is_registered(library):
    sources = "".join(path.read_text() for path in (CSRC / library).rglob("*.cpp"))
    assert sorted(re.findall(r'm\.impl\("(\w+)"', sources)) == sorted(schemas.KERNELS[library])
