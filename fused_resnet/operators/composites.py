"""The operators as compositions of ATen's, which can be differentiated and mapped in any mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fused_resnet.operators import affine, detours
from fused_resnet.operators.describe import add_relu_problem, conv_problem
from fused_resnet.operators.operands import split_arguments


def is_transformed() -> bool:
    """Whether the operators must be ATen's composites: under transforms of torch.func, forward-mode AD, ONNX export."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return torch.onnx.is_in_onnx_export()
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def conv_bn_act(*args) -> Tensor:
    """conv_bn_act by ATen, nothing in place: it can be differentiated and mapped in any mode. Checks shapes alone. The
    layout is ATen's, whatever was asked for."""
    o, *window = split_arguments(args)
    problem = conv_problem(o, *window)
    mean, var = (None if vector is None else vector.detach() for vector in (o.bn_mean, o.bn_var))
    o = o._replace(bn_mean=mean, bn_var=var)
    y = detours.convolution(problem, o.x, o.weight, is_differentiated=True)
    if o.bias is not None or any(vector is not None for vector in o.bn_vectors.values()):
        scale, shift = affine.scale_and_shift(o, torch.promote_types(torch.float32, y.dtype))
        y = (y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(y.dtype)
    return activate(y if o.residual is None else y + o.residual, problem.activation)


def add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """add_relu by ATen, as conv_bn_act."""
    add_relu_problem(a, b)
    return torch.relu(a + b)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of the epilogue's activations alone, through ATen."""
    return {"none": lambda y: y, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}[activation](x)


def activate_(y: Tensor, activation: str) -> Tensor:
    """One of the epilogue's activations alone, in place, through ATen."""
    if activation == "relu":
        return torch.relu_(y)
    if activation == "relu6":
        return F.hardtanh_(y, 0.0, 6.0)
    return F.silu(y, inplace=True) if activation == "silu" else y
