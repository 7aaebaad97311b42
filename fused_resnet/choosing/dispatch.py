"""The operators' implementation on every device: check, select, run."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from fused_resnet.backends import bn_act as bn_act_backends
from fused_resnet.backends.add_relu import AddRelu
from fused_resnet.choosing.choice import select
from fused_resnet.operators import layout, library
from fused_resnet.operators.describe import add_relu_problem, bn_act_problem, chain_problem, conv_problem
from fused_resnet.operators.operands import BnActOperands, ChainOperands, ConvOperands, split_arguments


def conv_bn_act(operands: ConvOperands, window: tuple, backend: str, channels_last: bool = True) -> Tensor:
    """conv_bn_act as a function. window: from stride to activation."""
    problem = conv_problem(operands, *window)
    if problem.device == "cuda" and backend == "auto":
        from fused_resnet.choosing.decide import decide_at_call  # all that measuring needs

        decide_at_call(problem, operands.x.device)
    chosen = select(problem, backend)
    if problem.N == 0:
        return layout.empty_output(problem, operands.x, channels_last)
    if channels_last:
        return chosen.run(problem, operands)
    if chosen.backend.after_aten:
        return chosen.backend.run(problem, operands, in_nchw=True)
    return layout.nchw(chosen.run(problem, operands))


def conv_bn_act_in_a_row(*args, channels_last: bool = True) -> Tensor:
    """conv_bn_act as the dispatcher and autograd call it: every argument by itself."""
    operands, *window = split_arguments(args)
    return conv_bn_act(operands, tuple(window), args[-1], channels_last)


def add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    problem = add_relu_problem(a, b)
    return select(problem, backend).run(problem, a, b)


def _add_relu_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    problem = add_relu_problem(out, grad)
    return cast(AddRelu, select(problem, backend).backend.run).backward(grad, out)


def bn_act(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bn_act as the dispatcher and autograd call it: y, the batch's mean and variance, the mask."""
    operands, activation, backend = BnActOperands(*args[:7]), *args[7:]
    problem = bn_act_problem(operands, activation)
    return cast(bn_act_backends.BnAct, select(problem, backend).backend.run)(problem, operands)


def _bn_act_backward(
    grad, x, mean, var, weight, bias, residual, bits, eps, is_training, activation, needs_x, needs_residual, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = BnActOperands(x, mean, var, weight, bias, residual, eps)
    problem = bn_act_problem(operands, activation)._replace(is_training=is_training)
    run = cast(bn_act_backends.BnAct, select(problem, backend).backend.run)
    return run.backward(problem, grad, operands, bits, needs_x, needs_residual)


def _bottleneck_chain(*args) -> tuple[Tensor, Tensor]:
    operands, activation, backend = ChainOperands(*args[:8]), *args[8:]
    problem = chain_problem(operands, activation)
    chosen = select(problem, backend)
    return chosen.backend.run(problem, operands) if problem.N else layout.empty_chain(problem, operands.x)


library.LIBRARY.impl("bottleneck_chain", _bottleneck_chain, "CompositeExplicitAutograd")
library.LIBRARY.impl("bn_act", bn_act, "CompositeExplicitAutograd")
library.LIBRARY.impl("bn_act_backward", _bn_act_backward, "CompositeExplicitAutograd")
library.LIBRARY.impl("conv_bn_act", conv_bn_act_in_a_row, "CompositeExplicitAutograd")
library.LIBRARY.impl("add_relu", add_relu, "CompositeExplicitAutograd")
library.LIBRARY.impl("add_relu_backward", _add_relu_backward, "CompositeExplicitAutograd")
