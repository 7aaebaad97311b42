"""The convolution kernels on e4m3, in every form that takes it: within the bound of `float8`.

On a GPU that can multiply e4m3, else in Triton's interpreter.
"""

import pytest
import torch

from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.kernels.triton.conv import launch, row_space
from fused_resnet.kernels.triton.conv.configs import TritonConfig, configs, default_config, search_space, why_illegal
from fused_resnet.operators import float8, quantized
from fused_resnet.operators.problem import parsed_problem
from tests.kernels.test_triton import DEVICE, needs_triton
from tests.kernels.test_triton_forms import needs_tma

WHY_NOT = launch.why_no_float8(DEVICE)
pytestmark = [needs_triton, needs_tma, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

TILE = TritonConfig(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, GROUP_M=2, num_warps=4, num_stages=2)
CASES = {
    "pointwise": ("3x64x5x7 -> 24, 1x1 float8_e4m3fn bias+add relu", TILE),
    "pointwise with masks": ("2x20x5x7 -> 33, 1x1 float8_e4m3fn bias relu6", TILE),
    "pointwise, split": ("2x96x5x5 -> 40, 1x1 float8_e4m3fn bias+add none", TILE._replace(split_k=2)),
    "3x3, split": ("1x64x5x5 -> 24, 3x3 p1 float8_e4m3fn bias none", TILE._replace(split_k=4)),
    "stem": ("1x3x15x13 -> 16, 7x7 s2 p3 float8_e4m3fn bias relu", TILE),
    "all padding": ("1x32x2x2 -> 16, 3x3 p3 d2 float8_e4m3fn bias+add relu", TILE),
    "groups": ("1x24x6x5 -> 18, 3x3 p1 g3 float8_e4m3fn bias none", TILE),
    "gemm_tma": ("3x48x5x7 -> 24, 1x1 float8_e4m3fn bias+add relu", TILE._replace(form="gemm_tma")),
    "gemm_tma, stride 2": ("2x32x6x7 -> 24, 1x1 s2 float8_e4m3fn bias none", TILE._replace(form="gemm_tma")),
    "gemm_tma, persistent": (
        "3x64x5x7 -> 40, 1x1 float8_e4m3fn bias relu6",
        TILE._replace(form="gemm_tma", persistent=True),
    ),
    "rows_tma": ("2x32x5x7 -> 24, 3x3 p1 float8_e4m3fn bias+add relu", TILE._replace(form="rows_tma")),
    "rows_tma, split": ("2x32x5x7 -> 24, 3x3 p1 float8_e4m3fn bias none", TILE._replace(form="rows_tma", split_k=4)),
}


def on_device(text, seed=0):
    p = parsed_problem(text, DEVICE)
    return p, quantized_operands(p, seed).map(lambda tensor: tensor.to(DEVICE))


def poison(p):
    return (
        torch.full(p.output_shape, torch.nan, device=DEVICE).to(p.dtype).contiguous(memory_format=torch.channels_last)
    )


def reference_of(p, o):
    return quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)


def check(p, o, out):
    on_cpu = o.map(torch.Tensor.cpu)
    error = (out.cpu().double() - float8.exact(p, on_cpu)).abs()
    assert (error <= float8.error_bound(p, on_cpu)).all()
    differing = (out.cpu().float() != reference_of(p, on_cpu).float()).double().mean()
    assert differing < 0.03, f"{100 * differing:.1f} % of the values are not those of sums in fp32"


@pytest.mark.parametrize("name", CASES)
def test_every_value(name):
    text, config = CASES[name]
    p, o = on_device(text, seed=len(name))
    out = poison(p)
    launch.launch(p, o, out, config)
    check(p, o, out)
    assert out.float().unique().numel() > 30


@pytest.mark.parametrize("form", ["pointer", "gemm_tma"])
def test_in_row_space(form):
    """The halo of the output is zero, and what lies in the halo of x counts as zero."""
    p, o = on_device("2x32x5x6 -> 24, 1x1 float8_e4m3fn bias+add relu")
    rows = o._replace(x=row_space.pack(o.x), residual=row_space.pack(o.residual))
    out = row_space.pack(poison(p)).fill_(torch.nan)
    launch.launch(p, rows, out, TILE._replace(form=form))
    found = row_space.unpack(out, p.N, p.P, p.Q)
    check(p, o, found)
    assert torch.equal(row_space.pack(found).float(), out.float())


def test_what_does_not_occur_in_networks():
    """NaN stays NaN, infinities and what is too large become 448 and -448, ties go to even."""
    p, o = on_device("1x32x1x2 -> 16, 1x1 float8_e4m3fn bias none")
    o.x.fill_(1), o.weight.fill_(0)
    multiplier, bias = torch.zeros(2, 16)
    multiplier[:3], bias[3] = torch.tensor([torch.nan, torch.inf, -torch.inf]), torch.nan
    bias[4:] = torch.tensor(
        [449.0, 1e9, torch.inf, -torch.inf, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -17, 1.0625, 0, 465]
    )
    o = o._replace(epilogue=o.epilogue._replace(multiplier=multiplier.to(DEVICE), bias=bias.to(DEVICE)))
    out = poison(p)
    launch.launch(p, o, out, TILE)
    wanted = [torch.nan] * 4 + [448, 448, 448, -448, 16, 20, 0, 2.0**-8, -16, 1.0, 0, 448]
    assert str(out[0, :, 0, 0].float().tolist()) == str([float(value) for value in wanted])
    assert str(reference_of(p, o)[0, :, 0, 0].float().tolist()) == str([float(value) for value in wanted])
    o.x[0, 3, 0, 1] = torch.nan
    launch.launch(p, o, out, TILE)
    assert out[0, :, 0, 1].isnan().all() and not out[0, 4:, 0, 0].isnan().any()


def test_configs_of_e4m3():
    """Sums of a step lie beside those of all, which leaves room for fewer; no GPU before sm_89 has any."""
    for C in (3, 16, 48, 64, 256):
        for window in ("1x1", "3x3 p1", "3x3 s2 p1"):
            p = parsed_problem(f"8x{C}x28x28 -> 64, {window} float8_e4m3fn bias relu", "cuda")
            considered = [config for config, _ in search_space(p, 90)]
            assert considered and all(32 <= config.BLOCK_K <= 128 for config in considered)
            assert "lines_tma" not in {config.form for config in considered}
            assert why_illegal(p, default_config(p), 90) is None and why_illegal(p, default_config(p), 89) is None
            assert why_illegal(p, default_config(p), 80) == "sm_80 has no e4m3 arithmetic"
    p = p._replace(stride=(1, 1))
    assert {config.form for config in configs(p, 90)} == {"pointer", "rows_tma"}
    large = TritonConfig(128, 256, 128, 8, 8, 3, "rows_tma")
    assert why_illegal(p._replace(K=256), large, 90) == "128 sums a thread spill"
