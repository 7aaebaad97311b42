"""Convolutions of quantized tensors: operands for them, and which kernel of a GPU computes one."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.backends import BackendError
from fused_resnet.choosing import winners
from fused_resnet.choosing.case import synchronize
from fused_resnet.choosing.cases import in_order, order_of
from fused_resnet.choosing.choice import BY_NAME, Selection
from fused_resnet.choosing.decide import Tuning, is_on
from fused_resnet.choosing.winners_file import Table
from fused_resnet.machine.errors import is_out_of_memory, one_line
from fused_resnet.operators import float8, near_bytes, quantized
from fused_resnet.operators.operands import Int8Operands
from fused_resnet.operators.problem import BYTE_DTYPES, FLOAT8, ConvProblem
from fused_resnet.operators.quantized import LARGEST_FLOAT8, Epilogue

_ORDER = "the first that is right here"
_SAMPLE = ConvProblem(
    1, 64, 8, 8, 64, 1, 1, (1, 1), (0, 0), (1, 1), 1, "relu", False, True, False, torch.uint8, "cuda"
)  # fmt: skip


def why_none(dtype: torch.dtype, device: str, asked: str = "auto") -> Optional[str]:
    """Why no kernel here computes such convolutions on a kind of device, or None. dtype: int8 or float8_e4m3fn.

    asked: the name of the only backend to ask, instead of "auto".
    """
    problem = _SAMPLE._replace(dtype=dtype, device=device)
    return why_not(problem) if asked == "auto" else backends.known(problem.op)[asked].why_not(problem)


def why_not(problem: ConvProblem) -> Optional[str]:
    """Why no backend can run this, or None."""
    reasons = {name: backend.why_not(problem) for name, backend in backends.known(problem.op).items()}
    if None in reasons.values():
        return None
    mine = {name: reason for name, reason in reasons.items() if not str(reason).startswith("it runs on")}
    return "; ".join(f"{name}: {reason}" for name, reason in mine.items())


def first_right(problem: ConvProblem, device: torch.device, tuning: Tuning, asked: str = "auto") -> Selection:
    """The first backend in the order of registration that can run this and does it right on this very machine.

    What was found is kept. Where nothing may be checked it is the first that is not known to be wrong. asked: the name
    of the only one to take. Raises BackendError where none is right.
    """
    is_known = winners.device_id(device.type) is not None
    may_check = is_known and is_on() and tuning.tune is not False
    wrong = []
    for backend in backends.known(problem.op).values():
        if asked not in ("auto", backend.name) or backend.why_not(problem) is not None:
            continue
        one = Selection(backend, backend.plan.config(problem), _ORDER if asked == "auto" else BY_NAME)
        outcome = winners.outcome(problem, str(one)) if is_known else None
        if outcome is None and not may_check:
            return one
        if outcome is None:
            tuning.progress(1.0, f"checking {one} on {problem}")
            outcome = _checked(problem, one, device)
            keep = winners.keep_here if outcome.get("is_passing") else winners.keep
            table = Table.empty(str(winners.device_id(device.type)))
            keep(table._replace(checks=winners.checks_of(problem, {str(one): outcome})))
        if (why := winners.why_wrong(outcome)) is None:
            return one
        wrong.append(f"{one}: {why}")
    raise BackendError(f"freeze: no kernel computes {problem} right here ({'; '.join(wrong)}). Freeze in bfloat16.")


def _checked(problem: ConvProblem, selection: Selection, device: torch.device) -> dict[str, Any]:
    """As `winners` keeps it. Want of memory says nothing of the kernel."""
    try:
        why = why_wrong(problem, selection, device)
    except Exception as error:
        if is_out_of_memory(error):
            return {"error_ratio": 0.0, "is_passing": True}
        return {"why": one_line(error), "is_passing": True}
    return {"error_ratio": 0.0} if why is None else {"why": why}


def why_wrong(problem: ConvProblem, selection: Selection, device: torch.device) -> Optional[str]:
    """What a kernel gives wrong on a batch of two images in turn: any other byte, or what is beyond its bound.

    A residual is looked at in u8 and in s8.
    """
    seeds = BYTE_DTYPES if problem.has_residual and problem.dtype != FLOAT8 else BYTE_DTYPES[:1]
    return next((why for seed in range(len(seeds)) if (why := _why_wrong(problem, selection, device, seed))), None)


def _why_wrong(problem: ConvProblem, selection: Selection, device: torch.device, seed: int) -> Optional[str]:
    two = quantized_operands(problem._replace(N=2), seed)
    order = order_of(problem.N)
    residual = None if two.residual is None else in_order(two.residual, order)
    operands = two._replace(x=in_order(two.x, order), residual=residual).map(lambda tensor: tensor.to(device))
    actual = selection.run(problem, operands)
    synchronize(device)
    p, o = problem._replace(N=2), two
    if p.dtype == FLOAT8 or selection.backend.rounding.near_bytes:
        bounds, name = (float8, "e4m3") if p.dtype == FLOAT8 else (near_bytes, "bytes")
        error = (actual.cpu().double() - bounds.exact(p, o)[order]).abs()
        return None if (error <= bounds.error_bound(p, o)[order]).all() else f"a value is beyond the bound of {name}"
    window = (p.stride, p.padding, p.dilation, p.groups)
    expected = quantized.conv_act(o.x, o.weight, o.epilogue, *window, o.residual)
    wrong = int((actual.cpu() != expected[order]).sum())
    return f"{wrong} of {actual.numel()} bytes differ from the reference" if wrong else None


def quantized_operands(problem: ConvProblem, seed: int = 0) -> Int8Operands:
    """Bytes of all values, and constants by which results fill the output's bytes; channels_last. Or e4m3 throughout,
    as a network's values are kept in it."""
    if problem.dtype == FLOAT8:
        return _float8_operands_of(problem, seed)
    p, generator = problem, torch.Generator().manual_seed(seed)

    def image(dtype: torch.dtype, *shape: int) -> Tensor:
        least, most = (0, 255) if dtype == torch.uint8 else (-128, 127)
        drawn = torch.randint(least, most + 1, shape, generator=generator)
        return drawn.to(dtype).contiguous(memory_format=torch.channels_last)

    x, weight = image(p.dtype, p.N, p.C, p.H, p.W), image(torch.int8, p.K, p.C // p.groups, p.R, p.S).clamp(min=-127)
    spread = (147 if p.dtype == torch.uint8 else 74) * 74 * p.reduction**0.5  # of a sum
    multiplier = (torch.rand(p.K, generator=generator) + 0.5) * 60 / spread
    is_signed = p.activation == "none"
    low, high = (-128.0, 127.0) if is_signed else (0.0, 200.4 if p.activation == "relu6" else 255.0)
    bias = torch.randn(p.K, generator=generator) * 30 + (0 if is_signed else 60)
    epilogue = Epilogue(multiplier, bias, 0.37 if p.has_residual else 0.0, low, high, p.output_dtype)
    residual = image(BYTE_DTYPES[seed % 2], *p.output_shape) if p.has_residual else None
    return Int8Operands(x, weight, epilogue, residual)


def _float8_operands_of(problem: ConvProblem, seed: int) -> Int8Operands:
    p, generator = problem, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        """Normal values of which the largest are at the limit."""
        values = torch.randn(shape, generator=generator) * (LARGEST_FLOAT8 / 4)
        return values.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8).contiguous(memory_format=torch.channels_last)

    x, weight = draw(p.N, p.C, p.H, p.W), draw(p.K, p.C // p.groups, p.R, p.S)
    spread = (LARGEST_FLOAT8 / 4) ** 2 * p.reduction**0.5  # of a sum
    multiplier = (torch.rand(p.K, generator=generator) + 0.5) * 110 / spread
    low = -LARGEST_FLOAT8 if p.activation == "none" else 0.0
    high = 200.4 if p.activation == "relu6" else LARGEST_FLOAT8
    bias = torch.randn(p.K, generator=generator) * 40
    epilogue = Epilogue(multiplier, bias, 0.37 if p.has_residual else 0.0, low, high, FLOAT8)
    return Int8Operands(x, weight, epilogue, draw(*p.output_shape) if p.has_residual else None)
