"""Random problems against the fp64 reference: what `fused-resnet verify` runs and the tests draw from.

A case follows from (seed, index) alone, so a mismatch is reported as the call that shows it again:
`testing.check(testing.case_at(seed, index), backend)`.
"""

from __future__ import annotations

import contextlib
import functools
import random
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.kernels.triton.conv.launch import allows_tf32
from fused_resnet.operators import reference
from fused_resnet.operators.problem import (
    ACTIVATIONS,
    FLOAT_DTYPES,
    AddReluProblem,
    ConvOperands,
    ConvProblem,
    add_relu_problem,
    conv_problem,
    dtype_name,
)

Pair = tuple[int, int]
KINDS = ("any", "common", "strided")
LAYOUTS = ("channels_last", "contiguous", "sliced", "expanded", "permuted")
# Triton's interpreter, the slowest backend, takes about a millisecond for each tile and step of the reduction
_MAX_TILE_STEPS = 150
_EPS = (1e-5, 1e-3, 1e-2)


class AddReluOperands(NamedTuple):
    """The addends, and the gradient that the backward kernel is given."""

    a: Tensor
    b: Tensor
    grad: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operator with its operands, and what the reference says about it."""

    problem: Union[ConvProblem, AddReluProblem]
    operands: Union[ConvOperands, AddReluOperands]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.operands._asdict().items() if isinstance(value, Tensor)}

    @functools.cached_property
    def bounds(self) -> dict[tuple[Optional[torch.dtype], bool], Tensor]:
        """For `bound_of`, which is asked once per backend and config and finds few different ones."""
        return {}

    @functools.cached_property
    def expected(self) -> Tensor:
        """The reference's result, fp64 on the CPU."""
        if isinstance(self.problem, AddReluProblem):
            return reference.add_relu(self.operands.a, self.operands.b)
        return reference.conv_bn_act(self.problem, self.operands)

    def run(self, backend: str) -> Tensor:
        """The public function's result, without gradients."""
        with torch.no_grad():
            if isinstance(self.problem, AddReluProblem):
                return functional.add_relu(self.operands.a, self.operands.b, backend=backend)
            p, o = self.problem, self.operands
            return functional.conv_bn_act(
                *o[:6], eps=o.eps, bias=o.bias, residual=o.residual, stride=p.stride, padding=p.padding,
                dilation=p.dilation, groups=p.groups, activation=p.activation, backend=backend,
            )  # fmt: skip

    def __str__(self) -> str:
        shown = (f"{name} {dtype_name(t.dtype)}{list(t.stride())}" for name, t in self.tensors.items())
        return f"{self.problem.op} {self.problem} ({', '.join(shown)})"


class Outcome(NamedTuple):
    """What came of one case on one backend.

    status: "ok", "mismatch" or "cannot run". detail: what differs and where, or the backend's why_not. worst_error:
    the largest error as a fraction of what the reference allows there; 0 for an exact operator, None if not run.
    """

    backend: str
    status: str
    detail: str = ""
    worst_error: Optional[float] = None


@dataclass
class BackendReport:
    """One backend's counts. `cannot_run` counts problems by the reason given."""

    ok: int = 0
    mismatches: list[dict[str, str]] = field(default_factory=list)
    cannot_run: dict[str, int] = field(default_factory=dict)
    worst_error: float = 0.0
    worst_case: Optional[str] = None


@dataclass
class Report:
    """What `verify` found. A backend is named "operator/backend"."""

    seed: int
    device: str
    problems: int = 0
    backends: dict[str, BackendReport] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not any(entry.mismatches for entry in self.backends.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for json.dumps."""
        return dict(asdict(self), passed=self.passed)

    def __str__(self) -> str:
        lines = [f"{self.problems} problems, seed {self.seed}, {self.device}"]
        for name, entry in sorted(self.backends.items()):
            lines.append(
                f"{name}: {entry.ok} ok, {len(entry.mismatches)} mismatches, {sum(entry.cannot_run.values())} not run, "
                f"worst {entry.worst_error:.3f} of the bound"
            )
            lines.extend(f"  {found['call']}\n    {found['detail']}" for found in entry.mismatches)
        return "\n".join(lines)


def verify(
    problems: Union[int, range],
    seed: int = 0,
    device: str = "cpu",
    backends: Optional[Sequence[str]] = None,
    progress: Optional[Callable[[int], None]] = None,
    *,
    kind: str = "any",
) -> Report:
    """Run random problems on every backend of their operator and compare each result with the reference.

    problems: how many, or which indices (so that processes can share the work). backends: names; default, all.
    progress: called with the index of each finished problem. kind: as `random_case`.
    """
    indices = range(problems) if isinstance(problems, int) else problems
    report = Report(seed, device)
    for index in indices:
        case = case_at(seed, index, device, kind=kind)
        for name in known_backends(case.problem.op):
            if backends is None or name in backends:
                drawn = "" if kind == "any" else f", kind={kind!r}"
                call = f"check(case_at({seed}, {index}, {device!r}{drawn}), {name!r})"
                _record(report, case, call, check(case, name))
                if (why := _why_unusable(device)) is not None:
                    _record(report, case, call, Outcome(name, "mismatch", f"has left the device unusable: {why}"))
                    return report
        report.problems += 1
        if progress is not None:
            progress(index)
    return report


def _why_unusable(device: str) -> Optional[str]:
    """What keeps this process from computing there since a kernel has failed, or None."""
    try:
        _synchronize(device)
    except RuntimeError as error:
        return str(error)
    return None


def _synchronize(device: Union[str, torch.device]) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def known_backends(op: str) -> tuple[str, ...]:
    return tuple(backends.known(op))


def case_at(seed: int, index: int, device: str = "cpu", *, kind: str = "any") -> Case:
    """The case with this number: the same on every machine. kind: as `random_case`."""
    return random_case(random.Random(f"{seed}/{index}"), device, kind=kind)


def _record(report: Report, case: Case, call: str, outcome: Outcome) -> None:
    entry = report.backends.setdefault(f"{case.problem.op}/{outcome.backend}", BackendReport())
    if outcome.status == "cannot run":
        entry.cannot_run[outcome.detail] = entry.cannot_run.get(outcome.detail, 0) + 1
    elif outcome.status == "mismatch":
        entry.mismatches.append({"call": call, "problem": str(case), "detail": outcome.detail})
    else:
        entry.ok += 1
        worst_error = outcome.worst_error or 0.0
        if worst_error >= entry.worst_error:
            entry.worst_error, entry.worst_case = worst_error, f"{call}: {case}"


# ------------------------------------------------------------------------------------------------------- comparing


def check(case: Case, backend: str) -> Outcome:
    """Run the case on this backend and hold the result against the reference.

    Beside the values: the output's strides are those promised to torch.compile, no input is written, and new memory
    holds NaN beforehand, so that a place nobody wrote shows. Raises BackendError for an unknown backend only.
    """
    known = backends.known(case.problem.op)
    if backend not in known:
        raise backends.BackendError(f"unknown backend {backend!r}; known ones are {', '.join(known)}.")
    reason = known[backend].why_not(case.problem)
    if reason is not None:
        return Outcome(backend, "cannot run", reason)
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    try:
        with _poisoned_memory(case):
            actual = case.run(backend)
            is_addition = isinstance(case.problem, AddReluProblem)
            grad = (
                torch.ops.fused_resnet.add_relu_backward(case.operands.grad, actual, backend) if is_addition else None
            )
            _synchronize(actual.device)  # what a kernel did wrong is raised by whatever waits next
    except Exception as error:  # the backend said that it can run this
        return Outcome(backend, "mismatch", f"raised {type(error).__name__}: {error}")
    for name, tensor in before.items():
        if not _identical(tensor, case.tensors[name]):
            return Outcome(backend, "mismatch", f"{name} was written to")
    detail = _wrong_metadata(case, actual)
    if detail is not None:
        return Outcome(backend, "mismatch", detail)
    if is_addition:
        return _exact(case, backend, actual, grad)
    return _within_bound(case, backend, actual.cpu().double())


def bound_of(case: Case, backend: str) -> Tensor:
    """The error that this backend may make, per element: reference.error_bound with the roundings it documents."""
    p, o = case.problem, case.operands
    eps_acc, stored = 2.0**-53 if p.dtype == torch.float64 else 2.0**-24, _stored_dtype(case, backend)
    key = (stored, backend == "winograd")
    if key not in case.bounds:
        case.bounds[key] = reference.error_bound(
            p, o, expected=case.expected, eps_acc=eps_acc, stored=stored, winograd=backend == "winograd"
        )
    return case.bounds[key]


def _stored_dtype(case: Case, backend: str) -> Optional[torch.dtype]:
    """The dtype to which values between the operands and the final rounding are rounded, if there is one."""
    p, o = case.problem, case.operands
    if p.dtype == torch.float32:
        # products in TF32 have the significand of fp16
        return torch.float16 if p.device == "cuda" and allows_tf32() else None
    if backend == "eager":
        return p.dtype  # convolution, BN, addition and activation each write a tensor
    if backend in ("onednn", "cudnn", "cublaslt"):
        rounds_bias = o.bias is not None and o.bias.dtype != p.dtype  # they take it in the dtype of x
        # in these cases ATen adds or activates what oneDNN has rounded
        rounds_sum = backend == "onednn" and p.has_residual and (p.groups > 1 or p.activation in ("relu6", "silu"))
        return p.dtype if rounds_bias or rounds_sum else None
    return None


def _within_bound(case: Case, backend: str, actual: Tensor) -> Outcome:
    expected, bound = case.expected, bound_of(case, backend)
    largest = torch.finfo(case.problem.dtype).max
    error = (actual - expected).abs()
    # an infinite bound comes from an infinite operand: what is finite there (relu(-inf)) has one right value
    agrees = (error <= bound) & bound.isfinite() | (actual == expected) | (actual.isnan() & expected.isnan())
    # what lies within the bound of the largest finite number may round to infinity
    agrees |= actual.isinf() & (actual.sign() == expected.sign()) & (expected.abs() + bound >= largest)
    may_be_nan = expected.isnan()
    if backend in ("eager", "onednn"):
        may_be_nan |= _torch_spreads_nan(case)
        agrees |= may_be_nan & actual.isnan()
    if case.problem.activation == "silu" and _stored_dtype(case, backend) is not None:
        may_be_nan |= _overflows_before_silu(case, bound)
        agrees |= may_be_nan & actual.isnan()
    if backend == "winograd":
        may_be_nan |= _winograd_overflows(case)
        agrees |= may_be_nan & (~actual.isfinite() | (actual == 0))
    if backend in ("onednn", "cudnn") and case.problem.activation != "none":
        agrees |= may_be_nan & (actual == 0)  # documented: their ReLU is max(x, 0), which drops NaN
    finite = expected.isfinite() & actual.isfinite() & bound.isfinite() & ~may_be_nan
    worst = (error / bound)[finite].max().item() if finite.any() else 0.0
    if agrees.all():
        return Outcome(backend, "ok", worst_error=worst)
    place = tuple((~agrees).nonzero()[0].tolist())
    return Outcome(
        backend,
        "mismatch",
        f"{(~agrees).sum()} of {agrees.numel()} elements differ; at (n, k, p, q) = {place}: got {actual[place]:.9g}, "
        f"expected {expected[place]:.9g} +- {bound[place]:.3g}",
        worst,
    )


def _torch_spreads_nan(case: Case) -> Tensor:
    """Where torch's own convolution is not a number although the formula is.

    oneDNN's bf16 kernels for one channel per group read pairs of neighbours and multiply the second by zero. So NaN and
    infinities reach one pixel further (torch 2.13). Where no window reaches x they cannot, and torch's crashes the
    process (oneDNN issue 5942).
    """
    p, o = case.problem, case.operands
    spread = torch.zeros(p.output_shape, dtype=torch.bool)
    if p.reads_x and not o.x.isfinite().all():
        for x, weight in ((o.x, o.weight), (backends.channels_last(o.x), backends.channels_last(o.weight))):
            spread |= torch.conv2d(x, weight, None, p.stride, p.padding, p.dilation, p.groups).cpu().isnan()
    return spread


def _overflows_before_silu(case: Case, bound: Tensor) -> Tensor:
    """Where a sum that is rounded before SiLU may be -inf. Torch's SiLU of it is NaN, that of the sum itself -0."""
    p: Any = case.problem
    before = reference.conv_bn_act(p._replace(activation="none"), case.operands)
    return before - bound <= -torch.finfo(p.dtype).max


def _winograd_overflows(case: Case) -> Tensor:
    """Where F(4x4, 3x3) may meet what is not finite, as is documented. Its transforms spread NaN over a tile.

    Sums that cancel in the end may overflow on the way: |B| and |A| amplify by up to 100 and 361.
    """
    products = reference.winograd_products(case.problem, case.operands.x.cpu().double(), case.operands.weight.double())
    return ~(products * 2.0**16 < torch.finfo(torch.float32).max)


def _exact(case: Case, backend: str, actual: Tensor, grad: Tensor) -> Outcome:
    """Both kernels round once, so there is one right answer: the sum in fp64 is exact enough to round again."""
    expected = case.expected.to(case.problem.dtype)
    expected_grad = case.operands.grad.cpu().masked_fill(expected <= 0, 0)
    for name, got, wanted in (("output", actual.cpu(), expected), ("gradient", grad.cpu(), expected_grad)):
        differs = ~((got == wanted) | (got.isnan() & wanted.isnan()))
        if differs.any():
            place = tuple(differs.nonzero()[0].tolist())
            detail = f"{differs.sum()} of {differs.numel()} elements of the {name} differ; at {place}: got {got[place]}"
            return Outcome(backend, "mismatch", f"{detail}, expected {wanted[place]}")
    return Outcome(backend, "ok", worst_error=0.0)


def _wrong_metadata(case: Case, actual: Tensor) -> Optional[str]:
    if isinstance(case.problem, AddReluProblem):
        promised = torch.empty_like(case.operands.a)
    else:
        promised = torch.empty(case.problem.output_shape, dtype=case.problem.dtype, memory_format=torch.channels_last)
    for name, got, wanted in (
        ("shape", tuple(actual.shape), tuple(promised.shape)),
        ("dtype", actual.dtype, promised.dtype),
        ("device", actual.device.type, case.problem.device),
        ("strides", actual.stride(), promised.stride()),
    ):
        if got != wanted:
            return f"the output's {name} is {got}, promised was {wanted}"
    return None


@contextlib.contextmanager
def _poisoned_memory(case: Case):
    """New tensors hold NaN inside. On CUDA by the allocator's reuse of a freed block: the switch used on the CPU would
    also change which of cuDNN's algorithms run."""
    if case.problem.device != "cpu":
        poison = torch.full(case.expected.shape, torch.nan, dtype=case.problem.dtype, device=case.problem.device)
        del poison
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _identical(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# --------------------------------------------------------------------------------------------------------- drawing


def random_case(rng: random.Random, device: str = "cpu", *, kind: str = "any") -> Case:
    """A whole problem: shapes, window, epilogue, dtypes, memory layouts and values, awkward ones on purpose.

    kind: "any", or one of those that "any" draws too few of.
    "common": a convolution as plans of ResNets have it, with awkward sizes and values all the same. It is in fp32 (on
    CUDA fp16) or bf16, without BN, mostly with ReLU, and has channels in sixteens. Its window is 1x1, 3x3 with
    stride 1, or 3x3 with groups as wide as ResNeXt's.
    "strided": a convolution in bf16 with strides to 4 on maps of 1 to 33 rows and columns, where libraries err
    (`library_faults`).
    """
    if kind not in KINDS:
        raise ValueError(f"random_case: unknown kind {kind!r}; known ones are {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    draw = _Draw(rng, generator, device)
    if kind == "any" and rng.random() < 0.2:
        return _random_add_relu(draw)
    return _random_conv(draw, kind)


class _Draw:
    """Tensors of random values in random layouts, made on the CPU so that every device gets the same."""

    def __init__(self, rng: random.Random, generator: torch.Generator, device: str) -> None:
        self.rng, self.generator, self.device = rng, generator, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tensor(self, values: Tensor, dtype: torch.dtype, layouts: Sequence[str] = LAYOUTS) -> Tensor:
        layout = "contiguous" if self.rng.random() < 0.2 else self.rng.choice(layouts)
        return laid_out(values.to(dtype).to(self.device), layout)

    def vector(self, values: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
        return self.tensor(values, self.rng.choice(dtypes), ("contiguous", "contiguous", "sliced", "expanded"))

    def with_nonfinite(self, tensor: Tensor) -> Tensor:
        """A few NaN and infinities, where there is an element to replace."""
        flat = tensor.flatten().clone()
        for _ in range(self.rng.randint(1, 3) if flat.numel() else 0):
            flat[self.rng.randrange(flat.numel())] = self.rng.choice((torch.nan, torch.inf, -torch.inf))
        return flat.view(tensor.shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """These values with other strides; "expanded" repeats the first slice of the first dimension in stride 0."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and tensor.dim():
        around = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
        view = around[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "expanded" and tensor.dim():
        return tensor[:1].expand_as(tensor)
    if layout == "permuted" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


def _random_conv(draw: _Draw, kind: str) -> Case:
    rng, is_common = draw.rng, kind == "common"
    common_dtypes = (torch.float32 if draw.device == "cpu" else torch.float16, torch.bfloat16)
    dtype = rng.choice(common_dtypes) if is_common else torch.bfloat16 if kind == "strided" else _random_dtype(rng)
    window, (N, C, H, W, K, R, S) = _common_window(rng) if is_common else _random_window(rng, kind == "strided")
    stride, padding, dilation, groups = window
    P, Q = (
        (size + 2 * pad - d * (taps - 1) - 1) // step + 1
        for size, pad, d, taps, step in zip((H, W), padding, dilation, (R, S), stride)
    )
    reduction = R * S * C // groups
    # fp16 ends at 65504, which its intermediates must not reach for nothing
    magnitude = rng.choice((1.0, 1.0, 1.0, 1e-3, 30.0) if dtype == torch.float16 else (1.0, 1.0, 1e-6, 1e4, 1e8))
    x, residual = draw.normal(N, C, H, W) * magnitude, draw.normal(N, K, P, Q) * magnitude
    if rng.random() < 0.1:
        x = draw.with_nonfinite(x)
        residual = draw.with_nonfinite(residual)
    vector_magnitude = min(magnitude, 1e3)  # vectors may be fp16 beside any x
    vector_dtypes = [dtype] * 3 + [d for d in FLOAT_DTYPES if d != torch.float64 or dtype == d]
    if rng.random() < 0.5:
        vector_dtypes = [rng.choice((dtype, torch.float32))]  # all alike, as in a model: ATen's batch_norm takes those
    spread = 1.0 if rng.random() < 0.7 else rng.choice((1e-10, 1e4))
    variance = (draw.normal(K).square() + 0.1) * spread
    vectors = {
        "bn_weight": draw.normal(K),
        "bn_bias": draw.normal(K) * vector_magnitude,
        "bn_mean": draw.normal(K) * vector_magnitude,
        "bn_var": variance,
    }
    some = tuple(rng.sample(list(vectors), rng.randint(1, 3)))
    has_bn = () if is_common else rng.choice(((), (), (), tuple(vectors), tuple(vectors), some))
    has_bias = 0.9 if is_common else 0.4  # folded BN leaves one
    operands = ConvOperands(
        draw.tensor(x, dtype),
        draw.tensor(draw.normal(K, C // groups, R, S) / reduction**0.5, dtype),
        **{name: draw.vector(vectors[name], vector_dtypes) for name in vectors if name in has_bn},
        eps=rng.choice(_EPS),
        bias=draw.vector(draw.normal(K) * vector_magnitude, vector_dtypes) if rng.random() < has_bias else None,
        residual=draw.tensor(residual, dtype) if rng.random() < 0.4 else None,
    )
    activations = (*ACTIVATIONS, "relu", "relu", "relu") if is_common else ACTIVATIONS
    return Case(conv_problem(operands, *window, rng.choice(activations)), operands)


def _random_window(
    rng: random.Random, is_strided: bool = False
) -> tuple[tuple[Pair, Pair, Pair, int], tuple[int, ...]]:
    """((stride, padding, dilation, groups), (N, C, H, W, K, R, S)) of a convolution with an output, small enough."""
    while True:
        kind = rng.choice(("dense", "dense", "grouped", "depthwise", "pointwise"))
        R, S = (1, 1) if kind == "pointwise" else (rng.randint(1, 7), rng.randint(1, 7))
        if rng.random() < 0.4 and kind != "pointwise":
            R = S = 3
        C, K, groups = rng.randint(1, 70), rng.randint(1, 70), 1
        if kind == "grouped":
            groups = rng.randint(2, 8)
            C, K = groups * rng.randint(1, 70 // groups), groups * rng.randint(1, 70 // groups)
        elif kind == "depthwise":
            groups, K = C, C * rng.randint(1, max(1, 70 // C))
        stride = _pair(rng, (1, 2, 3, 4) if is_strided else (1, 1, 2, 3))
        padding = _pair(rng, (0, 1, 2, 3) if kind != "pointwise" else (0, 0, 0, 1))
        dilation = _pair(rng, (1, 1, 1, 2, 3))
        N = rng.choice((0, 1, 1, 1, 1, 2, 2, 2, 3, 4))
        H, W = (rng.randint(1, rng.choice((4, 33)) if is_strided else 19) for _ in range(2))
        P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
        Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
        tiles = -(-N * P * Q // 64) * groups * -(-K // groups // 32)
        if P > 0 and Q > 0 and tiles * -(-R * S * C // groups // 32) <= _MAX_TILE_STEPS:
            return (stride, padding, dilation, groups), (N, C, H, W, K, R, S)


def _common_window(rng: random.Random) -> tuple[tuple[Pair, Pair, Pair, int], tuple[int, ...]]:
    """The same of the kind "common"."""
    padding = _pair(rng, (1, 1, 1, 0, 2, 7))
    N, C, K = rng.choice((0, 1, 1, 2, 3)), 16 * rng.randint(1, 6), 16 * rng.randint(1, 6)
    H, W = (rng.randint(max(1, 3 - 2 * pad), 23) for pad in padding)
    stride, groups = (1, 1), 1
    if rng.random() < 0.4:
        stride, width = _pair(rng, (1, 2)), rng.choice((4, 8, 16, 32))
        groups = rng.randint(2, max(2, 96 // width))
        C = K = groups * width
    elif rng.random() < 0.4:
        return ((1, 1), (0, 0), (1, 1), 1), (N, C, H, W, K, 1, 1)
    return (stride, padding, (1, 1), groups), (N, C, H, W, K, 3, 3)


def _random_dtype(rng: random.Random) -> torch.dtype:
    return rng.choice(3 * [dtype for dtype in FLOAT_DTYPES if dtype != torch.float64] + [torch.float64])


def _pair(rng: random.Random, values: Sequence[int]) -> Pair:
    first = rng.choice(values)
    return (first, first if rng.random() < 0.6 else rng.choice(values))


def _random_add_relu(draw: _Draw) -> Case:
    rng = draw.rng
    dims = rng.choice((0, 1, 2, 3, 4, 4, 4, 4, 4, 5))
    shape = [rng.choice((0, 1, 2, 3)) if dim == 0 else rng.randint(1, 17 if dims < 5 else 7) for dim in range(dims)]
    dtype = _random_dtype(rng)
    magnitude = rng.choice((1.0, 1.0, 1e-6, 1e4))  # 1e4: some sums of fp16 overflow
    a, b, grad = (draw.normal(*shape) * magnitude for _ in range(3))
    if rng.random() < 0.3:
        a, grad = draw.with_nonfinite(a), draw.with_nonfinite(grad)
    same_layout = rng.random() < 0.5  # the kernels' fast path
    layout = rng.choice(LAYOUTS)
    operands = AddReluOperands(
        *(draw.tensor(values, dtype, (layout,) if same_layout else LAYOUTS) for values in (a, b, grad))
    )
    return Case(add_relu_problem(operands.a, operands.b), operands)
