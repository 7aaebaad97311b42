"""warm_up: what a fused model will run, checked and measured before it does."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.choosing.decide import Tune, Tuning, check_tune, decide, leave_to_rules
from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import split_arguments
from fused_resnet.operators.problem import ConvProblem


class _Asked(TorchDispatchMode):
    """Notes the problems that `auto` is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[ConvProblem] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fused_resnet.conv_bn_act.default and args[-1] == "auto":
            operands, *window = split_arguments(args)
            self.problems.append(conv_problem(operands, *window))
        return func(*args, **(kwargs or {}))


def warm_up(
    model: nn.Module, example_input: Any, *, tune: Tune = "auto", progress: Optional[Progress] = None
) -> nn.Module:
    """Check and measure on this machine what a fused model runs for inputs like `example_input`, and keep it.

    model: after `fused_resnet.fuse`, in eval mode; it is returned, unchanged. example_input: what it takes, a tensor or
    a list or dict of them. tune, progress: as `fused_resnet.freeze` takes them. The model runs twice, without
    gradients: once to see what it asks for, and once with what was chosen, so that kernels are compiled. Give it each
    shape that will be served, before DistributedDataParallel wraps the model and before a CUDA graph captures it.

    Without this a fused model goes by what is known of its convolutions, else by rules. On a GPU its first calls
    measure what is not known, for 60 s in all. Raises TypeError for what is no module, ValueError for another `tune`,
    RuntimeError for a model in training mode, which runs its plain modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warm_up: expected an nn.Module, got {type(model).__name__}.")
    check_tune("warm_up", tune)
    if model.training:
        raise RuntimeError("warm_up: the model is in training mode, in which it runs its plain modules: call eval().")
    with torch.inference_mode(False), torch.no_grad():
        with _Asked() as asked:
            model(example_input)
        by_device = {tensor.device for tensor in pytree.tree_leaves(example_input) if isinstance(tensor, Tensor)}
        for device in by_device:
            wanted = [problem for problem in asked.problems if problem.device == device.type]
            decide(wanted, device, Tuning(tune, progress or silent))
            leave_to_rules(wanted)
        model(example_input)
    return model
