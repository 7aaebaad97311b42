"""Whole random problems on every backend of this machine, and that the comparison would notice a mistake."""

import dataclasses
import json
import math
import random

import pytest
import torch

from fused_resnet import backends, testing
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import case as choosing_case
from fused_resnet.kernels import compiled
from fused_resnet.kernels.triton import runtime
from fused_resnet.operators import layout, quantized
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import AddReluProblem
from fused_resnet.testing import compare, large

SEED = 0
FIRST_TIER, FULL, CHUNK = 150, 2000, 100
# Of 150 problems, at least this many ran; seed 0 has 30 sums. Where a backend may be absent its sentence is the skip.
MINIMUM = {
    "conv_bn_act/eager": 110, "conv_bn_act/triton": 95, "conv_bn_act/onednn": 25,
    "add_relu/eager": 25, "add_relu/triton": 20, "add_relu/cpu": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return testing.verify(FIRST_TIER, SEED)


def test_no_mismatch(report):
    assert report.passed and report.problems == FIRST_TIER, str(report)


@pytest.mark.parametrize("name", MINIMUM)
def test_every_backend_really_ran(report, name):
    entry = report.backends[name]
    op, backend = name.split("/")
    everywhere = {"float64 is not supported", "it takes only a bias", "16 instructions that oneDNN"}
    missing = [why for why in entry.cannot_run if not any(part in why for part in everywhere)]
    if missing and entry.ok == 0:
        pytest.skip(f"{name}: {missing[0]}")
    is_narrow = any("no bfloat16 instructions" in why for why in entry.cannot_run)
    assert entry.ok >= (15 if is_narrow else MINIMUM[name]), entry.cannot_run
    assert 0 <= entry.worst_error <= 1


def test_reports_are_json_and_reproducible(report):
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["passed"] is True and set(plain["backends"]) >= set(MINIMUM)
    # the call that is printed is a call
    worst = plain["backends"]["conv_bn_act/eager"]
    outcome = eval(worst["worst_case"].split(": ")[0], vars(testing).copy())
    assert (outcome.status, outcome.worst_error) == ("ok", worst["worst_error"])
    one, other = (
        testing.verify(range(3, 6), SEED, backends=["eager"]),
        testing.verify(range(3, 6), SEED, backends=["eager"]),
    )
    assert one.as_dict() == other.as_dict() and all(name.endswith("/eager") for name in one.backends)


def test_progress():
    seen = []
    testing.verify(range(2, 5), SEED, backends=["eager"], progress=seen.append)
    assert seen == [2, 3, 4]


def test_draws_cover_what_they_should():
    """Over 600 cases: every dtype, activation, layout, kind of filter and subset of operands that the issue lists."""
    cases = [testing.case_at(SEED, index) for index in range(600)]
    convolutions = [case for case in cases if case.problem.op == "conv_bn_act"]
    problems = [case.problem for case in convolutions]
    assert {p.dtype for p in problems} == {torch.float32, torch.float16, torch.bfloat16, torch.float64}
    assert {p.activation for p in problems} == {"none", "relu", "relu6", "silu"}
    assert {p.N for p in problems} == {0, 1, 2, 3, 4}
    assert {p.R for p in problems} == {p.S for p in problems} == set(range(1, 8))
    depthwise = [p for p in problems if p.groups == p.C > 1]
    for interesting in (
        depthwise,
        [p for p in problems if 1 < p.groups < p.C], [p for p in problems if p.is_pointwise],
        [p for p in problems if p.C % 8 and p.K % 8], [p for p in problems if p.R != p.S],
        [p for p in problems if p.stride[0] != p.stride[1]], [p for p in problems if p.padding[0] != p.padding[1]],
        [p for p in problems if p.dilation[0] != p.dilation[1]], [p for p in problems if p.has_residual],
        [p for p in problems if p.has_bn and p.has_bias], [p for p in problems if not p.has_bn and not p.has_bias],
        [c for c in convolutions if 0 < sum(v is not None for v in c.operands.bn_vectors.values()) < 4],
        [c for c in convolutions if len({t.dtype for t in c.tensors.values()}) > 2],
        [c for c in convolutions if c.problem.dtype == torch.float64 and _vector_dtypes(c) == {torch.float32}],
        [c for c in convolutions if c.problem.dtype == torch.float16 and _vector_dtypes(c) == {torch.float32}],
        [c for c in convolutions if not all(t.isfinite().all() for t in c.tensors.values())],
        [c for c in convolutions if c.operands.bn_weight is not None and (c.operands.bn_weight < 0).any()],
        [c for c in convolutions if c.operands.bn_var is not None and 0 < c.operands.bn_var.max() < 1e-8],
        [c for c in convolutions if c.operands.bn_var is not None and c.operands.bn_var.min() > 1e3],
        [c for c in convolutions if c.operands.x.numel() and c.operands.x.abs().max() > 1e6],
        [c for c in convolutions if 0 in c.operands.x.stride()],
        [c for c in convolutions if not c.operands.x.is_contiguous(memory_format=torch.channels_last)],
        [c for c in cases if c.problem.op == "add_relu" and c.problem.same_dense_layout],
        [c for c in cases if c.problem.op == "add_relu" and not c.problem.same_dense_layout],
        [c for c in cases if c.problem.op == "add_relu" and len(c.problem.shape) != 4],
    ):  # fmt: skip
        assert len(interesting) >= 5


def test_draws_of_bytes_cover_what_they_should():
    """Over 300 cases: signs of x, output and residual, windows, layouts, ties, and every byte as a result."""
    cases = [testing.case_at(SEED, index, kind="int8") for index in range(300)]
    assert {case.problem.op for case in cases} == {"conv_int8"}
    problems, some = [case.problem for case in cases], [case for case in cases if case.problem.N]
    assert {p.dtype for p in problems} == {torch.uint8, torch.int8}
    assert {p.activation for p in problems} == {"none", "relu", "relu6"}
    for interesting in (
        [p for p in problems if p.groups > 1], [p for p in problems if p.is_pointwise],
        [p for p in problems if p.C % 16 and p.K % 16], [p for p in problems if p.stride != (1, 1)],
        [c for c in cases if c.operands.residual is not None and c.operands.residual.dtype == torch.int8],
        [c for c in cases if c.operands.residual is not None and c.operands.residual.dtype == torch.uint8],
        [c for c in cases if not c.operands.x.is_contiguous(memory_format=torch.channels_last)],
        [c for c in cases if c.operands.epilogue.residual == 0.5],
        [c for c in some if c.operands.x.unique().numel() <= 2 < c.operands.x.numel()],
        [c for c in some if c.problem.activation == "relu6" and c.expected.max() < 255],
        [c for c in some if c.expected.unique().numel() > 200],
    ):  # fmt: skip
        assert len(interesting) >= 5


def test_draws_of_e4m3_cover_what_they_should():
    cases = [testing.case_at(SEED, index, kind="float8_e4m3fn") for index in range(150)]
    assert {(case.problem.op, case.problem.dtype) for case in cases} == {("conv_float8", torch.float8_e4m3fn)}
    problems, some = [case.problem for case in cases], [case for case in cases if case.problem.N]
    assert {p.activation for p in problems} == {"none", "relu", "relu6"}
    largest = [c.operands.x.float().abs().nan_to_num().max() for c in some]
    small = [c for c in some if c.problem.flops < 2**20]
    for interesting in (
        [p for p in problems if p.groups > 1], [p for p in problems if p.is_pointwise],
        [p for p in problems if p.C % 16 and p.K % 16], [p for p in problems if p.stride != (1, 1)],
        [c for c in cases if c.operands.residual is not None], [c for c in some if c.operands.x.float().isnan().any()],
        [one for one in largest if 0 < one < 2**-5], [one for one in largest if one == 448],
        [c for c in small if c.expected.unique().numel() > 100],
    ):  # fmt: skip
        assert len(interesting) >= 2


def test_what_is_beyond_the_bound_of_e4m3_is_a_mismatch(monkeypatch):
    """A backend that is the reference is right in all; where it drops one channel of x, most are wrong."""

    def run(problem, operands):
        p, o = problem, operands if is_right else operands._replace(x=operands.x.clone())
        if not is_right:
            o.x[:, 0] = torch.zeros(()).to(o.x.dtype)
        out = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
        return layout.channels_last(out)

    monkeypatch.setitem(REGISTRY["conv_float8"], "triton", backends.Backend("triton", lambda problem: None, run))
    is_right = True
    entry = testing.verify(8, SEED, kind="float8_e4m3fn").backends["conv_float8/triton"]
    assert entry.ok == 8 and 0.1 < entry.worst_error <= 1
    is_right = False
    entry = testing.verify(8, SEED, kind="float8_e4m3fn").backends["conv_float8/triton"]
    assert len(entry.mismatches) >= 3


def test_a_byte_that_differs_is_counted_and_shown(monkeypatch):
    """A backend that is the reference compares all bytes; with its result spoilt, one differs."""

    def run(problem, operands):
        p, o = problem, operands
        out = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
        return spoil(layout.channels_last(out))

    backend = backends.Backend("spoilt", lambda problem: None, run)
    monkeypatch.setitem(REGISTRY["conv_int8"], "spoilt", backend)
    case = next(case for index in range(99) if (case := testing.case_at(SEED, index, kind="int8")).problem.N)
    spoil = lambda out: out  # noqa: E731
    right = testing.check(case, "spoilt")
    assert (right.status, right.num_bytes, right.num_differing) == ("ok", case.expected.numel(), 0)
    spoil = _poke(case.expected[-1, -1, -1, -1] ^ 1)
    wrong = testing.check(case, "spoilt")
    assert (wrong.status, wrong.num_differing) == ("mismatch", 1) and "1 of " in wrong.detail
    spoil = lambda out: out.float()  # noqa: E731
    assert "dtype is torch.float32, promised was" in testing.check(case, "spoilt").detail
    spoil = _poke(case.expected[-1, -1, -1, -1] ^ 1)
    report = testing.verify(20, SEED, backends=["spoilt"], kind="int8")
    entry = report.backends["conv_int8/spoilt"]
    assert not report.passed and entry.num_differing == len(entry.mismatches) > 0


def _vector_dtypes(case):
    return {tensor.dtype for tensor in case.tensors.values() if tensor.dim() == 1}


# ------------------------------------------------------------------------------------ the comparison notices mistakes


def broken(monkeypatch, op, spoil):
    """`check` of a backend that is eager with its result spoilt."""
    eager = backends.known(op)["eager"]

    def run(problem, *operands):
        return spoil(eager.run(problem, *operands), *operands)

    kernels = dataclasses.replace(eager.run, forward=run) if op == "add_relu" else run
    monkeypatch.setitem(REGISTRY[op], "broken", eager._replace(name="broken", run=kernels))
    indices = range(60)
    return [testing.check(case, "broken") for case in (testing.case_at(7, i) for i in indices) if case.problem.op == op]


def _poke(value):
    def spoil(out, *operands):
        if out.numel():
            out[(-1,) * out.dim()] = value
        return out

    return spoil


def _write_input(out, operands):
    operands.weight.view(-1)[0] = 3
    return out


SPOILT = {
    "last element never written": (_poke(torch.nan), "1 of"),
    "last element wrong": (_poke(-77.0), "1 of"),
    "shape": (lambda out, *_: out[:, :-1], "the output's shape is"),
    "dtype": (lambda out, *_: out.to(torch.float64 if out.dtype != torch.float64 else torch.float32), "dtype is"),
    "channels swapped": (lambda out, *_: out.flip(1).contiguous(memory_format=torch.channels_last), "elements differ"),
    "raises": (lambda out, *_: 1 / 0, "raised ZeroDivisionError"),
    "input written": (_write_input, "weight was written to"),
    "strides": (lambda out, *_: out.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), "the output's strides is"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, detail", SPOILT.values(), ids=SPOILT)
def test_a_broken_convolution_is_a_mismatch(spoil, detail, monkeypatch):
    outcomes = broken(monkeypatch, "conv_bn_act", spoil)
    found = [outcome for outcome in outcomes if outcome.status == "mismatch"]
    assert len(found) >= 0.6 * len(outcomes) and any(detail in outcome.detail for outcome in found)


def test_a_broken_sum_is_a_mismatch(monkeypatch):
    for spoil in (_poke(torch.nan), lambda out, *_: out.mul_(1 + 2**-7), lambda out, *_: out.sub_(1).relu_()):
        outcomes = broken(monkeypatch, "add_relu", spoil)
        assert sum(outcome.status == "mismatch" for outcome in outcomes) >= len(outcomes) // 2


def test_a_broken_gradient_of_a_sum_is_a_mismatch(monkeypatch):
    eager = backends.known("add_relu")["eager"]
    kernels = dataclasses.replace(eager.run, backward=lambda grad, out: grad * (out >= 0))
    spoilt = eager._replace(name="broken", run=kernels)
    monkeypatch.setitem(REGISTRY["add_relu"], "broken", spoilt)
    cases = [case for case in (testing.case_at(7, i) for i in range(60)) if case.problem.op == "add_relu"]
    assert sum("of the gradient differ" in testing.check(case, "broken").detail for case in cases) >= len(cases) // 2


def test_an_exception_is_reported_with_the_call_that_shows_it(monkeypatch):
    def run(problem, *operands):
        raise MemoryError("no")

    eager = backends.known("conv_bn_act")["eager"]
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "broken", eager._replace(name="broken", run=run))
    report = testing.verify(range(4), 3, backends=["broken"])
    assert not report.passed and report.as_dict()["passed"] is False
    convolutions = [i for i in range(4) if not isinstance(testing.case_at(3, i).problem, AddReluProblem)]
    assert f"check(case_at(3, {convolutions[0]}, 'cpu'), 'broken')" in str(report) and "MemoryError: no" in str(report)


@pytest.mark.parametrize("padding", [0, 1])
def test_torch_is_asked_about_nan_only_where_it_does_not_crash(padding, monkeypatch):
    """x is one column, padded and read at every second: no window reaches it (oneDNN issue 5942)."""
    x, weight = torch.full((1, 16, 3, 1), torch.nan), torch.ones(8, 16, 1, 1)
    operands = ConvOperands(x.bfloat16(), weight.bfloat16())
    problem = conv_problem(operands, (1, 2), (0, padding), (1, 1), 1, "relu")
    asked, conv2d = [], torch.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda *args: asked.append(args) or conv2d(*args[:4], (0, 0), *args[5:]))
    assert testing.check(testing.Case(problem, operands), "eager").status == "ok"
    assert bool(asked) == problem.reads_x == (padding == 0)


@pytest.mark.parametrize("x, status", [(-256.0, "ok"), (-255.0, "mismatch")])
def test_silu_of_a_sum_that_overflows_may_be_nan(x, status, monkeypatch):
    """-256 * 256 is -inf in fp16, of which torch's SiLU is NaN; -255 * 256 is finite."""
    operands = ConvOperands(torch.full((1, 1, 2, 2), x).half(), torch.full((1, 1, 1, 1), 256.0).half())
    case = testing.Case(conv_problem(operands, (1, 1), (0, 0), (1, 1), 1, "silu"), operands)
    eager = backends.known("conv_bn_act")["eager"]
    if status == "ok":
        assert testing.run(case, "eager").isnan().all()
    record = eager._replace(run=lambda problem, operands: eager.run(problem, operands).fill_(torch.nan))
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "eager", record)
    assert testing.check(case, "eager").status == status


def test_unknown_backends_are_refused():
    with pytest.raises(backends.BackendError, match="unknown backend 'tpu'; known ones are"):
        testing.check(testing.case_at(SEED, 0), "tpu")


def test_a_kernel_that_breaks_the_gpu_ends_the_report_and_is_in_it(monkeypatch):
    """Nothing can be computed after it, in this process."""

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    on_cpu = lambda seed, index, device, **kind: testing.case_at(seed, index, "cpu", **kind)  # noqa: E731
    monkeypatch.setattr(testing.report, "case_at", on_cpu)
    monkeypatch.setattr(compare, "synchronize", synchronize)
    monkeypatch.setattr(choosing_case, "synchronize", synchronize)
    report = testing.verify(5, seed=SEED, device="cuda", backends=["eager"])
    (entry,) = report.backends.values()
    raised, ended = entry.mismatches
    assert not report.passed and "'cuda'), 'eager')" in raised["call"] == ended["call"]
    assert "raised RuntimeError: CUDA error" in raised["detail"] and "left the device unusable" in ended["detail"]


def test_a_device_may_have_a_number():
    assert testing.verify(3, seed=SEED, device="cpu:0", backends=["eager"]).problems == 3


# ------------------------------------------------------------------------------------------- what plans of ResNets have


NEEDS_LIBRARY = pytest.mark.skipif(compiled.load("cpu") is not None, reason=str(compiled.load("cpu")))


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    "backend, problems, at_least",
    [("winograd", 150, 40), ("grouped", 150, 30), ("direct", 150, 60), ("blocked", 150, 30)],
)
def test_common_problems(backend, problems, at_least):
    report = testing.verify(problems, seed=7, backends=[backend], kind="common")
    assert report.passed, str(report)
    assert report.backends[f"conv_bn_act/{backend}"].ok > at_least


# -------------------------------------------------------------------------------------------------------------- 2,000


@pytest.mark.full
@pytest.mark.parametrize("start", range(0, FULL, CHUNK))
def test_two_thousand(start):
    """Twenty tests of a hundred problems each, so that xdist shares them among cores."""
    report = testing.verify(range(start, start + CHUNK), seed=1)
    assert report.passed, str(report)
    names = ["conv_bn_act/eager", "conv_bn_act/onednn", "add_relu/eager"]
    is_interpreted = runtime.why_not("cpu", torch.float32) is None
    for name in names + ["conv_bn_act/triton", "add_relu/triton"] * is_interpreted:
        entry = report.backends[name]
        assert entry.ok >= MINIMUM[name] * CHUNK // FIRST_TIER // 2, (name, entry.cannot_run)


def test_drawing_leaves_the_global_random_state_alone():
    """Drawing a case leaves the global generators alone, so that tests stay independent."""
    before = torch.get_rng_state()
    testing.random_case(random.Random(0))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- large problems


def test_a_large_problem_passes_what_32_bits_hold():
    for problem in testing.large_problems(SEED, "cuda:0"):
        assert problem.has_residual and problem.device == "cuda"
        for shape in (problem.output_shape, (problem.N, problem.C, problem.H, problem.W)):
            assert math.prod(shape) > 2**31 and 2 * math.prod(shape) > 2**32
    drawn = {str(testing.large_problems(seed, "cuda")) for seed in range(20)}
    assert len(drawn) == 2  # one for each dtype


@pytest.fixture
def small(monkeypatch):
    """Large problems that a CPU computes in no time."""
    monkeypatch.setattr(large, "_IMAGES", 7)
    monkeypatch.setattr(large, "_SIDE", 5)


def test_large_problems_are_verified_too(small):
    report = testing.verify(0, SEED, backends=["eager"], large=True)
    assert report.problems == 2 and report.passed
    assert report.backends["conv_bn_act/eager"].ok == 2


def test_an_image_in_the_middle_that_is_wrong_is_a_mismatch(small, monkeypatch):
    eager = backends.known("conv_bn_act")["eager"]

    def run(problem, operands):
        out = eager.run(problem, operands)
        out[4, 3, 2, 1] += 50
        return out

    monkeypatch.setitem(REGISTRY["conv_bn_act"], "broken", eager._replace(name="broken", run=run))
    entry = testing.verify(0, SEED, backends=["broken"], large=True).backends["conv_bn_act/broken"]
    assert len(entry.mismatches) == 2 and "times its bound" in entry.mismatches[0]["detail"]


def test_a_large_problem_that_does_not_fit_is_not_run(monkeypatch):
    problem = testing.large_problems(SEED, "cuda")[0]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 0))
    assert large.why_too_large(problem, "cuda") == "it needs 26 GB of memory, and 8 GB are free"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 0))
    assert large.why_too_large(problem, "cuda") is None
