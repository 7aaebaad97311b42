"""A pytest fixture for whoever adds a kernel. A test imports it, or its conftest.py does.

from fused_resnet.emulation.fixture import emulated

def test_mine(emulated):
    emulated(ptx, grid, block, [x, y, n], writable=[y])
    torch.testing.assert_close(y, wanted)
"""

from __future__ import annotations

import functools
import zlib
from typing import Any, Callable, Iterator, Optional

import pytest

from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES, Kernel, Outcome
from fused_resnet.emulation.library import why_missing


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Outcome]]]:
    """Run a kernel in every landing and a schedule each, and fail on the first report.

    emulated(ptx, grid, block, arguments, *, name=None, again=None, **how). ptx: text, or a Kernel.
    emulated(launch, arch, writable, *, again=None, **how). launch: of `launches`, a kernel of Triton's.
    again: called before every run, to fill what the kernel changes with what it had. how: as `Kernel.run` takes it.
    The seed is the test's.
    """
    if reason := why_missing():
        pytest.skip(reason)
    seed = zlib.crc32(request.node.nodeid.encode())
    yield lambda *arguments, **how: run_in_every_landing(*arguments, **{"seed": seed, **how})


def run_in_every_landing(
    kernel: Any, *launched: Any, name: Any = None, again: Any = None, seed: int = 0, **how: Any
) -> list[Outcome]:
    """kernel: PTX, a Kernel, or a Launch of `launches`. launched: what its `run` takes by position."""
    name, run = _runner(kernel, name)
    outcomes = []
    for landing, schedule in zip(LANDINGS, SCHEDULES):
        if again is not None:
            again()
        modes = {"landing": landing, "schedule": schedule, "seed": seed, **how}
        outcomes.append(run(*launched, **modes))
        if outcomes[-1].reports:
            reports = "\n".join(outcomes[-1].reports)
            pytest.fail(f"{name} with {modes}:\n{reports}", pytrace=False)
    return outcomes


def _runner(kernel: Any, name: Optional[str]) -> tuple[str, Callable[..., Outcome]]:
    """What it is called, and what runs it."""
    if isinstance(kernel, (str, Kernel)):
        loaded = Kernel(kernel, name) if isinstance(kernel, str) else kernel
        return loaded.name, loaded.run
    from fused_resnet.emulation import launches

    if isinstance(kernel, launches.Launch):
        return kernel.kernel.__name__, functools.partial(launches.run, kernel)
    raise TypeError(
        f"emulated: a {type(kernel).__name__} is no kernel; wanted: PTX, a Kernel, or a Launch of "
        "fused_resnet.emulation.launches with the compute capability times ten"
    )
