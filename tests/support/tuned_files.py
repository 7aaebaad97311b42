"""A tuning cache and a folder of shipped configs of a test's own, and entries to put there."""

import torch

from fused_resnet.choosing import winners, winners_file
from fused_resnet.choosing.winners_file import Entry, Measured
from fused_resnet.machine import files
from fused_resnet.operators.problem import ConvProblem


class TunedFiles:
    def __init__(self, folder):
        self.shipped, self.device = folder / "configs", winners.device_id("cpu")

    @property
    def user(self):
        return winners.user_folder()

    def path(self, folder):
        return folder / winners_file.file_name(self.device)

    def add(self, folder, problem, entry, *, kernels=None):
        """Write one entry, as measured by kernels of these digests (default: those that are here)."""
        run = {"date": entry.run, "kernels": winners.kernel_digests() if kernels is None else kernels}
        entries = {winners.key(problem): {problem.N: entry}}
        return winners.merge(folder, winners_file.Table(self.device, entries, {entry.run: run}, {}, {}))


def own_files(tmp_path, monkeypatch):
    """For the fixture `tuned_files`: both folders moved into this test's, nothing read or reported yet."""
    monkeypatch.delenv("FUSED_RESNET_TUNED", raising=False)
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(winners, "SHIPPED", tmp_path / "configs")
    monkeypatch.setattr(winners, "warned", set())
    monkeypatch.setattr(winners, "_SESSION", {})
    files.report_once.cache_clear()
    winners.forget()
    yield TunedFiles(tmp_path)
    winners.forget()


def entry(winner, run="2026-11-20", default="onednn", **candidates):
    """An entry whose candidates are given as name=(config, time_us); the winner alone where none are."""
    candidates = candidates or {winner: (None, 10.0)}
    return Entry(winner, default, run, {name: Measured(*one, 0.5) for name, one in candidates.items()})


def problem(N=8, dtype=None, device="cpu", **changes):
    fields = dict(
        N=N, C=16, H=8, W=8, K=16, R=3, S=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
        activation="relu", has_bn=False, has_bias=True, has_residual=False, dtype=dtype or torch.float32, device=device,
    )  # fmt: skip
    return ConvProblem(**{**fields, **changes})
