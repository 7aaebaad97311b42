"""A whole model, eager, compiled and frozen: pytest benchmarks/bench_models.py [--model --batch --dtype]."""

import pytest
import torch

from fused_resnet import measuring, models
from fused_resnet.operators.problem import SHORT_DTYPES

BASELINES = tuple(name for name in measuring.BASELINES if name not in ("eager", "autotune"))


@pytest.fixture(scope="module")
def network(request):
    option = request.config.getoption
    return measuring.calibrated(models.create(option("model")), models.input_shape(option("model"))).to(
        option("device")
    )


@pytest.mark.parametrize("variant", ["eager NCHW", "eager NHWC", "fused", *BASELINES, "frozen"])
def test_model(timed, benchmark, request, network, variant):
    option = request.config.getoption
    benchmark.group = f"{option('model')}, batch {option('batch')}"
    dtype = "fp32" if variant == "eager NCHW" else option("dtype")
    x = torch.randn(option("batch"), *models.input_shape(option("model")), device=option("device"))
    builders = measuring.variant_builders(
        network, x, dtypes=[SHORT_DTYPES[dtype]], with_fused=True, baselines=("eager", *BASELINES)
    )
    name = f"{variant} {dtype}"
    variants, skipped = measuring.build_variants({name: builders[name]})
    if skipped:
        pytest.skip(skipped[name])
    benchmark.extra_info["max_rel_error"] = measuring.max_error(network, x, variants)[name]
    timed(variants[name])
