"""Networks and their blocks as subjects: variants that cannot be built or break."""

import pytest
import torch

from benchmarks import data, wild
from fused_resnet import measuring, models


def test_a_variant_that_breaks_when_it_runs_does_not_cost_the_others(monkeypatch):
    def broken():
        raise RuntimeError("an illegal memory access")

    builders = {"eager NCHW fp32": lambda: lambda: x, "frozen fp32": lambda: lambda: x, "compile fp32": lambda: broken}
    monkeypatch.setattr(measuring.networks, "variant_builders", lambda *_, **__: builders)
    x = torch.randn(2, 3)
    row = measuring.NetworkSubject("x", torch.nn.Identity(), x.shape, "cpu", [torch.float32]).measured(1.0, rounds=1)
    assert set(row["variants"]) == {"eager NCHW fp32", "frozen fp32"}
    assert row["skipped"] == {"compile fp32": "RuntimeError: an illegal memory access"}


def test_a_network_says_which_of_its_variants_are_built(monkeypatch):
    shape, dtypes = (2, 3, 4, 4), [torch.float32, torch.bfloat16]
    built = lambda builders, _: ({name: lambda: torch.ones(shape) for name in builders}, {})  # noqa: E731
    monkeypatch.setattr(measuring.networks, "build_variants", built)
    subject = measuring.NetworkSubject(
        "x", torch.nn.Identity(), shape, "cpu", dtypes, ("folded",), ("auto", "eager"), with_fused=True
    )
    row = subject.measured(1.0, rounds=1)
    names = {f"{kind} {dtype}" for kind in ("fused", "folded", "frozen") for dtype in ("fp32", "bf16")}
    assert set(row["variants"]) == {"eager NCHW fp32", "frozen fp32 eager", "frozen bf16 eager", *names}
    assert row["batch"] == 2 and row["skipped"] == {}


def test_max_error_is_relative_to_the_largest_output():
    model, x = torch.nn.Identity(), torch.tensor([[1.0, -4.0], [9.0, 9.0], [2.0, 0.5]])
    wrong = x.clone()
    wrong[2, 1] += 1.0  # of the last image
    assert measuring.max_error(model, x, {"right": lambda: x, "wrong": lambda: wrong}) == {"right": 0.0, "wrong": 0.25}


def test_calibrated_model_has_sane_activations_and_its_momenta_back():
    model = measuring.calibrated(models.create("resnet20"), (3, 32, 32))
    assert not model.training and model.bn1.momentum == 0.1
    outputs = []
    model.layer3[-1].bn2.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    assert 0.3 < outputs[0].std() < 3


@pytest.mark.parametrize("name", ("torchvision fcn_resnet50", "timm resnet50d"))
def test_other_peoples_blocks_are_calibrated_as_ours(name):
    data.let_torchvision_import()
    model = measuring.calibrated(wild.MODELS[name](), (3, 32, 32))
    blocks = [module for module in model.modules() if type(module).__name__ == "Bottleneck"]
    assert len(blocks) == 16 and all((block.bn3.weight == 0.25).all() for block in blocks)
    assert all((block.bn2.weight == 1).all() for block in blocks)


def test_blocks_of_the_stages():
    found = measuring.blocks_of(models.create("resnet18"), (3, 64, 64))
    assert [(name, shape) for name, _, shape in found] == [
        ("layer1.1", (64, 16, 16)), ("layer2.1", (128, 8, 8)), ("layer3.1", (256, 4, 4)), ("layer4.1", (512, 2, 2)),
    ]  # fmt: skip


def test_one_variant_that_cannot_be_built_does_not_cost_the_others():
    def broken():
        raise RuntimeError("\n  no C++ compiler\nmore")

    def missing():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    found, skipped = measuring.build_variants({"a": broken, "b": lambda: "built", "c": missing})
    assert found == {"b": "built"}
    assert skipped == {"a": "RuntimeError: no C++ compiler", "c": "x is not installed"}
