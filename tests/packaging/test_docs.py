"""docs/: every Python block runs, every command line parses, every link leads somewhere, the tables are complete.

And all prose, in docstrings too, is in short sentences.
"""

import ast
import functools
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resnet
from fused_resnet import functional
from fused_resnet.backends import record
from fused_resnet.cli.main import cli
from fused_resnet.fusing import adapters
from fused_resnet.kernels.triton import runtime

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of the fenced blocks of a page."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(2)), found[2]) for found in _FENCE.finditer(text) if found[1] == language]


def python_of(page: Path) -> str:
    """The Python blocks of a page as one program, each line where it stands in the page."""
    lines: list[str] = []
    for number, text in blocks(page, "python"):
        lines += [""] * (number - len(lines)) + text.splitlines()
    return "\n".join(lines) + "\n"


def load_cpp_of(page: Path, folder: Path) -> None:
    """Compile the C++ blocks of a page as a kernel for CPUs is compiled, and load them."""
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    tools = setup.Toolchain()
    if (missing := tools.missing()) is not None:
        pytest.skip(missing[0])
    flags = setup.flags(setup.Part("cpu", ""), tools)
    for number, text in blocks(page, "cpp"):
        source, library = folder / f"{page.stem}_{number}.cpp", folder / f"{page.stem}_{number}.so"
        source.write_text(text)
        command = [tools.cxx, *flags.cxx, "-shared", str(source), "-o", str(library), *flags.link]
        done = subprocess.run(shlex.split(" ".join(command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch.ops.load_library(str(library))


@pytest.fixture
def own_registries(monkeypatch):
    """What a page registers is gone after it."""
    monkeypatch.setattr(record, "REGISTRY", {op: dict(known) for op, known in record.REGISTRY.items()})
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))


def test_there_are_pages():
    assert len(PAGES) >= 9 and sum(len(blocks(page, "python")) for page in PAGES) >= 25


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page, own_registries, tmp_path, monkeypatch):
    if page.stem == "add-a-kernel" and not runtime.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1, set before the first import")
    load_cpp_of(page, tmp_path)
    file = tmp_path / f"{page.stem.replace('-', '_')}.py"
    file.write_text(python_of(page))  # a file, because Triton reads a kernel's source
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    monkeypatch.chdir(tmp_path)
    spec.loader.exec_module(module)


def command_lines() -> list[tuple[str, str]]:
    lines = [(page.stem, line) for page in PAGES for _, text in blocks(page, "console") for line in text.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("fused-resnet")]


@pytest.mark.parametrize("page, line", command_lines(), ids=lambda value: value[:60])
def test_command_lines_parse(page, line):
    """As click parses them, without running anything."""
    program, *arguments = shlex.split(line)
    command, context = cli, cli.make_context(program, list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(arguments), parent=context)


def examples_lines() -> list[tuple[str, str]]:
    lines = [(page.stem, line) for page in PAGES for _, text in blocks(page, "console") for line in text.splitlines()]
    return [(page, line) for page, line in lines if "examples/" in line]


@pytest.mark.parametrize("page, line", examples_lines(), ids=lambda value: value[:60])
def test_command_lines_of_examples_parse(page, line):
    words = shlex.split(line)
    place = next(index for index, word in enumerate(words) if word.startswith("examples/"))
    name, arguments = Path(words[place]), words[place + 1 :]
    if name.stem == "train":
        command = cli.commands["train"]
    else:
        spec = importlib.util.spec_from_file_location(f"examples_{name.stem}", ROOT / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        command = module.main
    command.make_context(name.stem, arguments)
    assert words[:place] in (["python"], ["torchrun", "--nproc-per-node", "2"])


def test_command_lines_cover_every_verb():
    documented = " ".join(line for _, line in command_lines())
    assert [name for name in cli.commands if f"fused-resnet {name}" not in documented] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", _FENCE.sub("", page.read_text()))
    assert [target for target in targets if not (page.parent / target).exists()] == []
    if page.stem == "README":
        assert {target for target in targets} >= {other.name for other in PAGES if other != page}


# What add-a-kernel.md has its reader write.
OF_THE_READER = {"csrc/cpu/pointwise.cpp", "fused_resnet/backends/cpu_pointwise.py"}


def test_files_named_in_the_pages_exist():
    folders = [ROOT / name for name in ("", "fused_resnet", "csrc")]
    for page in PAGES:
        for name in re.findall(r"`([\w/.-]+\.(?:py|cu|cuh|h|cpp|md))`", page.read_text()):
            is_there = name in OF_THE_READER or any((folder / name).exists() for folder in folders)
            assert is_there, f"{page.name}: {name}"


# ------------------------------------------------------------------------------------------------------------ tables


def names_in_first_column(page: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def test_api_lists_everything_public_with_its_signature():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = {name.split("(")[0]: name for name in names_in_first_column("api.md")}
    public = {name for name in fused_resnet.__all__ if not name.startswith("_")}
    assert public <= set(listed)
    for name in public:
        value = getattr(fused_resnet, name)
        if inspect.isfunction(value):
            parameters = inspect.signature(value).parameters.values()
            plain = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
            assert listed[name].replace('"', "'") == f"{name}{plain}"
    assert all(f"`{name}`" in text for name in functional.__all__ if name != "activate")
    for name in set(listed) - public:
        for part in name.split(", "):
            module, attribute = part.strip("`").split(".")
            assert hasattr(importlib.import_module("fused_resnet").__dict__[module], attribute), part


_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+_?|[A-Z]{3,}")
_NO_VARIABLES = {"CS_GNU_LIBC_VERSION", "EXT_SUFFIX"}  # what os.confstr and sysconfig are asked


def variables_of(source: str) -> set[str]:
    """Names of environment variables in Python code: what looks like one in a statement or function with os.environ."""
    found = set()
    for statement in ast.parse(source).body:
        parts = [node for node in ast.walk(statement) if isinstance(node, ast.FunctionDef)] or [statement]
        for part in parts:
            if any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(part)):
                texts = [node.value for node in ast.walk(part) if isinstance(node, ast.Constant)]
                found |= {text for text in texts if isinstance(text, str) and _NAME.fullmatch(text)}
    return found - _NO_VARIABLES


def test_variables_of_finds_every_way_of_reading():
    source = """
import os
def f():
    names = ("A_ONE", "B_TWO_")
    return any(name in os.environ for name in names) or os.getenv("C_THREE")
os.environ.setdefault("D_FOUR", "TRUE_NOT_A_NAME ")
def g():
    return {**os.environ, "CXX": "E_ not"}
def h():
    return "NOT_READ"
"""
    assert variables_of(source) == {"A_ONE", "B_TWO_", "C_THREE", "D_FOUR", "CXX"}


def test_every_environment_variable_is_documented():
    files = [*(ROOT / "fused_resnet").rglob("*.py"), ROOT / "setup.py", *(ROOT / "benchmarks").rglob("*.py"),
             ROOT / "tests" / "conftest.py", ROOT / "tests" / "support" / "real_data.py"]  # fmt: skip
    read = set().union(*(variables_of(file.read_text()) for file in files))
    cpp = "".join(file.read_text() for file in (ROOT / "csrc").rglob("*.*"))
    in_cpp = re.findall(r'getenv\("(\w+)"\)', cpp)
    assert len(in_cpp) == cpp.count("getenv(")
    read |= set(in_cpp)
    documented = set(names_in_first_column("environment.md"))
    assert read - documented == set(), "not in docs/environment.md"
    assert documented - read == set(), "in docs/environment.md, but read nowhere"


# ------------------------------------------------------------------------------------------------------------- prose

MOST_WORDS = 25
_NO_PROSE = re.compile(r"^( {4}|\s*\||#).*", re.MULTILINE)  # code, tables, headings
_ITEM = re.compile(r"^\s*([-*]|\d+\.) ", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.?!:])[)\"']*\s+|\n\s*\n")  # a semicolon is none


def long_sentences(text: str) -> list[str]:
    """The sentences of more than MOST_WORDS words. Code, tables and headings are not read."""
    running = _ITEM.sub("\n\n", _NO_PROSE.sub("", _FENCE.sub("\n", text)))
    sentences = [sentence.split() for sentence in _SENTENCE_END.split(running)]
    return [" ".join(words) for words in sentences if sum(any(map(str.isalnum, word)) for word in words) > MOST_WORDS]


def docstrings(source: str) -> list[str]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    return [text for text in found if text]


@functools.cache
def all_docstrings() -> list[tuple[Path, str]]:
    files = [
        file
        for name in ("fused_resnet", "benchmarks", "examples", "tests")
        for file in sorted((ROOT / name).rglob("*.py"))
    ]
    return [(file, text) for file in files for text in docstrings(file.read_text())]


def test_sentences_are_short():
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    prose = [*((page, page.read_text()) for page in pages), *all_docstrings()]
    found = [f"{file.relative_to(ROOT)}: {sentence}" for file, text in prose for sentence in long_sentences(text)]
    assert not found, f"more than {MOST_WORDS} words a sentence:\n" + "\n".join(found)


def test_no_docstring_begins_with_of():
    assert [(file.name, text) for file, text in all_docstrings() if text.startswith("Of ")] == []


_QUOTED = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`")
_BUILT = {"_C_cpu.so", "_C_cuda.so", "_host_checks"}  # what setup.py makes, named as files


def names_in(tree: ast.Module) -> set[str]:
    """Whatever is defined, read, imported or passed by name in a module."""
    fields = (getattr(node, name, None) for node in ast.walk(tree) for name in ("id", "attr", "name", "arg"))
    return {name for name in fields if isinstance(name, str)}


def missing_names(text: str, known: set[str]) -> list[str]:
    """The names in backquotes that are neither known nor torch's."""

    def exists(name: str) -> bool:
        first, *rest = name.split(".")
        if first == "torch":
            return functools.reduce(lambda owner, part: getattr(owner, part, None), rest, torch) is not None
        return name in _BUILT or {first, *rest} <= known

    return [name for name in _QUOTED.findall(text) if not exists(name)]


def test_names_in_docstrings_exist():
    files = sorted((ROOT / "fused_resnet").rglob("*.py"))
    known = {part for file in files for part in (file.stem, file.parent.name)}
    known |= set().union(*(names_in(ast.parse(file.read_text())) for file in files))
    found = [(file.name, missing_names(text, known)) for file, text in all_docstrings() if file in files]
    assert [(file, names) for file, names in found if names] == []


@pytest.mark.parametrize("text, missing", (
    ("`known`, `known.too` and `torch.nn`", []), ("`gone`", ["gone"]), ("`known.gone`", ["known.gone"]),
    ("`torch.gone.too`", ["torch.gone.too"]), ("``gone`` is code, and so is `gone()`", []),
))  # fmt: skip
def test_a_name_that_does_not_exist_is_found(text, missing):
    assert missing_names(text, {"known", "too"}) == missing


_SHORT = "word " * (MOST_WORDS - 1) + "word."
_LONG = f"word {_SHORT}"


@pytest.mark.parametrize(
    "text",
    [_LONG, f"Short: {_LONG}", f"(Short.) {_LONG}", f"- {_LONG}", f"1. short\n2. {_LONG}", f"| cell |\n{_LONG}",
     f"# heading\n{_LONG}", f"```\ncode\n```\n{_LONG}", _LONG.replace(" ", "\n"), _LONG.replace(" ", "; ")],
)  # fmt: skip
def test_a_long_sentence_is_found(text):
    assert len(long_sentences(text)) == 1


@pytest.mark.parametrize(
    "text",
    [_SHORT, _SHORT.replace(" ", " = "), _LONG.replace(" ", ". ", 1), _LONG.replace(" ", "\n\n", 1),
     _LONG.replace(" ", "\n- ", 1), f"    {_LONG}", f"| {_LONG} |", f"  | {_LONG} |", f"## {_LONG}",
     f"```\n{_LONG}\n```", f"```python\n{_LONG}\n```"],
)  # fmt: skip
def test_short_sentences_tables_and_code_may_stay(text):
    assert long_sentences(text) == []


def test_docstrings_are_found_wherever_they_stand():
    source = """
'module'
class A:
    'class'
    def method(self):
        'method'
        async def inner():
            'inner'
        return 'no docstring'
def without():
    pass
"""
    assert set(docstrings(source)) == {"module", "class", "method", "inner"}
