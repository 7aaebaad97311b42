"""What is measured: operators, blocks and models, each as variants that compute the same thing.

Every variant is checked against fp64 first; then all of them are timed in turn in one process (`timing`).
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from fused_resnet import backends, convert, plan, reference, testing
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.problem import ConvOperands, ConvProblem
from fused_resnet.timing import Progress, Roofline, Variants, interleaved, roofline, silent
from fused_resnet.triton_kernels import runtime

LOSS_BELOW = 0.995  # a speedup that is shown as 0.99x or less
UNFUSED = "unfused"
FOLDED = "eager folded"
BASELINES = ("eager", "folded", "compile", "autotune", "cudnn", "onnxruntime", "openvino")
SHORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# --------------------------------------------------------------------------------------------------------- operators


class CountedProblem(NamedTuple):
    """A problem and how often a model has it."""

    problem: ConvProblem
    repeats: int


def convs_of(
    model: nn.Module, image_shape: Sequence[int], batch: int, dtype: torch.dtype, device: str
) -> list[CountedProblem]:
    """The distinct fused convolutions of a model in the order of first use, with BN folded, read off its plan."""
    example = torch.zeros(1, *image_shape)
    planned = plan.freeze(model.eval(), example, backend="eager").plan(example)
    counts: dict[ConvProblem, int] = {}
    modules = dict(planned.named_modules())
    for node in planned.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, plan.FrozenConv):
            problem = module.problem._replace(N=batch, dtype=dtype, device=torch.device(device).type)
            counts[problem] = counts.get(problem, 0) + 1
    return [CountedProblem(problem, count) for problem, count in counts.items()]


def random_operands(problem: ConvProblem, device: str, seed: int = 0) -> ConvOperands:
    """Operands with live BN for a problem: random-normal activations, He-scaled weights, vectors in fp32."""
    generator = torch.Generator(device=device).manual_seed(seed)
    p = problem

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(p.dtype, memory_format=torch.channels_last)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(p.K, device=device).uniform_(low, high, generator=generator)

    return ConvOperands(
        normal(p.N, p.C, p.H, p.W),
        normal(p.K, p.C // p.groups, p.R, p.S, scale=math.sqrt(2 / p.reduction)),
        uniform(0.5, 1.5), uniform(-0.5, 0.5), uniform(-0.5, 0.5), uniform(0.5, 1.5),
        residual=normal(*p.output_shape) if p.has_residual else None,
    )  # fmt: skip


def folded_operands(operands: ConvOperands) -> ConvOperands:
    """The same operation with BN folded into weight and bias, as `freeze` does."""
    scale, shift = reference.scale_and_shift(operands, torch.float64)
    weight = operands.weight.double() * scale.view(-1, 1, 1, 1)
    dtype = operands.x.dtype
    return ConvOperands(
        operands.x,
        weight.to(dtype, memory_format=torch.channels_last),
        bias=shift.to(dtype),
        residual=operands.residual,
    )


class Prepared(NamedTuple):
    """A variant of an operator: how to run it, the problem and operands it answers for, whose error bound applies."""

    run: Callable[[], Tensor]
    problem: ConvProblem
    operands: ConvOperands
    backend: str


def op_variants(problem: ConvProblem, live: ConvOperands) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Every way to compute a problem, and why the others cannot.

    UNFUSED is eager conv, BN, add and activation, one after the other; FOLDED the same with BN folded; the others are
    the backends as a frozen plan runs them, with packed weights.
    """
    eager, folded = backends.known("conv_bn_act")["eager"], folded_operands(live)
    unfolded = problem._replace(has_bn=True, has_bias=False)
    found = {
        UNFUSED: Prepared(lambda: eager.run(unfolded, live), unfolded, live, "eager"),
        FOLDED: Prepared(lambda: eager.run(problem, folded), problem, folded, "eager"),
    }
    skipped = {}
    for name, backend in backends.known("conv_bn_act").items():
        reason = None if name == "eager" else backend.why_not(problem)
        if name == "triton" and runtime.INTERPRETED:
            reason = "TRITON_INTERPRET is set, and the interpreter is not worth timing"
        if reason is not None:
            skipped[name] = reason
        elif name != "eager":
            conv = plan.FrozenConv(problem, backend, folded.weight, folded.bias)
            run = functools.partial(conv, folded.x, folded.residual)
            found[name] = Prepared(run, problem, folded, name)
    return found, skipped


def error_ratio(prepared: Prepared) -> float:
    """The worst error as a fraction of what reference.error_bound allows, over the first two images and the last.

    The whole batch is computed, since kernel choice and tile borders depend on it; an image's output depends on no
    other image, so a few are enough for the fp64 reference. Anything but a number counts as infinite.
    """
    p, o = prepared.problem, prepared.operands
    images = sorted({0, min(1, p.N - 1), p.N - 1})
    few = o._replace(x=o.x[images], residual=None if o.residual is None else o.residual[images])
    case = testing.Case(p._replace(N=len(images)), few)
    with torch.no_grad():
        error = (prepared.run()[images].cpu().double() - case.expected).abs()
    return (error / testing.bound_of(case, prepared.backend)).nan_to_num(nan=math.inf).max().item()


def bench_ops(
    problems: Sequence[CountedProblem],
    *,
    device: str,
    budget_s: float,
    rounds: Optional[int] = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Verify, then time, every variant of every problem. Returns {"roofline", "rows", "summary", "mismatches"}.

    A kernel that misses reference.error_bound is not timed. The baselines (unfused, folded, cuDNN) are timed in any
    case; their error stands beside the time.
    """
    if not problems:
        raise ValueError("bench ops: the model has no convolution that can be fused.")
    progress(0.0, "roofline")
    roof = roofline(device, problems[0].problem.dtype)
    rows = []
    for index, (problem, count) in enumerate(problems):
        progress(index / len(problems), str(problem))
        rows.append(_bench_op(problem, count, roof, device, budget_s / len(problems), rounds))
    progress(1.0, "done")
    against = (UNFUSED, FOLDED, "cudnn")
    return {
        "roofline": {"gb_per_s": roof.bytes_per_s / 1e9, "tflops": roof.flops_per_s / 1e12},
        "rows": rows,
        "summary": [entry for name in against for entry in summarise(rows, name) if entry["variant"] != UNFUSED],
        "mismatches": [
            {"problem": row["problem"], "variant": name, "error_ratio": ratio}
            for row in rows
            for name, ratio in row["not_timed"].items()
        ],
    }


def _bench_op(
    problem: ConvProblem, count: int, roof: Roofline, device: str, budget_s: float, rounds: Optional[int]
) -> dict[str, Any]:
    prepared, skipped = op_variants(problem, random_operands(problem, device))
    ratios = {name: error_ratio(one) for name, one in prepared.items()}
    competitors = (UNFUSED, FOLDED, "cudnn")
    not_timed = {name: _finite(ratio) for name, ratio in ratios.items() if ratio > 1 and name not in competitors}
    calls = {name: one.run for name, one in prepared.items() if name not in not_timed}
    with torch.no_grad():
        stats = interleaved(calls, device=device, budget_s=budget_s, rounds=rounds, graphs=True)
    least_us = roof.time_us(problem)
    return {
        "problem": str(problem),
        "count": count,
        "gflop": problem.flops / 1e9,
        "mbytes": problem.bytes_moved / 1e6,
        "least_us": least_us,
        "auto": backends.select(problem).name,
        "variants": {
            name: {
                **one._asdict(),
                "tflops": problem.flops / one.median_us / 1e6,
                "gb_per_s": problem.bytes_moved / one.median_us / 1e3,
                "roofline_percent": 100 * least_us / one.median_us,
                "error_ratio": _finite(ratios[name]),
                "speedup": stats[UNFUSED].median_us / one.median_us,
            }
            for name, one in stats.items()
        },
        "not_timed": not_timed,
        "skipped": skipped,
    }


def _finite(value: float) -> Optional[float]:
    """JSON has no infinity: None stands for an error without bound."""
    return value if math.isfinite(value) else None


def summarise(rows: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """Per variant, over the rows that have both: geometric mean and worst of the speedup, and every loss."""
    names = {name: None for row in rows for name in row["variants"]}
    summary = []
    for name in names:
        both = [row for row in rows if name in row["variants"] and against in row["variants"]]
        if name == against or not both:
            continue
        time_us = {which: [row["variants"][which]["median_us"] for row in both] for which in (name, against)}
        speedups = [base / own for base, own in zip(time_us[against], time_us[name])]
        ordered = sorted(zip(speedups, (row["problem"] for row in both)))
        counts = [row.get("count", 1) for row in both]
        losses = [(speedup, problem) for speedup, problem in ordered if speedup < LOSS_BELOW]
        summary.append(
            {
                "variant": name,
                "against": against,
                "problems": len(both),
                "geomean_speedup": math.exp(statistics.fmean(map(math.log, speedups))),
                "worst_speedup": ordered[0][0],
                "worst_problem": ordered[0][1],
                "total_us": sum(map(lambda t, n: t * n, time_us[name], counts)),
                "total_us_against": sum(map(lambda t, n: t * n, time_us[against], counts)),
                "losses": [{"problem": problem, "speedup": speedup} for speedup, problem in losses],
            }
        )
    return summary


# --------------------------------------------------------------------------------------------------- blocks and models


def calibrated(model: nn.Module, image_shape: Sequence[int], *, batch: int = 4, seed: int = 0) -> nn.Module:
    """Give a randomly initialised model the BN statistics of random images, so that its activations are sane.

    The last BN of each residual block scales by a quarter: by 1, the depth of a random ResNet-50 amplifies rounding
    as no trained network does (bf16 logits off by 13 % instead of 1.5 %, one image batch, on a CPU). Then one forward
    in training mode; the model is returned in eval mode with its BN momenta as they were.
    """
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last: Any = getattr(block, "bn3", block.bn2)
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


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Callable[[], Any]:
    """torch.compile with Inductor's freezing, already compiled for x."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), torch.no_grad():
        fast = torch.compile(model, **options)
        fast(x)

    def run() -> Any:
        with torch.no_grad():
            return fast(x)

    return run


def _plain(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def variant_builders(
    model: nn.Module,
    x: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    baselines: Sequence[str] = ("eager", "folded", "compile"),
    frozen_backends: Sequence[str] = ("auto",),
    with_fused: bool = False,
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Ways to run `model` on x (both fp32), by name: calling one makes the callable, which may raise or take a while.

    "eager NCHW fp32" is always there. Per dtype, as asked for: "eager NHWC", "folded" (freeze with backend="eager"),
    "compile", "autotune" (torch.compile, max-autotune), "cudnn", "onnxruntime", "openvino", "fused" and "frozen".
    Eager and compiled variants get their input in their own dtype; frozen ones convert it themselves.
    """
    wide = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    builders: dict[str, Callable[[], Callable[[], Any]]] = {"eager NCHW fp32": lambda: _plain(model, x)}
    for dtype in dtypes:
        short = short_name(dtype)
        if "eager" in baselines:
            builders[f"eager NHWC {short}"] = functools.partial(_eager_nhwc, model, wide, dtype)
        if with_fused:
            builders[f"fused {short}"] = functools.partial(_fused, model, wide, dtype)
        for name, backend in (("folded", "eager"), ("cudnn", "cudnn")):
            if name in baselines:
                builders[f"{name} {short}"] = functools.partial(_frozen, model, wide, dtype, backend)
        for name, options in (("compile", {}), ("autotune", {"mode": "max-autotune"})):
            if name in baselines:
                builders[f"{name} {short}"] = functools.partial(_compiled_nhwc, model, wide, dtype, options)
        for name, build in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
            if name in baselines:
                builders[f"{name} {short}"] = functools.partial(build, model, x, dtype)
        for backend in frozen_backends:
            name = f"frozen {short}" if backend == "auto" else f"frozen {short} {backend}"
            builders[name] = functools.partial(_frozen, model, wide, dtype, backend)
    return builders


def build_variants(
    builders: dict[str, Callable[[], Callable[[], Any]]], progress: Progress = silent
) -> tuple[Variants, dict[str, str]]:
    """(callables, why the others are missing). One foreign compiler's failure does not cost the other variants."""
    found: Variants = {}
    skipped: dict[str, str] = {}
    torch._dynamo.reset()  # so that each shape is compiled as a static one
    for index, (name, build) in enumerate(builders.items()):
        progress(index / len(builders), f"preparing {name}")
        try:
            found[name] = build()
        except Exception as error:  # whatever a compiler that is not ours raises
            skipped[name] = missing_reason(error)
    return found, skipped


def short_name(dtype: torch.dtype) -> str:
    return {value: name for name, value in SHORT_DTYPES.items()}[dtype]


def missing_reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _nhwc(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _eager_nhwc(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return _plain(_nhwc(model, dtype), x.to(dtype))


def _fused(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return _plain(convert.fuse(_nhwc(model, dtype)), x.to(dtype))


def _compiled_nhwc(model: nn.Module, x: Tensor, dtype: torch.dtype, options: dict[str, Any]) -> Callable[[], Any]:
    return compiled(_nhwc(model, dtype), x.to(dtype), **options)


def _frozen(model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> Callable[[], Any]:
    frozen = plan.freeze(model, x, dtype=dtype, backend=backend)
    return lambda: frozen(x)


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    import onnxruntime

    if x.device.type != "cpu" or dtype != torch.float32:
        raise RuntimeError("compared on the CPU in fp32 only")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), path, dynamo=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    import openvino

    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if x.device.type != "cpu" or dtype not in hints:
        raise RuntimeError("compared on the CPU in fp32 and bf16 only")
    settings = {"INFERENCE_PRECISION_HINT": hints[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    network, array = openvino.Core().compile_model(converted, "CPU", settings), x.numpy()
    return lambda: torch.from_numpy(network(array)[0])


def max_error(model: nn.Module, x: Tensor, variants: Variants) -> dict[str, Optional[float]]:
    """Per variant, max|y - y64| / max|y64| over the first and the last image; y64 is the model in fp64 on the CPU."""
    ends = [0, -1] if len(x) > 1 else [0]
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().double()(x[ends].cpu().double())
    scale = expected.abs().max()
    errors = ((run()[ends].cpu().double() - expected).abs().max() / scale for run in variants.values())
    return {name: _finite(error.item()) for name, error in zip(variants, errors)}


def bench_network(
    model: nn.Module,
    x: Tensor,
    *,
    device: str,
    budget_s: float,
    rounds: Optional[int] = None,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Every variant of a model or block on x, timed in turn: {"batch", "variants", "skipped"}.

    options: `variant_builders`'. Ratios are speedups: "ratio" to eager NCHW fp32, "ratio_to_compile" to torch.compile
    in the variant's own dtype, None without it.
    """
    builders = variant_builders(model, x, **options)
    variants, skipped = build_variants(builders, lambda fraction, text: progress(fraction / 2, text))
    progress(0.5, "comparing with fp64")
    errors = max_error(model, x, variants)
    stats = interleaved(
        variants, device=device, budget_s=budget_s, rounds=rounds, progress=lambda f, text: progress(0.5 + f / 2, text)
    )
    rows = {}
    for name, one in stats.items():
        own_compile = next((f"compile {word}" for word in name.split() if word in SHORT_DTYPES), "")
        rows[name] = {
            **one._asdict(),
            "ms": one.median_us / 1e3,
            "images_per_s": len(x) / one.median_us * 1e6,
            "ratio": stats["eager NCHW fp32"].median_us / one.median_us,
            "ratio_to_compile": stats[own_compile].median_us / one.median_us if own_compile in stats else None,
            "max_rel_error": errors[name],
        }
    return {"batch": len(x), "variants": rows, "skipped": skipped}
