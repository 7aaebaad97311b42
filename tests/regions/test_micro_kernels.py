"""Which micro-kernels are chosen where that is measured: the first answer stays."""

import pytest
import torch

from fused_resnet.machine import devices, files
from fused_resnet.regions import kernels
from fused_resnet.regions.kernels import MicroKernel


def table(is_chosen, why_not=""):
    rows = [("amx_bf16", True, "no tiles"), ("avx512_bf16", is_chosen, why_not), ("portable_bf16", False, "")]
    return tuple(MicroKernel(name, torch.bfloat16, chosen, "", "", why) for name, chosen, why in rows)


def test_the_first_answer_stays(tuned_files, monkeypatch):
    for first in (True, False):
        monkeypatch.setattr(devices, "cpu_name", lambda name=f"one of {first}": name)
        for later in (first, not first):
            assert kernels._settled(table(later)) == table(first)


def test_another_build_is_measured_anew(tuned_files, monkeypatch):
    kernels._settled(table(True))
    monkeypatch.setattr(kernels.compiled, "built_digest", lambda patterns: "another")
    assert kernels._settled(table(False)) == table(False)
    assert kernels._settled(table(True)) == table(False)


def test_what_does_not_run_here_is_not_kept(tuned_files):
    lacking = table(True, "this CPU has no AVX-512 for bf16")
    assert kernels._settled(lacking) == lacking
    assert kernels._settled(table(False)) == table(False)


def test_nothing_is_read_where_measurements_do_not_count(tuned_files, monkeypatch):
    kernels._settled(table(True))
    monkeypatch.setenv("FUSED_RESNET_TUNED", "0")
    assert kernels._settled(table(False)) == table(False)


@pytest.mark.parametrize("content", ("{", "[]", '{"a": 1}', '{"a": {"avx512_bf16": "yes"}}'))
def test_a_bad_file_is_replaced(tuned_files, content, caplog):
    file = files.cache_dir() / "tuning" / "micro_kernels.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert kernels._settled(table(True)) == table(True)
    assert "is not a file that this fused_resnet can use" in caplog.text
    assert kernels._settled(table(False)) == table(True)


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(tuned_files):
    files.cache_dir().write_text("a file where the folder should be")
    for is_chosen in (True, False):
        assert kernels._settled(table(is_chosen)) == table(is_chosen)
