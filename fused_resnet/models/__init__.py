"""Models: torchvision's ResNets, SE-ResNet-50, the CIFAR networks, and `load_weights` for trained ones.

>>> model = models.resnet50(weights="resnet50-11ad3fa6.pth")
>>> model = models.create("resnet20", option="B")
"""

from __future__ import annotations

from torch import nn

from fused_resnet.models import cifar, resnet
from fused_resnet.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    seresnet50,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fused_resnet.models.weights import load_keras_weights, load_weights

_FAMILY = {
    resnet: (
        resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d,
        wide_resnet50_2, wide_resnet101_2, seresnet50,
    ),
    cifar: (
        cifar.resnet20, cifar.resnet32, cifar.resnet44, cifar.resnet56, cifar.resnet110, cifar.resnet1202,
        cifar.plain20, cifar.plain32, cifar.plain44, cifar.plain56, cifar.plain110,
        cifar.preact20, cifar.preact32, cifar.preact44, cifar.preact56, cifar.preact110, cifar.preact164,
        cifar.preact1001,
    ),
}  # fmt: skip
_BUILDERS = {builder.__name__: (builder, family) for family, builders in _FAMILY.items() for builder in builders}

__all__ = ["ResNet", "cifar", "create", "input_shape", "load_keras_weights", "load_weights", "names"]
__all__ += [builder.__name__ for builder in _FAMILY[resnet]]


def names() -> tuple[str, ...]:
    """Every name `create` takes: ImageNet models first, then the CIFAR ones."""
    return tuple(_BUILDERS)


def create(name: str, **kwargs) -> nn.Module:
    """The model called `name`, randomly initialised unless `weights` is given. kwargs: that model's builder's.

    Raises ValueError for an unknown name.
    """
    return _builder(name)[0](**kwargs)


def input_shape(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images the model called `name` was designed for: 224 or 32 pixels. ValueError if unknown."""
    return _builder(name)[1].INPUT_SHAPE


def _builder(name: str):
    if name not in _BUILDERS:
        raise ValueError(f"models: unknown model {name!r}; known ones are {', '.join(names())}.")
    return _BUILDERS[name]
