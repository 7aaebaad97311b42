"""The convolution by ATen and one pass of ours: values in the interpreter, its self-check, and whom auto chooses."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import backends, choosing, functional, testing
from fused_resnet.backends import cudnn_pass
from fused_resnet.kernels.triton import affine_act, runtime
from fused_resnet.operators import ConvOperands, layout
from fused_resnet.operators.problem import ACTIVATIONS
from tests.support.tuned_files import problem

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="runs the pass in Triton's interpreter")
LIVE = problem(has_bn=True, has_bias=False, N=2, C=6, H=5, W=4, K=10)


@pytest.fixture
def nothing_checked(monkeypatch):
    monkeypatch.setattr(cudnn_pass, "_checked", {})


@pytest.fixture
def right(monkeypatch):
    """A pass that counts as right, without a check of every kind."""
    monkeypatch.setattr(cudnn_pass, "_why_wrong", lambda problem: None)


def test_random_problems(right):
    report = testing.verify(60, seed=11, backends=["cudnn_pass"])
    assert report.passed and report.backends["conv_bn_act/cudnn_pass"].ok >= 40


@pytest.mark.parametrize("in_nchw", (False, True), ids=("nhwc", "nchw"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_layouts_of_the_output(activation, in_nchw):
    """Rows and columns beyond one tile, every vector missing once, the residual in the other layout."""
    placed = layout.nchw if in_nchw else layout.channels_last
    K, P, Q = (9, 35, 33) if in_nchw else (150, 7, 5)
    x, weight = torch.randn(2, 3, P, Q), torch.randn(K, 3, 1, 1)
    vectors = [torch.randn(K), torch.randn(K), torch.randn(K), torch.rand(K) + 0.5, torch.randn(K)]
    residual = (layout.channels_last if in_nchw else layout.nchw)(torch.randn(2, K, P, Q))
    for missing in range(6):
        a, b, mean, var, bias = (v if i != missing else None for i, v in enumerate(vectors))
        o = ConvOperands(x, weight, a, b, mean, var, 1e-5, bias, residual if missing != 5 else None)
        asked = problem(
            N=2, C=3, H=P, W=Q, K=K, R=1, S=1, padding=(0, 0), activation=activation, has_bn=True,
            has_bias=bias is not None, has_residual=o.residual is not None,
        )  # fmt: skip
        out = cudnn_pass.run(asked, o, in_nchw=in_nchw)
        assert out.stride() == placed(torch.empty_like(out)).stride()
        torch.testing.assert_close(out, testing.Case(asked, o).expected.float(), rtol=1e-5, atol=1e-4)


def test_what_it_takes(nothing_checked):
    assert cudnn_pass.why_not(LIVE._replace(dtype=torch.float64)).startswith("float64 is not supported")
    assert cudnn_pass.why_not(LIVE._replace(device="mps")) == "device 'mps' is not supported (cuda is)"


@pytest.mark.parametrize("changed, expected", (({}, True), ({"has_bn": False, "has_bias": True}, False)), ids=str)
def test_auto_takes_it_for_live_bn_on_a_gpu(right, monkeypatch, changed, expected):
    monkeypatch.setattr(torch.version, "hip", None)
    for device in ("cuda", "cpu"):
        chosen = choosing.fixed_order(LIVE._replace(device=device, dilation=(2, 2), **changed)).backend.name
        assert (chosen == "cudnn_pass") == (expected and device == "cuda")


def test_it_is_checked_once(nothing_checked, monkeypatch):
    seen = []
    monkeypatch.setattr(cudnn_pass, "self_check", lambda *asked: seen.append(asked))
    for activation in ("relu", "silu", "relu"):
        assert cudnn_pass.why_not(LIVE._replace(activation=activation, N=3)) is None
    assert seen == [("cpu", torch.float32, False, "relu"), ("cpu", torch.float32, False, "silu")]


def test_a_wrong_pass_is_not_used(nothing_checked, monkeypatch):
    assert cudnn_pass.self_check("cpu", torch.float16, True, "relu6") is None
    stock = affine_act.launch

    def wrong(y, o, activation):
        stock(y, o, activation)
        y[-1, -1, -1, -1] += 0.5

    monkeypatch.setattr(affine_act, "launch", wrong)
    assert cudnn_pass.why_not(LIVE) == "its self-check was wrong for relu in torch.float32"

    def raising(y, o, activation):
        raise RuntimeError("no such instruction\nat line 2")

    monkeypatch.setattr(affine_act, "launch", raising)
    assert cudnn_pass.why_not(LIVE._replace(has_residual=True)).startswith("its self-check failed (")
    with pytest.raises(backends.BackendError, match="'cudnn_pass' cannot run this: its self-check was wrong"):
        choosing.select(LIVE, "cudnn_pass")


def test_no_check_in_a_transform_or_a_mode(nothing_checked, monkeypatch):
    """What was decided counts there, else eager runs."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(cudnn_pass, "self_check", lambda *asked: None)
    answers = []
    torch.func.vmap(lambda x: answers.append(cudnn_pass.why_not(LIVE)) or x)(torch.ones(2))
    with FlopCounterMode(display=False):
        answers.append(cudnn_pass.why_not(LIVE))
    assert [answer.startswith("it is checked at its first call") for answer in answers] == [True, True]
    assert cudnn_pass.why_not(LIVE) is None
    torch.func.vmap(lambda x: answers.append(cudnn_pass.why_not(LIVE)) or x)(torch.ones(2))
    assert answers[2] is None


def test_what_users_call(right):
    x, weight = torch.randn(2, 6, 5, 4), torch.randn(10, 6, 3, 3)
    vectors = torch.randn(10), torch.randn(10), torch.randn(10), torch.rand(10) + 0.5
    out = functional.conv_bn_act(x, weight, *vectors, padding=1, activation="relu6", backend="cudnn_pass")
    y = F.batch_norm(F.conv2d(x, weight, padding=1), vectors[2], vectors[3], vectors[0], vectors[1])
    torch.testing.assert_close(out, F.relu6(y), rtol=1e-5, atol=1e-5)


def test_beyond_2_to_the_31_elements():
    """The last tile's place, from the launcher's numbers: products of them need 64 bits."""
    y = torch.empty(600, 64, 256, 256, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    o = ConvOperands(y, y, bias=torch.empty(64))
    num_programs, (_, M, columns, K), options = affine_act.arguments(y, o, "relu")
    assert (M, columns, K) == (600 * 256 * 256, 64, 64) and options["LAYOUT"] == "NHWC"
    assert num_programs * options["BLOCK_M"] * options["BLOCK_N"] >= y.numel() > 2**31 > num_programs
