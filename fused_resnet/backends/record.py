"""Which backend computes an operator: the records, the choice among them, one sentence where one cannot.

`why_not(problem)` selects (in `auto`) and explains, so the two cannot disagree. BackendError says it when the backend
was asked for by name. `fused-resnet bench` and `verify` print it beside a backend that did not run.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

from torch import Tensor

from fused_resnet.backends import winners
from fused_resnet.operators.problem import AddReluProblem, ConvProblem

Problem = Union[ConvProblem, AddReluProblem]
Backward = Callable[[Tensor, Tensor], Tensor]

FIXED_ORDER = "the fixed order of backends"
BY_NAME = "asked for by name"


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


class Selection(NamedTuple):
    """The backend for a problem, its config (None: its own default), and why these: part of a sentence."""

    backend: Backend
    config: Optional[Any] = None
    source: str = FIXED_ORDER

    def run(self, problem: Problem, *operands: Any) -> Tensor:
        if self.config is None:
            return self.backend.run(problem, *operands)
        return self.backend.run(problem, *operands, config=self.config)


_REGISTRY: dict[str, dict[str, Backend]] = {"conv_bn_act": {}, "add_relu": {}}
NEEDS_FOLDED_BN = "it takes only a bias, so it needs folded BN: use fused_resnet.freeze"


def register(op: str, backend: Backend) -> None:
    """Add a backend for an operator. `auto` tries backends in the order of registration."""
    _REGISTRY[op][backend.name] = backend


def known(op: str) -> dict[str, Backend]:
    """The backends of an operator by name, in the order in which `auto` tries them."""
    return dict(_REGISTRY[op])


def check_name(caller: str, backend: str) -> None:
    """BackendError, in the name of `caller`, unless conv_bn_act has a backend of this name or it is "auto"."""
    names = ("auto", *_REGISTRY["conv_bn_act"])
    if backend not in names:
        raise BackendError(f"{caller}: unknown backend {backend!r}; known ones are {', '.join(names)}.")


def why_never_live(backend: str) -> Optional[str]:
    """Why this backend of conv_bn_act can run no problem with live BN, whatever the device, or None."""
    return None if backend == "auto" or _REGISTRY["conv_bn_act"][backend].takes_bn else NEEDS_FOLDED_BN


def select(problem: Problem, backend: str = "auto", *, in_plan: bool = False, in_nhwc: bool = False) -> Selection:
    """Who runs this problem, and how. "auto": the measured winner where there is one, else the fixed order.

    A backend asked for by name takes its best measured config. in_plan: the weight is packed once for many calls, and x
    may lie in row space. in_nhwc: but this x cannot, so the best measured without it counts; as ever outside plans.
    BackendError when the backend is unknown or cannot run this.
    """
    candidates, in_nhwc = _REGISTRY[problem.op], in_nhwc or not in_plan
    if backend == "auto":
        return _measured_winner(problem, in_plan, in_nhwc) or fixed_order(problem, in_plan)
    if backend not in candidates:
        raise BackendError(
            f"unknown backend {backend!r} for {problem.op}; known ones are auto, {', '.join(candidates)}."
        )
    chosen = candidates[backend]
    reason = chosen.why_not(problem)
    if reason is not None:
        raise BackendError(
            f"backend {backend!r} cannot run this: {reason}. Use backend='eager' or 'auto'. The problem: {problem}."
        )
    choice = winners.lookup(problem, backend, in_nhwc) if chosen.configs else None
    config = choice and _config(chosen, problem, choice)
    if choice is None or config is None or _why_not_here(chosen, config, choice, in_plan, in_nhwc):
        return Selection(chosen, None, BY_NAME)
    return Selection(chosen, config, f"{BY_NAME}; {choice.source}")


def fixed_order(problem: Problem, in_plan: bool = False) -> Selection:
    """The first backend that may run unmeasured on this device and can."""
    candidates = _REGISTRY[problem.op]
    for candidate in candidates.values():
        if problem.device not in candidate.auto or candidate.only_packed > in_plan:
            continue
        if candidate.why_not(problem) is None and candidate.pays(problem):
            return Selection(candidate)
    return Selection(candidates["eager"])


def _measured_winner(problem: Problem, in_plan: bool, in_nhwc: bool) -> Optional[Selection]:
    """None without a measurement; the fixed order, with the reason, where the winner cannot be had here."""
    choice = winners.lookup(problem, in_nhwc=in_nhwc)
    if choice is None:
        if problem.device == "cuda" and problem.device not in winners.warned and _has_configs(problem):
            winners.warn_untuned(problem)
        return None
    backend = _REGISTRY[problem.op].get(choice.backend)
    reason = "there is no such backend" if backend is None else backend.why_not(problem)
    if reason is None and backend is not None and backend.only_packed > in_plan:
        reason = "only a plan packs its weight once"
    config = None if backend is None or reason is not None else _config(backend, problem, choice)
    if reason is None and config is None and choice.config is not None:
        reason = "it has no such config any more"
    if reason is None and backend is not None:
        reason = _why_not_here(backend, config, choice, in_plan, in_nhwc)
    if backend is None or reason is not None:
        source = f"{FIXED_ORDER}; {choice.source}: {choice.backend}, but {reason}"
        return fixed_order(problem, in_plan)._replace(source=source)
    return Selection(backend, config, choice.source)


def _why_not_here(backend: Backend, config: Any, choice: winners.Choice, in_plan: bool, in_nhwc: bool) -> Optional[str]:
    """Why what was measured would not be as fast at this place, or None."""
    if in_nhwc and backend.reads_row_space(config):
        return "its time is for x in row space, where it does not lie here"
    if not in_plan and choice.time_us < backend.launch_us(config):
        return "outside a frozen plan its launch takes longer than the kernel"
    return None


def _has_configs(problem: Problem) -> bool:
    candidates = _REGISTRY[problem.op].values()
    return any(backend.configs is not None and backend.why_not(problem) is None for backend in candidates)


def _config(backend: Backend, problem: Problem, choice: winners.Choice) -> Optional[Any]:
    if choice.config is None:
        return backend.default_config and backend.default_config(problem)
    return _config_of(backend, problem, tuple(sorted(choice.config.items())))


@functools.lru_cache(maxsize=8192)
def _config_of(backend: Backend, problem: Problem, fields: tuple) -> Optional[Any]:
    """The config with these fields, if the backend still has it: what comes from a file runs only if it is legal."""
    configs = backend.legal or backend.configs
    return next((found for found in (configs(problem) if configs else ()) if found._asdict() == dict(fields)), None)
