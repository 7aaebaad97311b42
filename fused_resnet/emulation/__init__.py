"""Runs PTX on a CPU, adversarially: Kernel, TensorMap, and what a run reports.

PTX is the compiler's text before ptxas makes machine code of it. Triton and nvcc both write it.

    from fused_resnet.emulation import Kernel
    outcome = Kernel(text).run(grid, block, [x, y, n], writable=[y])
    assert not outcome.reports

docs/emulation.md says what that proves.
"""

from fused_resnet.emulation.interface import Counts
from fused_resnet.emulation.kernel import Kernel, Launch, Outcome, run_together
from fused_resnet.emulation.library import why_missing
from fused_resnet.emulation.parser import kernel_names
from fused_resnet.emulation.syntax import PtxError
from fused_resnet.emulation.tensor_map import TensorMap

__all__ = [
    "Counts",
    "Kernel",
    "Launch",
    "Outcome",
    "PtxError",
    "TensorMap",
    "kernel_names",
    "run_together",
    "why_missing",
]
