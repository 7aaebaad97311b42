"""Copies of models: without wrappers, over the model's own parameters, and of what a plan holds."""

from __future__ import annotations

import collections
import copy
from typing import Any, Optional

from torch import Tensor, nn
from torch.utils import _pytree as pytree

# By the name of the class, because torch._dynamo takes long to import: the attribute that holds what they were given.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel or DistributedDataParallel were given; any other module is itself."""
    while inner := _WRAPPERS.get((type(module).__module__, type(module).__qualname__)):
        module = getattr(module, inner)
    return module


def copy_of(model: nn.Module, copies: Optional[dict[int, Any]] = None) -> nn.Module:
    """A deep copy without the wrappers, in which `copies` stand for what they are copies of (by id).

    deepcopy refuses tensors with a history, such as a pruned weight. The copy has their values.
    """
    memo: dict[int, Any] = dict(copies or {})
    for module in model.modules():
        for held in vars(module).values():
            if type(held) in (dict, collections.OrderedDict) and not held:  # the hooks that there are none of
                memo.setdefault(id(held), type(held)())  # on which deepcopy spends half of its time
        for leaf in pytree.tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
    for module in reversed(list(model.modules())):  # from the inside out
        if id(module) not in memo and unwrapped(module) is not module:
            memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
    return copy.deepcopy(model, memo)


def copy_with_parameters(model: nn.Module) -> nn.Module:
    """A copy over the model's own parameters, whose forward may count and keep what it likes."""
    return copy_of(model, {id(parameter): parameter for parameter in model.parameters()})


def copy_tensors(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
