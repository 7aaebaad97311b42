"""What calling a module runs: whether its forward is the one it was written with, and what torch's own ones do."""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

from torch import nn
from torch.nn.modules import module as torch_module

from fused_resnet.operators.problem import ACTIVATIONS

# What calling a module runs of it, the second in a convolution; one in its __dict__ replaces its class's.
_CALLED = ("forward", "_conv_forward")
ACTIVATION_OF = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Identity: "none"}
# They return their input itself; dropout in eval mode.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
assert set(ACTIVATION_OF.values()) == set(ACTIVATIONS)


def has_stock_code(cls: Any, forward: Optional[Callable], reads: frozenset[str]) -> bool:
    """Whether `forward` is the one that this class was written with, by all that can be seen without its source.

    A patched forward may keep its name and module (functools.wraps). It does not keep both the attributes that its code
    reads and the file that its code comes from. The stock one comes from the constructor's file, or from the module's
    where the class has no constructor.
    """
    code, constructor = getattr(forward, "__code__", None), getattr(cls.__init__, "__code__", None)
    if forward is None or code is None or constructor is None or cls.__call__ is not nn.Module.__call__:
        return False
    has_own = "__init__" in cls.__dict__
    file = constructor.co_filename if has_own else getattr(sys.modules.get(cls.__module__), "__file__", None)
    return (
        forward.__module__ == cls.__module__
        and forward.__qualname__ == f"{cls.__qualname__}.forward"
        and code.co_filename == file
        and set(code.co_names) == reads
    )


def why_called(module: nn.Module) -> Optional[str]:
    """Why calling this module may do more than the forward of its class, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{type(module).__name__} has hooks"
    replaced = replaced_call(module)
    return None if replaced is None else f"the {replaced} of {type(module).__name__} was replaced"


def has_stock_call(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else: no hooks, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or torch_module._has_any_global_hook()
    return not hooks and replaced_call(module) is None


def returns_its_input(module: Optional[nn.Module]) -> bool:
    """Whether calling this module, as it is now, does nothing."""
    if module is None or type(module) not in _IDENTITIES or not has_stock_call(module):
        return False
    return type(module) is nn.Identity or not module.training


def replaced_call(module: nn.Module) -> Optional[str]:
    """The method that calling a module runs, of its own instead of its class's, or None."""
    for name in _CALLED:  # a loop, since torch 2.11's Dynamo can ask __dict__ for one name only
        if name in module.__dict__:
            return name
    return None
