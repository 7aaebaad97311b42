"""The last residual block of each stage: pytest benchmarks/bench_blocks.py [--model --batch --dtype]."""

import pytest
import shapes
import torch

from fused_resnet import measuring
from fused_resnet.operators.problem import SHORT_DTYPES


def pytest_generate_tests(metafunc):
    blocks = shapes.blocks(metafunc.config.getoption("model"))
    metafunc.parametrize("block, input_shape", [one[1:] for one in blocks], ids=[one[0] for one in blocks])
    metafunc.parametrize("variant", ["eager NCHW", "eager NHWC", "fused", "folded", "compile", "frozen"])


def test_block(timed, benchmark, request, block, input_shape, variant):
    option = request.config.getoption
    benchmark.group = f"{type(block).__name__} {input_shape}"
    dtype = "fp32" if variant == "eager NCHW" else option("dtype")
    x = torch.randn(option("batch"), *input_shape, device=option("device"))
    builders = measuring.variant_builders(block.to(option("device")), x, dtypes=[SHORT_DTYPES[dtype]], with_fused=True)
    name = f"{variant} {dtype}"
    variants, skipped = measuring.build_variants({name: builders[name]})
    if skipped:
        pytest.skip(skipped[name])
    timed(variants[name])
