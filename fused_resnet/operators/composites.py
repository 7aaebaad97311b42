"""The operators as compositions of ATen's, which can be differentiated and mapped in any mode."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fused_resnet.operators import affine, detours, mask
from fused_resnet.operators.describe import add_relu_problem, bn_act_problem, chain_problem, conv_problem
from fused_resnet.operators.operands import BnActOperands, ChainOperands, ConvOperands, split_arguments
from fused_resnet.operators.problem import ConvProblem


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


def bn_act(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bn_act by ATen, as conv_bn_act: y, the batch's mean and biased variance, and the mask."""
    o, activation = BnActOperands(*args[:7]), args[7]
    problem = bn_act_problem(o, activation)
    y = activate(normalised(o) if o.residual is None else normalised(o) + o.residual, activation)
    x = o.x.detach().to(torch.promote_types(torch.float32, o.x.dtype))
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0) if problem.is_training else (x.new_empty(0), x.new_empty(0))
    return y, mean, var, mask.packed(problem, y.detach())


def bottleneck_chain(*args) -> tuple[Tensor, Tensor]:
    """bottleneck_chain by ATen, as conv_bn_act: its convolutions one behind the other."""
    o, activation = ChainOperands(*args[:8]), args[8]
    convolutions = chain_problem(o, activation).convolutions

    def computed(problem: ConvProblem, operands: ConvOperands) -> Tensor:
        window = (problem.stride, problem.padding, problem.dilation, problem.groups, activation)
        return conv_bn_act(*operands, *window, args[9])

    y = computed(convolutions[1], o.of_expansion(computed(convolutions[0], o.of_filter())))
    return y, computed(convolutions[2], o.of_reduction(y)) if len(convolutions) > 2 else y.new_empty(0)


def normalised(o: BnActOperands, statistics: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
    """batch_norm of bn_act's operands by ATen. statistics: zeros, to which those of the batch are written, unbiased."""
    wide = torch.promote_types(torch.float32, o.x.dtype)
    weight, bias = (None if vector is None else vector.to(wide) for vector in (o.weight, o.bias))
    if o.mean is not None and o.var is not None:
        given = (o.mean.detach().to(wide), o.var.detach().to(wide))
        y = F.batch_norm(o.x, *given, weight, bias, False, 0.0, o.eps)
    else:
        if weight is None:  # by which ATen knows that statistics of half precision are fp32
            weight = torch.ones(o.x.shape[1], dtype=wide, device=o.x.device)
        mean, var = statistics or (None, None)
        y = F.batch_norm(o.x, mean, var, weight, bias, True, 1.0, o.eps)
    return y.to(o.x.dtype)  # which it has but in a transform


def bn_act_backward(
    grad: Tensor, o: BnActOperands, bits: Tensor, activation: str, needs: dict[str, bool]
) -> dict[str, Optional[Tensor]]:
    """The gradients of bn_act by name, of which each can be differentiated again. bits: the mask of the forward.

    o.residual is needed for SiLU alone.
    """
    y = normalised(o)
    g = behind_activation(grad, y if o.residual is None else y + o.residual, bits, activation)
    names = [name for name in ("x", "weight", "bias") if needs[name]]
    inputs = [getattr(o, name) for name in names]
    found = torch.autograd.grad(y, inputs, g, create_graph=True) if inputs else ()
    return {**dict(zip(names, found)), **({"residual": g} if needs["residual"] else {})}


def behind_activation(grad: Tensor, before: Tensor, bits: Tensor, activation: str) -> Tensor:
    """The gradient of act(before), from that of its result. bits: bn_act's mask, of activations that have one."""
    if activation == "silu":
        return silu_backward(grad, before)
    if activation == "none":
        return grad
    return grad.masked_fill(~mask.unpacked(bits, before), 0)


def silu_backward(grad: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, y)
    s = torch.sigmoid(y)  # create_graph: ATen's kernel has no derivative of its own
    return grad * s * (1 + y * (1 - s))


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
