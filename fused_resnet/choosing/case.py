"""One problem with its operands, and what it should give: the reference, and the error that a backend may make."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.machine.devices import allows_tf32
from fused_resnet.machine.locks import new_rlock
from fused_resnet.operators import float8, quantized, reference
from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import FLOAT8, AddReluProblem, Problem, dtype_name

_POISONING = new_rlock()


class AddReluOperands(NamedTuple):
    """The addends, and the gradient that the backward kernel is given."""

    a: Tensor
    b: Tensor
    grad: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operator with its operands, and what the reference says about it."""

    problem: Problem
    operands: Union[ConvOperands, AddReluOperands, Int8Operands]

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = self.operands._asdict()
        if isinstance(self.operands, Int8Operands):
            named |= self.operands.epilogue._asdict() | {"residual": self.operands.residual}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @functools.cached_property
    def bounds(self) -> dict[tuple[Optional[torch.dtype], bool], Tensor]:
        """For `bound_of`, which is asked once per backend and config and finds few different ones."""
        return {}

    @functools.cached_property
    def expected(self) -> Tensor:
        """The reference's result on the CPU: in fp64, of e4m3 before it is rounded; or the bytes of int8's contract."""
        if isinstance(self.problem, AddReluProblem):
            return reference.add_relu(self.operands.a, self.operands.b)
        if isinstance(self.operands, Int8Operands):
            p, o = self.problem, self.operands.map(Tensor.cpu)
            if self.problem.dtype == FLOAT8:
                return float8.exact(p, o)
            return quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
        return reference.conv_bn_act(self.problem, self.operands)

    def __str__(self) -> str:
        shown = (f"{name} {dtype_name(t.dtype)}{list(t.stride())}" for name, t in self.tensors.items())
        return f"{self.problem.op} {self.problem} ({', '.join(shown)})"


def synchronize(device: Union[str, torch.device]) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def why_unusable(device: str) -> Optional[str]:
    """What keeps this process from computing there since a kernel has failed, or None."""
    try:
        synchronize(device)
    except RuntimeError as error:
        return str(error)
    return None


def bound_of(case: Case, backend: str) -> Tensor:
    """The error that this backend may make, per element: reference.error_bound with the roundings it documents.

    Of e4m3 that of `float8`, which is the same for all.
    """
    p, o = case.problem, case.operands
    if isinstance(o, Int8Operands):
        return float8.error_bound(p, o.map(Tensor.cpu))
    eps_acc, stored = 2.0**-53 if p.dtype == torch.float64 else 2.0**-24, stored_dtype(case, backend)
    winograd = rounding_of(backend).winograd
    key = (stored, winograd)
    if key not in case.bounds:
        case.bounds[key] = reference.error_bound(
            p, o, expected=case.expected, eps_acc=eps_acc, stored=stored, winograd=winograd
        )
    return case.bounds[key]


def stored_dtype(case: Case, backend: str) -> Optional[torch.dtype]:
    """The dtype to which values between the operands and the final rounding are rounded, if there is one."""
    p, o = case.problem, case.operands
    if p.dtype == torch.float32:
        # products in TF32 have the significand of fp16
        return torch.float16 if p.device == "cuda" and allows_tf32() else None
    return p.dtype if rounding_of(backend).rounds_between(p, o) else None


def rounding_of(backend: str) -> backends.Rounding:
    return backends.known("conv_bn_act")[backend].rounding


@contextlib.contextmanager
def poisoned_memory(like: Tensor) -> Iterator[None]:
    """New tensors hold NaN inside, so that a place nobody writes shows.

    On CUDA by the allocator's reuse of a freed block of the size of `like`: the switch used on the CPU would also
    change which of cuDNN's algorithms run.
    """
    if like.device.type != "cpu":
        poison = torch.full_like(like, torch.nan if like.is_floating_point() else 85)
        del poison
        yield
        return
    with _POISONING:  # the switch is the process's: two threads would put it back in the wrong order
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill with NaN
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
