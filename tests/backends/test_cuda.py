"""What our CUDA kernel cannot run, asked of csrc itself without a GPU."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fused_resnet import backends, choosing
from fused_resnet.backends import cuda
from fused_resnet.kernels import compiled
from fused_resnet.kernels.triton import runtime
from fused_resnet.machine import devices
from fused_resnet.operators.problem import parsed_problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_BY_ONE = parsed_problem("1x8x1x1 -> 8, 1x1 float16 plain relu", "cuda")


@pytest.fixture
def limits_of_csrc():
    """The question after the CUDA kernel's limits, answered by the same function in _host_checks."""
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    cuda._limits.cache_clear()
    with torch.library._scoped_library("fused_resnet", "IMPL") as library:
        library.impl("cuda_conv_why_not", checks.cuda_conv_why_not, "CompositeExplicitAutograd")
        yield
    cuda._limits.cache_clear()


@pytest.mark.parametrize("capabilities, reason", (
    ([(9, 0), (8, 0)], None), ([(9, 0), (7, 5)], "capability 8.0 or later on every visible GPU, one has 7.5"),
    ([], "no GPU is visible"),
))  # fmt: skip
def test_the_least_capable_gpu_decides(limits_of_csrc, monkeypatch, capabilities, reason):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(compiled, "load", lambda library: None)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "_driver_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[device])
    devices.least_capability.cache_clear()
    try:
        for backend in ("cuda", "triton"):
            found = backends.known("conv_bn_act")[backend].why_not(ONE_BY_ONE)
            assert found == reason if reason is None else reason in found, backend
    finally:
        devices.least_capability.cache_clear()


# What csrc's kernel cannot index, the same a little smaller, and the reason
BEYOND_CUDA = {
    "height": (dict(H=2**28), dict(H=2**28 - 1), "an input of 268435456x1 is too large"),
    "width": (dict(W=2**28), dict(W=2**28 - 1), "an input of 1x268435456 is too large"),
    "padding": (dict(padding=(0, 2**28)), dict(padding=(0, 2**28 - 1)), "padding 268435456 is too large"),
    "window": (
        dict(R=2**27 + 1, dilation=(2, 1), padding=(2**27, 0)), dict(R=2**27, dilation=(2, 1), padding=(2**27, 0)),
        "a window of 268435457 pixels is too large",
    ),
    "window's width": (
        dict(S=2**27 + 1, dilation=(1, 2), padding=(0, 2**27)), dict(S=2**27, dilation=(1, 2), padding=(0, 2**27)),
        "a window of 268435457 pixels is too large",
    ),
    "pixels": (  # 13299 * 161477 = 2^31 - 1025
        dict(padding=(6649, 80738)), dict(padding=(6649, 80737)), "an output of 13299x161477 is too large"
    ),
    "reduction": (  # 1023 * 1429 * 1469 = 2^31 - 1025
        dict(C=1023, R=1429, S=1469, padding=(714, 734)), dict(C=1023, R=1429, S=1468, padding=(714, 734)),
        "a sum of 1429x1469x1023 products is too long",
    ),
    "span": (
        dict(C=64, K=64, H=4096, W=4096, groups=64), dict(C=64, K=64, H=4096, W=4096),
        "one tile may span 2148007936 elements of x, too many for its 32-bit offsets",
    ),
    "span of 258 images": (
        dict(C=16, H=2048, R=2048, W=2040, S=2040), dict(C=16, H=2048, R=2048, W=2031, S=2031),
        "one tile may span 17246519040 elements of x, too many for its 32-bit offsets",
    ),
    "stride": (dict(stride=(1, 2**31)), dict(stride=(1, 2**31 - 1)), "strides and dilations must be below 2^31"),
}  # fmt: skip


@pytest.mark.parametrize("beyond, within, reason", BEYOND_CUDA.values(), ids=BEYOND_CUDA)
def test_what_the_cuda_kernel_cannot_index(limits_of_csrc, monkeypatch, beyond, within, reason):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(compiled, "load", lambda library: None)
    monkeypatch.setattr(devices, "least_capability", lambda: (9, 0))
    with pytest.raises(backends.BackendError, match=f"backend 'cuda' cannot run this: .*{re.escape(reason)}"):
        choosing.select(ONE_BY_ONE._replace(**beyond), "cuda")
    assert choosing.select(ONE_BY_ONE._replace(**within), "cuda").backend.name == "cuda"


def test_the_cuda_kernel_s_limits_are_asked_past_tracers(limits_of_csrc):
    """A tracer would record the question, or stop at an answer that is text."""
    ask = cuda._limits
    too_large = ONE_BY_ONE._replace(H=2**28)

    def doubled(x):
        ask.cache_clear()
        assert ask(ONE_BY_ONE) is None and "too large" in ask(too_large)
        return x * 2

    x = torch.ones(2)
    graph = make_fx(doubled)(x).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.mul.Tensor]
    for transformed in (torch.jit.trace(doubled, x), torch.vmap(doubled)):
        assert transformed(x).tolist() == [2.0, 2.0]


def near_powers(most):
    return st.builds(lambda n, more: max(1, 2**n + more), st.integers(0, most), st.integers(-2, 2))


@settings(deadline=None)
@given(st.data())
def test_the_limits_of_csrc_are_exact(data):
    """Against whole numbers of any size, where the kernel's source has 64 bits and doubles."""
    checks = pytest.importorskip("fused_resnet._host_checks", reason="_host_checks is not built")
    draw = data.draw
    H, W, R, S, channels, *dilation = (draw(near_powers(most)) for most in (28, 28, 12, 12, 16, 17, 17))
    fitting = [min(2**29, d * (taps - 1) // 2 + 1) for d, taps in zip(dilation, (R, S))]
    padding = tuple(draw(st.sampled_from([0, pad, pad])) for pad in fitting)
    groups, dtype = draw(st.sampled_from([1, 8])), draw(st.sampled_from(DTYPES))
    p = ONE_BY_ONE._replace(
        C=channels * groups, H=H, W=W, R=R, S=S, padding=padding, dilation=tuple(dilation), groups=groups, dtype=dtype
    )
    assume(p.P > 0 and p.Q > 0)
    windows = [d * (taps - 1) for d, taps in zip(dilation, (R, S))]
    fits = max(H, W, *padding, *windows) < 2**28 and max(p.P * p.Q, R * S * channels) < 2**31 - 1025
    unit = next((size // dtype.itemsize for size in (16, 8) if channels * dtype.itemsize % size == 0), 1)
    span = (((256 // (p.P * p.Q) + 2) * H + 2 * padding[0] + 2) * W + 2 * padding[1]) * p.C
    fits = fits and span < 2**31 * unit
    reason = checks.cuda_conv_why_not(*cuda._sizes(p), dtype.itemsize)
    assert (reason == "") == fits, reason
