"""A convolution behind bn_act that keeps no input: for its weight's gradient the input is computed again.

Between two convolutions lie x, what the first one gave, and y = act(bn(x) + residual). PyTorch keeps both maps. The
node of bn_act in autograd's graph keeps x and the statistics, and y follows from them to the last bit. So the second
convolution keeps nothing but its weight. In the backward it asks the node of bn_act, which runs later, for y.

A residual is computed again in the same way, so a stage of blocks keeps a map per convolution. There each y follows
from the one before. Those that other convolutions wait for are held until these have run, so that nothing is computed
more than twice.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch
from torch import Tensor, nn

from fused_resnet import choosing
from fused_resnet.backends.bn_act import BnAct
from fused_resnet.operators import composites, detours, gradients
from fused_resnet.operators.describe import bn_act_problem, conv_problem
from fused_resnet.operators.library import autocast_dtype
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.training import pointwise

_is_wanted = False


class recompute_inputs:
    """Whether convolutions behind `bn_act` compute their input again in the backward instead of keeping it.

    It holds from the call on, for forwards in all threads, and as a context until its end. Off at first: what is
    computed again takes time. On, a step of ResNet-50 keeps less than two thirds of eager's bytes. Gradients are the
    same to the last bit. Graphs of torch.compile and checkpoints keep what they keep in any case.
    Raises TypeError for what is no bool.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _is_wanted
        if not isinstance(enabled, bool):
            raise TypeError(f"recompute_inputs: expected True or False, got {enabled!r}.")
        self._before, _is_wanted = _is_wanted, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        global _is_wanted
        _is_wanted = self._before


def convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), of a convolution whose call may be bypassed. Where bn_act gave x and `recompute_inputs` is on, x is not
    kept for the backward.

    Some convolutions are matrix products (`pointwise`). conv(x) is called for anything else, with a bias, in
    transforms, traces and graphs of a compiler. Checkpoints keep x.
    """
    if not isinstance(x, Tensor) or conv.bias is not None or not conv.weight.requires_grad or not _is_plain_call(x):
        return conv(x)
    node, weight = _repeatable(x), conv.weight
    if (cast_to := autocast_dtype(x)) is not None:
        weight = weight.to(cast_to)
    is_product = pointwise.pays(conv, x, weight)
    if node is None:
        return pointwise.convolution(x, weight) if is_product else conv(x)
    stride, padding, dilation = cast(tuple[Any, ...], (conv.stride, conv.padding, conv.dilation))
    try:
        problem = conv_problem(ConvOperands(x, weight), stride, padding, dilation, conv.groups, "none")
    except (TypeError, ValueError):
        return conv(x)  # which takes it, or raises torch's own error
    return _Convolution.apply(problem, node, is_product, x, weight)


def keeps_no_input(conv: nn.Conv2d, x: Any) -> bool:
    """Whether `convolution` computes x again in the backward."""
    return isinstance(x, Tensor) and conv.bias is None and conv.weight.requires_grad and _repeatable(x) is not None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, node, is_product, x, weight):
        ctx.problem, ctx.node, ctx.is_product = problem, node, is_product
        ctx.save_for_backward(weight)
        node.awaited += 1
        if is_product:
            return pointwise.convolution(x, weight)
        return detours.convolution(problem, x, weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        node = ctx.node
        node.awaited -= 1
        x = _output_again(node)
        if node.awaited <= 0:
            node.again = None
        needs = ctx.needs_input_grad[3:]
        if ctx.is_product:
            return None, None, None, *pointwise.backward(grad, x, weight, *needs)
        return None, None, None, *detours.convolution_backward(ctx.problem, grad, x, weight, *needs)


def _repeatable(x: Tensor) -> Optional[Any]:
    """The node of the bn_act that gave x, if x is to be computed again from what it keeps, and can be."""
    if not _is_wanted or not _is_plain_call(x) or gradients.is_checkpointed():
        return None
    return gradients.repeatable(x)


def _is_plain_call(x: Tensor) -> bool:
    """Whether this is a call for autograd alone."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not torch.is_grad_enabled():
        return False
    return not composites.is_transformed() and torch._C._get_tracing_state() is None


def _output_again(node: Any) -> Tensor:
    """What bn_act gave, from what its node keeps: differentiable where the graph of the gradients is wanted."""
    if node.again is not None and not torch.is_grad_enabled():
        return node.again
    o, _ = gradients.kept_of_bn_act(node)
    if torch.is_grad_enabled() and hasattr(node, "joined"):
        raise RuntimeError("SyncBatchNorm of several processes can be differentiated once, not with create_graph=True.")
    if node.residual_node is not None:
        o = o._replace(residual=_output_again(node.residual_node))
    if torch.is_grad_enabled():  # create_graph
        live = o._replace(mean=None, var=None) if node.is_training else o
        return composites.bn_act(*live, node.activation, node.backend)[0]
    problem = bn_act_problem(o, node.activation)._replace(is_training=node.is_training)
    y = cast(BnAct, choosing.select(problem, node.backend).backend.run).again(problem, o)
    if node.awaited > 0:
        node.again = y
    return y
