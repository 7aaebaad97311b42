"""Scripts of the repository, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(*arguments, **environment):
    """Run a script of ours from the repository root on the CPU, without Triton's interpreter and xdist's variables."""
    dropped = ("TRITON_INTERPRET", "PYTEST_")  # pytest-benchmark writes nothing inside an xdist worker
    variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**variables, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
