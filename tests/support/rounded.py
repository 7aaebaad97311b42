"""Models that round as quantized ones do: prepared by torch.ao, by our own recipe, and as PT2E's graphs."""

import copy

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx, nn
from torch.ao import quantization
from torch.ao.nn import qat
from torch.ao.quantization import quantize_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

U8 = quantization.FakeQuantize.with_args(
    observer=quantization.MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
)
S8 = quantization.FakeQuantize.with_args(
    observer=quantization.MinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
    qscheme=torch.per_tensor_symmetric,
)  # fmt: skip
WEIGHTS = quantization.default_per_channel_weight_fake_quant
_OPS = torch.ops.quantized_decomposed


def seen(model, x):
    """A model whose observers have seen x, and see nothing more."""
    model.eval().apply(quantization.enable_observer)
    with torch.no_grad():
        model(x)
    return model.apply(quantization.disable_observer)


def aware(model, x, backend="fbgemm"):
    """A copy prepared by torch.ao for training, by its default recipe for a backend."""
    found = quantization.get_default_qat_qconfig_mapping(backend)
    return seen(quantize_fx.prepare_qat_fx(copy.deepcopy(model).train(), found, (x,)), x)


class _Rounding(nn.Module):
    """A module and the rounding of its result."""

    def __init__(self, inner, fake):
        super().__init__()
        self.inner, self.fake = inner, fake

    def forward(self, x):
        return self.fake(self.inner(x))


def by_our_recipe(model, x, projections=()):
    """A copy without BN, in which the input, what ReLU gives, projections and all weights are rounded.

    projections: the names of convolutions without activation whose result is a tensor of its own.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        for name, bn in list(module.named_children()):
            conv = name.replace("bn", "conv")
            if isinstance(bn, nn.BatchNorm2d) and hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), bn))
                setattr(module, name, nn.Identity())
    qconfig = quantization.QConfig(activation=U8, weight=WEIGHTS)
    for holder, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.Conv2d, nn.Linear):
                child.qconfig = qconfig
                layer = (qat.Conv2d if type(child) is nn.Conv2d else qat.Linear).from_float(child)
                is_rounded = f"{holder}.{name}".lstrip(".") in projections
                setattr(module, name, _Rounding(layer, S8()) if is_rounded else layer)
            elif type(child) is nn.ReLU:
                setattr(module, name, _Rounding(child, U8()))
    return seen(nn.Sequential(S8(), model), x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, quantization.FakeQuantize) or super().is_leaf_module(module, name)


def as_qdq(model):
    """A model of FakeQuantize modules and QAT layers as convert_pt2e would give it."""
    graph, held = _Tracer().trace(model), dict(model.named_modules())

    def attribute(tensor):
        name = f"_frozen_param{len(held)}"
        held[name] = tensor.detach()
        return graph.get_attr(name)

    def activation(node, fake):
        dtype = torch.uint8 if fake.dtype == torch.quint8 else torch.int8
        how = (fake.scale.item(), int(fake.zero_point), fake.quant_min, fake.quant_max, dtype)
        q = graph.call_function(_OPS.quantize_per_tensor.default, (node.args[0], *how))
        return graph.call_function(_OPS.dequantize_per_tensor.default, (q, *how))

    def layer(node, module):
        fake = module.weight_fake_quant
        how = (fake.scale, fake.zero_point.long(), 0, -128, 127, torch.int8)
        q = _OPS.quantize_per_channel(module.weight.detach(), *how)
        rest = (attribute(how[0]), attribute(how[1]), *how[2:])
        weight = graph.call_function(_OPS.dequantize_per_channel.default, (attribute(q), *rest))
        bias = None if module.bias is None else attribute(module.bias)
        if isinstance(module, nn.Linear):
            new = graph.call_function(torch.ops.aten.linear.default, (node.args[0], weight, bias))
        else:
            window = [list(pair) for pair in (module.stride, module.padding, module.dilation)]
            operands = (node.args[0], weight, bias, *window, module.groups)
            new = graph.call_function(torch.ops.aten.conv2d.default, operands)
        new.meta["nn_module_stack"] = {str(node.target): (str(node.target), type(module))}
        return new

    for node in list(graph.nodes):
        module = held.get(str(node.target)) if node.op == "call_module" else None
        make = {quantization.FakeQuantize: activation, qat.Conv2d: layer, qat.Linear: layer}.get(type(module))
        if make is not None:
            with graph.inserting_before(node):
                node.replace_all_uses_with(make(node, module))
            graph.erase_node(node)
    return fx.GraphModule(held, graph).eval()
