"""Our kernels in Triton, for NVIDIA GPUs; in its interpreter on any device."""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from fused_resnet.backends.record import Backend, Configs, InPlan
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import is_interpreted
from fused_resnet.kernels.triton.conv import configs, cost
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.operators import layout
from fused_resnet.operators.layout import all_channels_last
from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import ConvProblem


def why_not(problem: ConvProblem) -> Optional[str]:
    from fused_resnet.kernels.triton.conv import launch  # Triton itself

    return launch.why_not(problem)


def run(
    problem: ConvProblem, operands: Union[ConvOperands, Int8Operands], config: Optional[TritonConfig] = None
) -> Tensor:
    from fused_resnet.kernels.triton.conv import launch

    out = layout.empty_output(problem, operands.x)
    launch.launch(problem, all_channels_last(operands), out, config)
    return out


def worth(problem: ConvProblem) -> Sequence[TritonConfig]:
    return () if is_interpreted() else cost.promising(problem, *target())


def legal(problem: ConvProblem) -> Sequence[TritonConfig]:
    """Also those not worth measuring: what is tuned for one batch is used for others."""
    arch, num_sms = target()
    considered = (config for config, _ in configs.search_space(problem, arch, num_sms))
    return [config for config in considered if configs.why_illegal(problem, config, arch) is None]


def launch_us(config: Optional[TritonConfig]) -> float:
    """Triton encodes every tensor descriptor anew at each launch: 38 us reported for an H100 (Triton PR 7987). A plan's
    launches are replayed from a CUDA graph."""
    return 0.0 if config is None or config.form == "pointer" else 38.0


def target() -> tuple[int, int]:
    """(compute capability times ten, multiprocessors) of the current GPU; those of an H200 without one."""
    from fused_resnet.kernels.triton import runtime

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return runtime.arch(device), runtime.num_sms(device)


BACKEND = Backend(
    "triton",
    why_not,
    run,
    origin="interpreted" if is_interpreted() else "ours",
    sources=sources.TRITON,
    plan=InPlan(placed=True),
    configs=Configs(
        worth,
        legal,
        default=configs.default_config,
        launch_us=launch_us,
        reads_row_space=lambda config: config is not None and config.form == "rows_tma",
    ),
)


def _replayed(problem: ConvProblem) -> TritonConfig:
    """A plan's launches are replayed, so that TMA costs nothing. But x lies in NHWC."""
    return cost.likely_config(problem, *target(), lambda config: config.form != "rows_tma")


QUANTIZED = Backend("triton", why_not, run, takes_bn=False, origin=BACKEND.origin, sources=BACKEND.sources,
                    plan=InPlan(config=_replayed), configs=BACKEND.configs)  # fmt: skip
