"""act(batch_norm(x) + residual) and its gradients: C++ on a CPU, Triton on GPUs, ATen anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from fused_resnet.backends.record import Auto, Backend, why_not_cpu
from fused_resnet.kernels import compiled, sources
from fused_resnet.kernels.triton import is_interpreted
from fused_resnet.operators import composites, layout, mask
from fused_resnet.operators.operands import BnActOperands
from fused_resnet.operators.problem import BnActProblem, dtype_name

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BnAct:
    """The kernels of bn_act, and itself the first of them: what `Backend.run` is here.

    forward: (problem, operands, join=None) -> y, the batch's mean and variance, the mask; as its schema says.
    backward: (problem, y's gradient, operands, mask, needs_x, needs_residual, join=None) -> as the operator's schema
    says. The operands' mean and var are those that the forward used. again: (problem, operands) -> y, with these mean
    and var. join: for a batch of which this is a part. It makes the whole's statistics of the part's, and in the
    backward what stands for the part's sums.
    """

    forward: Callable[..., Outputs]
    backward: Callable[..., Outputs]
    again: Callable[[BnActProblem, BnActOperands], Tensor]

    def __call__(self, problem: BnActProblem, operands: BnActOperands) -> Outputs:
        return self.forward(problem, operands)


# ------------------------------------------------------------------------------------------------------------- eager


def differentiable(problem: BnActProblem, operands: BnActOperands) -> tuple[Tensor, Tensor, Tensor]:
    """y and the batch's statistics by ATen, whose gradients are ATen's."""
    o = operands
    if not problem.is_training:
        y, mean, var = composites.normalised(o), *_no_statistics(o.x)
    else:
        mean, var = (torch.zeros(problem.C, dtype=_wide(o.x), device=o.x.device) for _ in range(2))
        y = composites.normalised(o, (mean, var))
        var = var * ((problem.values - 1) / max(problem.values, 1))  # ATen wrote the unbiased one, which it keeps
    if o.residual is not None:
        y = y + o.residual
    return composites.activate(y, problem.activation), mean, var


def _eager_forward(problem: BnActProblem, operands: BnActOperands, join: Optional[Join] = None) -> Outputs:
    x = layout.densely(operands.x, problem.is_nhwc)
    if join is None:
        y, mean, var = differentiable(problem, operands._replace(x=x))
    else:
        mean, var = (torch.zeros(problem.C, dtype=_wide(x), device=x.device) for _ in range(2))
        if problem.values:
            var, mean = torch.var_mean(x.to(_wide(x)), (0, 2, 3), correction=0)
        mean, var = join(mean, var)
        y, _, _ = differentiable(problem._replace(is_training=False), operands._replace(x=x, mean=mean, var=var))
    return layout.laid_out_as(y, x), mean, var, mask.packed(problem, y)


def _eager_again(problem: BnActProblem, operands: BnActOperands) -> Tensor:
    return _eager_forward(problem._replace(is_training=False), operands)[0]


def _eager_backward(
    problem: BnActProblem, grad: Tensor, operands: BnActOperands, bits: Tensor, needs_x: bool, needs_residual: bool,
    join: Optional[Join] = None,
) -> Outputs:  # fmt: skip
    o, wide = operands, _wide(operands.x)
    x, before = layout.densely(o.x, problem.is_nhwc), o.x
    if problem.activation == "silu":
        before = composites.normalised(o._replace(mean=None, var=None) if problem.is_training and join is None else o)
        before = before if o.residual is None else before + o.residual
    g = composites.behind_activation(grad, before, bits, problem.activation)
    weight = torch.ones(problem.C, dtype=wide, device=x.device) if o.weight is None else o.weight.to(wide)
    mean, var = (vector.to(wide) for vector in (_given(o.mean), _given(o.var)))
    inverse = torch.rsqrt(var + o.eps)
    if join is None:
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, mean, var, mean, inverse, problem.is_training, o.eps, [needs_x, True, True]
        )
    else:
        each = (1, -1, 1, 1)
        centred = x.to(wide) - mean.view(each)
        sum, dot = g.to(wide).sum((0, 2, 3)), (g.to(wide) * centred).sum((0, 2, 3))
        grad_weight, grad_bias = dot * inverse, sum
        if needs_x:
            sum, dot = (vector / max(problem.values, 1) for vector in join(sum, dot))
            slope = (dot * inverse.square()).view(each)
            grad_x = (weight * inverse).view(each) * (g.to(wide) - sum.view(each) - centred * slope)
            grad_x = grad_x.to(x.dtype)
    return (
        layout.laid_out_as(grad_x, x) if needs_x else x.new_empty(0),
        *_as_vectors(o, grad_weight, grad_bias),
        torch.empty_like(x).copy_(g) if needs_residual else x.new_empty(0),
    )


# --------------------------------------------------------------------------------------------------------------- C++

_DTYPES = (torch.float32, torch.bfloat16)
_LEAST_VALUES = 1 << 20  # of smaller maps Python, and a Function of autograd, take longer than the kernels gain
_LEAST_PLANE = 512  # in NCHW: of smaller planes too much is the last, partial vector


def _cpu_why_not(problem: BnActProblem) -> Optional[str]:
    reason = why_not_cpu(problem)
    if reason is not None:
        return reason
    if problem.dtype not in _DTYPES:
        return f"{dtype_name(problem.dtype)} is not supported (float32, bfloat16 are)"
    if problem.activation == "silu":
        return "its activations are none, relu, relu6, not silu"
    if problem.values * problem.C == 0:
        return "there is nothing to compute: x is empty"
    return compiled.load("cpu")


def pays(values: int, plane: int, is_nhwc: bool) -> bool:
    """Whether a map is large enough. values: of the whole map. plane: of a channel of one image."""
    return (is_nhwc or plane >= _LEAST_PLANE) and values >= _LEAST_VALUES


def _pays(problem: BnActProblem) -> bool:
    return pays(problem.values * problem.C, problem.H * problem.W, problem.is_nhwc)


def _on_cpu_statistics(problem: BnActProblem, x: Tensor, mean: Tensor, var: Tensor) -> None:
    torch.ops.fused_resnet.cpu_bn_statistics.default(x, mean, var)


def _on_cpu_forward(problem: BnActProblem, o: BnActOperands, written: Optional[Tensor], y: Tensor) -> None:
    vectors = (o.mean, o.var, o.weight, o.bias)
    torch.ops.fused_resnet.cpu_bn_act.default(o.x, *vectors, o.eps, o.residual, problem.activation, written, y)


def _on_cpu_sums(
    problem: BnActProblem, grad: Tensor, o: BnActOperands, read: Optional[Tensor], sum: Tensor, dot: Tensor
) -> None:
    torch.ops.fused_resnet.cpu_bn_act_sums.default(grad, o.x, o.mean, read, sum, dot)


def _on_cpu_backward(problem: BnActProblem, grad: Tensor, o: BnActOperands, read: Optional[Tensor], *of_x) -> None:
    torch.ops.fused_resnet.cpu_bn_act_backward.default(grad, o.x, o.mean, o.var, o.weight, o.eps, read, *of_x)


# ------------------------------------------------------------------------------------------------------------- Triton


def _triton_why_not(problem: BnActProblem) -> Optional[str]:
    from fused_resnet.kernels.triton import bn_act  # Triton itself

    return bn_act.why_not(problem)


def _in_triton(launches: str) -> Callable[..., None]:
    """The launches of this name, run. Their second argument lies where they run."""

    def run(problem: BnActProblem, *arguments: Any) -> None:
        from fused_resnet.kernels.triton import bn_act

        first = arguments[0]
        bn_act.start(getattr(bn_act, launches)(problem, *arguments), first if isinstance(first, Tensor) else first.x)

    return run


# --------------------------------------------------------------------------------------- what kernels of ours share


class _Kernels(NamedTuple):
    """Four passes over memory, of dense maps in the problem's layout and contiguous vectors in fp32.

    statistics: (problem, x, mean, var), which it writes. forward: (problem, operands, mask or None, y), the last two of
    which it writes. sums: (problem, grad, operands, mask or None, sum, dot), the last two of which it writes: of g, the
    gradient behind the activation, and of g * (x - mean). backward: (problem, grad, operands, mask or None, sum, dot,
    grad_x, grad_residual). It writes the last two, where there are such. Without the sums it is of constant statistics.
    """

    statistics: Callable[..., None]
    forward: Callable[..., None]
    sums: Callable[..., None]
    backward: Callable[..., None]


def _by(kernels: _Kernels) -> BnAct:
    def forward(problem: BnActProblem, operands: BnActOperands, join: Optional[Join] = None) -> Outputs:
        o = _as_read(problem, operands)
        mean, var = _no_statistics(o.x)
        if problem.is_training:
            mean, var = (o.x.new_empty(problem.C, dtype=torch.float32) for _ in range(2))
            kernels.statistics(problem, o.x, mean, var)
            if join is not None:
                mean, var = join(mean, var)
            o = o._replace(mean=mean, var=var)
        y = torch.empty_like(o.x)
        bits = torch.empty(problem.mask_shape, dtype=torch.uint8, device=y.device)
        kernels.forward(problem, o, bits if problem.has_mask else None, y)
        return y, mean, var, bits

    def backward(
        problem: BnActProblem, grad: Tensor, operands: BnActOperands, bits: Tensor, needs_x: bool, needs_residual: bool,
        join: Optional[Join] = None,
    ) -> Outputs:  # fmt: skip
        o = _as_read(problem, operands)
        grad, read = layout.laid_out_as(grad, o.x), bits if problem.has_mask else None
        sum, dot = (o.x.new_empty(problem.C, dtype=torch.float32) for _ in range(2))
        kernels.sums(problem, grad, o, read, sum, dot)
        grad_x, grad_residual = (torch.empty_like(o.x) if needed else None for needed in (needs_x, needs_residual))
        if needs_x or needs_residual:
            sums: tuple = (sum, dot) if problem.is_training else (None, None)
            if join is not None and needs_x:
                sums = join(sum, dot)
            kernels.backward(problem, grad, o, read, *sums, grad_x, grad_residual)
        vectors = _as_vectors(operands, dot * torch.rsqrt(_given(o.var) + o.eps), sum)
        empty = o.x.new_empty
        return empty(0) if grad_x is None else grad_x, *vectors, empty(0) if grad_residual is None else grad_residual

    def again(problem: BnActProblem, operands: BnActOperands) -> Tensor:
        o = _as_read(problem, operands)
        kernels.forward(problem, o, None, y := torch.empty_like(o.x))
        return y

    return BnAct(forward, backward, again)


def _as_read(problem: BnActProblem, o: BnActOperands) -> BnActOperands:
    """Dense maps, x's own layout in the first place, and contiguous vectors in fp32."""
    x = layout.densely(o.x, problem.is_nhwc)
    residual = None if o.residual is None else layout.laid_out_as(o.residual, x)
    mean, var, weight, bias = (one if one is None else one.float().contiguous() for one in o.vectors.values())
    return BnActOperands(x, mean, var, weight, bias, residual, o.eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, x.dtype)


def _no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=_wide(x)), x.new_empty(0, dtype=_wide(x))


def _given(vector: Optional[Tensor]) -> Tensor:
    assert vector is not None
    return vector


def _as_vectors(o: BnActOperands, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor, Tensor]:
    """In the dtypes of the weight and the bias, where there are such."""
    wide = _wide(o.x)
    return (
        grad_weight.to(wide if o.weight is None else o.weight.dtype),
        grad_bias.to(wide if o.bias is None else o.bias.dtype),
    )


EAGER = Backend(
    "eager",
    lambda problem: None,
    BnAct(_eager_forward, _eager_backward, _eager_again),
    auto=Auto(("cpu", "cuda")),
    origin="torch",
)

# In the order in which auto tries them.
BN_ACT = (
    Backend(
        "cpu",
        _cpu_why_not,
        _by(_Kernels(_on_cpu_statistics, _on_cpu_forward, _on_cpu_sums, _on_cpu_backward)),
        auto=Auto(("cpu",), _pays),
        sources=sources.BN_ACT,
    ),
    Backend(
        "triton",
        _triton_why_not,
        _by(
            _Kernels(
                *map(_in_triton, ("statistics_launches", "forward_launches", "sums_launches", "backward_launches"))
            )
        ),
        origin="interpreted" if is_interpreted() else "ours",
        sources=sources.TRITON_BN_ACT,
    ),
    EAGER,
)
