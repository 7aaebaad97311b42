"""The fixture for whoever adds a kernel: it passes what is right, and fails with the report of what is not."""

import pytest
import torch

from fused_resnet.emulation import Kernel, launches
from fused_resnet.emulation.fixture import emulated, run_in_every_landing  # noqa: F401
from fused_resnet.emulation.kernel import LANDINGS
from tests.support.ptx import kernel_text

# y[i] = x[31 - i], through shared memory
BODY = """
ld.param.u64 %d0, [x];
ld.param.u64 %d1, [y];
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
cvt.u64.u32 %d2, %r1;
add.u64 %d3, %d0, %d2;
add.u64 %d4, %d1, %d2;
ld.global.b32 %r2, [%d3];
mov.u32 %r3, room;
add.u32 %r4, %r3, %r1;
st.shared.b32 [%r4], %r2;
bar.sync 0;
sub.u32 %r5, 252, %r1;
add.u32 %r6, %r3, %r5;
ld.shared.b32 %r7, [%r6];
st.global.b32 [%d4], %r7;
ret;
"""
TEXT = kernel_text(BODY, parameters=".param .u64 x, .param .u64 y", shared=".shared .align 4 .b8 room[256];")


def test_what_is_right_passes(emulated):  # noqa: F811
    x, y, fills = torch.arange(64.0), torch.zeros(64), []
    outcomes = emulated(TEXT, 1, 64, [x, y], writable=[y], again=lambda: fills.append(y.zero_()))
    assert torch.equal(y, x.flip(0)) and len(outcomes) == len(fills) == 3


def test_a_race_fails():
    x, y = torch.arange(64.0), torch.zeros(64)
    with pytest.raises(pytest.fail.Exception, match="race"):
        run_in_every_landing(TEXT.replace("bar.sync 0;", ""), 1, 64, [x, y], writable=[y])


def test_a_launch_of_triton_is_run_by_its_own_run(monkeypatch):
    """Compiled in another process: here it is only handed on."""
    ran = []
    outcome = Kernel(TEXT).run(1, 64, [torch.zeros(64), y := torch.zeros(64)], writable=[y])
    monkeypatch.setattr(launches, "run", lambda *arguments, **how: ran.append((arguments, how["landing"])) or outcome)
    launch = launches.Launch(test_a_race_fails, 1, (), {})
    assert run_in_every_landing(launch, 80, [y]) == [outcome] * 3
    assert ran == [((launch, 80, [y]), landing) for landing in LANDINGS]


def test_what_is_no_kernel_is_refused_with_what_is():
    with pytest.raises(TypeError, match="a function is no kernel; wanted: PTX, a Kernel, or a Launch of"):
        run_in_every_landing(test_a_race_fails, 1, 64, [])
