"""Ways to run a whole network or block: eager, ours, and what else people can have. One name, one callable."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any, Callable, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

from fused_resnet import backends
from fused_resnet.choosing import winners
from fused_resnet.choosing.timing import Progress, Variants, silent
from fused_resnet.freezing.freeze import freeze
from fused_resnet.freezing.frozen import FrozenModel
from fused_resnet.fusing import convert
from fused_resnet.machine.errors import why_missing
from fused_resnet.measuring.rivals import (
    calibration_images,
    compiled_nhwc,
    in_onnxruntime,
    in_openvino,
    in_tensorrt,
    nhwc,
    plain,
    stitched_cudnn,
)
from fused_resnet.measuring.summary import BASE
from fused_resnet.operators.problem import short_name

BASELINES = ("eager", "folded", "compile", "autotune", "cudnn", "tensorrt", "onnxruntime", "openvino")
DEFAULT_BASELINES = BASELINES[:3]
UNTUNED, WITHOUT_REGIONS = "untuned", "without regions"  # in place of a backend's name

Builder = Callable[[], Callable[[], Any]]


def variant_builders(
    model: nn.Module,
    x: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    baselines: Sequence[str] = DEFAULT_BASELINES,
    frozen_backends: Sequence[str] = ("auto",),
    with_fused: bool = False,
) -> dict[str, Builder]:
    """Ways to run `model` on x (both fp32), by name: calling one makes the callable, which may raise or take a while.

    "eager NCHW fp32" is always there. Per dtype, as asked for:

    | name | what it is |
    | --- | --- |
    | eager NHWC | the model as it is, in channels_last memory |
    | folded | freeze with backend="eager" |
    | compile | torch.compile with freezing, on CUDA as a CUDA graph |
    | autotune | the same with max-autotune |
    | cudnn | cuDNN's fused convolutions stitched by hand into one CUDA graph |
    | tensorrt, onnxruntime, openvino | the model in these |
    | fused | `fuse` |
    | frozen | `freeze`; with UNTUNED as if nothing had been measured by `fused-resnet tune` |
    | frozen, WITHOUT_REGIONS | `freeze` without what computes blocked maps on a CPU |

    Frozen variants get x and convert it themselves; the others get it in their own dtype. In int8 all of them are
    calibrated with the same random images.
    """
    wide = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    is_on_cuda = x.device.type == "cuda"
    made_of: dict[str, Callable[[torch.dtype], Callable[[], Any]]] = {
        "eager": functools.partial(_eager_nhwc, model, wide),
        "fused": functools.partial(_fused, model, wide),
        "folded": functools.partial(_frozen, model, wide, "eager"),
        "cudnn": functools.partial(stitched_cudnn, model, wide),
        "compile": functools.partial(compiled_nhwc, model, wide, {"mode": "reduce-overhead"} if is_on_cuda else {}),
        "autotune": functools.partial(compiled_nhwc, model, wide, {"mode": "max-autotune"}),
        "tensorrt": functools.partial(in_tensorrt, model, x),
        "onnxruntime": functools.partial(in_onnxruntime, model, x),
        "openvino": functools.partial(in_openvino, model, x),
    }
    wanted = [name for name in made_of if name in baselines or (name == "fused" and with_fused)]
    builders: dict[str, Builder] = {BASE: lambda: plain(model, x)}
    for dtype in dtypes:
        short = short_name(dtype)
        for name in wanted:
            shown = "eager NHWC" if name == "eager" else name
            builders[f"{shown} {short}"] = functools.partial(made_of[name], dtype)
        for backend in frozen_backends:
            name = f"frozen {short}" if backend == "auto" else f"frozen {short} {backend}"
            builders[name] = functools.partial(_frozen, model, wide, backend, dtype)
    return builders


def build_variants(builders: dict[str, Builder], progress: Progress = silent) -> tuple[Variants, dict[str, str]]:
    """(callables, why the others are missing). One foreign compiler's failure does not cost the other variants."""
    found: Variants = {}
    skipped: dict[str, str] = {}
    torch._dynamo.reset()  # so that each shape is compiled as a static one
    for index, (name, build) in enumerate(builders.items()):
        progress(index / len(builders), f"preparing {name}")
        try:
            found[name] = build()
        except Exception as error:  # whatever a compiler that is not ours raises
            skipped[name] = why_missing(error)
    return found, skipped


def _eager_nhwc(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return plain(nhwc(model, dtype), x.to(dtype))


def _fused(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return plain(convert.fuse(nhwc(model, dtype)), x.to(dtype))


def _frozen(model: nn.Module, x: Tensor, backend: str, dtype: torch.dtype) -> Callable[[], Any]:
    special = {UNTUNED: winners.ignored, WITHOUT_REGIONS: as_before_regions}
    images = calibration_images(x) if dtype == torch.int8 else None
    with special.get(backend, contextlib.nullcontext)():
        frozen = freeze(model, x, dtype=dtype, backend="auto" if backend in special else backend, calibrate=images)
    is_nvidia = x.is_cuda and torch.version.hip is None
    if is_nvidia and isinstance(frozen, FrozenModel) and not frozen.is_graphed(x):
        raise RuntimeError("it cannot be captured as a CUDA graph")  # as `freeze` has just warned, with the reason
    return lambda: frozen(x)


@contextlib.contextmanager
def as_before_regions() -> Iterator[None]:
    """Inside, plans have no regions, and no convolution by their kernels. What else there is is measured for itself.

    So it is in a cache of its own. Where a region's kernel has won, the user's says nothing about the second best.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(winners.forget)
        stack.enter_context(mock.patch.dict(os.environ, {"FUSED_RESNET_CACHE_DIR": folder}))
        stack.enter_context(backends.left_out("blocked"))
        winners.forget()
        yield
