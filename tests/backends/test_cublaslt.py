"""The cublaslt backend: what it takes, and its arithmetic, which ATen also has for CPUs."""

import pytest
import torch

from fused_resnet import backends, measuring, testing
from fused_resnet.testing import compare
from tests.support.tuned_files import problem

TAKEN = problem(device="cuda", dtype=torch.float16, R=1, S=1, padding=(0, 0))
BACKEND = backends.known("conv_bn_act")["cublaslt"]


@pytest.fixture(autouse=True)
def cuda_not_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("DISABLE_ADDMM_CUDA_LT", raising=False)


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({}, None), ({"dtype": torch.bfloat16}, None), ({"N": 1, "H": 1, "W": 1}, None),
        ({"device": "cpu"}, "it runs on NVIDIA GPUs"), ({"dtype": torch.float32}, "float32 is not supported"),
        ({"has_bn": True}, "needs folded BN"), ({"stride": (2, 2)}, "it is a matrix product"),
        ({"R": 3, "S": 3, "padding": (1, 1)}, "it is a matrix product"),
        ({"padding": (1, 1)}, "it is a matrix product"), ({"groups": 2}, "it is a matrix product"),
        ({"has_bias": False}, "its epilogue is a bias and a ReLU"),
        ({"has_residual": True}, "its epilogue is a bias and a ReLU"), ({"activation": "none"}, "its epilogue is"),
        ({"C": 1}, "more than one channel"), ({"K": 1}, "more than one channel"),
    ),
)  # fmt: skip
def test_what_it_takes(changes, reason):
    found = BACKEND.why_not(TAKEN._replace(**changes))
    assert found is None if reason is None else reason in found


def test_torchs_own_switch_is_obeyed(monkeypatch):
    for value, reason in (("0", None), ("1", "DISABLE_ADDMM_CUDA_LT is set")):
        monkeypatch.setenv("DISABLE_ADDMM_CUDA_LT", value)
        assert BACKEND.why_not(TAKEN) == reason


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_values_and_layout(dtype):
    one = TAKEN._replace(N=3, C=24, K=40, H=5, W=7, dtype=dtype, device="cpu")
    operands = measuring.folded_operands(measuring.random_operands(one, "cpu"))
    case = measuring.compared_case(one, operands)
    outputs = []

    def run():
        outputs.append(BACKEND.run(one, operands))
        return outputs[-1]

    assert 0 < measuring.error_ratio(measuring.Prepared(run, case, "cublaslt")) <= 1
    assert compare.wrong_metadata(testing.Case(one, operands), outputs[0]) is None
