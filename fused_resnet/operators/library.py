"""The torch.library operators of namespace `fused_resnet`: schemas, shapes, gradients, transforms, autocast, flops.

Kernels are registered elsewhere: the public operators by `backends`, the C++ ones by the libraries of csrc/.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fused_resnet.operators import library_faults, reference, schemas
from fused_resnet.operators.problem import ConvOperands, add_relu_problem, conv_problem

LIBRARY = torch.library.Library("fused_resnet", "DEF")
_NUM_OPERANDS = len(ConvOperands._fields)
_CONV_ARGUMENTS = (*ConvOperands._fields, "stride", "padding", "dilation", "groups", "activation", "backend")

for _name, _schema in schemas.PUBLIC.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
for _kernels in schemas.KERNELS.values():
    for _name, _schema in _kernels.items():
        LIBRARY.define(_name + _schema)


@torch.library.register_fake("fused_resnet::conv_bn_act", lib=LIBRARY)
def _conv_bn_act_fake(*args, channels_last: bool = True) -> Tensor:
    operands, *window = split_arguments(args)
    return empty_output(conv_problem(operands, *window), operands.x, channels_last)


@torch.library.register_fake("fused_resnet::add_relu", lib=LIBRARY)
def _add_relu_fake(a: Tensor, b: Tensor, backend: str) -> Tensor:
    add_relu_problem(a, b)
    return torch.empty_like(a)


@torch.library.register_fake("fused_resnet::add_relu_backward", lib=LIBRARY)
def _add_relu_backward_fake(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return torch.empty_like(out)


def split_arguments(args) -> tuple:
    """conv_bn_act's arguments in a row as (ConvOperands, stride, padding, dilation, groups, activation)."""
    stride, padding, dilation, groups, activation, _ = args[_NUM_OPERANDS:]
    pairs = (tuple(stride), tuple(padding), tuple(dilation))
    return ConvOperands(*args[:_NUM_OPERANDS]), *pairs, groups, activation


def empty_output(problem, like: Tensor, channels_last: bool = True) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(problem.output_shape, dtype=problem.dtype, device=like.device, memory_format=memory_format)


# ------------------------------------------------------------------------------------------------------- gradients


def _conv_bn_act_setup(ctx, inputs, output) -> None:
    o, *ctx.window = split_arguments(inputs)
    ctx.eps, ctx.has_residual = o.eps, o.residual is not None
    # SiLU's gradient needs the value before it, so the residual is kept; ReLU's is in the output's sign; of the others
    # the output is not kept, since the caller may write to it as after torch's own
    activation = ctx.window[-1]
    kept: tuple = (None, None)
    if activation == "silu":
        kept = (o.residual, None)
    elif activation == "relu":
        kept = (None, output)
    elif activation == "relu6":
        kept = (None, (output <= 0) | (output >= 6))
    ctx.save_for_backward(o.x, o.weight, o.bn_weight, o.bn_bias, o.bn_mean, o.bn_var, o.bias, *kept)


def _conv_bn_act_backward(ctx, grad: Tensor):
    """Gradients with frozen statistics. With y = scale*(conv(x, w) + bias - mean) + bn_bias (+ residual):

    - dL/dx is the transposed convolution of g with w*scale.
    - One convolution_backward with w*scale gives dx and G, the gradient of w*scale.
    - dw = G*scale.
    - dscale = <G, w> per output channel plus (bias - mean)*sum(g), since conv is linear in w.

    So no second forward convolution is needed.
    """
    x, weight, bn_weight, bn_bias, bn_mean, bn_var, bias, residual, out = ctx.saved_tensors
    activation = ctx.window[-1]
    needs = dict(zip(_CONV_ARGUMENTS, ctx.needs_input_grad[1:]))  # the first is what computes
    if activation == "silu":
        operands = (x, weight, bn_weight, bn_bias, bn_mean, bn_var, ctx.eps, bias, residual)
        before = torch.ops.fused_resnet.conv_bn_act(*operands, *ctx.window[:-1], "none", "auto")
        g = _silu_backward(grad, before)
    elif activation == "relu":
        g = torch.ops.aten.threshold_backward(grad, out, 0)
    elif activation == "relu6":
        g = grad.masked_fill(out, 0)
    else:
        g = grad

    grads = dict.fromkeys(needs)
    if ctx.has_residual and needs["residual"]:
        grads["residual"] = g
    wide = torch.promote_types(torch.float32, x.dtype)
    inv_std = None if bn_var is None else torch.rsqrt(bn_var.to(wide) + ctx.eps)
    factors = [vector for vector in (bn_weight, inv_std) if vector is not None]
    scale = functools.reduce(torch.mul, [vector.to(wide) for vector in factors]) if factors else None

    def scaled(tensor: Tensor) -> Tensor:
        """A tensor with one slice per output channel, times scale."""
        if scale is None:
            return tensor
        return (tensor * scale.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)

    needs_scale = bn_weight is not None and needs["bn_weight"]
    problem = conv_problem(ConvOperands(x, weight), *ctx.window)
    grad_x, grad_folded = library_faults.convolution_backward(
        problem, g, x, scaled(weight), needs["x"], needs["weight"] or needs_scale
    )
    grads["x"] = grad_x
    if needs["weight"] and grad_folded is not None:
        grads["weight"] = scaled(grad_folded)
    if not (needs_scale or needs["bn_bias"] or needs["bias"]):
        return tuple(grads.values())
    grad_shift = g.sum((0, 2, 3), dtype=wide)
    if needs["bn_bias"] and bn_bias is not None:
        grads["bn_bias"] = grad_shift.to(bn_bias.dtype)
    if needs["bias"] and bias is not None:
        grads["bias"] = scaled(grad_shift).to(bias.dtype)
    if needs_scale and grad_folded is not None:
        grad_scale = (grad_folded.to(wide) * weight.to(wide)).sum((1, 2, 3))
        for vector, sign in ((bias, 1), (bn_mean, -1)):
            if vector is not None:
                grad_scale = grad_scale + sign * vector * grad_shift
        grads["bn_weight"] = (grad_scale if inv_std is None else grad_scale * inv_std).to(bn_weight.dtype)
    return tuple(grads.values())


def _silu_backward(grad: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, y)
    s = torch.sigmoid(y)  # create_graph: ATen's kernel has no derivative of its own
    return grad * s * (1 + y * (1 - s))


def _add_relu_setup(ctx, inputs, output) -> None:
    ctx.backend = inputs[2]
    ctx.save_for_backward(output)


def _add_relu_backward(ctx, grad: Tensor):
    (out,) = ctx.saved_tensors
    g = torch.ops.fused_resnet.add_relu_backward(grad, out, ctx.backend)
    return g, g, None


def _add_relu_backward_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _add_relu_double_backward(ctx, grad: Tensor):
    (out,) = ctx.saved_tensors
    return torch.ops.aten.threshold_backward(grad, out, 0), None, None


# ------------------------------------------------------------------------------------------------------ transforms


def is_transformed() -> bool:
    """Whether the operators must be ATen's composites: under transforms of torch.func, forward-mode AD, ONNX export."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return torch.onnx.is_in_onnx_export()
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def composite_conv_bn_act(*args) -> Tensor:
    """conv_bn_act by ATen, nothing in place: it can be differentiated and mapped in any mode. Checks shapes alone. The
    layout is ATen's, whatever was asked for."""
    o, *window = split_arguments(args)
    problem = conv_problem(o, *window)
    mean, var = (None if vector is None else vector.detach() for vector in (o.bn_mean, o.bn_var))
    o = o._replace(bn_mean=mean, bn_var=var)
    y = library_faults.convolution(problem, o.x, o.weight, is_differentiated=True)
    if o.bias is not None or any(vector is not None for vector in o.bn_vectors.values()):
        scale, shift = reference.scale_and_shift(o, torch.promote_types(torch.float32, y.dtype))
        y = (y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(y.dtype)
    return activate(y if o.residual is None else y + o.residual, problem.activation)


def composite_add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """add_relu by ATen, as composite_conv_bn_act."""
    add_relu_problem(a, b)
    return torch.relu(a + b)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of the epilogue's activations alone, through ATen."""
    return {"none": lambda y: y, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}[activation](x)


def _differentiable(name: str, setup: Callable, backward: Callable, composite: Callable) -> Any:
    """Make the operator differentiable, and give the autograd.Function that does it: apply(compute, *arguments).

    torch.library.register_autograd costs a small kernel's time, and loses the tangents of forward-mode AD.
    """
    op = getattr(torch.ops.fused_resnet, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, compute, *args):
            output = compute(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, grad):
            return None, *backward(ctx, grad)

    def kernel(keys, *args, **layout):
        if is_transformed():
            return composite(*args)

        def compute(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **layout)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Gradient.apply(compute, *args)
        return compute(*args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return Gradient


ConvBnAct = _differentiable("conv_bn_act", _conv_bn_act_setup, _conv_bn_act_backward, composite_conv_bn_act)
AddRelu = _differentiable("add_relu", _add_relu_setup, _add_relu_backward, composite_add_relu)
_differentiable(
    "add_relu_backward",
    _add_relu_backward_setup,
    _add_relu_double_backward,
    lambda grad, out, backend: torch.ops.aten.threshold_backward(grad, out, 0),
)


# -------------------------------------------------------------------------------------------------------- autocast


AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def cast(tensor, device: str):
    """What autocast on this kind of device makes of an operand."""
    wanted = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if wanted else tensor


def cast_operands(o: ConvOperands, device: str) -> ConvOperands:
    """x, weight and residual are cast; BN vectors and bias stay as they are, the epilogue is fp32."""
    return o._replace(x=cast(o.x, device), weight=cast(o.weight, device), residual=cast(o.residual, device))


def _register_autocast(device: str, key: str) -> None:
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def conv_bn_act(*args, **layout):
        operands = cast_operands(ConvOperands(*args[:_NUM_OPERANDS]), device)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return torch.ops.fused_resnet.conv_bn_act(*operands, *args[_NUM_OPERANDS:], **layout)

    def add_relu(a, b, backend):
        with torch._C._ExcludeDispatchKeyGuard(below):
            return torch.ops.fused_resnet.add_relu(cast(a, device), cast(b, device), backend)

    LIBRARY.impl("conv_bn_act", conv_bn_act, key)
    LIBRARY.impl("add_relu", add_relu, key)


for _device, _key in AUTOCAST_DEVICES.items():
    _register_autocast(_device, _key)


# ----------------------------------------------------------------------------------------------------------- flops


@register_flop_formula(torch.ops.fused_resnet.conv_bn_act)
def _conv_bn_act_flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * outputs * reduction, as torch counts a convolution; the epilogue is not counted."""
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


@register_flop_formula([torch.ops.fused_resnet.add_relu, torch.ops.fused_resnet.add_relu_backward])
def _add_relu_flops(*args, **kwargs) -> int:
    return 0
