"""A trained network with a classifier for other classes."""

from __future__ import annotations

import importlib

from torch import nn

from fused_resnet import models
from fused_resnet.models.weights import Source

_LIBRARIES = ("timm", "torchvision")


def pretrained(name: str, weights: Source, classes: int) -> nn.Module:
    """The network called `name` with trained weights, and a new classifier.

    name: one of `models.names`, which take torchvision's weights, or timm/NAME or torchvision/NAME. weights: what
    `load_weights` reads. Raises ValueError for an unknown network, one without a classifier and a library that is not
    installed, and what `load_weights` raises.
    """
    library, _, rest = name.rpartition("/")
    model = _of_library(library, rest) if library else models.create(name)
    models.load_weights(model, weights)
    head = next((one for one in ("fc", "linear") if isinstance(getattr(model, one, None), nn.Linear)), None)
    if head is not None:
        setattr(model, head, nn.Linear(getattr(model, head).in_features, classes))
    elif hasattr(model, "reset_classifier"):  # timm's
        model.reset_classifier(classes)  # type: ignore[operator]
    else:
        raise ValueError(f"finetune: {name} has no classifier `fc` or `linear`, and no reset_classifier.")
    return model


def _of_library(library: str, name: str) -> nn.Module:
    if library not in _LIBRARIES:
        raise ValueError(f"finetune: networks are of {' or '.join(_LIBRARIES)}, or ours by name; got {library}/{name}.")
    try:
        found = importlib.import_module("torchvision.models" if library == "torchvision" else library)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"finetune: {library} cannot be imported here ({error}): pip install {library}.") from None
    try:
        return found.get_model(name, weights=None) if library == "torchvision" else found.create_model(name)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"finetune: {library} has no network {name!r} ({error}).") from None
