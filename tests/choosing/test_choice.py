"""Who runs a problem: the fixed order, what was measured, or a name. What is said where nothing was measured."""

import logging
import math
import shlex

import pytest
import torch

import fused_resnet
from fused_resnet import backends, choosing, freeze, functional, models, testing
from fused_resnet.backends import cudnn
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import choice, winners, winners_file
from fused_resnet.freezing import modules
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.machine import devices
from fused_resnet.operators.describe import add_relu_problem
from fused_resnet.operators.problem import parsed_problem
from tests.support.tuned_files import entry, problem

NCHW = {"layout": "NCHW"}
STEM = parsed_problem("1x3x33x31 -> 8, 7x7 s2 p3 float32 bias relu", "cpu")
ONE_BY_ONE = parsed_problem("1x8x1x1 -> 8, 1x1 float16 plain relu", "cuda")


# -------------------------------------------------------------------------------------------------- the fixed order


def test_auto_takes_the_first_that_can_and_may(monkeypatch):
    calls = []

    def backend(name, auto, reason):
        def run(problem, operands):
            calls.append(name)
            return operands.x

        return backends.Backend(name, lambda problem: reason, run, backends.Auto(auto))

    registered = (
        backend("not on this device", ("cuda",), None), backend("cannot", ("cpu",), "it is broken"),
        backend("unverified", (), None), backend("first", ("cpu",), None), backend("second", ("cpu",), None),
    )  # fmt: skip
    monkeypatch.setitem(REGISTRY, "conv_bn_act", {b.name: b for b in registered})
    functional.conv_bn_act(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert calls == ["first"]
    with pytest.raises(backends.BackendError, match="'cannot' cannot run this: it is broken"):
        functional.conv_bn_act(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), backend="cannot")


def test_what_was_found_wrong_here_is_not_in_the_fixed_order(tuned_files):
    """For exactly this problem. It can still be had by name."""

    def found(**outcomes):
        checks = winners.checks_of(problem(), outcomes)
        winners.keep(winners_file.Table.empty(tuned_files.device)._replace(checks=checks))
        return choosing.select(problem()).backend.name

    onednn = choosing.Selection(backends.known("conv_bn_act")["onednn"])
    assert found(onednn={"error_ratio": 1.0}) == "onednn" and choice.why_rejected(problem(), onednn) is None
    assert found(onednn={"error_ratio": 1.01}) == "eager"
    assert choice.why_rejected(problem(), onednn) == "its error is 1.01 times what is allowed"
    assert choosing.select(problem(N=9)).backend.name == choosing.select(problem(), "onednn").backend.name == "onednn"
    assert found(onednn={"error_ratio": None}) == found(onednn={"why": "no luck"}) == "eager"
    assert found(eager={"error_ratio": None}) == "eager"  # there is nothing behind it
    assert found(onednn={"error_ratio": 0.5}) == "onednn"


def test_auto_on_the_cpu():
    """Folded: oneDNN. Live BN: ATen's convolution and one pass. fp64: ATen. Nothing that runs in an interpreter."""
    assert choosing.select(STEM).backend.name == "onednn"
    assert choosing.select(STEM._replace(has_bn=True)).backend.name == "cpu_pass"
    assert choosing.select(STEM._replace(has_bn=True, activation="silu")).backend.name == "cpu_pass"
    assert choosing.select(STEM._replace(dtype=torch.float64)).backend.name == "eager"


def test_auto_on_rocm(monkeypatch):
    """No kernel of ours and none of cuDNN's: ATen."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    sums = add_relu_problem(torch.ones(2), torch.ones(2))._replace(device="cuda")
    for has_bias in (False, True):
        assert choosing.select(ONE_BY_ONE._replace(has_bias=has_bias)).backend.name == "eager"
    assert choosing.select(sums).backend.name == "eager"
    for op, one in (("conv_bn_act", ONE_BY_ONE), ("add_relu", sums)):
        assert backends.known(op)["cuda"].why_not(one) == "it does not run on ROCm"
    assert backends.known("conv_bn_act")["cudnn"].why_not(ONE_BY_ONE) == "it does not run on ROCm"


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, "cudnn"),
        (dict(groups=2), "eager"),
        (dict(dilation=(2, 2)), "eager"),
        (dict(C=3), "eager"),
        (dict(activation="none"), "eager"),
    ],
    ids=str,
)
def test_unmeasured_cudnn_gets_what_it_surely_can(monkeypatch, changed, expected):
    """Anything else might raise in `auto`, which promises to run."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    one = ONE_BY_ONE._replace(has_bias=True, **changed)
    assert choosing.fixed_order(one, in_plan=True).backend.name == expected
    assert (cudnn.why_not(one) is None) == (one.activation == "relu")  # to be had by name


@pytest.mark.parametrize("backend", backends.known("conv_bn_act"))
def test_who_never_takes_live_bn(backend):
    """What refuses a name for every problem is the sentence that refuses one problem on the backend's own device."""
    reason = backends.why_never_live(backend)
    assert (reason is not None) == (
        backend in ("winograd", "grouped", "onednn", "direct", "blocked", "cudnn", "cublaslt")
    )
    if reason is not None:
        device = "cpu" if backend in ("winograd", "grouped", "onednn", "direct", "blocked") else "cuda"
        refused = backends.known("conv_bn_act")[backend].why_not(STEM._replace(has_bn=True, device=device))
        assert refused in (reason, "this torch has no cuDNN", "it does not run on ROCm")
    assert backends.why_never_live("auto") is None


@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_fuse_asks_no_gpu(monkeypatch, backend):
    """Whoever forks afterwards can still start CUDA there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("it asked for GPUs"))
    fused_resnet.fuse(torch.nn.Sequential(fused_resnet.nn.BasicBlock(8, 8)), backend=backend)


def test_names_are_checked_in_one_place():
    for name in ("auto", *backends.known("conv_bn_act")):
        backends.check_name("freeze", name)
    with pytest.raises(backends.BackendError, match="freeze: unknown backend 'cpu'; known ones are auto, .*onednn"):
        backends.check_name("freeze", "cpu")


# ------------------------------------------------------------------------------------------------ what was measured


def test_auto_takes_the_winner_and_its_config(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("eager", eager=(NCHW, 1.0)))
    selection = choosing.select(problem(N=7))
    assert selection.backend.name == "eager" and selection.config == backends.EagerConfig("NCHW")
    assert selection.source == f"tuned here, {path.name}, batch 8"
    assert choosing.fixed_order(problem(N=7)).backend.name == "onednn"


def test_a_backend_asked_for_by_name_takes_its_best_config(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("onednn", onednn=(None, 1.0), eager=(NCHW, 2.0)))
    selection = choosing.select(problem(), "eager")
    assert selection.config == backends.EagerConfig("NCHW")
    assert selection.source == f"asked for by name; tuned here, {path.name}, batch 8"
    assert choosing.select(problem(), "onednn") == (backends.known("conv_bn_act")["onednn"], None, "asked for by name")


@pytest.mark.parametrize(
    "winner, config, reason",
    (
        ("cudnn", None, "it runs on NVIDIA GPUs, the tensors are on cpu"),
        ("someone", None, "there is no such backend"),
        ("eager", {"layout": "NHCW"}, "it has no such config any more"),
        ("onednn", {"layout": "NCHW"}, "it has no such config any more"),
    ),
)
def test_a_winner_that_cannot_be_had_gives_way_to_the_fixed_order(tuned_files, winner, config, reason):
    tuned_files.add(tuned_files.user, problem(), entry(winner, **{winner: (config, 1.0)}))
    selection = choosing.select(problem())
    assert (selection.backend.name, selection.config) == ("onednn", None)
    assert selection.source.startswith("the fixed order of backends; tuned here, ")
    assert selection.source.endswith(f": {winner}, but {reason}")


def test_a_measured_kernel_of_ours_counts_as_verified(tuned_files, monkeypatch):
    """Not in the fixed order of any device, it is taken where it was measured, since it was checked there."""
    eager = backends.known("conv_bn_act")["eager"]
    monkeypatch.setitem(
        REGISTRY["conv_bn_act"], "ours", eager._replace(name="ours", auto=backends.Auto(), configs=None)
    )
    assert choosing.select(problem()).backend.name == "onednn"
    tuned_files.add(tuned_files.user, problem(), entry("ours"))
    assert choosing.select(problem()).backend.name == "ours"


@pytest.mark.parametrize("time_us, in_plan, is_taken", ((39.0, False, True), (37.0, False, False), (37.0, True, True)))
def test_a_config_that_is_slow_to_launch_is_for_plans_and_long_kernels(
    tuned_files, monkeypatch, time_us, in_plan, is_taken
):
    eager = backends.known("conv_bn_act")["eager"]
    slow = eager._replace(name="slow", configs=eager.configs._replace(launch_us=lambda config: 38.0))
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "slow", slow)
    tuned_files.add(tuned_files.user, problem(), entry("slow", slow=(NCHW, time_us)))
    selection = choosing.select(problem(), in_plan=in_plan)
    assert (selection.backend.name == "slow") == is_taken
    assert ("its launch takes longer than the kernel" in selection.source) != is_taken
    assert (choosing.select(problem(), "slow", in_plan=in_plan).config is not None) == is_taken


def test_only_tensor_descriptors_are_slow_to_launch():
    launch_us, tile = backends.known("conv_bn_act")["triton"].configs.launch_us, TritonConfig(64, 64, 64, 8, 4, 4)
    assert launch_us(None) == launch_us(tile) == 0 < launch_us(tile._replace(form="gemm_tma")) < math.inf


def test_row_space_is_for_plans_however_long_the_kernel(tuned_files, monkeypatch):
    """Its time holds no conversion of x, which every call outside a plan would pay."""
    triton = backends.known("conv_bn_act")["triton"]
    rows = TritonConfig(64, 16, 16, 8, 4, 3, "rows_tma")
    ours = triton._replace(why_not=lambda problem: None, configs=triton.configs._replace(legal=lambda problem: [rows]))
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "triton", ours)
    tuned_files.add(tuned_files.user, problem(), entry("triton", triton=(rows._asdict(), 1e6)))
    assert choosing.select(problem(), in_plan=True).config == rows
    assert choosing.select(problem(), in_plan=False).backend.name == "onednn"


def test_a_default_measured_without_its_name_is_named(tuned_files, monkeypatch):
    """As older versions wrote it: a plan would run another config for None."""
    eager, named = backends.known("conv_bn_act")["eager"], backends.EagerConfig("NCHW")
    ours = eager._replace(name="ours", configs=eager.configs._replace(default=lambda problem: named))
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "ours", ours)
    tuned_files.add(tuned_files.user, problem(), entry("ours"))
    assert choosing.select(problem(), in_plan=True).config == choosing.select(problem(), "ours").config == named


def test_where_x_cannot_lie_in_row_space_the_second_winner_counts(tuned_files, monkeypatch):
    eager = backends.known("conv_bn_act")["eager"]
    reads = eager.configs._replace(reads_row_space=lambda config: config is not None)
    ours = eager._replace(name="ours", configs=reads)
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "ours", ours)
    best = entry("ours", ours=(NCHW, 1.0), eager=(NCHW, 3.0))
    second = entry("eager", ours=(None, 9.0), eager=(NCHW, 3.0))
    for in_nhwc in (second, None):
        tuned_files.add(tuned_files.user, problem(), best._replace(in_nhwc=in_nhwc))
        assert choosing.select(problem(), in_plan=True).backend.name == "ours"
        for in_plan in (True, False):
            # an older entry does not say: the fixed order
            expected = "eager" if in_nhwc else choosing.fixed_order(problem(), in_plan).backend.name
            assert choosing.select(problem(), in_plan=in_plan, in_nhwc=in_plan).backend.name == expected
        assert choosing.select(problem(), "ours", in_plan=True, in_nhwc=True).config is None


def test_the_operator_runs_the_winner(tuned_files, monkeypatch):
    case = next(c for c in map(lambda i: testing.case_at(7, i), range(99)) if c.problem.op == "conv_bn_act"
                and not c.problem.has_bn and c.problem.N and c.problem.dtype == torch.float32)  # fmt: skip
    tuned_files.add(tuned_files.user, case.problem, entry("eager", eager=(NCHW, 1.0)))
    eager, configs = backends.known("conv_bn_act")["eager"], []

    def run(problem, operands, config=None):
        configs.append(config)
        return eager.run(problem, operands, config)

    monkeypatch.setitem(REGISTRY["conv_bn_act"], "eager", eager._replace(run=run))
    assert testing.check(case, "eager").status == "ok"
    testing.run(case, "auto")
    assert configs == [backends.EagerConfig("NCHW")] * 2


def test_a_frozen_plan_honours_the_choice(tuned_files):
    """And computes the same with it."""
    torch.manual_seed(0)
    model, x = models.create("resnet20").eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    convs = [m for m in freeze(model, x).plan(x).modules() if isinstance(m, modules.FrozenConv)]
    assert "eager" not in {conv.backend.name for conv in convs}
    chosen = [conv.problem for conv in convs if conv.problem.has_residual]
    for one in set(chosen):
        tuned_files.add(tuned_files.user, one, entry("eager", eager=(NCHW, 1.0)))
    frozen = freeze(model, x)
    convs = [m for m in frozen.plan(x).modules() if isinstance(m, modules.FrozenConv)]
    eager = [conv for conv in convs if conv.backend.name == "eager"]
    assert [conv.problem for conv in eager] == chosen and len(convs) > len(eager) > 0
    assert all(conv.weight.is_contiguous() and not conv.in_place for conv in eager)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)


def test_selections_are_made_again_after_tuning(tuned_files):
    assert choosing.select(problem()).backend.name == "onednn"
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    assert choosing.select(problem()).backend.name == "eager"


def test_functional_errors_are_as_before(tuned_files):
    """A name is checked before any file is asked."""
    with pytest.raises(backends.BackendError, match="unknown backend 'best'"):
        functional.conv_bn_act(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), backend="best")


# ---------------------------------------------------------------------------------------------------- the missing entry


@pytest.fixture
def gpu_backend(monkeypatch):
    """A backend with configs that runs on CUDA, and a GPU by name."""
    eager = backends.known("conv_bn_act")["eager"]
    tunable = eager._replace(
        name="tunable", auto=backends.Auto(), configs=backends.Configs(lambda problem: [backends.EagerConfig("NCHW")])
    )
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "tunable", tunable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(devices, "least_capability", lambda: None)  # nothing is asked of GPUs that are not there


def test_a_miss_is_said_once_with_the_command_that_tunes(tuned_files, gpu_backend, caplog):
    from click.testing import CliRunner

    from fused_resnet.cli.tune import tune

    missed = problem(64, torch.float16, "cuda")
    with caplog.at_level(logging.WARNING, "fused_resnet"):
        for N in (64, 3):
            assert choosing.select(missed._replace(N=N)).source == choice.FIXED_ORDER
    (message,) = caplog.messages
    command = message.partition("convolution: ")[2].partition(";")[0]
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("fused-resnet", "tune") and "NVIDIA H200" in message
    options = tune.make_context("tune", ["--device", "cpu", *arguments[2:]]).params
    assert parsed_problem(options["convs"][0], "cuda") == missed
    model_command = message.partition("model's: ")[2].partition(" (said")[0]
    assert shlex.split(model_command)[4:] == ["--model", "resnet50", "--batch", "64", "--dtype", "fp16"]
    assert CliRunner().invoke(tune, ["--help"]).exit_code == 0


def test_what_needs_no_tuning_is_no_miss(tuned_files, gpu_backend, caplog, monkeypatch):
    choosing.select(problem())  # a CPU
    choosing.select(problem(device="cuda", dtype=torch.float64))
    monkeypatch.setattr(winners, "warned", set())
    monkeypatch.setenv("FUSED_RESNET_TUNED", "0")
    choosing.select(problem(device="cuda"))
    assert not caplog.messages


def test_gpus_of_different_kinds_use_no_measurements(tuned_files, gpu_backend, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    choosing.select(problem(device="cuda"))
    assert "GPUs of different kinds" in caplog.text and winners.device_id("cuda") is None
