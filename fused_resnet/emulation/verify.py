"""Random problems on the emulated kernels, against the fp64 reference: what `fused-resnet verify --emulate` runs.

A problem follows from (seed, index), as in `fused_resnet.testing`, and so do its config and how the emulator runs it.
"""

from __future__ import annotations

import random
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from fused_resnet.choosing.case import AddReluOperands, Case
from fused_resnet.emulation import library
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from fused_resnet.emulation.kernel import Outcome as Ran
from fused_resnet.kernels.triton.conv import configs
from fused_resnet.operators import layout
from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import BYTE_DTYPES, FLOAT8, AddReluProblem, ConvProblem
from fused_resnet.testing import Outcome, Report, case_at
from fused_resnet.testing.compare import exact, identical, same_bytes, within_bound

ARCHITECTURES = (80, 89, 90)
KERNELS = (*(f"triton/{form}" for form in configs.FORMS), "triton/add_relu", "cuda/conv_bn_act", "cuda/add_relu")
_MOST_SPLITS = 4
# A problem of this many tiles and steps takes the emulator seconds
_MOST_TILE_STEPS = 400


def why_not(kernels: Sequence[str] = ()) -> Optional[str]:
    """Why none of these kernels can be emulated in this process, or None."""
    if reason := library.why_missing():
        return reason
    reasons = [_WHY_NOT[maker]() for maker in dict.fromkeys(name.split("/")[0] for name in chosen_kernels(kernels))]
    return None if None in reasons else "; ".join(filter(None, reasons)) + "."


def _why_no_triton() -> Optional[str]:
    from fused_resnet.kernels.triton import aot

    return aot.cannot_compile()


def _why_no_cuda() -> Optional[str]:
    from fused_resnet.emulation import cuda_launches

    return cuda_launches.why_not()


_WHY_NOT = {"triton": _why_no_triton, "cuda": _why_no_cuda}


def chosen_kernels(names: Sequence[str]) -> tuple[str, ...]:
    """Those of KERNELS that are named, whole, or by one of their halves; no names, all."""
    return tuple(known for known in KERNELS if not names or {known, *known.split("/")} & set(names))


def known_names() -> tuple[str, ...]:
    """Whatever `chosen_kernels` understands."""
    return tuple(dict.fromkeys(part for known in KERNELS for part in (*known.split("/"), known)))


def verify(
    problems: Union[int, range], seed: int = 0, arch: int = 90, kernels: Sequence[str] = (),
    progress: Optional[Callable[[int], None]] = None, *, kind: str = "any",
) -> Report:  # fmt: skip
    """Run random problems and hold each result against the reference.

    problems: how many, or which indices. kernels: names, as `chosen_kernels` reads them. kind: as
    `testing.random_case`. progress: called with the index of each finished problem.
    """
    report = Report(seed, f"emulated sm_{arch}")
    for index in range(problems) if isinstance(problems, int) else problems:
        case = case_at(seed, index, kind=kind)
        for name in chosen_kernels(kernels):
            if is_for(name, case):
                call = f"check({seed}, {index}, {arch}, {name!r}, kind={kind!r})"
                report.add(name, check(seed, index, arch, name, kind=kind), call, case)
        report.problems += 1
        if progress is not None:
            progress(index)
    return report


def is_for(kernel: str, case: Case) -> bool:
    """Whether the kernel computes this case's operator."""
    return kernel.endswith("add_relu") == isinstance(case.problem, AddReluProblem)


# ---------------------------------------------------------------------------------------------------------- one problem


def check(seed: int, index: int, arch: int, kernel: str, *, kind: str = "any") -> Outcome:
    """The problem of this number on this kernel: in a config, and a way of running it, that are drawn too."""
    if arch < 90 and kernel.endswith("_tma"):
        return Outcome(kernel, "cannot run", f"sm_{arch} has no TMA")
    case = case_at(seed, index, kind=kind)
    if case.problem.dtype == torch.float64:
        return Outcome(kernel, "cannot run", "float64 is not supported")
    rng = random.Random(f"{seed}/{index}/{kernel}/{arch}")
    how = dict(landing=rng.choice(LANDINGS), schedule=rng.choice(SCHEDULES), seed=rng.getrandbits(32))
    if isinstance(case.problem, AddReluProblem):
        return _check_add_relu(case, arch, kernel, how)
    # on a GPU fp32 is multiplied in TF32 where torch allows it: the kernels and the bound ask that of the problem
    problem = case.problem._replace(device="cuda")
    return _check_conv(Case(problem, case.operands), arch, kernel, rng, how)


def _check_conv(case: Case, arch: int, kernel: str, rng: random.Random, how: dict[str, Any]) -> Outcome:
    p = case.problem
    assert isinstance(p, ConvProblem) and isinstance(case.operands, (ConvOperands, Int8Operands))
    is_int8 = p.dtype in BYTE_DTYPES
    operands = layout.all_channels_last(case.operands)
    if not p.N:
        return Outcome(kernel, "cannot run", "an output without elements launches nothing")
    maker, form = kernel.split("/")
    if reason := _WHY_NOT[maker]():
        return Outcome(kernel, "cannot run", reason)
    config, reason = _DRAWN[maker](p, arch, form, rng)
    if config is None:
        return Outcome(kernel, "cannot run", reason)
    label = f"{tuple(config)} {how}"
    before = operands.map(Tensor.clone)
    poison: dict[str, Any] = {"out": layout.channels_last(~case.expected)} if is_int8 else {}
    if p.dtype == FLOAT8:
        poison["rounding"] = arch  # the bound is of what these tensor cores lose
    try:
        out, outcomes = _RUN_CONV[maker](p, operands, arch, config, {**how, **poison})
    except Exception as error:  # whatever compiles, parses or runs
        return Outcome(kernel, "mismatch", f"{label}: {type(error).__name__}: {error}")
    pairs = zip(operands._fields, before, operands)
    changed = [
        name
        for name, was, now in pairs
        if isinstance(was, Tensor) and isinstance(now, Tensor) and not identical(was, now)
    ]
    if changed:
        return Outcome(kernel, "mismatch", f"{label}: {', '.join(changed)} written to")
    compared = same_bytes(case, maker, out) if is_int8 else within_bound(case, maker, out.double())
    return _judged(kernel, label, outcomes, compared)


def _judged(kernel: str, label: str, outcomes: Sequence[Ran], compared: Outcome) -> Outcome:
    reports = [report for outcome in outcomes for report in outcome.reports]
    if reports:
        return Outcome(kernel, "mismatch", f"{label}: {len(reports)} reports, the first: {reports[0]}")
    if compared.status != "ok":
        return compared._replace(backend=kernel, detail=f"{label}: {compared.detail}")
    return compared._replace(backend=kernel)


def _draw_triton(p: ConvProblem, arch: int, form: str, rng: random.Random) -> tuple[Optional[Any], str]:
    """A config of the search space, also one that is not worth measuring, or why there is none."""
    reasons, legal = [], []
    for config, _ in configs.search_space(p, arch):
        if config.form != form:
            continue
        reason = configs.why_illegal(p, config, arch)
        steps = -(-p.reduction // config.BLOCK_K)
        if reason is None and configs.num_tiles(p, config) * -(-steps // config.split_k) > _MOST_TILE_STEPS:
            reason = "too many tiles and steps for an emulator"
        reasons.append(reason or "")
        if reason is None:
            legal.append(config)
    if not legal:
        return None, reasons[0] if reasons else f"{form} does not compute such problems"
    return rng.choice(legal), ""


class _CudaConfig(NamedTuple):
    tile: int
    splits: int


def _draw_cuda(p: ConvProblem, arch: int, form: str, rng: random.Random) -> tuple[Optional[Any], str]:
    from fused_resnet.emulation import cuda_launches

    if p.dtype == FLOAT8:
        return None, "csrc has no kernel of e4m3"

    tile = rng.choice(cuda_launches.tiles_for(p, arch))
    steps = -(-p.reduction * p.dtype.itemsize // 128)
    splits = rng.randint(1, min(_MOST_SPLITS, steps))
    return _CudaConfig(tile, splits if tile < cuda_launches.NUM_TILES else 1), ""


def _run_triton(p, operands, arch, config, how) -> tuple[Tensor, list[Ran]]:
    from fused_resnet.emulation import launches

    return launches.conv_bn_act(p, operands, arch, config, **how)


def _run_cuda(p, operands, arch, config, how) -> tuple[Tensor, list[Ran]]:
    from fused_resnet.emulation import cuda_launches

    return cuda_launches.conv_bn_act(p, operands, arch, config.tile, config.splits, **how)


_DRAWN = {"triton": _draw_triton, "cuda": _draw_cuda}
_RUN_CONV = {"triton": _run_triton, "cuda": _run_cuda}


def _check_add_relu(case: Case, arch: int, kernel: str, how: dict[str, Any]) -> Outcome:
    p, o = case.problem, case.operands
    assert isinstance(p, AddReluProblem) and isinstance(o, AddReluOperands)
    if not p.same_dense_layout or not p.numel:
        return Outcome(kernel, "cannot run", "no elements, or tensors that are not dense and alike")
    maker, label = kernel.split("/")[0], str(how)
    if reason := _WHY_NOT[maker]():
        return Outcome(kernel, "cannot run", reason)
    out, grad_input = torch.full_like(o.a, torch.nan), torch.full_like(o.a, torch.nan)
    grad = torch.empty_like(o.a).copy_(o.grad)
    try:
        outcomes = _ADD_RELU[maker](p, o.a, o.b, grad, out, grad_input, arch, how)
    except Exception as error:
        return Outcome(kernel, "mismatch", f"{label}: {type(error).__name__}: {error}")
    return _judged(kernel, label, outcomes, exact(case, maker, out, grad_input))


def _add_relu_triton(p, a, b, grad, out, grad_input, arch, how) -> list[Ran]:
    from fused_resnet.emulation import launches

    first = launches.run_add_relu(p, a, b, out, arch, **how)
    return [first, launches.run_add_relu(p, grad, out, grad_input, arch, backward=True, **how)]


def _add_relu_cuda(p, a, b, grad, out, grad_input, arch, how) -> list[Ran]:
    from fused_resnet.emulation import cuda_launches

    first = cuda_launches.run_add_relu(a, b, out, arch, **how)
    return [first, cuda_launches.run_add_relu(grad, out, grad_input, arch, backward=True, **how)]


_ADD_RELU = {"triton": _add_relu_triton, "cuda": _add_relu_cuda}
