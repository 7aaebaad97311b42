"""A pytest fixture for whoever adds a kernel. A test imports it, or its conftest.py does.

from fused_resnet.emulation.fixture import emulated

def test_mine(emulated):
    emulated(ptx, grid, block, [x, y, n], writable=[y])
    torch.testing.assert_close(y, wanted)
"""

from __future__ import annotations

import zlib
from typing import Any, Callable, Iterator

import pytest

from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES, Kernel, Outcome
from fused_resnet.emulation.library import why_missing


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Outcome]]]:
    """Run a kernel in every landing and a schedule each, and fail on the first report.

    emulated(ptx, grid, block, arguments, *, name=None, again=None, **how). ptx: text, or a Kernel. again: called before
    every run, to fill what the kernel changes with what it had. how: as `Kernel.run` takes it. The seed is the test's.
    """
    if reason := why_missing():
        pytest.skip(reason)
    seed = zlib.crc32(request.node.nodeid.encode())
    yield lambda *arguments, **how: run_in_every_landing(*arguments, **{"seed": seed, **how})


def run_in_every_landing(
    ptx: Any, grid: Any, block: Any, arguments: Any, *, name: Any = None, again: Any = None, seed: int = 0, **how: Any
) -> list[Outcome]:
    kernel = ptx if isinstance(ptx, Kernel) else Kernel(ptx, name)
    outcomes = []
    for landing, schedule in zip(LANDINGS, SCHEDULES):
        if again is not None:
            again()
        modes = {"landing": landing, "schedule": schedule, "seed": seed, **how}
        outcomes.append(kernel.run(grid, block, arguments, **modes))
        if outcomes[-1].reports:
            reports = "\n".join(outcomes[-1].reports)
            pytest.fail(f"{kernel.name} with {modes}:\n{reports}", pytrace=False)
    return outcomes
