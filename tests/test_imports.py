"""What importing the package costs and which way imports go."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torchvision", "timm", "rich", "matplotlib", "click", "pytest", "hypothesis")
# from the leaves up: a module may import only what stands in an earlier row
ROWS = (
    ("problem", "schemas"), ("reference",), ("triton_kernels", "extension"), ("ops",), ("backends",), ("functional",),
    ("nn",), ("tracing", "workspace"), ("convert", "plan"), ("models",),
)  # fmt: skip


def imported_by(code):
    """Names of all modules that this code leaves in sys.modules of a fresh process."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_heavy_ones():
    names = imported_by("import fused_resnet, fused_resnet.testing")
    assert "fused_resnet.plan" in names
    assert not [name for name in names if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_modules_import_only_what_is_below_them(row):
    """Seen in a fresh process, with the package's own __init__ kept empty."""
    below = {name for names in ROWS[:row] for name in names}
    for module in ROWS[row]:
        names = imported_by(
            "import importlib, sys, types\n"
            f"package = types.ModuleType('fused_resnet'); package.__path__ = [{str(ROOT / 'fused_resnet')!r}]\n"
            "sys.modules['fused_resnet'] = package\n"
            f"importlib.import_module('fused_resnet.{module}')"
        )
        ours = {name.split(".")[1] for name in names if name.startswith("fused_resnet.")}
        assert module in ours and ours - {module} <= below, f"{module} imports {ours - {module} - below}"


def test_import_linter():
    """The contract in pyproject.toml."""
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if linter is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout
