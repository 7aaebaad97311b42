"""What importing the package costs, which way imports go, and that backends are told apart by their records alone."""

import ast
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet import backends
from tests.support.scripts import ROOT, script

HEAVY = ("torchvision", "timm", "rich", "matplotlib", "click", "pytest", "hypothesis")
# What torch imports when it is first asked for something, 800 modules in all.
LAZY = (
    "sympy", "mpmath", "triton", "torch._dynamo", "torch._inductor", "torch._functorch", "torch._refs", "torch.export",
    "torch.distributed", "torch.fx.experimental.symbolic_shapes", "torch.utils.flop_counter",
)  # fmt: skip


@functools.lru_cache(maxsize=None)
def imported_by(code):
    """Names of all modules that this code leaves in sys.modules of a fresh process."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    return frozenset(json.loads(last_line_of(code)))


def last_line_of(code):
    done = script("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_the_package_imports_no_heavy_ones():
    names = imported_by("import fused_resnet, fused_resnet.testing")
    assert "fused_resnet.freezing.plan" in names
    assert not [name for name in names if name.split(".")[0] in HEAVY]


def lazily_imported_by(code):
    """Those of LAZY that this code imports and torch alone does not."""
    new = imported_by(code) - imported_by("import torch")
    return sorted(name for name in new if any(f"{name}.".startswith(f"{lazy}.") for lazy in LAZY))


def test_importing_the_package_imports_nothing_that_it_may_not_need():
    assert lazily_imported_by("import fused_resnet") == []


FREEZE = """
import torch, fused_resnet
from torch import nn

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 8)
    def forward(self, x):
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return torch.cat([self.conv(x) * gate + x, 0.5 * x], 1)

layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2, ceil_mode=True)]
layers += [Gated(), nn.ReLU6(), nn.AvgPool2d(2)]
x = torch.randn(1, 3, 32, 32)
for model in (fused_resnet.models.resnet18(), nn.Sequential(*layers)):
    for dtype in (None, torch.bfloat16):
        frozen = fused_resnet.freeze(model.eval(), x, dtype=dtype)
        frozen(torch.randn(2, 3, 32, 40))
        for wrong in (torch.randn(1, 4, 32, 32), torch.randn(3, 32)):
            try:
                frozen(wrong)
            except ValueError:
                continue
            raise AssertionError("taken")
"""


def test_a_freeze_on_a_cpu_imports_only_what_runs():
    """Shapes are known by rules, also where they are wrong, and no kernel in Triton is asked for."""
    assert lazily_imported_by(FREEZE) == []


def test_what_is_imported_later_knows_the_operators():
    """torch.utils.flop_counter imports Triton, so it is not imported to be told of them."""
    code = """
import torch, fused_resnet
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fused_resnet.functional.conv_bn_act(torch.randn(1, 2, 3, 3), torch.randn(4, 2, 1, 1))
assert counter.get_total_flops() == 2 * 4 * 9 * 2
"""
    assert "triton" in imported_by(code) or importlib.util.find_spec("triton") is None


@pytest.mark.full
def test_a_freeze_takes_two_seconds_of_a_processor():
    code = """
import time, torch, fused_resnet
torch.set_num_threads(1)
model, x = fused_resnet.models.resnet50().eval(), torch.randn(1, 3, 224, 224)
start = time.process_time()
fused_resnet.freeze(model, x)
print(time.process_time() - start)
"""
    assert float(last_line_of(code)) < 2


def test_starting_the_command_line_imports_no_rich():
    assert "rich" not in imported_by("import fused_resnet.__main__")


def test_import_linter():
    """The contract in pyproject.toml."""
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if linter is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


# --------------------------------------------------------------------------------------------------- backends by name

# How networks are run as others run them: their names are those of what is compared with us.
RIVALS = {"measuring/rivals.py", "measuring/variants.py", "measuring/summary.py"}
WORDS = {"cuda", "triton", "eager", "cpu"}  # also a kind of device, a language, and what torch does
# What is compared in these words is a kind of device or of window, a part of csrc, or a module that was not found.
NO_BACKENDS = ("device", "kind", "library", "part ==", "value not in ('cpu'", "IMPORT_ERROR.name")


def names_of_backends() -> set[str]:
    return {name for op in ("conv_bn_act", "add_relu", "bn_act") for name in backends.known(op)}


def constants(node: ast.AST) -> set[str]:
    """The strings that stand in an expression: themselves, or in a tuple, list or set."""
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def decisions(source: str, names: set[str]) -> list[str]:
    """What in a module decides by the name of a backend: comparisons, and what is looked up by it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = set().union(*map(constants, sides)) & names
            text = ast.unparse(node)
            if named and not any(word in text for word in NO_BACKENDS):
                found.append(text)
        elif isinstance(node, ast.Subscript) and constants(node.slice) & (names - WORDS):
            if "known" in ast.unparse(node.value):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and set().union(*map(constants, node.args)) & (names - WORDS):
            if any(word in ast.unparse(node.func) for word in ("known", "select", "freeze", "Frozen", "fuse")):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.MatchValue) and constants(node.value) & names:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source, is_one",
    (
        ("if backend.name == 'triton': pass", True),
        ("if name in ('onednn', 'auto'): pass", True),
        ("if 'eager' != name: pass", True),
        ("known()['winograd'].pack(weight)", True),
        ("known().get('cudnn')", True),
        ("if x.device.type == 'cuda': pass", False),
        ("if backend == 'auto': pass", False),
        ("if name == 'cuda': pass", True),
        ("record = {'cudnn': version()}", False),
        ("FrozenModel(model, x, dtype, 'eager')", False),
    ),
)
def test_decisions_by_name_are_found(source, is_one):
    assert bool(decisions(source, names_of_backends())) == is_one


def test_no_file_outside_backends_decides_by_a_backends_name():
    """What is to be known about a backend stands in its record."""
    package = ROOT / "fused_resnet"
    files = [file for file in sorted(package.rglob("*.py")) if file.relative_to(package).parts[0] != "backends"]
    found = {
        file.relative_to(package).as_posix(): lines
        for file in files
        if file.relative_to(package).as_posix() not in RIVALS
        if (lines := decisions(file.read_text(), names_of_backends()))
    }
    assert found == {}


def test_the_package_is_folders():
    package = ROOT / "fused_resnet"
    modules = sorted(file.name for file in package.glob("*.py"))
    assert modules == ["__init__.py", "__main__.py", "functional.py"]
