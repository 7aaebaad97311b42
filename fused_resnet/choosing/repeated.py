"""A call of conv_bn_act with operands like those of a call before: all that was decided then still holds.

A small network spends its time in Python. A call that is like one before goes straight to what ran then
(`functional.conv_bn_act`). Torch's own guards find that, in one function in C++. They compare each tensor's class,
shape, strides, dtype, device and requires_grad. They also compare its dispatch keys, with those that modes, transforms,
tracers and autocast add.
"""

from __future__ import annotations

import functools
import operator
import weakref
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_resnet.backends import add_relu, cpu_pass, eager, record
from fused_resnet.choosing import winners
from fused_resnet.choosing.choice import select
from fused_resnet.operators import layout
from fused_resnet.operators.describe import add_relu_problem, conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is private: without it each call is decided anew
    TensorGuards = None  # type: ignore

MOST_WEIGHTS, MOST_EACH = 1024, 4
_REGISTRY = record.REGISTRY
_num_function_modes, _is_profiled = torch._C._len_torch_function_stack, torch.autograd._profiler_enabled


class Call(NamedTuple):
    """What was asked, and what it led to.

    check: whether tensors are like those of the call. needs_grad: whether one of them does. candidates, measured: what
    the choice rests on where it need not be made anew (`settled`), else None. run: (x to bn_var, eps, bias, residual).
    """

    check: Callable[..., bool]
    needs_grad: bool
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    activation: str
    backend: str
    channels_last: bool
    candidates: Optional[dict]
    measured: Any
    run: Callable[..., Tensor]


measured = winners.known  # on a kind of device: the same object until the files are read again


class Sum(NamedTuple):
    """The same of add_relu. run: (a, b)."""

    check: Callable[..., bool]
    needs_grad: bool
    backend: str
    candidates: dict
    run: Callable[..., Tensor]


sums: dict[torch.Size, tuple[Sum, ...]] = {}
# by id(weight), and whether there is no bias and no residual
calls: dict[tuple[int, bool, bool], tuple[Call, ...]] = {}
_weights: dict[int, weakref.ref] = {}
forgetters: list[Callable[[int], None]] = []  # are told the id of a weight that is gone
_rests_on: tuple = (None, None)  # the candidates and measurements for which `calls` was last cleared


def holds(call: Call) -> bool:
    """Whether a call may be repeated on tensors that its check takes: nobody watches or wants a gradient, and what was
    chosen rests on what still is so."""
    # the first three leave no trace in a tensor's dispatch keys
    if _num_function_modes() or _is_profiled() or forward_ad._current_level >= 0:
        return False
    if call.needs_grad and torch.is_grad_enabled():
        return False
    if call.candidates is None or call.candidates is _REGISTRY["conv_bn_act"] and call.measured is measured("cpu"):
        return True
    _clear_once()
    return False


def _clear_once() -> None:
    """Drop the calls that rest on what was before somebody registered a backend, or measured."""
    global _rests_on
    now = _REGISTRY["conv_bn_act"], measured("cpu")
    if not all(map(operator.is_, now, _rests_on)):
        calls.clear()
        _rests_on = now


def learn(operands: ConvOperands, window: tuple, asked: tuple, channels_last: bool) -> None:
    """Keep a call that was just made, unwatched and with torch's own tensors. asked: from stride to backend.

    Kept are calls with a weight that was seen before: one that is made for its call is gone by then.
    """
    o = operands
    weight = _weights.get(id(o.weight))
    if weight is None:
        if len(_weights) < MOST_WEIGHTS:
            _weights[id(o.weight)] = weakref.ref(o.weight, functools.partial(_forget, id(o.weight)))
        return
    key = (id(o.weight), o.bias is None, o.residual is None)
    known, vectors = calls.get(key, ()), o[2:6]
    if len(known) >= MOST_EACH or any(vector is None for vector in vectors) or not all(map(is_immutable, asked)):
        return
    tensors = [tensor for tensor in (o.x, o.weight, *vectors, o.bias, o.residual) if isinstance(tensor, Tensor)]
    check, problem, backend = guard(tensors), conv_problem(o, *window), asked[-1]
    if check is None or problem.N == 0:
        return
    needs_grad = any(tensor.requires_grad for tensor in tensors)
    run = cpu_pass.settled(problem, o, in_nchw=not channels_last) if _is_settled(problem, backend) else None
    rests_on: tuple = (None, None) if run is None else (record.REGISTRY["conv_bn_act"], measured("cpu"))
    run = run or _selected_anew(problem, backend, channels_last)
    calls[key] = (*known, Call(check, needs_grad, *asked, channels_last, *rests_on, run))  # type: ignore[call-arg]


def kept(tensors: Sequence[Tensor], has_no_residual: bool, asked: tuple) -> Optional[Call]:
    """The call without a bias that is kept of such tensors, the weight second. asked: from stride to channels_last."""
    for call in calls.get((id(tensors[1]), True, has_no_residual), ()):
        if all(map(operator.is_, call[2:9], asked)) and call.check(*tensors):
            return call
    return None


def learn_sum(a: Tensor, b: Tensor, backend: str) -> None:
    """Keep a call of add_relu, where csrc's kernel computes it on tensors as they lie."""
    if a.device.type != "cpu" or type(a) is not Tensor or a.stride() != b.stride():
        return  # quickly, since this is asked at every call that is not kept
    known = sums.get(a.shape, ())
    if len(known) >= MOST_EACH or len(sums) >= MOST_WEIGHTS:
        return
    problem, check = add_relu_problem(a, b), guard((a, b))
    if check is None or not problem.same_dense_layout or select(problem, backend).backend is not add_relu.ADD_RELU[0]:
        return
    needs_grad = a.requires_grad or b.requires_grad
    sums[a.shape] = (*known, Sum(check, needs_grad, backend, record.REGISTRY["add_relu"], add_relu.settled()))


def guard(tensors: Sequence[Tensor]) -> Optional[Callable[..., bool]]:
    """Whether tensors are like these, as a function. None where this cannot be told, as of one tensor given twice."""
    if TensorGuards is None or len({id(tensor) for tensor in tensors}) < len(tensors):
        return None
    sizes: Any = [list(tensor.shape) for tensor in tensors]
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _forget(weight: int, gone: weakref.ref) -> None:
    _weights.pop(weight, None)
    for has_no_bias in (False, True):
        for has_no_residual in (False, True):
            calls.pop((weight, has_no_bias, has_no_residual), None)
    for forget in forgetters:
        forget(weight)


def is_immutable(value: Any) -> bool:
    """Whether a parameter of a window is the same as long as it is the same object."""
    return type(value) in (int, str) or type(value) is tuple and all(type(one) is int for one in value)


def _is_settled(problem: ConvProblem, backend: str) -> bool:
    """Whether cpu_pass is chosen while the records are these and nothing is known of the problem: no other kernel may
    take live BN here."""
    if winners.knows(problem) or select(problem, backend).backend is not cpu_pass.BACKEND:
        return False
    if backend == cpu_pass.BACKEND.name:
        return True
    others = record.REGISTRY["conv_bn_act"].values()
    return not any(
        other.takes_bn and problem.device in other.auto.devices
        for other in others
        if other not in (cpu_pass.BACKEND, eager.BACKEND)
    )


def _selected_anew(problem: ConvProblem, backend: str, channels_last: bool) -> Callable[..., Tensor]:
    def run(x, weight, gamma, beta, mean, var, eps, bias, residual) -> Tensor:
        o = ConvOperands(x, weight, gamma, beta, mean, var, eps, bias, residual)
        chosen = select(problem, backend)
        if not channels_last and chosen.backend.after_aten:
            return chosen.backend.run(problem, o, in_nchw=True)
        out = chosen.run(problem, o)
        return out if channels_last else layout.nchw(out)

    return run
