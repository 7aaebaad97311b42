"""One convolution with what follows it in a forward: one call where that is safe, else child by child."""

from __future__ import annotations

import operator
from typing import Any, Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor, fx, nn

from fused_resnet import functional, training
from fused_resnet.choosing import repeated
from fused_resnet.nn.bypass import why_not_fused, why_not_norm
from fused_resnet.nn.norms import Norm, norm_of
from fused_resnet.nn.stock import ACTIVATION_OF
from fused_resnet.operators.library import autocast_dtype
from fused_resnet.operators.problem import output_size

# How a forward adds a residual to out = bn(conv(x)). An augmented sum has the dtype and shape of what it writes to.
_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out + residual": operator.add,
    "out += residual": operator.iadd,
    "residual += out": lambda out, residual: operator.iadd(residual, out),
}


def conv_bn_act(
    x: Tensor,
    conv: nn.Module,
    bn: Union[nn.Module, Norm, None] = None,
    act: Union[nn.Module, str, None] = None,
    residual: Optional[Tensor] = None,
    backend: str = "auto",
    sum: str = "out + residual",
) -> Tensor:
    """act(bn(conv(x)) + residual), in one call where these children may be bypassed, else by calling each of them.

    For forwards that are written or generated to replace a model's own: whatever a child has become since (hooked,
    replaced, parametrized), the result is the stock one. bn: a module, with the activation that it may have of its own,
    or a Norm. act: a module, the name of an activation, or None. residual: whatever may be added to bn(conv(x)). sum:
    how the stock forward adds it, which decides the dtype: "out + residual", "out += residual" or "residual += out".
    """
    module = act if isinstance(act, nn.Module) else None
    if not isinstance(x, fx.Proxy) and why_not_fused(module, [(conv, bn)]) is None:
        return fused_conv_bn_act(x, conv, bn, act, residual, backend, sum)
    out = conv(x) if bn is None else bn(conv(x))
    return _activated(out if residual is None else _SUMS[sum](out, residual), act)


def bn_act(x: Tensor, bn: nn.Module, act: Union[nn.Module, str, None] = None, backend: str = "auto") -> Tensor:
    """act(bn(x)), in one call where that is faster and these children may be bypassed, else by calling each of them.

    For norms in front of convolutions, as `conv_bn_act` for those behind one. Convolutions that read the result keep
    no input for the backward in training mode (`training.convolution`).
    """
    module = act if isinstance(act, nn.Module) else None
    if isinstance(x, Tensor) and why_not_norm(bn, module) is None and autocast_dtype(x) in (None, x.dtype):
        out = _by_bn_act(bn, x, None, act, backend)
        if out is not None:
            return out
    return _activated(bn(x), act)


def _by_bn_act(
    bn: Any, x: Tensor, residual: Optional[Tensor], act: Union[nn.Module, str, None], backend: str
) -> Optional[Tensor]:
    """act(bn(x) + residual) by `training.bn_act`, or None where the modules are to be called."""
    norm = norm_of(bn)
    merged = _merged(norm, _name_of(act), residual)
    if norm is None or not norm.is_torchs or merged is None:
        return None
    activation, then = merged
    out = training.bn_act(bn, x, residual, activation, backend)
    for module in then if out is not None else ():
        out = module(out)
    return out


def _name_of(act: Union[nn.Module, str, None]) -> str:
    return act if isinstance(act, str) else "none" if act is None else ACTIVATION_OF[type(act)]


def _merged(norm: Optional[Norm], activation: str, residual: Any) -> Optional[tuple[str, tuple[nn.Module, ...]]]:
    """The activation to be computed with a norm, and the modules that it calls after that. None where a residual or an
    activation comes after modules of the norm's own."""
    if norm is None or not norm.then:
        return activation, ()
    return norm.activation if activation == "none" and residual is None else None


def fused_conv_bn_act(
    x: Tensor,
    conv: Any,
    bn: Any,
    act: Union[nn.Module, str, None],
    residual: Optional[Tensor],
    backend: str,
    sum: str = "out + residual",
) -> Tensor:
    """conv_bn_act of children that may be bypassed, in the memory layout that they would give.

    They are called where the operator computes something else, and for what it refuses: they take it, or raise torch's
    own error.
    """
    before = _as_before(x, conv, bn, act, residual, backend, sum) if type(bn) is nn.BatchNorm2d else None
    if before is not None:
        return before
    norm, activation = norm_of(bn), _name_of(act)
    is_training = norm is not None and norm.training
    merged = _merged(norm, activation, residual)
    # of an empty batch only the strides are left, and ATen's have rules of their own
    fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] > 0 and not is_training and merged is not None
    if norm is None and training.keeps_no_input(conv, x):
        fits = False
    if fits and merged is not None:
        activation, then = merged
        acts = norm.then[0] if norm is not None and len(then) < len(norm.then) else act
        weight, bias, cast_to = conv.weight, conv.bias, autocast_dtype(x)
        operands = (x, weight, *((None,) * 4 if norm is None else norm[:4]))
        options = dict(
            eps=1e-5 if norm is None else norm.eps, bias=bias, residual=residual, stride=conv.stride,
            padding=conv.padding, dilation=conv.dilation, groups=conv.groups, activation=activation,
        )  # fmt: skip
        try:
            shape = _output_shape(x, weight, conv)
        except (TypeError, ValueError, ZeroDivisionError):
            fits = False
        fits = fits and _children_take(x, bias, norm, cast_to) and _fits(residual, x, shape, cast_to, sum)
        try:
            if fits:
                is_last = _gives_channels_last(x, weight, shape, norm, acts, residual, sum)
                out = functional.conv_bn_act(*operands, **options, backend=backend, channels_last=is_last)
                if type(bn) is nn.BatchNorm2d and cast_to is None and not torch.compiler.is_compiling():
                    _keep(operands, options, sum, is_last, shape)
        except (TypeError, ValueError):
            if functional.why_refused(*operands, **options) is None:
                raise  # not over what it was given
            fits = False
    if fits:
        for module in then:
            out = module(out)
        return out
    out = training.convolution(conv, x) if is_training or norm is None else conv(x)
    is_alone = is_training and residual is not None and not _lies_alike(residual, out)
    if is_training and not is_alone:
        normalised = _by_bn_act(bn, out, residual, act, backend)
        if normalised is not None:
            return normalised
    if bn is not None:
        out = bn_act(out, bn, None, backend) if is_alone else bn(out)
    if is_training and activation == "relu" and _is_alike(residual, out):
        return functional.add_relu(*((residual, out) if sum == "residual += out" else (out, residual)))
    return _activated(out if residual is None else _SUMS[sum](out, residual), act)


class _Known(NamedTuple):
    """Operands that the operator took, without a bias, and what was found of them: the layout of the result.

    calls: by activation and backend, what ran on them (`repeated.Call`, with the same check).
    """

    check: Callable[..., bool]
    needs_grad: bool
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    sum: str
    channels_last: bool
    calls: dict[tuple[str, str], repeated.Call]


# by id(weight), and whether there is no residual
_known: dict[tuple[int, bool], tuple[_Known, ...]] = {}


def _forget(weight: int) -> None:
    for has_no_residual in (False, True):
        _known.pop((weight, has_no_residual), None)


repeated.forgetters.append(_forget)


def _as_before(
    x: Tensor, conv: Any, bn: Any, act: Any, residual: Optional[Tensor], backend: str, sum: str
) -> Optional[Tensor]:
    """fused_conv_bn_act of operands like some before, whose answers still hold; else None."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None  # a trace holds what is read of the modules, which must not depend on calls before
    own, norm = conv.__dict__, bn.__dict__
    weight = own["_parameters"].get("weight")
    known = _known.get((id(weight), residual is None))
    has_no_bias = own["_parameters"].get("bias", own) is None  # a missing one may be an attribute of another kind
    if known is None or norm["training"] or not has_no_bias:
        return None
    affine, statistics = norm["_parameters"], norm["_buffers"]
    vectors = affine.get("weight"), affine.get("bias"), statistics.get("running_mean"), statistics.get("running_var")
    tensors = (x, weight, *vectors) if residual is None else (x, weight, *vectors, residual)
    stride, padding, dilation, groups = own["stride"], own["padding"], own["dilation"], own["groups"]
    for one in known:
        check, needs_grad, u, pad, d, g, added, is_last, calls = one
        is_asked = stride is u and padding is pad and dilation is d and groups is g and sum == added
        if not (is_asked and check(*tensors)) or needs_grad and torch.is_grad_enabled():
            continue
        activation = act if isinstance(act, str) else "none" if act is None else ACTIVATION_OF[type(act)]
        eps, call = norm["eps"], calls.get((activation, backend))
        if call is not None and type(eps) is float and repeated.holds(call):
            return call.run(x, weight, *vectors, eps, None, residual)
        out = functional.conv_bn_act(
            x, weight, *vectors, eps=eps, residual=residual, stride=stride, padding=padding, dilation=dilation,
            groups=groups, activation=activation, backend=backend, channels_last=is_last,
        )  # fmt: skip
        call = repeated.kept(tensors, residual is None, (*one[2:6], activation, backend, is_last))
        if call is not None:
            calls[activation, backend] = call
        return out
    return None


def _keep(operands: tuple, options: dict[str, Any], sum: str, channels_last: bool, shape: tuple) -> None:
    """Keep for `_as_before` what was found of operands that the operator took. shape: the result's."""
    if shape[1] == 1 or shape[2] == shape[3] == 1:
        return  # where the layout depends on the activation, too (`_gives_channels_last`)
    residual, key = options["residual"], (id(operands[1]), options["residual"] is None)
    tensors, known = operands if residual is None else (*operands, residual), _known.get(key, ())
    window = tuple(options[name] for name in ("stride", "padding", "dilation", "groups"))
    is_plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    if options["bias"] is not None or len(known) >= repeated.MOST_EACH or not is_plain:
        return
    check = repeated.guard(tensors)
    if check is None or not all(map(repeated.is_immutable, window)):
        return
    if len(_known) >= repeated.MOST_WEIGHTS:
        _known.clear()
    needs_grad = any(tensor.requires_grad for tensor in tensors)
    _known[key] = (*known, _Known(check, needs_grad, *window, sum, channels_last, {}))  # type: ignore[call-arg]


def _activated(out: Tensor, act: Union[nn.Module, str, None]) -> Tensor:
    return functional.activate(out, act) if isinstance(act, str) else out if act is None else act(out)


def _output_shape(x: Tensor, weight: Tensor, conv: Any) -> tuple[int, int, int, int]:
    """(N, K, P, Q). Raises TypeError or ValueError where a parameter of the convolution is no pair."""
    (N, _, H, W), (K, _, R, S) = x.shape, weight.shape
    (u, v), (pad_h, pad_w), (dilation_h, dilation_w) = conv.stride, conv.padding, conv.dilation
    return N, K, output_size(H, R, u, pad_h, dilation_h), output_size(W, S, v, pad_w, dilation_w)


def _children_take(x: Tensor, bias: Optional[Tensor], norm: Optional[Norm], cast_to: Optional[torch.dtype]) -> bool:
    """Whether torch's convolution and norm take parameters of these dtypes, and give the convolution's. The operator,
    which computes in fp32 whatever comes, takes more."""
    dtype = x.dtype
    if bias is not None and bias.dtype != dtype and (cast_to is None or bias.dtype == torch.float64):
        return False
    if cast_to not in (None, dtype) and 0 in x.stride():
        return False  # autocast's copy of an expanded tensor has a layout of its own
    if norm is None:
        return True
    dtype, (gamma, beta, mean, var) = cast_to or dtype, norm[:4]
    if (mean.requires_grad or var.requires_grad) and torch.is_grad_enabled():
        return False  # batch_norm refuses them, FrozenBatchNorm2d gives them a gradient
    own = mean.dtype
    # a frozen norm multiplies by its buffers as they are, so wider ones give a wider result
    is_taken = own == dtype or own == torch.float32 and dtype != torch.float64 and not norm.promotes
    is_affine_alike = (gamma is None or gamma.dtype == own) and (beta is None or beta.dtype == own)
    return is_taken and var.dtype == own and is_affine_alike


def _fits(residual: Any, x: Tensor, shape: tuple, cast_to: Optional[torch.dtype], sum: str) -> bool:
    """Whether the residual has the shape of the convolution's output, and the sum its dtype."""
    if residual is None:
        return True
    if not isinstance(residual, Tensor):
        return False
    if residual.dtype != (cast_to or x.dtype):
        # autocast casts the residual, which shows in the dtype of a sum that is a new tensor
        is_castable = residual.is_floating_point() and residual.dtype != torch.float64
        if not (cast_to is not None and is_castable and sum == "out += residual"):
            return False
    return residual.shape == shape


def _is_alike(residual: Any, out: Tensor) -> bool:
    """Whether an addition to out neither broadcasts nor converts, under autocast either."""
    if not isinstance(residual, Tensor) or residual.shape != out.shape or residual.device != out.device:
        return False
    return residual.dtype == out.dtype == (autocast_dtype(out) or out.dtype)


def _lies_alike(residual: Any, out: Any) -> bool:
    """Whether an addition to out gives out's layout, too, in whatever order."""
    return isinstance(out, Tensor) and _is_alike(residual, out) and residual.stride() == out.stride()


def _gives_channels_last(
    x: Tensor, weight: Tensor, shape: tuple, norm: Any, act: Any, residual: Optional[Tensor], sum: str
) -> bool:
    """Whether the children's result would lie in channels_last memory, else it would in NCHW: ATen's rules.

    A new sum of two layouts may give a dimension of size 1 yet another stride.
    """
    _, K, P, Q = shape
    is_new = norm is not None or residual is not None and sum == "out + residual"
    if residual is not None and sum == "residual += out":
        is_asked, is_new = _has_channels_last_strides(residual), False
    else:
        is_asked = _has_channels_last_strides(x) or _has_channels_last_strides(weight)
        if is_asked and x.dtype == torch.float64 and x.is_cuda:
            return False  # cuDNN has no such kernel in channels_last
    if not is_asked or K > 1 and (P > 1 or Q > 1):
        return is_asked
    # Both are the same memory: of ATen's functions that make new tensors only hardtanh keeps channels_last's strides.
    in_place = act in (None, "relu6") or type(act) in (nn.Identity, nn.ReLU6) or getattr(act, "inplace", False)
    return in_place and not is_new


def _has_channels_last_strides(tensor: Tensor) -> bool:
    """Whether ATen takes a tensor of 4 dimensions for channels_last, by its strides alone
    (c10::is_channels_last_strides_2d: of what is both, a new tensor is NCHW)."""
    (_, C, H, W), (n, c, h, w) = tensor.shape, tensor.stride()
    return 0 < c and c * C <= w and w * W <= h and h * H <= n and h * H != c
