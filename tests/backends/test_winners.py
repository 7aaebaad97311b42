"""What was measured is found again: nearest batch, whose file counts, bad files, and what `auto` makes of it."""

import json
import logging
import math
import multiprocessing
import shlex

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_resnet import backends, freeze, functional, models, testing
from fused_resnet.backends import choice as choice_module
from fused_resnet.backends import record as registry
from fused_resnet.backends import winners, winners_file
from fused_resnet.freezing import modules
from fused_resnet.kernels import compiled, sources
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.measuring import verified
from fused_resnet.operators.problem import AddReluProblem, parsed_problem
from tests.support.tuned_files import entry, problem

NCHW = {"layout": "NCHW"}


def choice(N=8, backend=None, **changes):
    return winners.lookup(problem(N, **changes), backend)


# ------------------------------------------------------------------------------------------------------------ lookup


def test_nothing_measured(tuned_files):
    assert choice() is None and winners.lookup(AddReluProblem((2, 3), True, torch.float32, "cpu")) is None
    assert choice(device="meta") is None


def test_the_nearest_batch_in_log_space_answers(tuned_files):
    for batch, winner in ((1, "eager"), (32, "onednn"), (256, "eager")):
        tuned_files.add(tuned_files.user, problem(batch), entry(winner))
    name = tuned_files.path(tuned_files.user).name
    for N, batch in ((0, 1), (1, 1), (5, 1), (6, 32), (32, 32), (90, 32), (91, 256), (5000, 256)):
        found = choice(N)
        assert found.source == f"tuned here, {name}, batch {batch}", N
        assert found.backend == ("onednn" if batch == 32 else "eager")


def test_the_larger_batch_answers_halfway(tuned_files):
    for batch in (4, 16):
        tuned_files.add(tuned_files.user, problem(batch), entry("eager"))
    assert choice(8).source.endswith("batch 16")


def test_a_key_is_everything_but_the_batch(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    assert choice() is not None
    different = (
        dict(C=32), dict(H=9), dict(W=9), dict(K=32), dict(R=1), dict(S=1), dict(stride=(2, 2)), dict(padding=(0, 0)),
        dict(dilation=(2, 2)), dict(groups=2), dict(activation="none"), dict(has_bn=True), dict(has_bias=False),
        dict(has_residual=True), dict(dtype=torch.bfloat16),
    )  # fmt: skip
    for changes in different:
        assert choice(**changes) is None, changes


def test_threads_are_told_apart(tuned_files):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert choice() is None
            tuned_files.add(tuned_files.user, problem(), entry(("eager", "onednn")[threads - 1]))
        torch.set_num_threads(1)
        assert choice().backend == "eager"
    finally:
        torch.set_num_threads(before)


def test_what_was_tuned_here_comes_before_what_ships_batch_by_batch(tuned_files):
    tuned_files.add(tuned_files.shipped, problem(8), entry("eager"))
    tuned_files.add(tuned_files.shipped, problem(64), entry("eager"))
    name = tuned_files.path(tuned_files.shipped).name
    assert choice(8) == ("eager", None, f"configs/{name}, tuned for batch 8", 10.0)
    tuned_files.add(tuned_files.user, problem(8), entry("onednn"))
    assert choice(8) == ("onednn", None, f"tuned here, {name}, batch 8", 10.0)
    assert choice(64) == ("eager", None, f"configs/{name}, tuned for batch 64", 10.0)


def test_the_best_config_of_each_backend_is_kept(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("onednn", onednn=(None, 10.0), eager=(NCHW, 12.0)))
    assert choice() == choice(backend="onednn") and choice().config is None
    assert choice(backend="eager").config == NCHW
    assert choice(backend="triton") is None


def test_switched_off(tuned_files, monkeypatch):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    monkeypatch.setenv("FUSED_RESNET_TUNED", "0")
    winners.forget()
    assert choice() is None


def test_ignored_for_a_comparison(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    with winners.ignored():
        assert choice() is None and backends.select(problem()).source == choice_module.FIXED_ORDER
    assert choice().backend == "eager"


def test_a_second_lookup_reads_nothing(tuned_files, monkeypatch):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    first = choice()
    monkeypatch.setattr(winners.files, "read_json", None)
    assert choice() is first and choice(9).backend == "eager"


def test_runs_that_no_entry_names_are_dropped(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("eager", run="first"))
    path = tuned_files.add(tuned_files.user, problem(), entry("eager", run="second"))
    assert list(json.loads(path.read_text())["runs"]) == ["second"]


def test_what_ships_can_be_read():
    for path in winners.SHIPPED.glob("*.json"):
        table = winners_file.Table.from_json(json.loads(path.read_text()))
        assert path.name == winners_file.file_name(table.device) and table.entries
        for by_batch in table.entries.values():
            for one in by_batch.values():
                assert one.winner in backends.known("conv_bn_act") and table.runs[one.run]["torch"]


# --------------------------------------------------------------------------------------------------------- bad files


def damaged(change):
    """How a file is spoilt: a function of its parsed content."""

    def write(path):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(change(record) or record))

    return write


def _in_entry(**changes):
    def change(record):
        for by_batch in record["entries"].values():
            for one in by_batch.values():
                one.update(changes)

    return damaged(change)


BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "binary": lambda path: path.write_bytes(b"\x00\xff" * 50),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another schema": damaged(lambda record: record.update(schema=winners_file.SCHEMA + 1)),
    "another device": damaged(lambda record: record.update(device="NVIDIA H200")),
    "a list": damaged(lambda record: [record]),
    "no entries": damaged(lambda record: record.pop("entries") and None),
    "a batch of 0": damaged(lambda record: record["entries"].update({"x": {"0": {}}})),
    "an unmeasured winner": _in_entry(winner="cuda"),
    "a wrong winner": _in_entry(candidates={"onednn": {"config": None, "time_us": 1.0, "error_ratio": 1.5}}),
    "no error": _in_entry(candidates={"onednn": {"config": None, "time_us": 1.0, "error_ratio": None}}),
    "no time": _in_entry(candidates={"onednn": {"config": None, "time_us": float("nan"), "error_ratio": 0.1}}),
    "a time beyond floats": _in_entry(candidates={"onednn": {"config": None, "time_us": 10**400, "error_ratio": 0.1}}),
    "no end": _in_entry(candidates={"onednn": {"config": None, "time_us": float("inf"), "error_ratio": 0.1}}),
    "a batch beyond floats": damaged(
        lambda record: [by_batch.update({"1" * 400: by_batch["8"]}) for by_batch in record["entries"].values()] and None
    ),
    "no digests": damaged(lambda record: [run.update(kernels=None) for run in record["runs"].values()] and None),
    "a nested config": _in_entry(candidates={"onednn": {"config": {"a": []}, "time_us": 1.0, "error_ratio": 0.1}}),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_bad_file_is_reported_once_and_ignored(tuned_files, caplog, spoil):
    tuned_files.add(tuned_files.shipped, problem(), entry("eager"))
    tuned_files.add(tuned_files.user, problem(), entry("onednn"))
    spoil(tuned_files.path(tuned_files.user))
    for _ in range(2):
        winners.forget()
        assert choice().backend == "eager"  # the shipped file still counts
    assert sum("ignored" in message for message in caplog.messages) == 1


def test_a_kernels_measurement_without_digests_does_not_raise(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("triton", triton=(None, 1.0)))
    damaged(lambda record: [run.update(kernels=None) for run in record["runs"].values()] and None)(path)
    winners.forget()
    assert choice() is None and isinstance(backends.select(problem(), "auto"), backends.Selection)


def test_a_bad_file_is_replaced_by_what_is_measured_next(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("onednn"))
    path.write_text("{")
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    assert choice().backend == "eager"


def _add_batches(files_of_test, batches):
    for batch in batches:
        files_of_test.add(files_of_test.user, problem(batch), entry("eager"))


def test_two_processes_that_tune_at_once_keep_each_others_entries(tuned_files):
    fork = multiprocessing.get_context("fork")
    tuned_files.add(tuned_files.user, problem(1000), entry("eager"))  # digests and threads are known before the fork
    writers = [fork.Process(target=_add_batches, args=(tuned_files, range(n, 30, 2))) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    table = winners_file.read(tuned_files.path(tuned_files.user), tuned_files.device)
    (by_batch,) = table.entries.values()
    assert sorted(by_batch) == [*range(1, 30), 1000]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_a_file_makes_lookup_raise(tuned_files, data):
    """One value anywhere in a good file is replaced by another: it is understood, or ignored."""
    path = tuned_files.add(tuned_files.user, problem(), entry("eager", eager=(NCHW, 3.0)))
    record = json.loads(path.read_text())
    place = record
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    path.write_text(json.dumps(record))
    winners.forget()
    found = choice()
    assert found is None or isinstance(found, winners.Winner)
    for name in ("auto", "eager"):
        assert isinstance(backends.select(problem(), name), backends.Selection)
    path.unlink()


# ----------------------------------------------------------------------------------------------------------- kernels


def test_kernels_that_changed_since_are_not_verified_any_more(tuned_files, caplog):
    digests = winners.kernel_digests()
    assert digests["triton"] is not None
    measured = entry("triton", triton=(None, 1.0), onednn=(None, 2.0))
    tuned_files.add(tuned_files.user, problem(), measured, kernels=digests)
    assert choice().backend == "triton"
    tuned_files.add(tuned_files.user, problem(), measured, kernels={**digests, "triton": "0123456789abcdef"})
    assert choice() is None and choice(backend="onednn").backend == "onednn"
    assert sum("have changed" in message for message in caplog.messages) == 1


def test_an_unknown_digest_is_no_agreement(tuned_files, monkeypatch):
    """A library whose build did not say what it was compiled from."""
    monkeypatch.setattr(compiled, "built_digest", lambda patterns: None)
    tuned_files.add(tuned_files.user, problem(), entry("cuda"), kernels={"cuda": None})
    assert choice() is None


def test_tools_beside_the_kernels_are_no_kernels(tmp_path):
    for file, is_kernel in (
        ("fused_resnet/kernels/triton/aot.py", False), ("fused_resnet/kernels/triton/conv/launch.py", True),
        ("fused_resnet/kernels/triton/interpreter.py", False), ("fused_resnet/kernels/triton/runtime.py", True),
        ("csrc/cpu/add_relu.cpp", False), ("csrc/cpu/vectors.h", False), ("csrc/host_checks/host_checks.cpp", False),
        ("csrc/host_checks/emulated_device.h", False), ("csrc/common/checks.h", True),
        ("csrc/cuda/conv_shape.h", True), ("csrc/cuda/operators.cpp", True), ("csrc/cuda/sm80/conv_bn_act.cu", True),
    ):  # fmt: skip
        assert (file in verified.gpu_kernels()) == is_kernel, file
    for folder in ("cpu", "cuda"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    assert sources.kernel_digest(sources.CUDA, tmp_path) is None
    digests = []
    for name, text in (("cuda/a.cu", "1"), ("cpu/a.cpp", "1"), ("cpu/a.cpp", "2"), ("cuda/a.cu", "2")):
        (tmp_path / "csrc" / name).write_text(text)
        digests.append(sources.kernel_digest(sources.CUDA, tmp_path))
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_the_build_says_what_the_cuda_kernels_were_compiled_from(monkeypatch):
    """And not the sources beside it, which may have been edited since."""
    built = {"csrc/cuda/a.cu": "0123", "csrc/common/b.h": "4567", "csrc/cpu/c.cpp": "89ab"}
    digests = []
    for changed in ({}, {"csrc/cpu/c.cpp": "other"}, {"csrc/common/b.h": "other"}, {"csrc/cuda/a.cu": "other"}):
        monkeypatch.setattr(compiled, "build_record", lambda changed=changed: {"sources": built | changed})
        digests.append(compiled.built_digest.__wrapped__(sources.CUDA))
    assert digests[0] == digests[1] and len(set(digests[1:])) == 3 and None not in digests
    monkeypatch.setattr(compiled, "build_record", dict)
    assert compiled.built_digest.__wrapped__(sources.CUDA) is None


# -------------------------------------------------------------------------------------------------------------- auto


def test_auto_takes_the_winner_and_its_config(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("eager", eager=(NCHW, 1.0)))
    selection = backends.select(problem(N=7))
    assert selection.backend.name == "eager" and selection.config == backends.EagerConfig("NCHW")
    assert selection.source == f"tuned here, {path.name}, batch 8"
    assert backends.fixed_order(problem(N=7)).backend.name == "onednn"


def test_a_backend_asked_for_by_name_takes_its_best_config(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("onednn", onednn=(None, 1.0), eager=(NCHW, 2.0)))
    selection = backends.select(problem(), "eager")
    assert selection.config == backends.EagerConfig("NCHW")
    assert selection.source == f"asked for by name; tuned here, {path.name}, batch 8"
    assert backends.select(problem(), "onednn") == (backends.known("conv_bn_act")["onednn"], None, "asked for by name")


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
    selection = backends.select(problem())
    assert (selection.backend.name, selection.config) == ("onednn", None)
    assert selection.source.startswith("the fixed order of backends; tuned here, ")
    assert selection.source.endswith(f": {winner}, but {reason}")


def test_a_measured_kernel_of_ours_counts_as_verified(tuned_files, monkeypatch):
    """Not in the fixed order of any device, it is taken where it was measured, since it was checked there."""
    eager = backends.known("conv_bn_act")["eager"]
    monkeypatch.setitem(
        registry.REGISTRY["conv_bn_act"], "ours", eager._replace(name="ours", auto=backends.Auto(), configs=None)
    )
    assert backends.select(problem()).backend.name == "onednn"
    tuned_files.add(tuned_files.user, problem(), entry("ours"))
    assert backends.select(problem()).backend.name == "ours"


@pytest.mark.parametrize("time_us, in_plan, is_taken", ((39.0, False, True), (37.0, False, False), (37.0, True, True)))
def test_a_config_that_is_slow_to_launch_is_for_plans_and_long_kernels(
    tuned_files, monkeypatch, time_us, in_plan, is_taken
):
    eager = backends.known("conv_bn_act")["eager"]
    slow = eager._replace(name="slow", configs=eager.configs._replace(launch_us=lambda config: 38.0))
    monkeypatch.setitem(registry.REGISTRY["conv_bn_act"], "slow", slow)
    tuned_files.add(tuned_files.user, problem(), entry("slow", slow=(NCHW, time_us)))
    selection = backends.select(problem(), in_plan=in_plan)
    assert (selection.backend.name == "slow") == is_taken
    assert ("its launch takes longer than the kernel" in selection.source) != is_taken
    assert (backends.select(problem(), "slow", in_plan=in_plan).config is not None) == is_taken


def test_only_tensor_descriptors_are_slow_to_launch():
    launch_us, tile = backends.known("conv_bn_act")["triton"].configs.launch_us, TritonConfig(64, 64, 64, 8, 4, 4)
    assert launch_us(None) == launch_us(tile) == 0 < launch_us(tile._replace(form="gemm_tma")) < math.inf


def test_row_space_is_for_plans_however_long_the_kernel(tuned_files, monkeypatch):
    """Its time holds no conversion of x, which every call outside a plan would pay."""
    triton = backends.known("conv_bn_act")["triton"]
    rows = TritonConfig(64, 16, 16, 8, 4, 3, "rows_tma")
    ours = triton._replace(why_not=lambda problem: None, configs=triton.configs._replace(legal=lambda problem: [rows]))
    monkeypatch.setitem(registry.REGISTRY["conv_bn_act"], "triton", ours)
    tuned_files.add(tuned_files.user, problem(), entry("triton", triton=(rows._asdict(), 1e6)))
    assert backends.select(problem(), in_plan=True).config == rows
    assert backends.select(problem(), in_plan=False).backend.name == "onednn"


def test_a_default_measured_without_its_name_is_named(tuned_files, monkeypatch):
    """As older versions wrote it: a plan would run another config for None."""
    eager, named = backends.known("conv_bn_act")["eager"], backends.EagerConfig("NCHW")
    ours = eager._replace(name="ours", configs=eager.configs._replace(default=lambda problem: named))
    monkeypatch.setitem(registry.REGISTRY["conv_bn_act"], "ours", ours)
    tuned_files.add(tuned_files.user, problem(), entry("ours"))
    assert backends.select(problem(), in_plan=True).config == backends.select(problem(), "ours").config == named


def test_where_x_cannot_lie_in_row_space_the_second_winner_counts(tuned_files, monkeypatch):
    eager = backends.known("conv_bn_act")["eager"]
    reads = eager.configs._replace(reads_row_space=lambda config: config is not None)
    ours = eager._replace(name="ours", configs=reads)
    monkeypatch.setitem(registry.REGISTRY["conv_bn_act"], "ours", ours)
    best = entry("ours", ours=(NCHW, 1.0), eager=(NCHW, 3.0))
    second = entry("eager", ours=(None, 9.0), eager=(NCHW, 3.0))
    for in_nhwc in (second, None):
        tuned_files.add(tuned_files.user, problem(), best._replace(in_nhwc=in_nhwc))
        assert backends.select(problem(), in_plan=True).backend.name == "ours"
        for in_plan in (True, False):
            # an older entry does not say: the fixed order
            expected = "eager" if in_nhwc else backends.fixed_order(problem(), in_plan).backend.name
            assert backends.select(problem(), in_plan=in_plan, in_nhwc=in_plan).backend.name == expected
        assert backends.select(problem(), "ours", in_plan=True, in_nhwc=True).config is None


def test_the_operator_runs_the_winner(tuned_files, monkeypatch):
    case = next(c for c in map(lambda i: testing.case_at(7, i), range(99)) if c.problem.op == "conv_bn_act"
                and not c.problem.has_bn and c.problem.N and c.problem.dtype == torch.float32)  # fmt: skip
    tuned_files.add(tuned_files.user, case.problem, entry("eager", eager=(NCHW, 1.0)))
    eager, configs = backends.known("conv_bn_act")["eager"], []

    def run(problem, operands, config=None):
        configs.append(config)
        return eager.run(problem, operands, config)

    monkeypatch.setitem(registry.REGISTRY["conv_bn_act"], "eager", eager._replace(run=run))
    assert testing.check(case, "eager").status == "ok"
    case.run("auto")
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
    assert backends.select(problem()).backend.name == "onednn"
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    assert backends.select(problem()).backend.name == "eager"


# ---------------------------------------------------------------------------------------------------- the missing entry


@pytest.fixture
def gpu_backend(monkeypatch):
    """A backend with configs that runs on CUDA, and a GPU by name."""
    eager = backends.known("conv_bn_act")["eager"]
    tunable = eager._replace(
        name="tunable", auto=backends.Auto(), configs=backends.Configs(lambda problem: [backends.EagerConfig("NCHW")])
    )
    monkeypatch.setitem(registry.REGISTRY["conv_bn_act"], "tunable", tunable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(runtime, "least_capability", lambda: None)  # nothing is asked of GPUs that are not there


def test_a_miss_is_said_once_with_the_command_that_tunes(tuned_files, gpu_backend, caplog):
    from click.testing import CliRunner

    from fused_resnet.cli.tune import tune

    missed = problem(64, torch.float16, "cuda")
    with caplog.at_level(logging.WARNING, "fused_resnet"):
        for N in (64, 3):
            assert backends.select(missed._replace(N=N)).source == choice_module.FIXED_ORDER
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
    backends.select(problem())  # a CPU
    backends.select(problem(device="cuda", dtype=torch.float64))
    monkeypatch.setattr(winners, "warned", set())
    monkeypatch.setenv("FUSED_RESNET_TUNED", "0")
    backends.select(problem(device="cuda"))
    assert not caplog.messages


def test_gpus_of_different_kinds_use_no_measurements(tuned_files, gpu_backend, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    backends.select(problem(device="cuda"))
    assert "GPUs of different kinds" in caplog.text and winners.device_id("cuda") is None


# -------------------------------------------------------------------------------------------------------------- text


def test_a_problem_is_read_back_from_what_is_printed():
    cases = (testing.case_at(11, index) for index in range(150))
    problems = {case.problem for case in cases if case.problem.op == "conv_bn_act" and case.problem.N}
    assert len(problems) > 80
    for one in problems:
        assert parsed_problem(f" {one} ", "cpu") == one


@pytest.mark.parametrize(
    "text",
    (
        "", "resnet50", "1x4x4x4 -> 4, 3x3 s0 float32 plain relu", "0x4x4x4 -> 4, 3x3 float32 plain relu",
        "1x4x2x2 -> 4, 3x3 float32 plain relu", "1x4x4x4 -> 4, 3x3 g3 float32 plain relu",
        "1x4x4x4 -> 4, 3x3 int32 plain relu", "1x4x4x4 -> 4, 3x3 float32 plain gelu",
        "1x4x4x4 -> 4, 3x3 float32 bias+bn relu", "1x4x4x4 -> 4, 3x3 Tensor plain relu",
    ),
)  # fmt: skip
def test_what_is_no_problem_is_refused(text):
    with pytest.raises(ValueError, match="is no convolution|has no output"):
        parsed_problem(text, "cpu")


def test_functional_errors_are_as_before(tuned_files):
    """A name is checked before any file is asked."""
    with pytest.raises(backends.BackendError, match="unknown backend 'best'"):
        functional.conv_bn_act(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), backend="best")
