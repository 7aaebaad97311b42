"""What a number depends on, and nothing that names a place."""

import json
import shutil
import subprocess

import pytest
import torch

from fused_resnet.kernels import sources
from fused_resnet.machine import files
from fused_resnet.measuring import environment


def test_environment_names_what_matters_and_no_place():
    record = environment.environment()
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert {"date", "cpu", "cpu_flags", "cores", "python", "triton", "gpu", "commit", "dirty"} <= set(record)
    import socket

    text = json.dumps(record)
    assert socket.gethostname() not in text and str(sources.ROOT) not in text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_being_written_is_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    git("init")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fused_resnet" / "measuring" / "environment.py"))
    assert environment.environment()["dirty"] is False
    files.write_json(tmp_path / "benchmarks" / "results" / "cpu" / "model.json", {})
    assert environment.environment()["dirty"] is False
    files.write_json(tmp_path / "benchmarks" / "new.json", {})
    assert environment.environment()["dirty"] is True
