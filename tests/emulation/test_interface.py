"""Python's side of the C interface is the headers', and a library that was built for another one is not loaded."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from fused_resnet.emulation import Kernel, interface, library
from fused_resnet.kernels import compiled
from tests.support.scripts import ROOT

HEADERS = ROOT / "csrc" / "ptx"


def test_structures_are_those_of_the_headers(tmp_path):
    """Their sizes, and where each field lies, asked of a C++ compiler."""
    lines, wanted = [], []
    for structure in interface.STRUCTURES:
        name = structure.__name__
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        wanted.append(f"{name} {ctypes.sizeof(structure)}")
        for field, _ in structure._fields_:
            place = f"offsetof({name}, {field}), sizeof({name}::{field})"
            lines.append(f'std::printf("{name}.{field} %zu %zu\\n", {place});')
            wanted.append(f"{name}.{field} {getattr(structure, field).offset} {getattr(structure, field).size}")
    source, program = tmp_path / "sizes.cpp", tmp_path / "sizes"
    headers = "".join(f'#include "ptx/{name}.h"\n' for name in ("interface", "conv_launch"))
    source.write_text("#include <cstddef>\n#include <cstdio>\n" + headers + "int main() {" + "\n".join(lines) + "}")
    made = subprocess.run(["c++", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)],
                          capture_output=True, text=True)  # fmt: skip
    if made.returncode and "not found" in made.stderr:
        pytest.skip(f"needs a C++ compiler: {made.stderr}")
    assert made.returncode == 0, made.stderr
    assert subprocess.run([program], capture_output=True, text=True).stdout.splitlines() == wanted


def test_nothing_of_the_headers_is_left_out():
    text = "".join((HEADERS / f"{name}.h").read_text() for name in ("interface", "conv_launch"))
    assert re.findall(r"^struct (\w+) {", text, re.M) == [each.__name__ for each in interface.STRUCTURES]
    assert set(re.findall(r"\b(ptx_\w+)\(", text)) == set(interface.FUNCTIONS)


def constants(header, enum):
    """Their names, in order."""
    body = (HEADERS / header).read_text().split(f"enum {enum} ")[1].split("{")[1].split("}")[0]
    return body.replace(",", " ").split()


def as_constant(name):
    return "k" + "".join(part.capitalize() for part in re.split("[._]", name))


def test_names_are_in_the_order_of_the_headers():
    assert constants("program.h", "OperandKind") == [*map(as_constant, interface.OPERAND_KINDS)]
    assert constants("program.h", "SpecialRegister") == [*map(as_constant, interface.SPECIAL_REGISTERS)]
    types = [name.lower() for name in constants("values.h", "Type")]
    assert types[: len(interface.TYPE_NAMES)] == ["k" + name for name in interface.TYPE_NAMES]
    assert f"kSharedBase = {interface.SHARED_BASE};" in (HEADERS / "machine" / "memories.h").read_text()


# ------------------------------------------------------------------------------------------------------ another library


@pytest.fixture
def other(monkeypatch, tmp_path) -> Path:
    """Where the library is looked for, and is not; nothing is remembered."""
    monkeypatch.setattr(library, "PATH", tmp_path / "_ptx.so")
    monkeypatch.setattr(library, "library", library.library.__wrapped__)
    return library.PATH


def refusal() -> str:
    with pytest.raises(ImportError) as error:
        Kernel("")
    return str(error.value)


def test_a_missing_library_says_how_to_build_it(other):
    assert "is not built" in refusal() and "pip install" in refusal() and refusal() == library.why_missing()


@pytest.mark.skipif(not library.PATH.exists(), reason=f"{library.PATH.name} is not built")
def test_the_library_has_the_digest_of_this_interface(other):
    built = Path(library.__file__).parents[1] / "_ptx.so"
    assert compiled.embedded_digest(built, "interface of ptx") == interface.digest()
    content = built.read_bytes()
    stale = content.replace(interface.digest().encode(), b"0123456789abcdef")
    assert stale != content
    other.write_bytes(stale)
    assert "0123456789abcdef" in refusal() and interface.digest() in refusal() and "pip install" in refusal()
    assert refusal() == library.why_missing() and str(other) not in Path("/proc/self/maps").read_text()
    other.write_bytes(content)
    assert library.why_missing() is None


def test_a_library_without_a_digest_is_refused(other):
    for content in (b"", b"of a version without one"):
        other.write_bytes(content)
        assert "the interface unknown" in refusal() and "pip install" in refusal()


def test_a_file_that_is_no_library(other):
    other.write_bytes(f"fused_resnet interface of ptx: {interface.digest()}\0".encode())
    assert "cannot be loaded" in refusal() and "pip install" in refusal()


class PtxOperand(ctypes.Structure):
    """With a value that has no sign."""

    _fields_ = [*interface.PtxOperand._fields_[:-1], ("value", ctypes.c_uint64)]


@pytest.mark.parametrize("name, changed", (
    ("STRUCTURES", (PtxOperand, *interface.STRUCTURES[1:])),
    ("FUNCTIONS", {**interface.FUNCTIONS, "ptx_free": (None, ctypes.c_void_p, ctypes.c_int32)}),
    ("SPECIAL_REGISTERS", interface.SPECIAL_REGISTERS[::-1]),
    ("LANDINGS", interface.LANDINGS[1:]),
))  # fmt: skip
def test_a_change_is_another_digest(monkeypatch, name, changed):
    before = interface.digest()
    assert interface.digest() == before
    monkeypatch.setattr(interface, name, changed)
    assert interface.digest() != before
