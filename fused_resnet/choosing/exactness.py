"""Whether an int8 region gives the bytes of the contract on this machine: compared once with the reference."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import torch
from torch import Tensor

from fused_resnet.backends import BackendError
from fused_resnet.choosing import winners
from fused_resnet.choosing.cases import in_order, order_of
from fused_resnet.choosing.decide import Tuning, is_on
from fused_resnet.choosing.piece import RegionProblem
from fused_resnet.choosing.region_checks import REGION, keep_check
from fused_resnet.machine.errors import is_out_of_memory, one_line
from fused_resnet.operators.quantized import Epilogue
from fused_resnet.regions import kernels
from fused_resnet.regions.exact import run_reference
from fused_resnet.regions.fragment import ConvStep, Fragment
from fused_resnet.regions.program import CompiledRegion, fits_int32


def check(
    fragment: Fragment,
    weights: Mapping[int, Tensor],
    epilogues: Mapping[int, Epilogue],
    compiled: CompiledRegion,
    tuning: Tuning,
) -> None:
    """Compare all outputs of an int8 region with the reference, unless that is known or nothing may be checked.

    Raises BackendError where a single value differs.
    """
    if tuning.tune is False or not is_on() or winners.device_id("cpu") is None:
        return
    kernel = kernels.fastest_name(torch.int8)
    text = f"{fragment.text}, ends {_ends(fragment, epilogues)} by {kernel}"
    problem = RegionProblem(fragment.shapes[0][0], text, torch.int8, "cpu")
    outcome = winners.outcome(problem, REGION)
    if outcome is None:
        tuning.progress(1.0, f"checking a {problem}")
        outcome = _checked(fragment, weights, epilogues, compiled, kernel)
        keep_check(problem, outcome)
    if (why := winners.why_wrong(outcome)) is not None:
        raise BackendError(
            f"freeze: the int8 kernel {kernel} is wrong on this machine: {why}, in a {problem}. Set "
            "FUSED_RESNET_CPU_ISA to a smaller instruction set (docs/environment.md), or freeze in bfloat16."
        )


def _ends(fragment: Fragment, epilogues: Mapping[int, Epilogue]) -> str:
    """A digit for each convolution: what of its scales decides which instructions a kernel takes."""
    found = ""
    for place, step in enumerate(fragment.steps):
        if isinstance(step, ConvStep) and not step.is_linear:
            epilogue = epilogues[place]
            found += str(2 * fits_int32(epilogue, step.problem.reduction) + (epilogue.high == 255))
    return found


def _checked(
    fragment: Fragment,
    weights: Mapping[int, Tensor],
    epilogues: Mapping[int, Epilogue],
    compiled: CompiledRegion,
    kernel: str,
) -> dict[str, Any]:
    """As `winners` keeps it: no error, or why it is wrong. Want of memory says neither, and what else it raises is
    wrong for this process alone."""
    try:
        why = _difference(fragment, weights, epilogues, compiled, kernel)
    except Exception as error:
        if is_out_of_memory(error):
            return {"error_ratio": 0.0, "is_passing": True}
        return {"why": one_line(error), "is_passing": True}
    return {"error_ratio": 0.0} if why is None else {"why": why}


def _difference(
    fragment: Fragment,
    weights: Mapping[int, Tensor],
    epilogues: Mapping[int, Epilogue],
    compiled: CompiledRegion,
    kernel: str,
) -> Optional[str]:
    """What differs, if anything: over a whole batch of two images in turn, which hold values beyond the scales too."""
    images, first = _images(fragment), order_of(fragment.shapes[0][0])
    expected = run_reference(fragment, weights, epilogues, images)
    workspace = compiled.empty_workspace()
    for order in (first, 1 - first):
        inputs = [in_order(x, order) for x in images]
        kept = [x.clone() for x in inputs]
        actual = compiled(inputs, workspace.fill_(0xFF), kernel)
        if not all(map(torch.equal, inputs, kept)):
            return "it writes into its input"
        for index, (ours, theirs) in enumerate(zip(actual, expected)):
            if wrong := int((ours.flatten(1) != theirs.flatten(1)[order]).sum()):
                return f"{wrong} of {ours.numel()} values of output {index} differ from the reference"
    return None


def _images(fragment: Fragment) -> list[Tensor]:
    """Two images of each input: the first within its scale, the second beyond it."""
    generator, found = torch.Generator().manual_seed(0), []
    for (_, *shape), how in zip(fragment.shapes, fragment.scales):
        assert how is not None
        values = torch.randn(2, *shape, generator=generator) * (how.scale * how.high / 3)
        values[1] *= 4
        found.append(values if how.is_signed else values.abs())
    return found
