"""The record of a backend: what it can run, how, and one sentence where it cannot.

`why_not(problem)` selects (in `auto`) and explains, so the two cannot disagree. BackendError says it when the backend
was asked for by name. `fused-resnet bench` and `verify` print it beside a backend that did not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, Problem


class BackendError(RuntimeError):
    """A backend that is unknown, or that was asked for by name and cannot run this problem."""


class Auto(NamedTuple):
    """Where `auto` may choose a backend unmeasured: on these devices, for what it can run and that pays.

    A kernel of ours is chosen on a GPU where a measurement says that it is right there (`winners`). The one of
    `cudnn_pass` is chosen where its own check says so.
    """

    devices: tuple[str, ...] = ()
    pays: Callable[[Any], bool] = lambda problem: True


class Rounding(NamedTuple):
    """Where a backend's arithmetic differs from sums in fp32 that are rounded once. `testing` allows for it.

    rounds_between: (problem, operands) -> whether values are rounded to the dtype of x before the last rounding.
    spreads_nan: where ATen's convolution is NaN although the formula is not, so is this one. drops_nan: its activation
    is max(x, 0), which drops NaN. winograd: its sums are those of F(4x4, 3x3). near_bytes: its bytes may be neighbours
    of the contract's (`operators.near_bytes`).
    """

    rounds_between: Callable[[Any, Any], bool] = lambda problem, operands: False
    spreads_nan: bool = False
    drops_nan: bool = False
    winograd: bool = False
    near_bytes: bool = False


def rounds_bias(problem: ConvProblem, operands: ConvOperands) -> bool:
    """Whether a library that takes the bias in the dtype of x rounds it."""
    return operands.bias is not None and operands.bias.dtype != problem.dtype


class InPlan(NamedTuple):
    """How a frozen plan calls a backend.

    pack: (problem, weight, config) -> the weight in the layout that it reads in plans.
    bind: (problem, packed weight, bias, into_residual=) -> a function (x, residual=None) -> output.
    only: `auto` takes it in plans alone, since packing costs too much.
    linears: the plan's linear layers are computed by it, too. placed: the plan settles where its tensors lie
    (`freezing.layouts`).
    config: (problem) -> what an unmeasured convolution of quantized tensors takes in a plan. Of those bind gets the
    epilogue instead of the bias, and nothing else.
    """

    pack: Callable[[Any, Tensor, Optional[Any]], Tensor] = lambda problem, weight, config: weight
    bind: Optional[Callable[..., Callable[..., Tensor]]] = None
    only: bool = False
    linears: bool = False
    placed: bool = False
    config: Callable[[Any], Optional[Any]] = lambda problem: None


class Configs(NamedTuple):
    """The ways in which a backend can run a problem beside its default: NamedTuples of plain values.

    worth: (problem) -> those that are worth measuring.
    legal: (problem) -> those that a file may name; None, the same.
    default: (problem) -> what None runs as outside plans, where a plan would take another config for it. It is measured
    by its name, so that a plan runs what was measured.
    launch_us: (config) -> what a launch takes outside plans, where that is more than a few microseconds. Measured times
    do not hold it.
    reads_row_space: (config) -> whether it was measured with x in row space, where only a plan keeps it.
    """

    worth: Callable[[Any], Sequence[Any]]
    legal: Optional[Callable[[Any], Sequence[Any]]] = None
    default: Optional[Callable[[Any], Any]] = None
    launch_us: Callable[[Any], float] = lambda config: 0.0
    reads_row_space: Callable[[Any], bool] = lambda config: False

    def find(self, problem: Problem, fields: dict[str, Any]) -> Optional[Any]:
        """The config with these fields, if there still is one: what comes from a file runs only if it is legal."""
        legal = self.legal or self.worth
        return next((config for config in legal(problem) if config._asdict() == fields), None)


class Backend(NamedTuple):
    """One way to compute one operator.

    why_not: None, or why it cannot run a problem of its operator.
    run: (problem, *operands) -> output; with `configs` also config=, one of them or None. Of add_relu an `AddRelu`, of
    bn_act a `BnAct`. That of bottleneck_chain gives (y, reduced).
    auto: where `auto` may choose it unmeasured.
    takes_bn: False where no problem with live BN can ever run, on any device.
    origin: whose kernels these are: "ours", a "library"'s, or "torch"'s own, a pass over memory for each step. Or they
    are "interpreted" in this process, and their time says nothing.
    sources: patterns of the files that kernels of ours are made from (`kernels.sources`).
    after_aten: whether it computes what follows ATen's convolution, in a pass of its own or more. `run` then takes
    in_nchw=, with which the output is in NCHW memory without a conversion.
    """

    name: str
    why_not: Callable[[Any], Optional[str]]
    run: Callable[..., Any]
    auto: Auto = Auto()
    takes_bn: bool = True
    rounding: Rounding = Rounding()
    origin: str = "ours"
    sources: tuple[str, ...] = ()
    plan: InPlan = InPlan()
    configs: Optional[Configs] = None
    after_aten: bool = False


_OPERATORS = ("conv_bn_act", "add_relu", "bn_act", "bottleneck_chain", "conv_int8", "conv_float8")
REGISTRY: dict[str, dict[str, Backend]] = {op: {} for op in _OPERATORS}
NEEDS_FOLDED_BN = "it takes only a bias, so it needs folded BN: use fused_resnet.freeze"


def register(op: str, backend: Backend) -> None:
    """Add a backend for an operator. `auto` tries backends in the order of registration."""
    REGISTRY[op] = {**REGISTRY[op], backend.name: backend}  # a new one, by which `repeated` knows


@contextlib.contextmanager
def left_out(name: str) -> Iterator[None]:
    """Inside, in all threads, no operator has a backend of this name: plans are made as before there was one."""
    before = {op: dict(backends) for op, backends in REGISTRY.items()}
    for op, backends in before.items():
        REGISTRY[op] = {other: backend for other, backend in backends.items() if other != name}
    try:
        yield
    finally:
        REGISTRY.update(before)


def known(op: str) -> dict[str, Backend]:
    """The backends of an operator by name, in the order in which `auto` tries them."""
    return dict(REGISTRY[op])


def check_name(caller: str, backend: str) -> None:
    """BackendError, in the name of `caller`, unless conv_bn_act has a backend of this name or it is "auto"."""
    names = ("auto", *REGISTRY["conv_bn_act"])
    if backend not in names:
        raise BackendError(f"{caller}: unknown backend {backend!r}; known ones are {', '.join(names)}.")


def why_never_live(backend: str) -> Optional[str]:
    """Why this backend of conv_bn_act can run no problem with live BN, whatever the device, or None."""
    return None if backend == "auto" or REGISTRY["conv_bn_act"][backend].takes_bn else NEEDS_FOLDED_BN


def why_not_cpu(problem: Problem) -> Optional[str]:
    """Why a backend for CPUs has nothing to run this on, or None."""
    return None if problem.device == "cpu" else f"it runs on the CPU, the tensors are on {problem.device}"


def why_not_nvidia(problem: Problem) -> Optional[str]:
    """Why a backend for NVIDIA GPUs has nothing to run this on, or None."""
    if problem.device != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {problem.device}"
    return "it does not run on ROCm" if torch.version.hip else None
