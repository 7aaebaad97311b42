"""The record of a backend: what it can run, how, and one sentence where it cannot.

`why_not(problem)` selects (in `auto`) and explains, so the two cannot disagree. BackendError says it when the backend
was asked for by name. `fused-resnet bench` and `verify` print it beside a backend that did not run.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

from torch import Tensor

from fused_resnet.operators.problem import AddReluProblem, ConvProblem

Problem = Union[ConvProblem, AddReluProblem]
Backward = Callable[[Tensor, Tensor], Tensor]


class BackendError(RuntimeError):
    """A backend that is unknown, or that was asked for by name and cannot run this problem."""


class Backend(NamedTuple):
    """One way to compute one operator.

    why_not: None, or why it cannot run a problem of its operator.
    run: (problem, *operands) -> output; with `configs` also config=, one of them or None.
    auto: the devices on which `auto` may choose it unmeasured. A kernel of ours is chosen on a GPU where a measurement
    says that it is right there (`tuning`).
    backward: add_relu only.
    takes_bn: False where no problem with live BN can ever run, on any device.
    pack: (problem, weight, config) -> the weight in the layout that it reads in plans.
    bind: (problem, packed weight, bias, into_residual=) -> a function (x, residual=None) -> output, for plans.
    only_packed: `auto` takes it in plans alone, since packing costs too much.
    pays: (problem) -> whether `auto` should take it unmeasured.
    configs: the ways in which it can run a problem beside its default and that are worth measuring. They are
    NamedTuples of plain values.
    legal: the configs that a file may name. None: those of `configs`.
    run_nchw: (problem, operands) -> the same in NCHW memory, where that is no detour over channels_last.
    default_config: (problem) -> what None runs as outside plans, where a plan would take another config for it. It is
    measured by its name, so that a plan runs what was measured.
    estimated_us: (problem, config) -> a guess from arithmetic, by which the tuner drops what cannot win.
    launch_us: (config) -> what a launch takes outside plans, where that is more than a few microseconds. Measured times
    do not hold it.
    reads_row_space: (config) -> whether it was measured with x in row space, where only a plan keeps it.
    """

    name: str
    why_not: Callable[[Any], Optional[str]]
    run: Callable[..., Tensor]
    auto: tuple[str, ...] = ()
    backward: Optional[Backward] = None
    takes_bn: bool = True
    pack: Callable[[Any, Tensor, Optional[Any]], Tensor] = lambda problem, weight, config: weight
    bind: Optional[Callable[..., Callable[..., Tensor]]] = None
    only_packed: bool = False
    pays: Callable[[Any], bool] = lambda problem: True
    configs: Optional[Callable[[Any], Sequence[Any]]] = None
    legal: Optional[Callable[[Any], Sequence[Any]]] = None
    run_nchw: Optional[Callable[..., Tensor]] = None
    default_config: Optional[Callable[[Any], Any]] = None
    estimated_us: Optional[Callable[[Any, Any], float]] = None
    launch_us: Callable[[Any], float] = lambda config: 0.0
    reads_row_space: Callable[[Any], bool] = lambda config: False


REGISTRY: dict[str, dict[str, Backend]] = {"conv_bn_act": {}, "add_relu": {}}
NEEDS_FOLDED_BN = "it takes only a bias, so it needs folded BN: use fused_resnet.freeze"


def register(op: str, backend: Backend) -> None:
    """Add a backend for an operator. `auto` tries backends in the order of registration."""
    REGISTRY[op][backend.name] = backend


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
