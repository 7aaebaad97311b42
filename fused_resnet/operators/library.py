"""The torch.library operators of namespace `fused_resnet`: schemas, shapes, gradients, transforms, autocast, flops.

Kernels are registered elsewhere: the public operators by `choosing.dispatch`, the C++ ones by the libraries of csrc/.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from fused_resnet.machine.imports import when_imported
from fused_resnet.operators import composites, gradients, schemas
from fused_resnet.operators.describe import add_relu_problem, bn_act_problem, chain_problem, conv_problem
from fused_resnet.operators.layout import densely, empty_chain, empty_output, is_nhwc
from fused_resnet.operators.operands import NUM_OPERANDS, BnActOperands, ChainOperands, ConvOperands, split_arguments

LIBRARY = torch.library.Library("fused_resnet", "DEF")

for _name, _schema in schemas.PUBLIC.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
for _kernels in schemas.KERNELS.values():
    for _name, _schema in _kernels.items():
        LIBRARY.define(_name + _schema)


@torch.library.register_fake("fused_resnet::conv_bn_act", lib=LIBRARY)
def _conv_bn_act_fake(*args, channels_last: bool = True) -> Tensor:
    operands, *window = split_arguments(args)
    return empty_output(conv_problem(operands, *window), operands.x, channels_last)


@torch.library.register_fake("fused_resnet::add_relu", lib=LIBRARY)
def _add_relu_fake(a: Tensor, b: Tensor, backend: str) -> Tensor:
    add_relu_problem(a, b)
    return torch.empty_like(a)


@torch.library.register_fake("fused_resnet::add_relu_backward", lib=LIBRARY)
def _add_relu_backward_fake(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return torch.empty_like(out)


@torch.library.register_fake("fused_resnet::bn_act", lib=LIBRARY)
def _bn_act_fake(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, activation = BnActOperands(*args[:7]), args[7]
    problem = bn_act_problem(o, activation)
    wide = torch.promote_types(torch.float32, o.x.dtype)
    mean = o.x.new_empty(problem.C if problem.is_training else 0, dtype=wide)
    mask = o.x.new_empty(problem.mask_shape, dtype=torch.uint8)
    return torch.empty_like(densely(o.x, problem.is_nhwc)), mean, torch.empty_like(mean), mask


@torch.library.register_fake("fused_resnet::bn_act_backward", lib=LIBRARY)
def _bn_act_backward_fake(
    grad, x, mean, var, weight, bias, residual, mask, eps, is_training, activation, needs_x, needs_residual, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    map_like = densely(x, is_nhwc(x))
    wide = torch.promote_types(torch.float32, x.dtype)
    vectors = (x.new_empty(x.shape[1], dtype=wide if one is None else one.dtype) for one in (weight, bias))
    grad_x, grad_residual = (torch.empty_like(map_like) if is_needed else x.new_empty(0)
                             for is_needed in (needs_x, needs_residual))  # fmt: skip
    return grad_x, *vectors, grad_residual


@torch.library.register_fake("fused_resnet::bottleneck_chain", lib=LIBRARY)
def _bottleneck_chain_fake(*args) -> tuple[Tensor, Tensor]:
    o = ChainOperands(*args[:8])
    return empty_chain(chain_problem(o, args[8]), o.x)


def _differentiable(name: str, setup: Callable, backward: Callable, composite: Callable) -> Any:
    """Make the operator differentiable, and give the autograd.Function that does it: apply(compute, *arguments).

    torch.library.register_autograd costs a small kernel's time, and loses the tangents of forward-mode AD.
    """
    op = getattr(torch.ops.fused_resnet, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, compute, *args):
            output = compute(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, grad, *others):
            return None, *backward(ctx, grad, *others)

    def kernel(keys, *args, **layout):
        if composites.is_transformed():
            return composite(*args)

        def compute(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **layout)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Gradient.apply(compute, *args)
        return compute(*args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return Gradient


ConvBnAct = _differentiable(
    "conv_bn_act", gradients.keep_for_conv_bn_act, gradients.conv_bn_act_backward, composites.conv_bn_act
)
AddRelu = _differentiable("add_relu", gradients.keep_for_add_relu, gradients.add_relu_backward, composites.add_relu)
_differentiable(
    "add_relu_backward",
    gradients.keep_for_add_relu_backward,
    gradients.add_relu_double_backward,
    lambda grad, out, backend: torch.ops.aten.threshold_backward(grad, out, 0),
)

BnAct = _differentiable("bn_act", gradients.keep_for_bn_act, gradients.bn_act_backward, composites.bn_act)


def _bottleneck_chain(keys, *args) -> tuple[Tensor, Tensor]:
    """Plans have no use for gradients. Whoever asks for them gets ATen's."""
    if composites.is_transformed() or torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return composites.bottleneck_chain(*args)
    with torch._C._AutoDispatchBelowAutograd():
        op = torch.ops.fused_resnet.bottleneck_chain.default
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


LIBRARY.impl("bottleneck_chain", _bottleneck_chain, "Autograd", with_keyset=True)

AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """What autocast casts a convolution's operands to, or None where it does not."""
    device = x.device.type
    casts = device in AUTOCAST_DEVICES and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else None


def cast(tensor, device: str):
    """What autocast on this kind of device makes of an operand."""
    wanted = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if wanted else tensor


def cast_operands(o: ConvOperands, device: str) -> ConvOperands:
    """x, weight and residual are cast; BN vectors and bias stay as they are, the epilogue is fp32."""
    return o._replace(x=cast(o.x, device), weight=cast(o.weight, device), residual=cast(o.residual, device))


def _register_autocast(device: str, key: str) -> None:
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def conv_bn_act(*args, **layout):
        operands = cast_operands(ConvOperands(*args[:NUM_OPERANDS]), device)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return torch.ops.fused_resnet.conv_bn_act(*operands, *args[NUM_OPERANDS:], **layout)

    def add_relu(a, b, backend):
        with torch._C._ExcludeDispatchKeyGuard(below):
            return torch.ops.fused_resnet.add_relu(cast(a, device), cast(b, device), backend)

    def bn_act(x, mean, var, weight, bias, residual, *rest):
        with torch._C._ExcludeDispatchKeyGuard(below):
            x, residual = cast(x, device), cast(residual, device)
            return torch.ops.fused_resnet.bn_act(x, mean, var, weight, bias, residual, *rest)

    def bottleneck_chain(*args):
        operands = ChainOperands(*args[:8])
        maps = {k: cast(v, device) for k, v in operands._asdict().items() if not k.endswith("bias")}
        with torch._C._ExcludeDispatchKeyGuard(below):
            return torch.ops.fused_resnet.bottleneck_chain(*operands._replace(**maps), *args[8:])

    LIBRARY.impl("bottleneck_chain", bottleneck_chain, key)
    LIBRARY.impl("bn_act", bn_act, key)
    LIBRARY.impl("conv_bn_act", conv_bn_act, key)
    LIBRARY.impl("add_relu", add_relu, key)


for _device, _key in AUTOCAST_DEVICES.items():
    _register_autocast(_device, _key)


def _conv_bn_act_flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * outputs * reduction, as torch counts a convolution; the epilogue is not counted."""
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


def _bottleneck_chain_flops(x_shape, residual_shape, *args, out_shape=None, **kwargs) -> int:
    """As its convolutions are counted."""
    N, C, H, W = x_shape
    K, L = residual_shape[1], args[4][0] if args[4] else 0
    return 2 * N * H * W * (9 * C * C + C * K + K * L)


def _no_flops(*args, **kwargs) -> int:
    return 0


def _register_flops(flop_counter: Any) -> None:
    ops, register = torch.ops.fused_resnet, flop_counter.register_flop_formula
    register(ops.conv_bn_act)(_conv_bn_act_flops)
    register(ops.bottleneck_chain)(_bottleneck_chain_flops)
    register([ops.add_relu, ops.add_relu_backward, ops.bn_act, ops.bn_act_backward])(_no_flops)


when_imported("torch.utils.flop_counter", _register_flops)  # which imports Triton
