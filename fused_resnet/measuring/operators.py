"""Operators: every distinct convolution and block-ending addition of a network, on every backend that can run it."""

from __future__ import annotations

import collections
import functools
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import nn

from fused_resnet import backends, choosing, testing
from fused_resnet.choosing import timing
from fused_resnet.choosing.candidates import why_not_timed
from fused_resnet.choosing.cases import (
    Prepared,
    compared_case,
    error_ratio,
    finite,
    folded_operands,
    in_order,
    order_of,
    random_operands,
)
from fused_resnet.choosing.planned import planned_call
from fused_resnet.choosing.timing import Progress, silent
from fused_resnet.freezing.make import planned_problems
from fused_resnet.machine.errors import why_missing
from fused_resnet.measuring import rooflines
from fused_resnet.measuring.summary import COPY, FOLDED, UNFUSED, Row
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import AddReluProblem, ConvProblem, Problem, short_name


class CountedProblem(NamedTuple):
    """A problem and how often a model has it."""

    problem: ConvProblem
    repeats: int


def convs_of(
    model: nn.Module, image_shape: Sequence[int], batch: int, dtype: torch.dtype, device: str
) -> list[CountedProblem]:
    """The distinct fused convolutions of the plan that `freeze` makes on this device in this dtype, by first use."""
    example = torch.empty(batch, *image_shape)
    counts = collections.Counter(planned_problems(model.eval(), example, dtype, torch.device(device)))
    return [CountedProblem(problem, count) for problem, count in counts.items()]


def op_subjects(
    networks: Mapping[str, tuple[nn.Module, Sequence[int]]],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    device: str,
) -> list[OperatorSubject]:
    """The distinct convolutions of these networks and the additions that end their blocks, for each dtype and batch.

    networks: (model, image shape) by name. A problem that several of them have is measured once. Batches and dtypes
    are taken in the order given, so that what matters most can come first.
    """
    subjects = []
    for dtype in dtypes:
        for batch in batches:
            counts: dict[Problem, dict[str, int]] = {}
            for name, (model, shape) in networks.items():
                _count(counts, name, convs_of(model, shape, batch, dtype, device))
            subjects += [OperatorSubject(problem, models, device) for problem, models in counts.items()]
    if not subjects:
        raise ValueError(f"bench ops: {', '.join(networks)} have no convolution that can be fused.")
    return subjects


def _count(counts: dict[Problem, dict[str, int]], network: str, convs: Sequence[CountedProblem]) -> None:
    """Add a network's convolutions, and the additions that end its blocks."""
    for problem, repeats in convs:
        counts.setdefault(problem, {})[network] = repeats
        if problem.has_residual:
            addition = AddReluProblem(problem.output_shape, True, problem.dtype, problem.device)
            models = counts.setdefault(addition, {})
            models[network] = models.get(network, 0) + repeats


def op_variants(problem: ConvProblem, live: ConvOperands) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Every way to compute a convolution, and why the others cannot.

    UNFUSED is eager conv, BN, add and activation, one after the other. FOLDED is the same with BN folded. The others
    are the backends as a frozen plan runs them, with packed weights and the config that is tuned for this device.
    """
    eager, folded = backends.known("conv_bn_act")["eager"], folded_operands(live, has_bias=problem.has_bias)
    unfolded = problem._replace(has_bn=True, has_bias=False)
    folded_case, live_case = compared_case(problem, folded), compared_case(unfolded, live)
    found = {
        UNFUSED: Prepared(lambda: eager.run(unfolded, live), live_case, "eager"),
        FOLDED: Prepared(lambda: eager.run(problem, folded), folded_case, "eager"),
    }

    skipped = why_not_timed(problem)
    for name, backend in backends.known("conv_bn_act").items():
        if backend.origin != "torch" and name not in skipped:
            planned = planned_call(problem, choosing.select(problem, name, in_plan=True), folded)
            found[name] = Prepared(planned.call, folded_case, name)
    return found, skipped


def add_relu_variants(problem: AddReluProblem, device: str) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Every way to compute max(a + b, 0), and COPY: moving as many bytes from one place to another."""
    generator = torch.Generator(device=device).manual_seed(0)
    images, *image = problem.shape
    a, b = (
        in_order(torch.randn(2, *image, generator=generator, device=device).to(problem.dtype), order_of(images))
        for _ in range(2)
    )
    source = torch.cat([a.flatten(), b.flatten()])[: problem.numel + problem.numel // 2]
    target = torch.empty_like(source)
    operands = testing.AddReluOperands(a[:2], b[:2], b[:2])
    case = testing.Case(problem._replace(shape=tuple(operands.a.shape)), operands)
    found = {
        UNFUSED: Prepared(lambda: torch.relu(a + b), case, "eager"),
        COPY: Prepared(lambda: target.copy_(source), None, COPY),
    }
    skipped = why_not_timed(problem)
    for name, backend in backends.known("add_relu").items():
        if name not in skipped:
            run = functools.partial(backend.run, problem, a, b)
            found[FOLDED if backend.origin == "torch" else name] = Prepared(run, case, name)
    return found, skipped


class OperatorSubject(NamedTuple):
    """A convolution or addition, timed as every backend runs it. models: how often each network has it."""

    problem: Problem
    models: Mapping[str, int]
    device: str

    @property
    def name(self) -> str:
        return f"add_relu {self.problem}" if self.problem.op == "add_relu" else str(self.problem)

    def measured(self, budget_s: float, rounds: Optional[int] = None, progress: Progress = silent) -> Row:
        """Verify, then time, every variant.

        A kernel that misses reference.error_bound, or raises, is not timed. The baselines (unfused, folded, cuDNN) are
        timed in any case; their error stands beside the time.
        """
        problem = self.problem
        if isinstance(problem, ConvProblem):
            prepared, skipped = op_variants(problem, random_operands(problem, self.device))
        elif isinstance(problem, AddReluProblem):
            prepared, skipped = add_relu_variants(problem, self.device)
        else:
            raise TypeError(f"{problem.op} is not measured: conv_bn_act and add_relu are.")
        progress(0.1, "comparing with fp64")
        ratios, failed = _ratios(prepared)
        baselines = (UNFUSED, FOLDED, COPY, "cudnn")
        not_timed = {name: finite(ratio) for name, ratio in ratios.items() if ratio > 1 and name not in baselines}
        calls = {name: one.run for name, one in prepared.items() if name in ratios and name not in not_timed}
        with torch.no_grad():
            stats = timing.interleaved(calls, device=self.device, budget_s=budget_s, rounds=rounds, graphs=True)
        roof = rooflines.roofline(self.device, problem.dtype)
        flops = problem.flops if isinstance(problem, ConvProblem) else 0
        least_us = roof.time_us(problem)
        chosen = choosing.select(problem, in_plan=True)
        return {
            "op": problem.op,
            "device": problem.device,
            "batch": problem.shape[0] if isinstance(problem, AddReluProblem) else problem.N,
            "dtype": short_name(problem.dtype),
            "models": dict(self.models),
            "count": sum(self.models.values()),
            "gflop": flops / 1e9,
            "mbytes": problem.bytes_moved / 1e6,
            "roofline": roof.as_dict(),
            "least_us": least_us,
            "auto": chosen.backend.name,
            "auto_config": None if chosen.config is None else chosen.config._asdict(),
            "auto_source": chosen.source,
            "variants": {
                name: {
                    **one._asdict(),
                    "tflops": flops / one.median_us / 1e6,
                    "gb_per_s": problem.bytes_moved / one.median_us / 1e3,
                    "roofline_percent": 100 * least_us / one.median_us,
                    "error_ratio": finite(ratios[name]),
                    "speedup": stats[UNFUSED].median_us / one.median_us,
                }
                for name, one in stats.items()
            },
            "not_timed": not_timed,
            "failed": failed,
            "skipped": skipped,
        }


def _ratios(prepared: Mapping[str, Prepared]) -> tuple[dict[str, float], dict[str, str]]:
    """(error ratios, why the others raised): a backend that breaks costs the others nothing."""
    ratios, failed = {}, {}
    for name, one in prepared.items():
        try:
            ratios[name] = error_ratio(one)
        except Exception as error:
            if name == UNFUSED:
                raise  # there is nothing to compare with
            failed[name] = why_missing(error)
    return ratios, failed


def mismatches(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was wrong, by row: the error ratio of a result (None where it is no number), or what was raised."""
    return [
        {"problem": row["problem"], "variant": name, "error_ratio": ratio, "raised": raised}
        for row in rows
        for name, (ratio, raised) in {
            **{name: (ratio, None) for name, ratio in row["not_timed"].items()},
            **{name: (None, reason) for name, reason in row["failed"].items()},
        }.items()
    ]
