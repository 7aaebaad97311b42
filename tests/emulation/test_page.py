"""The scripts of docs/emulation.md that need a compiler: a process each, since this one interprets Triton's kernels."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from fused_resnet.emulation import cuda_launches, library
from tests.support.scripts import ROOT

SCRIPTS = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs" / "emulation.md").read_text(), re.DOTALL | re.MULTILINE)


def test_there_are_scripts():
    assert ["triton" in script for script in SCRIPTS] == [True, False]


@pytest.mark.skipif(library.why_missing() is not None, reason=library.why_missing() or "")
@pytest.mark.parametrize(
    "script, printed", tuple(zip(SCRIPTS, (r"[1-9]\d* cp.async", r"\[(race|uninitialised)\] "))), ids=("triton", "cuda")
)
def test_scripts_run(script, printed, tmp_path):
    if "triton" in script and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton's compiler")
    if "compile_cuda" in script and cuda_launches.nvcc() is None:
        pytest.skip("needs nvcc")
    file = tmp_path / "script.py"
    file.write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(printed, done.stdout), done.stdout
