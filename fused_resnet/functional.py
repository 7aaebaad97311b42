"""The operators as functions: checked, differentiable, autocast-aware. `torch.nn.functional`, one kernel each."""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fused_resnet import backends, ops, reference
from fused_resnet.problem import ConvOperands, add_relu_problem, conv_problem

IntPair = Union[int, tuple[int, int]]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Optional[Tensor] = None,
    bn_bias: Optional[Tensor] = None,
    bn_mean: Optional[Tensor] = None,
    bn_var: Optional[Tensor] = None,
    *,
    eps: float = 1e-5,
    bias: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """act(BN(conv(x, weight) + bias) + residual) with BN's running statistics.

    Equals relu(batch_norm(conv2d(x, weight, bias, stride, padding, dilation, groups), bn_mean, bn_var, bn_weight,
    bn_bias, eps=eps) + residual).

    x: (N, C, H, W); weight: (K, C/groups, R, S); the vectors: (K,); residual: (N, K, P, Q). fp32, fp16, bf16 (fp64 in
    eager); vectors may be fp32 beside fp16 or bf16 activations. Any of the BN vectors may be None and drops out: no
    bn_weight scales by 1, no bn_var divides by nothing, the others are 0; all four None means no BN. Returns a new
    (N, K, P, Q) tensor in channels_last memory; channels_last inputs are read as they are, others converted.

    activation: "none", "relu", "relu6" or "silu". backend: "auto", "eager", "cudnn", "onednn", "triton", "cuda".
    A kernel makes one pass over memory, eager one per step, onednn a second one for what it does not fuse.
    Gradients reach x, weight, bn_weight, bn_bias, bias and residual; bn_mean and bn_var are constants. Under the
    transforms of torch.func and forward-mode AD the same is computed by ATen, whatever the backend, in ATen's layout.

    Raises ValueError for shapes and parameters, TypeError for dtypes and devices, BackendError when `backend` is
    unknown or cannot run this; nothing has been computed by then.
    """
    operands = ConvOperands(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual)
    window = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups, activation)
    if _is_transformed():
        return _composite_conv_bn_act(operands, window, backend)
    return _call(torch.ops.fused_resnet.conv_bn_act.default, *operands, *window, backend)


def add_relu(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """max(a + b, 0), one pass over memory except in eager.

    a, b: same shape and dtype; fp32, fp16, bf16, fp64; any strides. Returns a new tensor in a's layout. Equals
    torch.relu(a + b) to the last bit, except under autocast, which casts a and b here and leaves that sum alone.
    Gradient: grad where out > 0, to both inputs. Under torch.func and forward-mode AD as conv_bn_act.

    Raises ValueError if the shapes differ, TypeError if the dtypes or devices do, BackendError when `backend` is
    unknown or cannot run this.
    """
    if _is_transformed():
        return _composite_add_relu(a, b, backend)
    return _call(torch.ops.fused_resnet.add_relu.default, a, b, backend)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of the epilogue's activations alone, through ATen."""
    return {"none": lambda y: y, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}[activation](x)


def _call(op, *args) -> Tensor:
    # The autograd layer of a Python operator costs more than a small kernel: go below it when no gradient is wanted.
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active: for those the operators have no rules."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _composite_conv_bn_act(o: ConvOperands, window: tuple, backend: str) -> Tensor:
    """conv_bn_act by ATen, nothing in place: it can be differentiated and mapped in any mode. Checked as ever."""
    device = o.x.device.type
    if device in ops.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        o = ops.cast_operands(o, device)
    backends.select(conv_problem(o, *window), backend)
    mean, var = (None if vector is None else vector.detach() for vector in (o.bn_mean, o.bn_var))
    o = o._replace(bn_mean=mean, bn_var=var)
    *conv_window, activation = window
    y = F.conv2d(o.x, o.weight, None, *conv_window)
    if o.bias is not None or any(vector is not None for vector in o.bn_vectors.values()):
        scale, shift = reference.scale_and_shift(o, torch.promote_types(torch.float32, y.dtype))
        y = (y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(y.dtype)
    return activate(y if o.residual is None else y + o.residual, activation)


def _composite_add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    device = a.device.type
    if device in ops.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        a, b = ops.cast(a, device), ops.cast(b, device)
    backends.select(add_relu_problem(a, b), backend)
    return torch.relu(a + b)


def _pair(name: str, value: IntPair) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    pair = tuple(value)
    if len(pair) != 2:
        raise ValueError(f"conv_bn_act: {name} must be an int or a pair, got {value!r}.")
    return pair
