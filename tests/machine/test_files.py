"""Files that outlive a process: where, whole, and what becomes of bad ones."""

import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from fused_resnet.machine import files


@pytest.fixture(autouse=True)
def fresh_reports():
    files.report_once.cache_clear()


def test_the_folder_is_platformdirs_or_the_one_that_was_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_RESNET_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert files.cache_dir() == tmp_path / "fused_resnet"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", "~/elsewhere")
    assert files.cache_dir() == tmp_path / "elsewhere"


def test_a_missing_file_is_no_news(tmp_path, caplog):
    assert files.read_json(tmp_path / "none.json", dict) is None
    assert not caplog.messages


def _needs_a(record):
    return record["a"] + 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"[1]", b'{"b": 1}', b'{"a": "x"}', b"null", b"[" * 100_000]
)
def test_a_bad_file_is_reported_once_and_counts_as_absent(tmp_path, caplog, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    for _ in range(3):
        assert files.read_json(path, _needs_a) is None
    (message,) = caplog.messages
    assert str(path) in message and "ignored" in message
    path.write_text('{"a": 1}')
    assert files.read_json(path, _needs_a) == 2


def test_a_number_beyond_floats_is_a_bad_file(tmp_path, caplog):
    (tmp_path / "bad.json").write_text('{"a": 1%s}' % ("0" * 400))
    assert files.read_json(tmp_path / "bad.json", lambda record: float(record["a"])) is None
    assert "ignored (OverflowError" in caplog.text


def test_what_is_no_file_is_reported_too(tmp_path, caplog):
    assert files.read_json(tmp_path, dict) is None
    assert "cannot be read and is ignored" in caplog.text


def test_writers_that_cannot_write_raise(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file" / "a.json", Path("/proc/none/a.json")):
        with pytest.raises(OSError):
            files.write_json(where, {})
        with pytest.raises(OSError):
            with files.locked(where):
                pass


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError):
            files.write_json(tmp_path / "a.json", [1])
        assert files.read_json(tmp_path / "a.json", list) == []
    finally:
        tmp_path.chmod(0o755)


def test_a_lock_that_is_held_ends_in_an_error_and_not_in_waiting(tmp_path):
    with files.locked(tmp_path / "a"), pytest.raises(OSError):
        with files.locked(tmp_path / "a", timeout_s=0.05):
            pass


def _count(path, times):
    for _ in range(times):
        with files.locked(path):
            files.write_json(path, (files.read_json(path, int) or 0) + 1)


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path, fork = tmp_path / "count.json", multiprocessing.get_context("fork")
    writers = [fork.Process(target=_count, args=(path, 40)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(json.loads(path.read_text()))  # a reader without the lock never sees half a file
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert files.read_json(path, int) == 80 and seen <= set(range(81))


def test_write_json_replaces_whole_files(tmp_path):
    file = files.write_json(tmp_path / "deep" / "a.json", {"x": 1})
    files.write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 2} and [f.name for f in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    file = files.write_json(tmp_path / "a.json", {"x": 1})

    def interrupted(*_):
        raise error

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(error):
        files.write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 1} and [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": math.nan})
    assert not list(tmp_path.iterdir())
