"""Every distinct convolution of a model, per backend: pytest benchmarks/bench_ops.py [--model --batch --dtype]."""

import pytest
import shapes

from fused_resnet import backends, measuring
from fused_resnet.measuring import FOLDED, UNFUSED
from fused_resnet.operators.problem import SHORT_DTYPES


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    problems = shapes.convs(option("model"), option("batch"), SHORT_DTYPES[option("dtype")], option("device"))
    names = (UNFUSED, FOLDED, *(name for name in backends.known("conv_bn_act") if name != "eager"))
    metafunc.parametrize("problem", [problem for problem, _ in problems], ids=str)
    metafunc.parametrize("variant", names)


def test_conv(timed, benchmark, request, problem, variant):
    benchmark.group = str(problem)
    found, skipped = measuring.op_variants(
        problem, measuring.random_operands(problem, request.config.getoption("device"))
    )
    if variant in skipped:
        pytest.skip(skipped[variant])
    assert measuring.error_ratio(found[variant]) <= 1
    timed(found[variant].run)
