"""Modules of quantization-aware training as the functions that they call in eval mode.

These are torch.ao's FakeQuantize modules, its layers with rounded weights, and the hooks by which its eager mode rounds
what a module returns. What they observe is left out. Nothing here imports torch.ao.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.graphs.nodes import free_name

_HOOKS_OF, _HOOKS = "torch.ao.quantization.quantize", ("_observer_forward_hook", "_observer_forward_pre_hook")
_LAYERS = ("torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat.")
_OPERATORS = "quantized_decomposed"


def brings_scales(model: nn.Module) -> bool:
    """Whether a model holds FakeQuantize modules, or the quantize and dequantize operators of PT2E."""
    return any(
        _is_fake_quantize(module)
        or isinstance(module, fx.GraphModule)
        and any(_rounds(node.target) for node in module.graph.nodes)
        for module in model.modules()
    )


def _rounds(target: Any) -> bool:
    return getattr(target, "namespace", "") == _OPERATORS or "fake_quantize" in getattr(target, "__name__", "")


def spelled_out(model: nn.Module) -> nn.Module:
    """A model, changed in place, that calls torch.fake_quantize_per_tensor_affine and its like by itself.

    The scale of an observer that has seen no data is NaN.
    """
    made: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        if _is_fake_quantize(module):
            made[id(module)] = _rounding(module)
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            _show_weights(module)
        layer, hook = _layer(module, made), _take_hook(module)
        if hook:
            rounding, is_before = made[id(module.activation_post_process)], hook == _HOOKS[1]
            if isinstance(layer, _Layer) and not is_before:
                layer.result = rounding
            else:
                layer = _Hooked(layer or module, rounding, is_before)
        if layer is not None:
            made[id(module)] = layer
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in made:
                setattr(module, name, made[id(child)])
    return made.get(id(model), model)


class _Rounding(nn.Module):
    """x as its bytes say it: scale * (clamp(rint(x / scale) + zero_point, least, largest) - zero_point)."""

    def __init__(self, fake: Any) -> None:
        super().__init__()
        has_scale = _has_seen_data(getattr(fake, "activation_post_process", None))
        self.scale = nn.Buffer(fake.scale if has_scale else torch.full_like(fake.scale, torch.nan))
        self.zero_point = nn.Buffer(fake.zero_point)
        self.axis: Optional[int] = fake.ch_axis if fake.is_per_channel else None
        self.limits = (int(fake.quant_min), int(fake.quant_max))

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, *self.limits)


class _Layer(nn.Module):
    """A convolution or a linear layer of a rounded weight, with the ReLU behind it. result: rounds what it returns.

    A BN is folded into the weight before it is rounded, as torch.ao does it, in the parameters' dtype.
    """

    def __init__(self, layer: Any, rounding: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.rounding = layer.weight, layer.bias, rounding
        self.result: nn.Module = nn.Identity()
        self.has_relu = "ReLU" in type(layer).__name__
        conv = ("stride", "padding", "dilation", "groups")
        self.window = [getattr(layer, name) for name in conv] if isinstance(layer, nn.Conv2d) else None
        bn = getattr(layer, "bn", None)
        if bn is not None:
            factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            mean = bn.running_mean.double() - (0 if layer.bias is None else layer.bias.double())
            exact = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
            weight, bias = layer.weight * factor.view(-1, 1, 1, 1), bn.bias.double() - mean * exact
            self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach().to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounding(self.weight)
        y = F.linear(x, weight, self.bias) if self.window is None else F.conv2d(x, weight, self.bias, *self.window)
        return self.result(torch.relu(y) if self.has_relu else y)


class _Hooked(nn.Module):
    """A module that rounds what it returns, or what it is given."""

    def __init__(self, inner: nn.Module, rounding: nn.Module, is_before: bool) -> None:
        super().__init__()
        self.inner, self.rounding, self.is_before = inner, rounding, is_before

    def forward(self, x: Any, *args: Any) -> Any:
        return self.inner(self.rounding(x), *args) if self.is_before else self.rounding(self.inner(x, *args))


def _is_fake_quantize(module: nn.Module) -> bool:
    """By name: torchao has a class of its own beside torch.ao's."""
    return any(cls.__name__ == "FakeQuantizeBase" for cls in type(module).__mro__)


def _has_seen_data(observer: Any) -> bool:
    """True of an observer that does not say so."""
    if not isinstance(getattr(observer, "min_val", None), Tensor):
        return True
    return observer.min_val.numel() > 0 and bool((observer.min_val <= observer.max_val).all())


def _rounding(fake: Any) -> nn.Module:
    if not fake.fake_quant_enabled[0]:
        return nn.Identity()
    return _Rounding(fake)


def _take_hook(module: nn.Module) -> str:
    """Remove the hook by which torch.ao rounds, and say which it was."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "") == _HOOKS_OF and hook.__name__ in _HOOKS:
                del hooks[key]
                return hook.__name__
    return ""


def _layer(module: nn.Module, made: dict[int, nn.Module]) -> Optional[nn.Module]:
    """A layer of torch.ao's as `_Layer`, where that computes the same."""
    is_known = type(module).__module__.startswith(_LAYERS) and isinstance(module, (nn.Conv2d, nn.Linear))
    fake = getattr(module, "weight_fake_quant", None)
    if not is_known or id(fake) not in made or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    if isinstance(module, nn.Linear) and hasattr(module, "bn"):
        return None
    return _Layer(module, made[id(fake)])


def _show_weights(model: fx.GraphModule) -> None:
    """Have a trace see how PT2E's weights are dequantized, which it would compute once: buffers become parameters.

    They are kept where the modules were that they are of. Tensors get their names by that.
    """
    for node in model.graph.nodes:
        source = node.args[0] if _rounds(node.target) else None
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            continue
        stacks = [list(user.meta.get("nn_module_stack", {}).values()) for user in node.users]
        path = stacks[0][-1][0] if len(stacks) == 1 and stacks[0] else ""
        if path not in dict(model.named_modules()):  # nothing else of it is left
            is_plain = all(part.isidentifier() or part.isdigit() for part in path.split("."))
            path = path if is_plain and model.add_submodule(path, nn.Module()) else ""
        holder, tensor = model.get_submodule(path), functools.reduce(getattr, str(source.target).split("."), model)
        name = free_name(holder, "weight_bytes")
        holder.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        source.target = f"{path}.{name}" if path else name
    model.recompile()
