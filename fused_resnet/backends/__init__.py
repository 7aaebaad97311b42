"""The backends: each operator's implementations, one record per way to compute it.

Adding a backend is one `register` call; `registry` chooses among them.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from fused_resnet.backends.add_relu import ADD_RELU
from fused_resnet.backends.eager import EAGER, EagerConfig
from fused_resnet.backends.grouped import GROUPED
from fused_resnet.backends.nvidia import CUBLASLT, CUDA, CUDNN, TRITON
from fused_resnet.backends.onednn import ONEDNN, onednn_missing
from fused_resnet.backends.record import (
    Backend,
    BackendError,
    Backward,
    Problem,
    Selection,
    check_name,
    fixed_order,
    known,
    register,
    select,
    why_never_live,
)
from fused_resnet.backends.winograd import WINOGRAD
from fused_resnet.operators import layout, library
from fused_resnet.operators.composites import activate_
from fused_resnet.operators.describe import add_relu_problem, conv_problem
from fused_resnet.operators.layout import channels_last, nchw
from fused_resnet.operators.operands import ConvOperands, split_arguments

__all__ = [
    "Backend", "BackendError", "EagerConfig", "Problem", "Selection", "activate_", "channels_last", "check_name",
    "fixed_order", "known", "onednn_missing", "register", "select", "why_never_live",
]  # fmt: skip

# In the order in which auto tries them. On CUDA no kernel of ours is there yet: none has been verified on a GPU.
for _backend in (WINOGRAD, GROUPED, ONEDNN, CUDNN, CUDA, CUBLASLT, TRITON, EAGER):
    register("conv_bn_act", _backend)
for _backend in ADD_RELU:
    register("add_relu", _backend)


def conv_bn_act(operands: ConvOperands, window: tuple, backend: str, channels_last: bool = True) -> Tensor:
    """The operator's implementation on every device: check, select, run. window: from stride to activation."""
    problem = conv_problem(operands, *window)
    chosen = select(problem, backend)
    if problem.N == 0:
        return layout.empty_output(problem, operands.x, channels_last)
    if channels_last:
        return chosen.run(problem, operands)
    run_nchw = chosen.backend.run_nchw
    return nchw(chosen.run(problem, operands)) if run_nchw is None else run_nchw(problem, operands)


def conv_bn_act_in_a_row(*args, channels_last: bool = True) -> Tensor:
    """conv_bn_act as the dispatcher and autograd call it: every argument by itself."""
    operands, *window = split_arguments(args)
    return conv_bn_act(operands, tuple(window), args[-1], channels_last)


def add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    problem = add_relu_problem(a, b)
    return select(problem, backend).run(problem, a, b)


def _add_relu_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    problem = add_relu_problem(out, grad)
    return cast(Backward, select(problem, backend).backend.backward)(grad, out)


library.LIBRARY.impl("conv_bn_act", conv_bn_act_in_a_row, "CompositeExplicitAutograd")
library.LIBRARY.impl("add_relu", add_relu, "CompositeExplicitAutograd")
library.LIBRARY.impl("add_relu_backward", _add_relu_backward, "CompositeExplicitAutograd")
