"""The backends: each operator's implementations, one record per way to compute it.

A convolution's backends have a file each, of which `BACKEND` is the record, and a line below. `add_relu`,
`bn_act` and `bottleneck_chain` have all of theirs.
"""

import importlib

from fused_resnet.backends import cuda, int8_regions, onednn_int8, triton
from fused_resnet.backends.add_relu import ADD_RELU
from fused_resnet.backends.bn_act import BN_ACT
from fused_resnet.backends.bottleneck_chain import BOTTLENECK_CHAIN
from fused_resnet.backends.eager import EagerConfig
from fused_resnet.backends.onednn import onednn_missing
from fused_resnet.backends.record import (
    NEEDS_FOLDED_BN,
    Auto,
    Backend,
    BackendError,
    Configs,
    InPlan,
    Rounding,
    check_name,
    known,
    left_out,
    register,
    why_never_live,
)
from fused_resnet.operators.layout import channels_last

__all__ = [
    "NEEDS_FOLDED_BN", "Auto", "Backend", "BackendError", "Configs", "EagerConfig", "InPlan", "Rounding",
    "channels_last", "check_name", "known", "left_out", "onednn_missing", "register", "why_never_live",
]  # fmt: skip

# In the order in which auto tries them. On CUDA the only kernel of ours is cudnn_pass's, which checks itself.
for _name in (
    "winograd",
    "grouped",
    "onednn",
    "direct",
    "blocked",
    "cudnn",
    "cuda",
    "cublaslt",
    "triton",
    "cudnn_pass",
    "cpu_pass",
    "eager",
):
    register("conv_bn_act", importlib.import_module(f"fused_resnet.backends.{_name}").BACKEND)
for _backend in ADD_RELU:
    register("add_relu", _backend)
for _backend in BN_ACT:
    register("bn_act", _backend)
for _backend in BOTTLENECK_CHAIN:
    register("bottleneck_chain", _backend)
for _backend in (cuda.INT8, triton.QUANTIZED, *int8_regions.BACKENDS, onednn_int8.BACKEND):
    register("conv_int8", _backend)
register("conv_float8", triton.QUANTIZED)
