"""Other people's blocks: a forward of ours for a class of theirs, found by name, so that nothing has to be imported.

A block that `torch.fx` can trace needs no adapter (`rewriting`). An adapter is for the others, and for sums that
cross modules. `register` adds one:

>>> from fused_resnet import adapters
>>> from fused_resnet.nn import conv_bn_act
>>>
>>> @adapters.register("mylib.blocks.ResidualUnit", reads="conv_a bn_a relu conv_b bn_b skip", convs="conv_*")
... def residual_unit(block, x):
...     shortcut = x if block.skip is None else block.skip(x)
...     out = conv_bn_act(x, block.conv_a, block.bn_a, block.relu, backend=block.backend)
...     return conv_bn_act(out, block.conv_b, block.bn_b, block.relu, shortcut, block.backend)
"""

from __future__ import annotations

import fnmatch
import functools
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.nn import conv_bn_act
from fused_resnet.nn.bypass import has_stock_code, why_called
from fused_resnet.nn.fused import NotScriptable


class Adapter(NamedTuple):
    """forward(block, *args) computes what the class's own forward does, or returns NotImplemented to have it called."""

    forward: Callable[..., Any]
    reads: frozenset[str]
    convs: tuple[str, ...]


_ADAPTERS: dict[str, Adapter] = {}


def register(*classes: str, reads: str, convs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `fuse` lets blocks of these classes compute by the decorated function, and `unfuse` undoes it.

    classes: "package.module.Class"; a subclass is not recognised. reads: the names that the class's own forward reads,
    of attributes, methods and globals (its __code__.co_names): a forward that was patched to do something else reads
    other names, and such a block is left alone. convs: patterns (fnmatch) of the convolutions that the function
    computes by `nn.conv_bn_act`, for counting; modules all of whose convolutions are among them are not fused again.

    The function gets the block and its forward's arguments. It reads weights through `nn.conv_bn_act`, which calls the
    children where they were hooked or replaced. It calls other children itself. For a call that it does not cover it
    returns NotImplemented, and the block's own forward runs. The last registration of a class counts.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        adapter = Adapter(function, frozenset(reads.split()), tuple(convs.split()))
        _ADAPTERS.update(dict.fromkeys(classes, adapter))
        return function

    return decorate


def adapter_of_class(cls: type[nn.Module]) -> Optional[Adapter]:
    return _ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")


def adapter_of(module: nn.Module) -> tuple[Optional[Adapter], Optional[str]]:
    """(adapter, None), or (None, why this block of a registered class is left alone), or (None, None) for others."""
    cls = type(module)
    adapter = adapter_of_class(cls)
    if adapter is None:
        return None, None
    if "forward" in module.__dict__ or not has_stock_code(cls, cls.forward, adapter.reads):
        return None, f"the forward of {cls.__qualname__} was replaced"
    return adapter, None


class FusedForward(NotScriptable):
    """A module whose class was replaced by one that computes the same another way, and is a subclass of its own class.

    Children, parameters, keys and hooks are the module's. `plain_class.forward` runs wherever `fused_forward` returns
    NotImplemented. Copies and pickles name the plain class, so that the fused one need not be importable.
    """

    kind: type["FusedForward"]
    plain_class: type[nn.Module]
    backend = "auto"

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def fused_convs(self) -> list[str]:
        """Names, within this module, of the convolutions that it computes together with what follows them."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.fused_forward(*args, **kwargs)
        return self.plain_class.forward(self, *args, **kwargs) if out is NotImplemented else out

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state: Any = super().__reduce_ex__(protocol)[2:]
        return _restored, (self.kind, self.plain_class), *state


@functools.lru_cache(maxsize=None)
def fused_class(kind: type[FusedForward], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a `plain` module that computes by `kind`. Its forward shows the plain signature, for exporters."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    # tracers decide by the name of the class's module what is one node
    contents = {"kind": kind, "plain_class": plain, "forward": forward, "__doc__": plain.__doc__}
    contents["__module__"] = plain.__module__
    return type(f"Fused{plain.__name__}", (kind, plain), contents)


def _restored(kind: type[FusedForward], plain: type[nn.Module]) -> nn.Module:
    cls = fused_class(kind, plain)
    return cls.__new__(cls)


class Adapted(FusedForward):
    """A block that computes by the adapter registered for its plain class."""

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = adapter_of_class(self.plain_class)
        if adapter is None or _are_proxies((args, kwargs)):
            return NotImplemented
        return adapter.forward(self, *args, **kwargs)

    def fused_convs(self) -> list[str]:
        adapter = adapter_of_class(self.plain_class)
        return [] if adapter is None else convs_of(self, adapter)


def _are_proxies(arguments: tuple) -> bool:
    """Whether a call is part of a symbolic trace, which is to be that of the plain block."""
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(arguments))


def convs_of(module: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the convolutions of a module that an adapter computes."""
    convs = [name for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
    return [name for name in convs if any(fnmatch.fnmatchcase(name, pattern) for pattern in adapter.convs)]


# ----------------------------------------------------------------------------------------------- Hugging Face's ResNet

_HF = "transformers.models.resnet.modeling_resnet"
_CONV_LAYER_READS = frozenset(("convolution", "normalization", "activation"))


@register(
    f"{_HF}.ResNetBasicLayer",
    f"{_HF}.ResNetBottleNeckLayer",
    reads="layer shortcut activation",
    convs="layer.*.convolution",
)
def _residual_layer(block: Any, x: Tensor) -> Any:
    """activation(layer(x) + shortcut(x)); the layer is a Sequential of convolution layers, the last not activated."""
    *first, last = block.layer
    if type(block.layer) is not nn.Sequential or why_called(block.layer) is not None:
        return NotImplemented
    if not all(_is_stock_conv_layer(layer) for layer in block.layer) or type(last.activation) is not nn.Identity:
        return NotImplemented
    out = x
    for layer in first:
        out = conv_bn_act(out, layer.convolution, layer.normalization, layer.activation, backend=block.backend)
    children = last.convolution, last.normalization, block.activation
    return conv_bn_act(out, *children, block.shortcut(x), block.backend, "out += residual")


def _is_stock_conv_layer(layer: nn.Module) -> bool:
    cls = type(layer)
    is_theirs = cls.__module__ == _HF and cls.__name__ == "ResNetConvLayer"
    return is_theirs and why_called(layer) is None and has_stock_code(cls, cls.forward, _CONV_LAYER_READS)


# ----------------------------------------------------------------------------------------------- torchvision's DenseNet


@register(
    "torchvision.models.densenet._DenseLayer",
    reads="isinstance Tensor memory_efficient any_requires_grad torch jit is_scripting Exception "
    "call_checkpoint_bottleneck bn_function conv2 relu2 norm2 drop_rate F dropout training",
    convs="conv1",
)
def _dense_layer(layer: Any, features: Any) -> Any:
    """conv2(relu2(norm2(conv1(relu1(norm1(cat(features))))))): the middle is a convolution with its norm."""
    inputs = [features] if isinstance(features, Tensor) else features
    recomputes = layer.memory_efficient and any(x.requires_grad for x in inputs)
    if recomputes or layer.drop_rate > 0 and layer.training:
        return NotImplemented
    x = features if isinstance(features, Tensor) else torch.cat(inputs, 1)
    out = conv_bn_act(layer.relu1(layer.norm1(x)), layer.conv1, layer.norm2, layer.relu2, backend=layer.backend)
    return layer.conv2(out)
