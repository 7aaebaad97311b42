"""The passes that find max-poolings, which plans compute without indices."""

from __future__ import annotations

from typing import Optional, Sequence, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet.freezing.draft import Decision, Draft
from fused_resnet.freezing.dtypes import facts_of
from fused_resnet.freezing.modules import FrozenMaxPool
from fused_resnet.kernels import compiled
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.operators.describe import pair
from fused_resnet.operators.problem import FLOAT_DTYPES, MaxPoolProblem

_BY_TRITON = ("cuda",)  # devices; tests add the one that Triton interprets on


def pool_after_convolutions(draft: Draft) -> None:
    """On a GPU, pool what a convolution computes for nothing else by the kernel that takes its bias and activation.

    They move where its backend would make passes over memory of them, as for a stem, which cuDNN does not fuse. Where
    its kernel has them for nothing they stay. The values are the same to the last bit (`kernels.triton.max_pool`), save
    that ATen's depthwise convolutions add a bias before they round. This comes after the choice: what is chosen and
    measured is the convolution with both.

    For ResNet-50's stem in fp16 at batch 256 the passes move 2.6 GB, this 0.5 GB.
    """
    if draft.device.type not in _BY_TRITON:
        return
    from fused_resnet.kernels.triton import max_pool  # Triton itself

    for node in draft.graph.nodes:
        problem = _problem_of(draft, node)
        source = cast(fx.Node, node.args[0]) if problem is not None else node
        if problem is None or source not in draft.convs or len(source.users) != 1:
            continue
        conv, bias = draft.convs[source], None
        left = conv.problem._replace(has_bias=False, activation="none")
        takes_over = _makes_passes(conv, max_pool.ACTIVATIONS) and conv.selection.backend.why_not(left) is None
        if takes_over:
            bias = conv.bias
            problem = problem._replace(activation=conv.problem.activation, has_bias=bias is not None)
        if max_pool.why_not(problem) is not None:
            continue
        node.target = draft.add(f"frozen_{node.name}", FrozenMaxPool(problem, bias, max_pool.launch))
        if takes_over:
            draft.decide(source, problem=left, bias=None)


def replace_max_pools(draft: Draft) -> None:
    """On a CPU, by the one that writes no indices."""
    if draft.device.type != "cpu" or compiled.load("cpu") is not None:
        return
    for node in draft.graph.nodes:
        problem = _problem_of(draft, node)
        if problem is not None:
            node.target = draft.add(f"frozen_{node.name}", FrozenMaxPool(problem, None, _by_cpu))


def _by_cpu(problem: MaxPoolProblem, x: Tensor, bias: Optional[Tensor], out: Tensor) -> None:
    p = problem
    torch.ops.fused_resnet.cpu_max_pool2d.default(x, (p.R, p.S), p.stride, p.padding, out)


def _makes_passes(conv: Decision, activations: Sequence[str]) -> bool:
    """Whether its backend makes passes of its bias and activation, and they may come after a pooling.

    An infinite bias may not: of -infinity and it the sum is NaN, which a larger neighbour would hide.
    """
    is_monotone = conv.problem.activation in activations and not conv.problem.has_residual
    is_apart = conv.selection.backend.origin == "torch"
    return is_apart and is_monotone and (conv.bias is None or bool(conv.bias.isfinite().all()))


def _problem_of(draft: Draft, node: fx.Node) -> Optional[MaxPoolProblem]:
    """What a node pools, if it calls torch's own max-pooling of images without dilation, ceil mode or indices."""
    pool, facts = draft.called_by(node), facts_of(node)
    if type(pool) is not nn.MaxPool2d or not has_stock_call(pool) or node.kwargs or facts is None:
        return None
    is_plain = pair("pooling", pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices
    source = facts_of(node.args[0])
    if not is_plain or source is None or len(facts.shape) != 4 or facts.dtype not in FLOAT_DTYPES:
        return None
    window, stride, padding = (pair("pooling", value) for value in (pool.kernel_size, pool.stride, pool.padding))
    N, C, H, W = source.shape
    return MaxPoolProblem(N, C, H, W, *window, stride, padding, "none", False, facts.dtype, draft.device.type)
