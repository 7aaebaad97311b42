"""The operators as functions: checked, differentiable, autocast-aware. `torch.nn.functional`, one kernel each."""

from __future__ import annotations

import functools
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fused_resnet import choosing
from fused_resnet.backends import bn_act as bn_act_backends
from fused_resnet.backends import record
from fused_resnet.choosing import dispatch, repeated
from fused_resnet.operators import composites, library
from fused_resnet.operators.composites import activate
from fused_resnet.operators.describe import add_relu_problem, bn_act_problem, conv_problem, pair
from fused_resnet.operators.operands import BnActOperands, ConvOperands

__all__ = ["activate", "add_relu", "bn_act", "conv_bn_act"]

IntPair = Union[int, tuple[int, int]]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_REGISTRY = record.REGISTRY
_num_function_modes, _is_profiled = torch._C._len_torch_function_stack, torch.autograd._profiler_enabled


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Optional[Tensor] = None,
    bn_bias: Optional[Tensor] = None,
    bn_mean: Optional[Tensor] = None,
    bn_var: Optional[Tensor] = None,
    *,
    eps: float = 1e-5,
    bias: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
    channels_last: bool = True,
) -> Tensor:
    """act(BN(conv(x, weight) + bias) + residual) with BN's running statistics.

    Equals relu(batch_norm(conv2d(x, weight, bias, stride, padding, dilation, groups), bn_mean, bn_var, bn_weight,
    bn_bias, eps=eps) + residual).

    x: (N, C, H, W); weight: (K, C/groups, R, S); the vectors: (K,); residual: (N, K, P, Q). fp32, fp16, bf16 (fp64 in
    eager); vectors may be fp32 beside fp16 or bf16 activations. Any of the BN vectors may be None and drops out: no
    bn_weight scales by 1, no bn_var divides by nothing, the others are 0; all four None means no BN. Returns a new
    (N, K, P, Q) tensor in channels_last memory, or in NCHW where channels_last=False. Kernels read channels_last inputs
    as they are and convert others; eager computes NCHW inputs to an NCHW output without conversions.

    activation: "none", "relu", "relu6" or "silu". backend: "auto", "eager", or the name of one that is registered. On
    CPUs "winograd", "grouped", "onednn", "direct", "blocked" and "cpu_pass" are. On GPUs "cudnn", "cuda", "cublaslt",
    "triton" and "cudnn_pass" are. A kernel makes one pass over memory, eager one per step. onednn makes a second one
    for what it does not fuse, cpu_pass and cudnn_pass for all that follows the convolution.
    Gradients reach x, weight, bn_weight, bn_bias, bias and residual; bn_mean and bn_var are constants. Under the
    transforms of torch.func and forward-mode AD the same is computed by ATen, whatever the backend, in ATen's layout.

    Raises ValueError for shapes and parameters, TypeError for dtypes and devices. BackendError when `backend` is
    unknown or cannot run this. Nothing has been computed by then.
    """
    if not is_compiling():
        tensors: tuple = (x, weight, bn_weight, bn_bias, bn_mean, bn_var)
        if bias is not None:
            tensors += (bias,)
        if residual is not None:
            tensors += (residual,)
        for call in repeated.calls.get((id(weight), bias is None, residual is None), ()):
            check, _, u, pad, d, g, act, name, is_last, _, _, run = call
            # by identity: 1.0 is equal to 1, but refused
            is_asked = stride is u and padding is pad and dilation is d and groups is g and activation is act
            if is_asked and backend is name and channels_last is is_last and check(*tensors):
                if type(eps) is float and repeated.holds(call):
                    return run(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual)
                break
    operands = ConvOperands(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, bias, residual)
    window = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation), groups, activation)
    if type(groups) is not int:
        window = (*window[:3], *pair("groups", groups)[:1], activation)
    vectors = (bn_weight, bn_bias, bn_mean, bn_var, bias)
    if not _is_watched() and _are_plain((x, weight), (*vectors, residual)) and type(eps) is float:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
            compute = functools.partial(dispatch.conv_bn_act_in_a_row, channels_last=channels_last)
            return library.ConvBnAct.apply(compute, *operands, *window, backend)
        out = dispatch.conv_bn_act(operands, window, backend, channels_last)
        repeated.learn(operands, window, (stride, padding, dilation, groups, activation, backend), channels_last)
        return out
    if composites.is_transformed():
        return _composite_conv_bn_act(operands, window, backend)
    return torch.ops.fused_resnet.conv_bn_act.default(*operands, *window, backend, channels_last=channels_last)


def why_refused(
    *tensors: Optional[Tensor], eps: float, bias: Any, residual: Any, stride: Any, padding: Any, dilation: Any,
    groups: Any, activation: str,
) -> Optional[str]:  # fmt: skip
    """What conv_bn_act says of operands that it does not take, or None. tensors: from x to bn_var."""
    o = ConvOperands(*tensors, eps, bias, residual)  # type: ignore
    device = o.x.device.type
    if device in library.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        o = library.cast_operands(o, device)
    try:
        pairs = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation))
        conv_problem(o, *pairs, *pair("groups", groups)[:1], activation)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def add_relu(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """max(a + b, 0), one pass over memory except in eager.

    a, b: same shape and dtype; fp32, fp16, bf16, fp64; any strides. Returns a new tensor in a's layout. Equals
    torch.relu(a + b) to the last bit, except under autocast, which casts a and b here and leaves that sum alone.
    Gradient: grad where out > 0, to both inputs. Under torch.func and forward-mode AD as conv_bn_act.

    Raises ValueError if the shapes differ, TypeError if the dtypes or devices do, BackendError when `backend` is
    unknown or cannot run this.
    """
    if type(a) is Tensor and not is_compiling():
        for check, needs_grad, name, candidates, run in repeated.sums.get(a.shape, ()):
            if backend is name and candidates is _REGISTRY["add_relu"] and check(a, b):
                if _num_function_modes() or _is_profiled() or forward_ad._current_level >= 0:
                    break
                if not (needs_grad and torch.is_grad_enabled()):
                    return run(a, b)
    if not _is_watched() and _are_plain((a, b)):
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return library.AddRelu.apply(dispatch.add_relu, a, b, backend)
        out = dispatch.add_relu(a, b, backend)
        if a is not b:
            repeated.learn_sum(a, b, backend)
        return out
    if composites.is_transformed():
        return _composite_add_relu(a, b, backend)
    return torch.ops.fused_resnet.add_relu.default(a, b, backend)


def bn_act(
    x: Tensor,
    running_mean: Optional[Tensor] = None,
    running_var: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Optional[Tensor] = None,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """act(batch_norm(x) + residual), in training and in eval mode.

    Equals relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps) + residual).
    With training=True the statistics are the batch's, mean and biased variance per channel in fp32. The running ones
    then become (1 - momentum) * running + momentum * batch, with the unbiased variance, in place. Both may be None.
    For the cumulative average, which nn.BatchNorm2d calls momentum=None, pass 1 / num_batches_tracked.
    With training=False the running ones are used.

    x, residual: (N, C, H, W), one dtype: fp32, fp16, bf16, fp64. The vectors: (C,), in the dtype of x or fp32 beside
    fp16 and bf16. Returns a new tensor in the layout of x, channels_last or NCHW. activation: "none", "relu", "relu6"
    or "silu". backend: "auto", "eager" (ATen, a pass per step), "cpu" (C++ for fp32 and bf16) or "triton" (on GPUs, by
    name). The last two are without silu. They take one pass for the statistics and one for all else, and as many in the
    backward. They are deterministic.

    Gradients reach x, weight, bias and residual. For them both keep x, the statistics and a bit per output, so y may
    be written to. Under torch.func and forward-mode AD as conv_bn_act. Autocast casts x and residual as add_relu.

    Raises ValueError for shapes and parameters, also where training has one value per channel. TypeError for dtypes and
    devices, BackendError when `backend` is unknown or cannot run this. Nothing has been computed by then.
    """
    statistics = {"running_mean": running_mean, "running_var": running_var}
    _check_running(x, statistics, training, momentum)
    constant = (None, None) if training else (running_mean, running_var)
    args = (x, *constant, weight, bias, residual, eps, activation, backend)
    vectors = (running_mean, running_var, weight, bias, residual)
    if composites.is_transformed():
        y, mean, var = _composite_bn_act(*args)
    elif not _is_watched() and _are_plain((x,), vectors):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias, residual):
            y, mean, var = _differentiable_bn_act(*args)
        else:
            y, mean, var, _ = dispatch.bn_act(*args)
    else:
        y, mean, var, _ = torch.ops.fused_resnet.bn_act.default(*args)
    if training and x.numel():
        move_running(running_mean, running_var, mean, var, momentum, x.numel() // x.shape[1])
    return y


def move_running(
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Move running statistics, where there are such, to those of a batch of `count` values per channel."""
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            _move(running_mean, mean, momentum, 1.0)
            _move(running_var, var, momentum, count / (count - 1))


def _move(running: Tensor, batch: Tensor, momentum: float, factor: float) -> None:
    """running = (1 - momentum) * running + momentum * factor * batch, rounded once to a narrower dtype."""
    wide = running if running.dtype == batch.dtype else running.to(batch.dtype)
    wide.mul_(1 - momentum).add_(batch, alpha=momentum * factor)
    if wide is not running:
        running.copy_(wide)


def _check_running(x: Tensor, statistics: dict[str, Optional[Tensor]], training: bool, momentum: Any) -> None:
    given = {name: vector for name, vector in statistics.items() if vector is not None}
    if len(given) == 1 or not training and not given:
        raise ValueError(f"bn_act: running_mean and running_var are needed together, given are {[*given] or 'none'}.")
    if training and given and not isinstance(momentum, (int, float)):
        raise TypeError(
            f"bn_act: momentum must be a number, not {momentum!r}. For the cumulative average, which nn.BatchNorm2d "
            "calls momentum=None, pass 1 / num_batches_tracked."
        )
    for name, vector in given.items() if training else ():
        if x.dim() == 4 and vector.shape != x.shape[1:2]:
            raise ValueError(f"bn_act: {name} must have shape ({x.shape[1]},), got {tuple(vector.shape)}.")


def _differentiable_bn_act(*args) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd sees: the operator, or ATen's functions where eager computes."""
    operands, activation, backend = BnActOperands(*args[:7]), *args[7:]
    problem = bn_act_problem(operands, activation)
    if choosing.select(problem, backend).backend is bn_act_backends.EAGER:
        return bn_act_backends.differentiable(problem, operands)
    return library.BnAct.apply(dispatch.bn_act, *args)[:3]


def _composite_bn_act(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The operator under a transform, as `_composite_conv_bn_act`."""
    operands, activation, backend = BnActOperands(*args[:7]), *args[7:]
    device = operands.x.device.type
    if device in library.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        x, residual = library.cast(operands.x, device), library.cast(operands.residual, device)
        operands = operands._replace(x=x, residual=residual)
    choosing.select(bn_act_problem(operands, activation), backend)
    return composites.bn_act(*operands, activation, backend)[:3]


def _is_watched() -> bool:
    """Whether something besides autograd wants to see the operator called: a compiler, mode, transform or profiler.

    Otherwise the operator's implementation is called as a function: torch's dispatcher, which turns every argument
    into C++ and back, costs as much as a small kernel.
    """
    return (
        is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _num_function_modes() > 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or _is_profiled()
        or composites.is_transformed()
    )


def _are_plain(tensors: tuple, optional: tuple = ()) -> bool:
    """Whether these are torch's own tensors, and not of a subclass with a mind of its own."""
    return _PLAIN.issuperset(map(type, tensors)) and _PLAIN_OR_NONE.issuperset(map(type, optional))


def _composite_conv_bn_act(o: ConvOperands, window: tuple, backend: str) -> Tensor:
    """The operator under a transform: the same casts and checks, computed by ATen."""
    device = o.x.device.type
    if device in library.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        o = library.cast_operands(o, device)
    choosing.select(conv_problem(o, *window), backend)
    return composites.conv_bn_act(*o, *window, backend)


def _composite_add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    device = a.device.type
    if device in library.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        a, b = library.cast(a, device), library.cast(b, device)
    choosing.select(add_relu_problem(a, b), backend)
    return composites.add_relu(a, b, backend)
