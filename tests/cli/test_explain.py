"""fused-resnet explain: as JSON, for people, and what it refuses."""

import json

import pytest

import fused_resnet
from fused_resnet.cli.main import main
from fused_resnet.fusing import convert


def test_command_line(capsys):
    arguments = ["explain", "--model", "resnet20", "--batch", "2", "--device", "cpu", "--image", "16"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["form"] == "fused" and len(record["rows"]) == len(convert.fused_convs(
        fused_resnet.fuse(fused_resnet.models.create("resnet20"))))  # fmt: skip
    assert main([*arguments, "--frozen", "--dtype", "bf16", "--time"]) == 0
    printed = capsys.readouterr().out
    assert "CifarResNet, frozen; input 2x3x16x16 float32 on cpu; 19 convolutions" in printed and "bfloat16" in printed
    assert main([*arguments, "--backend", "cudnn"]) == 1
    assert "it needs folded BN" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--model", "resnet51"], "unknown model 'resnet51'; known ones are"),
        (["--batch", "0"], "'--batch'"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--backend", "tpu"], "unknown backend 'tpu'"),
    ),
)
def test_command_line_refuses(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err
