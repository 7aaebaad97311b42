"""What was measured is found again: nearest batch, whose file counts, bad files, and kernels that changed."""

import json
import multiprocessing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_resnet import backends, choosing
from fused_resnet.choosing import choice, winners, winners_file
from fused_resnet.kernels import compiled, sources
from fused_resnet.operators.problem import AddReluProblem
from tests.support.tuned_files import entry, problem

NCHW = {"layout": "NCHW"}


RIGHT, WRONG, NO_NUMBER, FAILED = {"error_ratio": 0.5}, {"error_ratio": 1.5}, {"error_ratio": None}, {"why": "no luck"}


def table(**fields):
    return winners_file.Table.empty(winners.device_id("cpu"))._replace(**fields)


def keep_checks(outcomes, one=problem()):  # noqa: B008
    winners.keep(table(checks=winners.checks_of(one, outcomes))._replace(device=winners.device_id(one.device)))


def found_of_onednn():
    """Whether a winner, an entry, a check and trust are found."""
    found = winner_of(), winners.entry_of(problem()), winners.outcome(problem(), "onednn")
    return *(one is not None for one in found), winners.is_trusted("onednn", "cpu")


def winner_of(N=8, backend=None, **changes):
    return winners.lookup(problem(N, **changes), backend)


# ------------------------------------------------------------------------------------------------------------ lookup


def test_nothing_measured(tuned_files):
    assert winner_of() is None and winners.lookup(AddReluProblem((2, 3), True, torch.float32, "cpu")) is None
    assert winner_of(device="meta") is None


def test_a_measurement_answers_for_batches_from_half_to_twice_its_own(tuned_files):
    for batch, winner in ((1, "eager"), (32, "onednn"), (256, "eager")):
        tuned_files.add(tuned_files.user, problem(batch), entry(winner))
    name = tuned_files.path(tuned_files.user).name
    for N, batch in ((0, 1), (1, 1), (2, 1), (16, 32), (32, 32), (64, 32), (128, 256), (256, 256), (512, 256)):
        found = winner_of(N)
        assert found.source == f"tuned here, {name}, batch {batch}", N
        assert found.backend == ("onednn" if batch == 32 else "eager")
    for N in (3, 15, 65, 127, 513, 5000):
        assert winner_of(N) is None, N


def test_the_nearest_batch_in_log_space_answers(tuned_files):
    for batch in (10, 16):
        tuned_files.add(tuned_files.user, problem(batch), entry("eager"))
    for N, batch in ((9, 10), (12, 10), (13, 16), (20, 16)):  # 12.65 is halfway
        assert winner_of(N).source.endswith(f"batch {batch}"), N


def test_the_larger_batch_answers_halfway(tuned_files):
    for batch in (4, 16):
        tuned_files.add(tuned_files.user, problem(batch), entry("eager"))
    assert winner_of(8).source.endswith("batch 16")


def test_a_key_is_everything_but_the_batch(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    assert winner_of() is not None
    different = (
        dict(C=32), dict(H=9), dict(W=9), dict(K=32), dict(R=1), dict(S=1), dict(stride=(2, 2)), dict(padding=(0, 0)),
        dict(dilation=(2, 2)), dict(groups=2), dict(activation="none"), dict(has_bn=True), dict(has_bias=False),
        dict(has_residual=True), dict(dtype=torch.bfloat16),
    )  # fmt: skip
    for changes in different:
        assert winner_of(**changes) is None, changes


def test_threads_are_told_apart(tuned_files):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert winner_of() is None
            tuned_files.add(tuned_files.user, problem(), entry(("eager", "onednn")[threads - 1]))
        torch.set_num_threads(1)
        assert winner_of().backend == "eager"
    finally:
        torch.set_num_threads(before)


def test_versions_are_told_apart(tuned_files, monkeypatch):
    """Another version of what computes may be faster, or wrong."""
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    keep_checks({"onednn": RIGHT})
    winners.keep(table(trusted=winners.trust(["onednn"], "cpu")))
    assert torch.__version__ in winners.key(problem()) and found_of_onednn() == (True, True, True, True)
    monkeypatch.setattr(winners, "versions", lambda device: "torch 3.0")
    winners.forget()
    assert found_of_onednn() == (False, False, False, False)


def test_the_instructions_that_onednn_is_limited_to_are_told_apart(monkeypatch):
    limited = [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ONEDNN_MAX_CPU_ISA", "SSE41"), (None, None)]
    found = set()
    for limit in limited:
        monkeypatch.setattr(winners.onednn, "isa_limit", lambda limit=limit: limit)
        winners.versions.cache_clear()
        found.add(winners.key(problem()))
    winners.versions.cache_clear()
    assert len(found) == 3


def test_tf32_is_told_apart_on_a_gpu(tuned_files, monkeypatch):
    """For fp32 alone. Whether it is allowed may change at any time in a process."""
    monkeypatch.setattr(winners, "device_id", lambda device: "NVIDIA H200")
    tuned_files.device = "NVIDIA H200"
    found = lambda one: (winners.entry_of(one), winners.outcome(one, "eager"), winners.lookup(one))  # noqa: E731
    some = [problem(device="cuda"), problem(dtype=torch.float16, device="cuda")]
    for allowed in (True, False, True):
        monkeypatch.setattr(winners.devices, "allows_tf32", lambda allowed=allowed: allowed)
        if not any(found(some[1])):
            for one in some:
                tuned_files.add(tuned_files.user, one, entry("eager"))
                keep_checks({"eager": RIGHT}, one)
        assert all(found(some[0])) if allowed else not any(found(some[0]))
        assert all(found(some[1]))


def test_what_was_tuned_here_comes_before_what_ships_batch_by_batch(tuned_files):
    tuned_files.add(tuned_files.shipped, problem(8), entry("eager"))
    tuned_files.add(tuned_files.shipped, problem(64), entry("eager"))
    name = tuned_files.path(tuned_files.shipped).name
    assert winner_of(8) == ("eager", None, f"configs/{name}, tuned for batch 8", 10.0)
    tuned_files.add(tuned_files.user, problem(8), entry("onednn"))
    assert winner_of(8) == ("onednn", None, f"tuned here, {name}, batch 8", 10.0)
    assert winner_of(64) == ("eager", None, f"configs/{name}, tuned for batch 64", 10.0)


def test_the_best_config_of_each_backend_is_kept(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("onednn", onednn=(None, 10.0), eager=(NCHW, 12.0)))
    assert winner_of() == winner_of(backend="onednn") and winner_of().config is None
    assert winner_of(backend="eager").config == NCHW
    assert winner_of(backend="triton") is None


def test_an_entry_is_of_exactly_this_batch(tuned_files):
    """What answers for batches near by is not measured there."""
    tuned_files.add(tuned_files.user, problem(8), entry("eager"))
    assert winners.entry_of(problem(8)) == entry("eager")
    assert winners.entry_of(problem(9)) is None and winner_of(9).backend == "eager"


def test_switched_off(tuned_files, monkeypatch):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    keep_checks({"onednn": RIGHT})
    monkeypatch.setenv("FUSED_RESNET_TUNED", "0")
    winners.forget()
    assert winner_of() is winners.entry_of(problem()) is winners.outcome(problem(), "onednn") is None


def test_ignored_for_a_comparison(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    keep_checks({"onednn": WRONG})
    with winners.ignored():
        assert winner_of() is winners.entry_of(problem()) is winners.outcome(problem(), "onednn") is None
        assert choosing.select(problem()).source == choice.FIXED_ORDER
        assert choosing.fixed_order(problem()).backend.name == "onednn"
    assert winner_of().backend == "eager" and winners.outcome(problem(), "onednn") is not None


def test_a_second_lookup_reads_nothing(tuned_files, monkeypatch):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    first = winner_of()
    monkeypatch.setattr(winners.files, "read_json", None)
    assert winner_of() is first and winner_of(9).backend == "eager"


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


# ------------------------------------------------------------------------------------------------------------ checks


def test_checks_are_found_again(tuned_files):
    """Through the file, of exactly this problem and candidate, later ones in place of earlier ones."""
    kept = {"onednn": RIGHT, "eager layout=NCHW": WRONG, "eager": NO_NUMBER, "winograd": FAILED}
    keep_checks({**kept, "onednn": WRONG})
    keep_checks({"onednn": RIGHT})
    winners.forget()
    for name, outcome in kept.items():
        found = winners.outcome(problem(), name)
        assert {key: value for key, value in found.items() if key != "kernel"} == outcome
        assert winners.why_wrong(found) == winners.why_wrong(outcome)
    assert winners.outcome(problem(), "grouped") is winners.outcome(problem(), "eager layout=x") is None
    for other in (problem(9), problem(C=32), problem(dtype=torch.bfloat16)):
        assert winners.outcome(other, "onednn") is None


def test_checks_say_what_is_wrong():
    assert winners.why_wrong(RIGHT) is winners.why_wrong({"error_ratio": 1.0}) is None
    assert winners.why_wrong(WRONG) == "its error is 1.5 times what is allowed"
    assert winners.why_wrong(NO_NUMBER) == "its result is no number"
    assert winners.why_wrong(FAILED) == "no luck"


def test_checks_and_entries_go_stale_with_their_kernels(tuned_files, monkeypatch):
    digests = {sources.WINOGRAD: "0123"}
    monkeypatch.setattr(compiled, "built_digest", lambda patterns: digests.get(patterns))
    both = entry("winograd", winograd=(None, 1.0), onednn=(None, 2.0))
    tuned_files.add(tuned_files.user, problem(), both)
    keep_checks({"winograd": WRONG, "onednn": RIGHT})
    winners.keep(table(trusted=winners.trust(["winograd", "onednn"], "cpu")))
    assert winners.entry_of(problem()) == both and winners.outcome(problem(), "winograd") is not None
    assert winners.is_trusted("winograd", "cpu") and not winners.is_trusted("grouped", "cpu")
    digests[sources.WINOGRAD] = "4567"
    winners.forget()
    assert winners.entry_of(problem()) is winners.outcome(problem(), "winograd") is None
    assert not winners.is_trusted("winograd", "cpu")
    assert winners.outcome(problem(), "onednn") is not None and winners.is_trusted("onednn", "cpu")


def test_a_table_comes_back_from_its_file(tuned_files):
    whole = table(
        entries={winners.key(problem()): {8: entry("eager")}},
        runs={entry("eager").run: {"kernels": {}}},
        checks=winners.checks_of(problem(), {"onednn": RIGHT, "eager": FAILED}),
        trusted=winners.trust(["onednn"], "cpu"),
    )
    winners.keep(whole)
    assert winners_file.read(tuned_files.path(tuned_files.user), tuned_files.device) == whole


def test_a_folder_that_cannot_be_written_is_kept_for_this_process(tuned_files, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path / "file"))
    keep_checks({"onednn": WRONG})
    one = entry("eager")
    winners.keep(table(entries={winners.key(problem()): {8: one}}, runs={one.run: {"kernels": {}}}))
    assert winners.outcome(problem(), "onednn") is not None and winners.entry_of(problem()) == one
    assert winner_of().source == "tuned in this process, batch 8"
    assert sum("is kept for this process alone" in message for message in caplog.messages) == 1
    assert (tmp_path / "file").read_text() == ""


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


def _with_check(one):
    return damaged(lambda record: record["checks"].update({"a problem": {"onednn": one}}))


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
    "no error": _in_entry(candidates={"onednn": {"config": None, "time_us": 1.0}}),
    "a time with an error in words": _in_entry(
        candidates={"onednn": {"config": None, "time_us": 1.0, "error_ratio": "small"}}
    ),
    "no time": _in_entry(candidates={"onednn": {"config": None, "time_us": float("nan"), "error_ratio": 0.1}}),
    "a time beyond floats": _in_entry(candidates={"onednn": {"config": None, "time_us": 10**400, "error_ratio": 0.1}}),
    "no end": _in_entry(candidates={"onednn": {"config": None, "time_us": float("inf"), "error_ratio": 0.1}}),
    "a batch beyond floats": damaged(
        lambda record: [by_batch.update({"1" * 400: by_batch["8"]}) for by_batch in record["entries"].values()] and None
    ),
    "no digests": damaged(lambda record: [run.update(kernels=None) for run in record["runs"].values()] and None),
    "checks in a list": damaged(lambda record: record.update(checks=[])),
    "an error without a kernel": _with_check({"error_ratio": 0.5}),
    "a reason without a kernel": _with_check({"why": "no luck"}),
    "a check without an error": _with_check({"kernel": ""}),
    "a check in words": _with_check("why"),
    "an error in words": _with_check({"error_ratio": "small", "kernel": ""}),
    "an error that is no number": _with_check({"error_ratio": float("nan"), "kernel": ""}),
    "an error without end": _with_check({"error_ratio": float("inf"), "kernel": ""}),
    "a digest that is a number": _with_check({"error_ratio": 0.5, "kernel": float("nan")}),
    "an error below nothing": _with_check({"error_ratio": -1.0, "kernel": ""}),
    "an error beyond floats": _with_check({"error_ratio": 10**400, "kernel": ""}),
    "trust in a list": damaged(lambda record: record.update(trusted=["onednn"])),
    "a nested config": _in_entry(candidates={"onednn": {"config": {"a": []}, "time_us": 1.0, "error_ratio": 0.1}}),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_bad_file_is_reported_once_and_ignored(tuned_files, caplog, spoil):
    tuned_files.add(tuned_files.shipped, problem(), entry("eager"))
    tuned_files.add(tuned_files.user, problem(), entry("onednn"))
    keep_checks({"onednn": RIGHT})
    spoil(tuned_files.path(tuned_files.user))
    for _ in range(2):
        winners.forget()
        assert winner_of().backend == "eager"  # the shipped file still counts
        assert winners.outcome(problem(), "onednn") is None and not winners.is_trusted("onednn", "cpu")
    assert sum("ignored" in message for message in caplog.messages) == 1


def test_a_kernels_measurement_without_digests_does_not_raise(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("triton", triton=(None, 1.0)))
    damaged(lambda record: [run.update(kernels=None) for run in record["runs"].values()] and None)(path)
    winners.forget()
    assert winner_of() is None and isinstance(choosing.select(problem(), "auto"), choosing.Selection)


def test_a_bad_file_is_replaced_by_what_is_measured_next(tuned_files):
    path = tuned_files.add(tuned_files.user, problem(), entry("onednn"))
    path.write_text("{")
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    assert winner_of().backend == "eager"


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


def _keep_checks_of_batches(batches):
    for batch in batches:
        keep_checks({"onednn": RIGHT}, problem(batch))
        keep_checks({f"eager layout={batch}": WRONG})
        winners.keep(table(trusted=winners.trust([f"backend {batch}"], "cpu")))


def test_two_processes_that_merge_at_once_lose_nothing(tuned_files):
    """Checks of different problems, of different candidates of one problem, and trust."""
    fork = multiprocessing.get_context("fork")
    keep_checks({"eager": RIGHT}, problem(1000))  # digests and threads are known before the fork
    writers = [fork.Process(target=_keep_checks_of_batches, args=(range(n, 20, 2),)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    winners.forget()
    for batch in range(1, 20):
        assert winners.outcome(problem(batch), "onednn")["error_ratio"] == RIGHT["error_ratio"]
        assert winners.outcome(problem(), f"eager layout={batch}")["error_ratio"] == WRONG["error_ratio"]
        assert winners.is_trusted(f"backend {batch}", "cpu")
    assert winners.outcome(problem(1000), "eager") is not None


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
    keep_checks({"onednn": RIGHT, "eager": FAILED})
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
    found = winner_of()
    assert found is None or isinstance(found, winners.Winner)
    assert winners.entry_of(problem()) is None or found is not None
    for name in ("onednn", "eager"):
        outcome = winners.outcome(problem(), name)
        assert outcome is None or winners.why_wrong(outcome) is None or isinstance(winners.why_wrong(outcome), str)
    assert winners.is_trusted("onednn", "cpu") in (True, False)
    for name in ("auto", "eager"):
        assert isinstance(choosing.select(problem(), name), choosing.Selection)
    path.unlink()


# ----------------------------------------------------------------------------------------------------------- kernels


def test_kernels_that_changed_since_are_not_verified_any_more(tuned_files, caplog):
    digests = winners.kernel_digests()
    assert digests["triton"] is not None
    measured = entry("triton", triton=(None, 1.0), onednn=(None, 2.0))
    tuned_files.add(tuned_files.user, problem(), measured, kernels=digests)
    assert winner_of().backend == "triton"
    tuned_files.add(tuned_files.user, problem(), measured, kernels={**digests, "triton": "0123456789abcdef"})
    assert winner_of() is None and winner_of(backend="onednn").backend == "onednn"
    assert sum("have changed" in message for message in caplog.messages) == 1


def test_an_unknown_digest_is_no_agreement(tuned_files, monkeypatch):
    """A library whose build did not say what it was compiled from."""
    monkeypatch.setattr(compiled, "built_digest", lambda patterns: None)
    tuned_files.add(tuned_files.user, problem(), entry("cuda"), kernels={"cuda": None})
    assert winner_of() is None


def test_measurements_of_cpu_kernels_go_stale_with_their_sources(monkeypatch, tmp_path):
    for folder in ("cpu", "cuda"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    patterns = (sources.WINOGRAD, sources.GROUPED, sources.CUDA)
    assert sources.kernel_digest(sources.GROUPED, tmp_path) is None
    digests = {}
    for file in ("cpu/vectors.h", "cpu/grouped.h", "cpu/grouped.cpp", "cuda/conv_bn_act.cu"):
        (tmp_path / "csrc" / file).write_text(file)
        digests[file] = [sources.kernel_digest(each, tmp_path) for each in patterns]
    shared, header, source, cuda = digests.values()
    assert shared[0] == header[0] == source[0] == cuda[0] is not None
    assert len({shared[1], header[1], source[1]}) == 3 and cuda[1] == source[1]
    assert shared[2] is header[2] is source[2] is None and cuda[2] is not None
    monkeypatch.setattr(compiled, "built_digest", {sources.GROUPED: "0123"}.get)
    assert winners.kernel_digests()["grouped"] == "0123"
    assert winners._is_unchanged("grouped", {"grouped": "0123"}, "a file")
    assert not winners._is_unchanged("grouped", {"grouped": "4567"}, "a file")
    assert not winners._is_unchanged("winograd", {"winograd": None}, "a file")
