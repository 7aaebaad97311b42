"""What code that a forward calls asks or writes, as far as its instructions and its arguments tell."""

from __future__ import annotations

import collections
import dis
import functools
import itertools
from types import CodeType, FrameType
from typing import Any, Callable, Iterator, Optional

from torch import nn

from fused_resnet.fusing.proxies import WatchedProxy

# Torch's answers that may be others in a later call. Both of is_grad_enabled are traced, and nothing fused is scripted.
_MODES = frozenset(
    "is_autocast_enabled is_autocast_cpu_enabled get_autocast_dtype get_autocast_cpu_dtype get_autocast_gpu_dtype "
    "is_inference_mode_enabled is_tracing _is_tracing _get_tracing_state is_in_onnx_export is_compiling "
    "is_dynamo_compiling is_exporting get_default_dtype are_deterministic_algorithms_enabled".split()
)
_CLASS_QUESTIONS = {"LOAD_GLOBAL": "type", "LOAD_ATTR": "__class__", "LOAD_METHOD": "__class__"}
COLLECTIONS = (dict, list, tuple, set, frozenset, collections.deque)


def is_torchs(name: str) -> bool:
    """Whether a module of Python is torch's, or ours."""
    return name.partition(".")[0] in ("torch", "fused_resnet")


def module_name(frame: Optional[FrameType]) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "")


def owner_of(function: Any) -> str:
    """The module of Python that a function in C is from."""
    return getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__


def unseen_in(frame: FrameType) -> Optional[str]:
    """What a function that is being called does that a graph does not show, or None."""
    if not is_torchs(module_name(frame)):
        return unseen_in_code(frame.f_code, _class_asked) if is_about_the_forward(frame) else None
    if module_name(frame) == "torch.utils.checkpoint":
        return "recomputes its activations (torch.utils.checkpoint)"
    return mode_asked(frame.f_code.co_name, frame.f_back)


def is_about_the_forward(frame: FrameType) -> bool:
    variables = frame.f_locals.values()  # of what is no dict from Python 3.13 on
    return any(issubclass(kind, (nn.Module, WatchedProxy)) for kind in _kinds_in(variables))


def _kinds_in(values: Any, depth: int = 2) -> Iterator[type]:
    """The types of values, and of what is in those that are containers."""
    for value in values.values() if issubclass(type(values), dict) else values:
        yield type(value)
        if depth and issubclass(type(value), COLLECTIONS):
            yield from _kinds_in(value, depth - 1)


def mode_asked(name: str, asker: Optional[FrameType]) -> Optional[str]:
    is_asked = name in _MODES and not is_torchs(module_name(asker))
    return f"asks torch {name}(), which may answer otherwise in a later call" if is_asked else None


@functools.lru_cache(maxsize=None)
def unseen_in_code(code: CodeType, unseen: Callable[[CodeType, str, Any], Optional[str]]) -> Optional[str]:
    """What an instruction of a function, or of one inside, does, or None."""
    own = (unseen(code, instruction.opname, instruction.argval) for instruction in dis.get_instructions(code))
    inner = (unseen_in_code(constant, unseen) for constant in code.co_consts if isinstance(constant, CodeType))
    return next(filter(None, itertools.chain(own, inner)), None)


def _class_asked(code: CodeType, kind: str, name: Any) -> Optional[str]:
    is_asked = kind in _CLASS_QUESTIONS and name == _CLASS_QUESTIONS[kind]
    return "asks for the class of a value or a module" if is_asked else None


def variable_written(code: CodeType, kind: str, name: Any) -> Optional[str]:
    if kind in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        return f"writes the global variable {name}"
    is_outer = kind in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars
    return f"writes the nonlocal variable {name}" if is_outer else None
