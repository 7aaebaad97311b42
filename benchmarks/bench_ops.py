"""Every distinct convolution of a model, per backend: pytest benchmarks/bench_ops.py [--model --batch --dtype]."""

import pytest
import shapes

from fused_resnet import backends, bench
from fused_resnet.bench import FOLDED, UNFUSED


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    problems = shapes.convs(option("model"), option("batch"), bench.SHORT_DTYPES[option("dtype")], option("device"))
    names = (UNFUSED, FOLDED, *(name for name in backends.known("conv_bn_act") if name != "eager"))
    metafunc.parametrize("problem", [problem for problem, _ in problems], ids=str)
    metafunc.parametrize("variant", names)


def test_conv(timed, benchmark, request, problem, variant):
    benchmark.group = str(problem)
    found, skipped = bench.op_variants(problem, bench.random_operands(problem, request.config.getoption("device")))
    if variant in skipped:
        pytest.skip(skipped[variant])
    assert bench.error_ratio(found[variant]) <= 1
    timed(found[variant].run)
