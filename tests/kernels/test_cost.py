"""Which configs of Triton's convolutions may win by arithmetic. Nothing is computed, and Triton is not needed."""

from fused_resnet.kernels.triton.conv import cost
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from tests.support.tuned_files import problem


def test_configs_that_cannot_win_by_arithmetic_are_dropped(monkeypatch):
    """BLOCK_M stands for the microseconds."""
    found = [TritonConfig(time_us, 64, 64, 8, 4, 4) for time_us in (50, 10, 29, 31, 30)]
    monkeypatch.setattr(cost, "configs", lambda problem, arch, num_sms: found)
    monkeypatch.setattr(cost, "estimated_us", lambda problem, config, arch, num_sms: float(config.BLOCK_M))
    assert [config.BLOCK_M for config in cost.promising(problem(), 90)] == [10, 29, 30]
    found[:] = [TritonConfig(10, number, 64, 8, 4, 4) for number in range(40)]
    assert cost.promising(problem(), 90) == found[: cost._MOST_CONFIGS]
    found.clear()
    assert cost.promising(problem(), 90) == []
