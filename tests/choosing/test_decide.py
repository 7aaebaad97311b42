"""Deciding by measuring: what is checked and timed, what is kept, what is never chosen, when nothing is measured."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backends, choosing, models
from fused_resnet.backends.record import REGISTRY
from fused_resnet.choosing import decide, dispatch, outright, pieces, process, timing, winners
from fused_resnet.choosing.candidates import candidates
from fused_resnet.choosing.case import poisoned_memory
from fused_resnet.choosing.choice import FIXED_ORDER
from fused_resnet.kernels import compiled
from fused_resnet.machine import cuda_graphs, devices, files
from fused_resnet.operators import ConvOperands
from tests.support import networks
from tests.support.plans import convolutions, full, problems_of
from tests.support.tuned_files import entry, problem

CPU = torch.device("cpu")
ODD, EVEN = problem(2, C=32), problem(2, C=16)
CUDA = torch.device("cuda", 0)
SMALL, LARGE = (problem(64, C=C, H=56, W=56, dtype=torch.float16, device="cuda") for C in (16, 512))


@pytest.fixture
def measuring(tuned_files, monkeypatch):
    """Measuring is on, in this test's own files."""
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    return tuned_files


@pytest.fixture
def no_child(monkeypatch):
    """Kernels are tried in this process, as where no other can be started."""

    def run(*args, **options):
        raise process.NoChild("no")
        yield

    monkeypatch.setattr(process, "run", run)


@pytest.fixture
def broken(monkeypatch):
    """The backend of `broken_backends`, which would be the fastest by far. Give it a fault."""
    monkeypatch.setenv("FUSED_RESNET_TESTS_IN_PARENT", "1")
    from tests.support import broken_backends

    monkeypatch.delenv("FUSED_RESNET_TESTS_IN_PARENT")
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "broken", broken_backends.BACKEND)
    broken_backends.calls.clear()
    broken_backends._kept.clear()
    real = timing.in_network_order

    def timed(groups, **options):
        found = real(groups, **{**options, "rounds": 1, "least_rounds": 1})
        for stats in found.values():
            for one in stats:
                if str(one) == "broken":
                    stats[one] = timing.Stats(0.1, 0.1, 0.1, 0.1, 1)
        return found

    monkeypatch.setattr(timing, "in_network_order", timed)

    def fault(name):
        monkeypatch.setenv("BROKEN", name)
        return broken_backends

    return fault


@pytest.fixture
def timed(monkeypatch):
    """The problems that were timed, in order, with a clock that is quick."""
    seen, real = [], timing.in_network_order

    def in_network_order(groups, **options):
        seen.extend(groups)
        return real(groups, **{**options, "rounds": 2, "least_rounds": 1})

    monkeypatch.setattr(timing, "in_network_order", in_network_order)
    return seen


@pytest.fixture
def by_themselves(monkeypatch):
    """No run of convolutions is a region before they are measured."""
    monkeypatch.setattr(outright, "find_out", lambda *args, **options: False)


def chosen(one):
    return choosing.select(one, in_plan=True).backend.name


# ------------------------------------------------------------------------------------------------- what is never chosen


@pytest.mark.parametrize("fault", ("wrong", "keeps", "skips"))
def test_what_is_wrong_for_one_shape_is_never_chosen_there(measuring, no_child, broken, fault):
    broken(f"32:{fault}")
    decide.decide([ODD, EVEN], CPU)
    assert chosen(EVEN) == "broken"
    assert chosen(ODD) != "broken"
    outcome = winners.outcome(ODD, "broken")
    assert outcome["error_ratio"] is None or outcome["error_ratio"] > 1
    assert winners.outcome(EVEN, "broken")["error_ratio"] <= 1
    assert "broken" not in winners.entry_of(ODD).candidates


def test_a_real_child_that_crashes_or_hangs_costs_one_candidate_and_freeze_goes_on(measuring, broken, monkeypatch):
    monkeypatch.setattr(process, "LIMIT_S", 12.0)
    monkeypatch.setattr(pieces, "why_region", lambda piece: None)  # it is about convolutions by themselves
    broken("32:crashes,48:hangs")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 16, 1), nn.ReLU()]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    frozen = fused_resnet.freeze(model, x)
    first, second, third = convolutions(frozen, x)
    assert [conv.backend.name == "broken" for conv in (first, second, third)] == [True, False, False]
    torch.testing.assert_close(frozen(x), model(x))
    outcomes = [winners.outcome(conv.problem, "broken").get("why") for conv in (first, second, third)]
    assert outcomes == [None, "it ended the process (SIGSEGV)", "it had not ended after 12 s"]
    assert all(winners.outcome(one.problem, "eager")["error_ratio"] <= 1 for one in (first, second, third))
    assert not winners.is_trusted("broken", "cpu") and winners.is_trusted("eager", "cpu")


@pytest.fixture
def asked(monkeypatch):
    """The candidates that a child is asked for. It finds all of them right."""
    names = []

    def run(jobs, device, **options):
        for index, job in enumerate(jobs):
            for name in job.names:
                names.append(name)
                yield process.Event(index, name, {"error_ratio": 0.25})

    monkeypatch.setattr(process, "run", run)
    return names


def test_a_trusted_backend_is_checked_here_and_a_new_one_elsewhere(measuring, timed, asked):
    decide.decide([EVEN], CPU)
    names = list(map(str, candidates(EVEN)[0]))
    assert asked == names and all(winners.is_trusted(name.partition(" ")[0], "cpu") for name in names)
    assert {winners.outcome(EVEN, name)["error_ratio"] for name in names} == {0.25}
    decide.decide([ODD], CPU)
    assert asked == names and 0 < winners.outcome(ODD, "eager")["error_ratio"] <= 1  # checked here


def test_what_a_child_cannot_import_is_checked_here(measuring, timed, asked, monkeypatch):
    """A backend that a script or a test registers."""
    made = []

    def run_it(problem, operands):
        made.append(problem)
        return backends.known("conv_bn_act")["eager"].run(problem, operands)

    run_it.__module__ = "__main__"
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "scripted", backends.Backend("scripted", lambda problem: None, run_it))
    decide.decide([EVEN], CPU)
    assert asked and "scripted" not in asked
    assert made and winners.outcome(EVEN, "scripted")["error_ratio"] <= 1


def test_the_fixed_order_leaves_out_what_was_found_wrong(measuring):
    first = choosing.fixed_order(EVEN, in_plan=True)
    winners.keep(
        winners.Table.empty(winners.device_id("cpu"))._replace(
            checks=winners.checks_of(EVEN, {str(first): {"error_ratio": 2.0}})
        )
    )
    assert choosing.fixed_order(EVEN, in_plan=True).backend != first.backend
    assert choosing.fixed_order(ODD, in_plan=True).backend == first.backend


# --------------------------------------------------------------------------------------------------- what is kept, when


def frozen_resnet(**options):
    torch.manual_seed(0)
    model = models.create("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    return model, x, fused_resnet.freeze(model, x, **options)


def test_freeze_measures_once_and_is_right(measuring, no_child, timed, by_themselves):
    model, x, frozen = frozen_resnet()
    distinct = set(problems_of(frozen, x))
    convs = [one for one in timed if one.op == "conv_bn_act"]
    assert set(convs) == distinct and len(timed) == len(set(timed))
    assert all("tuned here" in conv.selection.source for conv in convolutions(frozen, x))
    exact = networks.in_fp64(model, x)
    torch.testing.assert_close(frozen(x).double(), exact, rtol=0, atol=1e-3 * exact.abs().max().item())
    timed.clear()
    winners.forget()  # as a new process
    frozen_resnet()
    assert not timed


def test_threads_versions_and_kernels_are_part_of_what_is_known(measuring, no_child, timed, monkeypatch):
    decide.decide([EVEN], CPU)
    assert timed == [EVEN]
    threads = torch.get_num_threads()
    for change in ("threads", "torch", "kernel", "limit"):
        timed.clear()
        with monkeypatch.context() as changed:
            if change == "threads":
                torch.set_num_threads(threads + 1)
            elif change == "torch":
                changed.setattr(torch, "__version__", "9.9.9")
                winners.versions.cache_clear()
            elif change == "limit":
                changed.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
                winners.versions.cache_clear()
            else:
                changed.setattr(compiled, "built_digest", lambda patterns: "changed")
            winners.forget()
            try:
                decide.decide([EVEN], CPU)
                assert timed == [EVEN], change
            finally:
                torch.set_num_threads(threads)
        winners.versions.cache_clear()
        winners.forget()


def test_a_backend_that_is_new_since_is_measured(measuring, no_child, timed, monkeypatch):
    decide.decide([EVEN], CPU)
    timed.clear()
    run = backends.known("conv_bn_act")["eager"].run
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "late", backends.Backend("late", lambda problem: None, run))
    decide.decide([EVEN], CPU)
    assert timed == [EVEN]


def test_measuring_leaves_the_process_as_it_was(measuring, no_child, timed):
    """Its random numbers, threads and modes."""

    def state():
        modes = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_num_threads()
        return torch.get_rng_state().tolist(), modes

    before = state()
    decide.decide([EVEN, ODD._replace(has_residual=True)], CPU)
    assert timed and state() == before


def test_checks_are_kept_though_the_timing_is_interrupted(measuring, no_child, monkeypatch):
    def interrupted(groups, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "in_network_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decide.decide([EVEN], CPU)
    assert winners.outcome(EVEN, "eager")["error_ratio"] <= 1 and winners.entry_of(EVEN) is None


def test_nothing_is_measured_where_it_must_not_be(measuring, no_child, timed, monkeypatch):
    decide.decide([EVEN], CPU, decide.Tuning(False))
    with torch._subclasses.FakeTensorMode():
        decide.decide([EVEN], CPU)
    torch.func.vmap(lambda x: decide.decide([EVEN], CPU) or x)(torch.ones(2))
    with winners.ignored():
        decide.decide([EVEN], CPU)
    for variable in ("FUSED_RESNET_TUNE", "FUSED_RESNET_TUNED"):
        with monkeypatch.context() as off:
            off.setenv(variable, "0")
            winners.forget()
            decide.decide([EVEN], CPU)
    winners.forget()
    assert not timed and choosing.select(EVEN, in_plan=True).source == FIXED_ORDER
    decide.decide([EVEN], CPU)
    assert timed == [EVEN]


def test_a_new_shape_in_a_served_model_is_checked_and_not_timed(measuring, no_child, timed, broken):
    """And what the rules would take is not taken where it is wrong."""
    model, x, frozen = frozen_resnet()
    timed.clear()
    other = torch.randn(9, 3, 32, 32)
    frozen(other)
    assert not timed
    for conv in convolutions(frozen, other):
        assert winners.outcome(conv.problem, str(conv.selection))["error_ratio"] <= 1


def test_what_the_rules_would_take_is_checked_before_a_new_shape_runs(measuring, no_child, broken, monkeypatch):
    broken("32:wrong")
    first = REGISTRY["conv_bn_act"]["broken"]._replace(auto=backends.Auto(("cpu",)))
    others = {name: one for name, one in REGISTRY["conv_bn_act"].items() if name != "broken"}
    monkeypatch.setitem(REGISTRY, "conv_bn_act", {"broken": first, **others})
    assert chosen(ODD) == chosen(EVEN) == "broken"
    decide.decide([ODD, EVEN], CPU, decide.Tuning("check"))
    assert chosen(EVEN) == "broken" and chosen(ODD) != "broken"


def test_a_new_shape_is_checked_once_though_the_kernels_are_unknown(measuring, no_child, timed, monkeypatch):
    """What is found of a library that does not say what it was built from cannot be kept."""
    checked, real = [], decide._checked
    monkeypatch.setattr(decide, "_checked", lambda found, device: checked.extend(found) or real(found, device))
    monkeypatch.setattr(winners, "kernel_digest", lambda backend: None)
    decide.decide([ODD, EVEN], CPU, decide.Tuning("check"))
    assert sorted(checked) == sorted([ODD, EVEN]) and not timed


@pytest.mark.parametrize("tune", (True, 0, -1.0, "now", float("nan"), float("inf"), None))
def test_what_tune_may_be(tune):
    with pytest.raises(ValueError, match='tune must be "auto", False or a number of seconds'):
        fused_resnet.freeze(nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 4, 4), tune=tune)


def test_threads_that_freeze_at_once_measure_each_problem_once(measuring, no_child, timed):
    threads = [threading.Thread(target=decide.decide, args=([EVEN, ODD], CPU)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(timed) == sorted([EVEN, ODD])


_FREEZE = """
import json, sys, time, torch, fused_resnet
from fused_resnet import models
torch.set_num_threads(1); torch.manual_seed(0)
model, x = models.create(sys.argv[1]).eval(), torch.randn(1, 3, 64, 64)
begun = time.perf_counter()
frozen = fused_resnet.freeze(model, x)
took = time.perf_counter() - begun
from fused_resnet.freezing.modules import FrozenConv
convs = [m for m in frozen.plan(x).modules() if isinstance(m, FrozenConv)]
print(json.dumps([took, [str(c.selection) for c in convs], sorted({c.selection.source for c in convs})]))
"""


def freeze_elsewhere(name):
    return subprocess.Popen([sys.executable, "-c", _FREEZE, name], stdout=subprocess.PIPE, text=True)


def read(child):
    out, _ = child.communicate(timeout=400)
    assert child.returncode == 0
    return json.loads(out)


@full
def test_a_new_process_measures_nothing_and_is_five_times_as_quick(measuring):
    first, again = read(freeze_elsewhere("resnet50")), read(freeze_elsewhere("resnet50"))
    assert first[1] == again[1] and all("tuned here" in source for source in again[2])
    assert again[0] < first[0] / 5


@full
def test_two_processes_that_freeze_at_once_lose_nothing(measuring):
    """The second waits for what the first finds."""
    both = [freeze_elsewhere(name) for name in ("resnet18", "resnet34")]
    results = [read(child) for child in both]
    assert all("tuned here" in source for _, _, sources in results for source in sources)
    for name, (took, names, _) in zip(("resnet18", "resnet34"), results):
        again = read(freeze_elsewhere(name))
        assert again[1] == names and again[0] < took


def test_the_first_process_of_a_group_measures_and_the_others_wait(measuring, no_child, timed, monkeypatch):
    monkeypatch.setattr(decide, "_HEAD_START_S", 30.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    waiting = threading.Thread(target=decide.decide, args=([EVEN], CPU))
    with monkeypatch.context() as first:
        slept = threading.Event()
        first.setattr(decide.time, "sleep", lambda seconds: slept.set() or threading.Event().wait(0.01))
        waiting.start()
        assert slept.wait(20) and not timed
    found = decide.measured_entry(
        decide.fixed(EVEN), {decide.fixed(EVEN): timing.Stats(1, 1, 1, 1, 1)},
        {str(decide.fixed(EVEN)): {"error_ratio": 0.5}}, "first",
    )  # fmt: skip
    names = {str(one): {"why": "left out"} for one in candidates(EVEN)[0] if one != decide.fixed(EVEN)}
    winners.keep(
        winners.Table.empty(winners.device_id("cpu"))._replace(
            entries={winners.key(EVEN): {EVEN.N: found}}, checks=winners.checks_of(EVEN, names),
            runs={"first": {"kernels": winners.kernel_digests()}},
        )
    )  # fmt: skip
    waiting.join(30)
    assert not waiting.is_alive() and not timed


def test_progress_is_told(measuring, no_child, timed):
    torch.manual_seed(0)
    told = []
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()
    fused_resnet.freeze(model, torch.randn(1, 3, 8, 8), progress=lambda fraction, text: told.append((fraction, text)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and told[-1] == (1.0, "done")
    assert any("checking" in text for _, text in told) and any("round" in text for _, text in told)


def test_a_lock_that_another_process_holds_is_not_waited_for_for_ever(measuring, no_child, timed, monkeypatch):
    monkeypatch.setattr(decide, "_WAIT_S", 0.2)
    held, done = threading.Event(), threading.Event()

    def hold():
        with files.locked(winners.user_folder() / "measuring_cpu"):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    begun = time.monotonic()
    decide.decide([EVEN], CPU)
    done.set()
    thread.join()
    assert timed == [EVEN] and time.monotonic() - begun < 30


def test_too_little_memory_is_held_against_nobody_for_ever(measuring, no_child, timed, monkeypatch):
    """Whoever had none then is tried again by the next process."""

    def run(problem, operands):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setitem(REGISTRY["conv_bn_act"], "large", backends.Backend("large", lambda problem: None, run))
    decide.decide([EVEN], CPU)
    assert winners.outcome(EVEN, "large")["is_passing"] and chosen(EVEN) != "large"
    timed.clear()
    decide.decide([EVEN], CPU)
    assert not timed
    winners._SESSION.clear()
    winners.forget()
    assert winners.outcome(EVEN, "large") is None and winners.outcome(EVEN, "eager") is not None
    decide.decide([EVEN], CPU)
    assert timed == [EVEN]


def test_a_wrong_winner_of_a_near_batch_is_not_chosen(measuring):
    """A batch of 4 has been measured, and for 8 the winner is known to be wrong."""
    near, one = EVEN._replace(N=4), EVEN._replace(N=8)
    measuring.add(measuring.user, near, entry("eager"))
    assert chosen(one) == "eager" and "batch 4" in choosing.select(one, in_plan=True).source
    winners.keep(
        winners.Table.empty(winners.device_id("cpu"))._replace(
            checks=winners.checks_of(one, {"eager": {"error_ratio": 7.0}})
        )
    )
    assert chosen(near) == "eager" and chosen(one) == choosing.fixed_order(one, in_plan=True).backend.name != "eager"
    assert "wrong here: its error is 7 times" in choosing.select(one, in_plan=True).source


def test_a_progress_callback_may_freeze(measuring, no_child, timed):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    frozen = []

    def progress(fraction, text):
        if not frozen:
            frozen.append(None)
            frozen.append(fused_resnet.freeze(nn.Conv2d(3, 4, 1).eval(), x))

    torch.testing.assert_close(fused_resnet.freeze(model, x, progress=progress)(x), model(x))
    assert len(frozen) == 2


def test_under_a_default_device_it_is_said_that_nothing_is_measured(measuring, no_child, timed, caplog):
    with torch.device("cpu"):
        decide.decide([EVEN], CPU)
    assert not timed and "torch function mode" in caplog.text


def test_one_thread_at_a_time_has_memory_poisoned():
    """Its switch is the process's, and is put back as it was."""
    inside, leave, entered = threading.Event(), threading.Event(), threading.Event()

    def first():
        with poisoned_memory(torch.empty(1)):
            inside.set()
            leave.wait(20)

    def second():
        with poisoned_memory(torch.empty(1)):
            entered.set()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(20) and torch.are_deterministic_algorithms_enabled()
    threads[1].start()
    assert not entered.wait(0.2)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert entered.is_set() and not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------------------------ the child


class Process:
    """A child that has said `lines` and ended with `code`."""

    def __init__(self, monkeypatch, *lines, code=0):
        self.lines, self.code, self.started, self.is_killed = lines, code, 0, False
        monkeypatch.setattr(process.subprocess, "Popen", self.popen)

    def popen(self, command, *, env, **options):
        self.command, self.env, self.options = command, env, options
        self.stdin, self.stdout = io.BytesIO(), iter(line.encode() for line in self.lines)
        self.started += 1
        return self

    def wait(self):
        return self.code

    def kill(self):
        self.is_killed = True


JOB = process.Job(str(EVEN), ["eager"], {})
BEGUN, CHECKED, DONE = (
    json.dumps({"job": "0", **said}) + "\n"
    for said in ({"is": "begun", "name": "eager"}, {"is": "checked", "name": "eager", "outcome": {"error_ratio": 0.5}},
                 {"is": "done"})
)  # fmt: skip
FREE = '{"is": "free"}\n'


def test_the_child_has_the_parents_modules_and_no_child_of_its_own(monkeypatch, tmp_path):
    child = Process(monkeypatch, BEGUN, CHECKED, DONE)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), tmp_path, 7])
    assert [event.outcome for event in process.run([JOB], "cpu")] == [{"error_ratio": 0.5}]
    assert child.env["PYTHONPATH"].split(os.pathsep) == [os.getcwd(), str(tmp_path)]
    assert child.env["PYTHONSAFEPATH"] == "1" and child.env["FUSED_RESNET_TUNE"] == "0"
    assert child.options["start_new_session"]  # Ctrl-C is the parent's


def test_a_child_on_a_gpu_waits_for_more_and_ends(monkeypatch):
    monkeypatch.setattr(process, "_IDLE_S", 0.3)
    job = process.Job(str(SMALL), ["eager"], {})
    child = Process(monkeypatch, *[BEGUN, CHECKED, DONE, FREE] * 3, code=-9)
    for _ in range(2):
        assert len(list(process.run([job], "cuda:0"))) == 1
    assert child.started == 1 and not child.is_killed
    requests = child.stdin.getvalue().decode().splitlines()
    assert [json.loads(line)["jobs"]["0"]["problem"] for line in requests] == [str(SMALL)] * 2
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # it would not know
    assert len(list(process.run([job], "cuda:0"))) == 1
    assert child.started == 2 and child.is_killed
    child.is_killed = False
    waited = time.monotonic() + 20
    while not child.is_killed and time.monotonic() < waited:
        time.sleep(0.05)
    assert child.is_killed and not process._idle


def test_a_child_on_a_cpu_waits_for_nothing(monkeypatch):
    child = Process(monkeypatch, BEGUN, CHECKED, DONE, FREE, code=-9)
    assert len(list(process.run([JOB], "cpu"))) == 1
    assert child.is_killed and not process._idle


def test_a_real_child_answers_two_requests(monkeypatch):
    monkeypatch.setattr(process, "_put_aside", lambda device, child: kept.append(child))
    monkeypatch.setattr(process, "_taken", lambda device: kept.pop() if kept else None)
    monkeypatch.setattr(process, "_stays", lambda device: True)
    kept = []
    pids = set()
    for _ in range(2):
        (event,) = process.run([JOB], "cpu")
        assert event.outcome["error_ratio"] <= 1
        pids.add(kept[0]._process.pid)
    assert len(pids) == 1
    kept.pop().end()


def test_what_others_print_into_the_childs_events_is_passed_over(monkeypatch):
    Process(monkeypatch, "welcome!\n", "[1, 2]\n", '{"a": 1}\n', BEGUN, CHECKED, DONE)
    assert [event.outcome for event in process.run([JOB], "cpu")] == [{"error_ratio": 0.5}]


@pytest.mark.parametrize(
    "name, is_passing", (("SIGSEGV", False), ("SIGILL", False), ("SIGTERM", True), ("SIGKILL", True))
)
def test_a_signal_from_outside_says_nothing_of_a_candidate(monkeypatch, name, is_passing):
    Process(monkeypatch, BEGUN, code=-getattr(signal, name))
    (event,) = itertools.islice(process.run([JOB], "cpu"), 1)
    assert event.has_ended and event.outcome["why"] == f"it ended the process ({name})"
    assert event.outcome.get("is_passing", False) == is_passing


def test_without_an_interpreter_there_is_no_child(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(process.NoChild, match="no Python interpreter"):
        list(process.run([JOB], "cpu"))
    monkeypatch.delattr(sys, "frozen")
    Process(monkeypatch, code=1)
    with pytest.raises(process.NoChild, match="exit status 1"):
        list(process.run([JOB], "cpu"))


def test_a_large_problem_has_more_time():
    large = problem(24, C=64, K=64, H=224, W=224, dtype=torch.bfloat16)
    assert process._limit_of(str(EVEN), "cpu") < process.LIMIT_S + 1 < 1000 < process._limit_of(str(large), "cpu")


def test_the_child_computes_fp32_as_the_parent_may():
    before = process._precision()
    try:
        process._set_precision(allows_tf32=False, mkldnn=False, mkldnn_conv=before["mkldnn_conv"])
        assert process._precision() == {**before, "allows_tf32": False, "mkldnn": False}
        assert "oneDNN off" in winners.key(EVEN)
    finally:
        process._set_precision(**before)
    assert process._precision() == before and "oneDNN off" not in winners.key(EVEN)


def test_a_child_that_cannot_compute_any_more_says_so_and_ends(monkeypatch):
    """A GPU that a kernel has ruined: the others are checked by another child."""
    said = []

    def ends(status):
        raise SystemExit(status)

    monkeypatch.setattr(process, "why_unusable", lambda device: "an illegal address")
    monkeypatch.setattr(process.os, "_exit", ends)
    failing = lambda p, o: (_ for _ in ()).throw(RuntimeError("an illegal address"))  # noqa: E731
    monkeypatch.setitem(REGISTRY["conv_bn_act"], "deadly", backends.Backend("deadly", lambda problem: None, failing))
    with pytest.raises(SystemExit):
        process._work(
            JOB._replace(names=["deadly", "eager"]), "cpu", None, lambda what, **more: said.append((what, more))
        )
    assert [what for what, _ in said] == ["begun", "fatal"]
    assert said[1][1] == {"name": "deadly", "outcome": {"why": "RuntimeError: an illegal address"}}
    fatal = json.dumps({"job": "0", "is": "fatal", **said[1][1]}) + "\n"
    child = Process(monkeypatch, BEGUN, fatal, code=1)
    (event,) = itertools.islice(process.run([JOB], "cpu"), 1)
    assert event.has_ended and event.outcome == {"why": "RuntimeError: an illegal address"} and child.env


# ------------------------------------------------------------------------------------------------------- on a fake GPU


class Gpu:
    """The child's part on a GPU that is not here.

    times: microseconds by candidate. deadly: by problem, the candidates that end the child. most: so many jobs are done
    until the deadline.
    """

    def __init__(self):
        self.asked, self.options, self.times, self.deadly, self.most = [], {}, {}, {}, 99

    def run(self, jobs, device, **options):
        assert device == "cuda:0"
        self.options = options
        for index, job in enumerate(jobs[: self.most]):
            self.asked.append((job.problem, [name for name in job.names if name not in job.known]))
            right = [name for name in job.names if "error_ratio" in job.known.get(name, {})]
            for name in job.names:
                if name in job.known:
                    continue
                if name in self.deadly.get(job.problem, ()):
                    yield process.Event(index, name, {"why": "it ended the process (exit status 1)"}, has_ended=True)
                    continue
                yield process.Event(index, name, {"error_ratio": 0.5})
                right.append(name)
            us = {name: self.times.get(name, 50.0) for name in right}
            yield process.Event(index, times={name: timing.Stats(t, t, t, t, 9) for name, t in us.items()})


@pytest.fixture
def gpu(measuring, monkeypatch):
    fake, real = Gpu(), winners.device_id
    run = backends.known("conv_bn_act")["eager"].run
    on_gpu = lambda p: None if p.device == "cuda" else "it runs on GPUs"  # noqa: E731
    configs = backends.Configs(lambda p: [backends.EagerConfig(f"tile{n}") for n in range(9)])
    for backend in (
        backends.Backend("library", on_gpu, run, backends.Auto(("cuda",))),
        backends.Backend("ours", on_gpu, run, configs=configs),
    ):
        monkeypatch.setitem(REGISTRY["conv_bn_act"], backend.name, backend)
    monkeypatch.setattr(process, "run", fake.run)
    monkeypatch.setattr(winners, "device_id", lambda device: "A GPU" if device == "cuda" else real(device))
    winners.forget()
    return fake


def test_on_a_gpu_the_largest_comes_first_with_the_likeliest_few_of_each_backend(gpu):
    gpu.times = {"library": 40.0, "ours layout=tile1": 20.0}
    decide.decide([SMALL, LARGE], CUDA)
    (first, names), (second, _) = gpu.asked
    assert (first, second) == (str(LARGE), str(SMALL))
    ours = [name for name in names if name.startswith("ours")]
    assert ours == ["ours", "ours layout=tile0", "ours layout=tile1", "ours layout=tile2"] and "library" in names
    assert gpu.options["deadline"] <= time.monotonic() + decide.GPU_SECONDS and gpu.options["seconds"] > 0
    for one in (SMALL, LARGE):
        selection = choosing.select(one, in_plan=True)
        assert str(selection) == "ours layout=tile1" and "tuned here, A_GPU.json" in selection.source
    gpu.asked.clear()
    decide.decide([SMALL, LARGE], CUDA)
    assert not gpu.asked


def test_what_time_does_not_allow_is_left_to_the_next_freeze(gpu):
    gpu.most = 1
    decide.decide([SMALL, LARGE], CUDA, decide.Tuning(5.0))
    assert gpu.options["deadline"] <= time.monotonic() + 5.0
    assert winners.entry_of(LARGE) is not None and winners.entry_of(SMALL) is None
    assert choosing.select(SMALL, in_plan=True).source == FIXED_ORDER
    gpu.asked.clear()
    decide.decide([SMALL, LARGE], CUDA)
    assert [problem for problem, _ in gpu.asked] == [str(SMALL)]


def test_a_kernel_that_ends_the_child_is_never_chosen_and_costs_nobody_else(gpu):
    gpu.times, gpu.deadly = {"ours": 1.0, "library": 40.0}, {str(LARGE): {"ours"}}
    decide.decide([SMALL, LARGE], CUDA)
    assert str(choosing.select(SMALL, in_plan=True)) == "ours"
    assert str(choosing.select(LARGE, in_plan=True)) != "ours"
    assert winners.outcome(LARGE, "ours")["why"].startswith("it ended the process")


def test_checks_that_were_kept_are_not_repeated(gpu, monkeypatch):
    with monkeypatch.context() as late:
        late.setattr(decide, "_keep_times", lambda *args: None)  # the process ended before that
        decide.decide([SMALL], CUDA)
    gpu.asked.clear()
    decide.decide([SMALL], CUDA)
    assert gpu.asked == [(str(SMALL), [])] and winners.entry_of(SMALL) is not None


def test_without_a_child_nothing_is_measured_on_a_gpu(gpu, no_child):
    decide.decide([SMALL], CUDA)
    assert choosing.select(SMALL, in_plan=True).source == FIXED_ORDER and winners.entry_of(SMALL) is None


def test_a_batch_near_a_measured_one_is_known_and_a_far_one_is_not(gpu):
    decide.decide([SMALL], CUDA)
    gpu.asked.clear()
    for N, is_known in ((32, True), (128, True), (31, False), (129, False), (1, False)):
        decide.decide([SMALL._replace(N=N)], CUDA) if is_known else None
        assert (winners.lookup(SMALL._replace(N=N)) is not None) == is_known
    assert not gpu.asked


@pytest.fixture
def at_calls(gpu, monkeypatch):
    """Calls of conv_bn_act whose problems are said to be on the GPU. It takes the number of images."""
    real = dispatch.conv_problem
    monkeypatch.setattr(dispatch, "conv_problem", lambda *args: real(*args)._replace(device="cuda"))
    monkeypatch.setattr(cuda_graphs, "is_captured", lambda device: False)
    monkeypatch.setattr(decide, "_asked_at_calls", set())
    monkeypatch.setattr(decide, "_seconds_for_calls", 60.0)
    decided, decide_it = [], decide.decide_at_call

    def on_the_gpu(problem, device):
        decided.append(problem)
        decide_it(problem, CUDA)

    monkeypatch.setattr(decide, "decide_at_call", on_the_gpu)
    weight = torch.randn(8, 4, 3, 3)

    def call(images, backend="auto"):
        vectors = (torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8))
        operands = ConvOperands(torch.randn(images, 4, 6, 6), weight, *vectors)
        return dispatch.conv_bn_act(operands, ((1, 1), (1, 1), (1, 1), 1, "relu"), backend)

    call.decided = decided
    return call


def test_a_fused_models_first_call_on_a_gpu_decides(gpu, at_calls, monkeypatch):
    gpu.times = {"library": 40.0, "ours layout=tile1": 20.0}
    at_calls(64)
    (asked, _), *others = gpu.asked
    assert asked == str(at_calls.decided[0]) and not others
    assert str(choosing.select(at_calls.decided[0])) == "ours layout=tile1"
    at_calls(64), at_calls(64, "library"), at_calls(0)
    assert len(gpu.asked) == 1
    assert gpu.options["deadline"] <= time.monotonic() + 60.0


@pytest.mark.parametrize("why", ("the environment", "a capture", "deterministic algorithms"))
def test_a_first_call_decides_nothing_where_nothing_may_be_timed(gpu, at_calls, monkeypatch, why):
    with monkeypatch.context() as forbidden:
        if why == "the environment":
            forbidden.setenv("FUSED_RESNET_TUNE", "0")
        elif why == "a capture":
            forbidden.setattr(cuda_graphs, "is_captured", lambda device: True)
        else:
            forbidden.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        decide.decide_at_call(LARGE, CUDA)
        assert not gpu.asked
    decide.decide_at_call(LARGE, CUDA)
    assert len(gpu.asked) == 1


def test_first_calls_measure_for_a_minute_in_all(gpu, at_calls, monkeypatch, caplog):
    monkeypatch.setattr(decide, "_seconds_for_calls", 1e-9)
    decide.decide_at_call(LARGE, CUDA)
    assert len(gpu.asked) == 1 and decide._seconds_for_calls < 0
    with caplog.at_level("WARNING", logger="fused_resnet"):
        decide.decide_at_call(SMALL, CUDA)
    assert len(gpu.asked) == 1 and "warm_up(model, x) measures all of a model" in caplog.text


def test_what_warm_up_left_is_not_measured_at_the_first_call(gpu, at_calls):
    decide.leave_to_rules([LARGE])
    decide.decide_at_call(LARGE, CUDA)
    assert not gpu.asked


def test_whether_tf32_is_allowed_is_part_of_what_is_known(gpu, monkeypatch):
    one = SMALL._replace(dtype=torch.float32)
    decide.decide([one, SMALL], CUDA)
    gpu.asked.clear()
    monkeypatch.setattr(devices, "allows_tf32", lambda: False)
    assert winners.entry_of(one) is None and winners.entry_of(SMALL) is not None
    decide.decide([one, SMALL], CUDA)
    assert [problem for problem, _ in gpu.asked] == [str(one)]


# ------------------------------------------------------------------------------------------------------- fused models


def test_warm_up_measures_what_a_fused_model_runs(measuring, no_child, timed):
    torch.manual_seed(0)
    model, x = models.create("resnet20").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        assert fused_resnet.warm_up(fused_resnet.fuse(model), x) is model
        assert timed and all(one.has_bn and not one.has_bias for one in timed) and len(timed) == len(set(timed))
        assert all(winners.entry_of(one) is not None for one in timed)
        assert all("tuned here" in choosing.select(one).source for one in timed)
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        timed.clear()
        fused_resnet.warm_up(model, x)
        assert not timed


def test_what_warm_up_refuses():
    model = fused_resnet.fuse(models.create("resnet20"))
    with pytest.raises(RuntimeError, match="training mode"):
        fused_resnet.warm_up(model.train(), torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match="expected an nn.Module, got function"):
        fused_resnet.warm_up(lambda x: x, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="warm_up: tune must be"):
        fused_resnet.warm_up(model.eval(), torch.randn(1, 3, 32, 32), tune="later")
