"""Residual networks that touch memory as rarely as the arithmetic allows.

fuse(model) for training and editing, freeze(model, example_input) for serving, functional and nn for building;
explain(model, example_input) says who computes what, and why.
"""

from fused_resnet import functional, models, nn
from fused_resnet.backends import BackendError
from fused_resnet.convert import fuse, unfuse
from fused_resnet.explanation import explain
from fused_resnet.frozen import freeze

__version__ = "0.1.0"

__all__ = ["BackendError", "explain", "freeze", "functional", "fuse", "models", "nn", "unfuse", "__version__"]
