"""The gradients of the operators: of conv_bn_act with frozen statistics, of bn_act with the batch's too."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from fused_resnet.operators import composites, detours
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import BnActOperands, ConvOperands, split_arguments

_CONV_ARGUMENTS = (*ConvOperands._fields, "stride", "padding", "dilation", "groups", "activation", "backend")


def keep_for_conv_bn_act(ctx, inputs, output) -> None:
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


def conv_bn_act_backward(ctx, grad: Tensor):
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
        g = composites.silu_backward(grad, before)
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
    grad_x, grad_folded = detours.convolution_backward(
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


def keep_for_add_relu(ctx, inputs, output) -> None:
    ctx.backend = inputs[2]
    ctx.save_for_backward(output)


def add_relu_backward(ctx, grad: Tensor):
    (out,) = ctx.saved_tensors
    g = torch.ops.fused_resnet.add_relu_backward(grad, out, ctx.backend)
    return g, g, None


def keep_for_add_relu_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def add_relu_double_backward(ctx, grad: Tensor):
    (out,) = ctx.saved_tensors
    return torch.ops.aten.threshold_backward(grad, out, 0), None, None


_BN_ACT_ARGUMENTS = (*BnActOperands._fields, "activation", "backend")


def keep_for_bn_act(ctx, inputs, output) -> None:
    """What the backward needs, and what the output can be computed again from (`training.recomputing`)."""
    o, (ctx.activation, ctx.backend) = BnActOperands(*inputs[:7]), inputs[7:]
    y, batch_mean, batch_var, bits = output
    ctx.mark_non_differentiable(batch_mean, batch_var, bits)
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.is_training = o.eps, o.mean is None
    statistics = (batch_mean, batch_var) if ctx.is_training else (o.mean, o.var)
    residual = o.residual if ctx.activation == "silu" else None  # whose gradient needs the value before it
    ctx.save_for_backward(o.x, *statistics, o.weight, o.bias, residual, bits)
    # awaited: for how many gradients the output will be computed again; again: it, as long as others wait for it
    ctx.version, ctx.awaited, ctx.again, ctx.residual_node = y._version, 0, None, None
    if o.residual is not None and residual is None:
        ctx.residual_node = repeatable(o.residual)
    ctx.is_repeatable = not is_checkpointed() and (o.residual is residual or ctx.residual_node is not None)


def repeatable(y: Tensor) -> Any:
    """The node of the bn_act that gave y, where what it keeps is enough to compute y again; else None."""
    node: Any = y.grad_fn
    return node if getattr(node, "is_repeatable", False) and y._version == node.version else None  # not written to


def is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint takes what is saved for the backward, and will give it out once."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def kept_of_bn_act(ctx) -> tuple[BnActOperands, Tensor]:
    """The operands and the mask. mean and var are those that were used, the residual is there with SiLU alone."""
    *tensors, bits = ctx.saved_tensors
    return BnActOperands(*tensors)._replace(eps=ctx.eps), bits


def bn_act_backward(ctx, grad: Optional[Tensor], *of_statistics):
    o, bits = kept_of_bn_act(ctx)
    needs = dict(zip(_BN_ACT_ARGUMENTS, ctx.needs_input_grad[1:]))  # the first is what computes
    grads: dict[str, Optional[Tensor]] = dict.fromkeys(_BN_ACT_ARGUMENTS)
    if grad is None:
        return tuple(grads.values())
    if torch.is_grad_enabled():  # create_graph
        live = o._replace(mean=None, var=None) if ctx.is_training else o
        return tuple({**grads, **composites.bn_act_backward(grad, live, bits, ctx.activation, needs)}.values())
    is_passed_on = ctx.activation == "none"  # the residual's gradient is the output's
    found = torch.ops.fused_resnet.bn_act_backward.default(
        grad, o.x, o.mean, o.var, o.weight, o.bias, o.residual, bits, o.eps, ctx.is_training, ctx.activation,
        needs["x"], needs["residual"] and not is_passed_on, ctx.backend,
    )  # fmt: skip
    for name, gradient in zip(("x", "weight", "bias", "residual"), found):
        if needs[name]:
            grads[name] = grad if name == "residual" and is_passed_on else gradient
    return tuple(grads.values())
