"""Convolutions of bytes by each micro-kernel of regions: exactly the reference's bytes."""

import pytest
import torch

from fused_resnet import backends, testing
from fused_resnet.backends import int8_regions
from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.operators.problem import parsed_problem
from fused_resnet.regions import kernels

ROWS = {kernel.name: kernel.why_not for kernel in kernels.table() if kernel.dtype == torch.int8}
needs_rows = pytest.mark.skipif(not ROWS, reason="the library has no micro-kernels of int8")


GROUPS = "2x96x7x9 -> 96, 3x3 s2 p1 g8"


@needs_rows
def test_each_row_of_the_table_has_a_backend():
    assert sorted(ROWS) == sorted(int8_regions.NAMES)
    assert set(ROWS) <= set(backends.known("conv_int8"))


@needs_rows
@pytest.mark.parametrize("name", int8_regions.NAMES)
@pytest.mark.parametrize("dtype, activation", [("uint8", "relu"), ("int8", "none"), ("uint8", "relu6")])
def test_every_byte(name, dtype, activation):
    for seed, window in enumerate(
        ("2x70x6x5 -> 40, 3x3 p1", "1x64x9x7 -> 33, 1x1 s2", "1x3x15x13 -> 16, 7x7 s2 p3", GROUPS)
    ):
        for epilogue in ("bias", "bias+add"):
            p = parsed_problem(f"{window} {dtype} {epilogue} {activation}", "cpu")
            outcome = testing.check(testing.Case(p, quantized_operands(p, seed)), name)
            if ROWS[name]:
                assert (outcome.status, outcome.detail) == ("cannot run", ROWS[name])
            else:
                assert outcome.status == "ok" and outcome.num_bytes > 0, outcome


@pytest.mark.parametrize("name", int8_regions.NAMES)
def test_what_regions_cannot_run(name):
    why_not = backends.known("conv_int8")[name].why_not
    p = parsed_problem("1x64x9x9 -> 64, 3x3 p1 g64 uint8 bias relu", "cpu")
    reason = "its panels would read 64 channels for groups of 1, and more than 16 times as many do not pay"
    assert why_not(p) == reason
    assert "the tensors are on cuda" in why_not(p._replace(groups=1, device="cuda"))
    if not ROWS:
        assert why_not(p._replace(groups=1)) == "the library does not have it: build it again"
