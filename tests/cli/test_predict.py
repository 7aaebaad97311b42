"""`bench ops --predict`: labelled as predictions, and in no record."""

import pytest
from click.testing import CliRunner

from fused_resnet.cli import main

pytest.importorskip("triton")
OPS = ["bench", "ops", "--model", "resnet20", "--image", "8", "--rounds", "1", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(main.cli, [*OPS, *arguments])


def test_predictions_are_labelled(monkeypatch):
    from fused_resnet.emulation import predictions

    def ways(problem, gpu):
        assert (problem.device, gpu.name) == ("cuda", "h200")
        yield "triton default", predictions.Expected(12.34, "L2", ())
        yield "cuda tile 0", "nvcc was not found"

    monkeypatch.setattr(predictions, "why_not", lambda: None)
    monkeypatch.setattr(predictions, "ways", ways)
    result = run("--predict", "h200")
    assert result.exit_code == 0, result.output
    assert "PREDICTIONS for an h200: nothing was measured" in result.output
    assert "12.3" in result.output and "nvcc was not found" in result.output


def test_without_a_gpu_it_says_how_to_get_predictions():
    assert "No GPU is measured. --predict h200" in run().output
    assert "No GPU is measured" not in run("--json").output


@pytest.mark.parametrize(
    "arguments, words",
    [(["--predict", "h200", "--json"], "--json prints measurements alone"), (["--predict", "h3"], "'h200', 'l40s'")],
)
def test_what_it_refuses(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.output


def test_it_says_what_is_missing(monkeypatch):
    from fused_resnet.emulation import predictions

    monkeypatch.setattr(predictions, "why_not", lambda: "the PTX emulator is not built")
    result = run("--predict", "h200")
    assert result.exit_code == 2 and "the PTX emulator is not built" in result.output
