"""The configs of Triton's convolutions: distinct, legal and few. Nothing is computed, and Triton is not needed."""

import pytest
import torch

from fused_resnet.kernels.triton.conv.configs import (
    TritonConfig,
    configs,
    default_config,
    num_tiles,
    search_space,
    shared_bytes,
    sums_per_thread,
    why_illegal,
)
from fused_resnet.kernels.triton.conv.cost import estimated_us, likely_config
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.problem import ConvProblem
from tests.kernels.test_triton import CASES, DTYPES, on_meta


def problem(C, size, K, filter_size=1, stride=1, N=32, residual=False, dtype=torch.float16) -> ConvProblem:
    return ConvProblem(
        N, C, size, size, K, filter_size, filter_size, (stride,) * 2, (filter_size // 2,) * 2, (1, 1), 1,
        "relu", False, True, residual, dtype, "cuda",
    )  # fmt: skip


RESNET50 = [
    problem(64, 56, 64), problem(64, 56, 64, 3), problem(64, 56, 256, residual=True), problem(128, 56, 128, 3, 2),
    problem(256, 56, 512, 1, 2), problem(256, 14, 256, 3), problem(512, 7, 512, 3),
    problem(512, 7, 2048, residual=True), problem(3, 224, 64, 7, 2),
]  # fmt: skip


def problems_of_every_kind():
    for dtype in DTYPES:
        for case in CASES.values():
            yield conv_problem(*on_meta(case, dtype), "relu")


def test_configs_are_distinct_and_legal():
    for each in problems_of_every_kind():
        found = configs(each)
        assert len(set(found)) == len(found) >= 1
        assert default_config(each) in found
        for config in found:
            assert all(size >= 16 and size & (size - 1) == 0 for size in config[:3])
            if not (each.is_pointwise and each.groups == 1):
                assert config.num_warps <= 4


def test_default_config_fills_the_gpu_before_it_enlarges_tiles():
    small, large = (problem(64, 56, 64, 3, N=N, residual=True) for N in (1, 256))
    assert default_config(small).BLOCK_M < default_config(large).BLOCK_M


@pytest.mark.parametrize("N", [1, 32, 256])
def test_the_search_space_is_small_and_legal(N):
    for each in (p._replace(N=N, dtype=dtype) for p in RESNET50 for dtype in DTYPES):
        considered = search_space(each)
        assert len({config for config, _ in considered}) == len(considered)
        legal = [config for config, reason in considered if reason is None]
        assert legal == configs(each, 90) and 1 <= len(legal) <= 17, f"{each}: {len(legal)}"
        assert default_config(each) in [config for config, _ in considered] and default_config(each).form == "pointer"
        assert likely_config(each, 90) in legal
        if each.R * each.S > 1:  # eight warps have miscompiled such loops (pytorch issue 173068): only what is measured
            assert default_config(each).num_warps == likely_config(each, 90).num_warps == 4
        for config in legal:
            assert why_illegal(each, config, 90) is None and TritonConfig(**config._asdict()) == config
            assert shared_bytes(each, config) <= 227 * 1024 and sums_per_thread(config) <= 128
            assert estimated_us(each, config) >= each.bytes_moved / 4.9e6
        assert all(config.form == "pointer" for config in configs(each, 80))


def test_what_each_form_is_for():
    forms = {str(p): {config.form for config in configs(p, 90)} for p in RESNET50}
    assert list(forms.values()) == [
        {"pointer", "gemm_tma"}, {"pointer", "rows_tma", "lines_tma"}, {"pointer", "gemm_tma"},
        {"pointer", "lines_tma"}, {"pointer", "gemm_tma"}, {"pointer", "rows_tma", "lines_tma"},
        {"pointer", "lines_tma"}, {"pointer", "gemm_tma"}, {"pointer"},
    ]  # fmt: skip
    assert {config.split_k for config in configs(problem(512, 7, 512, 3, N=1), 90)} > {1}
    assert {config.split_k for config in configs(problem(512, 7, 512, 3, N=256), 90)} == {1}
    assert any(config.persistent for config in configs(problem(64, 56, 64, N=256), 90))


@pytest.mark.parametrize(
    "each, config, arch, reason",
    [
        (problem(64, 56, 64), "gemm_tma", 80, "sm_80 has no TMA"),
        (problem(64, 56, 64), "rows_tma", 90, "does not compute this filter"),
        (problem(64, 56, 64, 3, 2), "rows_tma", 90, "does not compute this filter"),
        (problem(20, 56, 64), "gemm_tma", 90, "TMA needs rows of a multiple of 16 bytes: 20 channels have 40"),
        (problem(48, 56, 64, 3), "rows_tma", 90, "a step of 64 channels must not leave a pixel's 48"),
        (problem(48, 56, 64, 1, 2), "gemm_tma", 90, "a step of 64 channels must not leave a pixel's 48"),
        (problem(64, 7, 64, 1, 2), "gemm_tma", 90, "a map of 7x7 cannot be viewed as pairs of lines"),
        (problem(128, 2**15, 64, 3), "lines_tma", 90, "elements are too long"),
        (problem(64, 2**10, 64, 3, N=2**11), "rows_tma", 90, "rows with their halo are too many"),
        (problem(64, 56, 64), "no_tma", 90, "there is no form 'no_tma'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_why_illegal(each, config, arch, reason):
    assert reason in why_illegal(each, TritonConfig(64, 64, 64, 8, 4, 4, config), arch)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(num_stages=10), "bytes of shared memory are too many (sm_90 has 232448)"),
        (dict(BLOCK_M=256, BLOCK_N=128), "256 sums a thread spill"),
        (dict(persistent=True), "persistent programs are for gemm_tma and rows_tma"),
        (dict(split_k=2), "a reduction of 1 steps of 64 cannot be split into 2 parts"),
    ],
    ids=str,
)
def test_why_a_tile_is_illegal(change, reason):
    config = TritonConfig(128, 128, 64, 8, 8, 4)._replace(**{**change, "num_warps": 4})
    assert reason in why_illegal(problem(64, 56, 256), config, 90)


def test_tiles_of_lines_are_counted_by_column():
    each, config = problem(64, 56, 128, 1, 2), TritonConfig(128, 64, 64, 8, 4, 4, "gemm_tma")
    assert num_tiles(each, config) == (32 * 28 // 128) * 28 * 2
    assert num_tiles(each._replace(H=58), config) == 8 * 28 * 2
    assert num_tiles(each, config._replace(form="pointer")) == (32 * 28 * 28 // 128) * 2


def test_row_space_is_no_candidate_with_live_bn():
    """Which runs outside plans: nobody keeps x there."""
    folded = problem(64, 28, 64, 3)
    forms = [
        {config.form for config in configs(one, 90)} for one in (folded, folded._replace(has_bn=True, has_bias=False))
    ]
    assert "rows_tma" in forms[0] and "rows_tma" not in forms[1]
