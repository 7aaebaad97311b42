"""Which tensors of a plan lie in row space, and which config each Triton convolution then takes.

A 3x3 convolution that reads row space (`rows_tma`) needs no index arithmetic, but somebody has to write the halo. Where
a Triton convolution writes a tensor that only Triton convolutions read, it writes the halo along with it; nothing is
cleared or copied. Elsewhere a rows_tma config would copy its input at every call, and another form takes its place:
of what was measured, the best without row space (`stranded`), else the likeliest. A producer keeps the config that was
measured for it. Where that would spill when it writes row space, it writes none, and its readers take another form.
"""

from __future__ import annotations

import functools
from typing import Mapping, Optional

import torch
from torch import fx

from fused_resnet.choosing.planned import Placed
from fused_resnet.kernels.triton.conv import configs, cost
from fused_resnet.kernels.triton.conv.configs import TritonConfig


def assign(convs: Mapping[fx.Node, Placed], device: torch.device, *, is_replayed: bool) -> dict[fx.Node, Placed]:
    """The same convolutions with their final configs and layouts.

    convs: the nodes that are Triton convolutions, called with x and perhaps a residual. is_replayed: a CUDA graph will
    replay the launches, and encoding descriptors costs nothing: those without a config, which nobody measured, take the
    likely fastest.
    """
    if not convs:
        return {}
    from fused_resnet.kernels.triton import runtime  # Triton itself

    target = runtime.arch(device), runtime.num_sms(device)
    chosen = dict(convs)
    if is_replayed:
        for node, conv in convs.items():
            chosen[node] = conv._replace(config=conv.config or cost.likely_config(conv.problem, *target))
    in_row_space = _in_row_space(chosen, measured=convs)
    for node, conv in chosen.items():
        config, writes_row_space = conv.config, node in in_row_space
        reads_row_space = node.args[0] in in_row_space
        if config is not None and not _suits(config, reads_row_space, writes_row_space):
            suits = functools.partial(_suits, reads_row_space=reads_row_space, writes_row_space=writes_row_space)
            config = cost.likely_config(conv.problem, *target, suits) if is_replayed else None
        chosen[node] = conv._replace(config=config, writes_row_space=writes_row_space)
    return chosen


def stranded(convs: Mapping[fx.Node, Placed]) -> list[fx.Node]:
    """The convolutions whose config reads x from row space, where it cannot lie. Another choice for them may strand
    others: those that read what they write, or the same x."""
    in_row_space = _in_row_space(convs, measured=convs)
    return [node for node, conv in convs.items() if conv.wants_row_space and node.args[0] not in in_row_space]


def _in_row_space(convs: Mapping[fx.Node, Placed], measured: Mapping[fx.Node, Placed]) -> set[fx.Node]:
    """measured: the same convolutions, with a config only where it must stay."""
    return {node for node in convs if _belongs_in_row_space(node, convs, measured)}


def _belongs_in_row_space(node: fx.Node, convs: Mapping[fx.Node, Placed], measured: Mapping[fx.Node, Placed]) -> bool:
    """Whether somebody reads it as the input of a rows_tma, nobody who cannot, and whoever makes it can write it so."""
    readers = [convs.get(user) for user in node.users]
    inputs = [user for user in node.users if user in convs and user.args[0] is node]
    return (
        any(convs[user].wants_row_space for user in inputs)
        and all(readers)
        and all(_reads_row_space(convs[user]) for user in inputs)
        and not any(_spills_in_row_space(measured[user].config) for user in (node, *inputs))
    )


def _reads_row_space(conv: Placed) -> bool:
    """Whether its kernel takes x from row space. A residual may lie there for every kernel."""
    return configs.is_gemm(conv.problem) or conv.wants_row_space


def _suits(config: TritonConfig, reads_row_space: bool, writes_row_space: bool) -> bool:
    """Whether a config is as good as it looked, now that the layouts are known."""
    if config.form == "rows_tma":
        return reads_row_space
    return not ((reads_row_space or writes_row_space) and _spills_in_row_space(config))


def _spills_in_row_space(config: Optional[TritonConfig]) -> bool:
    """Numbering rows in two ways takes registers that the largest tiles do not leave. rows_tma numbers them in one."""
    if config is None or config.form == "rows_tma":
        return False
    return configs.sums_per_thread(config) >= configs.MANY_SUMS
