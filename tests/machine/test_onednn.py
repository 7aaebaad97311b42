"""What torch's oneDNN can do here, by processor and limit."""

import pytest
import torch

from fused_resnet.machine import onednn


@pytest.mark.parametrize(
    "limit, expected",
    ((None, True), ("AVX2", False), ("avx512_core_bf16", False), ("AVX512_CORE_AMX", True), ("ALL", True)),
)
def test_amx_is_asked_of_the_processor_and_the_limit(limit, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert onednn.has_amx.__wrapped__() is expected
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert onednn.has_amx.__wrapped__() is False
