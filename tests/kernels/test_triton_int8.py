"""The convolution kernels on bytes, in every form: exactly the bytes of the int8 contract.

On the GPU where there is one, else in Triton's interpreter.
"""

import pytest
import torch

from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.kernels.triton.conv import launch, row_space
from fused_resnet.kernels.triton.conv.configs import (
    TritonConfig,
    configs,
    default_config,
    search_space,
    why_illegal,
)
from fused_resnet.operators import layout, quantized
from fused_resnet.operators.problem import parsed_problem
from tests.kernels.test_triton import DEVICE, needs_triton
from tests.kernels.test_triton_forms import needs_tma

pytestmark = [needs_triton, needs_tma]

TILE = TritonConfig(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, GROUP_M=2, num_warps=4, num_stages=2)
CASES = {
    "pointwise": ("3x64x5x7 -> 24, 1x1 {} bias+add relu", TILE),
    "pointwise with masks": ("2x20x5x7 -> 33, 1x1 {} bias relu6", TILE),
    "pointwise, split": ("2x96x5x5 -> 40, 1x1 {} bias+add none", TILE._replace(split_k=2)),
    "3x3": ("2x32x6x5 -> 24, 3x3 p1 {} bias+add relu", TILE),
    "3x3, split": ("1x64x5x5 -> 24, 3x3 p1 {} bias none", TILE._replace(split_k=4)),
    "stem": ("1x3x15x13 -> 16, 7x7 s2 p3 {} bias relu", TILE),
    "all padding": ("1x32x2x2 -> 16, 3x3 p3 d2 {} bias+add relu", TILE),
    "groups": ("1x24x6x5 -> 18, 3x3 p1 g3 {} bias none", TILE),
    "gemm_tma": ("3x48x5x7 -> 24, 1x1 {} bias+add relu", TILE._replace(form="gemm_tma")),
    "gemm_tma, stride 2": ("2x32x6x7 -> 24, 1x1 s2 {} bias none", TILE._replace(form="gemm_tma")),
    "gemm_tma, persistent": ("3x64x5x7 -> 40, 1x1 {} bias relu6", TILE._replace(form="gemm_tma", persistent=True)),
    "gemm_tma, split": ("1x128x5x7 -> 24, 1x1 {} bias+add relu", TILE._replace(form="gemm_tma", split_k=3)),
    "rows_tma": ("2x32x5x7 -> 24, 3x3 p1 {} bias+add relu", TILE._replace(form="rows_tma")),
    "rows_tma, split": ("2x32x5x7 -> 24, 3x3 p1 {} bias none", TILE._replace(form="rows_tma", split_k=4)),
}


def on_device(text, seed=0):
    p = parsed_problem(text, DEVICE)
    return p, quantized_operands(p, seed).map(lambda tensor: tensor.to(DEVICE))


def expected_of(p, o) -> torch.Tensor:
    return quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_every_byte(name, dtype):
    text, config = CASES[name]
    p, o = on_device(text.format(dtype), seed=len(name))
    expected = expected_of(p, o)
    out = layout.channels_last(~expected)
    launch.launch(p, o, out, config)
    assert torch.equal(out, expected)
    values = expected.unique().numel()
    assert values > 100, f"{values} values show little"


@pytest.mark.parametrize("form", ["pointer", "gemm_tma"])
def test_in_row_space(form):
    """The halo of the output is zero, and what lies in the halo of x counts as zero."""
    p, o = on_device("2x32x5x6 -> 24, 1x1 uint8 bias+add relu")
    expected = expected_of(p, o)
    out = row_space.pack(~expected) + 1
    rows = o._replace(x=row_space.pack(o.x), residual=row_space.pack(o.residual))
    launch.launch(p, rows, out, TILE._replace(form=form))
    assert torch.equal(out, row_space.pack(expected))


def test_what_does_not_occur_in_networks():
    """NaN gives the lowest byte, infinities the limits; sums beyond 2**24 are rounded once; ties go to even."""
    p, o = on_device("1x1024x1x2 -> 16, 1x1 uint8 bias none")
    o.x.fill_(255), o.weight.fill_(127)
    multiplier, bias = torch.zeros(2, 16)
    multiplier[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    multiplier[4:] = 2.0**-19
    bias[3], bias[4:] = torch.nan, torch.arange(12) / 2 - 60
    o = o._replace(epilogue=o.epilogue._replace(multiplier=multiplier.to(DEVICE), bias=bias.to(DEVICE)))
    expected = expected_of(p, o)
    assert expected[0, :4, 0, 0].tolist() == [-128, 127, -128, -128]
    out = layout.channels_last(~expected)
    launch.launch(p, o, out, TILE)
    assert torch.equal(out, expected)


def test_configs_of_bytes_step_by_what_the_tensor_cores_take():
    """A product of bytes takes 32 of the reduction; no form may be offered that drops taps of u8."""
    for C in (3, 16, 48, 64, 256):
        for window in ("1x1", "3x3 p1", "3x3 s2 p1"):
            p = parsed_problem(f"8x{C}x28x28 -> 64, {window} uint8 bias relu", "cuda")
            considered = [config for config, _ in search_space(p, 90)]
            assert considered and all(32 <= config.BLOCK_K <= 128 for config in considered)
            assert "lines_tma" not in {config.form for config in considered}
            assert why_illegal(p, default_config(p), 90) is None
    assert {config.form for config in configs(p._replace(stride=(1, 1)), 90)} == {"pointer", "rows_tma"}
