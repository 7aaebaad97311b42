"""Blocks and whole models: each variant compared with fp64, then timed in turn with the others."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from fused_resnet.choosing.cases import finite
from fused_resnet.choosing.timing import Progress, Variants, interleaved, silent
from fused_resnet.machine.errors import why_missing
from fused_resnet.measuring.rivals import nhwc, plain
from fused_resnet.measuring.summary import BASE, Row
from fused_resnet.measuring.variants import (
    DEFAULT_BASELINES,
    build_variants,
    variant_builders,
)
from fused_resnet.operators.problem import SHORT_DTYPES, short_name


def calibrated(model: nn.Module, image_shape: Sequence[int], *, batch: int = 4, seed: int = 0) -> nn.Module:
    """Give a randomly initialised model the BN statistics of random images, so that its activations are sane.

    The last BN of each residual block scales by a quarter. By 1, the depth of a random ResNet-50 amplifies rounding as
    no trained network does: bf16 logits off by 13 % instead of 1.5 % (one image batch, on a CPU). Then one forward in
    training mode; the model is returned in eval mode with its BN momenta as they were.
    """
    for block in model.modules():
        if hasattr(block, "downsample"):  # torchvision's and timm's residual blocks have it, too
            last: Any = getattr(block, "bn3", None) or getattr(block, "bn2", None)
            if last is not None:
                nn.init.constant_(last.weight, 0.25)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    images = torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.train()(images.to(next(model.parameters()).device))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()


def blocks_of(model: nn.Module, image_shape: Sequence[int]) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """(name, last residual block, its input's (C, H, W)) of each stage of a model: identity shortcuts."""
    shapes: dict[str, tuple[int, ...]] = {}
    skeleton = copy.deepcopy(model).to("meta").eval()
    stages = {name: stage for name, stage in model.named_children() if isinstance(stage, nn.Sequential) and len(stage)}
    for name, stage in stages.items():
        block = skeleton.get_submodule(f"{name}.{len(stage) - 1}")
        block.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: tuple(args[0].shape[1:])}))
    with torch.no_grad():
        skeleton(torch.empty(1, *image_shape, device="meta"))
    return [(f"{name}.{len(stage) - 1}", stage[-1], shapes[name]) for name, stage in stages.items()]


def max_error(model: nn.Module, x: Tensor, variants: Variants) -> dict[str, Optional[float]]:
    """Per variant, max|y - y64| / max|y64| over the first and the last image; y64 is the model in fp64 on the CPU.

    None for a variant whose output is not finite, or that raises.
    """
    errors, broken = _errors(model, x, variants)
    return {name: errors.get(name) for name in variants}


def _errors(model: nn.Module, x: Tensor, variants: Variants) -> tuple[dict[str, Optional[float]], dict[str, str]]:
    """(max_error of the variants that run, why the others do not): one that breaks does not cost the others."""
    ends = [0, -1] if len(x) > 1 else [0]
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().double()(x[ends].cpu().double())
    scale = expected.abs().max()
    errors, broken = {}, {}
    for name, run in variants.items():
        try:
            errors[name] = finite(((run()[ends].cpu().double() - expected).abs().max() / scale).item())
        except Exception as error:
            if name == BASE:
                raise  # there is nothing to compare with
            broken[name] = why_missing(error)
    return errors, broken


def most_error(dtype: torch.dtype, of_plain: Optional[float]) -> float:
    """The largest `max_error` that a right variant makes in this dtype, where the plain model in it makes `of_plain`.

    Four times as much, as other orders of the same sums; in fp32 ten times that, since Winograd amplifies roundings.
    The plain model may be right by luck, or wrong as libraries are: it counts as one rounding at least, and as a tenth
    at most, in fp32 as 1e-4. of_plain: None where its result is not finite. No plain model computes in int8, whose
    roundings add up to some percent: what errs by a quarter is another network.
    """
    if dtype == torch.int8:
        return 0.25
    is_fp32 = dtype == torch.float32
    known = min(1e-4 if is_fp32 else 0.1, math.inf if of_plain is None else of_plain)
    return (40 if is_fp32 else 4) * max(torch.finfo(dtype).eps / 2, known)


def _wrong(
    model: nn.Module, x: Tensor, dtypes: Sequence[torch.dtype], errors: dict[str, Optional[float]]
) -> dict[str, str]:
    """Why, by name, of the variants that err too much in their dtype."""
    wrong = {}
    for dtype in dtypes:
        of_plain = None
        if dtype.is_floating_point:
            eager = plain(nhwc(model, dtype), x.to(dtype, memory_format=torch.channels_last))
            of_plain = max_error(model, x, {"eager": eager})["eager"]
        limit = most_error(dtype, of_plain)
        for name, error in errors.items():
            if short_name(dtype) in name.split() and not (error is not None and error <= limit):
                shown = "its result is not finite" if error is None else f"its error is {error:.3g}"
                wrong[name] = f"{shown}, and {limit:.3g} is allowed"
    if BASE in wrong:
        raise RuntimeError(f"{BASE} is wrong itself: {wrong[BASE]}")
    return wrong


class NetworkSubject(NamedTuple):
    """A model or block in fp32, and the ways to run it that are timed in turn.

    shape: the input's, batch first. dtypes and what follows: as `variant_builders` takes them. only_right: a variant
    that errs by more than `most_error` is listed as wrong, not timed. pause_s and repeats: as `interleaved` says.
    """

    name: str
    model: nn.Module
    shape: Sequence[int]
    device: str
    dtypes: Sequence[torch.dtype]
    baselines: Sequence[str] = DEFAULT_BASELINES
    frozen_backends: Sequence[str] = ("auto",)
    with_fused: bool = False
    only_right: bool = False
    pause_s: float = 0.0
    repeats: int = 0

    def measured(self, budget_s: float, rounds: Optional[int] = None, progress: Progress = silent) -> Row:
        """{"batch", "variants", "skipped"}, of random images; with only_right {"wrong": {name: why}}, too.

        Ratios are speedups: "ratio" to eager NCHW fp32, "ratio_to_compile" to torch.compile in the variant's own
        dtype, None without it.
        """
        x = torch.randn(*self.shape, device=self.device)
        builders = variant_builders(
            self.model, x, dtypes=self.dtypes, baselines=self.baselines, frozen_backends=self.frozen_backends,
            with_fused=self.with_fused,
        )  # fmt: skip
        variants, skipped = build_variants(builders, lambda fraction, text: progress(fraction / 2, text))
        progress(0.5, "comparing with fp64")
        errors, broken = _errors(self.model, x, variants)
        skipped |= broken
        wrong = _wrong(self.model, x, self.dtypes, errors) if self.only_right else {}
        variants = {name: run for name, run in variants.items() if name in errors and name not in wrong}
        stats = interleaved(
            variants, device=self.device, budget_s=budget_s, rounds=rounds, pause_s=self.pause_s,
            repeats=self.repeats,
            progress=lambda fraction, text: progress(0.5 + fraction / 2, text),
        )  # fmt: skip
        rows = {}
        for name, one in stats.items():
            own_compile = next((f"compile {word}" for word in name.split() if word in SHORT_DTYPES), "")
            rows[name] = {
                **one._asdict(),
                "ms": one.median_us / 1e3,
                "images_per_s": len(x) / one.median_us * 1e6,
                "ratio": stats[BASE].median_us / one.median_us,
                "ratio_to_compile": stats[own_compile].median_us / one.median_us if own_compile in stats else None,
                "max_rel_error": errors[name],
            }
        found = {"batch": len(x), "variants": rows, "skipped": skipped}
        return {**found, "wrong": wrong} if self.only_right else found
