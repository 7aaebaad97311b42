"""The pass that moves biases to where they are added with something else."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from fused_resnet import backends, choosing
from fused_resnet.freezing.draft import Decision, Draft

# In fp16 a sum with a larger one might overflow where the two sums that it replaces do not.
_SMALL = torch.finfo(torch.float16).max / 64


def move_biases(draft: Draft) -> None:
    """Give the bias of a convolution whose result is only added by another one to that one.

    relu(conv(x) + b + (shortcut(x) + c)) is relu(conv(x) + (b + c) + shortcut(x)). ATen on CUDA adds a bias in a pass
    of its own, and cuDNN's fused calls take no convolution without ReLU. Where a kernel has its sums at hand, a bias
    costs nothing and stays.

    In 16 bits the result without its bias is rounded, which costs accuracy where the bias cancels much of it. There a
    bias moves on CUDA alone, where ATen rounds before it adds a bias anyway.
    """
    for node in draft.graph.nodes:
        if node not in draft.convs or not draft.convs[node].problem.has_residual:
            continue
        x, residual = cast("tuple[fx.Node, fx.Node]", node.args)
        if residual in draft.convs and residual is not x and len(residual.users) == 1:
            _move(draft, residual, node)


def _move(draft: Draft, source: fx.Node, target: fx.Node) -> None:
    """Where it can be moved, pays, and leaves problems that the backends asked for can run."""
    giver, taker = draft.convs[source], draft.convs[target]
    if giver.bias is None or giver.problem.activation != "none" or _is_bound(taker) or not _adds_apart(giver):
        return
    if giver.problem.dtype == torch.float16 and giver.bias.abs().max() > _SMALL:
        return
    total = giver.bias.double() if taker.bias is None else giver.bias.double() + taker.bias.double()
    total = total.to(giver.bias.dtype)
    if not total.to(taker.problem.dtype).isfinite().all():  # in fp16 a sum may be infinite where its parts are not
        return
    try:
        giver = _chosen_anew(draft, giver._replace(problem=giver.problem._replace(has_bias=False), bias=None))
        taker = _chosen_anew(draft, taker._replace(problem=taker.problem._replace(has_bias=True), bias=total))
    except backends.BackendError:
        return
    if not _is_bound(giver) and not _is_bound(taker):
        draft.convs.update({source: giver, target: taker})


def _adds_apart(conv: Decision) -> bool:
    """Whether who computes it adds the bias to a result that is rounded already, or rounds too finely to matter."""
    is_wide = conv.problem.dtype in (torch.float32, torch.float64)
    return conv.selection.backend.origin == "torch" and (is_wide or conv.problem.device == "cuda")


def _chosen_anew(draft: Draft, conv: Decision) -> Decision:
    return conv._replace(selection=choosing.select(conv.problem, draft.backend, in_plan=True))


def _is_bound(conv: Decision) -> bool:
    return conv.selection.backend.plan.bind is not None
