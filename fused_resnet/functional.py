"""The operators as functions: checked, differentiable, autocast-aware. `torch.nn.functional`, one kernel each."""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import backends  # noqa: F401  (registers the implementations)

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
    """act(BN(conv(x, weight) + bias) + residual) with BN's running statistics, one pass over memory.

    Equals relu(batch_norm(conv2d(x, weight, bias, stride, padding, dilation, groups), bn_mean, bn_var, bn_weight,
    bn_bias, eps=eps) + residual).

    x: (N, C, H, W); weight: (K, C/groups, R, S); the vectors: (K,); residual: (N, K, P, Q). fp32, fp16, bf16 (fp64 in
    eager); vectors may be fp32 beside fp16 or bf16 activations. Any of the BN vectors may be None and drops out: no
    bn_weight scales by 1, no bn_var divides by nothing, the others are 0; all four None means no BN. Returns a new
    (N, K, P, Q) tensor in channels_last memory; channels_last inputs are read as they are, others converted.

    activation: "none", "relu", "relu6" or "silu". backend: "auto", "eager", "cudnn", "onednn", "triton", "cuda".
    Gradients reach x, weight, bn_weight, bn_bias, bias and residual; bn_mean and bn_var are constants.

    Raises ValueError for shapes and parameters, TypeError for dtypes and devices, BackendError when `backend` is
    unknown or cannot run this; nothing has been computed by then.
    """
    args = (
        x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual,
        _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups, activation, backend,
    )  # fmt: skip
    return _call(torch.ops.fused_resnet.conv_bn_act.default, *args)


def add_relu(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """max(a + b, 0), one pass over memory.

    a, b: same shape and dtype; fp32, fp16, bf16, fp64; any strides. Returns a new tensor in a's layout. Equals
    torch.relu(a + b) to the last bit. Gradient: grad where out > 0, to both inputs.

    Raises ValueError if the shapes differ, TypeError if the dtypes or devices do, BackendError when `backend` is
    unknown or cannot run this.
    """
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


def _pair(name: str, value: IntPair) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    pair = tuple(value)
    if len(pair) != 2:
        raise ValueError(f"conv_bn_act: {name} must be an int or a pair, got {value!r}.")
    return pair
