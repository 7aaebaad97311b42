"""The backends: each operator's implementations, one record per way to compute it.

Adding a backend is one `register` call; `choice` chooses among them.
"""

from fused_resnet.backends.add_relu import ADD_RELU
from fused_resnet.backends.choice import Selection, fixed_order, select
from fused_resnet.backends.cublaslt import CUBLASLT
from fused_resnet.backends.cuda import CUDA
from fused_resnet.backends.cudnn import CUDNN
from fused_resnet.backends.eager import EAGER, EagerConfig
from fused_resnet.backends.grouped import GROUPED
from fused_resnet.backends.onednn import ONEDNN, onednn_missing
from fused_resnet.backends.record import (
    Backend,
    BackendError,
    Configs,
    InPlan,
    Problem,
    Rounding,
    check_name,
    known,
    register,
    why_never_live,
)
from fused_resnet.backends.triton import TRITON
from fused_resnet.backends.winograd import WINOGRAD
from fused_resnet.operators.layout import channels_last

__all__ = [
    "Backend", "BackendError", "Configs", "EagerConfig", "InPlan", "Problem", "Rounding", "Selection", "channels_last",
    "check_name", "fixed_order", "known", "onednn_missing", "register", "select", "why_never_live",
]  # fmt: skip

# In the order in which auto tries them. On CUDA no kernel of ours is there yet: none has been verified on a GPU.
for _backend in (WINOGRAD, GROUPED, ONEDNN, CUDNN, CUDA, CUBLASLT, TRITON, EAGER):
    register("conv_bn_act", _backend)
for _backend in ADD_RELU:
    register("add_relu", _backend)
