"""What importing the package costs and which way imports go."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torchvision", "timm", "rich", "matplotlib", "click", "pytest", "hypothesis")


def imported_by(code):
    """Names of all modules that this code leaves in sys.modules of a fresh process."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_heavy_ones():
    names = imported_by("import fused_resnet, fused_resnet.testing")
    assert "fused_resnet.freezing.plan" in names
    assert not [name for name in names if name.split(".")[0] in HEAVY]


def test_import_linter():
    """The contract in pyproject.toml."""
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if linter is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout
