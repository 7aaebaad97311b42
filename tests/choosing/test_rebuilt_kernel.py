"""A kernel of ours that was rebuilt with an error in its last column is found, and never chosen."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from fused_resnet.kernels import sources

GOOD = "end = std::max(begin, std::min(s.W + s.padding_w, columns));"
BAD = "end = std::max(begin, std::min(s.W + s.padding_w - 1, columns));"  # the last column of x counts as padding
FREEZE = """
import json, torch, fused_resnet
from torch import nn
from fused_resnet import backends
from fused_resnet.choosing import winners
from fused_resnet.freezing.modules import FrozenConv
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=8), nn.ReLU()).eval()
x = torch.randn(2, 32, 9, 9)
frozen = fused_resnet.freeze(model, x)
conv, = (module for module in frozen.plan(x).modules() if isinstance(module, FrozenConv))
right = bool(torch.allclose(frozen(x), model(x), atol=1e-4))
by_name = fused_resnet.freeze(model, x, backend="grouped")
print(json.dumps({
    "chosen": conv.backend.name, "right": right, "outcome": winners.outcome(conv.problem, "grouped"),
    "by name": bool(torch.allclose(by_name(x), model(x), atol=1e-4)),
}))
"""


def setup():
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", sources.ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
@pytest.mark.skipif(not (sources.ROOT / "setup.py").exists(), reason="needs the source tree, not only the wheel")
def test_an_error_in_the_last_column_is_found(tuned_files, monkeypatch, tmp_path):
    builder = setup()
    tools = builder.Toolchain()
    part = next(part for part in builder.plan(tools) if part.name == "cpu")
    if not part.is_built:
        pytest.skip(str(part.why))
    copy = tmp_path / "copy"
    shutil.copytree(sources.ROOT / "csrc", copy / "csrc")
    shutil.copytree(
        sources.ROOT / "fused_resnet", copy / "fused_resnet", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    header = copy / "csrc/cpu/grouped.h"
    assert GOOD in header.read_text()
    header.write_text(header.read_text().replace(GOOD, BAD))
    cxx, _, link = builder.flags(part, tools)
    options = ["-O1" if one == "-O3" else one.replace(str(sources.ROOT / "csrc"), str(copy / "csrc")) for one in cxx]
    options = [one.replace('\\"', '"') for one in options]
    files = [str(copy / "csrc" / name) for name in part.sources]
    library = copy / "fused_resnet/_C_cpu.so"
    subprocess.run([tools.cxx, *options, "-shared", *files, *link, "-o", str(library)], check=True)
    record = json.loads((sources.ROOT / "fused_resnet/_build.json").read_text())
    record["sources"] = sources.compiled_digests(copy)
    (copy / "fused_resnet/_build.json").write_text(json.dumps(record))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    monkeypatch.setenv("PYTHONPATH", str(copy))
    done = subprocess.run([sys.executable, "-c", FREEZE], capture_output=True, text=True, cwd=copy, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["by name"], "the kernel is not as broken as it should be"
    assert found["chosen"] != "grouped" and found["right"]
    assert found["outcome"]["error_ratio"] > 1
