"""Fused and frozen models exported, saved, scripted and reloaded elsewhere."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resnet
from fused_resnet.fusing import convert
from fused_resnet.nn import BasicBlock, Bottleneck
from tests.support.fused import assert_same, fused_calls, pair

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
@pytest.mark.parametrize("dynamic", (False, True))
def test_export_keeps_the_operators(block, dynamic):
    plain, fused, x = pair(block)
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},) if dynamic else None
    program = torch.export.export(fused, (x,), dynamic_shapes=shapes)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved)
    names = ["conv_bn_act"] * len(convert.fused_convs(fused))
    assert fused_calls(program.graph) == fused_calls(loaded.graph) == names
    images = torch.randn(5, 3, 20, 20) if dynamic else x
    with torch.no_grad():
        assert torch.equal(loaded.module()(images), fused(images))
    assert_same(loaded.module()(images), plain(images))


_RELOAD = """
import sys, torch, fused_resnet
kind, file, tensors = sys.argv[1:]
x, expected = torch.load(tensors)
if kind == "aoti":
    model = torch._inductor.aoti_load_package(file)
else:
    model = torch.jit.load(file) if kind == "jit" else torch.export.load(file).module()
torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
print("agrees")
"""


def reload_elsewhere(kind, file, x, expected):
    """Load a file in a fresh process and run it there."""
    tensors = file.with_suffix(".tensors")
    torch.save((x, expected.detach()), tensors)
    command = (sys.executable, "-c", _RELOAD, kind, str(file), str(tensors))
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "agrees", result.stdout + result.stderr


@pytest.mark.full
def test_export_reloads_in_a_fresh_process(tmp_path):
    plain, fused, x = pair(BasicBlock)
    torch.export.save(torch.export.export(fused, (x,)), tmp_path / "model.pt2")
    reload_elsewhere("export", tmp_path / "model.pt2", x, plain(x))


@pytest.mark.full
def test_aotinductor_package_reloads_in_a_fresh_process(tmp_path):
    plain, fused, x = pair()
    with torch.no_grad():
        program = torch.export.export(fused, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    reload_elsewhere("aoti", Path(package), x, plain(x))


@pytest.mark.full
def test_jit_trace_reloads_in_a_fresh_process(tmp_path):
    plain, fused, x = pair(BasicBlock)
    traced = torch.jit.trace(fused, x)
    assert "fused_resnet::conv_bn_act" in str(traced.inlined_graph)
    traced.save(str(tmp_path / "model.pt"))
    reload_elsewhere("jit", tmp_path / "model.pt", x, plain(x))


def test_jit_script_says_what_to_do():
    plain, fused, x = pair(BasicBlock)
    for model in (fused, fused.layer1[0], fused_resnet.freeze(plain, x)):
        with pytest.raises(RuntimeError, match="cannot compile .*: unfuse or unfreeze the model first"):
            torch.jit.script(model)
    assert_same(torch.jit.script(fused_resnet.unfuse(fused))(x), plain(x))


@pytest.mark.full
@pytest.mark.parametrize("form", ("unfused", "fused"))
@pytest.mark.parametrize("dynamo", (True, False))
def test_onnx_export(form, dynamo, tmp_path):
    """A fused model is exported as ATen's operators, so ONNX Runtime needs nothing of ours."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain, fused, x = pair()
    model = fused_resnet.unfuse(copy.deepcopy(fused)) if form == "unfused" else fused
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(out), plain(x).detach())


def test_a_frozen_model_says_that_it_is_not_for_export():
    plain, _, x = pair(BasicBlock)
    frozen = fused_resnet.freeze(plain, x)
    for export in (torch.export.export, torch.jit.trace):
        with pytest.raises(RuntimeError, match=r"cannot be exported: .* Export frozen.unfreeze\(\)"):
            export(frozen, (x,))
    # what ran before in the process may have Dynamo stop one call earlier, at torch.compiler.disable itself
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"export frozen.unfreeze\(\)|function `disable`"):
        torch.export.export(frozen, (x,), strict=True)


@pytest.mark.full
def test_onnx_export_of_a_frozen_model_says_what_to_export():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    plain, _, x = pair(BasicBlock)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"Export frozen.unfreeze\(\)"):
        torch.onnx.export(fused_resnet.freeze(plain, x), (x,), dynamo=True, verbose=False)
