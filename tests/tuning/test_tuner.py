"""The tuner: what is a candidate, who wins, wrong and crashing candidates, interruption, budget, journal, command."""

import contextlib
import json
import math
import os

import pytest
import torch
from click.testing import CliRunner

from fused_resnet import backends, choosing, measuring, models
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import candidates, checking, choice, decide, planned, timing, winners, winners_file
from fused_resnet.cli import main
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.kernels.triton.conv.configs import TritonConfig, default_config
from fused_resnet.machine import cuda_graphs, devices
from fused_resnet.measuring import environment
from fused_resnet.tuning import convolution, tuner
from tests.support.tuned_files import problem

EAGER = backends.known("conv_bn_act")["eager"]
PROBLEMS = [problem(2), problem(1, C=32)]
CHECKS = 4  # calls for one check: NaN, values, NaN, other values


class Fake:
    """A backend that answers as `answer` says, and counts its calls. config: of the one config it has beside None."""

    def __init__(self, monkeypatch, name, answer=None, **fields):
        self.calls, self.answer = [], answer
        backend = backends.Backend(name, lambda problem: None, self.run, **fields)
        monkeypatch.setitem(REGISTRY["conv_bn_act"], name, backend)

    def run(self, problem, operands, config=None):
        self.calls.append((problem, config))
        out = EAGER.run(problem, operands)
        return out if self.answer is None else self.answer(problem, out)


@pytest.fixture
def times(monkeypatch):
    """Microseconds by backend name instead of a clock (100 for those not named); the calls are made, once each."""
    given = {}

    def timed(candidate, fed):
        fed.feed()
        fed.call()
        time_us = float(given.get(str(candidate), given.get(candidate.backend.name, 100.0)))
        return timing.Stats(time_us, time_us, time_us, time_us, 1)

    def in_network_order(groups, **options):
        assert options["device"] == "cpu" and options["rounds"] > 0 and options["budget_s"] > 0
        return {group: {one: timed(one, fed) for one, fed in calls.items()} for group, calls in groups.items()}

    monkeypatch.setattr(timing, "in_network_order", in_network_order)
    return given


def tune(problems=PROBLEMS, **options):
    return tuner.tune(problems, device="cpu", folder=winners.user_folder(), **options)


def names(rows):
    return [one["backend"] for one in rows]


# -------------------------------------------------------------------------------------------------------- candidates


def test_candidates_start_with_the_fixed_order_and_say_why_others_are_none(tuned_files):
    found, skipped = candidates.candidates(problem())
    assert found[0] == choosing.Selection(choosing.fixed_order(problem(), in_plan=True).backend)
    assert {choosing.Selection(EAGER), choosing.Selection(EAGER, backends.EagerConfig("NCHW"))} <= set(found)
    assert "NVIDIA" in skipped["cudnn"] and "NVIDIA" in skipped["cublaslt"] and "interpreter" in skipped["triton"]
    assert len(set(map(str, found))) == len(found)
    live = problem(has_bn=True, has_bias=False)
    found, skipped = candidates.candidates(live)
    assert found[0].backend.name == "cpu_pass" and EAGER in [one.backend for one in found]
    assert "folded BN" in skipped["onednn"]


def test_the_convolutions_of_models_by_their_share_of_the_work():
    networks = {"resnet20": (models.create("resnet20"), (3, 32, 32))}
    dtypes = (torch.float32, torch.bfloat16)
    found = tuner.problems_of(networks, [1, 4], dtypes, "cpu")
    assert len(found) == len(set(found)) == 9 * 2 * 2
    assert {(p.N, p.dtype) for p in found} == {(N, dtype) for N in (1, 4) for dtype in dtypes}
    assert found[-1].C == 3 and not any(p.has_bn for p in found)
    live = tuner.problems_of(networks, [1], dtypes[:1], "cpu", live_bn=True)
    assert all(p.has_bn and not p.has_bias for p in live) and len(live) == 9


# ------------------------------------------------------------------------------------------------------------ winners


def test_the_fastest_right_candidate_is_what_auto_takes_from_then_on(tuned_files, times, monkeypatch):
    Fake(
        monkeypatch, "quick", configs=backends.Configs(lambda p: [backends.EagerConfig("x"), backends.EagerConfig("y")])
    )
    times.update({"onednn": 10, "quick": 9, "quick layout=y": 5})
    result = tune()
    for one, row in zip(PROBLEMS, result["rows"]):
        assert row["problem"] == str(one) and row["winner"] == {"backend": "quick", "config": {"layout": "y"}}
        assert choosing.select(one._replace(N=17)).source == choice.FIXED_ORDER  # too far from what was measured
        selection = choosing.select(one._replace(N=2 * one.N))
        assert (selection.backend.name, selection.config) == ("quick", backends.EagerConfig("y"))
        assert selection.source == f"tuned here, {result['file']}, batch {one.N}"
    record = json.loads((winners.user_folder() / result["file"]).read_text())
    (run,) = record["runs"].values()
    assert {"cpu", "threads", "torch", "triton", "commit", "kernels"} <= set(run)
    assert str(sources.ROOT) not in json.dumps(record) and os.uname().nodename not in json.dumps(record)
    assert result["remaining"] == []


@pytest.mark.parametrize("median, least, wins", ((96.0, 96.0, True), (98.0, 98.0, False), (90.0, 98.0, False)))
def test_the_fixed_order_keeps_its_place_unless_it_is_clearly_beaten(median, least, wins):
    own, other = (choosing.Selection(EAGER._replace(name=name), None) for name in ("own", "other"))
    stats = {own: timing.Stats(100.0, 100.0, 0, 0, 9), other: timing.Stats(median, least, 0, 0, 9)}
    assert decide.winner_of(own, stats) is (other if wins else own)


def test_without_the_fixed_order_the_fastest_wins():
    other = choosing.Selection(EAGER, None)
    own = choosing.Selection(EAGER._replace(name="own"), None)
    assert decide.winner_of(own, {other: timing.Stats(1, 1, 1, 1, 1)}) is other


def test_an_entry_keeps_the_best_of_each_backend_and_the_winner_itself():
    """The winner may be a default within the margin of a faster config of its own backend."""
    x = backends.EagerConfig("x")
    rows = [("a", None, 10.0), ("a", x, 9.9), ("b", x, 12.0), ("b", None, 11.0)]
    made = {name: EAGER._replace(name=name) for name in "ab"}
    stats = {choosing.Selection(made[name], config): timing.Stats(us, us, us, us, 9) for name, config, us in rows}
    outcomes = {str(one): {"error_ratio": 0.5 if one.config is None else 0.25} for one in stats}
    entry = decide.measured_entry(choosing.Selection(made["a"], None), stats, outcomes, "run")
    assert entry.candidates == {
        "a": winners_file.Measured(None, 10.0, 0.5),
        "b": winners_file.Measured(None, 11.0, 0.5),
    }
    assert (entry.winner, entry.default, entry.run, entry.in_nhwc) == ("a", "a", "run", None)


def test_a_default_that_a_plan_would_replace_is_measured_by_its_name(monkeypatch):
    """A plan takes another config for None, which then is not what was timed."""
    one, config = problem(), backends.EagerConfig("x")
    Fake(monkeypatch, "named", configs=backends.Configs(lambda p: [config], default=lambda p: config))
    found, _ = candidates.candidates(one)
    assert [found_one.config for found_one in found if found_one.backend.name == "named"] == [config]
    triton = backends.known("conv_bn_act")["triton"]
    assert candidates.default_config(one, triton) == default_config(one)


def test_an_entry_keeps_a_second_winner_for_where_x_cannot_lie_in_row_space():
    reads = EAGER.configs._replace(reads_row_space=lambda config: config == backends.EagerConfig("rows"))
    ours, default = EAGER._replace(name="ours", configs=reads), choosing.Selection(EAGER._replace(name="cudnn"), None)
    rows, other = (choosing.Selection(ours, backends.EagerConfig(layout)) for layout in ("rows", "other"))
    for other_us, winner in ((8.0, "ours"), (9.9, "cudnn")):
        times = {default: 10.0, rows: 5.0, other: other_us}
        stats = {one: timing.Stats(us, us, us, us, 9) for one, us in times.items()}
        row = convolution._row(problem(), "cpu", default, dict.fromkeys(stats, {"error_ratio": 0.5}), stats, {})
        entry = convolution.entry_of(json.loads(json.dumps(row)), "run")
        assert (entry.winner, entry.candidates["ours"].config) == ("ours", {"layout": "rows"})
        assert entry.run == entry.in_nhwc.run == "run"
        assert (entry.in_nhwc.winner, entry.in_nhwc.candidates["ours"].config) == (winner, {"layout": "other"})
        assert entry.in_nhwc.candidates["cudnn"].time_us == 10.0
        assert winners_file.Entry.from_json(json.loads(json.dumps(entry.as_json()))) == entry


@pytest.fixture
def packed(monkeypatch):
    """The shapes that were converted into row space, in order."""
    shapes, pack = [], row_space.pack
    monkeypatch.setattr(row_space, "pack", lambda x: shapes.append(x.shape) or pack(x))
    return shapes


ROWS = TritonConfig(64, 16, 16, 8, 4, 2, "rows_tma")
needs_interpreter = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs Triton's interpreter")


@needs_interpreter
@pytest.mark.parametrize("has_residual", (False, True))
def test_a_time_in_row_space_holds_no_conversion(packed, has_residual):
    """x lies there before the call, as a plan has it. The output is NHWC, and checked as any other."""
    subject = checking.Subject(problem(2, has_residual=has_residual), "cpu")
    one = checking.checked(subject, choosing.Selection(backends.known("conv_bn_act")["triton"], ROWS))
    assert 0 < one.outcome["error_ratio"] <= 1
    assert packed == [subject.operands.x.shape] * (1 + CHECKS)  # when planned, and as each input is written
    fed = subject.fed(one.planned, one.call)
    assert fed.call().shape == subject.problem.output_shape and len(packed) == 1 + CHECKS
    fed.feed()
    assert len(packed) == 2 + CHECKS


@needs_interpreter
@pytest.mark.parametrize("form", (None, "pointer", "lines_tma"))
def test_other_forms_are_timed_on_what_everybody_reads(packed, form):
    candidate = choosing.Selection(backends.known("conv_bn_act")["triton"], form and ROWS._replace(form=form))
    one = checking.checked(checking.Subject(problem(2), "cpu"), candidate)
    assert 0 < one.outcome["error_ratio"] <= 1 and not packed


# ------------------------------------------------------------------------------------------------- wrong, failing, slow


@pytest.mark.parametrize(
    "answer, ratio",
    ((lambda p, out: torch.zeros_like(out), 1.0), (lambda p, out: torch.full_like(out, math.nan), None)),
    ids=("zeros", "not a number"),
)
def test_a_wrong_candidate_is_recorded_and_never_chosen(tuned_files, times, monkeypatch, answer, ratio):
    wrong = Fake(monkeypatch, "wrong", answer)
    times["wrong"] = 1
    (row, _) = tune()["rows"]
    assert names(row["wrong"]) == ["wrong"] and "wrong" not in names(row["timed"])
    assert row["wrong"][0]["error_ratio"] is None if ratio is None else row["wrong"][0]["error_ratio"] > ratio
    assert len(wrong.calls) == CHECKS * len(PROBLEMS)  # checked, not timed
    assert winners.lookup(PROBLEMS[0]).backend != "wrong" and winners.lookup(PROBLEMS[0], "wrong") is None


def test_one_wrong_element_in_the_last_image_is_seen(tuned_files, times, monkeypatch):
    def answer(problem, out):
        out[-1, -1, -1, -1] += 0.01
        return out

    Fake(monkeypatch, "wrong", answer)
    assert names(tune([problem(4)])["rows"][0]["wrong"]) == ["wrong"]


def test_a_candidate_that_raises_costs_itself_alone(tuned_files, times, monkeypatch):
    def answer(problem, out):
        raise RuntimeError("out of resources\nand more")

    Fake(monkeypatch, "broken", answer)
    (row, _) = tune()["rows"]
    assert row["failed"] == [{"backend": "broken", "config": None, "why": "RuntimeError: out of resources"}]
    assert "onednn" in names(row["timed"])


def test_where_nothing_runs_there_is_no_winner(tuned_files, times, monkeypatch):
    """The others are tuned all the same."""

    def too_large(problem, device, real=checking.random_operands, **options):
        if problem == PROBLEMS[0]:
            raise torch.OutOfMemoryError("out of memory")
        return real(problem, device, **options)

    monkeypatch.setattr(checking, "random_operands", too_large)
    result = run("--conv", PROBLEMS[0], "--conv", PROBLEMS[1], "--threads", torch.get_num_threads(), "--batch", 1)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert f"{PROBLEMS[0]} - " in text and f"failed: {PROBLEMS[0]}: eager: OutOfMemoryError: out of memory" in text
    assert winners.lookup(PROBLEMS[0]) is None and winners.lookup(PROBLEMS[1]) is not None


def test_a_gpu_that_a_candidate_has_ruined_ends_the_process_and_not_the_measurement(tuned_files, monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(convolution.DeviceFailed, match="eager on 2x16x8x8 .* give the same command once more to go on"):
        convolution._check_device("cuda", PROBLEMS[0], choosing.Selection(EAGER, None))
    convolution._check_device("cpu", PROBLEMS[0], choosing.Selection(EAGER, None))


# ------------------------------------------------------------------------------------------------------- interruption


def test_interrupted_and_resumed_with_nothing_lost(tuned_files, times, monkeypatch):
    """Stopped in the second convolution: its first candidates are not checked again, the first not measured again."""
    late = Fake(monkeypatch, "late")
    early = Fake(monkeypatch, "early")
    REGISTRY["conv_bn_act"]["late"] = REGISTRY["conv_bn_act"].pop("late")  # after early

    def interrupt(problem, out):
        if problem == PROBLEMS[1]:
            raise KeyboardInterrupt
        return out

    late.answer = interrupt
    for _ in range(2):  # which is not taken for a candidate that kills the process
        with pytest.raises(KeyboardInterrupt):
            tune()
    assert winners.lookup(PROBLEMS[0]) is not None and winners.lookup(PROBLEMS[1]) is None
    late.answer = None
    early.calls, late.calls = [], []
    result = tune()
    assert [row["problem"] for row in result["rows"]] == list(map(str, PROBLEMS))
    assert not any(row["failed"] for row in result["rows"])
    assert {one for one, _ in early.calls + late.calls} == {PROBLEMS[1]}
    assert len(late.calls) == CHECKS + len(early.calls)  # both are timed, and one is checked
    calls = len(late.calls)
    assert tune()["rows"] == result["rows"] and len(late.calls) == calls  # nothing is left to measure


def test_again_measures_again(tuned_files, times, monkeypatch):
    fake = Fake(monkeypatch, "fake")
    tune()
    calls = len(fake.calls)
    tune(again=True)
    assert len(fake.calls) == 2 * calls
    tune()
    assert len(fake.calls) == 2 * calls


def test_a_candidate_that_killed_the_process_twice_is_left_out(tuned_files, times, monkeypatch):
    fake, candidate = Fake(monkeypatch, "deadly"), "deadly"
    for times_begun in (1, 2):
        tuner.journal_of("cpu").begin(str(PROBLEMS[0]), candidate)
        why = tuner.journal_of("cpu").outcome(str(PROBLEMS[0]), candidate)
        assert (why is None) == (times_begun == 1)
    (row,) = tune(PROBLEMS[:1])["rows"]
    assert row["failed"] == [{"backend": "deadly", "config": None, "why": "the process ended twice while it ran"}]
    assert fake.calls == []


def test_the_budget_ends_it_and_the_next_call_goes_on(tuned_files, times, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now[0])
    Fake(monkeypatch, "slow", lambda p, out: now.__setitem__(0, now[0] + 60.0 / (CHECKS + 1)) or out)
    problems = [problem(N) for N in (1, 2, 3)]
    first = tune(problems, budget_s=61.0)
    assert [row["problem"] for row in first["rows"]] == [str(one) for one in problems[:2]]
    assert first["remaining"] == [str(problems[2])]
    assert tune(problems, budget_s=61.0)["remaining"] == []


def test_progress_and_the_time_that_is_left(tuned_files, times):
    seen = []
    tune([problem(N) for N in (1, 2, 3)], progress=lambda fraction, text: seen.append((round(fraction, 2), text)))
    assert [fraction for fraction, _ in seen] == [0, 0.33, 0.67, 1]
    assert "min left" not in seen[0][1] and ", 2 to go, about 1 min left" in seen[1][1] and seen[-1][1] == "done"
    assert tuner._time_left(60, 1, 10, None) == ", 10 to go, about 10 min left"
    assert tuner._time_left(60, 1, 10, 180) == ", 10 to go, about 2 min left"


def test_shares_of_the_budget():
    assert tuner._seconds(None, 5, 1) == tuner._SECONDS[1]
    assert tuner._seconds(100, 80, 10) == 1.0
    assert (tuner._seconds(100, 99, 10), tuner._seconds(1e6, 0, 1)) == tuner._SECONDS


def test_where_nothing_can_be_written_it_is_said_once_and_measured_all_the_same(
    tuned_files, times, caplog, monkeypatch
):
    (winners.user_folder().parent.parent / "file").write_text("")
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(winners.user_folder().parent.parent / "file"))
    result = tune()
    assert result["file"] is None and len(result["rows"]) == 2
    assert sum("nothing that is measured is kept" in message for message in caplog.messages) == 1
    assert sum("an interruption loses it" in message for message in caplog.messages) == 1


def test_nothing_to_tune():
    with pytest.raises(ValueError, match="there is no convolution"):
        tune([])


# ------------------------------------------------------------------------------------------------------------ command


def run(*arguments):
    return CliRunner().invoke(main.cli, ["tune", "--device", "cpu", *map(str, arguments)])


def test_the_command_tunes_one_convolution_for_real(tuned_files):
    """No clock is replaced; whoever wins, it is right and `auto` takes it."""
    one = problem(2)
    result = run("--conv", one, "--rounds", 2, "--threads", torch.get_num_threads(), "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    (row,) = record["rows"]
    assert record["kind"] == "tune" and record["environment"]["torch"] == torch.__version__
    assert {"onednn", "eager"} <= set(names(row["timed"])) and record["summary"]["wrong"] == 0
    assert all(0 < measured["error_ratio"] <= 1 and measured["median_us"] > 0 for measured in row["timed"])
    assert choosing.select(one, in_plan=True).backend.name == row["winner"]["backend"]
    shown = run("--conv", one)
    assert "Tuned on" in shown.output and f"kept in {record['file']}" in " ".join(shown.output.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and a CUDA build of torch")
@pytest.mark.parametrize("live_bn", (False, True))
def test_tuning_on_a_gpu(tuned_files, live_bn):
    """Every candidate is right, or fails with a reason; a kernel of ours is among those that were timed. With 8 warps
    Triton's may be wrong (pytorch issue 173068): finding that out is what the tuner is for."""
    one = problem(32, torch.float16, "cuda", C=64, K=64, has_bn=live_bn, has_bias=not live_bn)
    (row,) = tuner.tune([one], device="cuda", folder=winners.user_folder(), rounds=5)["rows"]
    wrong = [one for one in row["wrong"] if (one["config"] or {}).get("num_warps") != 8]
    assert not wrong and "triton" in names(row["timed"]) and "eager" in names(row["timed"])
    assert choosing.select(one, in_plan=True).backend.name == row["winner"]["backend"]


def test_live_bn_is_tuned_as_the_operator_runs_it(tuned_files, times):
    (row,) = tune([problem(has_bn=True, has_bias=False)])["rows"]
    assert row["default"] == {"backend": "cpu_pass", "config": None} and not row["wrong"] and not row["failed"]
    assert sorted(one["backend"] for one in row["timed"]) == ["cpu_pass", "eager", "eager"]


def test_configs_are_written_where_they_ship_without_measuring_again(tuned_files, times, monkeypatch, tmp_path):
    fake = Fake(monkeypatch, "quick")
    times["quick"] = 1
    tune(PROBLEMS[:1])
    calls = len(fake.calls)
    monkeypatch.setattr(tuner, "environment_of", lambda device: {"date": "later"})
    result = run("--conv", PROBLEMS[0], "--configs", tmp_path / "configs")
    assert result.exit_code == 0 and len(fake.calls) == calls
    (written,) = (tmp_path / "configs").glob("*.json")
    assert "later" not in json.loads(written.read_text())["runs"]  # but the one that measured
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path / "empty"))
    winners.forget()
    assert winners.lookup(PROBLEMS[0]).source.startswith("configs/")


def test_the_command_shows_what_was_wrong_and_what_failed(tuned_files, times, monkeypatch):
    def answer(problem, out):
        raise RuntimeError("no luck")

    Fake(monkeypatch, "broken", answer)
    Fake(monkeypatch, "wrong", lambda p, out: out + 1)
    text = " ".join(run("--conv", PROBLEMS[0]).output.split())
    assert f"failed: {PROBLEMS[0]}: broken: RuntimeError: no luck" in text
    assert f"WRONG {PROBLEMS[0]}: wrong: " in text and "of the bound" in text


def test_ctrl_c_says_how_to_go_on(tuned_files, times, monkeypatch, capsys):
    def answer(problem, out):
        raise KeyboardInterrupt

    Fake(monkeypatch, "interrupting", answer)
    assert main.main(["tune", "--device", "cpu", "--conv", str(PROBLEMS[0])]) == 130
    assert "give the same command again to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--conv", "nonsense"], "is no convolution such as"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'; known ones are fp32, fp16, bf16."),
        (["--model", "resnet51"], "unknown model 'resnet51'"),
        (["--compile-only"], "--compile-only and --out DIR go together"),
        (["--out", "somewhere"], "--compile-only and --out DIR go together"),
        (["--compile-only", "--out", "x", "--triton", "2.0.0"], "this is Triton"),
        (["--conv", "1x4x4x4 -> 4, 1x1 float32 plain relu", "--compiled", "."], "--compiled is for a GPU"),
    ),
)
def test_wrong_arguments(tuned_files, arguments, message, capsys):
    assert main.main(["tune", "--device", "cpu", *arguments]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


# ----------------------------------------------------------------------------------------------------- the whole path


@pytest.fixture
def pretended_gpu(monkeypatch):
    """All of a GPU that the tuner asks for, but the GPU.

    Triton's record computes by ATen on the CPU, and what would be captured is called. The clock gives every candidate
    the same time but one config of Triton's.
    """
    fastest = []

    def run(problem, operands, config=None):
        return EAGER.run(problem, operands)

    def in_network_order(groups, **options):
        ((group, calls),) = groups.items()
        configs = [one for one in calls if one.backend.name == "triton" and one.config is not None]
        fastest[:] = fastest or configs[1:2]
        us = {one: 10.0 if [one] == fastest else 20.0 for one in calls}
        return {group: {one: timing.Stats(us[one], us[one], 0, 0, fed.call() is None) for one, fed in calls.items()}}

    def run_placed(placed, operands):
        p, x = placed.problem, operands.x
        return run(p, operands if x.dim() == 4 else operands._replace(x=row_space.unpack(x, p.N, p.H, p.W)))

    monkeypatch.setattr(devices, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(planned.Placed, "run", run_placed)
    triton = backends.known("conv_bn_act")["triton"]
    pretended = triton._replace(why_not=lambda problem: None, run=run, origin="ours")
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "triton", pretended)
    for name in ("cuda", "cudnn", "cublaslt"):
        absent = backends.known("conv_bn_act")[name]._replace(why_not=lambda problem: "there is no GPU")
        monkeypatch.setitem(REGISTRY["conv_bn_act"], name, absent)
    monkeypatch.setattr(tuner.runtime, "INTERPRETED", False)
    monkeypatch.setattr(tuner.runtime, "arch", lambda device: 90)
    monkeypatch.setattr(tuner.runtime, "num_sms", lambda device: 132)
    for name, answer in (("current_device", 0), ("empty_cache", None), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(winners, "device_id", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tuner, "environment_of", lambda device: {"date": "2026-11-20", "torch": torch.__version__})
    monkeypatch.setattr(environment, "gpu_state", dict)
    monkeypatch.setattr(cuda_graphs, "captured", lambda call: call)
    monkeypatch.setattr(timing, "in_network_order", in_network_order)
    real = checking.random_operands
    monkeypatch.setattr(checking, "random_operands", lambda problem, device, **options: real(problem, "cpu", **options))
    return fastest


@pytest.mark.full
def test_the_path_of_a_gpu_without_one(tuned_files, pretended_gpu, monkeypatch, tmp_path):
    """Triton's candidates are really compiled for sm_90, in processes; the winner is found again with its config."""
    if runtime.triton_version() is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    one = problem(32, torch.float16, "cuda", C=64, K=64)
    (row,) = tuner.tune([one], device="cuda", folder=winners.user_folder())["rows"]
    (winner,) = pretended_gpu
    assert not row["failed"] and not row["wrong"]
    assert list((tmp_path / "triton").glob("*/*.cubin"))
    selection = choosing.select(one._replace(N=48), in_plan=True)
    assert (selection.backend.name, selection.config) == ("triton", winner.config)
    assert selection.source == "tuned here, NVIDIA_H200.json, batch 32"
    with winners.ignored():
        assert choosing.select(one, in_plan=True).backend.name != "triton"


def test_what_is_replayed_is_compared_too(tuned_files, pretended_gpu, monkeypatch):
    """A kernel that is right when it is called, and not from a graph, is wrong."""
    monkeypatch.setattr(tuner, "_compiling", lambda waiting: contextlib.nullcontext({}))
    monkeypatch.setattr(cuda_graphs, "captured", lambda call: lambda: call() + 1)
    (row,) = tuner.tune([problem(1, torch.float16, "cuda")], device="cuda", folder=winners.user_folder())["rows"]
    assert row["winner"] is None and "triton" in names(row["wrong"]) and not row["timed"]


@pytest.mark.full
@pytest.mark.parametrize("name", ("resnet50", "resnext50_32x4d"))
def test_a_tuned_plan_takes_what_was_measured_faster(tuned_files, name):
    """Where a tuned plan leaves the fixed order, the tuner saw that to be faster; elsewhere it is the same plan. How
    fast the two are is a benchmark's business: `bench model --backend auto --backend untuned`."""
    from fused_resnet import freeze
    from fused_resnet.freezing.modules import FrozenConv

    torch.manual_seed(0)
    model = measuring.calibrated(models.create(name), (3, 64, 64))
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with winners.ignored():
        untuned = freeze(model, x)
    problems = tuner.problems_of({name: (model, (3, 64, 64))}, [2], [torch.float32], "cpu")
    result = tune(problems, rounds=8)
    tuned = freeze(model, x)
    assert not any(row["wrong"] or row["failed"] for row in result["rows"])
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), untuned(x), rtol=1e-3, atol=1e-3)
    chosen, fixed = (
        [m for m in plan.plan(x).modules() if isinstance(m, FrozenConv)] for plan in (tuned, untuned)
    )  # fmt: skip
    assert len(chosen) == len(fixed) == 53
    for ours, default in zip(chosen, fixed):
        assert ours.problem == default.problem and ours.selection.source.startswith("tuned here")
        winner = winners.lookup(ours.problem)
        assert winner.backend == ours.backend.name
        if ours.backend is not default.backend:
            kept = winners.lookup(ours.problem, default.backend.name)
            assert kept is None or winner.time_us < kept.time_us
