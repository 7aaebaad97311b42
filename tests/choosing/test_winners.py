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


def winner_of(N=8, backend=None, **changes):
    return winners.lookup(problem(N, **changes), backend)


# ------------------------------------------------------------------------------------------------------------ lookup


def test_nothing_measured(tuned_files):
    assert winner_of() is None and winners.lookup(AddReluProblem((2, 3), True, torch.float32, "cpu")) is None
    assert winner_of(device="meta") is None


def test_the_nearest_batch_in_log_space_answers(tuned_files):
    for batch, winner in ((1, "eager"), (32, "onednn"), (256, "eager")):
        tuned_files.add(tuned_files.user, problem(batch), entry(winner))
    name = tuned_files.path(tuned_files.user).name
    for N, batch in ((0, 1), (1, 1), (5, 1), (6, 32), (32, 32), (90, 32), (91, 256), (5000, 256)):
        found = winner_of(N)
        assert found.source == f"tuned here, {name}, batch {batch}", N
        assert found.backend == ("onednn" if batch == 32 else "eager")


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


def test_switched_off(tuned_files, monkeypatch):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    monkeypatch.setenv("FUSED_RESNET_TUNED", "0")
    winners.forget()
    assert winner_of() is None


def test_ignored_for_a_comparison(tuned_files):
    tuned_files.add(tuned_files.user, problem(), entry("eager"))
    with winners.ignored():
        assert winner_of() is None and choosing.select(problem()).source == choice.FIXED_ORDER
    assert winner_of().backend == "eager"


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
        assert winner_of().backend == "eager"  # the shipped file still counts
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
    found = winner_of()
    assert found is None or isinstance(found, winners.Winner)
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
