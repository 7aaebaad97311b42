"""What was verified on a GPU: the newest record, and whether its sources are still those."""

import json

import pytest

from fused_resnet.kernels import sources
from fused_resnet.machine import files
from fused_resnet.measuring import verified


@pytest.fixture
def tree(tmp_path):
    """A project with one CUDA and one Triton source."""
    for file in ("csrc/cuda/a.cu", "fused_resnet/kernels/triton/conv/b.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "csrc" / "cuda" / "notes.txt").write_text("not a source")
    return tmp_path


def record(tree, device="NVIDIA H200", date="2026-11-20T08:00:00+00:00", backends=("cuda", "triton"), name="check"):
    made = verified.verified_record(device, date, backends, tree)
    files.write_json(tree / "benchmarks" / "results" / "h200" / f"{name}.json", {"verified": made})


def test_never_verified(tree):
    assert str(verified.newest(tree)) == "kernels not yet verified on a GPU"
    assert verified.newest(tree).never_verified == ("csrc/cuda/a.cu", "fused_resnet/kernels/triton/conv/b.py")


def test_verified(tree):
    record(tree)
    files.write_json(tree / "benchmarks" / "results" / "h200" / "ops.json", {"rows": []})
    assert str(verified.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20"


def test_changed_since(tree):
    record(tree)
    (tree / "csrc" / "cuda" / "a.cu").write_text("edited")
    assert str(verified.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20; changed since: csrc/cuda/a.cu"


def test_a_cpu_kernel_is_not_verified_on_a_gpu(tree):
    file = tree / "csrc" / "cpu" / "grouped.h"
    file.parent.mkdir()
    file.write_text("grouped")
    assert "csrc/cpu/grouped.h" not in verified.newest(tree).never_verified
    record(tree)
    path = tree / "benchmarks" / "results" / "h200" / "check.json"
    of_before = json.loads(path.read_text())
    assert "csrc/cpu/grouped.h" not in of_before["verified"]["kernels"]
    of_before["verified"]["kernels"]["csrc/cpu/grouped.h"] = "another digest"
    files.write_json(path, of_before)
    file.write_text("edited")
    assert str(verified.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20"


def test_added_and_removed_since(tree):
    record(tree)
    (tree / "csrc" / "cuda" / "a.cu").rename(tree / "csrc" / "cuda" / "c.cu")
    state = verified.newest(tree)
    assert state.changed == ("csrc/cuda/a.cu (removed)",) and state.never_verified == ("csrc/cuda/c.cu",)


def test_a_backend_that_was_not_verified_is_named(tree):
    record(tree, backends=("triton",))
    assert str(verified.newest(tree)).endswith("; not yet verified: csrc/cuda/a.cu")


def test_the_newest_record_counts(tree):
    record(tree, device="NVIDIA A100", date="2026-11-19T23:00:00+00:00", name="z")
    record(tree, device="NVIDIA H200", date="2026-11-20T01:00:00+00:00", name="a")
    assert verified.newest(tree).device == "NVIDIA H200"


def test_an_unreadable_record_is_not_taken_for_none(tree):
    record(tree)
    (tree / "benchmarks" / "results" / "h200" / "check.json").write_text('{"verified": ')
    with pytest.raises(ValueError, match="results/h200/check.json is not valid JSON"):
        verified.newest(tree)


def test_digests_of_this_tree_cover_both_backends():
    files = sources.digests()
    assert "csrc/cuda/sm80/conv_bn_act.cu" in files and "fused_resnet/kernels/triton/conv/launch.py" in files
